"""The forecast of a step against torch's own counts in a world of fake ranks."""

from __future__ import annotations

import pytest
import torch

import simulated
import tiny
from upcycle.blueprints.blueprint import blueprint
from upcycle.forecast import head, memory, traffic
from upcycle.forecast.setting import Setting
from upcycle.recipe import Recipe
from upcycle.sharding.layout import Layout
from upcycle.training import chunked_entropy

ROWS, LENGTH = 2, 64
NATIVE = {"num_experts": 8, "top_k": 2}
UPCYCLED = {**NATIVE, "target": "upcycled", "layers": [0, 2]}
STEPS = [  # the MoE, whether the head is tied, the layout, what is recomputed, the precision
    (NATIVE, False, Layout(fsdp=8), "selective", "mixed"),
    (NATIVE, False, Layout(fsdp=8, ep=4), True, "mixed"),
    (UPCYCLED, True, Layout(replicate=2, fsdp=4, ep=4), False, "bfloat16"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Headers of small Llamas by whether the head is tied to the embedding: nothing reads their weights."""
    config = {
        **tiny.SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512,
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("forecast")
    return {
        tied: tiny.make_headers(folder / f"llama-{tied}", {**config, "tie_word_embeddings": tied})
        for tied in (False, True)
    }


@pytest.fixture(scope="module")
def both(sources):
    """A function that gives the setting and what torch counts of it, simulated once a step."""
    done: dict[int, tuple[Setting, simulated.Step]] = {}

    def of(number: int):
        if number not in done:
            moe, tied, layout, recompute, precision = STEPS[number]
            built = blueprint(sources[tied], Recipe.of(moe=moe))
            setting = Setting(
                built=built, layout=layout, lengths={"layers": LENGTH}, rows=ROWS, recompute=recompute,
                precision=precision,
            )  # fmt: skip
            step = simulated.step(
                built, layout, rows=ROWS, length=LENGTH, recompute=recompute, precision=precision
            )
            done[number] = setting, step
        return done[number]

    return of


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_collectives_are_those_that_torch_dispatches(both, number):
    """The number of calls and their bytes, by kind and number of ranks."""
    setting, step = both(number)
    assert traffic.by_kind(traffic.collectives(setting)) == step.traffic


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_the_peak_is_the_one_that_torch_tracks(both, number):
    """The most bytes alive in a step, within 10 %."""
    setting, step = both(number)
    assert memory.peak(setting).total == pytest.approx(step.peak, rel=0.1)


def test_the_next_block_is_gathered_before_a_layer_waits(both):
    """Each layer reads how many rows it sends to and gets from each of four ranks, in forward order first."""
    setting, step = both(1)
    assert len(setting.groups) == 8  # embedding, three blocks and their experts, and the head
    assert step.waits[:24:8] == (5, 7, 8)


@pytest.mark.parametrize(
    "layout", [Layout(fsdp=8, ep=4), Layout(fsdp=2, tp=2), Layout(fsdp=4, tp=2, ep=4)], ids=str
)
def test_logits_in_chunks(layout, sources, monkeypatch):
    """128 tokens in two chunks, or in one of as many as there are hidden states' bytes for."""
    for module, name in ((head, "CHUNKED"), (chunked_entropy, "WORTH")):
        monkeypatch.setattr(module, name, 0)
    built = blueprint(sources[False], Recipe.of(moe=NATIVE))
    setting = Setting(built=built, layout=layout, lengths={"layers": LENGTH}, rows=ROWS, recompute=True)
    step = simulated.step(built, layout, rows=ROWS, length=LENGTH, recompute=True)
    assert traffic.by_kind(traffic.collectives(setting)) == step.traffic
    assert memory.peak(setting).total == pytest.approx(step.peak, rel=0.1)


LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.true_size
@pytest.mark.parametrize(
    ("layout", "length", "recompute"),
    [
        (Layout(fsdp=64, ep=8), 8192, True),
        (Layout(fsdp=64, ep=8), 8192, "selective"),
        (Layout(fsdp=128, ep=8), 2048, True),
        (Layout(fsdp=64), 4096, True),
        (Layout(replicate=8, fsdp=64, ep=8), 8192, True),
    ],
)
def test_llama_3_8b(tmp_path, layout, length, recompute):
    """The same of Llama 3 8B with 8 experts and all layers; `benchmarks/forecast.py` has more."""
    built = blueprint(tiny.make_headers(tmp_path / "llama", LLAMA_8B), Recipe.of(moe=NATIVE))
    setting = Setting(built=built, layout=layout, lengths={"layers": length}, recompute=recompute)
    step = simulated.step(built, layout, rows=1, length=length, recompute=recompute)
    assert traffic.by_kind(traffic.collectives(setting)) == step.traffic
    assert memory.peak(setting).total == pytest.approx(step.peak, rel=0.1)


def test_many_logits_are_foretold_in_chunks(tmp_path):
    """From as many logits on as `training/chunked_entropy.py` says; a chunk takes about what states take."""
    assert head.CHUNKED == chunked_entropy.WORTH
    built = blueprint(tiny.make_headers(tmp_path / "llama", LLAMA_8B), Recipe.of(moe=NATIVE))
    words, hidden = LLAMA_8B["vocab_size"], LLAMA_8B["hidden_size"]
    for layout, tokens, chunk, mine in (
        (Layout(), 8192, 256, words),
        (Layout(), 512, None, words),
        (Layout(fsdp=8, ep=8), 8192, 256, words),
        (Layout(fsdp=8, tp=2), 8192, 512, words // 2),
    ):
        found = head.of(Setting(built=built, layout=layout, lengths={"layers": tokens}))
        assert (found.chunk, found.words) == (chunk, mine)
        if chunk:
            states, weight = (
                torch.empty(tokens, hidden, device="meta"),
                torch.empty(mine, hidden, device="meta"),
            )
            assert chunked_entropy._size(states, weight) == chunk
