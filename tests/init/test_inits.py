"""Each initialisation against a plain numpy or closed-form account of what its paper says."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from upcycle import Recipe, blueprint, convert, init
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.admission import admit
from upcycle.errors import UpcycleError
from upcycle.init.split import balanced_kmeans
from upcycle.tensors.lazy import Lazy

WIDTH = 48


def ffn(
    built, layer: int, e: int | None = None, prefix: str = "block_sparse_moe.experts"
) -> dict[str, np.ndarray]:
    """The matrices of expert `e` of a mixtral blueprint."""
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return {
        m: built.entries[f"model.layers.{layer}.{prefix}.{e}.{w}.weight"].lazy.all("F32")
        for m, w in names.items()
    }


def dense_ffn(source, layer: int) -> dict[str, np.ndarray]:
    opened = Checkpoint.open(source)
    out = {}
    for m in ("gate", "up", "down"):
        info = opened.tensors[f"model.layers.{layer}.mlp.{m}_proj.weight"]
        out[m] = opened.pread(info, 0, info.nbytes).view(np.float32).reshape(info.shape).copy()
    return out


def by_neuron(matrices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Neurons along the first axis in every matrix."""
    return {"gate": matrices["gate"], "up": matrices["up"], "down": matrices["down"].T}


def changed(a, b) -> dict[str, np.ndarray]:
    """Which neurons differ, by matrix."""
    a, b = by_neuron(a), by_neuron(b)
    return {m: (a[m] != b[m]).any(axis=1) for m in a}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.99, 1.0])
def test_drop_shared(ratio, dense):
    """Exactly floor(r I) neurons change, the same in all matrices, others in each expert and layer."""
    source = dense("llama")
    built = blueprint(source, Recipe.of(init={"name": "drop", "ratio": ratio}))
    seen = set()
    for layer, e in itertools.product(range(4), range(8)):
        original = dense_ffn(source, layer)
        where = changed(original, ffn(built, layer, e))
        assert where["gate"].sum() == int(ratio * WIDTH)
        assert (where["gate"] == where["up"]).all()
        assert (where["gate"] == where["down"]).all()
        seen.add(where["gate"].tobytes())
    if 0.1 <= ratio <= 0.5:
        assert len(seen) == 32
    assert built.preserves_function == (ratio == 0)


def test_drop_independent(dense):
    """floor(r I) neurons change in each matrix, not the same ones; about (1 - r)^3 stay whole."""
    source = dense("llama", intermediate_size=2048)
    built = blueprint(source, Recipe.of(init={"name": "drop", "ratio": 0.5, "indices": "independent"}))
    where = changed(dense_ffn(source, 1), ffn(built, 1, 3))
    assert {m: int(w.sum()) for m, w in where.items()} == dict.fromkeys(where, 1024)
    intact = 1 - np.mean(where["gate"] | where["up"] | where["down"])
    assert abs(intact - 0.125) < 0.03
    shared = blueprint(source, Recipe.of(init={"name": "drop", "ratio": 0.5}))
    where = changed(dense_ffn(source, 1), ffn(shared, 1, 3))
    assert np.mean(where["gate"] | where["up"] | where["down"]) == 0.5


@pytest.mark.parametrize("indices", ["shared", "independent"])
def test_drop_statistics(indices, dense):
    """Mean and standard deviation of the redrawn part match the replaced part, matrix by matrix.

    The tolerance is five standard errors of the mean and of the standard deviation of n normal draws.
    """
    source = dense("llama", intermediate_size=1024, hidden_size=64)
    built = blueprint(source, Recipe.of(init={"name": "drop", "ratio": 0.3, "indices": indices}))
    original = by_neuron(dense_ffn(source, 2))
    for e in range(8):
        expert = by_neuron(ffn(built, 2, e))
        for m, old in original.items():
            rows = (old != expert[m]).any(axis=1)
            replaced, drawn = old[rows].astype(np.float64), expert[m][rows].astype(np.float64)
            n, std = replaced.size, replaced.std(ddof=1)
            assert rows.sum() == 307
            assert abs(drawn.mean() - replaced.mean()) < 5 * std / n**0.5
            assert abs(drawn.std(ddof=1) - std) < 5 * std / (2 * n) ** 0.5


