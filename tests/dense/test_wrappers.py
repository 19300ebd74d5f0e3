"""A text model within a multimodal one: the same wrapper around experts, and the same answers on images."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import every_wrapper
import ranks
import tiny
import tiny_wrappers
import upcycle
from marks import quick, sampled
from upcycle import Recipe, UpcycleError, blueprint, convert, plan, verify
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.admission import admit
from upcycle.dense.places import head_is_tied
from upcycle.dense.subject import Subject
from upcycle.training.start import start_of

# The wrapper, the target, and the text model that its result holds.
CASES = {
    "llava": ("native", "MixtralModel"),
    "mistral3": ("native", "MixtralModel"),
    "internvl": ("native", "Qwen3MoeModel"),
    "qwen3_vl": ("native", "Qwen3VLMoeTextModel"),
    "qwen3_5": ("native", "Qwen3_5MoeTextModel"),
    "idefics3": ("native", "MixtralModel"),
    "gemma3": ("upcycled", "UpcycledGemma3TextModel"),
    "llava, upcycled": ("upcycled", "UpcycledLlamaModel"),
    "qwen3_vl, upcycled": ("upcycled", "UpcycledQwen3VLTextModel"),
    "qwen3_5, upcycled": ("upcycled", "UpcycledQwen3_5TextModel"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that gives the dense folder of a kind."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = tiny_wrappers.make(tmp_path_factory.mktemp("dense") / kind, kind)
        return folders[kind]

    return make


def opened(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def edit(folder, out, tensors=None, **changes):
    """A copy of a folder with other tensors or other keys of config.json."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors or load_file(folder / "model.safetensors"), out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("case", sampled(CASES, 2))
def test_images_and_text_get_the_same_answers(case, made, tmp_path):
    kind, (target, text_model) = case.partition(",")[0], CASES[case]
    source = made(kind)
    recipe = Recipe.of(moe={"num_experts": 4, "target": target}, router={"std": 0.5})
    built = convert(source, tmp_path / "moe", recipe)
    assert built.preserves_function
    wanted = tiny_wrappers.logits(opened(source), kind)
    model = opened(tmp_path / "moe")
    assert text_model in {type(module).__name__ for module in model.modules()}
    found = tiny_wrappers.logits(model, kind)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    # Images count, and so do experts.
    images = tiny_wrappers.KINDS[kind].inputs()["pixel_values"]
    other = tiny_wrappers.logits(model, kind, pixel_values=-images)
    assert float((other - wanted).abs().max()) > 1e-3
    # Saved and opened again, and built in memory.
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny_wrappers.logits(opened(tmp_path / "again"), kind), found)
    loaded = upcycle.load(source, recipe)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    for folder in ("moe", "again"):  # transformers does not transpose the experts that it saves
        assert len(upcycle.inspect(tmp_path / folder).blocks) == 2


def test_the_text_model_has_the_key_that_vllm_reads(made):
    built = blueprint(made("qwen3_vl"), Recipe.of(moe={"num_experts": 4}))
    assert built.config["text_config"]["norm_topk_prob"] is True


def test_what_is_around_the_text_model_stays_as_it_is(made, tmp_path):
    convert(made("llava"), tmp_path / "moe", Recipe.of(moe={"num_experts": 2}))
    with Checkpoint.open(made("llava")) as before, Checkpoint.open(tmp_path / "moe") as after:
        around = [name for name in before.tensors if not name.startswith("language_model.")]
        assert any("vision_tower" in name for name in around)
        assert any("projector" in name for name in around)
        for name in around:
            old, new = before.tensors[name], after.tensors[name]
            assert (before.pread(old, 0, old.nbytes) == after.pread(new, 0, new.nbytes)).all()
        changed = {k for k in before.config if before.config[k] != after.config.get(k)}
        assert changed == {"text_config", "transformers_version"} & changed


def test_a_native_that_the_wrapper_cannot_hold_is_refused(made, monkeypatch):
    from upcycle.families._wrappers import WRAPPERS, Wrapper

    closed = Wrapper(architecture="LlavaForConditionalGeneration", tied=False, free=False)
    monkeypatch.setattr("upcycle.dense.places.WRAPPERS", {**WRAPPERS, "llava": closed})
    with pytest.raises(UpcycleError, match=r"llava of transformers cannot hold a mixtral.*part_only"):
        blueprint(made("llava"), Recipe.of())


