"""`nn.MoE` under every router against loops over tokens and experts, and its experts against one another."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, PreTrainedConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import upcycle.hf.opening  # noqa: F401 - names our own implementation of experts
from upcycle import UpcycleError
from upcycle.nn import MoE, routers
from upcycle.nn.balance import Balance
from upcycle.nn.experts import Experts
from upcycle.nn.moe import RouterLayer
from upcycle.nn.routers.sigmoid import BIAS
from upcycle.nn.routing import Tokens
from upcycle.nn.shape import Shape
from upcycle.training.router_losses import load_balancing_loss
from upcycle.training.routing import _output

E, H = 4, 6  # experts and hidden units, where nothing else is said


def shape(router: dict, *, num_experts=E, top_k=2, causal=False, **changes) -> Shape:
    """A layer of small plain experts with biases."""
    return Shape(
        **{
            "stack": "layers", "layers": (0,), "module": "unused", "num_experts": num_experts, "top_k": top_k,
            "hidden_size": H, "intermediate_size": 5, "activation": "gelu", "gated": False, "bias": True,
            "causal": causal, "router": router, **changes,
        }
    )  # fmt: skip


def shaken(module: nn.Module, seed: int = 0, scale: float = 0.7) -> nn.Module:
    """The module with every parameter drawn from N(0, scale^2)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def layer(router: dict, **changes) -> MoE:
    """An MoE layer in float64, in which no two ways to add differ by more than 1e-12."""
    config = PreTrainedConfig()
    config._experts_implementation = "eager"
    return shaken(MoE(config, shape(router, **changes))).double().eval()


