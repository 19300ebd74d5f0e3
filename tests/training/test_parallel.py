"""Several processes compute what one computes: loading, gradients, resuming; each holds its part."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import gloo
import ranks
from marks import quick
from tiny import make_adapter, make_dense
from upcycle import Recipe, convert
from upcycle.checkpoints import checkpoint
from upcycle.system.progress import Unheard, reporting_to
from upcycle.training import loop, saving
from upcycle.training.parallel import ranks as world
from upcycle.training.run import Run

TWO = [{"fsdp": 2}, {"fsdp": 2, "ep": 2}, {"tp": 2}, {"tp": 2, "ep": 2}]
FOUR = [
    {"fsdp": 2, "tp": 2, "ep": 4},
    {"fsdp": 4, "ep": 2},
    {"fsdp": 2, "tp": 2},
]
SHAPE = {"num_experts": 4, "top_k": 2}
HALVES = {"num_experts": 8, "top_k": 4, "granularity": 2}
INITS = [
    ({"name": "copy"}, SHAPE),
    ({"name": "noise"}, SHAPE),
    ({"name": "drop", "ratio": 0.5, "indices": "shared"}, SHAPE),
    ({"name": "drop", "ratio": 0.3, "indices": "independent"}, SHAPE),
    ({"name": "virtual_group"}, HALVES),
    ({"name": "shuffle_slice"}, HALVES),
    ({"name": "split"}, {"num_experts": 4, "top_k": 2, "granularity": 4}),
    ({"name": "branch_train_mix"}, SHAPE),
    ({"name": "experts", "backbone": "slerp"}, SHAPE),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_dense(tmp_path_factory.mktemp("parallel") / "llama", "llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def cases(llama, tmp_path_factory):
    """Recipes for every initialisation and more families, and the digests of what `convert` makes of them."""
    folder = tmp_path_factory.mktemp("converted")
    donor = str(make_dense(folder / "donor", "llama", seed=1, num_hidden_layers=2))
    adapter = str(make_adapter(folder / "adapter", Path(llama)))
    mixed = {"source": donor, "adapter": adapter, "weight": 0.4, "mix": "slerp", "noise": 0.1}
    options = {
        "branch_train_mix": {"sources": [donor] * 3},
        "experts": {"expert": [{}, {"source": donor}, {"adapter": adapter, "weight": 0.5}, mixed]},
    }
    tables = []
    for init, moe in INITS:
        tables.append((llama, {"moe": moe, "init": {**init, **options.get(init["name"], {})}}))
    narrow = str(make_dense(folder / "narrow", "qwen3", dtype="bfloat16", num_hidden_layers=2))
    tables.append((narrow, {"moe": {**SHAPE, "layers": [1]}, "init": {"name": "drop"}}))
    shared = str(make_dense(folder / "qwen2", "qwen2", num_hidden_layers=2))
    tables.append((shared, {"moe": {**SHAPE, "shared_experts": 1}, "init": {"name": "copy"}}))
    granite = str(make_dense(folder / "granite", "granite", dtype="float16", num_hidden_layers=2))
    tables.append((granite, {"moe": SHAPE, "init": {"name": "drop"}}))
    expected = []
    for number, (source, table) in enumerate(tables):
        convert(source, folder / str(number), Recipe.of(table))
        expected.append(ranks.digests(AutoModelForCausalLM.from_pretrained(folder / str(number))))
    return tables, expected


def test_load_on_one_process(cases):
    tables, expected = cases
    for found, wanted in zip(ranks.loads(tables, [{}]), expected, strict=True):
        assert found["digests"] == wanted


SHARES = {  # which of the cases are loaded at which layouts: every second one at half of them, or all
    "half of two": [(slice(0, None, 2), [TWO[0], TWO[3]]), (slice(1, None, 2), [TWO[1], TWO[2]])],
    "two": [(slice(None), TWO)],
    "four": [(slice(None), FOUR)],
}


@pytest.mark.parametrize("name", quick(SHARES, "half of two"))
def test_load_is_convert_at_every_layout(cases, name):
    tables, expected = cases
    world = 4 if name == "four" else 2
    results = gloo.run(world, "ranks:several", [("loads", (tables[of], at)) for of, at in SHARES[name]])
    for share, (of, layouts) in enumerate(SHARES[name]):
        for number, (table, wanted) in enumerate(zip(tables[of], expected[of], strict=True)):
            for place, layout in enumerate(layouts):
                found = [result[share][number * len(layouts) + place] for result in results]
                for result in found:
                    assert result["digests"] == wanted, (table, layout)
                # Experts are read once in all, however many ranks there are: each its own slices.
                assert sum(result["read"] for result in found) == found[0]["experts"], (table, layout)
                assert max(result["held"] for result in found) < 1.2 / world, (table, layout)


def same_gradients(found, reference, tolerance=1e-6):
    assert found["gradients"].keys() == reference["gradients"].keys()
    for name, wanted in reference["gradients"].items():
        off = (found["gradients"][name] - wanted).norm() / wanted.norm()
        # Rounding in float32; attention sums in another order under tensor parallelism.
        assert off <= (tolerance if ".mlp." in name else 3 * tolerance), (name, float(off))
    assert torch.equal(found["counts"], reference["counts"])
    for key in ("loss", "norm", "balance", "z", "held_out"):
        assert found[key] == pytest.approx(reference[key], rel=tolerance), key
    assert found["router_norms"] == pytest.approx(reference["router_norms"], rel=1e-5)


PIECES = {"train": {"micro_batch": 1}}
BUFFERED = {**PIECES, "router": {"balance_counts": "buffered"}}


@pytest.fixture(scope="module")
def one_process(llama):
    return ranks.gradients(llama, [({}, {})])[0]


def test_accumulated_gradients_are_those_of_one_batch(llama, one_process):
    """f_e is that of the global batch whichever way it is cut."""
    same_gradients(ranks.gradients(llama, [({}, PIECES)])[0], one_process)


def buffered(llama, parts):
    """A step written out whose balance loss has the shares of the parts so far; its gradients and loss."""
    run = ranks.run_of(llama, {}, BUFFERED)
    with world(run.parallel) as here:
        model = ranks.trainee_of(run, here).model
    rows, counts, total = ranks.rows_of(run), torch.zeros(2, 4), 0.0
    tokens = rows[:, 1:].numel()
    for part in parts:
        out = model(input_ids=rows[part, :-1], output_router_logits=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), rows[part, 1:].flatten(), reduction="sum") / tokens
        for logits, seen in zip(out.router_logits, counts, strict=True):
            chances = logits.softmax(-1)
            seen += F.one_hot(chances.topk(2).indices, 4).sum((0, 1))
            balance = 4 * (2 * seen / seen.sum() * chances.sum(0)).sum() / tokens / 2
            loss = loss + 0.1 * balance + 0.01 * logits.logsumexp(-1).square().sum() / tokens / 2
            total += float(balance.detach())
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, total


def test_buffered_shares_are_those_of_the_parts_so_far(llama, one_process):
    """Of all processes: the second of two has rows 2 and 3. The last part may have fewer rows."""
    short = {**BUFFERED, "train": {"micro_batch": 3}}
    alone, uneven = ranks.gradients(llama, [({}, BUFFERED), ({}, short)])
    two = [result[0] for result in gloo.run(2, "ranks:gradients", llama, [({"fsdp": 2}, BUFFERED)])]
    cases = ((alone, [[0], [1], [2], [3]]), (uneven, [[0, 1, 2], [3]]))
    for found, parts in (*cases, *((each, [[0, 2], [1, 3]]) for each in two)):
        wanted, balance = buffered(llama, parts)
        assert found["balance"] == pytest.approx(balance, rel=1e-6)
        assert abs(balance / one_process["balance"] - 1) > 1e-4  # or this says nothing
        for name, gradient in wanted.items():
            off = float((found["gradients"][name] - gradient).norm() / gradient.norm())
            assert off <= 3e-6, (name, off)


class Products(TorchDispatchMode):
    """Counts the matrix products that are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "_grouped_mm")
        return func(*args, **(kwargs or {}))