def test_drop_statistics_are_those_of_the_dropped_part(dense):
    """Not those of the whole matrix: a part of another scale keeps that scale."""
    from upcycle.tensors.computed import Redraw
    from upcycle.tensors.positions import Order

    class Array(Lazy):
        def __init__(self, values):
            self.values, self.shape, self.dtype = values, values.shape, "F32"

        def read(self, index, dtype):
            return self.values[tuple(slice(a, b) for a, b in index)].copy()

        def describe(self):
            return "array"

        def sources(self):
            return iter(())

    values = np.random.default_rng(0).standard_normal((400, 500), dtype=np.float32)
    for axis in (0, 1):
        part = Order((1, 2), values.shape[axis], 0, 100, sort=True)
        scaled = values.copy()
        where = (part.values, slice(None)) if axis == 0 else (slice(None), part.values)
        scaled[where] = 7 * scaled[where] + 3
        drawn = Redraw(Array(scaled), axis, part, (3, 4)).all()
        assert abs(drawn[where].mean() - scaled[where].mean()) < 0.2
        assert abs(drawn[where].std() / scaled[where].std() - 1) < 0.02
        untouched = np.setdiff1d(np.arange(values.shape[axis]), part.values)
        keep = (untouched, slice(None)) if axis == 0 else (slice(None), untouched)
        assert (drawn[keep] == scaled[keep]).all()


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_noise(relative, fraction, dense):
    source = dense("llama", intermediate_size=1024, hidden_size=64)
    built = blueprint(
        source, Recipe.of(init={"name": "noise", "sigma": 0.05, "relative": relative, "fraction": fraction})
    )
    original = by_neuron(dense_ffn(source, 0))
    for e in (0, 5):
        expert = by_neuron(ffn(built, 0, e))
        for m, old in original.items():
            noise = (expert[m] - old).astype(np.float64)
            rows = noise.any(axis=1)
            assert rows.sum() == int(fraction * 1024)
            sigma = 0.05 * (old.std() if relative else 1.0)
            assert abs(noise[rows].std() / sigma - 1) < 5 / (2 * noise[rows].size) ** 0.5 + 1e-3
            assert abs(noise[rows].mean()) < 5 * sigma / noise[rows].size ** 0.5


@pytest.mark.parametrize("granularity", [2, 3, 4])
def test_virtual_group_shards(granularity, dense):
    """Expert j is shard j mod G; each group of G experts holds the dense network, scaled by G."""
    source = dense("llama")
    recipe = Recipe.of(
        moe={"num_experts": 4 * granularity, "top_k": granularity, "granularity": granularity},
        init={"name": "virtual_group"},
        router={"init": "grouped"},
    )
    built = blueprint(source, recipe)
    original = by_neuron(dense_ffn(source, 1))
    for group in range(4):
        parts = [by_neuron(ffn(built, 1, group * granularity + j)) for j in range(granularity)]
        whole = {m: np.concatenate([p[m] for p in parts]) for m in original}
        assert (whole["gate"] == original["gate"]).all()
        assert (whole["up"] == original["up"]).all()
        np.testing.assert_allclose(whole["down"], granularity * original["down"], rtol=1e-7)
    router = built.entries["model.layers.1.block_sparse_moe.gate.weight"].lazy.all("F32")
    groups = router.reshape(4, granularity, -1)
    assert (groups == groups[:, :1]).all()
    assert len({g.tobytes() for g in groups[:, 0]}) == 4


def silu(x):
    return x / (1 + np.exp(-x))


def output(matrices, x):
    return (silu(x @ matrices["gate"].T) * (x @ matrices["up"].T)) @ matrices["down"].T


