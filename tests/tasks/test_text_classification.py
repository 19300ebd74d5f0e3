"""Classifiers of texts of every family: a run's first loss against transformers' own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny
from upcycle import UpcycleError
from upcycle.data.feeding import Feed, Feeding
from upcycle.dense.subject import Subject
from upcycle.tasks.text_classification import TextClassification
from upcycle.training import start
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.run import Run
from words import SPECIAL, WORDS, make_tokenizer, sentence

PAD, END = (SPECIAL.index(token) for token in ("[PAD]", "</s>"))
SILENT = {
    "T5": {"dropout_rate": 0.0, "classifier_dropout": 0.0},
    "Bart": {"dropout": 0.0, "activation_dropout": 0.0, "decoder_start_token_id": END},
    "DistilBert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "ModernBert": {},
    "Bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}

CLASSIFIERS = [  # whose families describe no head but the layer over classes
    "T5", "MT5", "Bart", "DistilBert", "ModernBert", "Electra", "DebertaV2", "Roberta", "XLMRoberta",
    "Camembert", "MPNet", "NomicBert",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 3 to 11 words with one of two classes."""
    file, rng = tmp_path_factory.mktemp("texts") / "texts.jsonl", np.random.default_rng(0)
    with file.open("w") as out:
        for _ in range(16):
            words = sentence(rng).split()[: int(rng.integers(3, 12))]
            label = "dog" if "dog" in words else "none"
            out.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return file


def classifier(folder: Path, name: str, *, ends: bool = True) -> Path:
    """A tiny classifier with a tokenizer; with `ends`, it ends every text with an end token."""
    size = len(SPECIAL) + len(WORDS) + 1
    special = {"vocab_size": size, "pad_token_id": PAD, "eos_token_id": END}
    made = tiny.make(folder, f"{name}ForSequenceClassification", **special, **SILENT.get(name, {}))
    make_tokenizer(made, ends=ends)
    return made


