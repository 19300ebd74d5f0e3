"""Experts from a list: each against a plain account of what its table says, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny
from upcycle import Recipe, UpcycleError, blueprint, convert, verify
from upcycle.init.experts import Experts

PARTS = {"gate": ("w1", "gate_proj"), "up": ("w3", "up_proj"), "down": ("w2", "down_proj")}


def recipe(*tables, num_experts=None, **init):
    experts = num_experts or len(tables)
    return Recipe.of(
        moe={"num_experts": experts, "top_k": min(2, experts)},
        init={"name": "experts", "expert": list(tables), **init},
    )


def values(folder: Path) -> dict[str, np.ndarray]:
    return {name: v.astype(np.float64) for name, v in load_file(folder / "model.safetensors").items()}


def experts(built, layer: int = 1) -> list[dict[str, np.ndarray]]:
    """The matrices of the experts of one layer of a mixtral blueprint."""
    at = f"model.layers.{layer}.block_sparse_moe.experts"
    return [
        {part: built.entries[f"{at}.{e}.{name}.weight"].lazy.all("F32") for part, (name, _) in PARTS.items()}
        for e in range(built.sites[0].num_experts)
    ]


def network(tensors: dict[str, np.ndarray], layer: int = 1) -> dict[str, np.ndarray]:
    return {part: tensors[f"model.layers.{layer}.mlp.{name}.weight"] for part, (_, name) in PARTS.items()}


def merged(base: Path, adapter: Path, scale: float) -> dict[str, np.ndarray]:
    """W + scale B A, naively."""
    out, pairs = values(base), load_file(adapter / "adapter_model.safetensors")
    for name, b in pairs.items():
        if name.endswith(".lora_B.weight"):
            a = pairs[name.replace("lora_B", "lora_A")].astype(np.float64)
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            out[f"{module}.weight"] = out[f"{module}.weight"] + scale * b.astype(np.float64) @ a
    return out


def slerp(one: np.ndarray, two: np.ndarray, share: float) -> np.ndarray:
    cosine = (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
    angle = np.arccos(cosine)
    return (np.sin((1 - share) * angle) * one + np.sin(share * angle) * two) / np.sin(angle)


def same(found, wanted, rtol=1e-6):
    for part, matrix in wanted.items():
        np.testing.assert_allclose(found[part], matrix, rtol=rtol, atol=rtol * np.abs(matrix).max())


@pytest.fixture
def adapter(dense, tmp_path):
    return tiny.make_adapter(tmp_path / "adapter", dense("llama"), lora_alpha=12)


def test_each_expert_is_what_its_table_says(dense, adapter):
    base, donor = dense("llama"), dense("llama", seed=1)
    tables = [
        {},
        {"source": str(donor)},
        {"adapter": str(adapter)},
        {"source": str(donor), "weight": 0.3},
        {"source": str(donor), "weight": 0.3, "mix": "slerp"},
        {"adapter": str(adapter), "weight": 0.5},
        {"source": str(donor), "residual_scale": 0.25},
    ]
    built = blueprint(base, recipe(*tables))
    one, two = network(values(base)), network(values(donor))
    three = network(merged(base, adapter, 12 / 4))
    wanted = [
        one,
        two,
        three,
        {part: 0.7 * one[part] + 0.3 * two[part] for part in one},
        {part: slerp(one[part], two[part], 0.3) for part in one},
        {part: (one[part] + three[part]) / 2 for part in one},
        {**two, "down": 0.25 * two["down"]},
    ]
    found = experts(built)
    for e in (0, 1):
        assert all((found[e][part] == wanted[e][part]).all() for part in PARTS)
    for got, naive in zip(found, wanted, strict=True):
        same(got, naive)
    assert not built.preserves_function


@pytest.mark.parametrize("relative", [True, False])
def test_noise_has_its_own_size_in_each_expert(relative, dense):
    base = dense("llama", intermediate_size=1024, hidden_size=64)
    tables = [{"noise": 0.05, "noise_relative": relative}, {"noise": 0.2, "noise_relative": relative}]
    found, one = experts(blueprint(base, recipe(*tables))), network(values(base))
    for e, sigma in enumerate((0.05, 0.2)):
        for part, matrix in one.items():
            off = found[e][part] - matrix
            wanted = sigma * (matrix.std() if relative else 1.0)
            assert abs(off.std() / wanted - 1) < 5 / (2 * off.size) ** 0.5 + 1e-3
    assert not np.allclose(found[0]["up"] - one["up"], (found[1]["up"] - one["up"]) / 4, atol=1e-3)


def test_backbones(dense, adapter):
    """Of the source, the mean of the experts' models each counted once, or along the arcs between them."""
    base, donor = dense("llama"), dense("llama", seed=1)
    tables = [{"source": str(donor)}, {"source": str(donor), "noise": 0.1}, {}, {"adapter": str(adapter)}]
    models = [values(donor), values(base), merged(base, adapter, 3.0)]
    for backbone in ("base", "average", "slerp"):
        built = blueprint(base, recipe(*tables, backbone=backbone))
        for name in (
            "model.embed_tokens.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "model.norm.weight",
        ):
            each = [model[name] for model in models]
            wanted = {
                "base": each[1],
                "average": np.mean(each, axis=0),
                "slerp": slerp(slerp(each[0], each[1], 1 / 2), each[2], 1 / 3)
                if name.endswith("q_proj.weight")
                else None,
            }[backbone]
            if wanted is not None:
                np.testing.assert_allclose(built.entries[name].lazy.all(), wanted, rtol=2e-6, atol=1e-6)


