"""Chats in the forms that people write, what is refused, and how they are packed."""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from chats import turns, write
from upcycle import UpcycleError
from upcycle.data import chats
from upcycle.data.chat_rows import ChatRows, ChatTokens, first_fit
from upcycle.data.corruption import IGNORED

ASKED = [{"role": "system", "content": "Be brief."}, *turns("Hi?", "Yes.")]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def marked(**marks: Any) -> list[dict[str, Any]]:
    """A question, and an answer with marks."""
    asked, answer = turns("Hi?", "Yes.")
    return [asked, {**answer, **marks}]


FORMS = {
    "messages": {"messages": ASKED},
    "null fields": {"messages": [{**m, "tool_calls": None} for m in ASKED], "prompt": None},
    "parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in ASKED]},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi?"},
            {"from": "gpt", "value": "Yes."},
        ]
    },
    "sharegpt, system beside": {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}],
    },
    "prompt": {"prompt": ASKED[:2], "completion": ASKED[2:]},
    "messages, system beside": {"system": "Be brief.", "messages": ASKED[1:]},
    "the same system beside": {"system": "Be brief.", "messages": ASKED},
    "prompt, system beside": {"system": "Be brief.", "prompt": "Hi?", "completion": "Yes."},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_messages(form, tmp_path):
    (chat,) = chats.read(write(tmp_path / "chats.jsonl", [FORMS[form]]))
    assert list(chat.messages) == ASKED
    assert chat.answers == [2]
    assert chat.where == f"{tmp_path / 'chats.jsonl'}, line 1"


def test_a_prompt_and_its_completion_as_texts():
    chat = chats.chat_of({"prompt": "Hi?", "completion": "Yes."}, "here")
    assert list(chat.messages) == turns("Hi?", "Yes.")


def test_tools_and_calls_of_them():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    for tools in ([TOOL], json.dumps([TOOL])):
        chat = chats.chat_of({"messages": messages, "tools": tools}, "here")
        assert chat.tools == (TOOL,)
        assert chat.messages[1]["tool_calls"] == [call]
        assert chat.answers == [1, 3]


def test_parquet_compressed_lines_and_folders(tmp_path):
    """Parquet has a column for every field of any message; those that a message lacks are left out."""
    rows = [{"messages": [*ASKED, {"role": "user", "content": "So?", "name": "Al"}]}, {"messages": ASKED}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[1]).encode()))
    found = [list(chat.messages) for chat in chats.read(tmp_path)]
    assert found == [rows[0]["messages"], ASKED, ASKED]


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list([FORMS["messages"]]) for name in "ab"})
    whole.save_to_disk(tmp_path / "saved")
    (chat,) = chats.read(tmp_path / "saved", split="b")
    assert list(chat.messages) == ASKED


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "neither 'messages' nor 'conversations' nor 'prompt' and 'completion'; it has text"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": "Hi"}, "'messages' must be a list of messages, and it is 'Hi'"),
        ({"messages": ["Hi"]}, "'Hi' is no message; give an object"),
        ({"messages": [{"role": "narrator", "content": "Hi"}]}, "the role 'narrator'; allowed: system,"),
        ({"messages": [{"content": "Hi"}]}, "the role None; allowed"),
        ({"conversations": [{"from": "alien", "value": "Hi"}]}, "the role 'alien'; allowed"),
        ({"messages": turns("Hi?")}, "has no message of the assistant"),
        ({"messages": marked(weight=0)}, "no message of the assistant without weight = 0 or train = false"),
        ({"messages": marked(train=False)}, "no message of the assistant without weight = 0 or train"),
        ({"messages": marked(weight=0.5)}, "weight = 0.5 on a message; allowed: 1, and 0 for one that"),
        ({"messages": marked(train="no")}, "train = 'no' on a message; allowed: 1, and 0"),
        (
            {"messages": [{"role": "user", "content": "Hi?", "train": True}, ASKED[2]]},
            "train = True on a message of the role 'user', and only what the assistant says",
        ),
        ({"messages": turns("Hi?", " \n")}, "a message of the role 'assistant' without content"),
        ({"messages": turns("", "Yes")}, "a message of the role 'user' without content"),
        ({"messages": turns("Hi?", "Yes"), "images": ["a.png"]}, "has 'images'; chats are text alone"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
            "content of the type 'image_url'; chats are text alone",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "type 'text' without text"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content 3 must be text, or a list of parts"),
        ({"messages": turns("Hi?", "\ud800")}, "half of a character"),
        ({"messages": ASKED, "system": "Be long."}, "a 'system' beside its messages, and another text in"),
        ({"messages": turns("Hi?", "Yes"), "functions": [TOOL]}, "has 'functions', OpenAI's older form"),
        ({"messages": turns("Hi?", "Yes"), "tools": "{"}, "'tools' is not JSON"),
        ({"messages": turns("Hi?", "Yes"), "tools": {"a": 1}}, "'tools' must be a list of JSON schemas"),
    ],
)  # fmt: skip
def test_what_is_no_chat(row, message, tmp_path):
    path = write(tmp_path / "chats.jsonl", [FORMS["messages"], row])
    with pytest.raises(UpcycleError, match=message) as told:
        list(chats.read(path))
    assert "line 2" in str(told.value)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "chats.txt").write_text("Hi")
    with pytest.raises(UpcycleError, match="holds no chats; give JSON lines"):
        list(chats.read(tmp_path / "chats.txt"))