def table(source: Path, texts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "source": str(source), "out": str(out), "moe": {"num_experts": 4, "top_k": 2, "target": "upcycled"},
        "data": {"sources": [{"path": str(texts)}], "held_out": 0.0},
        "train": {"steps": 1, "batch_size": 16, "sequence_length": 16},
        "schedule": {"peak": 1e-3}, "checkpoint": {"every": 0}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_the_first_loss_is_that_of_the_dense_class(name, texts, tmp_path):
    """All experts are copies, so that the model computes what the dense class does with ids and a mask."""
    source = classifier(tmp_path / "dense", name)
    train(Run.of(table(source, texts, tmp_path / "run")))
    (line,) = read(tmp_path / "run")
    rows = [json.loads(row) for row in texts.read_text().splitlines()]
    given = transformers.AutoTokenizer.from_pretrained(source)(
        [row["text"] for row in rows], padding="max_length", max_length=16, return_tensors="pt"
    )
    model = getattr(transformers, f"{name}ForSequenceClassification").from_pretrained(source).eval()
    labels = torch.tensor([["dog", "none"].index(row["label"]) for row in rows])
    with torch.no_grad():
        wanted = model(input_ids=given.input_ids, attention_mask=given.attention_mask, labels=labels).loss
    assert line.loss == pytest.approx(float(wanted), rel=1e-5)
    real = int(given.attention_mask.sum())
    for layer in line.layers:  # padding is routed nowhere; a decoder reads a start token besides
        taken = np.array(layer.load) * 2 * (real + 16 * (layer.stack == "decoder"))
        assert taken == pytest.approx(taken.round(), abs=1e-3)


@pytest.mark.parametrize("name", ["Bert", *CLASSIFIERS])
def test_a_new_head_has_the_classes_that_are_asked_for(name, texts, tmp_path):
    """All else is the checkpoint's, and the new layer starts as transformers starts one."""
    source = classifier(tmp_path / "dense", name)
    task = {"name": "text_classification", "classes": 64}
    begun = start.start_of(Run.of(table(source, texts, tmp_path / "run", task=task)))
    made = start.plain_model(begun).state_dict()
    dense = getattr(transformers, f"{name}ForSequenceClassification")
    stored = dense.from_pretrained(source).state_dict()
    config = transformers.AutoConfig.from_pretrained(source, num_labels=64)
    fresh = dense(config).state_dict()
    new = [key for key, tensor in fresh.items() if tensor.shape != stored[key].shape]
    assert len(new) == 2
    for key in new:
        assert made[key].shape == fresh[key].shape
        assert float(made[key].std()) == pytest.approx(float(fresh[key].std()), rel=0.15)
    kept = made.keys() & stored.keys() - {*new}
    assert len(kept) > len(stored) / 2
    assert all(torch.equal(made[key], stored[key]) for key in kept)


@pytest.mark.parametrize("classes", [0, 2])
def test_a_model_without_a_classifier_is_told_where_to_get_one(classes, texts, tmp_path):
    source = tiny.make(tmp_path / "bare", "BertModel")
    task = {"name": "text_classification", "classes": classes}
    with pytest.raises(UpcycleError, match=r"AutoModelForSequenceClassification\.from_pretrained") as said:
        train(Run.of(table(source, texts, tmp_path / "run", task=task)))
    assert ("task.classes" in str(said.value)) == bool(classes)


@pytest.mark.parametrize(
    ("ends", "text", "counts"), [(False, "the cat", "0 to 0"), (True, "the </s> cat", "1 to 2")]
)
def test_a_class_that_is_read_at_the_end_token_wants_one_in_every_text(ends, text, counts, texts, tmp_path):
    source, file = classifier(tmp_path / "dense", "T5", ends=ends), tmp_path / "texts.jsonl"
    file.write_text(texts.read_text() + json.dumps({"text": text, "label": "none"}) + "\n")
    message = rf"T5ForSequenceClassification reads the class at the last end token \(id {END}\), .* {counts}"
    with pytest.raises(UpcycleError, match=message):
        train(Run.of(table(source, file, tmp_path / "run")))


NAMES = [
    "entailment",
    "neutral",
    "contradiction",
]  # in an order that is neither the head's nor the alphabet's
HEAD = {"contradiction": 0, "neutral": 1, "entailment": 2}


def feed_of(texts: Path, source: Path) -> Feed:
    subject = Subject(folder=source, config=json.loads((source / "config.json").read_text()))
    return TextClassification().feed(Feeding.of_file(texts, length=8, cache=texts.parent), subject)


def labels_of(texts: Path, source: Path) -> list[int]:
    """The labels of a file of texts as numbers of the model's head."""
    feed = feed_of(texts, source)
    return feed.at(np.arange(sum(feed.trainable)))["labels"].tolist()


def class_labels(file: Path, labels: list[int], names: list[str] = NAMES) -> Path:
    """A parquet file of texts with a ClassLabel, as `datasets` writes one."""
    import datasets

    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    rows = {"text": ["the cat"] * len(labels), "label": labels}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)
    return file


def headed(folder: Path, names: list[str]) -> Path:
    """A classifier whose head has these names."""
    source = classifier(folder, "Bert")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(names))}))
    return source


def test_named_classes_of_parquet_are_those_of_the_head(tmp_path):
    """The same rows give the same labels, whether their classes are names or numbers with names."""
    source = headed(tmp_path / "dense", sorted(HEAD, key=HEAD.__getitem__))
    labels = [0, 1, 2, 0, 0, 1, 2, 2]
    lines = [json.dumps({"text": "the cat", "label": NAMES[label]}) for label in labels]
    (tmp_path / "names.jsonl").write_text("\n".join(lines))
    numbers = class_labels(tmp_path / "numbers.parquet", labels)
    assert labels_of(numbers, source) == [HEAD[NAMES[label]] for label in labels]
    assert labels_of(numbers, source) == labels_of(tmp_path / "names.jsonl", source)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("Contradiction NEUTRAL entailment", None),
        ("yes perhaps no", "entailment is yes, neutral is perhaps, contradiction is no"),
        (
            "yes neutral no",
            "has the class 'entailment', .*; call .*, store its numbers without names if they",
        ),
        (
            "yes perhaps no none",
            "has the class 'entailment', and the model's head has yes, perhaps, no and 1",
        ),
        ("con_tradiction yes no", "has the class 'entailment'"),
    ],
)
def test_numbers_whose_names_the_head_does_not_have(head, said, tmp_path, caplog):
    """They stay if all names are foreign to a head of as many classes. Capital letters do not count."""
    source, labels = headed(tmp_path / "dense", head.split()), [0, 1, 2, 0]
    file = class_labels(tmp_path / "numbers.parquet", labels)
    if said is not None and said.startswith("has"):
        with pytest.raises(UpcycleError, match=said):
            labels_of(file, source)
        return
    assert labels_of(file, source) == (labels if said else [HEAD[NAMES[label]] for label in labels])
    assert (said or "") in caplog.text
    assert ("the numbers decide" in caplog.text) == (said is not None)


