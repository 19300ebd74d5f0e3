"""`upcycle train --dry-run`: what each rank of a world would hold, on one process that writes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from files import toml
from marks import sampled
from tiny import make_dense
from upcycle import Recipe, UpcycleError, blueprint, cli
from upcycle.training import chunked_entropy
from upcycle.training.rehearsal import rehearse
from upcycle.training.run import Run

MOE = {"moe": {"num_experts": 4, "top_k": 2}, "init": {"name": "copy"}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("source") / "dense", "llama", dtype="bfloat16")


def table(source: Path, **changes: Any) -> dict[str, Any]:
    return {
        "source": str(source),
        "out": str(source.parent / "run"),
        "data": {"sources": [{"path": str(source / "config.json")}]},
        "train": {"steps": 2, "batch_tokens": 128, "sequence_length": 16},
        "schedule": {"name": "constant", "peak": 1e-3},
        **MOE,
        **changes,
    }


def test_one_process_holds_the_whole(source: Path) -> None:
    built = blueprint(source, Recipe.of(MOE))
    shapes = [entry.shape for entry in built.entries.values()]
    elements = sum(map(math.prod, shapes))
    found = rehearse(Run.of(table(source)))
    (held,) = found.ranks
    assert found.parameters == elements
    assert (held.weights, held.gradients) == (4 * elements, 4 * elements)
    assert 0 <= held.moments - 8 * elements <= 4 * len(shapes)  # and the number of updates of each tensor
    assert held.reads == built.nbytes  # bfloat16
    assert held.over_even_share == 1
    assert (found.stepped, found.not_stepped) == (2, None)
    assert (found.rows, found.tokens_per_step) == (8, 128)


FOUR = [{"fsdp": 4}, {"fsdp": 4, "ep": 4}, {"fsdp": 2, "ep": 2, "replicate": 2}]


@pytest.mark.parametrize(
    "layout", [*FOUR[:1], *(pytest.param(layout, marks=pytest.mark.slow) for layout in FOUR[1:])]
)
def test_the_ranks_hold_the_whole_together(layout: dict[str, int], source: Path) -> None:
    (alone,) = rehearse(Run.of(table(source))).ranks
    found = rehearse(Run.of(table(source, parallel=layout)), world=4)
    held = found.ranks
    assert [each.rank for each in held] == [0, 1, 2, 3]
    assert sum(each.weights for each in held) == alone.weights * layout.get("replicate", 1)
    assert sum(each.reads for each in held) == alone.reads * layout.get("replicate", 1)
    assert max(each.over_even_share for each in held) < 1.2
    assert all(each.gradients == each.weights for each in held)
    assert (found.stepped, found.not_stepped) == (2, None)


@pytest.mark.parametrize(
    "layout", sampled([{"fsdp": 2, "tp": 2, "ep": 4}, {"fsdp": 2, "tp": 2}, {"tp": 2}], 3)
)
def test_steps_of_tensor_parallel_ranks(
    layout: dict[str, int], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits in chunks, of which each rank has those of some words."""
    monkeypatch.setattr(chunked_entropy, "WORTH", 0)
    world = layout["tp"] * layout.get("fsdp", 1)
    changes = {"parallel": layout, "train": {**table(source)["train"], "activation_checkpointing": True}}
    found = rehearse(Run.of(table(source, **changes)), world=world)
    assert (found.stepped, found.not_stepped) == (2, None)


def test_no_warning_of_views(source: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Gradients at such layouts are those of one process (`test_parallel.py`), so torch warns of nothing."""
    rehearse(Run.of(table(source, parallel={"tp": 2, "ep": 4})), world=8)
    assert not [str(each.message) for each in recwarn if "FSDP2-wrapped" in str(each.message)]


@pytest.mark.parametrize("layout", [{}, {"ep": 2}])
def test_single_experts_that_are_not_trained(layout: dict[str, int], source: Path) -> None:
    """Which of a stack a rank has is told by numbers, and not by tensors."""
    train = {**table(source)["train"], "freeze": ["experts[0]"]}
    found = rehearse(Run.of(table(source, parallel=layout, train=train)), world=2)
    assert (len(found.ranks), found.stepped, found.not_stepped) == (2, 2, None)


@pytest.mark.parametrize("name", ["ernie4_5", "hunyuan_v1_dense"])
def test_steps_of_routers_that_their_class_keeps_in_float32(name: str, tmp_path: Path) -> None:
    """Two ranks in bfloat16: FSDP reduces gradients of one type in a group."""
    source = make_dense(tmp_path / name, name, num_hidden_layers=2)
    for precision in ("bfloat16", "mixed"):
        changes = {"train": {**table(source)["train"], "precision": precision}}
        found = rehearse(Run.of(table(source, **changes)), world=2)
        assert (found.stepped, found.not_stepped) == (2, None)


def test_the_command(source: Path, capsys: Any) -> None:
    """It says what a run would refuse, and leaves nothing behind."""
    before = sorted(source.parent.rglob("*"))
    file = source.parent / "run.toml"
    file.write_text(toml(table(source, parallel={"fsdp": 2})))
    cli.main(["train", str(file), "--dry-run", "--world", "2", "--json"])
    assert [held["rank"] for held in json.loads(capsys.readouterr().out)["ranks"]] == [0, 1]
    cli.main(["train", str(file), "--dry-run", "--world", "2"])
    assert "2 processes (fsdp 2), float32" in capsys.readouterr().out
    for arguments, said in (
        (["--dry-run", "--world", "3"], "ask for 2 process(es) and there are 3"),
        (["--dry-run", "--world", "0"], "world = 0; it must be 1 or more"),
        (["--world", "2"], "belong to --dry-run"),
        (
            ["--dry-run", "--world", "2", "--set", "train.batch_tokens=48"],
            "2 data-parallel ranks cannot share",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", str(file), *arguments])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    file.unlink()
    assert sorted(source.parent.rglob("*")) == before


def test_a_dry_run_is_one_process(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UpcycleError, match="start it without torchrun and give --world"):
        rehearse(Run.of(table(source)), world=2)
