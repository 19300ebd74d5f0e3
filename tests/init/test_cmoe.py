"""CMoE against a naive account with every token's marks, on a trained model and its own text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from scipy.optimize import linear_sum_assignment

import tiny
import upcycle
from upcycle import Recipe, blueprint, convert
from upcycle.api.calibration import calibrate
from upcycle.errors import UpcycleError
from upcycle.init.cmoe import groups
from upcycle.records.statistics import Statistics

MARKED, LENGTH, ROWS = 20, 64, 12
CUT = {"num_experts": 3, "granularity": 4, "shared_experts": 1, "target": "upcycled"}


@pytest.fixture(scope="module")
def measured(stories: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    out = tmp_path_factory.mktemp("cmoe") / "found.safetensors"
    return calibrate(
        stories, out, text=tinystories, collect=("co_marker",), positions=("neurons",), marked=MARKED,
        length=LENGTH, limit=ROWS, in_order=True, batch_size=5, device="cpu", cache=out.parent,
    )  # fmt: skip


@pytest.fixture(scope="module")
def network(stories: Path, measured: Statistics) -> tuple[Any, torch.Tensor]:
    """The network of layer 2, and what it reads of the text that was calibrated on."""
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    ids = np.memmap(next(measured.path.parent.glob("*.bin")), np.uint16, "r")[: ROWS * LENGTH]
    mlp: Any = model.model.layers[2].mlp
    kept: list[torch.Tensor] = []
    mlp.register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(torch.tensor(ids.astype(np.int64).reshape(ROWS, LENGTH)))
    return mlp, kept[0]


def marks_of(mlp: Any, tokens: torch.Tensor) -> np.ndarray:
    """Which neurons are among the K_a most active of each token, [T, I], token by token."""
    out = np.zeros((len(tokens), len(mlp.up_proj.weight)), np.int64)
    gate, up = (F.normalize(m.weight.detach(), dim=1) for m in (mlp.gate_proj, mlp.up_proj))
    for t, x in enumerate(tokens):
        unit = x / x.norm()
        h = F.silu(gate @ unit) * (up @ unit)
        out[t, h.abs().argsort(descending=True)[:MARKED].numpy()] = 1
    return out


def test_pairs_of_marks_are_those_of_every_token(measured, network):
    marks = marks_of(*network)
    found = measured.of("neurons", "layers", 2, "co_marker")
    wanted = marks.T @ marks / len(marks)
    assert np.abs(found - wanted).max() <= 3 / len(marks)  # a token whose K_a-th and next are within rounding
    assert (np.abs(found - wanted) < 1e-6).mean() > 0.99


def test_groups_are_those_of_the_marks_themselves(network):
    """Distances of columns of marks, one linear assignment, and the neuron nearest to each mean."""
    marks = marks_of(*network)
    experts, shared = 3, 43
    found = groups(marks.T @ marks, experts, shared)
    rates = marks.sum(0)
    assert rates[found.shared].min() >= np.delete(rates, found.shared).max()
    assert np.array_equal(np.sort(np.concatenate([found.shared, *found.experts])), np.arange(172))
    rest = np.setdiff1d(np.arange(172), found.shared)
    seeds = rest[np.argsort(-rates[rest], kind="stable")[:experts]]
    distances = np.abs(marks[:, rest][:, :, None] - marks[:, seeds][:, None]).sum(0)  # [rest, E]
    rows, columns = linear_sum_assignment(np.repeat(distances, 43, axis=1))
    least = distances[rows, columns // 43].sum()
    label = {int(i): e for e, members in enumerate(found.experts) for i in members}
    assert sum(distances[j, label[int(i)]] for j, i in enumerate(rest)) == least
    for members, chosen in zip(found.experts, found.representatives, strict=True):
        mean = marks[:, members].mean(1, keepdims=True)
        far = np.abs(marks[:, members] - mean).sum(0)
        assert chosen in members
        assert far[list(members).index(chosen)] == pytest.approx(far.min())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_layer_is_the_shared_part_and_the_chosen_parts(top_k, stories, measured, network, tmp_path):
    """The whole layer written out: neurons by number, scores of representatives, a plain sum."""
    mlp, tokens = network
    init = {"name": "cmoe", "statistics": str(measured.path)}
    recipe = {"moe": {**CUT, "top_k": top_k}, "init": init, "router": {"name": "analytic"}}
    convert(stories, tmp_path / "moe", recipe)
    layer = upcycle.open(tmp_path / "moe", dtype=torch.float32).model.layers[2].mlp
    share = measured.of("neurons", "layers", 2, "co_marker").astype(np.float64)
    parts = groups(np.rint(share * measured.provenance["tokens"]["layers"]), 3, 43)
    with torch.no_grad():
        inner = F.silu(mlp.gate_proj(tokens)) * mlp.up_proj(tokens)
        gate, up = (F.normalize(m.weight, dim=1)[parts.representatives] for m in (mlp.gate_proj, mlp.up_proj))
        chosen = ((tokens @ up.T) * F.silu(tokens @ gate.T)).abs().topk(top_k, dim=1).indices
        down = mlp.down_proj.weight
        wanted = inner[:, parts.shared] @ down[:, parts.shared].T
        for e, members in enumerate(parts.experts):
            wanted += (chosen == e).any(1)[:, None] * (inner[:, members] @ down[:, members].T)
        found = layer(tokens[None])[0]
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    built = blueprint(stories, recipe)
    assert built.preserves_function == (top_k == 3)
    if top_k == 3:
        assert torch.allclose(found, mlp(tokens), atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("moe", "router", "init", "said"),
    [
        ({}, {"name": "analytic"}, {"statistics": ""}, "--collect co_marker"),
        ({"num_experts": 4, "shared_experts": 1}, {"name": "analytic"}, {}, "for 4 [+] 1"),
        ({}, {"name": "analytic", "activation": "gelu"}, {}, "has silu; give that"),
        ({"target": "mixtral"}, {}, {}, "mixtral has no shared expert"),
    ],
)
def test_mistakes_are_named(moe, router, init, said, stories, measured):
    table = {"name": "cmoe", "statistics": str(measured.path), **init}
    with pytest.raises(UpcycleError, match=said):
        blueprint(stories, Recipe.of(moe={**CUT, **moe}, router=router, init=table))


def test_marks_are_for_gated_networks_without_biases(tmp_path):
    bert = tiny.make(tmp_path / "bert", "BertForMaskedLM")
    (tmp_path / "a.txt").write_text("a")
    options = {"text": tmp_path / "a.txt", "collect": ("co_marker",), "device": "cpu"}
    with pytest.raises(UpcycleError, match="gated networks without biases, and those of bert are not"):
        calibrate(bert, tmp_path / "out.safetensors", **options)


def test_a_weighing_shared_expert_is_refused(dense, tmp_path):
    source = dense("qwen2")
    found = tiny.make_statistics(tmp_path / "found.safetensors", source, marked=True)
    recipe = {"moe": {**CUT, "target": "native"}, "init": {"name": "cmoe", "statistics": str(found)}}
    with pytest.raises(UpcycleError, match="qwen2_moe weighs it; set moe"):
        blueprint(source, recipe)