def tokens(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(rounding: str, real: int, factor: float, top_k: int, num_experts: int = E) -> int:
    """How many of `real` tokens an expert takes, as the two code bases have it (and `exact`)."""
    if rounding == "vmoe":
        wanted = math.ceil(real * top_k * factor / num_experts)
        wanted += -wanted % 4
    elif rounding == "flaxformer":
        wanted = max(4, round(factor * real / num_experts))
    else:
        wanted = max(1, round(real * top_k * factor / num_experts))
    return min(real, wanted)


def one(moe: MoE, e: int, row: torch.Tensor) -> torch.Tensor:
    """Expert `e` on one token, written out."""
    experts = moe.experts
    inner = experts.up_proj[e] @ row + experts.up_proj_bias[e]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return experts.down_proj[e] @ inner + experts.down_proj_bias[e]


def token_choice(moe: MoE, rows: torch.Tensor, real: list[int]) -> list[tuple[int, int, torch.Tensor]]:
    """(token, expert, weight) for a group [N, H] under top_k or sigmoid; `real` are the tokens that exist."""
    settings, count, top_k = moe.router.settings, moe.shape.num_experts, moe.shape.top_k
    wishes, sureness = {}, {}
    for t in range(len(rows)):
        logits = torch.stack([moe.router.weight[e] @ rows[t] for e in range(count)])
        if settings.name == "sigmoid":
            scores = 1 / (1 + torch.exp(-logits))
            rank = scores + moe.router.e_score_correction_bias
        else:
            if (spread := getattr(settings, "logit_normalization", None)) is not None:  # Skywork-MoE
                mean = sum(logits) / count
                logits = spread * (logits - mean) / (sum((z - mean) ** 2 for z in logits) / count) ** 0.5
            scores = rank = logits.exp() / logits.exp().sum()
        best = sorted(range(count), key=lambda e, rank=rank: -rank[e].item())[:top_k]
        sureness[t] = scores.max().item()
        total = sum(scores[e] for e in best) if settings.normalize else 1.0
        wishes[t] = [(e, scores[e] / total) for e in best]
    if (factor := getattr(settings, "capacity_factor", None)) is None:
        return [(t, e, weight) for t, wished in wishes.items() for e, weight in wished]
    queue = sorted(real, key=lambda t: -sureness[t]) if settings.batch_priority else real
    if moe.shape.causal:
        turns = [(t, choice) for t in queue for choice in range(top_k)]
    else:
        turns = [(t, choice) for choice in range(top_k) for t in queue]
    room = [places(settings.rounding, len(real), factor, top_k, count)] * count
    out = []
    for t, choice in turns:
        e, weight = wishes[t][choice]
        if room[e]:
            room[e] -= 1
            out.append((t, e, weight))
    if settings.normalize:
        totals = {t: sum(weight for u, _, weight in out if u == t) for t, _, _ in out}
        out = [(t, e, weight / totals[t]) for t, e, weight in out]
    return out


def expert_choice(moe: MoE, rows: torch.Tensor, real: list[int]) -> list[tuple[int, int, torch.Tensor]]:
    """(token, expert, weight) for a group [N, H] where experts choose."""
    settings, count = moe.router.settings, moe.shape.num_experts
    scores = {}
    for t in real:
        logits = torch.stack([moe.router.weight[e] @ rows[t] for e in range(count)])
        scores[t] = logits.exp() / logits.exp().sum()
    room = places(settings.rounding, len(real), settings.capacity_factor, 1, count)
    taken = [
        (t, e) for e in range(count) for t in sorted(real, key=lambda t, e=e: -scores[t][e].item())[:room]
    ]
    totals = {t: sum(scores[t][e] for u, e in taken if u == t) for t, _ in taken}
    return [(t, e, scores[t][e] / (totals[t] if settings.normalize else 1.0)) for t, e in taken]


def soft(moe: MoE, rows: torch.Tensor, real: list[int]) -> torch.Tensor:
    """A group [N, H] under Soft MoE: two softmaxes over the same logits, one a direction."""
    slots = moe.router.settings.slots
    count, keys = moe.shape.num_experts * slots, moe.router.weight
    logit = {
        (t, s): moe.router.scale[0] * (rows[t] @ keys[s]) / (rows[t].norm() * keys[s].norm())
        for t in real
        for s in range(count)
    }  # fmt: skip
    made = []
    for s in range(count):
        total = sum(logit[t, s].exp() for t in real)
        mixed = sum(rows[t] * logit[t, s].exp() / total for t in real)
        made.append(one(moe, s // slots, mixed))
    out = [torch.zeros(H, dtype=rows.dtype)] * len(rows)
    for t in real:
        total = sum(logit[t, s].exp() for s in range(count))
        out[t] = sum(made[s] * logit[t, s].exp() / total for s in range(count))
    return torch.stack(out)


def naive(moe: MoE, hidden: torch.Tensor, padding: torch.Tensor | None):
    """The layer's output for [B, L, H], and how many tokens reach no expert and each expert gets."""
    settings = moe.router.settings
    group = settings.group or hidden.shape[1]
    flat = hidden.reshape(-1, H)
    gone = torch.zeros(len(flat), dtype=torch.bool) if padding is None else padding.flatten()
    out, left, counts = [], 0, [0] * moe.shape.num_experts
    for start in range(0, len(flat), group):
        rows = flat[start : start + group]
        real = [t for t in range(group) if not gone[start + t]]
        if settings.name == "soft":
            out.append(soft(moe, rows, real) if real else torch.zeros_like(rows))
            continue
        pairs = (expert_choice if settings.name == "expert_choice" else token_choice)(moe, rows, real)
        part = [torch.zeros(H, dtype=rows.dtype)] * group
        for t, e, weight in pairs:
            part[t] = part[t] + weight * one(moe, e, rows[t])
            counts[e] += t in real
        left += len(set(real) - {t for t, _, _ in pairs})
        out.append(torch.stack(part))
    return torch.cat(out).view(hidden.shape), left, counts


PADDING = torch.zeros(3, 8, dtype=torch.bool)
PADDING[0, :3] = PADDING[1, 2:] = True  # on the left, and two tokens that are left of eight

TOP_K = {
    "plain": ({}, {}),
    "raw weights": ({"normalize": False}, {}),
    "top 1": ({"normalize": False}, {"top_k": 1}),
    "every expert": ({"normalize": False}, {"top_k": E}),
    "capacity, vmoe": ({"capacity_factor": 0.6, "rounding": "vmoe"}, {}),
    "capacity, flaxformer": ({"capacity_factor": 0.5, "rounding": "flaxformer"}, {"top_k": 3}),
    "capacity, exact": ({"capacity_factor": 0.5, "normalize": False}, {}),
    "capacity of top 3": ({"capacity_factor": 0.7}, {"top_k": 3}),
    "batch priority": ({"capacity_factor": 0.5, "batch_priority": True}, {}),
    "batch priority, raw": ({"capacity_factor": 0.5, "batch_priority": True, "normalize": False}, {}),
    "batch priority, top 1": ({"capacity_factor": 0.5, "batch_priority": True}, {"top_k": 1}),
    "causal": ({"capacity_factor": 0.5}, {"causal": True}),
    "groups": ({"capacity_factor": 0.4, "group": 12}, {}),
    "normalised logits": ({"logit_normalization": 2.0}, {}),
    "normalised logits, raw": (
        {"logit_normalization": 0.5, "normalize": False, "rescale": False, "capacity_factor": 0.5},
        {"top_k": 3},
    ),
}
EXPERT_CHOICE = {
    "a row": ({}, {}),
    "raw weights": ({"normalize": False, "capacity_factor": 1.0}, {}),
    "vmoe": ({"capacity_factor": 0.5, "rounding": "vmoe"}, {"num_experts": 5}),
    "flaxformer": ({"capacity_factor": 0.5, "rounding": "flaxformer"}, {"num_experts": 5}),
    "groups": ({"capacity_factor": 1.0, "group": 4}, {}),
    "groups across rows": ({"capacity_factor": 1.0, "group": 12}, {}),
    "everything": ({"capacity_factor": 4.0}, {}),
}
SIGMOID = {
    "plain": ({}, {}),
    "raw weights": ({"normalize": False}, {"top_k": 3}),
    "causal": ({}, {"causal": True}),
}
SOFT = {
    "one slot": ({}, {}),
    "three slots": ({"slots": 3}, {}),
    "groups": ({"group": 4}, {}),
}
CASES = [
    pytest.param({"name": name, **table}, changes, id=f"{name}: {label}")
    for name, cases in (
        ("top_k", TOP_K), ("expert_choice", EXPERT_CHOICE), ("sigmoid", SIGMOID), ("soft", SOFT),
    )
    for label, (table, changes) in cases.items()
]  # fmt: skip


@pytest.mark.parametrize("padding", [None, PADDING], ids=["no padding", "padding"])
@pytest.mark.parametrize(("router", "changes"), CASES)
def test_a_layer_is_what_loops_over_tokens_and_experts_give(router, changes, padding):
    """Outputs where there are tokens, all gradients, counts, and tokens that reach no expert."""
    moe, hidden = layer(router, **changes), tokens(3, 8).requires_grad_()
    moe.padding = padding
    kept = []
    moe.router.register_forward_hook(lambda _module, _inputs, routing: kept.append(routing))
    found = moe(hidden)
    wanted, left, counts = naive(moe, hidden, padding)
    real = torch.ones(3, 8, dtype=torch.bool) if padding is None else ~padding
    assert torch.allclose(found[real], wanted[real], rtol=0, atol=1e-12)
    mass = tokens(3, 8, seed=2) * real[..., None]
    named = [("hidden", hidden), *((n, p) for n, p in moe.named_parameters() if p.requires_grad)]
    assert len(named) == len([*moe.parameters()]) + (moe.router.settings.name != "sigmoid")
    given = [tensor for _, tensor in named]
    gradients = [torch.autograd.grad((x * mass).sum(), given, allow_unused=True) for x in (found, wanted)]
    for (name, _), ours, theirs in zip(named, *gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11), name
    routing = kept[0]
    assert int(routing.left_behind) == left
    assert routing.logits.shape == routing.probabilities.shape == (24, moe.shape.num_experts)
    assert (routing.real is None) == (padding is None)
    assert padding is None or torch.equal(routing.real.view(real.shape), real)
    sums = routing.probabilities.sum(-1)[real.flatten()]
    assert torch.allclose(sums, torch.ones(int(real.sum()), dtype=torch.float64))
    if router["name"] == "expert_choice" or moe.router.settings.name == "sigmoid":
        assert routing.counts.tolist() == counts
    if router["name"] == "top_k":  # before capacity, as the balance loss wants it
        assert int(routing.counts.sum()) == moe.shape.top_k * int(real.sum())


def test_the_cases_are_short_of_places():
    """Or they would say nothing about who gets one."""
    for router, changes in [(dict(p.values[0]), p.values[1]) for p in CASES]:
        if "capacity_factor" in router and router["name"] == "top_k":
            moe, hidden = layer(router, **changes), tokens(3, 8)
            free = layer({k: router[k] for k in router if k in ("name", "normalize")}, **changes)
            assert not torch.allclose(moe(hidden), free(hidden)), router


def test_batch_priority_gives_places_to_the_surest_tokens():
    """With one choice a token is as sure as its softmax says, renormalised weights or not."""
    for normalize in (True, False):
        table = {"capacity_factor": 0.5, "batch_priority": True, "normalize": normalize, "std": 1.0}
        moe = layer({"name": "top_k", **table}, num_experts=2, top_k=1)
        with torch.no_grad():
            moe.router.weight.zero_()[0, 0] = 1.0  # expert 0 with the logit of the first hidden unit
        hidden = tokens(1, 8).abs()
        hidden[0, :, 0] = torch.tensor([0.5, 2.0, 0.1, 3.0, 1.0, 0.2, 0.3, 0.4])
        got = [t for t in range(8) if moe(hidden)[0, t].any()]
        assert got == [1, 3], normalize  # two of eight: 8 x 1 x 0.5 / 2


def test_capacity_is_that_of_the_published_code():
    """Dossier values of V-MoE at 32 experts, and flaxformer's formula, whose share has no K."""
    table = [(196, 1, 8), (196, 2, 16), (49, 1, 4), (1568, 2, 100), (4096, 1, 128), (4096, 2, 256)]
    for length, factor, wanted in table:
        assert routers.capacity(length, factor / 32, "vmoe") == wanted
    for length, factor, experts in [
        (2048, 2.0, 32),
        (512, 1.25, 8),
        (100, 1.0, 32),
        (6, 1.0, 4),
        (3, 1.0, 4),
    ]:
        wanted = min(length, max(4, round(factor * length / experts)))
        assert routers.capacity(length, factor / experts, "flaxformer") == wanted
    assert routers.capacity(10, 1 / 32, "exact") == 1  # never none
    assert routers.capacity(30, 0.1, "vmoe") == 4  # 0.1 x 30 is 3, not a little more
    assert routers.capacity(40, 0.1, "vmoe") == 4
    top_k = routers.read({"name": "top_k", "capacity_factor": 1.0, "rounding": "vmoe"})
    assert top_k.experts_per_token(32, 2, 196) == 2.0
    flax = routers.read({"name": "top_k", "capacity_factor": 1.0, "rounding": "flaxformer"})
    assert flax.experts_per_token(32, 2, 196) == 1.0  # half of the assignments fit
    assert not flax.reaches_all(32, 2)
    chosen = routers.read({"name": "expert_choice", "capacity_factor": 1.0, "rounding": "vmoe"})
    assert chosen.experts_per_token(32, 1, 196) == pytest.approx(1.31, abs=0.005)
    assert chosen.experts_per_token(32, 1, 49) == pytest.approx(2.61, abs=0.005)


@pytest.mark.parametrize("rounding", ["vmoe", "flaxformer", "exact"])
def test_capacity_on_a_device_is_capacity(rounding):
    """For every group of up to 3000 tokens, and shares whose products lie on the edge of a whole number."""
    tokens = torch.arange(3001)
    for share in (0.1, 0.3, 0.7, 1 / 3, 1 / 32, 1.25 / 8, 2 * 1.05 / 8, 0.5, 2.5, 1 / 48):
        wanted = [routers.capacity(n, share, rounding) for n in tokens.tolist()]
        assert routers.capacities(tokens, share, rounding).tolist() == wanted, share


@pytest.mark.parametrize("name", ["expert_choice", "top_k"])
def test_a_group_must_divide_the_tokens_of_training(name):
    moe = layer({"name": name, "group": 5}).train()
    with pytest.raises(UpcycleError, match=r"router.group = 5 does not divide the 3 x 8 tokens"):
        moe(tokens(3, 8))
    assert moe(tokens(5, 8)).shape == (5, 8, H)


SHORT = [
    {"name": "top_k", "capacity_factor": 0.5},
    {"name": "top_k", "capacity_factor": 1.0, "batch_priority": True},
    {"name": "expert_choice", "capacity_factor": 1.0}, {"name": "soft"}, {"name": "spherical"},
]  # fmt: skip
FREE = [{"name": "top_k"}, {"name": "sigmoid"}, {"name": "analytic"}]


@pytest.mark.parametrize("padding", [None, PADDING], ids=["no padding", "padding"])
@pytest.mark.parametrize(("router", "changes"), [
    *((router, {}) for router in SHORT),
    *((router, {"response_norm": True}) for router in (*SHORT[:3], *FREE)),
])  # fmt: skip
def test_the_last_group_is_shorter_outside_training(router, changes, padding):
    """Each group comes out as a row that stands alone does; 24 tokens are four groups of 5 and one of 4."""
    moe, alone = (layer({**router, "group": group}, **changes) for group in (5, 0))
    moe.padding, hidden = padding, tokens(3, 8)
    left = []
    for each in (moe, alone):
        each.router.register_forward_hook(lambda _module, _inputs, routing: left.append(routing.left_behind))
    found = moe(hidden).flatten(0, 1)
    gone = torch.zeros(24, dtype=torch.bool) if padding is None else padding.flatten()
    wanted = []
    for rows, absent in zip(hidden.flatten(0, 1).split(5), gone.split(5), strict=True):
        alone.padding = absent[None]
        wanted.append(alone(rows[None])[0])
    assert torch.allclose(found[~gone], torch.cat(wanted)[~gone], rtol=0, atol=1e-12)
    assert int(left[0]) == sum(map(int, left[1:]))


@pytest.mark.parametrize("router", FREE)
def test_a_group_is_nothing_where_tokens_do_not_compete(router):
    moe, alone = (layer({**router, "group": group}) for group in (5, 0))
    for size in ((3, 8), (1, 1), (5, 8)):
        assert torch.equal(moe(tokens(*size)), alone(tokens(*size)))


@pytest.mark.parametrize("router", [{"normalize": True}, {"normalize": False}])
def test_weights_of_a_token_that_experts_chose(router):
    """They sum to one or, where no expert took the token, to zero, and so does the layer's output."""
    moe, hidden = layer({"name": "expert_choice", "capacity_factor": 0.5, **router}), tokens(3, 8)
    routing = moe.router(hidden, None)
    dispatch = routing.dispatch
    sums = torch.zeros(24, dtype=torch.float64).index_add(0, dispatch.tokens, dispatch.weights)
    reached = torch.bincount(dispatch.tokens, minlength=24) > 0
    assert 0 < int(reached.sum()) < 24
    assert int(routing.left_behind) == int((~reached).sum())
    assert (moe(hidden).flatten(0, 1)[~reached] == 0).all()
    if router["normalize"]:
        assert torch.allclose(sums[reached], torch.ones_like(sums[reached]))
    else:
        probabilities = routing.probabilities[dispatch.tokens, dispatch.experts]
        assert torch.equal(dispatch.weights, probabilities)


@pytest.mark.parametrize("name", ["top_k", "expert_choice", "soft"])
def test_padding_changes_nothing_for_tokens(name):
    """Whatever stands at padded places, and however many there are, tokens compute the same."""
    tables = {"top_k": {"capacity_factor": 0.5}, "expert_choice": {"capacity_factor": 1.0}, "soft": {}}
    moe, hidden = layer({"name": name, **tables[name]}), tokens(2, 12)
    wanted = moe(hidden[:, :7])
    for length in (7, 9, 12):
        moe.padding = torch.arange(length).expand(2, length) >= 7
        found = moe(hidden[:, :length])[:, :7]
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12), length


@pytest.mark.parametrize("shift", range(8))
def test_an_expert_that_chooses_tokens_with_a_share_of_zero(shift):
    """The last expert has to fill its places, and nobody else takes two of the tokens."""
    weight = torch.zeros(E, H)
    weight[:, :E], weight[-1] = 9 * torch.eye(E), 0.0
    weight[-1, -1] = -150.0
    hidden = torch.zeros(1, 8, H)
    hidden[0, :6, :3], hidden[..., -1] = torch.eye(3).repeat_interleave(2, 0), 1.0
    weight.requires_grad_()
    routing = routers.read({"name": "expert_choice", "capacity_factor": 1.0}).route(
        Tokens(hidden=hidden.roll(shift, 1), tensors={"weight": weight}, num_experts=E, top_k=1)
    )
    assert routing.dispatch.weights.isfinite().all()
    routing.dispatch.weights.sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("logit", [-50.0, -90.0, -100.0, -150.0])
def test_a_sigmoid_of_very_small_scores(logit):
    """It is 0 from about -89 on. Weights are shares or zero, and gradients are finite."""
    hidden = torch.ones(1, 1, H)
    weight = torch.full((E, H), logit / H, requires_grad=True)
    given = {"weight": weight, BIAS: torch.zeros(E)}
    routing = routers.read({"name": "sigmoid"}).route(
        Tokens(hidden=hidden, tensors=given, num_experts=E, top_k=2)
    )
    weights, chances = routing.dispatch.weights, routing.probabilities
    if logit == -50.0:
        assert torch.allclose(weights, torch.tensor(0.5))
        assert torch.allclose(chances, torch.tensor(1 / E))
    else:
        assert weights.abs().max() < 1e-37
        assert chances.abs().max() < 1e-37
    (weights * torch.tensor([1.0, 9.0]) + chances.max()).sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("name", routers.names())
def test_rows_without_any_token(name):
    """A row that is all padding makes nothing infinite, neither outputs nor gradients."""
    moe, hidden = layer({"name": name}), tokens(2, 5)
    moe.padding = torch.tensor([[False] * 5, [True] * 5])
    found = moe(hidden)
    found[0].sum().backward()
    assert found.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())


def test_noise_is_there_in_training_alone():
    """N(0, (noise_std / E)^2) on every logit; importance stays that of the clean logits."""
    quiet, noisy = (layer({"name": "top_k", "noise_std": std}) for std in (0.0, 1.0))
    hidden = tokens(20, 50)
    assert torch.equal(noisy(hidden), quiet(hidden))
    assert "load" not in noisy.router(hidden, None).losses
    noisy.train()
    torch.manual_seed(0)
    routing, clean = noisy.router(hidden, None), quiet.router(hidden, None)
    noise = (routing.logits - clean.logits).detach()
    assert float(noise.std()) == pytest.approx(1 / E, rel=0.05)
    assert abs(float(noise.mean())) < 0.02
    assert torch.equal(routing.losses["importance"], clean.losses["importance"])
    assert not torch.equal(noisy(hidden), quiet(hidden))


def test_noise_of_expert_choice_is_vmoes():
    """N(0, (noise / E)^2) on every logit, in training alone; choices and weights are those of the noisy
    scores. Off, nothing is in the table of a router that was not there before."""
    quiet, noisy = (layer({"name": "expert_choice", **more}) for more in ({}, {"noise": 1.0}))
    hidden = tokens(20, 50)
    assert torch.equal(noisy(hidden), quiet(hidden))
    noisy.train()
    torch.manual_seed(0)
    routing, clean = noisy.router(hidden, None), quiet.router(hidden, None)
    noise = (routing.logits - clean.logits).detach()
    assert float(noise.std()) == pytest.approx(1 / E, rel=0.05)
    assert abs(float(noise.mean())) < 0.02
    scores = routing.logits.view(20, 50, E).softmax(-1).transpose(1, 2)  # [G, E, N]
    taken = scores.topk(25, dim=-1).indices  # capacity_factor 2: 2 x 50 / 4
    wanted = torch.zeros(20, E, 50).scatter(2, taken, 1.0).transpose(1, 2).reshape(-1, E)
    found = torch.zeros(1000, E)
    found[routing.dispatch.tokens, routing.dispatch.experts] = 1.0
    assert torch.equal(found, wanted)
    assert not torch.equal(noisy(hidden), quiet(hidden))
    assert "noise" not in routers.read({"name": "expert_choice"}).as_table()
    assert routers.read({"name": "expert_choice", "noise": 0.5}).as_table()["noise"] == 0.5


@pytest.mark.parametrize("padding", [None, PADDING], ids=["no padding", "padding"])
def test_importance_and_load_losses(padding):
    """V-MoE's formulas, group by group: squared coefficients of variation, summed over groups."""
    moe, hidden = layer({"name": "top_k", "noise_std": 1.0}).train(), tokens(3, 8)
    torch.manual_seed(3)
    routing = moe.router(hidden, padding)
    torch.manual_seed(3)
    noise = torch.randn(3, 8, E, dtype=torch.float64) / E
    importance = load = 0.0
    for g in range(3):
        real = [t for t in range(8) if padding is None or not padding[g, t]]
        clean = [[(moe.router.weight[e] @ hidden[g, t]).item() for e in range(E)] for t in real]
        noisy = [[clean[i][e] + float(noise[g, t, e]) for e in range(E)] for i, t in enumerate(real)]
        weights = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in clean]
        chances = []
        for calm, row in zip(clean, noisy, strict=True):
            threshold = sorted(row, reverse=True)[1]  # the second score, of top 2
            chances.append([0.5 * (1 + math.erf((x - threshold) * E / math.sqrt(2))) for x in calm])
        importance += variation([sum(column) for column in zip(*weights, strict=True)])
        load += variation([sum(column) / len(real) for column in zip(*chances, strict=True)])
    assert routing.losses["importance"].item() == pytest.approx(importance, rel=1e-9)
    assert routing.losses["load"].item() == pytest.approx(load, rel=1e-9)
    assert routing.groups == 3


