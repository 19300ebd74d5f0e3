"""SpheroMoE (MoE Jetpack, section 3.2): the router and its experts, against plain numpy and a table."""

from __future__ import annotations

import math
from pathlib import Path

import entmax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tiny
import upcycle
from marks import sampled
from upcycle import Recipe, blueprint, cli, convert, plan, verify
from upcycle.blueprints.cost import flops_per_row
from upcycle.checkpoints.hub import peek
from upcycle.dense.admission import admit
from upcycle.errors import UpcycleError
from upcycle.inspection import inspect
from upcycle.nn import MoE, routers
from upcycle.nn.entmax import entmax15
from upcycle.nn.shape import Shape
from upcycle.training.run import Run

G, N, H, CORE, UNIVERSAL = 2, 7, 8, 3, 5
E = CORE + UNIVERSAL


# --- entmax


def by_bisection(z: np.ndarray) -> np.ndarray:
    """entmax-1.5 of a vector by its definition: max(z / 2 - tau, 0)^2 that sums to one."""
    low, high = z.max() / 2 - 1.0, z.max() / 2
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if (np.maximum(z / 2 - tau, 0) ** 2).sum() > 1 else (low, tau)
    return np.maximum(z / 2 - low, 0) ** 2


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_entmax_is_its_definition(scale, dim):
    z = torch.randn(6, 11, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    found = entmax15(z, dim=dim)
    wanted = np.apply_along_axis(by_bisection, dim, z.numpy())
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)
    torch.testing.assert_close(found.sum(dim), torch.ones_like(found.sum(dim)))


