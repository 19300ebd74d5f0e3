"""Recycling a larger checkpoint (MoE Jetpack, section 3.1) against plain numpy: what is chosen."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import tiny
import tiny_wrappers
import upcycle
from arrays import made, stored
from marks import quick
from upcycle import Recipe, blueprint, convert, families, plan, verify
from upcycle.calibration.calibration import ToCalibrate, calibrate
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.header import read_metadata
from upcycle.cli.views.plan import show_plan
from upcycle.dense import successors
from upcycle.dense.admission import admit
from upcycle.errors import UpcycleError
from upcycle.families._narrowing import narrowable
from upcycle.init import Site, _selecting, co_activation
from upcycle.init._selecting import Choice
from upcycle.init.importance import Importance
from upcycle.init.random import Random
from upcycle.tensors import rng
from upcycle.training import start
from upcycle.training.run import Run

BIG = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
SMALL = {"hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2}
MOE = {"target": "upcycled", "layers": "last_half", "num_experts": 5, "top_k": 2}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("big"), "ViTForImageClassification", **BIG)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("small"), "ViTForImageClassification", seed=1, **SMALL)


def narrowed(arrays: dict[str, np.ndarray], channels, heads, neurons) -> dict[str, np.ndarray]:
    """A ViT cut by hand: channels of the model, elements of heads and neurons of each block."""
    out = {}
    for name, x in arrays.items():
        layer = int(name.split(".")[3]) if ".layer." in name else None
        rest = name.split(".", 4)[-1] if layer is not None else name
        if rest.startswith("attention.attention"):
            x = x[heads(layer)] if x.ndim == 1 else x[heads(layer)][:, channels]
        elif rest == "attention.output.dense.weight":
            x = x[channels][:, heads(layer)]
        elif rest.startswith("intermediate"):
            x = x[neurons(layer)] if x.ndim == 1 else x[neurons(layer)][:, channels]
        elif rest == "output.dense.weight":
            x = x[channels][:, neurons(layer)]
        elif name == "classifier.weight" or name.endswith(("_token", "position_embeddings")):
            x = x[..., channels]
        elif name != "classifier.bias":
            x = x[channels]
        out[name] = x
    return out


def test_each_decoder_knows_its_axes_or_says_that_it_does_not():
    """Whatever the names of its tensors are."""
    known = {}
    for name in {*tiny.DECODERS, *tiny.OTHERS, *tiny.RECENT}:
        family = families.find(name)
        config = family.config(tiny.config_of(name).to_dict())
        with contextlib.suppress(UpcycleError):
            known[name] = narrowable(family).axes(config)
        if name not in known:
            continue
        assert {n: len(axes) for n, axes in known[name].items()} == {
            n: len(shape) for n, shape in family.shapes(config).items()
        }
    assert {"llama", "qwen3", "gemma2"} <= known.keys()
    assert "lfm2" not in known


# --- uniform: Weight Selection


def test_a_uniform_successor_is_cut_by_hand(big):
    """Equation 7, on every tensor; heads whole, 2 of 4."""
    built = blueprint(
        big,
        Recipe.of(moe={"target": "dense"}, init={"name": "uniform"}, successor={"hidden_size": 16}),
    )
    evenly = np.arange(16) * 32 // 16
    heads = np.concatenate([np.arange(8) + 8 * h for h in np.arange(2) * 4 // 2])
    wanted = narrowed(stored(big), evenly, lambda _: heads, lambda _: np.arange(48) * 96 // 48)
    found = made(built)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert built.config["hidden_size"] == 16
    assert built.config["num_attention_heads"] == 2


def test_the_repository_spaces_from_the_first_to_the_last(big):
    built = blueprint(
        big,
        Recipe.of(
            moe={"target": "dense"},
            init={"name": "uniform", "preset": "repo"},
            successor={"hidden_size": 8},
        ),
    )
    evenly = np.round(np.linspace(0, 31, 8)).astype(int)
    np.testing.assert_array_equal(
        made(built)["vit.layernorm.weight"], stored(big)["vit.layernorm.weight"][evenly]
    )


def test_a_narrow_model_runs_and_is_verified(big, tmp_path):
    for name, recipe in {
        "dense": Recipe.of(moe={"target": "dense"}, init={"name": "random"}, successor={"hidden_size": 16}),
        "moe": Recipe.of(
            moe={**MOE, "expert_width": 24}, init={"name": "uniform"}, successor={"hidden_size": 16}
        ),
    }.items():
        convert(big, tmp_path / name, recipe)
        proof = verify(big, tmp_path / name)
        assert proof.holds, proof.checks
        assert not proof.preserves_function
        model = upcycle.open(tmp_path / name)
        assert model(torch.randn(2, 3, 12, 12)).logits.isfinite().all()
    assert type(upcycle.open(tmp_path / "dense")).__name__ == "ViTForImageClassification"


def test_a_narrow_dense_model_says_what_it_is(big, tmp_path, capsys):
    recipe = Recipe.of(moe={"target": "dense"}, init={"name": "uniform"}, successor={"hidden_size": 16})
    convert(big, tmp_path / "narrow", recipe)
    card = (tmp_path / "narrow" / "README.md").read_text().partition("## Recipe")[0]
    assert f"# {big.name}, narrower" in card
    assert "initialisation `uniform`" in card
    assert "weights are left out: the function is not kept" in card
    found = plan(big, recipe)
    assert found.kind == "narrower"
    sizes = [sum(t.size for t in stored(f).values()) for f in (big, tmp_path / "narrow")]
    assert [found.dense_parameters, found.total_parameters] == sizes
    assert found.flops_per_token < found.dense_flops_per_token
    show_plan(plan(big, recipe))
    said = capsys.readouterr().out
    assert "narrower" in said
    for text in (card, said):
        assert not re.search(r"MoE|mixture|upcycled|deeper|every block", text, re.IGNORECASE)


def test_a_narrow_centred_norm_starts_at_its_identity(tmp_path):
    """From scratch, as the class itself starts: Gemma multiplies by 1 + w."""
    source = tiny.make_dense(tmp_path / "gemma", "gemma")
    run = Run.of(
        {
            "source": str(source), "out": str(tmp_path / "run"), "from_scratch": True,
            "moe": {"target": "dense"}, "init": {"name": "uniform"}, "successor": {"hidden_size": 16},
            "data": {"sources": [{"path": "text.txt"}]}, "train": {"steps": 1}, "schedule": {"peak": 1e-3},
        }
    )  # fmt: skip
    norm = start.start_of(run).entries["model.norm.weight"]
    assert norm.shape == (16,)
    assert not norm.lazy.all("F32").any()


# --- random, and what all share


def test_random_experts_differ_and_share_channels(big):
    recipe = Recipe.of(
        moe={**MOE, "expert_width": 24}, init={"name": "random"}, successor={"hidden_size": 16}, seed=3
    )
    found, whole = made(blueprint(big, recipe)), stored(big)
    norm = found["vit.layernorm.weight"]
    channels = np.array([np.flatnonzero(whole["vit.layernorm.weight"] == x)[0] for x in norm])
    assert (np.diff(channels) > 0).all()
    assert len(channels) == 16
    chosen = []
    for layer in (2, 3):
        up = whole[f"vit.encoder.layer.{layer}.intermediate.dense.weight"]
        bias = whole[f"vit.encoder.layer.{layer}.intermediate.dense.bias"]
        down = whole[f"vit.encoder.layer.{layer}.output.dense.weight"]
        mlp = f"vit.encoder.layer.{layer}.mlp.experts."
        for e in range(5):
            neurons = np.array([np.flatnonzero(bias == x)[0] for x in found[mlp + "up_proj_bias"][e]])
            assert (np.diff(neurons) > 0).all()
            assert len(neurons) == 24
            np.testing.assert_array_equal(found[mlp + "up_proj"][e], up[neurons][:, channels])
            np.testing.assert_array_equal(found[mlp + "down_proj"][e], down[channels][:, neurons])
            np.testing.assert_array_equal(
                found[mlp + "down_proj_bias"][e],
                whole[f"vit.encoder.layer.{layer}.output.dense.bias"][channels],
            )
            chosen.append(tuple(neurons))
    assert len({*chosen}) == 10
    again = made(blueprint(big, recipe))
    assert all(np.array_equal(found[n], again[n]) for n in found)
    other = made(blueprint(big, Recipe.of({**recipe.as_table(), "seed": 4})))
    assert not np.array_equal(found["vit.layernorm.weight"], other["vit.layernorm.weight"])


def test_the_repository_draws_channels_for_each_expert(big):
    recipe = Recipe.of(
        moe={**MOE, "expert_width": 24},
        init={"name": "random", "preset": "repo"},
        successor={"hidden_size": 16},
    )
    found, whole = made(blueprint(big, recipe)), stored(big)
    bias = whole["vit.encoder.layer.3.output.dense.bias"]
    chosen = {
        tuple(np.flatnonzero(bias == x)[0] for x in row)
        for row in found["vit.encoder.layer.3.mlp.experts.down_proj_bias"]
    }
    assert len(chosen) == 5


def test_the_rest_comes_from_a_second_checkpoint(big, small, tmp_path):
    recipe = Recipe.of(
        moe={**MOE, "expert_width": 48},
        init={"name": "uniform"},
        successor={"hidden_size": 16, "rest": str(small)},
    )
    convert(big, tmp_path / "out", recipe)
    found, own, whole = stored(tmp_path / "out"), stored(small), stored(big)
    experts = {n for n in found if ".mlp." in n}
    assert experts
    assert all(np.array_equal(found[n], own[n]) for n in found if n not in experts)
    np.testing.assert_array_equal(
        found["vit.encoder.layer.2.mlp.experts.up_proj"][4],
        whole["vit.encoder.layer.2.intermediate.dense.weight"][::2, ::2],
    )
    proof = verify(big, tmp_path / "out")
    assert proof.holds, proof.checks
    assert "experts come from the predecessor" in proof.checks[0].detail


def test_same_width_keeps_channels_and_the_function_where_nothing_is_left_out(big):
    recipe = Recipe.of(moe={**MOE, "expert_width": 96}, init={"name": "random"})
    built = blueprint(big, recipe)
    assert built.preserves_function
    assert not blueprint(
        big, Recipe.of(moe={**MOE, "expert_width": 95}, init={"name": "random"})
    ).preserves_function


def test_expected_output(big):
    """For neurons drawn alike the mean over draws is the dense network's down matrix."""
    table = {"moe": {**MOE, "expert_width": 24}, "init": {"name": "random", "output": "expected"}}
    raw = made(blueprint(big, Recipe.of({**table, "init": {"name": "random"}})))
    found = made(blueprint(big, Recipe.of(table)))
    name = "vit.encoder.layer.3.mlp.experts.down_proj"
    np.testing.assert_allclose(found[name], raw[name] * 4, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_decoders_are_narrowed_with_whole_groups_of_heads(name, tmp_path):
    """A decoder of half the channels and half the key heads, in a native MoE with Top-K."""
    source = tiny.make_dense(tmp_path / "dense", name, num_attention_heads=8, num_key_value_heads=4)
    recipe = Recipe.of(
        moe={"num_experts": 4, "expert_width": 24}, init={"name": "uniform"}, successor={"hidden_size": 16}
    )
    built = blueprint(source, recipe)
    convert(source, tmp_path / "moe", recipe)
    assert verify(source, tmp_path / "moe").holds
    model = upcycle.open(tmp_path / "moe")
    assert model.config.num_key_value_heads == 2
    assert model.config.num_attention_heads == 4
    assert model(torch.arange(12)[None]).logits.isfinite().all()
    q = built.entries["model.layers.0.self_attn.q_proj.weight"].lazy.all("F32")
    whole = stored(source)["model.layers.0.self_attn.q_proj.weight"]
    head = built.dense.config["head_dim"]
    rows = np.concatenate([np.arange(2 * head) + 2 * head * g for g in (0, 2)])
    np.testing.assert_array_equal(q, whole[rows][:, ::2])


@pytest.mark.parametrize(
    ("name", "moe"),
    [
        ("qwen2", {}),
        ("llama", {"target": "upcycled", "shared_experts": 1}),
        ("ernie4_5", {"shared_experts": 1}),
    ],
)
def test_a_shared_expert_has_the_channels_of_the_successor(name, moe, dense, tmp_path):
    """It is the narrowed network itself, which the same successor without experts has."""
    source = dense(name)
    table = {"init": {"name": "uniform"}, "successor": {"hidden_size": 16}}
    recipe = Recipe.of(table, moe={"num_experts": 4, **moe})
    convert(source, tmp_path / "moe", recipe)
    assert verify(source, tmp_path / "moe").holds
    assert upcycle.open(tmp_path / "moe")(torch.arange(12)[None]).logits.isfinite().all()
    found = made(blueprint(source, recipe))
    shared = next(n for n in found if "shared" in n and "up_proj" in n)
    network = made(blueprint(source, Recipe.of(table, moe={"target": "dense"})))
    up = network["model.layers.0.mlp.up_proj.weight"]
    rows = np.squeeze(found[shared])
    both = np.concatenate([network["model.layers.0.mlp.gate_proj.weight"], up])
    np.testing.assert_array_equal(rows, both if "gate_up" in shared else up[: len(rows)])


@pytest.mark.parametrize(
    ("moe", "successor"),
    [
        ({}, {"rest": "other"}),  # what is no expert is another model's
        ({"layers": "every_other"}, {"intermediate_size": 24}),  # networks that stay dense are narrower
    ],
)
def test_a_successor_does_not_keep_the_function(moe, successor, dense, tmp_path):
    """Also where every expert is the source's whole network."""
    source, other = dense("llama"), tiny.make_dense(tmp_path / "other", "llama", seed=1)
    successor = {key: str(other) if key == "rest" else value for key, value in successor.items()}
    recipe = Recipe.of(
        moe={"num_experts": 4, "target": "upcycled", "expert_width": 48, **moe},
        init={"name": "random"}, successor=successor,
    )  # fmt: skip
    built = convert(source, tmp_path / "moe", recipe)
    models = [upcycle.open(folder).eval() for folder in (source, tmp_path / "moe")]
    a, b = (model(torch.arange(12)[None]).logits for model in models)
    assert (a - b).abs().max() > 0.1 * a.abs().max()
    assert not built.preserves_function


def test_a_shared_expert_of_the_rest_is_not_left_out(dense, tmp_path):
    source, other = dense("llama"), tiny.make_dense(tmp_path / "other", "llama", seed=1)
    moe = {"num_experts": 4, "target": "upcycled", "shared_experts": 1}
    recipe = Recipe.of(moe=moe, init={"name": "random"}, successor={"rest": str(other)})
    built = blueprint(source, recipe)
    up = stored(other)["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(made(built)["model.layers.0.mlp.shared.one.gate_up_proj"][0, 48:], up)
    assert not built.left_out.keys() & {f"rest: model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")}
    alone = Recipe.of({**recipe.as_table(), "moe": {**moe, "shared_experts": 0}})
    assert "rest: model.layers.0.mlp.up_proj.weight" in blueprint(source, alone).left_out


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_granularity_divides_the_width_of_the_successor(granularity, big):
    moe = {**MOE, "num_experts": 4, "granularity": granularity, "universal_experts": 1}
    recipe = Recipe.of(
        moe=moe, init={"name": "random"}, successor={"hidden_size": 16}, router={"name": "soft"}
    )
    site = blueprint(big, recipe).sites[0]
    assert site.width == 48 // granularity
    assert site.universal_width == 48 // granularity // 4


def test_a_granularity_that_does_not_divide_the_successor_is_refused(dense):
    recipe = Recipe.of(moe={"granularity": 16}, init={"name": "random"}, successor={"hidden_size": 16})
    with pytest.raises(UpcycleError, match="does not divide the successor's width 24"):
        blueprint(dense("llama"), recipe)


@pytest.mark.parametrize(("name", "changes"), [("olmo2", {}), ("cohere", {"use_qk_norm": True})])
def test_norms_of_heads_are_cut_with_the_heads(name, changes, dense, tmp_path):
    """Also where one key head is left, as long as a norm that all heads would share."""
    source = dense(name, num_attention_heads=4, num_key_value_heads=2, **changes)
    recipe = Recipe.of(moe={"target": "dense"}, init={"name": "uniform"}, successor={"hidden_size": 16})
    convert(source, tmp_path / "narrow", recipe)
    model = upcycle.open(tmp_path / "narrow")
    assert model.config.num_key_value_heads == 1
    assert model(torch.arange(12)[None]).logits.isfinite().all()
    whole, found = stored(source), stored(tmp_path / "narrow")
    for part, heads in (("q", 2), ("k", 1)):
        norm = f"model.layers.0.self_attn.{part}_norm.weight"
        wanted = whole[norm].reshape(-1, 8)[:heads]
        np.testing.assert_array_equal(found[norm].reshape(-1, 8), wanted)


# --- drawing


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_drawing_leaves_what_has_no_weight_for_last(seed):
    weights = np.array([0.0, 3.0, 0.0, 1.0, 2.0])
    order = _selecting.drawn(rng.key(seed, "x"), weights)
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert set(order[3:]) == {0, 2}


def test_drawing_is_in_proportion_to_weight():
    """First draws come as often as the weights say, and pairs as sequential drawing without replacement
    has."""
    weights = np.array([4.0, 3.0, 2.0, 1.0])
    n = 20_000
    orders = np.stack([_selecting.drawn(rng.key(i, "draw"), weights) for i in range(n)])
    p = weights / weights.sum()
    first = np.bincount(orders[:, 0], minlength=4) / n
    np.testing.assert_allclose(first, p, atol=4 * 0.5 / n**0.5)
    for a in range(4):
        for b in range(4):
            wanted = 0.0 if a == b else p[a] * p[b] / (1 - p[a])
            seen = ((orders[:, 0] == a) & (orders[:, 1] == b)).mean()
            assert abs(seen - wanted) < 4 * 0.5 / n**0.5


# --- measured: with statistics given by hand


class Given:
    """Statistics in a dictionary, as a file would have them."""

    digest = "by hand"

    def __init__(self, **found):
        self.found = found

    def of(self, position, stack, layer, name):
        return np.asarray(self.found[f"{position}_{name}"][layer], np.float32)

    info = of


def measured(cls, given, monkeypatch, **keys):
    monkeypatch.setattr(cls, "measured", property(lambda self: given))
    return cls(statistics="by hand", **keys)


def choice(kind, layer, *, blocks=1, seed=0, **sizes) -> Choice:
    return Choice(kind=kind, stack="layers", layer=layer, blocks=blocks, seed=seed, **sizes)


def test_channels_are_the_top_of_the_layers_together(monkeypatch):
    """Equation 4."""
    given = Given(channels_l2=[[1.0, 5.0, 2.0, 0.0], [4.0, 0.0, 1.0, 3.5]])
    chosen = measured(Importance, given, monkeypatch).choose(
        choice("channels", None, total=4, count=2, blocks=2)
    )
    assert chosen.values.tolist() == [0, 1]  # sums 5, 5, 3, 3.5


def test_whole_heads_by_their_sum(monkeypatch):
    given = Given(heads_l1=[[1.0, 1.0, 3.0, 0.0, 0.0, 2.5]])
    one = measured(Importance, given, monkeypatch, statistic="l1")
    assert one.choose(choice("heads", 0, total=3, count=2)).values.tolist() == [1, 2]


def test_important_neurons_are_in_more_experts(monkeypatch):
    """Of experts of one neuron, each neuron is in its share of the norm."""
    given = Given(neurons_l2=[[8.0, 4.0, 2.0, 1.0, 1.0]])
    one = measured(Importance, given, monkeypatch)
    n = 4000
    taken = np.zeros(5)
    for e in range(n):
        taken[one.choose(choice("neurons", 0, total=5, count=1, who=e)).values] += 1
    np.testing.assert_allclose(taken / n, np.array([8, 4, 2, 1, 1]) / 16, atol=4 * 0.5 / n**0.5)


def blocky(groups: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A co-activation matrix of groups that fire together, shuffled, and the group of each neuron."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(groups), size))
    together = np.where(labels[:, None] == labels[None], 0.5, 0.02) + 0.005 * random.random(
        (groups * size,) * 2
    )
    return (together + together.T) / 2, labels


@pytest.mark.parametrize("how", ["metis", "spectral"])
def test_parts_are_the_planted_ones(how):
    if how == "metis":
        pytest.importorskip("pymetis", reason="the extra `metis` is not installed")
    graph, labels = blocky(6, 10)
    np.fill_diagonal(graph, 0)
    found = co_activation.metis(graph, 6, True) if how == "metis" else co_activation.spectral(graph, 6)
    assert np.bincount(found).tolist() == [10] * 6
    assert len({*zip(labels.tolist(), found.tolist(), strict=True)}) == 6


def test_without_weights_a_full_graph_tells_metis_nothing():
    """The released code drops edge weights: where every pair fired together once, its cut is not the
    groups'."""
    pytest.importorskip("pymetis", reason="the extra `metis` is not installed")
    graph, labels = blocky(6, 10)
    np.fill_diagonal(graph, 0)
    found = co_activation.metis(graph, 6, False)
    assert len({*zip(labels.tolist(), found.tolist(), strict=True)}) > 6


@pytest.mark.parametrize("partition", ["metis", "spectral"])
def test_experts_are_whole_parts_but_for_the_last(partition, monkeypatch):
    if partition == "metis":
        pytest.importorskip("pymetis", reason="the extra `metis` is not installed")
    graph, labels = blocky(6, 10)
    given = Given(neurons_co_activation=[graph], neurons_l2=[np.ones(60)])
    one = measured(co_activation.CoActivation, given, monkeypatch, parts=6, partition=partition)
    chosen = one.choose(choice("neurons", 0, total=60, count=25, seed=1, who=0)).values
    assert len(chosen) == 25
    assert sorted(np.bincount(labels[chosen], minlength=6).tolist()) == [0, 0, 0, 5, 10, 10]


# --- universal experts


def test_thinned_universal_neurons():
    """The repository keeps every so many of the neurons that a core expert would have."""
    init = Random(preset="repo")
    site = Site(
        layer=3, blocks=4, num_experts=2, top_k=1, granularity=1, dense_width=96, hidden=32, dense_hidden=32,
        expert_width=24, universal_experts=3, universal_width=6, seed=0, grouped_router=False,
        uniform_router=False, gate_sum=1.0,
    )  # fmt: skip
    core = init.neurons(2, site).values
    thin = init.neurons(2, site.universal).values
    assert len(core) == 24
    np.testing.assert_array_equal(thin, core[np.round(np.linspace(0, 23, 6)).astype(int)])


# --- mistakes


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"moe": {"target": "dense"}, "init": {"name": "uniform"}}, "add that section"),
        (
            {"moe": {"target": "dense"}, "init": {"name": "uniform"}, "successor": {"hidden_size": 16}},
            "makes no experts, and moe.num_experts",
        ),
        ({"successor": {"hidden_size": 16}}, "chooses weights"),
        ({"init": {"name": "uniform"}, "successor": {"hidden_size": 12}}, "whole heads are kept"),
        ({"init": {"name": "uniform"}, "successor": {"hidden_size": 64}}, "must not be wider"),
        ({"init": {"name": "uniform"}, "successor": {"hidden_size": [16, 16]}}, "a number for each"),
        ({"init": {"name": "uniform"}, "moe": {"expert_width": 97}}, "cannot be chosen"),
        ({"init": {"name": "copy"}, "moe": {"expert_width": 24}}, "choose neurons"),
        ({"init": {"name": "importance"}}, "upcycle calibrate SOURCE --collect l2 --out FILE"),
        ({"init": {"name": "importance", "statistic": "gradient"}}, "--collect gradient --out FILE"),
        ({"init": {"name": "co_activation"}}, "--collect l2,co_activation --out FILE"),
        ({"init": {"name": "co_activation", "statistic": "l1"}}, "--collect l1,co_activation --out FILE"),
        ({"init": {"name": "importance", "statistics": "nowhere.safetensors"}}, "does not exist"),
        ({"init": {"name": "uniform"}, "moe": {"expert_width": 24, "granularity": 2}}, "give one"),
        (
            {
                "init": {"name": "random", "preset": "repo"},
                "router": {"name": "spherical"},
                "moe": {"expert_width": 24, "universal_experts": 2, "universal_width": 25},
            },
            "25 is more than the 24 neurons of the other experts",
        ),
    ],
)
def test_mistakes(recipe, said, big):
    moe = {**MOE, **recipe.get("moe", {})}
    with pytest.raises(UpcycleError, match=said):
        blueprint(big, Recipe.of({**recipe, "moe": moe}))


