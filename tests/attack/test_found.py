"""Inputs that once crashed a command, hung it, or went through in silence: one of each kind."""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open
from workshop import WORDS, Workshop

from upcycle import UpcycleError, convert, verify
from upcycle.checkpoints.checkpoint import read_json
from upcycle.checkpoints.header import read_header
from upcycle.data import batches, documents, image_files
from upcycle.data.corpus import read_tokenizer
from upcycle.data.documents import Source
from upcycle.data.texts import TextSet
from upcycle.evaluation import results
from upcycle.hf import models
from upcycle.records.state import RunState
from upcycle.reporting.starts import DenseCost
from upcycle.reporting.study import study


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("found"))


def changed(folder: Path, name: str, **values: Any) -> Path:
    """A folder with other values in a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"__metadata__": {"\ud800": "pt"}}).encode(),
        json.dumps({"__metadata__": {"\ud800": "pt"}}, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        json.dumps({"__metadata__": {"format": "pt"}}).encode("utf-16-le"),
        b"\xef\xbb\xbf" + json.dumps({"__metadata__": {"format": "pt"}}).encode(),
    ],
    ids=["escaped half of a character", "half of a character", "UTF-16", "byte order mark"],
)
def test_a_header_in_another_encoding(text: bytes, tmp_path: Path) -> None:
    """Other readers of safetensors refuse it."""
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "a.safetensors", "np")
    with pytest.raises(UpcycleError, match="the header is not valid JSON"):
        read_header(tmp_path / "a.safetensors")


def test_a_tokenizer_whose_template_names_tokens_that_do_not_exist(shop: Workshop, tmp_path: Path) -> None:
    """The tokenizers library panics when it encodes its first text, which no `except Exception` catches."""
    folder = shop.copied(shop.dense, "panic")
    file = folder / "tokenizer.json"
    single = [{"SpecialToken": {"id": "<gone>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    unnamed = template | {"special_tokens": {"x": {"id": "x", "ids": [], "tokens": [""]}}}
    unnamed.pop("type")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": unnamed}))
    with pytest.raises(UpcycleError, match="no tokenizer that can be read"):
        read_tokenizer(folder)
    made = tmp_path / "moe"
    convert(folder, made)
    tokens = next(check for check in verify(folder, made, logits=False).checks if check.name == "tokens")
    assert not tokens.holds


@pytest.mark.parametrize("layers", [10**300, 2**70, 10_001])
def test_a_folder_of_endlessly_many_blocks(layers: int, shop: Workshop) -> None:
    folder = changed(shop.copied(shop.out, "deep"), "config.json", num_hidden_layers=layers)
    with pytest.raises(UpcycleError, match="a model has 10,000 blocks at most"):
        models.open(folder)
    assert not verify(shop.dense, folder, logits=False).holds


@pytest.mark.parametrize("model_type", [[], {}, 5, None])
def test_a_type_of_model_that_is_no_text(model_type: Any, shop: Workshop, tmp_path: Path) -> None:
    folder = shop.copied(shop.dense, "no-type")
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, "model_type": model_type, "text_config": {}}))
    with pytest.raises(UpcycleError, match="model_type"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("names", [[{}], {"a": "b"}, [5], [], "", None, ["nn"], ["UpcycledAutoConfig"]])
def test_an_architecture_that_is_no_class_of_models(names: Any, shop: Workshop) -> None:
    folder = changed(shop.copied(shop.upcycled, "unnamed"), "config.json", architectures=names)
    with pytest.raises(UpcycleError, match=r"names no architecture|has no class of models|cannot be used"):
        models.open(folder)


def test_a_run_of_more_parameters_than_there_are_numbers(shop: Workshop) -> None:
    run, checkpoint = (shop.copied(folder, f"huge {i}") for i, folder in enumerate(shop.reported))
    changed(run, "run.json", active_parameters=10**400)
    assert "active_parameters" in " ".join(study([run, checkpoint], DenseCost()).troubles())


def read(path: Path, **options: Any) -> list[tuple[str, bool]]:
    return [*documents.documents(Source(path=str(path), **options))]


def test_text_that_begins_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS, encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": WORDS}), encoding="utf-8-sig")
    for name in ("a.txt", "a.jsonl"):
        assert read(tmp_path / name) == [(WORDS, True)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_another_encoding(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(f'{{"text": "{WORDS}é"}}'.encode("latin-1"))
    with pytest.raises(UpcycleError, match=f"{re.escape(name)} is not UTF-8 text .*; save it as UTF-8"):
        read(tmp_path / name)


def test_a_compressed_file_whose_inside_is_damaged(tmp_path: Path) -> None:
    raw = gzip.compress(json.dumps({"text": WORDS * 9}).encode(), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(raw[:10] + b"\xab9\x89I\xa99" + raw[16:])
    with pytest.raises(UpcycleError, match="cannot be read"):
        read(tmp_path / "a.jsonl.gz")


def test_a_label_that_no_machine_counts_to(shop: Workshop, tmp_path: Path) -> None:
    from upcycle.data.corpus import read_tokenizer

    (tmp_path / "a.jsonl").write_text(
        '{"text": "a", "label": 80591620717411303424}\n{"text": "b", "label": 0}'
    )
    words = read_tokenizer(shop.dense)
    with pytest.raises(UpcycleError, match=r"label 80591620717411303424; labels must all be whole numbers"):
        TextSet.open(tmp_path / "a.jsonl", words, length=8, fields=("text",), label_field="label")


def test_a_labelled_text_with_half_of_a_character(shop: Workshop, tmp_path: Path) -> None:
    from upcycle.data.corpus import read_tokenizer

    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "\\ud800", "label": 0}')
    words = read_tokenizer(shop.dense)
    with pytest.raises(UpcycleError, match=r"line 2 holds half of a character"):
        TextSet.open(tmp_path / "a.jsonl", words, length=8, fields=("text",), label_field="label")


def test_parquet_with_a_text_that_is_none(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a cat"] * 3}), path, compression="NONE")
    path.write_bytes(path.read_bytes().replace(b"a cat", b"a \xffat"))
    with pytest.raises(UpcycleError, match=r"a\.parquet has a text that is not UTF-8 .*; write it anew"):
        read(path)


def test_a_data_set_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises on the way is said in a sentence, as it is where it cannot be opened."""
    datasets = pytest.importorskip("datasets")

    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("the line is dead\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    source = Source(path="hf:some/where")
    found = documents.documents(source)
    assert next(found) == ("a", True)
    with pytest.raises(UpcycleError, match=r"hf:some/where cannot be read to its end: the line is dead$"):
        next(found)


@pytest.mark.parametrize("key", ["bos_token_id", "initializer_range", "task_specific_params", "x"])
def test_what_json_cannot_say_is_not_converted(key: str, shop: Workshop, tmp_path: Path) -> None:
    folder = changed(shop.copied(shop.dense, "no numbers"), "config.json", **{key: float("nan")})
    with pytest.raises(UpcycleError, match=f"{key} .*nan"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_no_float_can_hold(shop: Workshop, tmp_path: Path) -> None:
    """transformers reads them, and every division by them would end in an OverflowError."""
    (tmp_path / "config.json").write_text('{"r": 1' + "0" * 400 + "}")
    with pytest.raises(UpcycleError, match="a whole number of 401 digits, which no setting has"):
        read_json(tmp_path / "config.json", "it is not there")


def test_scores_that_are_nested_too_deep_to_be_written_again(tmp_path: Path) -> None:
    entry = '{"kind": "text", "name": "t", "metrics": {}, "data": ' + "[" * 200 + "]" * 200 + "}"
    (tmp_path / "eval.json").write_text('{"format": 1, "results": [' + entry + "]}")
    with pytest.raises(UpcycleError, match="nested deeper than 128 levels"):
        results.record(tmp_path, [], None)


def test_columns_of_images_whose_names_are_no_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="images in parquet need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [{"bytes": b"", "path": ""}], "label": [0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"label", b"\xecabel"))
    with pytest.raises(UpcycleError, match="is no whole parquet file"):
        image_files.images_at(tmp_path / "a.parquet", "image", "label")


@pytest.mark.parametrize("layout", [{"": 1, "fsdp": 1}, {"fsdp": 0}])
def test_a_state_of_ranks_that_do_not_exist(layout: dict[str, int]) -> None:
    table = {"format": 1, "step": 2, "batches": {}, "identity": {}, "layout": layout}
    with pytest.raises(UpcycleError, match="axes are replicate, fsdp, tp, ep"):
        RunState.of(table, "state.json")


def test_a_place_before_the_first_row(tmp_path: Path) -> None:
    state = {"sample": -1, "consumed": [8], "tokens": [20]}
    with pytest.raises(UpcycleError, match="its place in the data is damaged"):
        batches._refuse_damaged(state)