def test_the_text_model_alone(made, tmp_path):
    """Taken out of its wrapper, it is a plain language model that says the same about text."""
    for kind, wanted in (("llava", "MixtralForCausalLM"), ("qwen3_vl", "Qwen3MoeForCausalLM")):
        recipe = Recipe.of(moe={"num_experts": 2, "part_only": "text"}, router={"std": 0.5})
        out = tmp_path / kind
        built = convert(made(kind), out, recipe)
        assert all("text model alone" in why for why in built.left_out.values())
        proof = verify(made(kind), out)
        assert proof.holds, proof.checks
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert type(model).__name__ == wanted
        ids = tiny_wrappers.KINDS[kind].inputs()["input_ids"][:, 3:]
        dense = opened(made(kind)).eval()(input_ids=ids).logits
        assert float((model.eval()(input_ids=ids).logits - dense).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_statistics_of_a_wrapper_are_those_of_its_text_model(kind, made, tmp_path):
    """`calibrate` measures the text model within the wrapper, and there is no other way to measure it."""
    file = str(tiny.make_statistics(tmp_path / "statistics.safetensors", made(kind)))
    init = {"name": "importance", "statistics": file}
    for part_only in ("", "text"):
        blueprint(made(kind), Recipe.of(moe={"num_experts": 2, "part_only": part_only}, init=init))
    with Checkpoint.open(made(kind)) as whole, Checkpoint.open(made("internvl")) as other:
        mine, others = (admit(each, alone=True).fingerprint for each in (whole, other))
    assert mine.keys() == others.keys() == {"config", "tensors", "content"}
    assert not set(mine.values()) & set(others.values())


def test_a_block_for_further_tokens_is_left_out_and_the_config_says_so(made, tmp_path):
    tensors = load_file(made("qwen3_5") / "model.safetensors") | {"mtp.fc.weight": torch.zeros(32, 64)}
    text = json.loads((made("qwen3_5") / "config.json").read_text())["text_config"]
    config = {"text_config": {**text, "mtp_num_hidden_layers": 1}}
    source = edit(made("qwen3_5"), tmp_path / "dense", tensors, **config)
    for target in ("native", "upcycled"):
        built = convert(source, tmp_path / target, Recipe.of(moe={"num_experts": 2, "target": target}))
        assert list(built.left_out) == ["mtp.fc.weight"]
        assert not built.config["text_config"].get("mtp_num_hidden_layers")
        assert verify(source, tmp_path / target).holds


# The wrapper, its text model's target, and the vision tower that its result holds.
TOWERS = {
    "llava": ("native", "UpcycledCLIPVisionModel"),
    "gemma3": ("upcycled", "UpcycledSiglipVisionModel"),
    "mistral3": ("native", "UpcycledPixtralVisionModel"),
}


@pytest.mark.parametrize(
    ("kind", "part"), [("llava", "vision"), ("gemma3", "text+vision"), ("mistral3", "text+vision")]
)
def test_experts_in_the_vision_tower(kind, part, made, tmp_path):
    source, (target, tower), out = made(kind), TOWERS[kind], tmp_path / "moe"
    wanted, before = tiny_wrappers.logits(opened(source), kind), load_file(source / "model.safetensors")
    recipe = Recipe.of(moe={"num_experts": 3, "part": part, "target": target}, router={"std": 0.5})
    built = convert(source, out, recipe)
    assert built.preserves_function
    model = opened(out)
    assert tower in {type(module).__name__ for module in model.modules()}
    found = tiny_wrappers.logits(model, kind)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    gone = {name for name in before if name not in after and (part == "vision" or "vision_tower" in name)}
    assert len(gone) == (6 if kind == "mistral3" else 8)
    model.save_pretrained(tmp_path / "again")
    again, loaded = opened(tmp_path / "again"), upcycle.load(source, recipe)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    proof = verify(source, out)
    assert proof.holds, proof.checks
    blocks = 2 if part == "vision" else 4
    assert ("vision tower, random" in proof.logits, "random" in proof.logits) == (True, blocks == 4)
    seen = upcycle.inspect(out).blocks
    assert [block.stack for block in seen[-2:]] == ["vision"] * 2
    assert len(seen) == blocks
    assert min(seen[-1].to_dense) > 0.9999
    plan = upcycle.plan(source, recipe)
    assert plan.total_parameters == sum(t.numel() for t in after.values())
    assert plan.num_moe_layers == blocks
    with torch.no_grad():  # experts count
        for name, parameter in model.named_parameters():
            if "vision_tower" in name and name.endswith("experts.down_proj"):
                parameter.zero_()
    assert float((tiny_wrappers.logits(model, kind) - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("taken", "idle"), [(-2, True), (-1, False), ([0, 1], True), (2, False), (None, False)]
)
@pytest.mark.parametrize("part", ["text", "vision", "text+vision"])
def test_experts_whose_output_nothing_reads_are_named(part, taken, idle, made, tmp_path):
    """The tower has two layers; a LLaVA reads the last but one of its states."""
    source = edit(made("llava"), tmp_path / "dense", vision_feature_layer=taken)
    said = plan(source, Recipe.of(moe={"num_experts": 2, "part": part})).warnings
    found = sum("experts in layer 1 do nothing" in warning for warning in said)
    assert found == (idle and part != "text")


def test_rows_are_judged_by_the_router_of_their_part(made, tmp_path):
    """Equal rows of `soft` are no fault: its slots are told apart by something else."""
    for router in ("soft", "expert_choice"):
        out = tmp_path / router
        moe = {"num_experts": 2, "part": "vision"}
        convert(made("gemma3"), out, Recipe.of(moe=moe, router={"name": router}))
        tensors = load_file(out / "model.safetensors")
        for name in tensors:
            if "router.weight" in name:
                tensors[name][:] = tensors[name][:1]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        notes = upcycle.inspect(out).notes
        assert any("score high with both" in note for note in notes) == (router != "soft")


def test_a_vision_tower_has_settings_of_its_own(made, tmp_path):
    recipe = Recipe.of(
        moe={"num_experts": 2, "part": "text+vision"},
        vision={"moe": {"num_experts": 4, "layers": [1]}, "router": {"name": "expert_choice"}},
    )
    built = convert(made("llava"), tmp_path / "moe", recipe)
    assert [site.num_experts for site in built.all_sites] == [2, 2, 4]
    assert built.moe_layers == {"layers": [0, 1], "vision": [1]}
    proof = verify(made("llava"), tmp_path / "moe")
    assert proof.holds, proof.checks
    text = blueprint(made("llava"), Recipe.of(moe={"num_experts": 2}))
    same = (name for name in text.entries if name.startswith("language_model."))
    assert all(text.entries[name].lazy.describe() == built.entries[name].lazy.describe() for name in same)
    vision = {"moe": {"num_experts": 4, "layers": [1]}, "router": {"name": "expert_choice"}}
    alone = blueprint(made("llava"), Recipe.of(moe={"num_experts": 2, "part": "vision"}, vision=vision))
    mine = (name for name in alone.entries if name.startswith("vision_tower."))
    assert all(alone.entries[name].lazy.describe() == built.entries[name].lazy.describe() for name in mine)


def test_a_text_model_with_another_root_is_inspected(tmp_path):
    """The names of a Nemotron-H begin with `backbone.` on disk, and not within a multimodal model."""
    text = tiny.config_of("nemotron_h").to_dict()
    config = transformers.LlavaConfig(**{**tiny_wrappers.KINDS["llava"].config, "text_config": text})
    model = tiny.shake(transformers.LlavaForConditionalGeneration(config).float())
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", Recipe.of(moe={"num_experts": 2}))
    assert [block.layer for block in upcycle.inspect(tmp_path / "moe").blocks] == [1, 3]


def test_what_never_reaches_a_vision_tower_says_so(made, tmp_path):
    convert(made("llava"), tmp_path / "moe", Recipe.of(moe={"num_experts": 2, "part": "vision"}))
    with pytest.raises(UpcycleError, match="has experts in its vision tower, and what is watched"):
        upcycle.inspect(tmp_path / "moe", text={"a": __file__})
    subject = Subject.of(tmp_path / "moe")
    assert (subject.vocab_size, subject.length) == (96, 64)
    assert subject.architecture == "LlavaForCausalLM"
    run = ranks.run_of(str(made("llava")), {}, {"moe": {"part": "vision"}})
    with pytest.raises(UpcycleError, match=r"never reach a vision tower.*; set moe\.part = text"):
        start_of(run)
    run = ranks.run_of(str(made("qwen3_5")), {}, {"moe": {"mtp": "upcycle"}})
    with pytest.raises(UpcycleError, match=r"so `upcycle train` would not train them.*; set it to drop"):
        start_of(run)


@pytest.mark.parametrize("kind", quick(TOWERS, "llava", "gemma3"))
@pytest.mark.parametrize("parts", [("text", "vision"), ("vision", "text")], ids=" then ".join)
def test_one_part_after_the_other(parts, kind, made, tmp_path):
    """What has experts in one part already is a source for the other, and stays of the class that it is."""
    source, target = made(kind), TOWERS[kind][0]
    whole = blueprint(source, Recipe.of(moe={"num_experts": 2, "part": "text+vision", "target": target}))
    for part in parts:
        moe = {"num_experts": 2, "part": part, **({"target": target} if part == "text" else {})}
        convert(source, tmp_path / part, Recipe.of(moe=moe, router={"std": 0.5}))
        proof = verify(source, tmp_path / part)
        assert proof.holds, proof.checks
        loaded = upcycle.load(source, Recipe.of(moe=moe, router={"std": 0.5})).state_dict()
        source = tmp_path / part
        stored = opened(source).state_dict()
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    config = json.loads((source / "config.json").read_text())
    assert all(config[key] == whole.config[key] for key in ("model_type", "architectures"))
    model = opened(source)
    assert TOWERS[kind][1] in {type(module).__name__ for module in model.modules()}
    assert len(upcycle.inspect(source).blocks) == 4
    wanted, found = (tiny_wrappers.logits(each, kind) for each in (opened(made(kind)), model))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_a_vision_tower_as_the_hub_has_it(kind, made, tmp_path):
    """Below `vision_model.`, which transformers has left out since."""
    stored = load_file(made(kind) / "model.safetensors")
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in stored.items()}
    position = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(4.0)[None]}
    source = edit(made(kind), tmp_path / "dense", old | position)
    target = TOWERS[kind][0]
    recipe = Recipe.of(moe={"num_experts": 2, "part": "text+vision", "target": target}, router={"std": 0.5})
    built = convert(source, tmp_path / "moe", recipe)
    assert [*built.left_out] == [*position]
    wanted = tiny_wrappers.logits(opened(made(kind)), kind)
    found = tiny_wrappers.logits(opened(tmp_path / "moe"), kind)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize(
    "vision",
    [{"model_type": "vit"}, {"model_type": "dinov2", "mlp_ratio": 2}],
    ids=lambda vision: vision["model_type"],
)
def test_other_vision_towers(vision, tmp_path):
    config = tiny_wrappers.KINDS["llava"].config
    tower = {**tiny_wrappers._VISION, **vision}
    made = transformers.LlavaConfig(**{**config, "vision_config": tower})
    model = tiny.shake(transformers.LlavaForConditionalGeneration(made).float(), 0)
    model.save_pretrained(tmp_path / "dense")
    recipe = Recipe.of(moe={"num_experts": 2, "part": "text+vision"}, router={"std": 0.5})
    convert(tmp_path / "dense", tmp_path / "moe", recipe)
    wanted, found = (tiny_wrappers.logits(each, "llava") for each in (model, opened(tmp_path / "moe")))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    seen = upcycle.inspect(tmp_path / "moe").blocks
    assert [block.stack for block in seen] == ["layers"] * 2 + ["vision"] * 2