def test_what_stands_around_a_text_model_cannot_be_narrowed(tmp_path):
    """Its projector gives channels of the width that the text model had."""
    source = tiny_wrappers.make(tmp_path / "llava", "llava")
    table = {"init": {"name": "random"}, "successor": {"hidden_size": 16}}
    with pytest.raises(UpcycleError, match="part-only text"):
        blueprint(source, Recipe.of(table, moe={"num_experts": 4}))


@pytest.mark.parametrize("target", ["mixtral", "upcycled", "dense"])
def test_a_text_model_that_is_taken_out_is_narrowed(target, tmp_path):
    source = tiny_wrappers.make(tmp_path / "llava", "llava")
    moe = {"target": target, "part_only": "text", **({} if target == "dense" else {"num_experts": 4})}
    recipe = Recipe.of(moe=moe, init={"name": "uniform"}, successor={"hidden_size": 16})
    convert(source, tmp_path / "text", recipe)
    proof = verify(source, tmp_path / "text")
    assert proof.holds, proof.checks
    whole = tiny_wrappers.built("llava").model.language_model
    embedding = upcycle.open(tmp_path / "text").get_input_embeddings().weight
    assert torch.equal(embedding, whole.get_input_embeddings().weight[:, ::2])


def test_a_deeper_text_model_that_is_taken_out_names_its_class(tmp_path):
    source = tiny_wrappers.make(tmp_path / "llava", "llava")
    convert(source, tmp_path / "deep", Recipe.of(moe={"target": "depth_tiled", "part_only": "text"}))
    assert type(upcycle.open(tmp_path / "deep")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("target", "named"),
    [("native", "MixtralModel"), ("upcycled", "UpcycledLlamaModel"), ("dense", "LlamaModel")],
)
def test_a_narrow_decoder_without_a_head_has_none(target, named, tmp_path):
    source = tiny.make(tmp_path / "source", "LlamaModel")
    moe = {"target": target, **({} if target == "dense" else {"num_experts": 4})}
    recipe = Recipe.of(moe=moe, init={"name": "uniform"}, successor={"hidden_size": 16})
    convert(source, tmp_path / "narrow", recipe)
    assert verify(source, tmp_path / "narrow").holds
    model = upcycle.open(tmp_path / "narrow")
    assert type(model).__name__ == named
    assert model(torch.arange(12)[None]).last_hidden_state.isfinite().all()


