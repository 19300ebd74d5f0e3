"""Documents become token files once; token files become rows, the same on any ranks, resumed anywhere."""

from __future__ import annotations

import builtins
import errno
import gzip
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from heard import Counted
from upcycle.checkpoints.checkpoint import file_hash
from upcycle.data import corpus, documents, folders, leaks, splits
from upcycle.data import pieces as cut
from upcycle.data.batches import Batches
from upcycle.data.corpus import Data, Source, Tokens, prepare
from upcycle.data.feeding import Feeding
from upcycle.data.texts import TextSet
from upcycle.errors import UpcycleError
from upcycle.system.progress import reporting_to
from upcycle.tasks._tokens import TokenFeed
from upcycle.tensors import rng

BOS, EOS = 256, 257


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer of 258 tokens that puts <s> before a text and nothing after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenised(bytes_folder: Path, tmp_path: Path) -> Callable[..., Tokens]:
    """A function that tokenises one source with the byte-level tokenizer."""

    def make(
        path: Path | str,
        *,
        vocab_size: int = 258,
        append_eos: bool = True,
        checked: Any = None,
        **options: Any,
    ) -> Tokens:
        data = Data(sources=(Source(path=str(path), **options),), append_eos=append_eos)
        (tokens,) = prepare(
            data, bytes_folder, tmp_path / "cache", vocab_size=vocab_size, checked=checked or {}
        )
        return tokens

    return make


def documents_of(tokens: Tokens, folder: Path) -> list[str]:
    """The documents in a token file of the byte-level tokenizer."""
    from transformers import AutoTokenizer

    ids = tokens.ids()
    parts = np.split(np.asarray(ids), np.flatnonzero(ids == EOS) + 1)
    assert not len(parts.pop())
    assert all(part[0] == BOS for part in parts)
    assert Counter(ids.tolist())[BOS] == len(parts)
    return [AutoTokenizer.from_pretrained(folder).decode(part[1:-1]) for part in parts]


# --- documents -> token files

TEXTS = ["One day.", "Zwölf Äpfel 🍎", "  spaces \n and lines\n\n", "last"]


def _txt(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("<sep>\n".join(TEXTS))
    return {"path": folder / "a.txt", "separator": "<sep>\n"}


def _jsonl(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_text("\n\n".join(json.dumps({"n": 1, "body": t}) for t in TEXTS))
    return {"path": folder / "a.jsonl", "field": "body"}


def _jsonl_gz(folder: Path) -> dict[str, Any]:
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in TEXTS)
    return {"path": folder / "a.jsonl.gz"}


def _parquet(folder: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=3)
    return {"path": folder / "a.parquet"}


def _folder(folder: Path) -> dict[str, Any]:
    (folder / "deep").mkdir()
    (folder / "README.md").write_text("not data")
    (folder / "1.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:2]))
    (folder / "2.txt").write_text(TEXTS[2])
    (folder / "deep" / "3.text").write_text(TEXTS[3])
    return {"path": folder}


def _saved(folder: Path) -> dict[str, Any]:
    import datasets

    splits = {"train": ["other"], "mine": TEXTS}
    made = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()})
    made.save_to_disk(folder / "saved")
    return {"path": folder / "saved", "split": "mine"}


def _hub(folder: Path) -> dict[str, Any]:
    return {"path": f"hf:{_jsonl(folder)['path'].parent}", "field": "body"}  # a folder is as good as a hub id