def test_losses_of_a_group_of_padding_alone():
    """It adds nothing to the sum, to the gradient and to the number of groups of which a mean is taken."""
    moe, hidden = layer({"name": "top_k", "noise_std": 1.0}).train(), tokens(3, 8)
    empty = torch.zeros(3, 8, dtype=torch.bool)
    empty[1] = True
    torch.manual_seed(3)
    some = moe.router(hidden, empty)
    gradient = torch.autograd.grad(sum(some.losses.values()), moe.router.weight)[0]
    noise = torch.randn(3, 8, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[[0, 2]]
    with mock.patch.object(torch, "randn_like", return_value=noise):
        others = moe.router(hidden[[0, 2]], None)
    wanted = torch.autograd.grad(sum(others.losses.values()), moe.router.weight)[0]
    assert torch.allclose(gradient, wanted, rtol=1e-12, atol=0)
    for name in ("importance", "load"):
        assert some.losses[name].item() == pytest.approx(others.losses[name].item(), rel=1e-12)
    counted = [_output(moe.router, routing, None).tallies()[-1].item() for routing in (some, others)]
    assert counted == [2, 2]


def variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


@pytest.mark.parametrize(
    "router", [*({"name": name} for name in routers.names()), {"noise_std": 1.0}], ids=str
)
def test_a_router_says_which_losses_of_a_run_it_computes(router):
    """Those that a training run has keys for: it refuses a weight on one that is not there."""
    moe = layer(router).train()
    found = moe.router(tokens(2, 5), None).losses
    assert {*moe.router.settings.losses_of_run()} == {*Balance().coefficients} & {*found}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_k_at_uniform_routing(top_k):
    """And E where all tokens send all they have to the same expert."""
    moe, hidden = layer({"name": "top_k"}, top_k=top_k), tokens(2, 8)
    with torch.no_grad():
        moe.router.weight.zero_()
    routing = moe.router(hidden, None)
    loss = load_balancing_loss(routing.probabilities, routing.counts, 16)
    assert loss.item() == pytest.approx(top_k)
    with torch.no_grad():
        moe.router.weight[0] = hidden[0, 0] * 100
    routing = moe.router(hidden[0, :1].expand(2, 8, H), None)
    assert load_balancing_loss(routing.probabilities, routing.counts, 16).item() == pytest.approx(E)


# By width and experts, for a router N(0, 0.02^2) and inputs of unit RMS: what a token's weights sum to for
# C = 1, 2, 3, 5, those of top-2, and the share of tokens without an expert for C = 1, 2, 3.
STEP_0 = {
    (768, 8): ((0.25, 0.43, 0.58, 0.80), 0.42, (0.20, 0.005, 0.0)),
    (768, 32): ((0.09, 0.16, 0.22, 0.32), 0.155, (0.29, 0.056, 0.006)),
    (2048, 32): ((0.155, 0.250, 0.325, 0.445), 0.244, (0.255, 0.035, 0.0023)),
    (768, 128): ((0.03, 0.05, 0.08, 0.11), 0.05, (0.33, 0.10, 0.026)),
}


@pytest.mark.parametrize(("width", "num_experts"), STEP_0)
def test_how_much_of_the_dense_network_is_there_at_step_0(width, num_experts):
    """Without renormalised weights, in four groups of 4,096 tokens each, or two of a wide model."""
    sums, top_2, unrouted = STEP_0[width, num_experts]
    groups = 4 if width < 1024 else 2
    count = groups * 4096
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(groups, 4096, width, generator=generator)
    hidden /= hidden.square().mean(-1, keepdim=True).sqrt()
    weight = torch.randn(num_experts, width, generator=generator) * 0.02

    def route(**table):
        settings = routers.read({"normalize": False, **table})
        tensors = {"weight": weight}
        return settings.route(Tokens(hidden=hidden, tensors=tensors, num_experts=num_experts, top_k=2))

    for place, factor in enumerate((1.0, 2.0, 3.0, 5.0)):
        routing = route(name="expert_choice", capacity_factor=factor)
        # Half of the last digit, and what this many tokens leave to chance.
        assert float(routing.dispatch.weights.sum()) / count == pytest.approx(sums[place], abs=0.007)
        if place < 3:
            share = int(routing.left_behind) / count
            assert share == pytest.approx(unrouted[place], abs=(0.012, 0.005, 0.003)[place])
    assert float(route(name="top_k").dispatch.weights.sum(-1).mean()) == pytest.approx(
        top_2, rel=0.02, abs=0.004
    )


@pytest.mark.parametrize("name", routers.names())
def test_a_uniform_router_gives_the_sum_of_weights_that_it_says(name):
    """What rescaling divides by: exact for choices of tokens, for Expert Choice the mean over tokens."""
    for table in ({"normalize": True}, {"normalize": False}):
        moe = layer({"name": name, **table})
        with torch.no_grad():
            moe.router.weight.zero_()
            if name in ("sigmoid", "analytic"):
                moe.router.e_score_correction_bias.zero_()
            if name == "analytic":
                moe.router.scale.zero_()
        hidden = tokens(2, 8)
        dispatch = moe.router(hidden, None).dispatch
        said = moe.router.settings.gate_sum(E, 2)
        if moe.router.settings.has_slots:
            assert torch.allclose(dispatch.combine.sum((-1, -2)), torch.tensor(said, dtype=torch.float64))
        elif name == "expert_choice":
            reached = len(dispatch.tokens.unique()) if table["normalize"] else 16
            assert float(dispatch.weights.detach().sum()) / reached == pytest.approx(said)
        else:
            assert torch.allclose(dispatch.weights.sum(-1), torch.tensor(said, dtype=torch.float64))


@pytest.mark.parametrize(
    ("router", "why"),
    [
        ({"name": "expert_choice"}, "an expert chooses among all tokens of a sequence, later ones included"),
        ({"name": "soft"}, "a slot mixes all tokens of a sequence, later ones included"),
        (
            {"name": "top_k", "capacity_factor": 1.0, "batch_priority": True},
            "with batch_priority a later token can take an earlier one's place",
        ),
    ],
)
def test_routers_that_look_ahead_are_refused_in_a_causal_stack(router, why):
    with pytest.raises(UpcycleError, match=why):
        layer(router, causal=True)
    # The reason is true: changing the last token changes an earlier one's output.
    moe, hidden = layer(router), tokens(1, 8)
    before = moe(hidden)[:, :-1]
    changes = [hidden.index_fill(1, torch.tensor([7]), value) for value in (-3.0, 0.5, 3.0)]
    assert any(not torch.allclose(moe(changed)[:, :-1], before) for changed in changes)


@pytest.mark.parametrize("name", ["top_k", "sigmoid"])
def test_a_causal_layer_does_not_look_ahead(name):
    """With places so short that a later token would take one from an earlier one if it could."""
    table = {"capacity_factor": 0.5} if name == "top_k" else {}
    moe, hidden = layer({"name": name, **table}, causal=True), tokens(4, 8)
    before = moe(hidden)
    for t in range(1, 8):
        for seed in range(3):
            changed = hidden.clone()
            changed[:, t:] = tokens(4, 8 - t, seed=100 + seed)
            assert torch.allclose(moe(changed)[:, :t], before[:, :t], rtol=0, atol=1e-12), t
    if name == "top_k":  # all first choices before all second ones would have looked ahead
        loose = layer({"name": name, **table}, causal=False)
        changed = hidden.clone()
        changed[:, 4:] = tokens(4, 4, seed=100)
        assert not torch.allclose(loose(changed)[:, :4], loose(hidden)[:, :4], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"name": "top_k", "capacity_factor": 0.0}, "capacity_factor = 0.0; it must be a number above 0"),
        (
            {"name": "expert_choice", "capacity_factor": -1.0},
            "capacity_factor = -1.0; it must be a number above 0",
        ),
        ({"name": "top_k", "noise_std": -1.0}, "noise_std = -1.0"),
        ({"name": "top_k", "batch_priority": True}, "set router.capacity_factor"),
        ({"name": "soft", "slots": 0}, "slots = 0; it must be 1 or more"),
        ({"name": "top_k", "group": -1}, "group = -1"),
        ({"name": "top_k", "std": -1.0}, "std = -1.0"),
        ({"name": "top_k", "rounding": "up"}, "allowed: vmoe, flaxformer, exact"),
        ({"name": "expert_choice", "noise_std": 1.0}, "unknown key router .expert_choice..noise_std"),
        ({"name": "expert_choice", "noise": -1.0}, "router.noise = -1.0; it must be a number of 0 or more"),
        ({"name": "experts_choose"}, "expert_choice"),
    ],
)
def test_settings_that_mean_nothing_are_refused(table, said):
    with pytest.raises(UpcycleError, match=said):
        routers.read(table)