def test_what_is_left_out_is_listed(dense, adapter, tmp_path):
    """Of adapters on the source, all is used if they are averaged; of donors, the networks alone if not."""
    base, donor = dense("llama"), dense("llama", seed=1)
    second = tiny.make_adapter(tmp_path / "second", base, ("up_proj", "q_proj"), seed=1)
    both = [{"adapter": str(adapter)}, {"adapter": str(second)}]
    assert not blueprint(base, recipe(*both, backbone="average")).left_out
    left = blueprint(base, recipe(*both)).left_out
    assert {name.split(".")[-3] for name in left} == {"q_proj"}
    assert all(name.startswith("adapter 2: ") for name in left)
    left = blueprint(base, recipe({"source": str(donor)}, {"source": str(donor), "weight": 0.5})).left_out
    assert not any(".mlp." in name for name in left)
    left = blueprint(base, recipe({"source": str(donor)}, {"source": str(donor)})).left_out
    assert {name for name in left if ".mlp." in name} == {n for n in values(base) if ".mlp." in n}


def test_slerp_keeps_lengths_and_is_a_line_where_two_are_parallel(dense):
    base = dense("llama")
    donor = dense("llama", seed=1)
    for other, share in ((donor, 0.5), (base, 0.3)):
        tables = [{"source": str(other), "weight": share, "mix": "slerp"}, {}]
        found, one = experts(blueprint(base, recipe(*tables))), network(values(base))
        for part, matrix in one.items():
            length = np.linalg.norm(found[0][part]) / np.linalg.norm(matrix)
            assert abs(length - 1) < (0.1 if other is donor else 1e-6)


def test_many_experts_of_few_donors(dense):
    """Equal blocks as in branch_train_mix: seven tables for seven experts, or two for six."""
    base, donor = dense("llama"), str(dense("llama", seed=1))
    built = blueprint(base, recipe({}, {"source": donor}, num_experts=6))
    one, two = network(values(base)), network(values(Path(donor)))
    for e, found in enumerate(experts(built)):
        assert (found["up"] == (one if e < 3 else two)["up"]).all()
    with pytest.raises(UpcycleError, match=r"moe.num_experts = 7 and init.expert lists 2"):
        blueprint(base, recipe({}, {"source": donor}, num_experts=7))


def test_branch_train_mix_is_short_for_a_list(dense):
    """Same bytes, tensor by tensor."""
    base, donors = dense("llama"), [str(dense("llama", seed=s)) for s in (1, 2)]
    short = Recipe.of(
        moe={"num_experts": 6},
        init={"name": "branch_train_mix", "sources": donors},
    )
    tables = [{}, *({"source": name} for name in donors)]
    long = recipe(*tables, num_experts=6, backbone="average")
    one, two = blueprint(base, short), blueprint(base, long)
    assert one.hash == two.hash


def test_anchors_are_known_by_number():
    tables = [{}, {"source": "a"}, {"noise": 0.1}]
    init = Recipe.of(moe={"num_experts": 6}, init={"name": "experts", "expert": tables}).init
    assert isinstance(init, Experts)
    assert init.anchors(6) == {0, 1}
    assert init.anchors(3) == {0}
    assert Recipe.of().init.anchors(8) == frozenset()


def test_a_list_of_anchors_keeps_the_function(dense, tmp_path):
    base = dense("llama")
    proof = verify(base, _converted(base, tmp_path / "moe", recipe({}, {})))
    assert proof.holds
    assert proof.preserves_function


def _converted(source: Path, out: Path, given: Recipe) -> Path:
    convert(source, out, given)
    return out