@pytest.mark.parametrize("kind", [_txt, _jsonl, _jsonl_gz, _parquet, _folder, _saved, _hub])
def test_documents_of_every_kind(
    kind: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
    tokenised: Callable[..., Tokens],
    bytes_folder: Path,
) -> None:
    (tmp_path / "data").mkdir()
    tokens = tokenised(**kind(tmp_path / "data"))
    # In a text file with a separator, line breaks around a document belong to the separator.
    wanted = [t.strip("\n") if kind is _txt else t for t in TEXTS]
    assert documents_of(tokens, bytes_folder) == wanted
    assert tokens.documents == len(TEXTS)
    assert tokens.bytes == sum(len(t.encode()) for t in wanted)
    assert tokens.count == tokens.bytes + 2 * len(TEXTS)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ("a.jsonl", {"separator": "###"}, "separator = '###' is for text files, and "),
        ("a.txt", {"field": "body"}, "field = body is for JSON lines, parquet and datasets, and "),
        ("a.txt", {"split": "test"}, "split = test, and .* is no dataset with splits"),
        (". a.jsonl", {"split": "test"}, "split = test, and .* is no dataset with splits"),
        (". train-00000-of-00001.parquet test-00000-of-00001.parquet", {}, "of the splits test, train, and"),
        (". train_sft-00000-of-00001-0f.parquet test_sft-00000-of-00001.parquet", {}, "test_sft, train_s"),
        (". train.jsonl validation.jsonl", {"split": "train"}, "of the splits train, validation, and a"),
        (". train/a.txt test/a.txt", {}, "of the splits test, train, and a folder is read whole"),
        (". train-00000-of-00002.parquet train-00001-of-00002.parquet", {}, None),
        (". wiki-00000-of-00001.parquet test-00000-of-00001.parquet a.txt", {"separator": "#"}, None),
        (". training.txt how_to_test.txt", {"separator": "#"}, None),
        (". a.txt b.jsonl", {"separator": "###", "field": "body"}, None),
        ("a.jsonl", {"field": "body", "weight": 2.0}, None),
    ],
)  # fmt: skip
def test_keys_of_a_source_that_do_nothing(
    files: str, options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    """`files` has the path of the source, and those of files in it."""
    for name in files.split():
        if name != ".":
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    said = splits.unread(Source(path=str(tmp_path / files.split()[0]), **options))
    assert (said is None) if message is None else re.search(message, str(said)), said


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A folder of two texts and a table, with ways to the same files besides."""
    for name in ("mix/a.txt", "mix/b.txt", "mix/rows.jsonl", "mix/notes.md", "texts/a.jsonl", "texts/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c.txt").touch()
    (tmp_path / "same").symlink_to("mix")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "z.txt").symlink_to("../mix/b.txt")
    (tmp_path / "other" / "notes.md").symlink_to("../mix/notes.md")
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "inside").symlink_to("../mix")
    return tmp_path


@pytest.mark.parametrize(
    ("one", "other", "file"),
    [
        ({"path": "mix"}, {"path": "mix/a.txt"}, "a.txt"),
        ({"path": "other"}, {"path": "mix"}, "b.txt"),
        ({"path": "around"}, {"path": "mix/b.txt"}, "b.txt"),
        ({"path": "mix"}, {"path": "mix", "separator": "#"}, "a.txt"),
        ({"path": "mix"}, {"path": "mix/a.txt", "field": "body"}, "a.txt"),
        ({"path": "texts"}, {"path": "texts", "field": "body"}, "b.txt"),
        # The same rows in the same order: these hold out the same.
        ({"path": "mix"}, {"path": "mix", "weight": 2.0}, None),
        ({"path": "mix"}, {"path": "same"}, None),
        ({"path": "mix/b.txt"}, {"path": "other"}, None),
        # No rows in common.
        ({"path": "mix"}, {"path": "c.txt"}, None),
        ({"path": "mix/rows.jsonl"}, {"path": "mix/rows.jsonl", "field": "body"}, None),
        ({"path": "hf:a/b"}, {"path": "hf:a/b", "split": "test"}, None),
    ],
)
def test_what_a_source_holds_out_no_other_trains_on(
    one: dict[str, Any], other: dict[str, Any], file: str | None, mixture: Path
) -> None:
    here = [given | {"path": given["path"] if ":" in given["path"] else str(mixture / given["path"])}
            for given in (one, other)]  # fmt: skip
    data = Data(sources=tuple(Source(**given) for given in here), held_out=0.1)
    for each in (data, replace(data, sources=data.sources[::-1])):
        said = leaks.within(each)
        assert (said is None) if file is None else f"both read {file}, and each holds out other" in str(said)
    assert leaks.within(replace(data, held_out=0.0)) is None


def test_a_folder_is_compared_without_asking_for_each_file(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system says where a folder lies, and where a link leads."""
    for number in range(50):
        (mixture / "mix" / f"{number}.png").touch()
    wanted, asked, real = (mixture / "mix" / "b.txt").resolve(), list[str](), os.path.realpath
    monkeypatch.setattr(
        os.path, "realpath", lambda path, **keys: asked.append(str(path)) or real(path, **keys)
    )
    sources = [Source(path=str(mixture / name)) for name in ("mix", "other")]
    assert leaks.shared(*sources) == wanted
    other = mixture / "other"
    assert {*asked} <= {*map(str, (mixture / "mix", other, other / "z.txt", other / "notes.md"))}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"held_out": 0.05}, {"held_out": 0.3}, True),
        ({}, {"held_out": 0.3}, True),
        ({"held_out": 0.3, "split_seed": 1}, {"held_out": 0.3}, True),
        ({"held_out": 0.3}, {"held_out": 0.3, "path": "mix/a.txt"}, True),
        ({"held_out": 0.3}, {"held_out": 0.3, "append_eos": False}, True),
        ({"held_out": 0.3, "tokenizer": "other"}, {"held_out": 0.3}, True),
        # What the later stage holds out, the earlier one holds out as well.
        ({"held_out": 0.3}, {"held_out": 0.3, "path": "same"}, False),
        ({"held_out": 0.3}, {"held_out": 0.05}, False),
        ({"held_out": 0.3}, {}, False),
        ({"held_out": 0.05}, {"held_out": 0.3, "path": "c.txt"}, False),
        ({"path": "mix/rows.jsonl"}, {"path": "mix/rows.jsonl", "field": "body", "held_out": 0.3}, False),
        ({"path": "texts"}, {"path": "texts", "field": "body", "held_out": 0.3}, True),
    ],
)
def test_what_a_stage_is_scored_on_no_earlier_one_trains_on(
    before: dict[str, Any], after: dict[str, Any], said: bool, mixture: Path
) -> None:
    tables = []
    for table in (before, after):
        options = {"path": "mix", "field": "text"} | table
        source = Source(path=str(mixture / options.pop("path")), field=options.pop("field"))
        tables.append(Data(sources=(source,), **options))
    assert ("which it holds out, and an earlier stage trains on" in str(leaks.later(tables))) == said
    assert leaks.later([tables[0]] * 2) is None


