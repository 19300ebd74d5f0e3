"""The forecast of a step against torch's own counts in a world of fake ranks."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import simulated
import tiny

from upcycle.blueprints.blueprint import blueprint
from upcycle.forecast import traffic
from upcycle.forecast.setting import Setting
from upcycle.recipe import Recipe
from upcycle.sharding.layout import Layout

ROWS, LENGTH = 2, 64
LAYOUTS = [
    Layout(fsdp=8),
    Layout(fsdp=8, ep=4),
    Layout(replicate=2, fsdp=4, ep=4),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Headers of a small Llama: nothing reads its weights."""
    config = {
        **tiny.SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64, "torch_dtype": "bfloat16",
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_collectives_are_those_that_torch_dispatches(both, layout):
    """The number of calls and their bytes, by kind and number of ranks."""
    setting, step = both(layout)
    times: Counter = Counter()
    total: Counter = Counter()
    for each in traffic.collectives(setting):
        times[each.kind, each.ranks] += each.times
        total[each.kind, each.ranks] += each.total
    assert {kind: (times[kind], total[kind]) for kind in times} == step.traffic
