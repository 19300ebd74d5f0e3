"""What `upcycle eval` says of texts and of several models, against naive loops and closed forms."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import make, make_bytes_tokenizer, make_dense
from upcycle import Recipe, UpcycleError, convert, verify
from upcycle.calibration.to_calibrate import ToCalibrate
from upcycle.cli import main
from upcycle.evaluation import results, text
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.comparison import Compared, compare
from upcycle.evaluation.differences import Sums, difference
from upcycle.evaluation.no_numbers import NoNumbersError
from upcycle.evaluation.results import Metric, Result
from upcycle.evaluation.scores import Scored, ToScore, evaluate, score

STORY = (
    "Once upon a time there was a café called “Zoë’s” 🙂.\nIt sold tea, naïve cakes and 日本 sweets.",
    "The end 🎉",
    "",
    "A third story, which is a good deal longer than the first two of them, so that it has several windows.",
)


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory) -> Path:
    """A random Llama of bytes."""
    folder = make_dense(
        tmp_path_factory.mktemp("bytes") / "dense", "llama", vocab_size=300, max_position_embeddings=48
    )
    make_bytes_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A random GPT-2 of bytes, whose class is no ForCausalLM."""
    folder = make(
        tmp_path_factory.mktemp("gpt2") / "dense", "GPT2LMHeadModel", vocab_size=300, n_positions=48
    )
    make_bytes_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text("<|>".join(STORY))
    return path


# Windows


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 4), (5, 2), (8, 1), (7, 7), (100, 100), (64, 63)])
def test_every_token_is_scored_once_with_all_the_context_there_is_room_for(length, stride):
    for count in (0, 1, 2, 3, 7, 8, 9, 50):
        scored = []
        for window in text.windows(count, length, stride):
            assert window.end - window.begin - 1 <= length  # what is read: all but the last
            assert window.begin == max(-1, window.end - length - 1)
            assert window.begin < window.first < window.end
            scored += range(window.first, window.end)
        assert scored == list(range(count))


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    for count, length in ((1, 4), (4, 4), (5, 4), (10, 4), (31, 7), (200, 64)):
        ids = list(range(count))
        theirs = utils.get_rolling_token_windows(ids, prefix_token=-1, max_seq_len=length, context_len=1)
        wanted = [(read, asked) for read, asked in theirs]
        found = []
        for window in text.windows(count, length, length):
            read = [-1, *ids][window.begin + 1 : window.end]
            found.append((read, ids[window.first : window.end]))
        assert [(r, a) for r, a in found] == wanted


# Loss and bits per byte