def test_entmax_is_that_of_the_entmax_package():
    """Values and gradients, where scores differ much and where they hardly do."""
    for scale in (0.1, 3.0):
        z = torch.randn(5, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * scale
        ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
        weights = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        found, wanted = entmax15(ours, dim=-1), entmax.entmax15(theirs, dim=-1)
        torch.testing.assert_close(found, wanted)
        (found @ weights).sum().backward()
        (wanted @ weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_entmax_gradient():
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    assert (entmax15(z) == 0).any()
    assert torch.autograd.gradcheck(lambda x: entmax15(x, dim=-1), z.requires_grad_())


def test_entmax_of_many_equal_scores_is_even():
    torch.testing.assert_close(entmax15(torch.zeros(3, 300)), torch.full((3, 300), 1 / 300))


# --- the layer


def shape(**keys) -> Shape:
    router = routers.read({"name": "spherical", **keys}).as_table()
    return Shape(
        stack="layers", layers=(0,), module="", num_experts=CORE, top_k=1, hidden_size=H,
        intermediate_size=16, universal_experts=UNIVERSAL, universal_size=4, activation="gelu", gated=False,
        bias=True, causal=False, router=router,
    )  # fmt: skip


def layer(seed: int = 0, **keys) -> MoE:
    made = MoE(tiny.config_of("llama"), shape(**keys))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name == "router.temperature":
                p.copy_(0.3 + torch.rand(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return made.eval()


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def algorithm_1(made: MoE, x: np.ndarray, repo: bool) -> np.ndarray:
    """The paper's algorithm in plain numpy, one expert after another; `repo` as the released code has it."""
    p = {n: t.detach().double().numpy() for n, t in made.named_parameters()}
    q = p["router.weight"]
    q = (q - q.mean(1, keepdims=True)) / np.sqrt(q.var(1, keepdims=True) + 1e-5)
    q = q * p["router.query_norm_weight"] + p["router.query_norm_bias"]
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    out = np.zeros_like(x)
    for g in range(len(x)):
        if repo:
            k = x[g] / np.linalg.norm(x[g], axis=1, keepdims=True)
        else:
            k = x[g] @ p["router.key_weight"].T + p["router.key_bias"]
        s = k @ q.T
        t = p["router.temperature"]
        dispatch = softmax(s / t[0], 0)
        combine = np.stack([by_bisection(row) for row in s / t[-1]]) if repo else softmax(s / t[-1], 1)
        slots = dispatch.T @ x[g]
        made_by = []
        for e in range(E):
            kind, i = ("experts", e) if e < CORE else ("universal", e - CORE)
            inner = p[f"{kind}.up_proj"][i] @ slots[e] + p[f"{kind}.up_proj_bias"][i]
            inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
            made_by.append(p[f"{kind}.down_proj"][i] @ inner + p[f"{kind}.down_proj_bias"][i])
        out[g] = combine @ np.stack(made_by)
    return out


@pytest.mark.parametrize("preset", ["paper", "repo"])
def test_the_layer_is_algorithm_1(preset):
    made = layer(preset=preset, noise_in_eval=False)
    x = torch.randn(G, N, H, generator=torch.Generator().manual_seed(2))
    found = made(x).detach().numpy()
    np.testing.assert_allclose(found, algorithm_1(made, x.double().numpy(), preset == "repo"), atol=2e-5)


def test_presets_can_be_changed_key_by_key():
    one = routers.read({"name": "spherical", "preset": "repo", "combine": "softmax"})
    assert (one.combine, one.temperatures, one.key_norm) == ("softmax", 2, True)
    assert routers.read(one.as_table()) == one


@pytest.mark.parametrize("preset", ["paper", "repo"])
def test_noise_is_for_training_unless_the_code_is_asked_for(preset):
    made = layer(preset=preset)
    x = torch.randn(G, N, H)
    assert torch.equal(made(x), made(x)) == (preset == "paper")
    made.train()
    torch.manual_seed(0)
    first = made(x)
    assert not torch.equal(first, made(x))
    torch.manual_seed(0)
    assert torch.equal(first, made(x))


def test_experts_are_dropped_one_by_one():
    """Each expert of each group by itself; what is kept makes up for it on average."""
    made = layer(expert_dropout=0.25, noise=0.0)
    x = torch.randn(400, N, H)
    plain = made.router(x, None).dispatch.combine
    made.train()
    share = made.router(x, None).dispatch.combine / plain
    kept = share[:, 0, :, 0] > 0
    torch.testing.assert_close(share, share[:, :1].expand_as(share), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(share[share > 0], torch.full_like(share[share > 0], 1 / 0.75))
    assert abs(float(kept.double().mean()) - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert 0 < kept.double().mean(0).min() < kept.double().mean(0).max() < 1
    assert len({tuple(row) for row in kept.tolist()}) > 100


def test_every_tensor_learns():
    made = layer(preset="paper").train()
    made(torch.randn(G, N, H)).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())


def test_padding_is_in_no_slot():
    made = layer(noise=0.0)
    x = torch.randn(1, N, H)
    longer = torch.cat([x, torch.randn(1, 3, H)], 1)
    made.padding = torch.tensor([[False] * N + [True] * 3])
    padded = made(longer)[:, :N]
    made.padding = None
    torch.testing.assert_close(padded, made(x), atol=1e-6, rtol=1e-5)


def test_experts_start_with_the_deviation_of_a_dense_matrix():
    """One expert's fan-in, not that of the whole stack: the released code starts 28 times too small."""
    made = MoE(tiny.config_of("llama"), shape())
    made.reset_parameters(0.02)
    for experts in (made.experts, made.universal):
        for name in ("up_proj", "down_proj"):
            assert 0.016 < float(getattr(experts, name).detach().std()) < 0.024


# --- the model


SPHERICAL = {
    "moe": {
        "target": "upcycled", "layers": "last_half", "num_experts": 3, "expert_width": 16,
        "universal_experts": 4, "universal_width": 5,
    },
    "init": {"name": "random"},
}  # fmt: skip


@pytest.mark.parametrize("preset", ["paper", "repo"])
def test_a_model_is_built_verified_saved_and_opened(preset, tmp_path):
    source = tiny.make(tmp_path / "vit", "ViTForImageClassification")
    recipe = Recipe.of({**SPHERICAL, "router": {"name": "spherical", "preset": preset}})
    convert(source, tmp_path / "moe", recipe)
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    model = upcycle.open(tmp_path / "moe").eval()
    mlp = model.vit.layers[3].mlp
    assert mlp.universal.up_proj.shape == (4, 5, 16)
    assert mlp.experts.up_proj.shape == (3, 16, 16)
    norm = model.vit.layers[3].layernorm_after.weight
    assert torch.equal(mlp.router.query_norm_weight, norm) == (preset == "paper")
    model.save_pretrained(tmp_path / "again")
    again = upcycle.open(tmp_path / "again").eval()
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    found = plan(source, recipe)
    assert found.total_parameters == sum(p.numel() for p in model.parameters())
    assert found.active_parameters == found.total_parameters
    assert found.made.startswith("3 experts of 16 neurons and 4 universal ones of 5, spherical, in 2 of 4")


def test_where_it_may_not_stand(tmp_path):
    source = tiny.make(tmp_path / "vit", "ViTForImageClassification")
    with pytest.raises(UpcycleError, match="fills slots"):
        blueprint(source, Recipe.of({**SPHERICAL, "router": {"name": "top_k"}}))
    decoder = tiny.make_dense(tmp_path / "llama", "llama")
    moe = {"target": "upcycled", "num_experts": 4}
    with pytest.raises(UpcycleError, match="slot mixes all tokens"):
        blueprint(decoder, Recipe.of(moe=moe, router={"name": "spherical"}))


@pytest.mark.parametrize(
    ("architecture", "norm"),
    [
        ("ViTForImageClassification", "vit.encoder.layer.3.layernorm_after"),
        ("BertForMaskedLM", "bert.encoder.layer.3.attention.output.LayerNorm"),
    ],
)
def test_queries_inherit_the_norm_before_the_network(architecture, norm, tmp_path):
    source = tiny.make(tmp_path / "dense", architecture)
    built = blueprint(source, Recipe.of({**SPHERICAL, "router": {"name": "spherical"}}))
    for part in ("weight", "bias"):
        name = next(n for n in built.entries if ".3." in n and n.endswith(f"query_norm_{part}"))
        wanted = load_file(source / "model.safetensors")[f"{norm}.{part}"]
        np.testing.assert_array_equal(built.entries[name].lazy.all("F32"), wanted)


def test_inspect_shows_universal_experts(tmp_path, capsys):
    source = tiny.make(tmp_path / "vit", "ViTForImageClassification")
    convert(source, tmp_path / "moe", Recipe.of({**SPHERICAL, "router": {"name": "spherical"}}))
    row = inspect(tmp_path / "moe")["layers"][-1]
    state = load_file(tmp_path / "moe" / "model.safetensors")
    down, up = (
        next(t for n, t in state.items() if n.endswith(f"3.mlp.universal.{part}_proj"))
        for part in ("down", "up")
    )
    whole = np.concatenate([up.reshape(4, -1), down.reshape(4, -1)], 1)
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    assert (row["num_experts"], row["width"]) == (3, 16)
    assert (row["universal"]["num_experts"], row["universal"]["width"]) == (4, 5)
    np.testing.assert_allclose(row["universal"]["cosine"], whole @ whole.T, atol=1e-5)
    cli.main(["inspect", str(tmp_path / "moe")])
    assert "3 + 4" in capsys.readouterr().out


# --- Table 4


def headers(folder: Path, hidden: int, heads: int) -> Path:
    """A ViT of 12 blocks on 224 x 224 pixels with 1000 classes: its config and its headers, and no data."""
    config = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": hidden,
        "intermediate_size": 4 * hidden, "num_hidden_layers": 12, "num_attention_heads": heads,
        "id2label": {str(i): str(i) for i in range(1000)},
    }  # fmt: skip
    return tiny.make_headers(folder, config, "F32")


TINY, SMALL = (192, 3), (384, 6)
TABLE_4 = [  # model, first block (of 1 to 12), core and universal experts, millions of parameters
    (TINY, 7, (98, 196), 265.4),
    (TINY, 11, (98, 196), 92.3),
    (TINY, 9, (98, 196), 178.8),
    (TINY, 5, (98, 196), 352.0),
    (TINY, 7, (32, 64), 89.3),
    (TINY, 7, (64, 128), 174.7),
    (SMALL, 7, (98, 196), 1058.1),
    (TINY, 7, (197, 0), 353.9),
    (SMALL, 7, (197, 0), 1412.0),
]


@pytest.mark.parametrize(("model", "first", "experts", "millions"), sampled(TABLE_4, 4))
def test_parameters_of_table_4(model, first, experts, millions, tmp_path):
    """Every count that the paper prints, to its last digit; without universal experts it is Soft MoE."""
    core, universal = experts
    router = {"name": "spherical", "preset": "repo"} if universal else {"name": "soft"}
    recipe = Recipe.of(
        moe={
            "target": "upcycled", "layers": list(range(first - 1, 12)), "num_experts": core,
            "universal_experts": universal, "universal_width": model[0] if universal else 0,
        },
        init={"name": "uniform"},
        router=router,
    )  # fmt: skip
    found = plan(headers(tmp_path / "vit", *model), recipe)
    assert round(found.total_parameters / 1e6, 1) == millions
    d, n = model[0], 13 - first
    extra = core * (8 * d * d + 5 * d) + universal * (2 * d * d + 2 * d) + (core + universal) * d
    extra += 2 * d + 2 if universal else 1
    assert found.total_parameters == found.dense_parameters + n * (extra - (8 * d * d + 5 * d))


@pytest.mark.parametrize(
    ("model", "experts", "billions"),
    [(TINY, (98, 196), 1.19), (TINY, (197, 0), 1.21), (SMALL, (98, 196), 4.29), (TINY, None, 1.07)],
)
def test_multiplications_of_an_image(model, experts, billions, tmp_path):
    """N_c 8 d^2 + N_u 2 d^2 + 3 n E d a layer: the products, mixing tokens into slots and slots into tokens.
    Without attention scores, for the 197 tokens of an image."""
    d, n, blocks = model[0], 197, 12
    embedding = n * 3 * 16 * 16 * d  # we count the class token among the patches
    moe = 0 if experts is None else 6
    wanted = embedding + blocks * n * 4 * d * d + (blocks - moe) * n * 8 * d * d
    source = headers(tmp_path / "vit", *model)
    if experts is None:
        built = None
    else:
        core, universal = experts
        moe_table = {
            "target": "upcycled", "layers": "last_half", "num_experts": core, "universal_experts": universal,
            "universal_width": d if universal else 0,
        }  # fmt: skip
        router = {"name": "spherical", "preset": "repo"} if universal else {"name": "soft"}
        built = blueprint(source, Recipe.of(moe=moe_table, init={"name": "uniform"}, router=router))
        wanted += 6 * (core * 8 * d * d + universal * 2 * d * d + 3 * n * (core + universal) * d)
    dense = admit(peek(source)) if built is None else built.dense
    found = flops_per_row(dense, built, {"layers": n}) / 2 - 12 * 2 * n * n * d
    assert abs(found - wanted) < n  # a token's idle weights are rounded to whole ones
    assert round(wanted / 1e9, 2) == billions


def test_the_recipe_is_the_papers_model(tmp_path):
    """A ViT-S becomes V-JetMoE-T: 265.4 million parameters and a projection of keys; 300 epochs."""
    path = Path(__file__).parents[2] / "recipes" / "moe_jetpack_vit.toml"
    source = headers(tmp_path / "vit", *SMALL)
    measured = tiny.make_statistics(tmp_path / "found.safetensors", source)
    settings = [f"init.statistics={measured}", f"source={source}", f"out={tmp_path}"]
    recipe = Recipe.load(path, settings[:1])
    built = blueprint(source, recipe)
    assert {(s.layer, s.num_experts, s.universal_experts, s.width) for s in built.sites} == {
        (i, 98, 196, 768) for i in range(6, 12)
    }
    found, d = plan(source, recipe), 192
    projected = 6 * (d * d + d - 1)  # and one temperature in place of two
    assert round((found.total_parameters - projected) / 1e6, 1) == 265.4
    run = Run.load(path, settings)
    assert run.recipe == recipe
    assert run.train.total_steps == math.ceil(300 * 1_281_167 / 4096)
    assert run.schedule.warmup == math.ceil(50 * 1_281_167 / 4096)
