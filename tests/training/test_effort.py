"""The arithmetic of a step that trains a part, against torch's own count of a real one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ranks
import tiny
from upcycle.forecast import time
from upcycle.forecast.setting import Setting
from upcycle.sharding.layout import Layout
from upcycle.training import effort, enter, optimizer, rehearsal, step
from upcycle.training.course import Course
from upcycle.training.parallel import ranks as world

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
PARTS = {
    "everything": {},
    "no embeddings": {"freeze": ("embeddings",)},
    "the head": {"only": ("head",)},
    "the last block": {"only": ("*.layers.2.*",)},
    "the router": {"only": ("router",)},
    "all but experts": {"freeze": ("experts",)},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(tiny.make_dense(tmp_path_factory.mktemp("effort") / "dense", "llama", **SIZES))


def run_of(source, **changes):
    router = {"balance_loss_coef": 0.0, "z_loss_coef": 0.0}
    return ranks.run_of(source, {}, {"init": {"name": "copy"}, "router": router, **changes})


@pytest.mark.parametrize("part", PARTS)
def test_flops_of_a_part_are_those_that_torch_counts(part, source):
    """Rows of 16 tokens, where attention scores are little; within a tenth of a forward pass."""
    chosen = {k: list(v) for k, v in PARTS[part].items()}
    run = run_of(source, train={"experts_implementation": "eager", "attn_implementation": "eager", **chosen})
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    course = Course(run)
    anatomy = enter.anatomy_of(course, trainee.start, trainee.model, trainee.routers)
    if anatomy is not None:
        enter.prepared(run, trainee.model, trainee.start, trainee.routers, anatomy)
        trainee = replace(trainee, optimizer=optimizer.make(trainee.model, run.optimizer))
    batch = ranks.batch_of(run, trainee.task)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        trainee.logits(trainee.task.question(batch, trainee.start.subject, training=True))
    with FlopCounterMode(display=False) as whole:
        step.train_step(trainee, batch, 0, 1e-3)
    counted = whole.get_total_flops() / forward.get_total_flops()
    flops = effort.flops_per_row(trainee.start, anatomy, course.legs[0], trainee.lengths)
    found = 3 * flops / trainee.start.training_flops_per_row(trainee.lengths)
    assert found == pytest.approx(counted, abs=0.1)


def test_a_forecast_of_a_part_counts_what_the_mfu_of_a_run_counts(source):
    """The whole scores of attention, which count for more, the longer the row."""
    run = run_of(source, train={"only": ["router"], "sequence_length": 512, "batch_tokens": 512})
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    course = Course(run)
    anatomy = enter.anatomy_of(course, trainee.start, trainee.model, trainee.routers)
    lengths = {"layers": 512}
    flops = effort.flops_per_row(trainee.start, anatomy, course.legs[0], lengths, all_scores=True)
    _, passes = rehearsal.trained(run, lengths)
    built = trainee.start.built
    setting = Setting(built=built, layout=Layout(), lengths=lengths, effort=passes)
    assert time.flops(setting, recomputed=False) == pytest.approx(flops, rel=1e-6)
