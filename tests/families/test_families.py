"""The tables of families and targets against what transformers builds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import tiny
from upcycle import Recipe, blueprint, convert, families
from upcycle.targets import natives

# Fields whose default the family works out from others, as the class does after it is built.
DERIVED = {"head_dim", "num_key_value_heads", "layer_types", "no_rope_layers", "sliding_window"}


@pytest.mark.parametrize("model_type", [*tiny.DECODERS, *tiny.OTHERS])
def test_defaults_are_those_of_transformers(model_type):
    declared = {f.name: f.default for f in dataclasses.fields(CONFIG_MAPPING[model_type])}
    family = families.find(model_type)
    for key, value in family.defaults.items():
        if key not in DERIVED or value is not None:
            assert declared[key] == value, key
    theta = getattr(CONFIG_MAPPING[model_type], "default_theta", 10_000.0)
    assert family.theta == (theta["global"] if isinstance(theta, dict) else theta)


@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_a_config_that_says_little_means_what_transformers_makes_of_it(model_type):
    """Sizes alone in config.json: every field that both know has the value transformers gives it."""
    sizes = {k: tiny.SMALL[k] for k in tiny._ALWAYS} | tiny.NEEDED.get(model_type, {})
    family = families.find(model_type)
    found = family.config({"model_type": model_type, **sizes})
    wanted = CONFIG_MAPPING[model_type](**sizes)
    for key in found:
        if key in ("head_dim", "sliding_window", "rope_parameters") or not hasattr(wanted, key):
            continue
        assert found[key] == getattr(wanted, key), key
    if getattr(wanted, "head_dim", None) is not None:
        assert found["head_dim"] == wanted.head_dim
    if not hasattr(wanted, "rope_parameters"):
        return
    rope = {k: v for k, v in wanted.rope_parameters.items() if v is not None}
    assert {k: found["rope_parameters"].get(k) for k in ("rope_type", "rope_theta")} == {
        k: rope[k] for k in ("rope_type", "rope_theta")
    }


@pytest.mark.parametrize("model_type", [*tiny.DECODERS, *tiny.OTHERS])
def test_what_transformers_saves_is_told_apart_from_nothing(model_type, tmp_path):
    """A branch that was trained from a model of the hub has the spelling of today's transformers."""
    family = families.find(model_type)
    raw = json.loads(tiny.config_of(model_type).to_json_string(use_diff=False))
    for key in ("layer_types", "rope_parameters"):
        if raw.pop(key, None) is not None and key == "rope_parameters" and family.theta == 10_000.0:
            raw["rope_theta"] = 2e4
    raw |= tiny.NEEDED.get(model_type, {})
    if "use_sliding_window" in family.defaults:
        raw |= {"sliding_window": 32768, "max_window_layers": 28}
    if "sliding_window_pattern" in family.reads:
        raw["sliding_window_pattern"] = 2
    if "rope_local_base_freq" in family.reads:
        raw["rope_local_base_freq"] = 777.0
    (tmp_path / "config.json").write_text(json.dumps(raw))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    here, there = (family.compared(family.config(each)) for each in (raw, saved))
    for key in {*family.defaults, *family.reads, "rope_parameters"} - {"residual_dropout"}:
        assert here.get(key) == there.get(key), key


def test_an_exaone_without_a_window_is_read_as_it_was_saved(dense):
    """transformers writes that no layer in 0 has full attention, and lists the layers, which all have."""
    source = dense("exaone4", sliding_window=None, layer_types=["full_attention"] * 4)
    assert json.loads((source / "config.json").read_text())["sliding_window_pattern"] == 0
    built = blueprint(source, Recipe.of(moe={"num_experts": 2, "target": "upcycled"}))
    assert built.dense.config["layer_types"] == ["full_attention"] * 4


