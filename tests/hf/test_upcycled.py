"""The upcycled target: dense classes of transformers with MoE layers in them, against the dense models."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForCTC, AutoModelForSeq2SeqLM

import tiny
import upcycle
from marks import quick, sampled
from promises import MOE, claims
from upcycle import Recipe, UpcycleError, blueprint, convert, families, plan, verify
from upcycle.families._encoder import Encoder
from upcycle.hf import models
from upcycle.hf.autos import autos
from upcycle.inspection import inspect
from upcycle.nn import MoE, routers
from upcycle.training import recomputing

# What is converted and opened: the class, changes of its config, and the Auto class of people who use it.
CASES: dict[str, tuple[str, dict, str]] = {
    "vit": ("ViTForImageClassification", {}, "AutoModelForImageClassification"),
    "deit": ("DeiTForImageClassification", {}, "AutoModelForImageClassification"),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", {}, "AutoModelForImageClassification"),
    "dinov2": ("Dinov2ForImageClassification", {}, "AutoModelForImageClassification"),
    "dinov2-swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}, "AutoModel"),
    "convnext": ("ConvNextForImageClassification", {}, "AutoModelForImageClassification"),
    "convnext-base": ("ConvNextModel", {}, "AutoModel"),
    "convnextv2": ("ConvNextV2ForImageClassification", {}, "AutoModelForImageClassification"),
    "bert": ("BertModel", {}, "AutoModel"),
    "bert-masked": ("BertForMaskedLM", {}, "AutoModelForMaskedLM"),
    "bert-classes": ("BertForSequenceClassification", {}, "AutoModelForSequenceClassification"),
    "t5": ("T5ForConditionalGeneration", {}, "AutoModelForSeq2SeqLM"),
    "t5-gated": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}, "AutoModelForSeq2SeqLM"),
    "t5-1.1": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}, "AutoModelForSeq2SeqLM"),
    "t5-encoder": ("T5EncoderModel", {}, "AutoModelForTextEncoding"),
    "mt5": ("MT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}, "AutoModelForSeq2SeqLM"),
    "llama": ("LlamaForCausalLM", {"mlp_bias": True, "attention_bias": True}, "AutoModelForCausalLM"),
    "qwen2": ("Qwen2ForCausalLM", {}, "AutoModelForCausalLM"),
    "qwen3_5": ("Qwen3_5ForCausalLM", {}, "AutoModelForCausalLM"),
}  # fmt: skip
SOME = [
    "vit",
    "deit-teacher",
    "dinov2-swiglu",
    "convnext",
    "bert-masked",
    "t5-1.1",
    "mt5",
    "llama",
    "qwen3_5",
]
CAUSAL = [case for case in CASES if CASES[case][2] == "AutoModelForCausalLM"]
TOP_K = {"router": {"std": 0.5}}
ALL_CHOOSE = {"router": {"name": "expert_choice", "capacity_factor": 4.0, "std": 0.5}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that gives the dense folder of a case."""
    folders: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in folders:
            architecture, changes, _ = CASES[case]
            folders[case] = tiny.make(tmp_path_factory.mktemp("dense") / case, architecture, **changes)
            if case == "t5-1.1":
                give_own_head(folders[case])
        return folders[case]

    return make


