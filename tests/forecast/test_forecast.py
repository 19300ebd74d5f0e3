"""The forecast of a step against torch's own counts in a world of fake ranks."""

from __future__ import annotations

import functools

import pytest
import simulated

import tiny
from upcycle.blueprints.blueprint import blueprint
from upcycle.forecast import memory, traffic
from upcycle.forecast.setting import Setting
from upcycle.recipe import Recipe
from upcycle.sharding.layout import Layout

ROWS, LENGTH = 2, 64
LAYOUTS = [
    (Layout(fsdp=8), False),
    (Layout(fsdp=8, ep=4), True),
    (Layout(replicate=2, fsdp=4, ep=4), False),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Headers of a small Llama: nothing reads its weights."""
    config = {
        **tiny.SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512,
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    return tiny.make_headers(tmp_path_factory.mktemp("forecast") / "llama", config)


@pytest.fixture(scope="module")
def both(source):
    """A function that gives the setting and what torch counts of it, simulated once a layout."""

    @functools.cache
    def of(layout: Layout, recompute: bool = False):
        built = blueprint(source, Recipe.of(moe={"num_experts": 8, "top_k": 2}))
        setting = Setting(
            built=built, layout=layout, lengths={"layers": LENGTH}, rows=ROWS, recompute=recompute
        )
        return setting, simulated.step(built, layout, rows=ROWS, length=LENGTH, recompute=recompute)

    return of


@pytest.mark.parametrize(("layout", "recompute"), LAYOUTS)
def test_collectives_are_those_that_torch_dispatches(both, layout, recompute):
    """The number of calls and their bytes, by kind and number of ranks."""
    setting, step = both(layout, recompute)
    assert traffic.by_kind(traffic.collectives(setting)) == step.traffic


@pytest.mark.parametrize(("layout", "recompute"), LAYOUTS)
def test_the_peak_is_the_one_that_torch_tracks(both, layout, recompute):
    """The most bytes alive in a step, within 10 %."""
    setting, step = both(layout, recompute)
    assert memory.peak(setting).total == pytest.approx(step.peak, rel=0.1)