@pytest.mark.parametrize("name", ["", "secret", "link.txt"])
def test_what_may_not_be_read_in_a_folder_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder, a folder in it, and a link to where this user may not go."""
    real, secret = os.scandir, str(tmp_path / name)
    (tmp_path / "secret").mkdir()
    for file in ("a.txt", "link.txt", "z.txt"):
        (tmp_path / file).touch()

    def forbidden() -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    @contextmanager
    def listed(folder: str) -> Iterator[list[Any]]:
        if folder == secret:
            forbidden()
        odd = SimpleNamespace(path=secret, is_file=forbidden, is_symlink=lambda: True)
        with real(folder) as entries:
            yield [odd if name.endswith(".txt") and entry.name == name else entry for entry in entries]

    monkeypatch.setattr(folders.os, "scandir", listed)
    with pytest.raises(UpcycleError, match=f"^{re.escape(secret)} cannot be read: Permission denied; let"):
        documents.files(Source(path=str(tmp_path)))


def test_a_folder_loses_no_file_without_a_word(
    tmp_path: Path, tokenised: Any, bytes_folder: Path, caplog: Any
) -> None:
    """Links are followed, also one that leads around, and an ending may have capital letters."""
    mix, away = tmp_path / "mix", tmp_path / "away"
    for folder in (mix / "b", away / "deep"):
        folder.mkdir(parents=True)
    (mix / "b" / "1.txt").write_text("one")
    (mix / "a").symlink_to(mix / "b")  # the way without links is taken
    (mix / "c").symlink_to(away)
    (away / "deep" / "2.TXT").write_text("two")
    (away / "deep" / "around").symlink_to(mix)
    (mix / "d.JSONL").write_text('{"text": "three"}')
    for name, target in {"e.txt": "nowhere", "loop": "loop", "z.txt": "d.JSONL/x"}.items():
        (mix / name).symlink_to(target)
    for name in ("README.md", "f.csv", "g.csv", "h.jsonl.zst", "LICENSE", ".hidden", ".git/config.md"):
        (mix / name).parent.mkdir(exist_ok=True)
        (mix / name).touch()
    read = [str(path.relative_to(mix)) for path in documents.files(Source(path=str(mix)))]
    assert read == ["b/1.txt", "c/deep/2.TXT", "d.JSONL"]
    with caplog.at_level("INFO"):
        found = tokenised(mix)
    assert documents_of(found, bytes_folder) == ["one", "two", "three"]
    said = (
        f"{mix}: 5 files are not read, because of their endings (.csv, .md, .zst and 1 more); those with .txt"
    )
    assert sum(record.message.startswith(said) for record in caplog.records) == 1


def test_splits_of_a_saved_data_set_are_known(tmp_path: Path) -> None:
    source = Source(path=str(_saved(tmp_path)["path"]), split="mine")
    assert splits.unread(source) is None
    assert "separator = '#' is for text files" in str(splits.unread(replace(source, separator="#")))
    with pytest.raises(UpcycleError, match=r"has no split 'other'; it has mine, train: name one of them"):
        next(documents.documents(replace(source, split="other")))


def test_a_text_file_without_separator_is_a_document(
    tmp_path: Path, tokenised: Any, bytes_folder: Path
) -> None:
    text = "a\r\n\nb\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert documents_of(tokenised(tmp_path / "a.txt"), bytes_folder) == [text]


@pytest.mark.parametrize(
    ("text", "separator", "said"),
    [
        (
            "one\r\n\r\ntwo",
            "\n\n",
            r"separator '\n\n' in it, so each text file is one document; "
            r"line ends in it may be \r\n and not \n",
        ),
        ("one two", "@@@", "separator '@@@' in it, so each text file is one document"),
        ("one@@@", "@@@", None),
        ("one two", None, None),
    ],
)
def test_a_separator_that_is_not_there_is_said(
    text: str, separator: str | None, said: str | None, tmp_path: Path, tokenised: Any, caplog: Any
) -> None:
    """Once for all files of a source; one file may well have no separator."""
    (tmp_path / "mix").mkdir()
    for name, content in {"a.txt": text, "b.txt": "alone", "c.jsonl": '{"text": "x"}\n{"text": "y"}'}.items():
        (tmp_path / "mix" / name).write_bytes(content.encode())
    tokenised(tmp_path / "mix", separator=separator)
    assert [record.message for record in caplog.records if "separator" in record.message] == (
        [] if said is None else [f"{tmp_path / 'mix'} has no {said}"]
    )


def test_empty_documents_are_left_out(tmp_path: Path, tokenised: Any, bytes_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("|one|||two|")
    tokens = tokenised(tmp_path / "a.txt", separator="|")
    assert documents_of(tokens, bytes_folder) == ["one", "two"]
    assert tokens.documents == 2


def test_eos_once(tmp_path: Path, tokenised: Any) -> None:
    (tmp_path / "a.txt").write_text("ab|cd</s>")
    assert np.flatnonzero(tokenised(tmp_path / "a.txt", separator="|").ids() == EOS).tolist() == [3, 7]
    kept = tokenised(tmp_path / "a.txt", separator="|", append_eos=False).ids()
    assert np.flatnonzero(kept == EOS).tolist() == [6]


def test_the_smallest_type_that_holds_the_vocabulary(tmp_path: Path, tokenised: Any) -> None:
    (tmp_path / "a.txt").write_text("abc")
    small, large = (tokenised(tmp_path / "a.txt", vocab_size=n) for n in (1 << 16, (1 << 16) + 1))
    assert (small.dtype, small.path.stat().st_size) == ("<u2", 2 * 5)
    assert (large.dtype, large.path.stat().st_size) == ("<u4", 4 * 5)
    np.testing.assert_array_equal(small.ids(), large.ids())


@pytest.mark.parametrize("name", ["bytes_folder", "stories"])
@pytest.mark.parametrize("separated", [True, False])
def test_pieces_give_the_ids_of_the_whole(
    name: str,
    separated: bool,
    request: pytest.FixtureRequest,
    tinystories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes keep the blank at a cut; SentencePiece, which puts one before a text, swallows it."""
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(name)
    text = tinystories.read_text()[:30_000]
    if not separated:
        text = text.replace("<|endoftext|>", "")
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(cut, "_PIECE", 300)
    monkeypatch.setattr(cut, "_BATCH", 1000)
    calls: list[int] = []
    data = Data(sources=(Source(path=str(tmp_path / "a.txt"), separator="<|endoftext|>"),))
    with reporting_to(Counted("tokenising", calls.append)):
        (tokens,) = prepare(data, folder, tmp_path, vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = [
        i
        for t in text.split("<|endoftext|>")
        for i in [*tokenizer(t.strip("\n")).input_ids, tokenizer.eos_token_id]
    ]
    assert tokens.ids().tolist() == wanted
    assert sum(calls) == tokens.bytes == sum(len(t.strip("\n").encode()) for t in text.split("<|endoftext|>"))
    assert len(calls) > 20


def test_text_without_blanks_is_cut_all_the_same(
    tmp_path: Path, tokenised: Any, bytes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut, "_PIECE", 50)
    text = "".join(chr(0x4E00 + i) for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    assert documents_of(tokenised(tmp_path / "a.txt"), bytes_folder) == [text]


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab \n|"), min_size=1, max_size=80), st.sampled_from(["|", "\n\n", "\n|\n"]))
@example("\n|\n\n\n\n a", "\n|\n")
@example("\n\na\n\n\na\n\n\n\n|", "\n\n")
def test_a_document_loses_the_line_breaks_around_it_alone(
    tmp_path_factory: Any, text: str, separator: str
) -> None:
    """Whether it comes in one piece or in several."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text)
    for size in (1000, 5, 3, 2):
        found: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "_PIECE", size)
            for piece, begins in documents.documents(Source(path=str(path), separator=separator)):
                found = [*found, piece] if begins else [*found[:-1], found[-1] + piece]
        assert found == [each.strip("\n") for each in text.split(separator)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("ab \nß"), min_size=1, max_size=80), min_size=1, max_size=4), st.data()
)
def test_pieces_are_the_documents(documents: list[str], data: st.DataObject) -> None:
    """However the readers cut them, with a tokenizer of characters."""
    stream = []
    for text in documents:
        place = data.draw(st.integers(0, len(text)))
        stream += [(text[:place], True), (text[place:], False)]

    class Characters:
        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "_PIECE", 10)
        pieces = list(cut.pieces(stream, Characters(), Source(path="x")))
    joined = "".join("[" * p.begins + p.text + "]" * p.ends for p in pieces)
    assert joined == "".join(f"[{text}]" for text in documents)
    assert max(len(p.text) for p in pieces) <= 11
    assert sum(p.bytes for p in pieces) == len("".join(documents).encode())


def test_tinystories_reads_back(stories: Path, tinystories: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = Data(sources=(Source(path=str(tinystories), separator="<|endoftext|>"),), held_out=0.1)
    (tokens,) = prepare(data, stories, tmp_path, vocab_size=512)
    ids = np.asarray(tokens.ids())
    texts = [t.strip("\n") for t in tinystories.read_text().split("<|endoftext|>")]
    texts = [t for t in texts if t]
    assert (ids == 1).sum() == (ids == 2).sum() == tokens.documents == len(texts)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    for text, part in zip(texts[:300], np.split(ids, np.flatnonzero(ids == 2) + 1), strict=False):
        assert tokenizer.decode(part, skip_special_tokens=True) == text
    batches = Batches([tokens], [1.0], length=256, held_out=0.1, seed=0)
    row = batches.next(1)[0]
    assert tokenizer.decode(row[row > 2], skip_special_tokens=True).strip() != ""
    np.testing.assert_array_equal(
        batches.held_out(1)[0], ids[(start := batches.trainable[0] * 256) : start + 257]
    )


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_tokenised_once(tmp_path: Path, tokenised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    first = tokenised(path)
    assert sorted(p.suffix for p in first.path.parent.iterdir()) == [".bin", ".json", ".starts"]
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "encode", None)  # whoever tokenises again fails
        again = tokenised("a.txt")
    assert again.path == first.path
    np.testing.assert_array_equal(again.ids(), first.ids())


def test_one_process_reads_token_files_whole(
    tmp_path: Path, tokenised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do so only if they see another file, such as one on a disk of their own."""
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first, hashed = tokenised(path), []
    monkeypatch.setattr(corpus, "file_hash", lambda file: (hashed.append(file.suffix), file_hash(file))[1])
    checked = corpus.stamps_of([first])
    assert tokenised(path, checked=checked) == first
    assert not hashed
    first.path.write_bytes(first.path.read_bytes()[::-1])
    again = tokenised(path, checked=checked)
    assert ".bin" in hashed
    assert again == first
    np.testing.assert_array_equal(again.ids(), first.ids())


def test_a_token_file_that_nobody_has_checked_is_read_whole(
    tmp_path: Path, tokenised: Any, bytes_folder: Path
) -> None:
    """Another process sees the same text in another folder, and has made a file of it in the same cache."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("some text")
    first, other = (tokenised(tmp_path / name / "a.txt") for name in ("here", "there"))
    assert other.path != first.path
    assert other.sha256 == first.sha256
    other.path.write_bytes(other.path.read_bytes()[::-1])
    data = Data(sources=(Source(path=str(tmp_path / "here" / "a.txt")),))
    feeding = Feeding(data=data, length=2, seed=0, cache=tmp_path / "cache")
    subject: Any = SimpleNamespace(folder=bytes_folder, vocab_size=258)
    feed = TokenFeed(feeding, subject, lambda rows, keys: {"rows": rows})
    assert feed.known() == [(str(tmp_path / "here" / "a.txt"), [first.count, first.sha256, None])]
    again = tokenised(tmp_path / "there" / "a.txt", checked=feed.checked())
    np.testing.assert_array_equal(again.ids(), first.ids())


@pytest.mark.parametrize("change", ["text", "append_eos", "separator", "field", "tokenizer"])
def test_tokenised_again_when_something_changed(
    change: str, tmp_path: Path, tokenised: Any, bytes_folder: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("te t")
    first = tokenised(path)
    if change == "text":
        path.write_text("tent")
        second = tokenised(path)
        assert len(second.ids()) == len(first.ids())
    elif change == "tokenizer":
        described = json.loads((bytes_folder / "tokenizer.json").read_text())
        described["normalizer"] = {"type": "Lowercase"}
        other = tmp_path / "other"
        other.mkdir()
        (other / "tokenizer_config.json").write_text((bytes_folder / "tokenizer_config.json").read_text())
        (other / "tokenizer.json").write_text(json.dumps(described))
        data = Data(sources=(Source(path=str(path)),), tokenizer=str(other))
        (second,) = prepare(data, bytes_folder, first.path.parent, vocab_size=258)
    else:
        second = tokenised(path, **{change: {"append_eos": False, "separator": " ", "field": "x"}[change]})
    assert second.path != first.path


@pytest.mark.parametrize("damage", ["short", "long", "gone", "no json", "broken json", "other json"])
def test_a_damaged_cache_is_made_again(damage: str, tmp_path: Path, tokenised: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = tokenised(path)
    whole, about = first.path.read_bytes(), first.path.with_suffix(".json")
    if damage in ("short", "long"):
        first.path.write_bytes(whole[:-2] if damage == "short" else whole + b"\0\0")
    elif damage == "gone":
        first.path.unlink()
    elif damage == "no json":
        about.unlink()
    else:
        about.write_text('{"count": 1' if damage == "broken json" else '["count"]')
    assert tokenised(path) == first
    assert first.path.read_bytes() == whole


# --- bad input: one sentence each


def _error(tokenised: Any, path: Path | str, **options: Any) -> str:
    with pytest.raises(UpcycleError) as caught:
        tokenised(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.doc", b"text", ["a.doc", ".jsonl.gz", ".parquet", ".txt"]),
        ("a.txt", b"", ["a.txt holds no text"]),
        ("a.jsonl", b"\n\n", ["a.jsonl holds no text"]),
        ("a.jsonl", b'{"text": ""}\n', ["a.jsonl holds no text"]),
        ("a.txt", b"good \xff bad", ["a.txt is not UTF-8"]),
        ("a.jsonl", b'{"text": "good \xff bad"}', ["a.jsonl", "utf-8"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', ["a.jsonl, line 2 is not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n["b"]', ["a.jsonl, line 2 is not a JSON object"]),
        ("a.jsonl", b'{"title": "a", "body": "b"}', ["line 1", "'text'", "body, title"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}', ["line 2", "'text'", "int"]),
        ("a.jsonl", b'{"text": null}', ["line 1", "'text'", "NoneType"]),
        ("a.jsonl", b'{"text": "\\ud800"}', ["a.jsonl", "no Unicode text"]),
        ("a.jsonl.gz", b'{"text": "a"}', ["a.jsonl.gz cannot be read"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-12], ["a.jsonl.gz cannot be read"]),
        ("a.parquet", b"PAR1 and nothing that follows PAR1", ["a.parquet is no whole parquet file"]),
        ("a.parquet", b"", ["a.parquet is no whole parquet file"]),
    ],
)
def test_bad_files(name: str, content: bytes, said: list[str], tmp_path: Path, tokenised: Any) -> None:
    (tmp_path / name).write_bytes(content)
    text = _error(tokenised, tmp_path / name)
    assert [s for s in said if s not in text] == []
    cache = tmp_path / "cache"
    assert not cache.is_dir() or not list(cache.iterdir())


def test_missing_files(tmp_path: Path, tokenised: Any) -> None:
    assert "no data at" in _error(tokenised, tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no .txt" in _error(tokenised, tmp_path / "empty")
    assert "cannot be opened" in _error(tokenised, f"hf:{tmp_path}/none")


def test_bad_parquet(tmp_path: Path, tokenised: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "body": ["a"]}), path)
    assert "no column 'text'; it has n, body" in _error(tokenised, path)
    assert "'n' is no string but int" in _error(tokenised, path, field="n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["abc" * 1000] * 1000}), path, compression="NONE")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert "no whole parquet file" in _error(tokenised, path)


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_an_extra_that_is_not_installed(
    module: str, tmp_path: Path, tokenised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised(**_txt(tmp_path))  # so that transformers is imported
    path = {"pyarrow": tmp_path / "a.parquet", "datasets": "hf:owner/name"}[module]
    (tmp_path / "a.parquet").touch()
    imported = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    text = _error(tokenised, path)
    assert f"needs {module}: pip install 'upcycle[data]'" in text


def test_a_tokenizer_of_another_model(tmp_path: Path, tokenised: Any, bytes_folder: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    assert "the tokenizer has 258 tokens and the embedding 200 rows" in _error(
        tokenised, path, vocab_size=200
    )


def test_labelled_lines_end_at_line_feeds_alone(tmp_path: Path, bytes_folder: Path) -> None:
    """JSON may hold other line separators of Unicode as they are; files may be compressed."""
    from transformers import AutoTokenizer

    text = "a\u2028b\u2029c\x85d"
    rows = [json.dumps({"text": text, "label": n}, ensure_ascii=False) for n in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(bytes_folder)
    tokenizer.pad_token_id = EOS
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text("\n".join(rows))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        found = TextSet.open(path, tokenizer, length=32, fields=("text",), label_field="label")
        assert len(found) == 2
        assert tokenizer.decode(found.ids[0], skip_special_tokens=True) == text


def test_an_id_beyond_the_embedding(tmp_path: Path, tokenised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary with gaps has fewer tokens than its largest id."""
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "a.txt"
    path.write_text("</s>|abc")
    monkeypatch.setattr(PreTrainedTokenizerFast, "__len__", lambda self: 250)
    options = {"separator": "|", "append_eos": False}
    said = "gives id 257 in"
    assert said in (text := _error(tokenised, path, vocab_size=257, **options))
    assert "257 rows" in text
    tokenised(path, vocab_size=258, **options)
    assert said in _error(
        tokenised, path, vocab_size=257, **options
    )  # found in the cache, refused all the same


@pytest.mark.parametrize(
    ("model_type", "content"),
    [
        ("qwen2", None), ("qwen2", "{broken"), ("qwen2", '{"model": 1}'), ("t5", None), ("mt5", None),
    ],
)  # fmt: skip
def test_a_folder_without_tokenizer(model_type: str, content: str | None, tmp_path: Path) -> None:
    """transformers makes a Qwen2 tokenizer of one token, and T5's of 103 special ones and a blank."""
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    data = Data(sources=(Source(path=str(tmp_path / "a.txt")),))
    with pytest.raises(UpcycleError, match=r"has no tokenizer that can be read .*set data\.tokenizer"):
        prepare(data, tmp_path, tmp_path, vocab_size=200)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(UpcycleError, match="weight"):
        Source(path="x", weight=weight)


def test_bad_data() -> None:
    with pytest.raises(UpcycleError, match=r"data\.sources is empty"):
        Data(sources=())
    for held_out in (-0.1, 1.0, float("nan")):
        with pytest.raises(UpcycleError, match=r"data\.held_out"):
            Data(sources=(Source(path="x"),), held_out=held_out)
    with pytest.raises(UpcycleError, match="separator"):
        Source(path="x", separator="")


# --- token files -> rows


def token_file(folder: Path, ids: Sequence[int] | np.ndarray, name: str = "x") -> Tokens:
    array = np.asarray(ids, "<u4")
    path = folder / f"{name}.bin"
    array.tofile(path)
    return Tokens(path=path, count=len(array), dtype="<u4", documents=1, bytes=len(array), name=name)


@pytest.fixture
def batches(tmp_path: Path) -> Callable[..., Batches]:
    """A function that makes batches of sources of `sizes` tokens; no two tokens are the same."""

    def make(*sizes: int, weights: Sequence[float] | None = None, **options: Any) -> Batches:
        starts = np.cumsum([0, *sizes])
        files = [token_file(tmp_path, range(a, b), f"{a}") for a, b in pairwise(starts)]
        options = {"length": 8, "held_out": 0.0, "seed": 3} | options
        return Batches(files, weights or [1.0] * len(sizes), **options)

    return make


def test_rows_are_those_of_a_plain_count(batches: Any) -> None:
    """Without the class: places from sorting raw draws, sources from the stream of uniforms."""
    made = batches(8 * 20 + 3, 8 * 7 + 1, weights=[3.0, 1.0], held_out=0.2)
    assert made.trainable == [16, 6]
    assert made.next(0).shape == (0, 9)
    found = made.next(60)
    assert found.dtype == np.int64
    seen = [0, 0]
    for n in range(60):
        source = int(rng.uniforms(rng.key(3, "sources"), n, n + 1)[0] >= 0.75)
        epoch, place = divmod(seen[source], (16, 6)[source])
        row = rng.permutation(rng.key(3, "rows", source, epoch), (16, 6)[source])[place]
        seen[source] += 1
        first = (0, 163)[source] + row * 8
        assert found[n].tolist() == list(range(first, first + 9))
    assert made.epochs == [seen[0] / 16, seen[1] / 6]


def test_the_order_is_pinned(batches: Any) -> None:
    """A run that is gone on with under a later version must see the same rows."""
    assert batches(97, 49, weights=[2, 1], seed=7).next(12)[:, 0].tolist() == PINNED


PINNED = [137, 88, 121, 105, 72, 40, 48, 97, 0, 113, 64, 56]


def test_every_row_once_an_epoch_in_another_order(batches: Any) -> None:
    made = batches(8 * 50 + 1)
    epochs = [made.next(50)[:, 0] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(0, 400, 8))
    assert len({tuple(e) for e in epochs}) == 3
    assert made.epochs == [3.0]
    assert not np.array_equal(batches(401, seed=4).next(50)[:, 0], epochs[0])


def test_many_sources_are_sorted_once_an_epoch(batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, rows = 80, 5
    made = batches(*[8 * rows + 1] * sources)
    asked: list[Any] = []
    real = rng.permutation
    monkeypatch.setattr(rng, "permutation", lambda key, n: asked.append(key) or real(key, n))
    for _ in range(8):
        made.next(100)
    begun = sum(math.ceil(epochs) for epochs in made.epochs)
    assert begun > sources
    assert len(asked) == len(set(asked)) == begun


def test_resumed_at_every_position(batches: Any) -> None:
    options = {"weights": [2.0, 1.0], "held_out": 0.1}
    sizes = (8 * 12 + 1, 8 * 11 + 5)
    whole = batches(*sizes, **options).next(60)  # more than one epoch of each
    made = batches(*sizes, **options)
    for position in range(60):
        state = json.loads(json.dumps(made.state()))
        other = batches(*sizes, **options)
        other.restore(state)
        np.testing.assert_array_equal(other.next(60 - position), whole[position:])
        assert made.state() == state
        made.next(1)
    assert min(made.epochs) >= 1.5


def test_a_state_is_not_changed_by_going_on(batches: Any) -> None:
    made = batches(200)
    state = made.state()
    made.next(3)
    assert state == batches(200).state()
    made.restore(state)
    made.next(3)
    assert state == batches(200).state()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_parts_of_the_same_batches(ranks: int, batches: Any) -> None:
    whole, parts = batches(300, 100), [batches(300, 100) for _ in range(ranks)]
    share = 8 // ranks
    for _ in range(10):
        read = [p.next(8, slice(i * share, (i + 1) * share)) for i, p in enumerate(parts)]
        np.testing.assert_array_equal(np.concatenate(read), whole.next(8))
    assert all(p.state() == whole.state() for p in parts)


def test_a_rank_reads_only_its_part(batches: Any) -> None:
    made = batches(8 * 40 + 1)
    read = []

    class Watched:
        def __getitem__(self, place: slice) -> np.ndarray:
            read.append(place)
            return np.zeros(9)

    made._ids = [Watched()]
    made.next(16, slice(4, 8))
    assert len(read) == 4


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(30, 120), min_size=1, max_size=3),
    length=st.integers(1, 10),
    held_out=st.sampled_from([0.0, 0.25, 0.5]),
    steps=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 5),
)
def test_batch_sizes_do_not_matter_and_held_out_stays_out(
    sizes: list[int], length: int, held_out: float, steps: list[int], seed: int
) -> None:
    counts = [(n - 1) // length for n in sizes]
    assume(not held_out or all(0 < round(n * held_out) < n for n in counts))  # others are refused
    with tempfile.TemporaryDirectory() as folder:
        starts = np.cumsum([0, *sizes])
        pairs = pairwise(starts)
        files = [token_file(Path(folder), range(a, b), f"{a}") for a, b in pairs]
        options: dict[str, Any] = {"length": length, "held_out": held_out, "seed": seed}
        weights = [1.0 + i for i in range(len(sizes))]
        whole, stepped = Batches(files, weights, **options), Batches(files, weights, **options)
        rows = whole.next(max(sum(steps), 200))
        found = np.concatenate([stepped.next(n) for n in steps])
        np.testing.assert_array_equal(found, rows[: sum(steps)])
        kept = whole.held_out()
        assert not set(rows[:, 1:].ravel().tolist()) & set(kept[:, 1:].ravel().tolist())
        assert (np.diff(rows) == 1).all()
        assert (np.diff(kept) == 1).all()
        assert len(set(kept[:, 0])) == len(kept)
        assert len(kept) + sum(whole.trainable) == sum((n - 1) // length for n in sizes)


def test_sources_are_mixed_by_weight(batches: Any) -> None:
    made = batches(8 * 40 + 1, 8 * 4000 + 1, 8 * 400 + 1, weights=[1.0, 7.0, 2.0])
    n = 20_000
    first = made.next(n)[:, 0]
    source = np.searchsorted([321, 321 + 32_001], first, side="right")
    found = np.bincount(source) / n
    for share, wanted in zip(found, [0.1, 0.7, 0.2], strict=True):
        assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / n)
    # Mixed throughout: each row's source is drawn for itself, so that neighbours are independent.
    same = (source[1:] == source[:-1]).mean()
    assert abs(same - (0.01 + 0.49 + 0.04)) < 0.02
    np.testing.assert_allclose(made.epochs, found * n / [40, 4000, 400])


def test_held_out_rows_are_shared_by_weight(batches: Any) -> None:
    made = batches(8 * 100 + 1, 8 * 100 + 1, 8 * 100 + 1, weights=[6.0, 3.0, 1.0], held_out=0.5)

    def sources(rows: int) -> list[int]:
        found = made.held_out(rows)
        np.testing.assert_array_equal(found, made.held_out(rows))
        assert len(set(found[:, 0])) == len(found)
        assert len(found) <= rows
        return np.bincount(found[:, 0] // 801, minlength=3).tolist()

    assert sources(43) == [25, 13, 5]
    assert sources(3) == [1, 1, 1]
    assert sources(2) == [1, 1, 0]
    assert sources(1000) == [50, 50, 50]
    assert len(made.held_out()) == 150
    before = made.state()
    made.held_out()
    assert made.state() == before
    # Spread over the part that is held out
    assert made.held_out(43)[:25, 0].tolist() == list(range(400, 800, 16))


def test_too_little_text(batches: Any) -> None:
    with pytest.raises(UpcycleError, match=r"0 has 8 tokens, fewer than a row .* 9"):
        batches(8)
    assert batches(9).trainable == [1]
    with pytest.raises(UpcycleError, match=r"2 rows of 8 tokens.*held_out = 0.1 leaves none held out"):
        batches(17, held_out=0.1)
    with pytest.raises(UpcycleError, match=r"2 rows of 8 tokens.*held_out = 0.9 leaves none to train on"):
        batches(17, held_out=0.9)
    assert batches(17).held_out().shape == (0, 9)


def test_a_position_among_other_data(batches: Any) -> None:
    state = batches(200, 100).state()
    with pytest.raises(UpcycleError, match="200 has 101 tokens and had 100"):
        batches(200, 101).restore(state)
    with pytest.raises(UpcycleError, match="of 2 data sources and the run has 1"):
        batches(200).restore(state)


# --- files are known by content


@pytest.mark.usefixtures("on_screen")
def test_a_flipped_bit_of_a_token_file_is_seen(tmp_path: Path, tokenised: Any, capsys: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = tokenised(path)
    whole = first.path.read_bytes()
    first.path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert tokenised(path) == first
    assert first.path.read_bytes() == whole
    assert "is damaged; it is made anew" in " ".join(capsys.readouterr().err.split())


def test_token_files_of_older_versions_are_read(tmp_path: Path, tokenised: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = tokenised(path)
    about = first.path.with_suffix(".json")
    known = json.loads(about.read_text())
    old = {key: value for key, value in known.items() if key not in ("sha256", "files")}
    about.write_text(json.dumps(old))
    assert tokenised(path) == first
    assert json.loads(about.read_text()) == old  # found, not made
    first.path.write_bytes(b"\xff" * first.path.stat().st_size)
    assert tokenised(path).ids().max() == first.ids().max()


def test_a_text_with_another_content_and_the_same_size_and_time(tmp_path: Path, tokenised: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    first = tokenised(path).ids().tolist()
    before = path.stat()
    path.write_text("cba")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tokenised(path).ids().tolist() == [first[0], *first[3:0:-1], *first[4:]]
    # Touched and no more, it is not tokenised again.
    about = tokenised(path).path.with_suffix(".json").read_text()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tokenised(path).path.with_suffix(".json").read_text() == about


@pytest.mark.parametrize(
    "change",
    [
        {"count": "x"}, {"count": -1}, {"dtype": "O"}, {"dtype": 5}, {"largest_id": None}, {"files": 5},
        {"files": {"a": 1}}, {"documents": []}, {"count": 1 << 70}, {"sha256": 5},
    ],
)  # fmt: skip
def test_a_damaged_description_is_made_again(change: dict[str, Any], tmp_path: Path, tokenised: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = tokenised(path)
    about = first.path.with_suffix(".json")
    whole = about.read_text()
    about.write_text(json.dumps(json.loads(whole) | change))
    assert tokenised(path) == first
    assert about.read_text() == whole


def test_the_same_number_of_other_tokens(tmp_path: Path, tokenised: Any) -> None:
    path = tmp_path / "a.txt"
    states, made = [], []
    for text in ("abcd" * 20, "dcba" * 20):
        path.write_text(text)
        rows = Batches([tokenised(path)], [1.0], length=4, held_out=0.0, seed=0)
        rows.next(3)
        states.append(rows.state())
        made.append(rows)
    with pytest.raises(UpcycleError, match="has other tokens than it had when the checkpoint was saved"):
        made[1].restore(states[0])
    old = {key: value for key, value in states[0].items() if key != "sha256"}
    made[1].restore(old)  # a checkpoint of an older version does not say
    for broken in ({}, {**old, "tokens": 5}, {**old, "sample": "x"}, {**old, "consumed": []}):
        with pytest.raises(UpcycleError, match="place in the data is damaged"):
            made[1].restore(broken)


def test_more_files_of_a_folder_that_count_now(tmp_path: Path, tokenised: Any) -> None:
    """A run may have begun when links to folders and endings in capital letters did not count."""
    states, made = [], []
    for name in ("a.txt", "b.TXT"):
        (tmp_path / "mix").mkdir(exist_ok=True)
        (tmp_path / "mix" / name).write_text("abcd" * 20)
        made.append(Batches([tokenised(tmp_path / "mix")], [1.0], length=4, held_out=0.0, seed=0))
        states.append(made[-1].state())
    said = r"mix has 1\d\d tokens and had 8\d .*\(if links to folders and endings in capital letters did not"
    with pytest.raises(UpcycleError, match=said):
        made[1].restore(states[0])


# --- a few bytes that stand for many


def test_a_parquet_bomb_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """Rows of 64 KB, which a dictionary makes a few bytes of."""
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array(["x" * (1 << 16)]).dictionary_encode()
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(20_000, np.int32)), text.dictionary)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    before = pyarrow.default_memory_pool().max_memory()
    stream = corpus.documents(Source(path=str(tmp_path / "a.parquet")))
    assert sum(len(text) for text, _ in stream) == 20_000 << 16
    assert pyarrow.default_memory_pool().max_memory() - before < 200 << 20


def test_a_line_without_end(tmp_path: Path, tokenised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LINE", 1000)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "fine"}\n{"text": "' + "x" * 100_000)
    assert "a.jsonl.gz, line 2 is longer than 1,000 characters" in _error(tokenised, tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl").write_text("[" * 100_000 + "\n")
    monkeypatch.undo()
    assert "b.jsonl, line 1 is not JSON" in _error(tokenised, tmp_path / "b.jsonl")


def test_an_id_near_the_end_of_the_numbers(bytes_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(bytes_folder, tmp_path / "huge")
    described = json.loads((tmp_path / "huge" / "tokenizer.json").read_text())
    described["model"]["vocab"]["far"] = 2147483647
    (tmp_path / "huge" / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UpcycleError, match=r"'far' has the id 2147483647; ids must be less than 16,777,216"):
        corpus.read_tokenizer(tmp_path / "huge")


def test_a_tokenizer_with_code_of_its_own_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    named = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(UpcycleError, match="has no tokenizer that can be read"):
        corpus.read_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- documents that do not see each other


def test_positions_start_anew_at_each_document(tmp_path: Path, tokenised: Any, bytes_folder: Path) -> None:
    """Every document of the byte-level tokenizer begins with BOS; a row that cuts one begins anew with it."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "ab" * (i % 7)}) + "\n" for i in range(60)))
    tokens = tokenised(path)
    made = Batches([tokens], [1.0], length=10, held_out=0.2, seed=0)
    places = [*made.draw(13), *made.kept()]
    for ids, positions in zip(made.ids(places), made.positions(places), strict=True):
        wanted, here = [], 0
        for place, token in enumerate(ids):
            here = 0 if token == BOS or place == 0 else here + 1
            wanted.append(here)
        assert positions.tolist() == wanted
    assert len(tokens.first_ids()) == tokens.documents


def test_a_token_file_without_places_is_made_anew_if_they_are_asked_for(
    tmp_path: Path, tokenised: Any, bytes_folder: Path, caplog: Any
) -> None:
    """Those of older versions have none; the ids stay the same."""
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = tokenised(path)
    ids, about = first.path.read_bytes(), first.path.with_suffix(".json")
    old = {key: value for key, value in json.loads(about.read_text()).items() if key != "starts_sha256"}
    about.write_text(json.dumps(old))
    first.starts.unlink()
    assert tokenised(path).starts is None
    data = Data(sources=(Source(path=str(path)),), isolate=True)
    with caplog.at_level("INFO", "upcycle"):
        (again,) = prepare(data, bytes_folder, tmp_path / "cache", vocab_size=258)
    assert again == first
    assert first.path.read_bytes() == ids
    assert "does not say where documents begin" in caplog.text