def test_a_run_that_began_when_names_of_numbers_did_not_count(tmp_path):
    source = headed(tmp_path / "dense", sorted(HEAD, key=HEAD.__getitem__))
    feed = feed_of(class_labels(tmp_path / "numbers.parquet", [0, 1, 2, 0]), source)
    with pytest.raises(UpcycleError, match=r"other labels .*, and not their names, store them without names"):
        feed.restore(feed.state() | {"labels": "of the numbers"})


def test_a_test_set_may_lack_a_class_that_is_named(texts, tmp_path):
    source = classifier(tmp_path / "dense", "Bert")
    lines = texts.read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(line for line in lines if "none" in line))
    task = {"name": "text_classification", "classes": 2, "test": str(tmp_path / "test.jsonl")}
    made = table(source, texts, tmp_path / "run", task=task)
    with pytest.raises(
        UpcycleError, match=r"only one of them has dog; .* set task\.classes to the names of all"
    ):
        train(Run.of(made))
    made |= {"task": task | {"classes": ["none", "dog"]}, "out": str(tmp_path / "named")}
    train(Run.of(made))
    assert read(tmp_path / "named")[-1].held_out_accuracy is not None


def test_a_number_without_a_name_is_no_class(tmp_path):
    import pyarrow.parquet

    source = classifier(tmp_path / "dense", "Bert")
    rows = pyarrow.parquet.read_table(class_labels(tmp_path / "rows.parquet", [0, 1, 2, 0]))
    wrong = pyarrow.array([0, 1, 2, 3], rows.schema.field("label").type)
    pyarrow.parquet.write_table(
        rows.set_column(1, rows.schema.field("label"), wrong), tmp_path / "rows.parquet"
    )
    with pytest.raises(
        UpcycleError, match=r"label 3; labels must all be whole numbers of 0 to 2 \(it names 3 classes\)"
    ):
        labels_of(tmp_path / "rows.parquet", source)


def test_a_folder_of_texts_is_read_whole(texts, tmp_path, caplog):
    """In the order of its files, with classes on which all of them agree."""
    source, folder = classifier(tmp_path / "dense", "Bert"), tmp_path / "folder"
    config = json.loads((source / "config.json").read_text())
    named = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    (source / "config.json").write_text(json.dumps(config | named))
    (folder / "more").mkdir(parents=True)
    class_labels(folder / "b.parquet", [2, 1])
    class_labels(folder / "more" / "a.parquet", [0])
    (folder / "notes.txt").write_text("no rows")
    with caplog.at_level("INFO"):
        assert labels_of(folder, source) == [2, 1, 0]
    assert "1 files are not read, because of their endings (.txt)" in caplog.text
    class_labels(folder / "c.parquet", [0, 1], names=NAMES[::-1])
    with pytest.raises(UpcycleError, match=r"c\.parquet name other classes"):
        labels_of(folder, source)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.zst", "a.txt", "nowhere.jsonl"])
def test_a_file_of_another_kind_is_no_set_of_texts(name, texts, tmp_path):
    source = classifier(tmp_path / "dense", "Bert")
    if not name.startswith("nowhere"):
        (tmp_path / name).write_bytes(texts.read_bytes())
    with pytest.raises(UpcycleError, match=r"; allowed: \.jsonl, \.jsonl\.gz, \.parquet, a folder$"):
        labels_of(tmp_path / name, source)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["dog", None, "cat"], r"line 2 has no label: 'label' is null"),
        (["dog", "cat", 3], r"line 3: label 3; labels must"),
        ([0, 1, "dog"], r"line 3: label 'dog'; labels must"),
    ],
)
def test_the_odd_label_is_named_with_its_row(labels, said, tmp_path):
    source, file = classifier(tmp_path / "dense", "Bert"), tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": "the cat", "label": label}) for label in labels))
    with pytest.raises(UpcycleError, match=said):
        labels_of(file, source)
