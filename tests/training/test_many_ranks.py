"""8 and 16 processes compute what one computes: with copies, with experts that do not divide the world."""

from __future__ import annotations

import pytest
from test_parallel import losses, same_gradients, table

import gloo
import ranks
from tiny import make_dense
from upcycle.training import loop
from upcycle.training.run import Run

pytestmark = pytest.mark.many_ranks

EIGHT = [{"replicate": 2, "fsdp": 4, "ep": 4}, {"fsdp": 8}, {"replicate": 2, "fsdp": 2, "tp": 2, "ep": 4}]
SIXTEEN = [{"replicate": 2, "fsdp": 8, "ep": 4}, {"fsdp": 16}, {"fsdp": 8, "tp": 2, "ep": 4}]
CHANGES = {
    "moe": {"num_experts": 12, "top_k": 2},
    "train": {"steps": 1, "batch_tokens": 256, "sequence_length": 16, "clip_grad_norm": 0.0},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_dense(tmp_path_factory.mktemp("many") / "llama", "llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def one_process(llama):
    return ranks.gradients(llama, [({}, CHANGES)])[0]


@pytest.mark.parametrize("layouts", [EIGHT, SIXTEEN], ids=["eight", "sixteen"])
def test_gradients_are_those_of_one_process(llama, one_process, layouts):
    world = 8 if layouts is EIGHT else 16
    for result in gloo.run(world, "ranks:gradients", llama, [(layout, CHANGES) for layout in layouts]):
        for found in result:
            same_gradients(found, one_process)


def test_a_run_goes_on_at_another_layout(trainable, tmp_path):
    """Two copies of four ranks, stopped after step 3 and gone on as eight, as four times two, and as one."""
    source, text = trainable
    start = table(str(source), tmp_path / "whole", text, parallel=EIGHT[0])
    start["moe"] = CHANGES["moe"]
    gloo.run(8, "ranks:trains", [(start, False)])
    jobs = []
    for number, layout in enumerate([*EIGHT[1:], {}]):
        out = tmp_path / str(number)
        (out / "checkpoints").mkdir(parents=True)
        (out / "checkpoints" / "step-3").symlink_to(tmp_path / "whole" / "checkpoints" / "step-3")
        (out / "run.json").write_text((tmp_path / "whole" / "run.json").read_text())
        jobs.append(({**start, "out": str(out), "parallel": layout}, True))
    calls = [("trains", (jobs[:-1],))]
    checkpoint = str(tmp_path / "whole" / "checkpoints" / "step-3")
    calls += [("restored", (job, checkpoint)) for job, _ in jobs[:-1]]
    results = gloo.run(8, "ranks:several", calls)
    loop.train(Run.of(jobs[-1][0]), resume=True)
    for number in range(len(jobs)):
        found = losses(tmp_path / str(number))
        assert found == pytest.approx(losses(tmp_path / "whole")[3:], abs=1e-5)
    reference = ranks.restored(jobs[-1][0], checkpoint)
    assert any("experts" in name for name in reference["parameters"])
    for result in results:
        for restored in result[1:]:
            assert restored == reference