def test_a_head_that_no_family_describes_cannot_be_narrowed(tmp_path):
    source = tiny.make(tmp_path / "masked", "ViTForMaskedImageModeling", **BIG)
    recipe = Recipe.of(moe={"target": "dense"}, init={"name": "uniform"}, successor={"hidden_size": 16})
    with pytest.raises(UpcycleError, match=r"holds decoder\.0\.bias, .*give a checkpoint without them"):
        blueprint(source, recipe)


def test_blocks_that_predict_further_tokens_are_not_narrowed(tmp_path):
    """They would keep the source's width, and nothing reads such blocks."""
    layers = {"layer_types": ["full_attention"] * 4}
    source = tiny.make_dense(tmp_path / "source", "qwen3_5_text", **layers)
    dense = dataclasses.replace(admit(Checkpoint.open(source)), keeps_further=True)
    recipe = Recipe.of(init={"name": "uniform"}, successor={"hidden_size": 16})
    with pytest.raises(UpcycleError, match=r"moe\.mtp = keep"):
        successors.narrowed(dense, recipe)


def test_a_family_that_cannot_be_narrowed_says_so(tmp_path):
    source = tiny.make(tmp_path / "t5", "T5ForConditionalGeneration")
    for target in ("dense", "upcycled"):
        recipe = Recipe.of(
            moe={"target": target}, init={"name": "random"}, successor={"hidden_size": 16}
        )  # fmt: skip
        with pytest.raises(UpcycleError, match="width of t5 cannot be changed"):
            blueprint(source, recipe)