@pytest.mark.parametrize("name", routers.names())
def test_settings_survive_a_table(name):
    settings = routers.read({"name": name, "std": 0.5, "group": 4, "normalize": False})
    assert routers.read(settings.as_table()) == settings
    assert dataclasses.replace(settings, group=0) != settings


# Experts.

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "expert_by_expert")
KINDS = [(gated, bias) for gated in (True, False) for bias in (True, False)]


def experts_of(implementation: str, gated: bool, bias: bool, dtype=torch.float32, **options) -> Experts:
    config = PreTrainedConfig()
    config._experts_implementation = implementation
    sizes = {"num_experts": 4, "hidden_size": 16, "intermediate_size": 24, "activation": "silu"}
    made = Experts(config, **{**sizes, **options}, gated=gated, bias=bias)
    return shaken(made, scale=0.4).to(dtype)


def routed(dtype=torch.float32):
    """50 rows with two of the first three experts each; the fourth gets nothing."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(50, 16, generator=generator).to(dtype)
    index = torch.rand(50, 3, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(50, 2, generator=generator)
    return rows, index, weights


def results(experts: Experts, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The output, and the gradients of everything that has one."""
    rows, index, weights = routed(dtype)
    rows.requires_grad_()
    weights.requires_grad_()
    experts.zero_grad()
    out = experts(rows, index, weights)
    mass = torch.randn(50, 16, generator=torch.Generator().manual_seed(6))
    (out.float() * mass).sum().backward()
    parameters = {name: p.grad for name, p in experts.named_parameters()}
    return {"out": out.detach(), "rows": rows.grad, "weights": weights.grad, **parameters}