def test_recomputed_layers_are_recorded_once(llama, one_process):
    """The selective form computes no product twice."""
    counts = {}
    for how in (False, "selective", True):
        with Products() as products:
            found = ranks.gradients(llama, [({}, {"train": {"activation_checkpointing": how}})])[0]
        same_gradients(found, one_process, 1e-7)
        counts[how] = products.count
    assert 0 < counts[False] == counts["selective"] < counts[True]


@pytest.mark.parametrize(
    "layouts", [TWO, pytest.param(FOUR[:2], marks=pytest.mark.slow)], ids=["two", "four"]
)
def test_gradients_of_several_processes_are_those_of_one(llama, one_process, layouts):
    """Also of chats, of which each row has more padding than the last."""
    chats = {"task": {"name": "sft"}}
    references = [one_process, one_process, ranks.gradients(llama, [({}, chats)])[0]]
    wanted = [(layout, changes) for layout in layouts for changes in ({}, PIECES, chats)]
    world = max(layout.get("fsdp", 1) * layout.get("tp", 1) for layout in layouts)
    for result in gloo.run(world, "ranks:gradients", llama, wanted):
        for found, reference in zip(result, references * len(layouts), strict=True):
            same_gradients(found, reference)


def test_logits_in_chunks_on_several_processes(llama, one_process, tmp_path):
    """Of a head that FSDP or tensor parallelism shares out, in a step after a score.

    FSDP leaves a tied head whole after a score. A vocabulary of 97 words is cut unevenly.
    """
    tied = {"num_hidden_layers": 2, "tie_word_embeddings": True, "vocab_size": 97}
    other = str(make_dense(tmp_path / "tied", "llama", **tied))
    wanted = {llama: one_process, other: ranks.gradients(other, [({}, {})])[0]}
    calls = [("gradients", (source, [(layout, {}) for layout in TWO], True)) for source in wanted]
    for result in gloo.run(2, "ranks:several", calls):
        for reference, found in zip(wanted.values(), result, strict=True):
            for each in found:
                same_gradients(each, reference)


