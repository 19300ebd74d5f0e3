"""The forecast of a step against torch's own counts in a world of fake ranks."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import ranks
import simulated
import tiny
from marks import sampled
from upcycle.api.forecasting import foretell_run
from upcycle.blueprints.cost import flops_per_row
from upcycle.blueprints.making import blueprint
from upcycle.forecast import head, memory, time, traffic
from upcycle.forecast.setting import Setting
from upcycle.recipe import Recipe
from upcycle.sharding.layout import Layout
from upcycle.training import chunked_entropy, optimizers
from upcycle.training.rehearsal import rehearse

ROWS, LENGTH = 2, 64
NATIVE = {"num_experts": 8, "top_k": 2}
UPCYCLED = {**NATIVE, "target": "upcycled", "layers": [0, 2]}
STEPS = [  # the MoE, whether the head is tied, the layout, what is recomputed, the precision
    (NATIVE, False, Layout(fsdp=8), "selective", "mixed"),
    (NATIVE, False, Layout(fsdp=8, ep=4), True, "mixed"),
    (UPCYCLED, True, Layout(replicate=2, fsdp=4, ep=4), False, "bfloat16"),
    (UPCYCLED, False, Layout(fsdp=8, ep=4), True, "mixed"),  # routers are groups of their own
    (UPCYCLED, False, Layout(fsdp=8), False, "mixed"),
    ({**UPCYCLED, "shared_experts": 1}, False, Layout(fsdp=8), False, "mixed"),
    ({**UPCYCLED, "shared_experts": 1}, False, Layout(fsdp=8), "selective", "bfloat16"),
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


@pytest.mark.parametrize(
    "layout", sampled([Layout(fsdp=8), Layout(fsdp=8, ep=4), Layout(replicate=2, fsdp=2, tp=2)], 1), ids=str
)
@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon", "sgd"])
def test_an_update_with_collectives_of_its_own_is_said_to_be_left_out(name, layout, sources):
    """torch dispatches some for exactly the optimizers of which a forecast says that they are not counted."""
    settings = optimizers.find(name)()
    sent = simulated.update(blueprint(sources[False], Recipe.of(moe=NATIVE)), layout, settings)
    assert bool(sent) == (settings.not_foretold is not None)


@pytest.mark.parametrize("layout", [Layout(fsdp=8), Layout(fsdp=2, ep=2)], ids=str)
@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw_8bit", "muon", "sgd"])
def test_what_an_update_works_with_is_what_torch_tracks(name, layout, sources):
    """No less, and no more than a fifth beside: products of Muon go by the shape of a matrix."""
    if name == "adamw_8bit":
        pytest.importorskip("torchao", reason="torchao is not installed")
    settings, built = optimizers.find(name)(), blueprint(sources[False], Recipe.of(moe=NATIVE))
    found = simulated.update_peak(built, layout, settings)
    setting = Setting(
        built=built, layout=layout, lengths={"layers": LENGTH}, rows=ROWS,
        update=functools.partial(settings.update_bytes, width=4),
    )  # fmt: skip
    assert 0.995 * found <= memory.update(setting) <= 1.2 * found
    assert (found == 0) == (name in ("adamw", "sgd"))


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
    "layout",
    sampled([Layout(fsdp=8, ep=4), Layout(fsdp=2, tp=2), Layout(fsdp=4, tp=2, ep=4)], 3),
    ids=str,
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


def test_logits_in_chunks_beside_a_teacher_and_with_a_frozen_head(tmp_path):
    """As `trainee.py` has it: tensor parallelism compares all logits, and FSDP leaves a teacher no head."""
    built = blueprint(tiny.make_headers(tmp_path / "llama", LLAMA_8B), Recipe.of(moe=NATIVE))
    words, hidden, lengths = LLAMA_8B["vocab_size"], LLAMA_8B["hidden_size"], {"layers": 8192}

    def logits(layout, **changes):
        setting = Setting(built=built, layout=layout, lengths=lengths, recompute=True, **changes)
        return next(memory.moments(setting)).logits

    for layout, more in ((Layout(), 256 * words * 2), (Layout(fsdp=8, ep=8), 8192 * words * 2)):
        extra = logits(layout, teacher=built.dense) - logits(layout)
        assert extra == more + 256 * words * memory.LOGITS_TAUGHT
    taught = Setting(built=built, layout=Layout(fsdp=8, tp=2), lengths=lengths, teacher=built.dense)
    assert (head.of(taught).chunk, head.of(taught).words) == (None, words)
    names = frozenset(name for group in taught.groups for name in group.names)
    part = logits(Layout(), trained=names - {"lm_head.weight"})
    assert logits(Layout(), trained=names) - part == memory.F32 * words * hidden
    assert logits(Layout(), trained=names) == logits(Layout())


RUNS = {
    "a teacher": {"teacher": {}, "train": {"precision": "mixed"}},
    "8 bits": {"optimizer": {"name": "adamw_8bit"}, "train": {"precision": "bfloat16"}},
    "muon": {"optimizer": {"name": "muon"}},  # whose embeddings and head have two moments
    "a part": {"train": {"freeze": ["experts", "embeddings"]}},
    "routers": {"train": {"only": ["router"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_what_a_rank_holds_is_what_a_dry_run_counts(case, tmp_path):
    """Weights, gradients, moments and the teacher's weights, on eight ranks; 8 bits in a run of bfloat16."""
    if case == "8 bits":
        pytest.importorskip("torchao", reason="torchao is not installed")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
    source = tiny.make_dense(tmp_path / "dense", "llama", **sizes)
    changes = {key: dict(table) for key, table in RUNS[case].items()}
    if "teacher" in changes:
        changes["teacher"]["source"] = str(source)
    train = {"batch_tokens": 8 * 16, **changes.pop("train", {})}
    run = ranks.run_of(
        str(source), {"fsdp": 8, "ep": 4}, {"init": {"name": "copy"}, "train": train, **changes}
    )
    found = foretell_run(run, world=8).held
    counted = max(rehearse(run, world=8).ranks, key=lambda rank: rank.total)
    for part in ("weights", "gradients", "moments", "teacher"):
        assert getattr(found, part) == pytest.approx(getattr(counted, part), rel=0.05), part