@pytest.mark.parametrize(("mode", "exact"), [("down", True), ("sqrt", True), ("cube_root", False)])
@pytest.mark.parametrize("normalize", [True, False])
def test_virtual_group_scales(mode, exact, normalize, dense):
    """Both orders of softmax and top-k: the sum over a token's experts is the dense output, or is not.

    Softmax then top-k without renormalising gives each expert 1 / N under a uniform router, so that T of
    them, scaled by E G^2 / T in all (equation 2), give the dense output; renormalised, the factor is G.
    """
    source = dense("qwen3", intermediate_size=240)
    e, g, t = 4, 3, 6
    recipe = Recipe.of(
        moe={"num_experts": e * g, "top_k": t, "granularity": g},
        init={"name": "virtual_group", "scale_mode": mode},
        router={"init": "grouped", "normalize": normalize},
    )
    built = blueprint(source, recipe)
    opened = Checkpoint.open(source)
    original = {}
    for m in ("gate", "up", "down"):
        info = opened.tensors[f"model.layers.0.mlp.{m}_proj.weight"]
        original[m] = (
            opened.pread(info, 0, info.nbytes).view(np.float32).reshape(info.shape).astype(np.float64)
        )
    x = np.random.default_rng(0).standard_normal((64, 32))
    total = 0
    for expert in range(t):
        p = f"model.layers.0.mlp.experts.{expert}."
        matrices = {
            m: built.entries[f"{p}{m}_proj.weight"].lazy.all("F32").astype(np.float64) for m in original
        }
        total = total + output(matrices, x) * (1 / t if normalize else 1 / (e * g))
    wanted = output(original, x)
    error = np.linalg.norm(total - wanted) / np.linalg.norm(wanted)
    assert (error < 1e-6) if exact else (error > 0.05)
    assert built.config["norm_topk_prob"] is normalize
    assert built.preserves_function == (exact and normalize)
    factor = g if normalize else e * g * g / t
    first = {m: original[m][:80] if m != "down" else original[m][:, :80] for m in original}
    made = {
        m: built.entries[f"model.layers.0.mlp.experts.0.{m}_proj.weight"].lazy.all("F32") for m in original
    }
    powers = {"down": (0, 0, 1), "sqrt": (0, 0.5, 0.5), "cube_root": (1 / 3, 1 / 3, 1 / 3)}[mode]
    for m, power in zip(("gate", "up", "down"), powers, strict=True):
        np.testing.assert_allclose(made[m], first[m] * factor**power, rtol=1e-6)


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_shuffle_slice(granularity, dense):
    """Each replica's G experts hold every neuron once, shuffled; the rest of the last is discarded."""
    source = dense("llama")
    built = blueprint(
        source,
        Recipe.of(moe={"num_experts": 7, "granularity": granularity}, init={"name": "shuffle_slice"}),
    )
    original = by_neuron(dense_ffn(source, 3))
    rows = {original["gate"][i].tobytes(): i for i in range(WIDTH)}
    orders = []
    for e in range(7):
        expert = by_neuron(ffn(built, 3, e))
        places = [rows[r.tobytes()] for r in expert["gate"]]
        assert len(places) == WIDTH // granularity
        for m in original:
            assert (expert[m] == original[m][places]).all()
        orders.append(places)
    replicas = [
        [*itertools.chain(*orders[i : i + granularity])] for i in range(0, 7 - 7 % granularity, granularity)
    ]
    assert all(sorted(r) == list(range(WIDTH)) for r in replicas)
    assert len({tuple(r) for r in replicas}) == len(replicas)


def test_shuffle_slice_redraws_a_share(dense):
    source = dense("llama")
    shape = {"num_experts": 4, "granularity": 2}
    plain = blueprint(source, Recipe.of(moe=shape, init={"name": "shuffle_slice"}))
    half = blueprint(source, Recipe.of(moe=shape, init={"name": "shuffle_slice", "redraw": 0.5}))
    where = changed(ffn(plain, 0, 1), ffn(half, 0, 1))
    assert [int(w.sum()) for w in where.values()] == [12, 12, 12]
    scaled = blueprint(source, Recipe.of(moe=shape, init={"name": "shuffle_slice", "output": "expected"}))
    np.testing.assert_allclose(ffn(scaled, 0, 1)["down"], 2 * ffn(plain, 0, 1)["down"], rtol=1e-7)