def table(source: str, out: Path, text: Path, **changes) -> dict:
    made = {
        "source": source,
        "out": str(out),
        "moe": SHAPE,
        "init": {"name": "drop", "ratio": 0.5},
        "data": {"sources": [{"path": str(text), "separator": "<|endoftext|>"}], "held_out": 0.1},
        "train": {
            "steps": 6,
            "batch_tokens": 512,
            "sequence_length": 64,
            "eval_every": 3,
            "eval_tokens": 1024,
        },
        "schedule": {"peak": 1e-3, "warmup": 2},
        "checkpoint": {"every": 3, "keep": 3},
    }
    return {**made, **changes}


class Said(Unheard):
    """Keeps what a run says."""

    def __init__(self, sentences: list[str]) -> None:
        self.say = sentences.append  # type: ignore[method-assign]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_at_another_layout(trainable, tmp_path):
    """fsdp2 x ep2 stopped after step 2, gone on as itself, as fsdp2, as tp2 x ep2 and on one process."""
    source, text = trainable
    start = table(str(source), tmp_path / "whole", text, parallel={"fsdp": 2, "ep": 2})
    start["train"] |= {"steps": 4, "eval_every": 2, "layer_decay": 0.8}  # parameter groups of many rates
    start["checkpoint"] |= {"every": 2, "asynchronous": True}
    layouts = [{"fsdp": 2, "ep": 2}, {"fsdp": 2}, {"tp": 2, "ep": 2}]
    gloo.run(2, "ranks:trains", [(start, False)])
    jobs = []
    for number, layout in enumerate([*layouts, {}]):
        out = tmp_path / str(number)
        (out / "checkpoints").mkdir(parents=True)
        (out / "checkpoints" / "step-2").symlink_to(tmp_path / "whole" / "checkpoints" / "step-2")
        (out / "run.json").write_text((tmp_path / "whole" / "run.json").read_text())
        jobs.append(({**start, "out": str(out), "parallel": layout}, True))
    checkpoint = str(tmp_path / "whole" / "checkpoints" / "step-2")
    calls = [("trains", (jobs[:-1],)), *(("restored", (job, checkpoint)) for job, _ in jobs[:-1])]
    found = gloo.run(2, "ranks:several", calls)
    said: list[str] = []
    with reporting_to(Said(said)):
        loop.train(Run.of(jobs[-1][0]), resume=True)
    changed = "step 2 was saved by 2 process(es) (fsdp 2 x ep 2); it goes on with 1 (one process)"
    assert said.count(changed) == 1
    wanted = losses(tmp_path / "whole")[2:]
    for number, layout in enumerate([*layouts, {}]):
        assert losses(tmp_path / str(number)) == pytest.approx(wanted, abs=1e-5)
        saved = saving.read_state(tmp_path / str(number) / "checkpoints" / "step-4").layout
        assert {axis: size for axis, size in saved.items() if size > 1} == layout
    # Every parameter and moment, by name, is what one process reads of that checkpoint.
    reference = ranks.restored(jobs[-1][0], checkpoint)
    assert any("experts" in name for name in reference["parameters"])
    assert any("gate" in name for name in reference["parameters"])
    for _, *restored in found:
        assert restored == [reference] * len(layouts)