@pytest.mark.parametrize(
    ("kind", "recipe", "said"),
    [
        ("qwen3_vl", {}, r"'qwen3_vl_vision'\) that cannot have experts: its class is fixed; moe.part"),
        ("internvl", {}, r"cannot have experts: its class is fixed"),
        ("llava", {"moe": {"target": "dense"}}, r"moe\.target = dense is about a text model, and a vision"),
        ("llava", {"moe": {"target": "mixtral"}}, r"moe\.target = mixtral is about a text model"),
        ("llava", {"grow": {}}, r"\[grow\] is about a text model, and moe.part = vision"),
        ("llava", {"init": {"name": "importance", "statistics": "x"}}, "init importance .* no vision tower"),
        ("llava", {"router": {"init": {"name": "ridge", "statistics": "x"}}}, "init = ridge .* no vision"),
        ("llava", {"init": {"name": "branch_train_mix", "sources": ["x"]}}, None),
        ("mistral3", {"router": {"name": "expert_choice"}}, r"a row of pixtral has all images of a batch"),
    ],
)  # fmt: skip
def test_a_vision_tower_that_cannot_have_experts(kind, recipe, said, made):
    moe = {"part": "text+vision" if said is None else "vision"}
    said = said or "takes other checkpoints for one part of a multimodal model"
    with pytest.raises(UpcycleError, match=said):
        blueprint(made(kind), Recipe.of({**recipe, "moe": moe | recipe.get("moe", {})}))