def by_hand(experts: Experts) -> torch.Tensor:
    """Row by row, in float64."""
    rows, index, weights = routed()
    p = {name: value.detach().double() for name, value in experts.named_parameters()}
    out = torch.zeros(50, 16, dtype=torch.float64)
    for m in range(50):
        for k in range(2):
            e = int(index[m, k])
            inner = p[experts.up_name][e] @ rows[m].double()
            if experts.has_bias:
                inner = inner + p[f"{experts.up_name}_bias"][e]
            if experts.has_gate:
                gate, up = inner[:24], inner[24:]
                inner = gate / (1 + torch.exp(-gate)) * up
            else:
                inner = inner / (1 + torch.exp(-inner))
            made = p["down_proj"][e] @ inner
            if experts.has_bias:
                made = made + p["down_proj_bias"][e]
            out[m] += float(weights[m, k]) * made
    return out


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_are_the_same_however_they_run(implementation, gated, bias):
    """In float32, output and every gradient to 1e-6 of the largest, against rows by hand and the loop."""
    experts = experts_of(implementation, gated, bias)
    found, wanted = results(experts), results(experts_of("eager", gated, bias))
    reference = by_hand(experts)
    assert float((found["out"] - reference).abs().max()) < 1e-6 * float(reference.abs().max())
    assert {"rows", "weights", experts.up_name, "down_proj"} <= found.keys()
    assert ("down_proj_bias" in found) == bias
    for name, value in wanted.items():
        off = (found[name] - value).abs().max()
        assert off <= 1e-6 * value.abs().max(), (name, float(off))
    assert (found["down_proj"][3] == 0).all()  # nobody chose it