@pytest.mark.slow
def test_a_rank_that_dies_while_saving(trainable, tmp_path):
    """The other says so, the checkpoint before stays, and the run goes on from it as if nothing had been."""
    source, text = trainable
    whole = table(str(source), tmp_path / "whole", text)
    broken = {**whole, "out": str(tmp_path / "broken"), "parallel": {"fsdp": 2}}
    broken["checkpoint"] = {"every": 1, "asynchronous": True}
    with pytest.raises(AssertionError, match=r"1 of 2 ranks failed:\nrank 1:"):
        gloo.run(2, "ranks:dies_while_saving", broken, 3, str(tmp_path / "said"))
    assert "a process of this run has ended" in (tmp_path / "said").read_text()
    checkpoints = tmp_path / "broken" / "checkpoints"
    assert [path.name for _, path in saving.checkpoints(tmp_path / "broken")] == ["step-1", "step-2"]
    assert (checkpoints / "step-3.partial").is_dir()
    loop.train(Run.of({**broken, "parallel": {}}), resume=True)
    assert not list(checkpoints.glob("*.partial"))
    loop.train(Run.of(whole))
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_ranks_that_see_different_files(trainable, tmp_path):
    source, text = trainable
    made = table("dense", Path("run"), text)
    cases = {}
    for name in ("content", "config", "tokenizer", "missing", "out"):
        for rank in ("0", "1"):
            shutil.copytree(source, tmp_path / name / rank / "dense")
        cases[name] = str(tmp_path / name)
    weights = tmp_path / "content" / "1" / "dense" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    middle = next(iter(checkpoint.read_header(weights).values()))
    raw[middle.offset + middle.nbytes // 2] ^= 1
    weights.write_bytes(raw)
    config = tmp_path / "config" / "0" / "dense" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    words = tmp_path / "tokenizer" / "1" / "dense" / "tokenizer.json"
    words.write_text(words.read_text() + " ")
    shutil.rmtree(tmp_path / "missing" / "1" / "dense")
    told = gloo.run(2, "ranks:refused_apart", [(made, folder) for folder in cases.values()])
    wanted = {
        "content": "process 1 of 2 sees another model.safetensors of the source than process 0; give every",
        "config": "process 1 of 2 sees another config of the source than process 0",
        "tokenizer": "process 1 of 2 sees another tokenizer.json of the tokenizer of the source than process",
        "missing": "process 1 of 2: dense does not exist",
        "out": "process 1 of 2 does not see run, which process 0 has made; `out` must lie on a file system",
    }
    said_by_one(told, [*wanted.values()])


def said_by_one(told: list[list[tuple[str, bool]]], wanted: list[str]) -> None:
    """Both ranks end with the sentence that is wanted, and one of them says it."""
    for said, sentence in zip(zip(*told, strict=True), wanted, strict=True):
        assert said[0][0] == said[1][0]
        assert sentence in said[0][0]
        assert sorted(elsewhere for _, elsewhere in said) == [False, True], said


def test_ranks_that_see_different_data(trainable, tmp_path):
    """Each rank has a folder of its own. Copies of one text are the same data, whatever their times."""
    source, text = trainable
    stories = text.read_text()
    for rank, size in (("0", 100_000), ("1", 90_000)):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "copy.txt").write_text(stories[:60_000])
        (tmp_path / rank / "size.txt").write_text(stories[:size])
        (tmp_path / rank / "held out.txt").write_text(stories[:size])
        (tmp_path / rank / "same size.txt").write_text(("a" if rank == "0" else "b") + stories[1:60_000])
        (tmp_path / rank / f"only {rank}.txt").write_text(stories[:60_000])
    os.utime(tmp_path / "1" / "copy.txt", (1, 1))
    sees = "process 1 of 2 sees another {} of the data than process 0; give every node the same files"
    wanted = {
        ("size.txt", 0.0): sees.format("size.txt"),
        ("held out.txt", 0.05): sees.format("held out.txt"),
        ("same size.txt", 0.05): sees.format("same size.txt"),
        ("only 0.txt", 0.0): "process 1 of 2: no data at only 0.txt",
        ("only 1.txt", 0.0): "no data at only 1.txt",
    }
    taught = {"source": str(source), "top_logits": 4, "cache": "logits"}
    cases = []
    for number, (name, held_out) in enumerate([*wanted, ("copy.txt", 0.05), ("copy.txt", 0.05)]):
        made = table(str(source), tmp_path / f"out {number}", Path(name))
        made["data"]["held_out"] = held_out
        made["train"] |= {"steps": 1, "eval_every": 1 if held_out else 0}
        cases.append((made, str(tmp_path)))
    cases[-2][0]["teacher"] = taught
    cases[-2][0]["train"]["eval_every"] = 0
    told = gloo.run(2, "ranks:refused_apart", cases)
    apart = "process 1 of 2 sees other logits in logits than process 0; `teacher.cache`, or else `out`, must"
    said_by_one([each[:-1] for each in told], [*wanted.values(), apart])
    assert [each[-1] for each in told] == [("", False)] * 2