def test_what_is_said_of_vision_where_there_is_none(made, dense, tmp_path):
    with pytest.raises(
        UpcycleError, match=r"is for a multimodal model, and .* \(llama\) has no vision tower"
    ):
        blueprint(dense("llama"), Recipe.of(moe={"part": "vision"}))
    with pytest.raises(UpcycleError, match="part_only takes the text model out of it; give one"):
        Recipe.of(moe={"part": "vision", "part_only": "text"})
    for vision, why in (({"model_type": "siglip2_vision_model"}, "it must be one of"), (None, "must be the")):
        source = edit(made("llava"), tmp_path / str(bool(vision)), vision_config=vision)
        with pytest.raises(UpcycleError, match=why):
            blueprint(source, Recipe.of(moe={"part": "vision"}))
    stored = load_file(made("llava") / "model.safetensors")
    again = {
        f"other_tower.{n.partition('.')[2]}": t.clone() for n, t in stored.items() if "vision_tower" in n
    }
    source = edit(made("llava"), tmp_path / "two", stored | again)
    with pytest.raises(UpcycleError, match=r"a vision tower more than once, below other_tower\., vision_tow"):
        blueprint(source, Recipe.of(moe={"part": "vision"}))
    blueprint(source, Recipe.of(moe={"part": "vision"}, drop=["other_tower.*"]))