def naive(folder: Path, documents: list[str], length: int, stride: int) -> dict[str, float]:
    """Window after window, alone and unpadded, every token by its own softmax in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats = tokens = right = 0.0
    for document in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False).input_ids]
        scored = 1
        while scored < len(ids):
            end = min(len(ids), scored + (length if scored == 1 else stride))
            begin = max(0, end - 1 - length)
            with torch.inference_mode():
                logits = model(torch.tensor([ids[begin : end - 1]])).logits[0].double()
            for place in range(scored, end):
                row = logits[place - 1 - begin]
                nats += float(torch.logsumexp(row, 0) - row[ids[place]])
                right += float(row.argmax() == ids[place])
                tokens += 1
            scored = end
    size = sum(len(document.encode()) for document in documents)
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size,
        "accuracy": right / tokens,
        "targets": tokens,
        "bytes": size,
    }


@pytest.mark.parametrize(
    ("model", "length", "stride"),
    [("byte_model", 48, None), ("byte_model", 16, 5), ("byte_model", 7, 7), ("gpt2", 48, None)],
)
def test_a_text_is_scored_as_a_naive_loop_scores_it(model, story, length, stride, request):
    folder = request.getfixturevalue(model)
    found = evaluate(folder, ToScore(text=story, length=length, stride=stride, separator="<|>"))
    wanted = naive(folder, [s for s in STORY if s], length, stride or length)
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found["documents"] == 3  # the empty one has no token
    assert found["bytes"] == found["targets"]  # of this tokenizer
    assert found["task"] == "causal_lm"


def test_a_real_text_is_scored_as_a_naive_loop_scores_it(stories, tinystories, tmp_path):
    documents = [s.strip("\n") for s in tinystories.read_text()[:9000].split("<|endoftext|>")]
    documents = [s for s in documents if s]
    path = tmp_path / "some.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    found = evaluate(stories, ToScore(text=path, length=200, stride=150, separator="<|endoftext|>"))
    wanted = naive(stories, documents, 200, 150)
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
    assert 1.0 < found["loss"] < 1.7  # a trained model: random is log 512 = 6.2


def test_bytes_of_tokens_are_those_of_their_characters(stories, tmp_path):
    """Tokens of several bytes, characters of several tokens: any number of windows has its own bytes."""
    path = tmp_path / "story.txt"
    path.write_text(STORY[0])
    whole = evaluate(stories, ToScore(text=path))
    assert whole["bytes"] == len(STORY[0].encode())
    tokenizer = AutoTokenizer.from_pretrained(stories)
    made = tokenizer(STORY[0], add_special_tokens=False, return_offsets_mapping=True)
    for limit in (1, 2, 3):
        found = evaluate(stories, ToScore(text=path, length=5, limit=limit))
        assert found["targets"] == 5 * limit
        end = made.offset_mapping[5 * limit][0]  # where the next token begins
        assert found["bytes"] == len(STORY[0][:end].encode())


def test_a_long_document_is_scored_like_the_whole(byte_model, tmp_path, monkeypatch):
    """Pieces of a document are parts of one text; passages are its units."""
    words = " ".join(f"word{i * 7919 % 1000}" for i in range(3000))
    path = tmp_path / "long.txt"
    path.write_text(words)
    asked = ToScore(text=path, length=48)
    whole = evaluate(byte_model, asked)
    monkeypatch.setattr("upcycle.data.pieces._PIECE", 1000)
    pieces = evaluate(byte_model, asked)
    assert pieces["bytes"] == whole["bytes"] == len(words)
    assert pieces["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert pieces["passages"] == whole["passages"] == math.ceil(len(words) / text.PASSAGE)


def test_no_bos_is_eos_and_neither_is_an_error(byte_model, story, tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(byte_model, tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    assert evaluate(folder, ToScore(text=story))["loss"] > 0
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    with pytest.raises(UpcycleError, match="neither BOS nor EOS"):
        evaluate(folder, ToScore(text=story))


# Several models


def test_a_copy_differs_by_nothing_and_damage_by_what_it_is(stories, tinystories, tmp_path):
    dense, moe, drop = stories, tmp_path / "moe", tmp_path / "drop"
    convert(stories, moe, Recipe.of(init={"name": "copy"}))
    convert(stories, drop, Recipe.of(init={"name": "drop", "ratio": 0.25}))
    asked = ToScore(text=tinystories, separator="<|endoftext|>", limit=12)
    scored = [score(folder, asked) for folder in (dense, moe, drop)]
    compared = compare(scored)
    assert not compared.notes
    rows = {(Path(r.checkpoint).name, r.metric): r for r in compared.differences}
    assert {metric for _, metric in rows} == {"loss", "bits_per_byte", "accuracy"}
    for name in ("loss", "bits_per_byte"):
        assert abs(rows["moe", name].difference) < 1e-6
        assert rows["moe", name].standard_error < 1e-6
        # Damaged, and by far more than chance: documents share their difficulty, which pairing takes out.
        values = [s.results[0].metrics[name] for s in scored]
        found = rows["drop", name]
        assert found.difference == pytest.approx(values[2].value - values[0].value)
        assert found.difference > 5 * found.standard_error > 0
        assert found.standard_error < math.hypot(values[0].standard_error, values[2].standard_error)
        assert (found.units, found.count) == ("documents", scored[0].results[0].more["documents"])


def words_model(folder: Path, text: str) -> Path:
    """A random Llama whose tokens are pieces of words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    make_dense(folder, "llama", vocab_size=400, max_position_embeddings=48)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(folder)
    return folder