@pytest.mark.parametrize(
    ("rows", "hidden", "experts", "top_k"),
    [(7, 24, 5, 4), (600, 64, 16, 2), (64, 128, 3, 1), (300, 32, 8, 5)],
)
def test_expert_by_expert_has_the_bits_of_grouped_products(rows, hidden, experts, top_k):
    """Outputs and all gradients, in experts of transformers, also if one has no rows."""
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_local_experts=experts, num_experts_per_tok=top_k
    )
    theirs = shaken(MixtralExperts(config), scale=0.4)
    generator = torch.Generator().manual_seed(rows)
    given = torch.randn(rows, hidden, generator=generator)
    index = torch.rand(rows, experts - (top_k < experts), generator=generator).argsort(-1)[:, :top_k]
    weights = torch.rand(rows, top_k, generator=generator)
    found = {}
    for implementation in ("grouped_mm", "expert_by_expert"):
        config._experts_implementation = implementation
        leaves = [given.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = theirs(leaves[0], index, leaves[1])
        assert ("ExpertByExpert" in type(out.grad_fn).__name__) == (implementation == "expert_by_expert")
        gradients = torch.autograd.grad(out.square().sum(), [*leaves, *theirs.parameters()])
        with torch.no_grad():
            assert torch.equal(theirs(given, index, weights), out)
        found[implementation] = [out, *gradients]
    threads = torch.get_num_threads()
    for ours, wanted in zip(*found.values(), strict=True):
        assert torch.equal(ours, wanted) if threads == 1 else torch.allclose(ours, wanted, rtol=1e-5)


def test_expert_by_expert_leaves_out_what_needs_no_gradient():
    experts = experts_of("expert_by_expert", True, False)
    wanted = results(experts)
    experts.down_proj.requires_grad_(False)
    rows, index, weights = routed()
    out = experts(rows, index, weights)
    mass = torch.randn(50, 16, generator=torch.Generator().manual_seed(6))
    (gradient,) = torch.autograd.grad((out * mass).sum(), experts.gate_up_proj)
    assert torch.equal(gradient, wanted["gate_up_proj"])


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_in_bfloat16(implementation, gated, bias):
    """Against float32 on the same rounded weights: within 2 % of the norm (one rounding is 0.2 to 0.4 %)."""
    experts = experts_of(implementation, gated, bias, torch.bfloat16)
    wide = experts_of("eager", gated, bias)
    wide.load_state_dict({name: p.float() for name, p in experts.state_dict().items()})
    found, wanted = results(experts, torch.bfloat16), results(wide)
    assert found["out"].dtype == torch.bfloat16
    for name, value in wanted.items():
        off = (found[name].float() - value).norm() / value.norm()
        assert 0 < off < 0.02, (name, float(off))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_of_experts_acts_in_training_alone(implementation, gated):
    """On experts that give their inner activations, silu(1) = 0.731 each, the mask can be read off."""
    experts = experts_of(implementation, gated, True, dropout=0.3, intermediate_size=16)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.fill_(1.0 if name.endswith("up_proj_bias") else 0.0)
        experts.down_proj += torch.eye(16)
    rows = torch.randn(400, 16)
    index, weights = torch.arange(400)[:, None] % 4, torch.ones(400, 1)
    silu = 1 / (1 + math.exp(-1))
    calm = experts.eval()(rows, index, weights)
    assert torch.allclose(calm, torch.full_like(calm, silu))
    torch.manual_seed(0)
    out = experts.train()(rows, index, weights)
    kept = out != 0
    assert torch.allclose(out[kept], torch.full_like(out[kept], silu / 0.7))
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.02)