def with_further_blocks(folder, out):
    """A Qwen3.5 with a block that predicts a further token, made of its last one, of full attention."""
    tensors = load_file(folder / "model.safetensors")
    last = {n.partition("layers.1.")[2]: t for n, t in tensors.items() if "language_model.layers.1." in n}
    draw = torch.Generator().manual_seed(5)
    further = {f"mtp.layers.0.{n}": t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in last.items()}
    norms = {
        f"mtp.{n}.weight": torch.ones(32) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    further |= {"mtp.fc.weight": torch.ones(32, 64), **norms}
    text = json.loads((folder / "config.json").read_text())["text_config"]
    config = {**text, "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    return edit(folder, out, tensors | further, text_config=config), further


def test_blocks_for_further_tokens_get_experts_like_the_layers(made, tmp_path):
    """Under the names and in the form of the layers, which is how vLLM and SGLang read them."""
    source, stored = with_further_blocks(made("qwen3_5"), tmp_path / "dense")
    recipe = Recipe.of(moe={"num_experts": 3, "mtp": "upcycle"}, router={"std": 0.5})
    built = convert(source, tmp_path / "moe", recipe)
    assert not built.left_out
    assert built.config["text_config"]["mtp_num_hidden_layers"] == 1
    after = load_file(tmp_path / "moe" / "model.safetensors")
    start, block = "model.language_model.layers.1.", "mtp.layers.0."
    shapes = [
        {name.removeprefix(at): tensor.shape for name, tensor in after.items() if name.startswith(at)}
        for at in (start, block)
    ]
    assert shapes[0] == shapes[1]
    gate, up, down = (stored[f"{block}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    for expert in range(3):
        assert torch.equal(after[f"{block}mlp.experts.gate_up_proj"][expert], torch.cat([gate, up]))
        assert torch.equal(after[f"{block}mlp.experts.down_proj"][expert], down)
    assert not torch.equal(after[f"{block}mlp.gate.weight"], after[f"{start}mlp.gate.weight"])
    kept = [name for name in stored if ".mlp." not in name]
    assert len(kept) == 12
    assert all(torch.equal(stored[name], after[name]) for name in kept)
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    assert len(upcycle.inspect(tmp_path / "moe").blocks) == 2
    loaded = upcycle.load(source, recipe)  # transformers has no such blocks
    opened(tmp_path / "moe").save_pretrained(tmp_path / "again")
    assert {*load_file(tmp_path / "again" / "model.safetensors")} == {n for n in after if "mtp." not in n}
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        t.numel() for n, t in after.items() if "mtp." not in n
    )
    plan = upcycle.plan(source, recipe)
    without = upcycle.plan(source, Recipe.of(moe={"num_experts": 3}, router={"std": 0.5}))
    assert plan.active_parameters == without.active_parameters
    assert plan.total_parameters > without.total_parameters


def test_blocks_for_further_tokens_stay_as_they_are(made, tmp_path):
    source, stored = with_further_blocks(made("qwen3_5"), tmp_path / "dense")
    moe = {"num_experts": 2, "mtp": "keep", "target": "upcycled"}
    built = convert(source, tmp_path / "moe", Recipe.of(moe=moe))
    assert not built.left_out
    assert built.config["text_config"]["mtp_num_hidden_layers"] == 1
    after = load_file(tmp_path / "moe" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in stored.items())
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks


def test_blocks_for_further_tokens_stay_whatever_else_the_recipe_says(made, tmp_path):
    """With a text model that is taken out, and with a backbone that is the mean of two models."""
    source, stored = with_further_blocks(made("qwen3_5"), tmp_path / "dense")
    donor, _ = with_further_blocks(made("qwen3_5"), tmp_path / "donor")
    moe = {"num_experts": 2, "mtp": "keep", "target": "upcycled"}
    others = {
        "alone": Recipe.of(moe={**moe, "part_only": "text"}),
        "mean": Recipe.of(moe=moe, init={"name": "branch_train_mix", "sources": [str(donor)]}),
    }
    for name, recipe in others.items():
        convert(source, tmp_path / name, recipe)
        after = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(tensor, after[n]) for n, tensor in stored.items())
        proof = verify(source, tmp_path / name)
        assert proof.holds, proof.checks
    with pytest.raises(UpcycleError, match=r"drop leaves out mtp.* and moe\.mtp = keep wants such blocks"):
        blueprint(source, Recipe.of(drop=["mtp.*"], moe=moe))


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"mtp": "keep"}, r"expects experts in them; set it to upcycle or drop"),
        ({"mtp": "upcycle", "target": "upcycled"}, r"is for a native target"),
    ],
)
def test_blocks_for_further_tokens_that_the_target_does_not_have(moe, said, made, tmp_path):
    source, _ = with_further_blocks(made("qwen3_5"), tmp_path / "dense")
    with pytest.raises(UpcycleError, match=said):
        blueprint(source, Recipe.of(moe=moe))


def test_blocks_for_further_tokens_that_are_not_as_the_config_says(made, tmp_path):
    recipe = Recipe.of(moe={"mtp": "upcycle"})
    with pytest.raises(UpcycleError, match="knows of no blocks that predict further tokens in a llama"):
        blueprint(made("llava"), recipe)
    with pytest.raises(
        UpcycleError, match=r"holds 0 tensors .* mtp_num_hidden_layers = 0; set moe.mtp = drop"
    ):
        blueprint(made("qwen3_5"), recipe)
    source, _ = with_further_blocks(made("qwen3_5"), tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    del tensors["mtp.norm.weight"]
    with pytest.raises(UpcycleError, match=r"lacks mtp\.norm\.weight"):
        blueprint(edit(source, tmp_path / "lacks", tensors), recipe)
    tensors |= {"mtp.norm.weight": torch.ones(32), "mtp.embed_tokens.weight": torch.ones(96, 32)}
    with pytest.raises(UpcycleError, match=r"holds mtp\.embed_tokens\.weight, which"):
        blueprint(edit(source, tmp_path / "more", tensors), recipe)


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_model_that_keeps_the_names_of_its_wrapper(tied, dense, tmp_path):
    """As transformers saves the text of a Qwen3.5: model.language_model.layers.0..."""
    folder = dense("qwen3_5_text", tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model."): t for name, t in stored.items()}
    source = edit(folder, tmp_path / "dense", tensors)
    convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 2}))
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks


@pytest.mark.parametrize(
    ("architecture", "tied", "bare", "wanted"),
    [
        ("Qwen3ForCausalLM", True, True, "Qwen3MoeForCausalLM"),  # Qwen3-Embedding-0.6B
        ("Qwen3ForCausalLM", False, True, "Qwen3MoeModel"),  # Qwen3-Embedding-8B
        ("Qwen3Model", False, True, "Qwen3MoeModel"),
        ("Qwen3Model", True, False, "Qwen3MoeModel"),
    ],
)
def test_embedding_models(architecture, tied, bare, wanted, dense, tmp_path):
    """Without the prefix of their class, and without a head."""
    folder = dense("qwen3", tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")
    start = "model." if bare else ""
    tensors = {name.removeprefix(start): t for name, t in stored.items() if "lm_head" not in name}
    source = edit(folder, tmp_path / "dense", tensors, architectures=[architecture])
    for target, prefix in (("native", ""), ("upcycled", "Upcycled")):
        recipe = Recipe.of(moe={"num_experts": 2, "target": target}, router={"std": 0.5})
        convert(source, tmp_path / target, recipe)
        proof = verify(source, tmp_path / target)
        assert proof.holds, proof.checks
        model = upcycle.open(tmp_path / target)
        assert type(model).__name__ == (wanted if not prefix else prefix + wanted.replace("Moe", ""))
        ids = torch.arange(3, 20)[None]
        with torch.inference_mode():
            dense_model = transformers.AutoModel.from_pretrained(source).eval()
            found = getattr(model, "model", model).eval()(ids).last_hidden_state
            assert float((found - dense_model(ids).last_hidden_state).abs().max()) < 1e-5
        assert len(upcycle.inspect(tmp_path / target).blocks) == 4


@pytest.mark.parametrize(
    ("architecture", "head"),
    [("LlamaForSequenceClassification", "score"), ("LlamaForQuestionAnswering", "qa_outputs")],
)
def test_a_classifier_whose_head_is_dropped_is_a_model_without_a_head(architecture, head, tmp_path):
    source = tiny.make(tmp_path / "dense", architecture)
    with pytest.raises(UpcycleError, match=rf"{head}\.weight.*leave (these tensors|them) out"):
        blueprint(source, Recipe.of())
    recipe = Recipe.of(moe={"num_experts": 2, "target": "upcycled"}, drop=[f"{head}.*"], router={"std": 0.5})
    convert(source, tmp_path / "moe", recipe)
    assert type(upcycle.open(tmp_path / "moe")).__name__ == "UpcycledLlamaModel"
    if head == "score":  # AutoModel does not open what the other class stores
        proof = verify(source, tmp_path / "moe")
        assert proof.holds, proof.checks


def test_a_body_whose_head_would_have_a_bias(tmp_path):
    source = tiny.make(tmp_path / "dense", "PhiModel")
    convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 2, "target": "upcycled"}))
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks


def test_blocks_that_predict_further_tokens_beside_an_exaone(tmp_path):
    """They are left out, as transformers leaves them."""
    source = tmp_path / "dense"
    every_wrapper.make(source, "exaone4_5")
    tensors = load_file(source / "model.safetensors") | {"mtp.fc.weight": torch.ones(2, 4)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    built = convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 2, "target": "upcycled"}))
    assert "further tokens" in built.left_out["mtp.fc.weight"]
    assert "mtp.fc.weight" not in load_file(tmp_path / "moe" / "model.safetensors")
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks


def test_a_missing_head_is_still_missed(dense, tmp_path):
    stored = load_file(dense("llama") / "model.safetensors")
    del stored["lm_head.weight"]
    with pytest.raises(UpcycleError, match=r"lacks lm_head\.weight"):
        blueprint(edit(dense("llama"), tmp_path / "dense", stored), Recipe.of())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config": {"model_type": "persimmon"}}, r"around a text model of type 'persimmon', which "),
        ({"text_config": None}, r"text_config = None; it must be the config of a text model"),
        ({"model_type": "strange"}, r"strange around a llama, and upcycle does not know .*--part-only text"),
        ({"tie_word_embeddings": True}, r"and a head is stored; set both to the same"),
        (
            {"text_config": {"model_type": "mixtral"}},
            r"is already a Mixture of Experts \(mixtral\); give a dense checkpoint$",
        ),
    ],
)  # fmt: skip
def test_what_is_said_of_a_wrapper_that_does_not_fit(change, said, made, tmp_path):
    source = edit(made("llava"), tmp_path / "dense", **change)
    with pytest.raises(UpcycleError, match=said):
        blueprint(source, Recipe.of())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llava", "layers.1.mlp.fc1.weight"),
        ("gemma3", "layers.1.mlp.fc1.weight"),
        ("mistral3", "layers.1.feed"),
    ],
)
def test_a_vision_tower_of_another_shape_than_its_config_has_is_refused(kind, name, made, tmp_path):
    stored = load_file(made(kind) / "model.safetensors")
    first = next(key for key in stored if name in key and "vision" in key)
    source = edit(made(kind), tmp_path / "cut", stored | {first: stored[first][:-1].clone()})
    with pytest.raises(UpcycleError, match=f"{first} has shape .* and config.json says"):
        blueprint(source)
    blueprint(source, Recipe.of(moe={"part_only": "text", "target": "upcycled"}))


def test_a_value_head_beside_a_multimodal_model_is_refused(made, tmp_path):
    stored = load_file(made("llava") / "model.safetensors")
    head = {"v_head.summary.weight": torch.zeros(1, 32)}
    source = edit(made("llava"), tmp_path / "valued", stored | head)
    with pytest.raises(UpcycleError, match=r"v_head\.summary\.weight belong to a value head.*--drop NAME"):
        blueprint(source)
    built = blueprint(source, Recipe.of(drop=["v_head.*"]))
    assert "v_head.summary.weight" not in built.entries


def test_two_text_models_are_refused(made, tmp_path):
    stored = load_file(made("llava") / "model.safetensors")
    again = {
        n.replace("language_model.", "other_model."): t.clone() for n, t in stored.items() if "language" in n
    }
    source = edit(made("llava"), tmp_path / "dense", stored | again)
    with pytest.raises(UpcycleError, match=r"more than once, below language_model\.model\., other_model"):
        blueprint(source, Recipe.of())
    blueprint(source, Recipe.of(drop=["other_model.*"]))