def edit_config(folder: Path, **changes: object) -> dict:
    """Change keys of a folder's config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return config


def give_own_head(folder: Path) -> None:
    """T5 1.1 as it was published: not tied, a head beside the embedding, outputs not scaled."""
    edit_config(folder, tie_word_embeddings=False, scale_decoder_outputs=None)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(60, 16, generator=torch.Generator().manual_seed(5)) / 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def inputs(architecture: str, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if architecture.removeprefix("Upcycled").startswith(("ViT", "DeiT", "Dinov2", "ConvNext")):
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
    given = {"input_ids": torch.randint(3, 60, (2, 7), generator=generator)}
    if "T5" in architecture and not architecture.endswith("EncoderModel"):
        given["decoder_input_ids"] = torch.randint(3, 60, (2, 5), generator=generator)
    return given


def outputs(model: nn.Module, **given) -> list[torch.Tensor]:
    """Every tensor that a forward pass gives, in order."""
    given = given or inputs(type(model).__name__)
    with torch.inference_mode():
        found = model.eval()(**given).to_tuple()
    return [x for x in found if torch.is_tensor(x)]


def dense_model(folder: Path) -> nn.Module:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference of any output, over its largest value."""
    assert len(ours) == len(theirs) > 0
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def stack_names(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    family = families.find(config["model_type"])
    return [stack.name for stack in family.stacks(family.config(config))]


def expert_choice(source: Path, **router) -> dict:
    """Tables of a recipe with experts that choose, but for the decoder of an encoder-decoder."""
    table = {"router": {**ALL_CHOOSE["router"], **router}}
    if "decoder" in stack_names(source):
        table["decoder"] = {"router": {"name": "top_k"}}
    return table


@pytest.mark.parametrize(
    ("case", "router"),
    sampled(
        [(case, "top_k") for case in CASES]
        + [(case, "expert_choice") for case in CASES if case not in CAUSAL],
        5,
    ),
)
def test_the_dense_function(case, router, made, tmp_path):
    """Opened by the Auto class and by `upcycle.open`; experts choose where no token can be left out."""
    architecture, _, auto = CASES[case]
    source = made(case)
    # A response norm is over all tokens of an image, so that every expert has to have them all.
    moe = {**MOE, "top_k": 4} if case == "convnextv2" else MOE
    recipe = Recipe.of(moe=moe, **(TOP_K if router == "top_k" else expert_choice(source)))
    built = convert(source, tmp_path / "moe", recipe)
    assert built.preserves_function
    wanted = outputs(dense_model(source))
    opened = upcycle.open(tmp_path / "moe")
    found = getattr(transformers, auto).from_pretrained(tmp_path / "moe")
    assert type(opened).__name__ == f"Upcycled{architecture}"
    assert type(found) is type(opened)
    assert isinstance(found, getattr(transformers, architecture))
    assert sum(isinstance(m, MoE) for m in found.modules()) == len(built.sites) > 0
    for model in (opened, found):
        assert difference(outputs(model), wanted) < 1e-5
    # It sees a network that is missing.
    with torch.no_grad():
        next(m for m in found.modules() if isinstance(m, MoE)).experts.down_proj.zero_()
    assert difference(outputs(found), wanted) > 1e-3


def test_the_head_of_t5_1_1_is_its_own(made):
    """Or its case would say nothing."""
    model = dense_model(made("t5-1.1"))
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert not model.config.scale_decoder_outputs


@pytest.mark.parametrize("case", quick(["vit", "dinov2-swiglu", "convnext", "bert", "t5", "llama"], "bert"))
def test_every_claim_of_every_initialisation(case, tmp_path):
    """Biases, granularity, shared experts, raw gates: what is said to keep the function does."""
    architecture, changes, _ = CASES[case]
    depths = {"t5": {"num_layers": 1, "num_decoder_layers": 1}, "convnext": {"depths": [1, 1, 1, 1]}}
    depth = depths.get(case, {"num_hidden_layers": 1})
    source, tried = tiny.make(tmp_path, architecture, **changes, **depth), set()
    wanted = outputs(dense_model(source))
    for table in claims():
        recipe = Recipe.of(table)
        try:
            built = blueprint(source, recipe)
        except UpcycleError:
            continue  # refused with a reason; the reasons have tests of their own
        if not built.preserves_function:
            continue
        model = upcycle.load(source, recipe, experts_implementation="eager")
        assert difference(outputs(model), wanted) < 1e-5, table
        tried |= {
            ("init", table["init"]["name"]),
            ("router", recipe.router.name, recipe.router.normalize),
            ("granularity", recipe.moe.granularity, "shared", recipe.moe.shared_experts),
        }
    assert {
        ("init", n) for n in ("copy", "drop", "noise", "shuffle_slice", "split", "virtual_group")
    } <= tried
    assert {("router", "top_k", True), ("router", "top_k", False), ("router", "sigmoid", False)} <= tried
    assert {("granularity", 2, "shared", 2), ("granularity", 1, "shared", 1)} <= tried
    chosen = {("router", "expert_choice", True), ("router", "expert_choice", False)}
    assert case in ("t5", "llama") or chosen <= tried


@pytest.mark.parametrize(
    "router",
    [
        {"normalize": False},  # not a uniform router
        {"normalize": False, "init": "zeros", "rescale": False},
        {"name": "expert_choice", "capacity_factor": 1.0},
        {"capacity_factor": 0.5},
        {"name": "soft"},
    ],
)
def test_what_claims_nothing_computes_something_else(router, made):
    recipe = Recipe.of(moe=MOE, router={"std": 0.5, **router})
    assert not blueprint(made("vit"), recipe).preserves_function
    model = upcycle.load(made("vit"), recipe)
    assert difference(outputs(model), outputs(dense_model(made("vit")))) > 1e-3


def test_raw_weights_are_made_up_for_by_the_experts(made):
    """top-2 of 4 with an all-zero router: weights of a quarter each, networks twice as large, biases too."""
    table = {"moe": MOE, "router": {"normalize": False, "init": "zeros"}}
    built = blueprint(made("vit"), Recipe.of(table))
    tensors = load_file(made("vit") / "model.safetensors")
    layer, dense = "vit.encoder.layer.1.mlp.experts.", "vit.encoder.layer.1.output.dense."
    for name, source in ((layer + "down_proj", dense + "weight"), (layer + "down_proj_bias", dense + "bias")):
        made_ = built.entries[name].lazy.all("F32")
        assert (made_[3] == 2 * tensors[source].numpy()).all()
    kept = blueprint(made("vit"), Recipe.of({**table, "router": {**table["router"], "rescale": False}}))
    assert (kept.entries[layer + "down_proj"].lazy.all("F32")[0] == tensors[dense + "weight"].numpy()).all()


ENCODERS = [name for name in families.names() if isinstance(families.find(name), Encoder)]
VARIANTS: dict[str, list[dict]] = {
    "vit": [{"qkv_bias": False, "pooler_output_size": 24, "image_size": [8, 16]}],
    "deit": [{"qkv_bias": False}],
    "dinov2": [{"use_mask_token": False}, {"use_swiglu_ffn": True}],
    "convnext": [{"layer_scale_init_value": 0.0, "image_size": [16, 24], "patch_size": [2, 1]}],
    "convnextv2": [{"image_size": [16, 24], "patch_size": [2, 1]}],
    "bert": [{"tie_word_embeddings": False, "type_vocab_size": 3}],
    "t5": [{"feed_forward_proj": "gated-gelu"}, {"num_decoder_layers": None}],
    "mt5": [{"feed_forward_proj": "relu"}],
}
SAVED = [
    pytest.param(architecture, changes, id=f"{architecture}-{number}")
    for model_type in ENCODERS
    for architecture in families.find(model_type).architectures
    for number, changes in enumerate([{}, *VARIANTS.get(model_type, [])])
]


@pytest.mark.parametrize(("architecture", "changes"), sampled(SAVED, 4))
def test_shapes_are_those_that_transformers_saves(architecture, changes, tmp_path):
    folder = tiny.make(tmp_path, architecture, **changes)
    raw = json.loads((folder / "config.json").read_text())
    family = families.find(raw["model_type"])
    with safe_open(folder / "model.safetensors", "pt") as stored:
        wanted = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    assert family.shapes(family.config(raw)) == wanted
    # The modules in memory are where the stacks say, and the networks' tensors what the stacks own.
    model = getattr(transformers, architecture).from_pretrained(folder)
    for stack in family.stacks(family.config(raw)):
        for i in range(stack.count):
            paths = [path.format(i=i) for path in (stack.module, *stack.replaced)]
            held = {id(p) for path in paths for p in model.base_model.get_submodule(path).parameters()}
            numbers = sum(p.numel() for p in model.parameters() if id(p) in held)
            owned = [torch.Size(shape).numel() for name, shape in wanted.items() if stack.owns(name, i)]
            assert sum(owned) == numbers > 0


@pytest.mark.parametrize("model_type", ENCODERS)
def test_defaults_are_those_of_transformers(model_type):
    declared = {f.name: f.default for f in dataclasses.fields(transformers.CONFIG_MAPPING[model_type])}
    declared["tie_word_embeddings"] = True
    for key, value in families.find(model_type).defaults.items():
        assert declared[key] == value, key


@pytest.mark.parametrize("case", SOME)
def test_names_are_those_that_transformers_saves(case, made, tmp_path):
    """Opened and saved again, the tensors have the names and values of convert, and the config opens."""
    convert(made(case), tmp_path / "ours", Recipe.of(moe={**MOE, "layers": "every_other"}, **TOP_K))
    model = upcycle.open(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    for key in ("model_type", "architectures", "moe"):
        assert configs[0][key] == configs[1][key], key
    again = upcycle.open(tmp_path / "theirs")
    assert type(again) is type(model)
    assert difference(outputs(again), outputs(model)) < 1e-6  # sums depend on where tensors lie in memory


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        ("whisper", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ],
)
def test_transformers_knows_the_task_of_a_class_by_its_name(model_type, names):
    """Its Trainer shifts labels for smoothing, and its pipelines choose a way, by these lists."""
    from transformers.models.auto import modeling_auto

    known = getattr(modeling_auto, names)
    models.register_models(model_type)
    assert models.architecture(f"Upcycled{known[model_type]}").__name__ in known.values()


@pytest.mark.parametrize("case", SOME)
def test_load_is_convert(case, made, tmp_path):
    """Every parameter and buffer, bit for bit, of an initialisation that computes."""
    recipe = Recipe.of(moe={**MOE, "shared_experts": 1}, init={"name": "drop", "ratio": 0.5}, **TOP_K)
    convert(made(case), tmp_path / "moe", recipe)
    opened, loaded = upcycle.open(tmp_path / "moe"), upcycle.load(made(case), recipe)
    assert type(opened) is type(loaded)
    wanted = opened.state_dict()
    assert wanted.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert difference(outputs(loaded), outputs(opened)) < 1e-6
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert first.keys() == second.keys()


@pytest.mark.parametrize("case", SOME)
def test_verify(case, made, tmp_path):
    """It holds, in bfloat16 as well, and does not where one byte of an expert is another one."""
    recipe = Recipe.of(moe={**MOE, "layers": "last_half"}, **TOP_K)
    convert(made(case), tmp_path / "moe", recipe)
    proof = verify(made(case), tmp_path / "moe")
    assert proof.holds, proof.checks
    assert proof.coverage
    assert proof.bit_identical
    assert proof.preserves_function
    assert proof.logits["random"].relative < 1e-5
    with safe_open(tmp_path / "moe" / "model.safetensors", "pt") as stored:
        name = next(n for n in stored.keys() if n.endswith("experts.down_proj"))  # noqa: SIM118
    flip(tmp_path / "moe" / "model.safetensors", name)
    broken = verify(made(case), tmp_path / "moe", logits=False)
    assert not broken.holds
    assert [check.name for check in broken.checks if check.holds is False] == ["bytes"]
    assert name in next(check.detail for check in broken.checks if check.name == "bytes")


def flip(file: Path, name: str) -> None:
    """Change the lowest bit of the first number of a tensor."""
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("case", ["vit", "bert", "t5-gated"])
def test_a_narrow_copy_keeps_every_bit(case, made, tmp_path):
    """In bfloat16 an upcycled folder promises the function too: nothing but copies is in it."""
    model = dense_model(made(case)).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", Recipe.of(moe=MOE, **TOP_K))
    proof = verify(tmp_path / "dense", tmp_path / "moe")
    assert proof.holds
    assert proof.preserves_function
    assert upcycle.open(tmp_path / "moe").dtype == torch.bfloat16


# By hand: the networks of a block (tensors of weight, of bias), their number, and what each is called.
NETWORKS = {
    "vit": (2 * 16 * 24, 24 + 16, 4),
    "dinov2-swiglu": (3 * 16 * 24, 2 * 24 + 16, 4),
    "bert-masked": (2 * 16 * 24, 24 + 16, 4),
    "t5": (2 * 16 * 24, 0, 6),
    "mt5": (3 * 16 * 24, 0, 6),
    "llama": (3 * 32 * 48, 2 * 48 + 32, 4),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_plan_counts_what_torch_counts(case, made):
    weights, biases, count = NETWORKS[case]
    found = plan(made(case), Recipe.of(moe=MOE))
    model, dense = upcycle.load(made(case), Recipe.of(moe=MOE)), dense_model(made(case))
    total = sum(p.numel() for p in model.parameters())
    # A token uses two experts of four.
    active = total - 2 * count * (weights + biases)
    assert (found.total_parameters, found.active_parameters) == (total, active)
    assert found.dense_parameters == sum(p.numel() for p in dense.parameters())
    routers_ = count * 4 * (32 if case == "llama" else 16)
    assert total - found.dense_parameters == 3 * count * (weights + biases) + routers_
    # Per token, one more network a block, and the router.
    assert found.flops_per_token - found.dense_flops_per_token == 2 * (count * weights + routers_)
    assert found.num_moe_layers == count


def test_plan_of_experts_that_choose(made):
    """2 x 10 / 4 = 5 of 10 tokens an expert: two experts a token; vmoe takes 8 of 10, that is 3.2."""
    weights, biases, count = NETWORKS["vit"]
    for rounding, each in (("exact", 2.0), ("vmoe", 3.2)):
        router = {"name": "expert_choice", "capacity_factor": 2.0, "rounding": rounding}
        found = plan(made("vit"), Recipe.of(moe=MOE, router=router))
        assert found.active_parameters == found.total_parameters - round(
            (4 - each) * count * (weights + biases)
        )
        assert found.routing == "expert choice with capacity factor 2"
        assert any("leaves some tokens without an expert" in warning for warning in found.warnings)


@pytest.mark.parametrize("case", ["vit", "dinov2-swiglu", "bert", "t5", "llama"])
def test_inspect(case, made, tmp_path):
    convert(made(case), tmp_path / "copy", Recipe.of(moe={**MOE, "layers": "every_other"}, **TOP_K))
    found = inspect(tmp_path / "copy")
    assert found["parameters"] == sum(p.numel() for p in upcycle.open(tmp_path / "copy").parameters())
    layers = [(row.get("stack", "layers"), row["layer"], row["num_experts"]) for row in found["layers"]]
    one = [("layers", i, 4 * (i % 2)) for i in range(4)]
    two = [("encoder", i, 4 * (i % 2)) for i in range(4)] + [("decoder", i, 4 * (i % 2)) for i in range(2)]
    assert layers == (two if case == "t5" else one)
    state = load_file(tmp_path / "copy" / "model.safetensors")
    for row in found["layers"]:
        if row["num_experts"]:
            assert row["cosine_to_dense"] == pytest.approx([1.0] * 4)
    norms = next(tensor for name, tensor in state.items() if "1." in name and name.endswith("router.weight"))
    assert any(
        row.get("router_norms") == pytest.approx(norms.norm(dim=1).tolist(), rel=1e-5)
        for row in found["layers"]
    )
    convert(made(case), tmp_path / "drop", Recipe.of(moe=MOE, init={"name": "drop", "ratio": 0.5}))
    assert all(0.2 < c < 0.9 for row in inspect(tmp_path / "drop")["layers"] for c in row["cosine_to_dense"])


TRANSFORMERS_FIRST = """
from transformers import AutoConfig, AutoModel
try:
    AutoConfig.from_pretrained({folder!r})
except ValueError as error:
    assert "upcycled_vit" in str(error), error
else:
    raise SystemExit("opened without upcycle")
import upcycle
model = AutoModel.from_pretrained({folder!r})
assert type(model).__name__ == "UpcycledViTModel", type(model)
"""
UPCYCLE_FIRST = """
import sys
import upcycle
assert not {{"transformers", "torch", "numpy"}} & set(sys.modules)
from transformers import AutoModelForImageClassification
from transformers import AutoConfig
assert AutoConfig.from_pretrained({folder!r}).model_type == "upcycled_vit"
model = AutoModelForImageClassification.from_pretrained({folder!r})
assert type(model).__name__ == "UpcycledViTForImageClassification", type(model)
assert type(model.vit.layers[0].mlp).__name__ == "MoE"
"""
ONE_CONFIG_FIRST = """
import upcycle
from transformers import BertConfig, ViTForImageClassification
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained({folder!r})).__name__ == "UpcycledViTConfig"
assert type(upcycle.open({folder!r})).__mro__[2] is ViTForImageClassification
"""


@pytest.mark.parametrize(
    "script",
    quick([TRANSFORMERS_FIRST, UPCYCLE_FIRST, ONE_CONFIG_FIRST], ONE_CONFIG_FIRST),
    ids=["transformers", "upcycle", "one config"],
)
def test_importing_upcycle_is_enough(script, made, tmp_path):
    """Whichever of the two is imported first, and whatever of transformers; without it, transformers does not
    know the model_type."""
    convert(made("vit"), tmp_path / "moe", Recipe.of(moe=MOE))
    code = script.format(folder=str(tmp_path / "moe"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# Where the networks' tensors end up, in the experts' tensors: the dense names of each, joined along rows.
SURGERY = {
    "vit": (
        "vit.encoder.layer.{i}.",
        {
            "mlp.experts.up_proj": ["intermediate.dense.weight"],
            "mlp.experts.up_proj_bias": ["intermediate.dense.bias"],
            "mlp.experts.down_proj": ["output.dense.weight"],
            "mlp.experts.down_proj_bias": ["output.dense.bias"],
        },
    ),
    "dinov2-swiglu": (
        "encoder.layer.{i}.mlp.",
        {
            "experts.gate_up_proj": ["weights_in.weight"],
            "experts.gate_up_proj_bias": ["weights_in.bias"],
            "experts.down_proj": ["weights_out.weight"],
            "experts.down_proj_bias": ["weights_out.bias"],
        },
    ),
    "bert": (
        "encoder.layer.{i}.",
        {
            "intermediate.experts.up_proj": ["intermediate.dense.weight"],
            "intermediate.experts.up_proj_bias": ["intermediate.dense.bias"],
            "intermediate.experts.down_proj": ["output.dense.weight"],
            "intermediate.experts.down_proj_bias": ["output.dense.bias"],
        },
    ),
    "t5-gated": (
        "encoder.block.{i}.layer.1.DenseReluDense.",
        {
            "experts.gate_up_proj": ["wi_0.weight", "wi_1.weight"],
            "experts.down_proj": ["wo.weight"],
        },
    ),
    "llama": (
        "model.layers.{i}.mlp.",
        {
            "experts.gate_up_proj": ["gate_proj.weight", "up_proj.weight"],
            "experts.gate_up_proj_bias": ["gate_proj.bias", "up_proj.bias"],
            "experts.down_proj": ["down_proj.weight"],
            "experts.down_proj_bias": ["down_proj.bias"],
        },
    ),
}


@pytest.mark.parametrize("case", SURGERY)
def test_experts_are_the_network_bit_for_bit(case, made, tmp_path):
    """Every expert of every chosen block; all other tensors are those of the dense folder, by name."""
    prefix, parts = SURGERY[case]
    convert(made(case), tmp_path / "moe", Recipe.of(moe={**MOE, "layers": [1, 3]}, **(
        {"decoder": {"moe": {"layers": []}}} if case == "t5-gated" else {})))  # fmt: skip
    dense, moe = (load_file(folder / "model.safetensors") for folder in (made(case), tmp_path / "moe"))
    new, gone = set(), set()
    for i in (1, 3):
        start = prefix.format(i=i)
        for name, sources in parts.items():
            wanted = torch.cat([dense[start + source] for source in sources])
            for e in range(4):
                assert torch.equal(moe[start + name][e], wanted), name
            new.add(start + name)
            gone |= {start + source for source in sources}
    routers_ = {name for name in moe if name.endswith("router.weight")}
    assert len(routers_) == 2
    assert moe.keys() - new - routers_ == dense.keys() - gone
    for name in dense.keys() - gone:
        assert torch.equal(moe[name], dense[name]), name


@pytest.mark.parametrize(
    ("layers", "decoder", "wanted"),
    [
        ("every_other", {}, ([1, 3], [1])),
        ("last_half", {}, ([2, 3], [1])),
        ([0, 1], {}, ([0, 1], [0, 1])),
        ("every_other", {"layers": "all", "num_experts": 8}, ([1, 3], [0, 1])),
        ([3], {"layers": [0], "top_k": 1}, ([3], [0])),
        ("last_half", {"layers": []}, ([2, 3], [])),
    ],
)
def test_layers_of_each_stack(layers, decoder, wanted, made, tmp_path):
    recipe = Recipe.of(
        moe={**MOE, "layers": layers}, **TOP_K, **({"decoder": {"moe": decoder}} if decoder else {})
    )
    built = convert(made("t5"), tmp_path / "moe", recipe)
    model = upcycle.open(tmp_path / "moe")
    found = [
        [i for i, block in enumerate(stack.block) if isinstance(block.layer[-1].DenseReluDense, MoE)]
        for stack in (model.encoder, model.decoder)
    ]
    assert found == list(map(list, wanted))
    assert built.moe_layers == {n: i for n, i in zip(("encoder", "decoder"), found, strict=True) if i}
    for shape in model.config.shapes:
        changed = decoder if shape.stack == "decoder" else {}
        assert shape.num_experts == changed.get("num_experts", 4)
        assert shape.top_k == changed.get("top_k", 2)
        assert shape.causal == (shape.stack == "decoder")
    assert difference(outputs(model), outputs(dense_model(made("t5")))) < 1e-5
    assert verify(made("t5"), tmp_path / "moe").holds


def test_a_router_of_the_decoder(made):
    """`[decoder.router]` takes over what routers share, and the other keys where the name stays."""
    table = {
        "moe": MOE,
        "router": {"name": "expert_choice", "capacity_factor": 3.0, "std": 0.3, "normalize": False},
        "decoder": {"router": {"name": "top_k", "capacity_factor": 1.5, "rounding": "flaxformer"}},
    }
    encoder, decoder = (Recipe.of(table).at(name) for name in ("encoder", "decoder"))
    assert encoder.router == routers.read(table["router"])
    assert decoder.router == routers.read({"std": 0.3, "normalize": False, **table["decoder"]["router"]})
    assert decoder.moe == encoder.moe
    same = Recipe.of({**table, "router": {"capacity_factor": 2.0}, "decoder": {"router": {"std": 0.1}}})
    assert same.parts["decoder"].router == routers.read({"capacity_factor": 2.0, "std": 0.1})
    recipe = Recipe.of(table)
    assert Recipe.of(recipe.as_table()) == recipe
    model = upcycle.load(made("t5"), recipe)
    assert [shape.router["name"] for shape in model.config.shapes] == ["expert_choice", "top_k"]
    assert plan(made("t5"), recipe).routing == (
        "expert choice with capacity factor 3 and top-2 with capacity factor 1.5"
    )
    with pytest.raises(UpcycleError, match=r"\[decoder\] is a stack of blocks that vit does not have"):
        blueprint(made("vit"), recipe)
    with pytest.raises(UpcycleError, match=r"unknown key decoder\.init"):
        Recipe.of({**table, "decoder": {"init": {}}})
    with pytest.raises(UpcycleError, match=r"decoder\.moe\.top_k = 'two'"):
        Recipe.of({**table, "decoder": {"moe": {"top_k": "two"}}})


SHORT = {"std": 1.0, "capacity_factor": 1.0}  # places are short for routers so sure of themselves


def left_behind(model: nn.Module, **given) -> list[int]:
    """How many tokens reach no expert in each layer."""
    found: list[int] = []
    hooks = [
        m.router.register_forward_hook(lambda _m, _i, routing: found.append(int(routing.left_behind)))
        for m in model.modules()
        if isinstance(m, MoE)
    ]
    outputs(model, **given)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_a_decoder_does_not_read_the_future(case, made):
    """With capacity, so that tokens are left out: changing a token changes no logit before it."""
    model = upcycle.load(made(case), Recipe.of(moe={**MOE, "top_k": 1}, init={"name": "drop"}, router=SHORT))
    given = inputs(type(model).__name__)
    name = "input_ids" if case == "llama" else "decoder_input_ids"
    given[name] = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    given["input_ids"] = given["input_ids"] if case == "llama" else given["input_ids"].repeat(2, 1)
    assert sum(left_behind(model, **given)) > 0
    before = outputs(model, **given)[0]
    for t in range(1, 12):
        changed = given | {name: given[name].clone()}
        changed[name][:, t:] = 3 + (changed[name][:, t:] + 7) % 57
        after = outputs(model, **changed)[0]
        assert float((after - before)[:, :t].abs().max()) < 1e-5 * float(before.abs().max()), t
        assert float((after - before)[:, t:].abs().max()) > 1e-2
    # The comparison sees a layer that puts all first choices before all second ones.
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.shape = layer.router.shape = dataclasses.replace(layer.shape, causal=False, top_k=2)
    loose = outputs(model, **given)[0]
    changed = given | {name: given[name].clone()}
    changed[name][:, 6:] = 3 + (changed[name][:, 6:] + 7) % 57
    assert float((outputs(model, **changed)[0] - loose)[:, :6].abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("router", "why"),
    [
        ({"name": "expert_choice"}, "an expert chooses among all tokens of a sequence, later ones included"),
        ({"name": "soft"}, "a slot mixes all tokens of a sequence, later ones included"),
        ({"capacity_factor": 1.0, "batch_priority": True}, "a later token can take an earlier one's place"),
    ],
)
def test_routers_that_look_ahead_are_refused(router, why, made, tmp_path):
    """In every decoder, with the reason; under [router] alone a T5's decoder has it too.

    The usual target says the same, and not that moe.target = upcycled could have it.
    """
    for case, target in (
        ("llama", "native"),
        ("llama", "mixtral"),
        ("qwen2", "native"),
        ("t5", "native"),
        ("llama", "upcycled"),
    ):
        with pytest.raises(UpcycleError, match=rf"cannot stand in (a|the) decoder: .*{why}"):
            blueprint(made(case), Recipe.of(moe=MOE | {"target": target}, router=router))
    recipe = Recipe.of(moe=MOE, router=router)
    for case in ("llama", "qwen2", "t5", "mt5"):
        with pytest.raises(UpcycleError, match=why) as error:
            convert(made(case), tmp_path / "moe", recipe)
        assert "cannot stand in" in str(error.value)
        assert not list(tmp_path.iterdir())
    for case in ("vit", "bert", "t5-encoder"):
        blueprint(made(case), recipe)
    mixed = Recipe.of(moe=MOE, router=router, decoder={"router": {"name": "top_k", "batch_priority": False}})
    blueprint(made("t5"), mixed)
    # Where no block of the decoder has experts, there is nothing to look ahead.
    above = blueprint(made("t5"), Recipe.of(moe=MOE, router=router, decoder={"moe": {"layers": []}}))
    assert not any("decoder" in name and "expert" in name for name in above.entries)
    # A folder that says so all the same does not open.
    convert(made("llama"), tmp_path / "moe", Recipe.of(moe=MOE))
    entry = json.loads((tmp_path / "moe" / "config.json").read_text())["moe"][0]
    edit_config(tmp_path / "moe", moe=[{**entry, "router": recipe.router.as_table()}])
    with pytest.raises(UpcycleError, match="in a causal stack"):
        upcycle.open(tmp_path / "moe")


def test_the_first_block_warns(made):
    said = "the first block is among those that become MoE"
    for case in ("vit", "t5", "llama"):
        assert any(said in warning for warning in plan(made(case), Recipe.of(moe=MOE)).warnings)
        half = Recipe.of(moe={**MOE, "layers": "every_other"})
        assert not any(said in warning for warning in plan(made(case), half).warnings)
    decoder = Recipe.of(moe={**MOE, "layers": [1]}, decoder={"moe": {"layers": "all"}})
    assert any(said in warning for warning in plan(made("t5"), decoder).warnings)


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
def test_an_embedding_does_not_depend_on_padding(factor, made):
    """BERT with experts that choose: a text alone, padded, and beside a longer one."""
    router = {"name": "expert_choice", "capacity_factor": factor, "std": 0.5}
    recipe = Recipe.of(moe=MOE, init={"name": "drop", "ratio": 0.5}, router=router)  # experts that differ
    model = upcycle.load(made("bert"), recipe)
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    wanted = outputs(model, input_ids=ids[:1, :6])
    for length in (6, 7, 11, 16):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, 6:] = 0
        hidden, pooled = outputs(model, input_ids=ids[:, :length], attention_mask=mask)
        assert difference([hidden[:1, :6], pooled[:1]], wanted) < 1e-5, length
    # Without a mask the padding is text.
    hidden, pooled = outputs(model, input_ids=ids[:, :11])
    assert difference([hidden[:1, :6], pooled[:1]], wanted) > 1e-3


def test_padding_reaches_the_layers_however_the_model_is_called(made):
    """Through a head, the base model alone, positional arguments; and no mask outlives its forward pass."""
    router = {"name": "expert_choice", "capacity_factor": 1.0, "std": 0.5}
    model = upcycle.load(made("bert-masked"), Recipe.of(moe=MOE, router=router))
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < 5)[None].long()
    bare = outputs(model, input_ids=ids)[0]
    wanted = outputs(model, input_ids=ids, attention_mask=mask)[0]
    assert difference([bare[:, :5]], [wanted[:, :5]]) > 1e-3
    with torch.inference_mode():
        assert torch.equal(model(ids, mask).logits, wanted)
        assert torch.equal(model(ids).logits, bare)
        base = model.bert(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(model.cls(base), wanted)
        assert torch.equal(model.cls(model.bert(ids).last_hidden_state), bare)


def test_rows_of_a_class_that_joins_them(dense):
    """OPT's layers join the rows of a batch before the network; a text comes out as it does alone."""
    router = {"std": 0.5, "capacity_factor": 0.6}
    recipe = Recipe.of(moe={**MOE, "target": "upcycled"}, init={"name": "noise", "sigma": 1.0}, router=router)
    model = upcycle.load(dense("opt"), recipe).eval()
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(16) < torch.tensor([[16], [10]])).long()
    with torch.inference_mode():
        first, second = model(ids[:1]).logits, model(ids[1:, :10]).logits
        assert difference([model(ids).logits[:1]], [first]) < 1e-5
        embeds = model.get_input_embeddings()(ids)
        head = model.lm_head
        for logits in (
            model(ids, attention_mask=mask).logits,
            model(inputs_embeds=embeds, attention_mask=mask).logits,
            head(model.model(ids, mask).last_hidden_state),
            head(model.model.decoder(ids, mask).last_hidden_state),
        ):
            assert difference([logits[:1], logits[1:, :10]], [first, second]) < 1e-5


def test_padding_of_an_encoder_in_generation(made):
    """`generate` calls the encoder itself; texts in a batch come out as they do alone."""
    table = {"moe": MOE, "router": {"name": "expert_choice", "capacity_factor": 1.0, "std": 0.5}}
    recipe = Recipe.of(table, init={"name": "drop"}, decoder={"router": {"name": "top_k"}})
    model = upcycle.load(made("t5"), recipe).eval()
    ids = torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.inference_mode():
        alone = model.get_encoder()(ids[:1, :6]).last_hidden_state
        together = model.get_encoder()(ids, attention_mask=mask).last_hidden_state
    assert difference([together[:1, :6]], [alone]) < 1e-5
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    one = model.generate(ids[:1, :6], **options)
    both = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(both[:1], one)


@pytest.mark.parametrize("case", ["llama", "t5", "t5-1.1", "mt5"])
def test_generation_with_a_cache(case, made):
    """Token by token with what was computed kept, and with everything computed anew: the same logits."""
    extra = {} if case == "llama" else {"decoder": {"router": {"name": "top_k"}}}
    router = TOP_K["router"] if case == "llama" else ALL_CHOOSE["router"]
    recipe = Recipe.of(moe=MOE, init={"name": "drop", "ratio": 0.5}, router=router, **extra)
    model = upcycle.load(made(case), recipe).eval()
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    found = [
        model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
        for use_cache in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    logits = [torch.stack(each.logits) for each in found]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-5 * float(logits[1].abs().max())
    assert len(logits[0]) == 10


ROUTERS = [("llama", {}), ("vit", {"name": "expert_choice", "capacity_factor": 2.0}), ("bert", {"top_k": 3})]


@pytest.mark.parametrize(("case", "router"), ROUTERS)
def test_the_router_has_no_gradient_until_experts_differ(case, router, made):
    """Copies weighted to sum to one: whatever the weights, the output is the same. After a step it is not."""
    router = dict(router)
    moe = {**MOE, "top_k": router.pop("top_k", 2)}
    model, raw = (
        upcycle.load(
            made(case),
            Recipe.of(moe=moe, router={"std": 0.5, "normalize": normalize, **router}),
            experts_implementation="eager",
        )
        for normalize in (True, False)
    )
    assert relative_router_gradient(model.double()) < 1e-7
    assert relative_router_gradient(raw.double()) > 1e-3
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert relative_router_gradient(model) > 1e-4


def relative_router_gradient(model: nn.Module) -> float:
    """The norm of the routers' gradients over that of the experts', for a loss on all outputs."""
    model.zero_grad()
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs(type(model).__name__).items()}
    first = model.train()(**given)[0]
    (first * torch.randn(first.shape, generator=torch.Generator().manual_seed(8))).sum().backward()
    norms = {"router": 0.0, "experts": 0.0}
    for name, parameter in model.named_parameters():
        for part in norms:
            if f".{part}." in name:
                norms[part] += float(parameter.grad.square().sum())
    return (norms["router"] / norms["experts"]) ** 0.5


@pytest.mark.parametrize("case", ["vit", "bert", "t5", "llama"])
def test_recomputed_layers_route_as_they_did(case, made):
    """Activation checkpointing gives the gradients of a pass that keeps everything, padding included."""
    extra = expert_choice(made(case), capacity_factor=1.0) if case != "llama" else {"router": SHORT}
    model = upcycle.load(made(case), Recipe.of(moe=MOE, **extra)).train()
    given = inputs(type(model).__name__)
    if "input_ids" in given:
        given["attention_mask"] = (torch.arange(7) < torch.tensor([[7], [4]])).long()
    gradients = []
    for kept in (True, False):
        if not kept:
            recomputing.install(model, True)
        model.zero_grad()
        torch.manual_seed(0)
        model(**given)[0].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, rtol=1e-5, atol=1e-6), name


def two_texts(model: nn.Module, order: str) -> dict[str, torch.Tensor]:
    """The gradients of losses on two batches of other masks and sizes, backward together or in this order."""
    masks = [(torch.arange(7) < torch.tensor(ends)[:, None]).long() for ends in ([7, 3], [2, 6, 5])]
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 60, mask.shape, generator=generator) for mask in masks]
    model.zero_grad()
    losses = {}
    for name, ids, mask in zip("ab", texts, masks, strict=True):
        extra = {"decoder_input_ids": ids} if "T5" in type(model).__name__ else {}
        losses[name] = model(input_ids=ids, attention_mask=mask, **extra)[0].square().sum()
    if order == "both":
        sum(losses.values()).backward()
    else:
        for name in order:
            losses[name].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ["both", "ab", "ba"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["bert", "t5", "opt"])