# What transformers saves and our config.json does not say: version, a second name for the number of
# experts, what layer_types or other sizes say already, limits that are none, a token id and flags
# that nothing reads, layers that predict several tokens and are not there.
SAVED_ONLY = {
    "transformers_version", "num_local_experts", "rope_parameters", "sliding_window_pattern",
    "prefix_dense_sliding_window_pattern", "sep_token_id", "pretraining_tp", "qk_head_dim", "time_step_limit",
    "use_mamba_kernels", "moe_shared_expert_overlap", "mtp_layers_block_type",
}  # fmt: skip
CASES = {
    **{name: (name, {}) for name in [*tiny.DECODERS, *tiny.OTHERS]},
    **tiny.VARIANTS,
    "llama-mlp_bias": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "granite-mlp_bias": ("granite", {"mlp_bias": True}),
    "smollm3-mlp_bias": ("smollm3", {"mlp_bias": True, "attention_bias": True}),
    "ernie4_5-bias": ("ernie4_5", {"use_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_transformers(case):
    model_type, changes = CASES[case]
    config = tiny.config_of(model_type, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    family, prefix = families.find(model_type), f"{model.base_model_prefix}."
    shapes = {n: tuple(p.shape) for n, p in model.state_dict().items() if n not in tied}
    # Files may call the base model otherwise than its class does.
    wanted = {
        family.root + n.removeprefix(prefix) if n.startswith(prefix) else n: shape
        for n, shape in shapes.items()
    }
    assert family.shapes(family.config(config.to_dict())) == wanted
    assert family.architectures == (type(model).__name__,)


@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_every_source_tensor_is_used_and_every_target_defined_once(model_type, dense):
    built = blueprint(dense(model_type), Recipe.of())
    used = {info.name for e in built.entries.values() for info in e.lazy.sources()}
    assert used == set(built.source.tensors)
    assert not built.left_out


@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_names_and_config_are_those_that_transformers_saves(model_type, dense, tmp_path):
    """Loaded and saved again by transformers, the tensors have our names, shapes and values."""
    from upcycle.checkpoints.checkpoint import Checkpoint

    convert(dense(model_type), tmp_path / "ours", Recipe.of(moe={"num_experts": 4}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    with Checkpoint.open(tmp_path / "ours") as ours, Checkpoint.open(tmp_path / "theirs") as theirs:
        assert {n: t.shape for n, t in ours.tensors.items()} == {
            n: t.shape for n, t in theirs.tensors.items()
        }
        for name, info in ours.tensors.items():
            other = theirs.tensors[name]
            assert (ours.pread(info, 0, info.nbytes) == theirs.pread(other, 0, other.nbytes)).all(), name
        for key, value in theirs.config.items():
            if key not in SAVED_ONLY:
                assert key in ours.config or value in (None, False, [], 0, 0.0), key


@pytest.mark.parametrize("name", natives.names())
def test_targets(name):
    native = natives.find(name)
    assert native.model_type == name
    cls = CONFIG_MAPPING[name]
    assert any(name in families.find(f).natives for f in families.names())
    declared = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
    for field in (native.num_experts_field, native.top_k_field, native.width_field):
        assert field in declared
    assert (native.renormalizes == "optional") == (
        "norm_topk_prob" in declared and "norm_topk_prob" not in native.constants
    )


def test_both_spellings_of_rope(dense, tmp_path):
    """transformers 5 reads rope_parameters; everything older rope_theta and rope_scaling."""
    _, changes = tiny.VARIANTS["llama-rope3"]
    convert(dense("llama", **changes), tmp_path / "moe", Recipe.of())
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    import json

    raw = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 500000.0
    assert raw["rope_scaling"]["rope_type"] == "llama3"
    assert raw["rope_scaling"]["factor"] == config.rope_parameters["factor"] == 8.0
    assert raw["num_local_experts"] == 8


def test_an_old_config_means_the_same(dense, tmp_path):
    """A config.json of transformers 4 (rope_theta, rope_scaling with `type`, torch_dtype)."""
    import json
    import shutil

    folder = shutil.copytree(dense("llama"), tmp_path / "old")
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw))
    from upcycle import verify

    convert(folder, tmp_path / "moe", Recipe.of())
    assert verify(folder, tmp_path / "moe").holds
    made = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert made["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}


def test_a_tied_head_that_is_stored_all_the_same(dense, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from upcycle import verify

    folder = shutil.copytree(dense("llama", tie_word_embeddings=True), tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "moe", Recipe.of())
    proof = verify(folder, tmp_path / "moe")
    assert proof.holds, proof.checks
    assert "tied" in proof.checks[0].detail


def test_refused_families_are_no_families():
    assert not set(families.REFUSED) & set(families.names())
    inexact = {(name, t): why for name in families.names() for t, why in families.find(name).inexact.items()}
    assert inexact
    for (model_type, target), reason in inexact.items():
        assert target not in families.find(model_type).natives
        assert reason


def test_imports_have_no_cycle():
    """No module imports, when it is loaded, one that imports it, however far away."""
    import ast
    from pathlib import Path

    import upcycle

    root = Path(upcycle.__file__).parent
    files = {
        ".".join(("upcycle", *p.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): p
        for p in root.rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for node in ast.parse(path.read_text()).body:  # module level only; TYPE_CHECKING blocks are not
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("upcycle"):
                found |= {f"{node.module}.{a.name}" for a in node.names} & set(files) or {node.module}
        imports[name] = found - {name}
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, (*path, name)
        if name not in state:
            state[name] = 1
            for other in imports.get(name, ()):
                visit(other, (*path, name))
            state[name] = 2

    for name in imports:
        visit(name, ())
    assert not imports["upcycle.errors"]
    assert imports["upcycle.checkpoints.dtypes"] == {"upcycle.errors"}


@pytest.mark.parametrize("target", ["native", "upcycled"])
@pytest.mark.parametrize("pad", [0, 5, 95])
def test_the_padding_token_of_a_youtu(pad, target, tmp_path):
    """Its class empties the token's row when it opens a checkpoint, and so does the conversion."""
    from upcycle import verify

    source = tiny.make_dense(tmp_path / "dense", "youtu", pad_token_id=pad, tie_word_embeddings=True)
    convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 2, "target": target}))
    proof = verify(source, tmp_path / "moe", logits=pad == 5)
    assert proof.holds, proof.checks
    opened = [AutoModelForCausalLM.from_pretrained(each) for each in (source, tmp_path / "moe")]
    dense, moe = (model.get_input_embeddings().weight for model in opened)
    assert torch.equal(dense, moe)
    assert not moe[pad].any()