def test_a_head_that_is_dropped_settles_nothing(made, tmp_path):
    source = edit(made("llava"), tmp_path / "dense", tie_word_embeddings=True)
    with pytest.raises(UpcycleError, match="and a head is stored; set both to the same"):
        blueprint(source, Recipe.of())
    built = blueprint(source, Recipe.of(drop=["*lm_head.weight"]))
    assert built.config["tie_word_embeddings"] is True
    assert not any("lm_head" in name for name in built.entries)


@pytest.mark.parametrize("outer", [None, False])
def test_a_head_that_the_text_model_alone_ties(outer, made, tmp_path):
    """A LLaVA heeds both keys, and its small ones store no head."""
    tensors = load_file(made("llava") / "model.safetensors")
    tied = edit(made("llava"), tmp_path / "tied", {n: t for n, t in tensors.items() if "lm_head" not in n})
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": outer}
    config["text_config"]["tie_word_embeddings"] = True
    config = {key: value for key, value in config.items() if value is not None}
    (tied / "config.json").write_text(json.dumps(config))
    convert(tied, tmp_path / "moe", Recipe.of(moe={"num_experts": 2, "top_k": 2}))
    proof = verify(tied, tmp_path / "moe")
    assert proof.holds, proof.checks
    model = upcycle.open(tmp_path / "moe")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    wanted = tiny_wrappers.logits(transformers.LlavaForConditionalGeneration.from_pretrained(tied), "llava")
    assert float((tiny_wrappers.logits(model, "llava") - wanted).abs().max()) < 1e-5


def test_a_plain_model_has_nothing_around_it(dense):
    with pytest.raises(UpcycleError, match="has nothing around it"):
        blueprint(dense("llama"), Recipe.of(moe={"part_only": "text"}))
    with pytest.raises(UpcycleError, match="up to the source"):
        blueprint(dense("llama"), Recipe.of(moe={"target": "wrapped"}))


def test_the_table_is_what_transformers_does():
    """Every wrapper builds the text model that its config names, if the table says so, and ties as said."""
    import importlib
    import inspect
    import re

    from upcycle import families
    from upcycle.families._wrappers import HEAD_APART, WRAPPERS

    for model_type, wrapper in WRAPPERS.items():
        cls = transformers.CONFIG_MAPPING[model_type]
        default = cls()
        assert default.text_config.model_type == wrapper.text, model_type
        tied = getattr(default, "tie_word_embeddings", None)
        assert wrapper.tied == (True if tied is None else tied), model_type
        for outer, inner in product((None, False, True), repeat=2):
            keys = ({} if key is None else {"tie_word_embeddings": key} for key in (outer, inner))
            raw, text = keys
            raw["text_config"] = {"model_type": wrapper.text, **text}
            tied = getattr(cls(**raw), "tie_word_embeddings", None)
            if tied is not None:
                found = head_is_tied({"model_type": model_type, **raw}, head_is_stored=False)
                assert found == tied, (model_type, outer, inner)
        assert hasattr(transformers, wrapper.architecture), model_type
        for architecture in (wrapper.architecture, *(name for _, name in wrapper.twins.values())):
            plan = getattr(transformers, architecture)._fsdp_plan or {}
            assert ("lm_head" in plan) == (architecture in HEAD_APART), architecture
        mixtral = {"model_type": "mixtral", **tiny_wrappers.TEXT}
        held = type(cls(text_config=mixtral).text_config).__name__
        assert wrapper.free == (held == "MixtralConfig"), model_type
        module = importlib.import_module(cls.__module__.replace("configuration_", "modeling_"))
        builds = re.search(r"AutoModel\.from_config\(\s*config\.text_config", inspect.getsource(module))
        assert builds, model_type
        sees = re.search(r"AutoModel\.from_config\(\s*config\.vision_config", inspect.getsource(module))
        usual = default.vision_config.model_type if sees else ""
        siglip = {"model_type": "siglip_vision_model"}
        named = sees and type(cls(vision_config=siglip).vision_config).__name__ == "SiglipVisionConfig"
        assert wrapper.vision == (usual if named else ""), model_type
        for name in families.names():
            family = families.find(name)
            if family.assumed and name == wrapper.text:
                made = transformers.CONFIG_MAPPING[name]()
                assert {k: getattr(made, k) for k in family.assumed} == family.assumed


def test_blocks_that_predict_further_tokens_belong_to_the_text_model():
    both = Recipe.of(moe={"part": "text+vision", "mtp": "upcycle"})
    assert [both.of_part(part).moe.mtp for part in ("text", "vision")] == ["upcycle", "drop"]
    assert Recipe.of(moe={"part": "vision", "mtp": "upcycle"}).of_part("vision").moe.mtp == "upcycle"


def test_what_is_known_of_the_text_model_is_said_of_the_wrapper(tmp_path):
    """A wrapper's own type is no native MoE, but its text model becomes one that differs past a switch."""
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    source = tiny_wrappers.make(tmp_path / "dense", "mistral3", model_type="ministral3", rope_parameters=rope)
    found = plan(source, Recipe.of(moe={"num_experts": 2}))
    assert any("past 32 tokens ministral3 scales its queries" in warning for warning in found.warnings)