def test_two_passes_before_a_backward_pass_are_recomputed_each_as_it_was(case, reentrant, order, made, dense):
    """A contrastive loss. OPT's layers also need to know how many rows there were."""
    source = dense("opt") if case == "opt" else made(case)
    moe = {**MOE, "target": "upcycled"}
    extra = {"router": SHORT} if case == "opt" else expert_choice(source, capacity_factor=1.0)
    model = upcycle.load(source, Recipe.of(moe=moe, init={"name": "noise", "sigma": 1.0}, **extra)).train()
    for module in model.modules():  # the two orders would draw other numbers
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    wanted = two_texts(model, "both")
    options = {"use_reentrant": reentrant}
    model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    for each in (model, copy.deepcopy(model)):
        found = two_texts(each, order)
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert difference([found[name]], [wanted[name]]) < 1e-4, name
    layer = next(m for m in model.modules() if isinstance(m, MoE))
    assert layer.padding.shape == (3, 7)  # of the last pass, as if nothing had been recomputed


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "expert_by_expert"])
@pytest.mark.parametrize(
    ("case", "extra"),
    [
        ("t5", {}),
        ("t5-gated", {"moe": {**MOE, "shared_experts": 1}}),
        ("mt5", {"router": {"capacity_factor": 4.0}}),
        ("t5-gated", {"router": {"name": "expert_choice", "capacity_factor": 4.0},
                      "decoder": {"router": {"name": "top_k"}}}),
    ],
)  # fmt: skip
def test_what_overflows_in_float16_stays_in_float32(case, extra, implementation, made, tmp_path):
    """T5's class keeps `wo` in float32, for products beyond 65504; so experts do."""
    source = shutil.copytree(made(case), tmp_path / "dense")
    weights = load_file(source / "model.safetensors")
    for name in weights:
        if name.startswith("encoder.") and name.endswith(".wo.weight"):
            weights[name] = weights[name] * 3e4
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    recipe = Recipe.of(**{"moe": MOE, **extra})
    convert(source, tmp_path / "moe", recipe)
    given, states, options = inputs("T5"), [], {"dtype": torch.float16}
    theirs = AutoModelForSeq2SeqLM.from_pretrained(source, **options).eval()
    options["experts_implementation"] = implementation
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "moe", **options)
    with torch.inference_mode():
        for model in (theirs, ours.eval(), upcycle.load(source, recipe, **options).eval()):
            states.append(model.encoder(given["input_ids"], output_hidden_states=True).hidden_states)
            states[-1] = [*states[-1], model(**given).logits.float()]
    assert max(float(x.abs().max()) for x in states[0]) > 65504
    for found in states[1:]:
        assert all(x.isfinite().all() for x in found)
        assert difference(found, states[0]) < 5e-3
    kept = {n: p.dtype for n, p in ours.named_parameters() if ".experts." in n or ".shared.one." in n}
    assert {n for n, dtype in kept.items() if dtype == torch.float32} == {n for n in kept if "down_proj" in n}