def test_other_tokenizers_are_compared_by_bits_per_byte_alone(trainable, byte_model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(trainable[1].read_text()[:9000])
    folder = words_model(tmp_path / "words", path.read_text())
    both = [score(f, ToScore(text=path)) for f in (folder, byte_model)]
    compared = compare(both)
    tokens = [s.results[0].more["targets"] for s in both]
    assert tokens[0] < 0.8 * tokens[1]
    assert [row.metric for row in compared.differences] == ["bits_per_byte"]
    one, two = (s.results[0].metrics["bits_per_byte"].value for s in both)
    assert compared.differences[0].difference == pytest.approx(two - one)
    assert both[0].results[0].more["bytes"] == both[1].results[0].more["bytes"] == len(path.read_bytes())
    (note,) = compared.notes
    what = "have different tokenizers: what counts by token (loss, perplexity, accuracy) cannot be compared"
    assert note == f"{folder} and {byte_model} {what}; bits per byte can, and are"
    cut = compare([score(f, ToScore(text=path, limit=2)) for f in (folder, byte_model)])
    assert not cut.differences
    note, why = cut.notes
    assert note == f"{folder} and {byte_model} {what}; bits per byte can"
    assert "under --limit" in why


@pytest.mark.parametrize("given", [{"limit": 1.5}, {"length": "12"}, {"batch_size": True}])
def test_numbers_that_are_not_whole(given, tmp_path):
    ((name, value),) = given.items()
    said = f"--{name.replace('_', '-')} {value!r}; it must be a whole number"
    with pytest.raises(UpcycleError, match=re.escape(said)):
        ToScore(text=tmp_path / "a.txt", **given)
    with pytest.raises(UpcycleError, match=re.escape(said)):
        ToCalibrate(text=tmp_path / "a.txt", **given)


@pytest.mark.parametrize("several", [False, True])
def test_a_word_across_the_end_of_a_passage_is_compared(several, byte_model, trainable, tmp_path):
    """One tokenizer begins a token after the 4096th character, and the other does not."""
    text = " ".join(["happy"] * 683)
    assert text.rindex("h") < 4096 == len(text) - 1
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in [text, "a cat"][: 1 + several]))
    folder = words_model(tmp_path / "words", "happy a cat")
    compared = compare([score(f, ToScore(text=path, length=48)) for f in (folder, byte_model)])
    assert [row.metric for row in compared.differences] == ["bits_per_byte"]


def test_what_has_no_bits_per_byte_promises_none(tmp_path):
    """Scores on what T5 is trained for, with two tokenizers."""
    losses = Sums(top=np.ones(3), bottom=np.ones(3), units="examples")
    loss = Metric.of(losses, higher_is_better=False, per_token=True)
    result = Result(kind="text", name="a.txt", data={}, metrics={"loss": loss}, units=(3,))
    both = [
        Scored(checkpoint=name, folder=tmp_path, architecture="T5", results=(result,), tokenizer=name)
        for name in "ab"
    ]
    said = "a and b have different tokenizers: what counts by token (loss) cannot be compared"
    assert compare(both) == Compared(differences=(), notes=(said,))