@pytest.mark.parametrize(
    ("architecture", "modules", "settings"),
    [
        ("ViTForImageClassification", ("dense",), {}),
        ("T5ForConditionalGeneration", ("wi", "wo", "q"), {"use_rslora": True}),
        ("GPT2LMHeadModel", ("c_fc", "c_proj"), {"fan_in_fan_out": True}),
        ("Phi3ForCausalLM", ("gate_up_proj",), {}),
        ("ConvNextV2ForImageClassification", ("pwconv1", "pwconv2"), {}),
    ],
)
def test_every_kind_of_model(architecture, modules, settings, tmp_path):
    """A donor and an adapter make experts of vision models, encoder-decoders and fused networks; verified."""
    base, donor = (tiny.make(tmp_path / str(seed), architecture, seed=seed) for seed in (0, 1))
    adapter = tiny.make_adapter(tmp_path / "adapter", base, modules, **settings)
    tables = [{}, {"source": str(donor)}, {"adapter": str(adapter)}, {"source": str(donor), "weight": 0.5}]
    given = Recipe.of(
        moe={"num_experts": 4, "target": "upcycled"}, init={"name": "experts", "expert": tables}
    )
    proof = verify(base, _converted(base, tmp_path / "moe", given), logits=False)
    assert proof.holds, [check for check in proof.checks if not check.holds]
    scale = 8 / (2 if settings.get("use_rslora") else 4)
    pairs = load_file(adapter / "adapter_model.safetensors")
    naive = []
    for name, b in pairs.items():
        if "lora_B" in name:
            delta = scale * b.astype(np.float64) @ pairs[name.replace("lora_B", "lora_A")]
            naive.append(delta.T if settings.get("fan_in_fan_out") else delta)
    made = blueprint(base, given)
    found = [lazy for entry in made.entries.values() for lazy in _low_rank(entry.lazy)]
    for lazy in found:
        delta = lazy.all("F64") - lazy.base.all("F64")
        assert any(delta.shape == d.shape and np.allclose(delta, d, rtol=0, atol=1e-12) for d in naive)
    assert found


def _low_rank(lazy):
    """The merged matrices that a lazy tensor is made of."""
    from upcycle.tensors.mixed import LowRank

    if isinstance(lazy, LowRank):
        yield lazy
        return
    for inner in [getattr(lazy, "base", None), *getattr(lazy, "parts", ())]:
        if inner is not None:
            yield from _low_rank(inner)


def test_a_model_within_another(tmp_path):
    """The adapter names modules of the wrapper's class; the tower for images is not the text model's."""
    import tiny_wrappers

    base = tmp_path / "base"
    tiny_wrappers.make(base, "llava")
    adapter = tiny.make_adapter(tmp_path / "adapter", base, ("up_proj",))
    given = recipe({}, {"adapter": str(adapter)})
    proof = verify(base, _converted(base, tmp_path / "moe", given), logits=False)
    assert proof.holds, [check for check in proof.checks if not check.holds]


def test_stories(stories, tmp_path):
    """A really trained model and a donor whose weights moved; an adapter of its difference, of full rank."""
    from safetensors.numpy import save_file

    base = values(stories)
    random = np.random.default_rng(0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    pairs = {}
    for layer in range(5):
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = f"model.layers.{layer}.mlp.{name}"
            rows, columns = base[f"{module}.weight"].shape
            for part, shape in (("A", (16, columns)), ("B", (rows, 16))):
                drawn = 0.02 * random.standard_normal(shape)
                pairs[f"base_model.model.{module}.lora_{part}.weight"] = drawn.astype(np.float32)
    save_file(pairs, adapter / "adapter_model.safetensors")
    modules = ["gate_proj", "up_proj", "down_proj"]
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": modules}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    built = blueprint(stories, recipe({}, {"adapter": str(adapter)}))
    wanted = network(merged(stories, adapter, 2.0), layer=3)
    found = experts(built, layer=3)[1]
    for part, matrix in wanted.items():
        rounded = matrix.astype(np.float32)
        off = np.abs(found[part] - rounded)
        assert (off <= np.spacing(np.abs(rounded))).all()
        assert np.mean(off > 0) < 1e-4  # the sum is rounded once, so hardly any value is even one step off


@pytest.mark.parametrize("model_type", ["qwen2", "hunyuan_v1_dense", "glm"])
def test_a_model_that_gives_no_expert_is_named_where_the_target_has_a_shared_one(model_type, dense, tmp_path):
    """The shared expert that the target must have takes gate and up of the source, and gives zero."""
    source, donor = dense(model_type), dense(model_type, seed=1)
    convert(source, tmp_path / "moe", recipe({"source": str(donor)}, num_experts=2))
    proof = verify(source, tmp_path / "moe", logits=False)
    assert proof.holds, proof.checks
    left = json.loads((tmp_path / "moe" / "upcycle.json").read_text())["left_out_tensors"]
    own = [name for name in left if not name.startswith("donor")]
    assert own
    assert all(".down_proj." in name for name in own)