def test_rows_are_added_up_in_float32():
    """A token that all of 128 experts took, in bfloat16: their sum is rounded once, not 128 times."""
    moe = layer({"name": "expert_choice", "capacity_factor": 128.0}, num_experts=128).bfloat16()
    hidden = tokens(1, 4).bfloat16()
    dispatch = moe.router(hidden, None).dispatch
    assert dispatch.weights.dtype == torch.float32
    rows = moe.experts(
        hidden[0][dispatch.tokens], dispatch.experts[:, None], torch.ones(len(dispatch.tokens), 1).bfloat16()
    )
    wanted = torch.zeros(4, H).index_add(0, dispatch.tokens, rows.float() * dispatch.weights[:, None])
    assert torch.equal(moe(hidden)[0], wanted.bfloat16())


@pytest.mark.parametrize("name", routers.names())
def test_a_router_decides_in_float32(name):
    """In a bfloat16 model, and where autocast would round, the numbers are those of float32."""
    narrow = layer({"name": name}).bfloat16().eval()  # noise of training would be another each time
    hidden = tokens(2, 8).bfloat16()
    found = narrow.router(hidden, None)
    wide = RouterLayer(narrow.router.settings, narrow.shape).eval()
    wide.load_state_dict({key: p.float() for key, p in narrow.router.state_dict().items()})
    wanted = wide(hidden.float(), None)
    assert found.logits.dtype == found.probabilities.dtype == torch.float32
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.probabilities, wanted.probabilities)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(hidden.float(), None).logits, wanted.logits)
    assert not torch.equal(found.logits, found.logits.bfloat16().float())
    assert narrow(hidden).dtype == torch.bfloat16


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_follow_autocast(implementation):
    """Under autocast the products are bfloat16's, and the gradients those of the float32 weights."""
    moe = layer({"name": "top_k"}, hidden_size=8, intermediate_size=8).float()
    moe.experts.config._experts_implementation = implementation
    hidden = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = []
    moe.experts.act_fn.register_forward_hook(lambda _module, args, _out: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = moe(hidden)
    assert set(seen) == {torch.bfloat16}
    wanted = moe(hidden)
    assert float((found.float() - wanted).detach().norm() / wanted.detach().norm()) < 0.02
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.experts.parameters())