def neurons_of(expert, original):
    rows = {original["gate"][i].tobytes(): i for i in range(len(original["gate"]))}
    return [rows[r.tobytes()] for r in expert["gate"]]


@pytest.mark.parametrize("by", ["random", "kmeans", "file"])
@pytest.mark.parametrize(("output_scale", "factor"), [("selected", 2), ("expected", 4), ("llama_moe", 2)])
def test_split_deals_every_neuron_once(by, output_scale, factor, dense, tmp_path):
    source = dense("llama")
    labels = np.random.default_rng(0).permuted(
        np.repeat(np.arange(4), 12).reshape(1, -1).repeat(4, 0), axis=1
    )
    options = {"name": "split", "by": by, "output": output_scale}
    if by == "file":
        (tmp_path / "labels.json").write_text(json.dumps(labels.tolist()))
        options["labels"] = str(tmp_path / "labels.json")
    built = blueprint(source, Recipe.of(moe={"num_experts": 4, "top_k": 2, "granularity": 4}, init=options))
    for layer in range(4):
        original = by_neuron(dense_ffn(source, layer))
        experts = [by_neuron(ffn(built, layer, e)) for e in range(4)]
        places = [neurons_of(expert, original) for expert in experts]
        assert sorted(itertools.chain(*places)) == list(range(WIDTH))
        for expert, chosen in zip(experts, places, strict=True):
            np.testing.assert_allclose(expert["down"], factor * original["down"][chosen], rtol=1e-7)
            assert (expert["up"] == original["up"][chosen]).all()
        if by == "file":
            assert places == [np.flatnonzero(labels[layer] == e).tolist() for e in range(4)]


def test_labels_of_each_stack_of_blocks(tmp_path):
    """Blocks of several stacks have the same numbers, so a file says which stack its lists are of."""
    source = tiny.make(tmp_path / "t5", "T5ForConditionalGeneration")
    built = blueprint(source, Recipe.of(moe={"target": "upcycled", "num_experts": 2}))
    width, random = built.sites[0].dense_width, np.random.default_rng(0)
    dealt = {
        stack: [random.permutation(np.arange(width) % 2).tolist() for _ in range(count)]
        for stack, count in {site.stack: site.blocks for site in built.sites}.items()
    }
    file = tmp_path / "labels.json"
    recipe = Recipe.of(
        moe={"target": "upcycled", "num_experts": 2, "granularity": 2},
        init={"name": "split", "by": "file", "labels": str(file)},
    )

    def write(content: object) -> None:
        file.write_text(json.dumps(content))
        os.utime(file, ns=(0, next(times)))

    times = itertools.count(1)
    write(dealt)
    up = {}
    for site in blueprint(source, recipe).sites:
        network = admit(Checkpoint.open(source)).feed_forward(site.layer, site.stack)
        labels = np.array(dealt[site.stack][site.layer])
        for e in range(2):
            found = recipe.init.make([network], e, site).up.all("F32")
            np.testing.assert_array_equal(found, network.up.all("F32")[labels == e])
        up[site.stack, site.layer] = found
    assert {stack for stack, _ in up} == {"encoder", "decoder"}
    write(dealt["encoder"])
    with pytest.raises(UpcycleError, match=r"layer 0 is one of encoder and one of decoder; give .* a table"):
        blueprint(source, recipe)
    one = Recipe.of(
        recipe.as_table()
        | {"decoder": {"moe": {"layers": [1]}}, "moe": {**recipe.as_table()["moe"], "layers": [0]}}
    )
    blueprint(source, one)
    write({**dealt, "decoder": [labels[1:] for labels in dealt["decoder"]]})
    with pytest.raises(
        UpcycleError, match=rf"layer 0 of decoder of .* of {width} neurons .* list of {width - 1}"
    ):
        [e.lazy.all("F32") for e in blueprint(source, recipe).entries.values()]