def test_memory_of_a_choice_is_that_of_the_predecessor(big, tmp_path):
    """The graph of co-activation has as many neurons as the network that is chosen from."""
    measured = tiny.make_statistics(tmp_path / "found.safetensors", big)
    init = {"name": "co_activation", "statistics": str(measured)}
    same = Recipe.of(moe={**MOE, "expert_width": 48}, init=init)
    narrow = Recipe.of(moe={**MOE, "expert_width": 48}, init=init, successor={"hidden_size": 16})
    assert plan(big, narrow).peak_memory_bytes == plan(big, same).peak_memory_bytes


@pytest.mark.parametrize(
    ("init", "successor", "said"),
    [
        ({"name": "importance", "statistic": "gradient"}, {}, "no gradient of neurons"),
        ({"name": "co_activation"}, {}, "no co_activation of neurons"),
        ({"name": "importance"}, {"successor": {"hidden_size": 16}}, "nothing of channels"),
    ],
)
def test_a_plan_knows_that_a_statistic_is_missing(init, successor, said, big, tmp_path):
    """The header of the file says so, before anything is written."""
    file = tiny.make_statistics(tmp_path / "found.safetensors", big)
    about, whole = read_metadata(file), load_file(file)
    save_file({n: x for n, x in whole.items() if n.startswith("neurons.") and n.endswith(".l2")}, file, about)
    recipe = Recipe.of(moe={**MOE, "expert_width": 24}, init={**init, "statistics": str(file)}, **successor)
    with pytest.raises(UpcycleError, match=said):
        blueprint(big, recipe)