def test_images_are_paired(tmp_path):
    from upcycle.hf import models

    random = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{i}.png")
    folders = [make(tmp_path / f"vit{s}", "ViTForImageClassification", seed=s) for s in (0, 1)]
    asked = ToScore(images=tmp_path / "images", batch_size=5)
    compared = compare([score(folder, asked) for folder in folders])
    right = []
    for folder in folders:
        model = models.open(folder).eval()
        mine = []
        for path in sorted((tmp_path / "images").rglob("*.png")):
            pixels = torch.tensor(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
            with torch.inference_mode():
                found = int(model(pixel_values=(pixels - 0.5) / 0.5).logits.argmax())
            mine.append(found == int(path.parent.name))
        right.append(np.array(mine, float))
    row = next(row for row in compared.differences if row.metric == "accuracy")
    assert row.difference == pytest.approx(float((right[1] - right[0]).mean()))
    assert row.standard_error == pytest.approx(float(stats.sem(right[1] - right[0])))
    shutil.copytree(tmp_path / "images", tmp_path / "shots")
    probes = [
        score(folder, ToScore(images=tmp_path / "images", shots=tmp_path / "shots", per_class=2))
        for folder in folders
    ]
    (row,) = compare(probes).differences
    accuracies = [np.array(probe.results[0].more["accuracies"]) for probe in probes]
    assert row.difference == pytest.approx(float((accuracies[1] - accuracies[0]).mean()))
    assert row.standard_error == pytest.approx(float(stats.sem(accuracies[1] - accuracies[0])))
    assert (row.kind, row.units, row.count) == ("few_shot", "seeds", 5)


def test_a_probe_is_not_tested_on_what_it_is_fitted_on(tmp_path):
    """One set, a link to it, or a folder that has an image of it; the weights are not read."""
    for name, label in (("shots", "a"), ("some", "a")):
        (tmp_path / name / label).mkdir(parents=True)
        Image.new("RGB", (12, 12)).save(tmp_path / name / label / "0.png")
    (tmp_path / "link").symlink_to(tmp_path / "shots")
    (tmp_path / "some/a/1.png").symlink_to(tmp_path / "shots/a/0.png")
    folder = make(tmp_path / "vit", "ViTForImageClassification")
    (folder / "model.safetensors").write_bytes(b"")
    for images in ("shots", "link", "some"):
        with pytest.raises(
            UpcycleError, match=rf"--few-shot .*shots and --images .*{images} both have 0\.png"
        ):
            score(folder, ToScore(images=tmp_path / images, shots=tmp_path / "shots"))


def test_a_probe_knows_classes_by_their_names(tmp_path):
    """The sets number their classes for themselves."""

    def colours(name: str, classes: dict[str, tuple[int, int, int]]) -> Path:
        random = np.random.default_rng(0)
        for label, colour in classes.items():
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(6):
                pixels = np.clip(np.array(colour) + random.integers(0, 9, (12, 12, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / label / f"{i}.png")
        return tmp_path / name

    known = {"blue": (0, 0, 240), "green": (0, 240, 0), "red": (240, 0, 0)}
    fitted = colours("fitted", known)
    some = colours("some", {name: known[name] for name in ("green", "red")})
    folder = make(tmp_path / "vit", "ViTForImageClassification")
    found = score(folder, ToScore(images=some, shots=fitted, per_class=4)).results[0]
    assert found.metrics["accuracy"].value == 1.0
    other = colours("other", {"green": known["green"], "yellow": (240, 240, 0)})
    with pytest.raises(UpcycleError, match=r"has the class 'yellow', and .*fitted, which the probe"):
        score(folder, ToScore(images=other, shots=fitted, per_class=4))
    # The head of this ViT has three classes without names.
    assert score(folder, ToScore(images=fitted)).results
    with pytest.raises(UpcycleError, match=r"some has 2 classes with names and the model's head 3 without"):
        score(folder, ToScore(images=some))


# A model without numbers


def with_nan(folder: Path, out: Path, name: str) -> Path:
    """A copy of a checkpoint, with NaN for the first weight of its tensor `name`."""
    tensors = load_file(shutil.copytree(folder, out) / "model.safetensors")
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_model_that_gives_nan_has_no_score(byte_model, story, tmp_path, capsys):
    """The likeliest of NaN is token 0 or class 0, which can be right."""
    broken = with_nan(byte_model, tmp_path / "text", "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(byte_model), str(broken), "--text", str(story), "--limit", "1"])
    assert stopped.value.code == 2
    assert f"{broken} gives NaN where a score needs numbers" in capsys.readouterr().err
    assert not (broken / "eval.json").exists()
    images = tmp_path / "images" / "0"
    images.mkdir(parents=True)
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(images / "a.png")
    vit = make(tmp_path / "vit", "ViTForImageClassification")
    broken = with_nan(vit, tmp_path / "images_of", "classifier.weight")
    with pytest.raises(NoNumbersError, match="images_of gives NaN"):
        evaluate(broken, ToScore(images=images.parent))


# Standard errors


def test_means_and_their_differences_are_scipys():
    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 50))
    one, two = Sums.mean(a, "x"), Sums.mean(b, "x")
    assert one.value == pytest.approx(a.mean())
    assert one.standard_error == pytest.approx(stats.sem(a))
    found = difference(one, two)
    assert (found.value, found.standard_error) == pytest.approx(
        (float((a - b).mean()), float(stats.sem(a - b)))
    )
    assert Sums.mean(a[:1], "x").standard_error is None
    assert difference(one, one).standard_error == 0.0


def test_strata_are_taken_as_given():
    """The mean of means of two tasks: the variances of the means, a quarter of each."""
    random = np.random.default_rng(2)
    a, b = random.normal(size=30), 10 + random.normal(size=12)
    made = Sums.mean(np.concatenate([a, b]), "x", np.repeat([0, 1], [30, 12]))
    assert made.value == pytest.approx((a.mean() + b.mean()) / 2)
    assert made.standard_error == pytest.approx(math.hypot(stats.sem(a), stats.sem(b)) / 2)


def test_the_standard_error_of_a_ratio_is_how_far_ratios_scatter():
    """Documents of any length drawn 4,000 times: loss by token, and the difference of two models."""
    random = np.random.default_rng(3)
    n = 150
    length = random.integers(5, 100, (4000, n)).astype(float)
    hardness = random.normal(3, 0.5, (4000, n))
    ratios, differences, errors, spreads = [], [], [], []
    for tokens, hard in zip(length, hardness, strict=True):
        one = Sums(top=tokens * (hard + random.normal(0, 0.1, n)), bottom=tokens, units="x")
        two = Sums(top=tokens * (hard + 0.02 + random.normal(0, 0.1, n)), bottom=tokens, units="x")
        found = difference(two, one)
        ratios.append(one.value)
        errors.append(one.standard_error)
        differences.append(found.value)
        spreads.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)
    assert np.mean(spreads) == pytest.approx(np.std(differences), rel=0.05)
    assert np.mean(spreads) < np.mean(errors) / 3  # what pairing is for


# Batch sizes


def test_memory_that_runs_out_halves_the_batch():
    tried = []

    def work(items):
        tried.append(len(items))
        if len(items) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [i * i for i in items]

    done = []
    size = BatchSize(32)
    assert size.over(range(40), work, advance=done.append) == [i * i for i in range(40)]
    assert tried == [32, 16, 8, *[4] * 10]
    assert sum(done) == 40


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
     torch.OutOfMemoryError("out")],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_said(error):
    def work(items):
        raise error

    with pytest.raises(UpcycleError, match="on a single row, of 7 tokens"):
        BatchSize(4).over([1, 2, 3], work, length=lambda _: 7)