def test_rows_in_groups_come_out_even(tmp_path):
    """A universal expert is no shard of the dense network, and its row would be missing."""
    source = tiny.make(tmp_path / "vit", "ViTModel")
    moe = {"target": "upcycled", "num_experts": 4, "granularity": 2, "universal_experts": 1}
    recipe = Recipe.of(moe=moe, init={"name": "random"}, router={"name": "soft", "init": "grouped"})
    with pytest.raises(
        UpcycleError, match=r"2 rows alike in turn .* this router has 5; take out moe\.universal"
    ):
        blueprint(source, recipe)


def test_kmeans_finds_planted_clusters():
    """Equal clusters that are there are found, whatever their order."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((6, 40))
    truth = rng.permutation(np.repeat(np.arange(6), 20))
    rows = (centres[truth] + 0.2 * rng.standard_normal((120, 40))).astype(np.float32)
    labels = balanced_kmeans(rows, 6, (1, 2))
    assert all(len(set(truth[labels == e])) == 1 for e in range(6))


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 6), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_kmeans_is_balanced_on_anything(k, width, seed):
    rows = np.random.default_rng(seed).integers(-1, 2, (k * width, 5)).astype(np.float32)
    assert np.bincount(balanced_kmeans(rows, k, (seed, 0)), minlength=k).tolist() == [width] * k


@pytest.mark.parametrize("include", [True, False])
def test_branch_train_mix(include, dense):
    """Experts are the checkpoints' networks in equal blocks; the rest is their mean."""
    folders = [dense("llama", seed=s) for s in range(3)]
    used = folders if include else folders[1:]
    recipe = Recipe.of(
        moe={"num_experts": 6},
        init={
            "name": "branch_train_mix",
            "sources": [str(f) for f in folders[1:]],
            "include_source": include,
        },
    )
    built = blueprint(folders[0], recipe)
    for e in range(6):
        wanted = dense_ffn(used[e * len(used) // 6], 2)
        made = ffn(built, 2, e)
        assert all((wanted[m] == made[m]).all() for m in wanted)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        values = []
        for folder in used:
            opened = Checkpoint.open(folder)
            info = opened.tensors[name]
            values.append(opened.pread(info, 0, info.nbytes).view(np.float32).reshape(info.shape))
        np.testing.assert_allclose(
            built.entries[name].lazy.all(), np.mean(values, axis=0), rtol=1e-6, atol=1e-7
        )


def test_branch_train_mix_is_verified(dense, tmp_path):
    from upcycle import verify

    folders = [dense("qwen3", seed=s) for s in range(3)]
    recipe = Recipe.of(
        moe={"num_experts": 4, "layers": "every_other"},
        init={"name": "branch_train_mix", "sources": [str(folders[1])]},
    )
    convert(folders[0], tmp_path / "moe", recipe)
    proof = verify(folders[0], tmp_path / "moe", logits=False)
    assert proof.holds, proof.checks


@pytest.mark.parametrize(
    ("kind", "std"),
    [("normal", 0.02), ("uniform", 0.02), ("orthogonal", 0.02), ("zeros", 0.0), ("grouped", 0.02)],
)
def test_router(kind, std, dense):
    source = dense("llama", hidden_size=512, head_dim=8)
    built = blueprint(source, Recipe.of(moe={"num_experts": 64}, router={"init": kind}))
    router = built.entries["model.layers.0.block_sparse_moe.gate.weight"].lazy.all("F32").astype(np.float64)
    assert router.shape == (64, 512)
    assert abs(router.std() - std) < 5 * std / (2 * router.size) ** 0.5 + 1e-9
    assert abs(router.mean()) < 5 * std / router.size**0.5 + 1e-12
    if kind == "uniform":
        assert np.abs(router).max() <= 0.02 * 3**0.5
    if kind == "orthogonal":
        np.testing.assert_allclose(router @ router.T, np.eye(64) * (0.02**2 * 512), atol=1e-7)
    other = built.entries["model.layers.1.block_sparse_moe.gate.weight"].lazy.all("F32")
    assert kind == "zeros" or not np.allclose(router, other)


@pytest.mark.parametrize(
    ("model_type", "combine"),
    [
        ("qwen2", "gated"),
        ("qwen3_5_text", "gated"),
        ("ernie4_5", "sum"),
        ("hunyuan_v1_dense", "sum"),
        ("cohere2", "average"),
    ],
)
def test_shared_expert_is_the_dense_network(model_type, combine, dense):
    """By halves where the architecture sums; the gate of a gated one has no zero (NaN in llama.cpp)."""
    source = dense(model_type)
    built = blueprint(source, Recipe.of(moe={"shared_experts": 1}))
    shared = built.target.shared
    original = by_neuron(dense_ffn(source, 1))
    made = by_neuron(
        {m: built.entries[f"model.layers.1.{shared.path}.{m}_proj.weight"].lazy.all("F32") for m in original}
    )
    fused = built.entries.get("model.layers.1.mlp.experts.down_proj")
    each = built.entries.get("model.layers.1.mlp.experts.3.down_proj.weight")
    routed = (fused.lazy.all("F32")[3] if fused else each.lazy.all("F32")).T
    assert (made["gate"] == original["gate"]).all()
    assert (made["down"] == original["down"] * (0.5 if combine == "sum" else 1)).all()
    assert (routed == original["down"] * (1 if combine == "average" else 0.5)).all()
    if combine == "gated":
        gate = built.entries[f"model.layers.1.{shared.gate}"].lazy.all("F32")
        assert (gate != 0).all()
        assert np.abs(gate).max() < 1e-6


@pytest.mark.parametrize("name", init.names())
def test_every_slice_is_the_slice_of_the_whole(name, dense, tmp_path):
    """What a rank reads alone is what it would have cut out of the whole tensor."""
    options = {"branch_train_mix": {"sources": [str(dense("granite", seed=1))]}, "split": {"by": "kmeans"}}
    fine = init.find(name).fine_grained
    moe = {"num_experts": 4, "granularity": 4 if fine else 1, "top_k": 4}
    if name == "experts":
        adapter = tiny.make_adapter(tmp_path / "adapter", dense("granite"))
        tables = [
            {},
            {"source": str(dense("granite", seed=1)), "weight": 0.25, "mix": "slerp"},
            {"adapter": str(adapter), "weight": 0.5},
            {"adapter": str(adapter), "noise": 0.1, "residual_scale": 0.5},
        ]
        options[name] = {"expert": tables, "backbone": "slerp"}
    if name == "drop":
        options["drop"] = {"indices": "independent"}
    if name in ("importance", "co_activation"):
        measured = tiny.make_statistics(tmp_path / "found.safetensors", dense("granite"))
        options[name] = {"statistics": str(measured), "parts": 8}
        if name == "importance":
            del options[name]["parts"]
    if name == "cmoe":
        measured = tiny.make_statistics(tmp_path / "found.safetensors", dense("granite"), marked=True)
        options[name] = {"statistics": str(measured)}
    recipe = Recipe.of(moe=moe, init={"name": name, **options.get(name, {})}, router={"init": "grouped"})
    rng = np.random.default_rng(0)
    for entry in blueprint(dense("granite"), recipe).entries.values():
        whole = entry.lazy.all(entry.dtype)
        assert whole.shape == entry.shape
        for _ in range(4):
            cuts = [sorted(rng.integers(0, n + 1, 2).tolist()) for n in whole.shape]
            index = tuple((a, b) for a, b in cuts)
            if all(a < b for a, b in index):
                part = entry.lazy.read(index, entry.dtype)
                assert (part == whole[tuple(slice(a, b) for a, b in index)]).all()
        assert b"".join(d.tobytes() for _, d in entry.pieces()) == whole.tobytes()


def test_kmeans_runs_once_a_layer(dense, tmp_path, monkeypatch):
    """Threads that need the same partition wait for the one that works it out."""
    from upcycle.init import split

    calls = []
    real = split.balanced_kmeans
    monkeypatch.setattr(split, "balanced_kmeans", lambda *a: (calls.append(1), real(*a))[1])
    recipe = Recipe.of(moe={"num_experts": 4, "granularity": 4}, init={"name": "split", "by": "kmeans"})
    convert(dense("llama", seed=7), tmp_path / "moe", recipe, jobs=8)
    assert len(calls) == 4