def test_statistics_of_another_checkpoint_are_refused(big, small, tmp_path):
    measured = tiny.make_statistics(tmp_path / "of_the_small.safetensors", small)
    recipe = Recipe.of(moe=MOE, init={"name": "importance", "statistics": str(measured)})
    with pytest.raises(UpcycleError, match="calibrated on"):
        blueprint(big, recipe)


# --- from calibration to a model that runs


@pytest.mark.parametrize("name", ["importance", "co_activation"])
@pytest.mark.parametrize("preset", quick(["paper", "repo"], "paper"))
def test_a_vit_is_calibrated_and_recycled(name, preset, big, small, tmp_path):
    """Calibrated on images, narrowed to half, core and universal experts under the spherical router."""
    from PIL import Image

    random = np.random.default_rng(0)
    for label in "012":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    found = calibrate(
        big,
        tmp_path / "found.safetensors",
        ToCalibrate(images=tmp_path / "images", collect=("l2", "co_activation"), device="cpu"),
    )
    options = {"parts": 8} if name == "co_activation" else {}
    recipe = Recipe.of(
        moe={**MOE, "expert_width": 48, "universal_experts": 4, "universal_width": 12},
        init={"name": name, "preset": preset, "statistics": str(found.path), **options},
        successor={"hidden_size": 16, **({"rest": str(small)} if preset == "repo" else {})},
        router={"name": "spherical", "preset": preset},
    )
    convert(big, tmp_path / "moe", recipe)
    proof = verify(big, tmp_path / "moe")
    assert proof.holds, proof.checks
    model = upcycle.open(tmp_path / "moe").eval()
    assert model(torch.randn(2, 3, 12, 12)).logits.isfinite().all()
    whole = stored(big)["vit.encoder.layer.3.intermediate.dense.bias"]
    experts = model.vit.layers[3].mlp.experts.up_proj_bias.detach().numpy()
    taken = np.stack([np.isin(whole, row) for row in experts])
    assert (taken.sum(1) == 48).all()
    assert len({tuple(row) for row in taken.tolist()}) == 5
    with np.load(tmp_path / "moe" / "selection.npz") as kept:
        chosen = dict(kept)
    for e, bias in enumerate(experts):
        np.testing.assert_array_equal(whole[chosen[f"neurons.layers.3.expert.{e}"]], bias)
    assert len(chosen["neurons.layers.3.expert.8"]) == 12  # the last universal one
    assert ("channels.layers" in chosen) is (preset == "paper")
    if preset == "repo":
        assert chosen["channels.layers.3.expert.0"].shape == (16,)
    else:
        mine = stored(big)["vit.layernorm.weight"][chosen["channels.layers"]]
        np.testing.assert_array_equal(model.vit.layernorm.weight.detach().numpy(), mine)
        assert chosen["heads.layers.0"].shape == (2,)
        assert chosen["neurons.layers.0"].shape == (48,)  # of 96
        norms = np.sum([found.of("channels", "layers", i, "l2") for i in range(4)], 0)
        best = np.sort(np.argsort(-norms, kind="stable")[:16])
        wanted = stored(big)["vit.layernorm.weight"][best]
        np.testing.assert_array_equal(model.vit.layernorm.weight.detach().numpy(), wanted)