def test_other_errors_are_not_taken_for_it():
    def work(items):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        BatchSize(4).over([1, 2, 3], work)


def test_long_rows_are_fewer_at_once():
    sizes = []

    def work(items):
        sizes.append((len(items), len(items) * max(items)))
        return items

    lengths = [900, 500, 400, 100, 100, 50, 10, 10]
    assert BatchSize(4, tokens=1000).over(lengths, work, length=int) == lengths
    assert [count for count, _ in sizes] == [1, 2, 4, 1]
    assert all(total <= 1000 for _, total in sizes)
    settings = {"vocab_size": 50_000, "hidden_size": 1024}
    free, whole = (
        BatchSize.of(settings, torch.device("cpu")),
        BatchSize.of(settings, torch.device("cpu"), fixed=7),
    )
    assert (whole.rows, whole.tokens) == (7, None)
    assert free.tokens is None or free.tokens > 0


def test_the_batch_size_changes_nothing(byte_model, story):
    found = [
        evaluate(byte_model, ToScore(text=story, length=20, separator="<|>", batch_size=n))["loss"]
        for n in (0, 1, 3)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_rows_come_again_where_memory_ran_out(tmp_path, monkeypatch):
    """Images, spans of T5, features: none is left out or counted twice when a batch is halved."""
    from upcycle.hf import models

    random = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(5):
            pixels = random.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{i}.png")
    folder = make(tmp_path / "vit", "ViTForImageClassification")
    asked = [ToScore(images=tmp_path / "images", batch_size=8)]
    shutil.copytree(tmp_path / "images", tmp_path / "shots")
    asked.append(ToScore(images=tmp_path / "images", shots=tmp_path / "shots", per_class=2, batch_size=8))
    wanted = [evaluate(folder, each) for each in asked]
    opened, tried = models.open, []

    def small(source):
        model = opened(source)
        forward = model.forward

        def limited(*args, **inputs):
            tried.append(len(inputs["pixel_values"]))
            if tried[-1] > 3:
                raise torch.OutOfMemoryError("out of memory")
            return forward(*args, **inputs)

        model.forward = limited
        return model

    monkeypatch.setattr(models, "open", small)
    for each, before in zip(asked, wanted, strict=True):
        assert evaluate(folder, each) == before
    assert {8, 4, 2} <= set(tried)


# What is written


def test_results_lie_beside_the_checkpoint_and_are_replaced(byte_model, story, tmp_path, capsys):
    folder, other = (shutil.copytree(byte_model, tmp_path / name) for name in ("dense", "other"))
    out = tmp_path / "out.json"
    command = ["eval", str(folder), str(other), "--text", str(story), "--limit", "1", "--out", str(out)]
    main([*command, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [c["checkpoint"] for c in shown["checkpoints"]] == [str(folder), str(other)]
    assert {row["difference"] for row in shown["differences"]} == {0.0}
    assert json.loads(out.read_text()) == {"format": 1, **shown}
    assert not (folder / "eval.json").exists()
    main([*command[:-2], "--json"])
    assert json.loads(capsys.readouterr().out) == shown
    first = results.read(folder / "eval.json")
    (entry,) = first.results
    assert (entry.kind, entry.name) == ("text", "story.txt")
    assert entry.data["limit"] == 1
    assert len(entry.data["sha256"]) == 64
    assert set(entry.metrics) == {"loss", "perplexity", "bits_per_byte", "accuracy"}
    assert entry.metrics["loss"].value == shown["checkpoints"][0]["loss"]
    assert {"torch", "transformers", "upcycle"} == set(entry.versions)
    assert set(entry.paired) == {"bits_per_byte"}  # what a report pairs with another checkpoint's
    sums = results.sums_of(entry.paired["bits_per_byte"])
    assert sums.value == pytest.approx(entry.metrics["bits_per_byte"].value)
    assert sums.standard_error == pytest.approx(entry.metrics["bits_per_byte"].standard_error)
    second = tmp_path / "second.txt"
    second.write_text("another text")
    main(["eval", str(folder), "--text", str(second), "--text", str(story)])
    assert "bits_per_byte" in capsys.readouterr().out
    entries = {entry.name: entry for entry in results.read(folder / "eval.json").results}
    assert set(entries) == {"story.txt", "second.txt"}
    assert entries["story.txt"].data["limit"] == 0
    assert not list(folder.glob("*.partial"))


def test_a_copy_differs_by_nothing_and_stays_verified(byte_model, story, tmp_path, capsys):
    dense = shutil.copytree(byte_model, tmp_path / "dense")
    convert(byte_model, tmp_path / "moe", Recipe.of(moe={"num_experts": 4}))
    main(["eval", str(dense), str(tmp_path / "moe"), "--text", str(story), "--separator", "<|>", "--json"])
    rows = json.loads(capsys.readouterr().out)["differences"]
    assert [row["metric"] for row in rows] == ["loss", "bits_per_byte", "accuracy"]
    assert max(abs(row["difference"]) for row in rows) < 1e-6
    assert (tmp_path / "moe" / "eval.json").is_file()
    assert verify(byte_model, tmp_path / "moe").holds


def test_a_folder_that_cannot_be_written_to(byte_model, story, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(byte_model, tmp_path / "dense")

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(folder), "--text", str(story)])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert "bits_per_byte" in shown.out
    assert "eval.json cannot be written (Read-only file system)" in shown.err
    assert not (folder / "eval.json").exists()
    assert not list(folder.glob("*.partial"))


def test_a_foreign_file_of_that_name_stays(byte_model, story, tmp_path, capsys):
    folder = shutil.copytree(byte_model, tmp_path / "dense")
    (folder / "eval.json").write_text('{"mine": 1}')
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--text", str(story)])
    assert "is not what `upcycle eval` writes" in capsys.readouterr().err
    assert (folder / "eval.json").read_text() == '{"mine": 1}'


def test_out_replaces_nothing_but_results(byte_model, story, tmp_path, capsys):
    """Not the weights of the model that is scored, and no JSON of anything else."""
    folder = shutil.copytree(byte_model, tmp_path / "dense")
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    command = ["eval", str(folder), "--text", str(story), "--limit", "1", "--out"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        before = (folder / name).read_bytes()
        with pytest.raises(SystemExit) as stopped:
            main([*command, str(folder / name)])
        assert stopped.value.code == 2
        assert "exists already and is not what `upcycle eval --out` writes" in capsys.readouterr().err
        assert (folder / name).read_bytes() == before
    for other in (deep, tmp_path):
        with pytest.raises(SystemExit):
            main([*command, str(other)])
        assert "is not what" in capsys.readouterr().err
    out = tmp_path / "new" / "all.json"
    main([*command, str(out)])
    first = out.read_bytes()
    main([*command, str(out)])
    assert out.read_bytes() == first
    # Nor the scores that lie beside a checkpoint, wherever they are now, nor a comparison in their place.
    main(command[:-1])
    recorded, moved = folder / "eval.json", tmp_path / "moved.json"
    before = recorded.read_bytes()
    moved.write_bytes(before)
    for scores, message in (
        (recorded, "is for the scores of that checkpoint alone"),
        (moved, "exists already and is not what `upcycle eval --out` writes"),
    ):
        with pytest.raises(SystemExit):
            main([*command, str(scores)])
        assert message in capsys.readouterr().err
        assert scores.read_bytes() == before
    recorded.unlink()
    with pytest.raises(SystemExit):
        main([*command, str(recorded)])
    assert not recorded.exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 1, "results": [{"kind": [], "name": "a"}]}',
        '{"format": 1, "results": [{"kind": "text", "name": "\\ud800"}]}',
        '{"format": 1, "results": ' + "[" * 100_000,
        '{"format": 1, "results": 5}',
        "[]",
        "\xff",
    ],
)
def test_a_damaged_record_is_said_and_stays(byte_model, story, tmp_path, capsys, text):
    folder = shutil.copytree(byte_model, tmp_path / "dense")
    (folder / "eval.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(folder), "--text", str(story), "--limit", "1"])
    assert stopped.value.code == 2
    assert "is not what `upcycle eval` writes" in capsys.readouterr().err
    assert (folder / "eval.json").read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"length": 49}, "the model takes 48 tokens"),
        ({"length": 8, "stride": 9}, "tokens would be left out"),
        ({"stride": 0}, "--stride 0; it must be 1 or more"),
        ({"batch_size": -1}, "--batch-size -1; it must be 0 or more"),
        ({"separator": ""}, "leave it out"),
        ({"num_fewshot": 3}, "--num-fewshot 3 is for --tasks or --task-files, and nothing of that is scored"),
        ({"per_class": 3}, "--per-class 3 is for --few-shot, and nothing of that is scored"),
        ({"text": None, "chats": "{story}", "stride": 4}, "--stride 4 is for --text, and nothing of that"),
        ({"text": None, "chats": "{story}", "separator": "|"}, r"--separator \| is for --text, and nothing"),
        ({"text": None, "tasks": ("piqa",), "length": 4}, "--length 4 is for --text or --chats, and nothing"),
        (
            {"text": "{lines}", "separator": "|"},
            r"--separator = '\|' is for text files, and .*lines\.jsonl has",
        ),
    ],
)
def test_mistakes_in_how_a_text_is_scored(byte_model, story, asked, message, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}')
    places = {"{story}": story, "{lines}": tmp_path / "lines.jsonl"}
    given = {key: places.get(value, value) for key, value in asked.items()}
    with pytest.raises(UpcycleError, match=message):
        evaluate(byte_model, ToScore(**{"text": story, **given}))