@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_see_different_tokenizers_of_the_hub(trainable, tmp_path, same):
    """Caches of two nodes may have other revisions; which files they have besides does not count."""
    source, text = trainable
    for rank in ("0", "1"):
        repository = tmp_path / "caches" / rank / "models--someone--words"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(rank * 40)
        snapshot = repository / "snapshots" / (rank * 40)
        snapshot.mkdir(parents=True)
        for file in source.glob("tokenizer*.json"):
            shutil.copyfile(file, snapshot / file.name)
        (snapshot / "config.json").write_text("{}")
        if rank == "1":
            (snapshot / "tokenizer.model").write_text("not read")
        if rank == "1" and not same:
            about = json.loads((snapshot / "tokenizer_config.json").read_text())
            about |= {"mask_token": "</s>"}
            (snapshot / "tokenizer_config.json").write_text(json.dumps(about))
    made = table(str(source), tmp_path / "run", text)
    made["data"]["tokenizer"] = "someone/words"
    made["train"] |= {"steps": 1, "eval_every": 0}
    told = gloo.run(2, "ranks:tokenizers_of_the_hub", made, str(tmp_path / "caches"), timeout=120)
    if same:
        assert told == [("", False)] * 2
    else:
        said_by_one(
            [[each] for each in told], ["process 1 of 2 sees another tokenizer someone/words than process"]
        )


def test_a_rank_that_ends_alone_says_why_for_all():
    assert gloo.run(2, "ranks:ends_alone", timeout=120) == [("no", True), ("no", False)]