def test_a_teacher_masks_and_frozen_parts_change_the_forecast(tmp_path):
    """A teacher's forward pass and weights, the copies of masks that sdpa keeps, reductions that fall out."""
    built = blueprint(tiny.make_headers(tmp_path / "llama", LLAMA_8B), Recipe.of(moe=NATIVE))
    layout, lengths = Layout(fsdp=8, ep=8), {"layers": 4096}
    plain = Setting(built=built, layout=layout, lengths=lengths)
    taught = replace(plain, teacher=built.dense)
    forward = flops_per_row(built.dense, None, lengths, all_scores=True)
    assert time.flops(taught) - time.flops(plain) == forward
    assert memory.peak(taught).total > memory.peak(plain).total + 2 * 8e9 / 8
    for recompute, copies in ((True, 1), (False, 32)):
        setting = replace(plain, recompute=recompute)
        loss, masked = (next(memory.moments(each)).total for each in (setting, replace(setting, masked=True)))
        assert masked - loss == 4096**2 * (1 + 2 * copies)
    names = [name for group in plain.groups for name in group.names]
    routers = frozenset(name for name in names if name.endswith(".gate.weight"))
    part = replace(plain, trained=routers)
    assert memory.held(part).gradients == 4 * 32 * 8 * 4096 / 8
    reduced = [c for c in traffic.collectives(part) if c.kind == "reduce_scatter"]
    assert sum(c.bytes for c in reduced) == 4 * 32 * 8 * 4096


def test_a_mask_of_truth_values_becomes_numbers_that_attention_keeps():
    """What `memory.masks` counts: torch saves the copy, and not the mask that all layers share."""
    saved = []
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.ones(1, 1, 64, 64, dtype=torch.bool))
    assert any(t.dtype == q.dtype and t.shape[-2:] == (64, 64) for t in saved)