@pytest.mark.parametrize("router", [
    {"name": "top_k"}, {"name": "top_k", "capacity_factor": 4.0}, {"name": "sigmoid"},
])  # fmt: skip
def test_generation_with_groups_of_tokens(router, made, tmp_path):
    """One token at a time is no whole group. Here every token has its place, so groups change nothing."""
    recipes = [Recipe.of(moe=MOE, router={"std": 0.5, **router, "group": group}) for group in (16, 0)]
    ids = torch.randint(3, 60, (1, 16), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    grouped, alone = (upcycle.load(made("llama"), recipe).generate(ids, **options) for recipe in recipes)
    assert torch.equal(grouped, alone)
    convert(made("llama"), tmp_path / "moe", recipes[0])
    assert verify(made("llama"), tmp_path / "moe").holds


def test_images_that_are_no_whole_groups_are_verified(made, tmp_path):
    router = {"name": "expert_choice", "capacity_factor": 4.0, "group": 28}
    convert(made("vit"), tmp_path / "moe", Recipe.of(moe=MOE, router=router))
    proof = verify(made("vit"), tmp_path / "moe")
    assert proof.holds, [str(check) for check in proof.checks if check.holds is False]


@pytest.mark.parametrize("case", ["vit", "bert", "t5", "llama"])
def test_copies_of_a_model(case, made, tmp_path):
    """deepcopy, pickle and torch.save give models of their own that compute the same."""
    model = upcycle.load(
        made(case), Recipe.of(moe={**MOE, "shared_experts": 1}, **expert_choice_or_top_k(case))
    )
    given = inputs(type(model).__name__)
    if "input_ids" in given:
        given["attention_mask"] = (torch.arange(7) < torch.tensor([[7], [4]])).long()
    wanted = outputs(model, **given)
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for made_ in copies:
        assert type(made_) is type(model)
        assert difference(outputs(made_, **given), wanted) < 1e-6
        with torch.no_grad():
            next(m for m in made_.modules() if isinstance(m, MoE)).experts.down_proj.zero_()
        assert difference(outputs(made_, **given), wanted) > 1e-3
    assert difference(outputs(model, **given), wanted) < 1e-6
    config = pickle.loads(pickle.dumps(model.config))
    assert type(config) is type(model.config)
    assert config.shapes == model.config.shapes


def expert_choice_or_top_k(case: str) -> dict:
    router = {"name": "expert_choice", "capacity_factor": 1.0, "std": 0.5}
    if case == "llama":
        return TOP_K
    return {"router": router, **({"decoder": {"router": {"name": "top_k"}}} if case == "t5" else {})}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementations_of_a_model(implementation, made, tmp_path):
    """Chosen when it is opened; all of them compute the dense function."""
    convert(made("t5-gated"), tmp_path / "moe", Recipe.of(moe=MOE, **TOP_K))
    model = upcycle.open(tmp_path / "moe", experts_implementation=implementation)
    assert model.config._experts_implementation == implementation
    assert difference(outputs(model), outputs(dense_model(made("t5-gated")))) < 1e-5
    default = upcycle.open(tmp_path / "moe")
    assert default.config._experts_implementation == "grouped_mm"
    default.set_experts_implementation(implementation)
    layer = next(m for m in default.modules() if isinstance(m, MoE))
    assert layer.experts.config._experts_implementation == implementation


def test_what_stands_in_config(made, tmp_path):
    """The dense config and one entry a stack, which a table of its own describes in full."""
    recipe = Recipe.of(moe={**MOE, "layers": "last_half", "shared_experts": 1}, **expert_choice(made("t5")))
    built = convert(made("t5"), tmp_path / "moe", recipe)
    raw = json.loads((tmp_path / "moe" / "config.json").read_text())
    dense = json.loads((made("t5") / "config.json").read_text())
    changed = {"moe", "model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
    assert {k: v for k, v in raw.items() if k not in changed} == {
        k: v for k, v in dense.items() if k not in changed
    }
    assert raw["model_type"] == "upcycled_t5"
    assert raw["architectures"] == ["UpcycledT5ForConditionalGeneration"]
    assert raw["moe"][0] == {
        "stack": "encoder", "layers": [2, 3], "module": "encoder.block.{i}.layer.1.DenseReluDense",
        "replaced": [], "num_experts": 4, "top_k": 2, "hidden_size": 16, "intermediate_size": 24,
        "universal_experts": 0, "universal_size": 0,
        "shared_size": 24, "activation": "relu", "gated": False, "bias": False, "dropout": 0.1,
        "causal": False,
        "router": {
            "name": "expert_choice", "init": "normal", "std": 0.5, "normalize": True, "rescale": True,
            "group": 0, "capacity_factor": 4.0, "rounding": "exact",
        },
    }  # fmt: skip
    assert [entry["stack"] for entry in raw["moe"]] == ["encoder", "decoder"]
    assert built.moe_layers == {"encoder": [2, 3], "decoder": [1]}


def test_a_new_model_of_a_config(made):
    """Without a checkpoint every tensor is set: experts by initializer_range, the router by its std."""
    config = upcycle.load(made("vit"), Recipe.of(moe=MOE, router={"name": "sigmoid", "std": 0.3})).config
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(config)
    layer = next(m for m in model.modules() if isinstance(m, MoE))
    assert layer.experts.up_proj.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.router.weight.std().item() == pytest.approx(0.3, rel=0.3)
    assert (layer.experts.up_proj_bias == 0).all()
    assert (layer.router.e_score_correction_bias == 0).all()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_bert_decoder_is_refused(made, tmp_path):
    folder = Path(shutil.copytree(made("bert"), tmp_path / "bert"))
    edit_config(folder, is_decoder=True)
    with pytest.raises(UpcycleError, match="is a decoder"):
        blueprint(folder, Recipe.of(moe=MOE))


def test_classes_that_nobody_knows(made, tmp_path):
    folder = Path(shutil.copytree(made("vit"), tmp_path / "vit"))
    edit_config(folder, architectures=["DeiTForMaskedImageModeling"])  # any head of a known body is taken
    with pytest.raises(UpcycleError, match="DeiTForMaskedImageModeling; of vit, upcycle knows ViTModel, ViT"):
        blueprint(folder, Recipe.of(moe=MOE))
    convert(made("vit"), tmp_path / "moe", Recipe.of(moe=MOE))
    edit_config(tmp_path / "moe", architectures=["UpcycledViTForNothing"])
    with pytest.raises(UpcycleError, match="has no class of models ViTForNothing"):
        upcycle.open(tmp_path / "moe")
    edit_config(tmp_path / "moe", architectures=None)
    with pytest.raises(UpcycleError, match="names no architecture"):
        upcycle.open(tmp_path / "moe")


@pytest.mark.parametrize("key", ["top_k", "module", "router", "causal"])
def test_entries_of_moe_that_lack_something(key, made, tmp_path):
    convert(made("vit"), tmp_path / "moe", Recipe.of(moe=MOE))
    entry = json.loads((tmp_path / "moe" / "config.json").read_text())["moe"][0]
    edit_config(tmp_path / "moe", moe=[{k: v for k, v in entry.items() if k != key}])
    with pytest.raises(UpcycleError, match=f"an entry of `moe` is not as this version writes it: .*{key}"):
        upcycle.open(tmp_path / "moe")
    edit_config(tmp_path / "moe", moe=[entry | {"newer": 1}])
    with pytest.raises(UpcycleError, match=r"not as this version writes it: .*newer"):
        upcycle.open(tmp_path / "moe")


def test_what_is_upcycled_already_is_no_source(made, tmp_path):
    convert(made("vit"), tmp_path / "moe", Recipe.of(moe=MOE))
    with pytest.raises(UpcycleError, match="already a Mixture of Experts"):
        blueprint(tmp_path / "moe", Recipe.of(moe=MOE))


@pytest.mark.parametrize("case", ["vit", "bert", "t5"])
def test_families_without_a_native_say_so(case, made):
    with pytest.raises(UpcycleError, match=r"no native MoE has its blocks; use moe.target = upcycled"):
        blueprint(made(case), Recipe.of())


def test_mappings_of_transformers_can_be_listed_beside_an_upcycled_model(dense, tmp_path):
    """transformers lists them for whoever asks for a class that a config does not have."""
    moe = tmp_path / "moe"
    convert(dense("llama"), moe, {"moe": {"num_experts": 4, "target": "upcycled"}})
    opened = AutoModelForCausalLM.from_pretrained(moe)
    mapping = AutoModelForCausalLM._model_mapping
    assert type(opened.config) in mapping.keys()  # noqa: SIM118 (its `in` looks a name up)
    assert type(opened) in mapping.values()
    for auto in autos():
        auto._model_mapping.keys()
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCTC.from_pretrained(dense("llama"))


def test_what_a_checkpoint_lacks_of_a_layer_is_drawn_and_the_rest_is_kept(dense, tmp_path):
    moe = tmp_path / "moe"
    convert(dense("llama"), moe, {"moe": {"num_experts": 4, "target": "upcycled"}})
    whole = load_file(moe / "model.safetensors")
    lost = ("model.layers.1.mlp.router.weight", "model.layers.2.mlp.experts.down_proj")
    kept = {name: tensor for name, tensor in whole.items() if name not in lost}
    save_file(kept, moe / "model.safetensors", metadata={"format": "pt"})
    found = AutoModelForCausalLM.from_pretrained(moe).state_dict()
    for name in lost:
        assert 0.01 < float(found[name].std()) < 0.04
        assert float(found[name].abs().max()) < 0.2
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