def test_what_one_rank_cannot_do_ends_all(trainable, tmp_path):
    """The first rank alone makes a cache and writes the folder of a run, and a rank reads its own weights."""
    source, text = trainable
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    others, file = tmp_path / "others", tmp_path / "file"
    others.mkdir()
    (others / "notes").write_text("mine")
    file.write_text("mine")
    damaged = shutil.copytree(source, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    header = checkpoint.read_header(weights)
    last = next(each for name, each in header.items() if name.endswith("q_proj.weight"))
    raw = bytearray(weights.read_bytes())
    end = last.offset + last.nbytes
    raw[end - last.nbytes // last.shape[0] : end] = b"\xff" * (last.nbytes // last.shape[0])
    weights.write_bytes(raw)
    teacher = shutil.copytree(damaged, tmp_path / "teacher")
    marked = {name: tmp_path / name for name in ("lines", "beside")}
    for out in marked.values():
        out.mkdir()
        (out / ".upcycle-run").touch()
    (marked["lines"] / "metrics.jsonl").mkdir()
    (marked["beside"] / "beside").write_text("mine")
    taught = {"source": str(source), "top_logits": 4}
    wanted = [
        (table(str(source), tmp_path / "1", text, teacher={**taught, "cache": str(others)}),
         f"{others} holds something else than a teacher's logits"),
        (table(str(source), tmp_path / "2", text, teacher={**taught, "cache": str(file)}),
         f"{file} is a file; set teacher.cache to a folder"),
        (table(str(source), tmp_path / "3", text, teacher={**taught, "cache": str(file / "below")}),
         f"{file / 'below'}: a part of the path is a file"),
        (table(str(damaged), tmp_path / "4", text), f"process 1 of 2: {last.name} in {weights} holds NaN"),
        (table(str(source), tmp_path / "5", text, teacher={"source": str(teacher)}),
         f"process 1 of 2: {last.name} in {teacher / weights.name} holds NaN"),
        (table(str(source), marked["lines"], text), f"{marked['lines'] / 'metrics.jsonl'}."),
        (table(str(source), marked["beside"], text), f"{marked['beside'] / 'beside'}"),
    ]  # fmt: skip
    wanted[-1][0]["data"]["tokenizer"] = str(source)
    for made, _ in wanted:
        made["train"] |= {"steps": 1, "eval_every": 0}
    told = gloo.run(2, "ranks:refused_apart", [(made, str(tmp_path)) for made, _ in wanted], timeout=120)
    said_by_one(told, [sentence for _, sentence in wanted])


@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_see_different_files_of_a_recipe(llama, tmp_path, same):
    """The labels of `split` and statistics are in the hash of the blueprint, and it is compared."""
    width = json.loads((Path(llama) / "config.json").read_text())["intermediate_size"]
    labels, file = np.arange(width) % 4, tmp_path / "labels.json"
    contents = [json.dumps([each.tolist()] * 2) for each in (labels, labels if same else labels[::-1])]
    file.write_text(contents[0])
    made = table(llama, tmp_path / "out", tmp_path / "unused.txt", init={})
    made["init"] = {"name": "split", "by": "file", "labels": str(file)}
    made["moe"] = {"num_experts": 4, "top_k": 2, "granularity": 4}
    said = gloo.run(2, "ranks:begun_apart", made, str(file), contents)
    assert said[0] == said[1]
    assert said[0].startswith("" if same else "process 1 of 2 sees another labels.json of the recipe than")
    assert bool(said[0]) != same


@pytest.mark.parametrize(
    ("refuses", "said"), [(None, ["", ""]), (0, ["no", "no"]), (1, ["process 1 of 2: no"] * 2)]
)
def test_the_first_rank_fetches_and_all_refuse(tmp_path, refuses, said):
    assert gloo.run(2, "ranks:does_first_alone", str(tmp_path), refuses) == said


def test_peak_memory_of_a_rank_is_its_shard(tmp_path):
    """A model of 150 MB on two ranks: neither comes near to the whole of it."""
    warm = make_dense(tmp_path / "warm", "llama")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    big = make_dense(tmp_path / "big", "llama", num_hidden_layers=3, **sizes)
    recipe = {"moe": {"num_experts": 8, "top_k": 2}, "init": {"name": "drop", "ratio": 0.5}}
    slack = 12 << 20  # blocks of random numbers, the interpreter
    for found in gloo.run(2, "ranks:peak_of_load", str(warm), str(big), recipe, {"fsdp": 2, "ep": 2}):
        assert found["held"] < 0.51 * found["whole"]
        assert found["peak"] < found["held"] + slack, found
        assert found["held"] + slack < 0.75 * found["whole"]  # or the bound says nothing