@pytest.mark.parametrize("kind", [*tiny_wrappers.KINDS])
@pytest.mark.parametrize("missing", ["first", "last", "norm", "all"])
def test_a_vision_tower_that_lacks_blocks_is_refused(kind, missing, made, tmp_path):
    """Whether its class can have experts or not: transformers would draw them at random."""
    stored = load_file(made(kind) / "model.safetensors")
    blocks = {
        name: found
        for name in stored
        if "vis" in name and (found := re.search(r"\.(?:layers?|blocks)\.(\d)\.(.*)", name))
    }
    assert {found[1] for found in blocks.values()} == {"0", "1"}
    norm = next(found[2] for found in blocks.values() if "norm" in found[2])
    gone = {
        name
        for name, found in blocks.items()
        if missing == "all"
        or (found[1] == ("0" if missing == "first" else "1") and missing != "norm")
        or (missing == "norm" and (found[1], found[2]) == ("1", norm))
    }
    read = {"vision_feature_layer": -1} if kind in ("llava", "internvl") else {}
    rest = {name: tensor for name, tensor in stored.items() if name not in gone}
    source = edit(made(kind), tmp_path / "dense", rest, **read)
    recipe = Recipe.of(moe={"num_experts": 2, "target": "upcycled"})
    said = re.escape(min(gone)) if missing == "norm" else r"the 2 blocks" if missing == "all" else r"\.[01]\."
    with pytest.raises(UpcycleError, match=rf"lacks .*{said}.* config\.json calls for.*part_only = text"):
        blueprint(source, recipe)
    blueprint(source, Recipe.of(moe={"part_only": "text", "target": "upcycled"}))
    blueprint(edit(made(kind), tmp_path / "whole", **read), recipe)


def test_a_vision_tower_may_lack_what_nothing_reads(made, tmp_path):
    """A LLaVA takes the state before the last block; a tower that is cut there computes what it did."""
    stored = load_file(made("llava") / "model.safetensors")
    unread = ("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm.")
    rest = {name: tensor for name, tensor in stored.items() if not name.startswith(unread)}
    source = edit(made("llava"), tmp_path / "cut", rest, vision_feature_layer=-2)
    recipe = Recipe.of(moe={"num_experts": 2})
    warned = [said for said in plan(source, recipe).warnings if "the vision tower lacks" in said]
    assert len(warned) == 1
    assert "vision_tower.encoder.layers.1." in warned[0]
    assert not [said for said in plan(made("llava"), recipe).warnings if "the vision tower lacks" in said]
    convert(source, tmp_path / "moe", recipe)
    proof = verify(source, tmp_path / "moe")
    assert not proof.holds
    with pytest.raises(UpcycleError, match=r"around its text model it lacks .*layers\.1\..*part_only = text"):
        upcycle.load(source, recipe)


@pytest.mark.parametrize("part", ["text", "vision", "text+vision"])
@pytest.mark.parametrize("gone", ["layers.1.", "layers.1.self_attn.q_proj"])
def test_a_text_model_that_lacks_blocks_is_refused_by_what_is_missing(gone, part, made, tmp_path):
    """Also where the vision tower alone gets experts."""
    stored = load_file(made("llava") / "model.safetensors")
    rest = {n: t for n, t in stored.items() if not ("language_model" in n and f".{gone}" in n)}
    source = edit(made("llava"), tmp_path / "cut", rest)
    with pytest.raises(UpcycleError, match=r"lacks model\.layers\.1\..*config\.json calls for"):
        blueprint(source, Recipe.of(moe={"num_experts": 2, "part": part}))


def test_a_vision_tower_that_gets_experts_is_refused_by_what_is_missing(made, tmp_path):
    stored = load_file(made("llava") / "model.safetensors")
    rest = {n: t for n, t in stored.items() if not n.startswith("vision_tower.encoder.layers.1.")}
    source = edit(made("llava"), tmp_path / "cut", rest)
    with pytest.raises(UpcycleError, match=r"lacks encoder\.layers\.1\..*config\.json calls for"):
        blueprint(source, Recipe.of(moe={"num_experts": 2, "part": "vision"}))


@pytest.mark.parametrize("gone", ["layers.1.", "layers.1.fc1.bias", "layers."])
def test_an_encoder_of_sound_that_lacks_blocks_is_refused(gone, tmp_path):
    sound = {**every_wrapper.CASES["qwen2_audio"].config["audio_config"], "encoder_layers": 2}
    case = replace(
        every_wrapper.CASES["qwen2_audio"], config={"audio_config": sound, "audio_token_index": 95}
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(every_wrapper.CASES, "qwen2_audio", case)
        every_wrapper.make(tmp_path / "whole", "qwen2_audio")
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    rest = {n: t for n, t in stored.items() if not ("audio" in n and f".{gone}" in n)}
    recipe = Recipe.of(moe={"num_experts": 2, "target": "upcycled"})
    blueprint(tmp_path / "whole", recipe)
    said = "the 2 blocks of its encoder of sound" if gone == "layers." else rf"audio_tower\.{gone}"
    with pytest.raises(UpcycleError, match=f"lacks .*{said}.*calls for.*part_only = text"):
        blueprint(edit(tmp_path / "whole", tmp_path / "cut", rest), recipe)


def test_a_projector_that_is_missing_is_named(made, tmp_path):
    stored = load_file(made("llava") / "model.safetensors")
    rest = {name: tensor for name, tensor in stored.items() if "multi_modal_projector" not in name}
    source = edit(made("llava"), tmp_path / "cut", rest)
    with pytest.raises(UpcycleError, match=r"around its text model it lacks .*multi_modal_projector"):
        upcycle.load(source, Recipe.of(moe={"num_experts": 2}))