def chat(length: int, first: int, answered: slice) -> ChatTokens:
    answers = np.zeros(length, bool)
    answers[answered] = True
    return ChatTokens(ids=np.arange(first, first + length, dtype=np.int32), answers=answers)


def test_first_fit_is_the_plain_one():
    """The tree chooses what a search through all bins chooses."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes, room, wanted = rng.integers(1, 30, rng.integers(1, 60)).tolist(), [], []
        for size in sizes:
            place = next((i for i, left in enumerate(room) if left >= size), len(room))
            room += [29] * (place == len(room))
            room[place] -= size
            wanted.append(place)
        assert first_fit(sizes, 29) == wanted


def test_rows_hold_whole_chats():
    """A label is the next token of its own chat, at the assistant's alone; padding has none."""
    given = [chat(5, 10, slice(2, 4)), chat(6, 20, slice(0, 3)), chat(3, 30, slice(2, 3))]
    rows = ChatRows.of(given, name="x", length=8, cut=False, pack=True, padding=0)
    read = rows.rows(np.arange(len(rows)))
    x = IGNORED
    assert read["ids"].tolist() == [[10, 11, 12, 13, 14, 30, 31, 32], [20, 21, 22, 23, 24, 25, 0, 0]]
    assert read["labels"].tolist() == [[x, 12, 13, x, x, x, 32, x], [21, 22, x, x, x, x, x, x]]
    assert read["mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    alone = ChatRows.of(given, name="x", length=8, cut=False, pack=False, padding=0)
    assert alone.used.tolist() == [5, 6, 3]


def test_chats_that_are_too_long_are_left_out_or_cut_and_counted():
    late = chat(9, 40, slice(7, 9))  # nothing of its answer is in the first six tokens
    given = [chat(4, 10, slice(2, 4)), chat(9, 20, slice(2, 9)), late]
    out = ChatRows.of(given, name="x", length=6, cut=False, pack=True, padding=0)
    assert (out.chats, out.cut, out.left_out, len(out)) == (1, 0, 2, 1)
    cut = ChatRows.of(given, name="x", length=6, cut=True, pack=True, padding=0)
    assert (cut.chats, cut.cut, cut.left_out) == (2, 1, 1)
    assert cut.ids[1].tolist() == [20, 21, 22, 23, 24, 25]
    assert cut.labels[1].tolist() == [IGNORED, 22, 23, 24, 25, 26]
    assert any("of more than 6 tokens, which are cut (task.too_long): 1" in note for note in cut.notes())
    with pytest.raises(UpcycleError, match="x holds no chats; give a file"):
        ChatRows.of([], name="x", length=3, cut=False, pack=True, padding=0)
    with pytest.raises(
        UpcycleError, match=r"holds no chat that fits into .* = 3 tokens \(the shortest of 3 has 4\)"
    ):
        ChatRows.of(given, name="x", length=3, cut=False, pack=True, padding=0)