def test_rows_are_as_long_as_the_model_takes(story, tmp_path):
    """RoBERTa begins its positions behind the padding token, so that it takes fewer than it has."""
    model = make(tmp_path, "RobertaForMaskedLM", vocab_size=300, max_position_embeddings=20, pad_token_id=1)
    make_bytes_tokenizer(model, "<mask>")
    about = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**about, "mask_token": "<mask>"}))
    (found,) = evaluate(model, ToScore(text=story, limit=2))["results"]
    assert found["data"]["length"] == 18
    with pytest.raises(UpcycleError, match=r"length = 19 and the model takes 18 tokens"):
        evaluate(model, ToScore(text=story, limit=2, length=19))


def test_a_separator_is_for_the_texts_that_can_have_one(byte_model, story, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "abc"}\n{"text": "de"}')
    asked = ToScore(text=(story, tmp_path / "lines.jsonl"), separator="<|>")
    both = {each["name"]: each for each in evaluate(byte_model, asked)["results"]}
    alone = evaluate(byte_model, ToScore(text=tmp_path / "lines.jsonl"))["results"][0]
    assert both["lines.jsonl"]["metrics"] == alone["metrics"]


def test_a_field_is_named(byte_model, tmp_path):
    lines = {"text": STORY[0], "body": STORY[1]}
    (tmp_path / "lines.jsonl").write_text(json.dumps(lines))
    (tmp_path / "body.jsonl").write_text(json.dumps({"text": STORY[1]}))
    found = evaluate(byte_model, ToScore(text=tmp_path / "lines.jsonl", field="body"))["results"][0]
    wanted = evaluate(byte_model, ToScore(text=tmp_path / "body.jsonl"))["results"][0]
    assert found["metrics"] == wanted["metrics"]
    assert found["data"]["field"] == "body"
    assert "field" not in wanted["data"]


def test_rows_that_do_not_overlap_have_no_stride(tmp_path):
    model = make(tmp_path, "BertForMaskedLM")
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(
        UpcycleError, match=r"--stride 4 is for decoders, and BertForMaskedLM is scored on rows"
    ):
        evaluate(model, ToScore(text=tmp_path / "a.txt", stride=4))


def test_mistakes_in_what_is_given(byte_model, story, tmp_path):
    with pytest.raises(UpcycleError, match="one file name"):
        ToScore(text=(story, tmp_path / story.name))
    with pytest.raises(UpcycleError, match=r"no data at .*nowhere\.txt"):
        evaluate(byte_model, ToScore(text=tmp_path / "nowhere.txt"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UpcycleError, match=f"upcycle export {tmp_path}/run OUT"):
        evaluate(tmp_path / "run", ToScore(text=story))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UpcycleError, match=r"empty\.txt holds no text"):
        evaluate(byte_model, ToScore(text=tmp_path / "empty.txt"))
