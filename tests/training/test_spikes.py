"""Steps that stand out or are not finite: said, skipped on the device, or passed after going back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from marks import quick
from upcycle import UpcycleError
from upcycle.system.progress import Unheard, reporting_to
from upcycle.training import ledger, step
from upcycle.training.export import export
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.run import Run
from upcycle.training.sections import Spikes
from upcycle.training.spikes import Pace, Recent

CPU = torch.device("cpu")


def test_what_stands_out_is_told_by_the_formula():
    """Against the plain mean and deviation of the last window, for losses and norms of any size."""
    settings = Spikes(sigma=3.0, window=8)
    recent, known = Recent(settings, CPU), []
    draw = torch.Generator().manual_seed(0)
    found = []
    for number in range(60):
        loss, norm = (2 + 0.1 * torch.randn(2, generator=draw).double()).tolist()
        loss += 0.5 * (number in (20, 41))
        norm += 9.0 * (number == 30)
        loss = math.nan if number in (25, 2) else loss
        finite = math.isfinite(loss)
        wanted = False
        if finite and len(known) >= 4:
            for at, now in enumerate((loss, norm)):
                spread, mean = torch.std_mean(torch.tensor([pair[at] for pair in known[-8:]]).double())
                wanted = wanted or now - float(mean) > 3 * float(spread)
        out = recent.judge(*torch.tensor([loss, norm], dtype=torch.float64), torch.tensor(finite))
        assert bool(out) == wanted, number
        known += [(loss, norm)] * finite
        found += [number] * bool(out)
        assert recent.known() == tuple(known[-8:])
        again = Recent(settings, CPU)
        again.restore(recent.known())
        assert again.known() == recent.known()
    assert {20, 30, 41} <= {*found}


def test_training_that_becomes_slow_is_said_once():
    pace = Pace(least=0.5)
    speeds = [100.0] * 40 + [30.0] * 20 + [100.0] * 30 + [10.0] * 20
    found = [number for number, speed in enumerate(speeds) if pace.falls(speed)]
    assert len(found) == 2
    assert found[0] in range(40, 50)
    assert found[1] in range(90, 100)
    assert not any(Pace(least=0.5).falls(s) for s in [100.0] * 19 + [1.0] * 9)


class Said(Unheard):
    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.say = self.warn = self.sentences.append  # type: ignore[method-assign]


@pytest.fixture
def harmed(monkeypatch) -> Iterator[dict]:
    """What is done to the gradients of a batch, by the first token of its first row; and the batches seen."""
    seen: dict = {"rows": [], "factor": {}}
    queue, squared = step.queue_step, step.gradients.squared_norms

    def watched(trainee, batch, number, *rest):
        seen["rows"].append(tuple(batch["rows"][0].tolist()))
        return queue(trainee, batch, number, *rest)

    def harm(grads):
        factor = seen["factor"].get(seen["rows"][-1])
        if factor is not None:
            for gradient in grads.values():
                gradient *= factor
        return squared(grads)

    monkeypatch.setattr(step, "queue_step", watched)
    monkeypatch.setattr(step.gradients, "squared_norms", harm)
    return seen


def table(trainable, out: Path, **changes) -> dict:
    source, text = trainable
    made = {
        "source": str(source),
        "out": str(out),
        "moe": {"num_experts": 4, "top_k": 2},
        "data": {"sources": [{"path": str(text), "separator": "<|endoftext|>"}]},
        "train": {"steps": 9, "batch_tokens": 128, "sequence_length": 64, "eval_every": 0},
        "schedule": {"name": "constant", "peak": 1e-3},
        "checkpoint": {"every": 3, "keep": 9},
        "spikes": {"window": 8, "sigma": 20.0},
    }
    for key, value in changes.items():
        made[key] = {**made.get(key, {}), **value}
    return made


@pytest.fixture(scope="module")
def quiet(trainable, tmp_path_factory):
    """The run that nothing happens to: its losses, and the batches that it saw."""
    out, rows = tmp_path_factory.mktemp("quiet"), []
    queue = step.queue_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            step,
            "queue_step",
            lambda t, b, *rest: rows.append(tuple(b["rows"][0].tolist())) or queue(t, b, *rest),
        )
        train(Run.of(table(trainable, out)))
    return [r.loss for r in read(out)], rows


def weights(run: dict, at: int, out: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    export(run["out"], out, step=at)
    return AutoModelForCausalLM.from_pretrained(out).state_dict()


HARMS = {"spike": 1e4, "nan": math.nan}


@pytest.mark.parametrize("harm", quick(HARMS, "nan"))
def test_a_bad_step_is_skipped(harm, trainable, quiet, harmed, tmp_path):
    """The weights after it are those before it, and a resumed run does the same."""
    losses, rows = quiet
    harmed["factor"] = {rows[6]: HARMS[harm]}
    run = table(
        trainable, tmp_path / "run", spikes={"act": "skip", "nonfinite": "skip"}, checkpoint={"every": 1}
    )
    said = Said()
    with reporting_to(said):
        assert train(Run.of(run)).finished
    lines = read(tmp_path / "run")
    assert [line.skipped for line in lines] == [None] * 6 + [
        "stands out" if harm == "spike" else "not finite"
    ] + [None] * 2
    assert [line.loss for line in lines[:7]] == losses[:7]
    assert (
        sum("step 7: the loss is" in each and "weights were not updated" in each for each in said.sentences)
        == 1
    )
    before, after = (weights(run, at, tmp_path / str(at)) for at in (6, 7))
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = {**run, "out": str(tmp_path / "again")}
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    (tmp_path / "again" / "checkpoints" / "step-5").symlink_to(tmp_path / "run" / "checkpoints" / "step-5")
    train(Run.of(again), resume=True)
    assert [line.loss for line in read(tmp_path / "again")] == [line.loss for line in lines[5:]]


def test_a_spike_is_only_said_if_nothing_is_asked(trainable, quiet, harmed, tmp_path):
    harmed["factor"] = {quiet[1][6]: 1e4}
    said = Said()
    with reporting_to(said):
        train(Run.of(table(trainable, tmp_path / "run")))
    assert all(line.skipped is None for line in read(tmp_path / "run"))
    assert sum("step 7: the loss is" in each and "stands out" in each for each in said.sentences) == 1


@pytest.mark.parametrize("harm", quick(HARMS, "spike"))
def test_a_run_goes_back_and_passes_the_bad_batch(harm, trainable, quiet, harmed, tmp_path):
    """From the checkpoint of step 6: the eighth batch is not seen again, nor by a run that goes on later."""
    losses, rows = quiet
    harmed["factor"] = {rows[7]: HARMS[harm]}
    run = table(trainable, tmp_path / "run", spikes={"act": "roll_back", "nonfinite": "roll_back"})
    said = Said()
    with reporting_to(said):
        assert train(Run.of(run)).finished
    lines = read(tmp_path / "run")
    assert [line.step for line in lines] == [*range(1, 10)]
    assert [line.loss for line in lines[:7]] == losses[:7]
    assert harmed["rows"][:8] == rows[:8]
    assert harmed["rows"][8:10] == [rows[6], rows[8]]
    assert said.sentences.count("the run is back at step 6 and passes batch 8") == 1
    # It goes on from any later checkpoint with what it has passed.
    seen, harmed["rows"] = harmed["rows"], []
    assert train(Run.of({**run, "train": {**run["train"], "steps": 11}}), resume=True).finished
    assert not {*harmed["rows"]} & {*seen}


def test_the_pace_of_another_stage_is_no_measure(trainable, quiet, harmed, tmp_path, monkeypatch):
    """The first step of stage 2 takes the run back to stage 1, and the second one to the first of stage 2."""
    paces: list[list[float]] = []

    class Watched(Pace):
        def falls(self, tokens_per_s: float) -> tuple[float, float] | None:
            if not self._speeds:
                paces.append([])
            paces[-1].append(tokens_per_s)
            return super().falls(tokens_per_s)

    monkeypatch.setattr(ledger, "Pace", Watched)
    harmed["factor"] = dict.fromkeys([quiet[1][3], quiet[1][5]], math.nan)
    stages = [{"train": {"steps": 3, "only": ["router"]}}, {"train": {"steps": 3}}]
    run = table(trainable, tmp_path, spikes={"nonfinite": "roll_back"}, checkpoint={"every": 1})
    del run["train"]["steps"]
    assert train(Run.of({**run, "stage": stages})).finished
    assert list(map(len, paces)) == [3, 1, 4]


def test_a_run_that_does_not_get_past_bad_steps_ends(trainable, quiet, harmed, tmp_path):
    harmed["factor"] = dict.fromkeys(quiet[1], math.nan)
    for act, message in (
        ("skip", "3 steps in a row were skipped"),
        ("roll_back", "went back to step 3 2 times"),
    ):
        run = table(trainable, tmp_path / act, spikes={"nonfinite": act, "most": 2})
        harmed["factor"] = dict.fromkeys(quiet[1][3:], math.nan)
        with pytest.raises(UpcycleError, match=message):
            train(Run.of(run))
    run = table(trainable, tmp_path / "none", spikes={"nonfinite": "roll_back", "most": 2})
    harmed["factor"] = dict.fromkeys(quiet[1], math.nan)
    with pytest.raises(UpcycleError, match="3 steps in a row were skipped"):  # before the first checkpoint
        train(Run.of(run | {"checkpoint": {"every": 9}}))
    with pytest.raises(UpcycleError, match=r"checkpoint\.every = 0 writes none"):
        Run.of(table(trainable, tmp_path, spikes={"act": "roll_back"}, checkpoint={"every": 0}))


def test_a_step_that_is_not_finite_moves_no_bias(dense, trainable, tmp_path, harmed):
    """With torch's optimizer and with one of our own, which both skip on the device."""
    ernie = dense("ernie4_5", vocab_size=512)
    changes = {"router": {"bias_update_rate": 0.01}, "data": {"tokenizer": str(trainable[0])}}
    for name in ("adamw", "adafactor"):
        run = table((ernie, trainable[1]), tmp_path / name, spikes={"nonfinite": "skip"}, train={"steps": 3},
                    optimizer={"name": name}, checkpoint={"every": 1}, **changes)  # fmt: skip
        harmed["rows"].clear()
        harmed["factor"] = {}
        train(Run.of({**run, "out": str(tmp_path / f"{name} quiet")}))
        harmed["factor"] = {harmed["rows"][1]: math.nan}
        train(Run.of(run))
        one, two, three = (weights(run, at, tmp_path / f"{name}-{at}") for at in (1, 2, 3))
        assert all(torch.equal(one[key], two[key]) for key in one)
        moved = {key for key in one if not torch.equal(two[key], three[key])}
        assert any(key.endswith("e_score_correction_bias") for key in moved)