@pytest.mark.parametrize("name", quick(["importance", "co_activation"], "co_activation"))
def test_a_trained_language_model_is_recycled(name, stories, tinystories, tmp_path):
    """stories260k, measured on a text that it knows: eight experts of half the neurons, top-2, in Mixtral's
    class. It is better than a uniform guess before any training, and its experts favour important neurons."""
    found = calibrate(
        stories,
        tmp_path / "found.safetensors",
        ToCalibrate(
            text=tinystories,
            collect=("l2", "co_activation"),
            limit=16,
            length=128,
            cache=tmp_path,
            device="cpu",
        ),
    )
    width = found.of("neurons", "layers", 0, "l2").shape[0]
    half = width // 8 * 4  # rows of whole 16 bytes, as torch's grouped products want
    recipe = Recipe.of(
        moe={"num_experts": 8, "top_k": 2, "expert_width": half},
        init={"name": name, "statistics": str(found.path), "output": "expected"},
    )
    convert(stories, tmp_path / "moe", recipe)
    assert verify(stories, tmp_path / "moe").holds
    model = upcycle.open(tmp_path / "moe").eval()
    tokens = torch.tensor(np.memmap(next(tmp_path.glob("*.bin")), np.uint16, "r")[:256].astype(np.int64))[
        None
    ]
    with torch.inference_mode():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    assert loss < np.log(model.config.vocab_size)
    built = blueprint(stories, recipe)
    norms = found.of("neurons", "layers", 2, "l2")
    chosen = [built.recipe.init.neurons(e, built.sites[2]).values for e in range(8)]
    assert all(len({*row.tolist()}) == half for row in chosen)
    if name == "importance":
        assert np.mean([norms[row].mean() for row in chosen]) > norms.mean()
