"""Chats as training data: messages from JSON lines or parquet, in the three forms that people write.

A row has `messages`, or `prompt` and `completion`, or ShareGPT's `conversations`. It may have `tools`, and a
system prompt as `system`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.data.documents import (
    PLAIN,
    Source,
    dataset_rows,
    files,
    is_dataset,
    json_lines,
    kind,
    parquet_rows,
    say_left_out,
)
from upcycle.errors import UpcycleError, listed, shown

Message = dict[str, Any]
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_SHAREGPT = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
}
_MARKS = ("weight", "train")  # on a message: 0 or false if it is not to be learnt
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The messages of a chat, each with `role` and `content`, and the tools that the assistant may call."""

    where: str  # file and line, for messages
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    unlearnt: frozenset[int] = frozenset()  # places of answers that are marked as not to be learnt

    @property
    def answers(self) -> list[int]:
        """The places of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT]


def read(path: str | Path, split: str = "train") -> Iterator[Chat]:
    """Yield the chats of a JSON lines or parquet file, of a folder of them, or of a Hugging Face dataset.

    Raises `UpcycleError` for a row that is no chat: an unknown role, an empty message, no assistant, media.
    """
    source = Source(path=str(path), split=split)
    if is_dataset(source):
        for where, row in dataset_rows(source):
            yield chat_of(_without_none(row), where)
        return
    say_left_out(source)
    for file in files(source):
        if kind(file) == ".parquet":
            for number, row in enumerate(parquet_rows(file)):
                yield chat_of(_without_none(row), f"{file}, row {number}")
        elif kind(file) not in PLAIN:
            for where, row in json_lines(file):
                yield chat_of(row, where)
        else:
            raise UpcycleError(f"{file} holds no chats; give JSON lines (.jsonl) or parquet")


def chat_of(row: Mapping[str, Any], where: str) -> Chat:
    """Return the chat in a row of data. Raises `UpcycleError` if there is none that can be used."""
    if media := [name for name in _MEDIA if row.get(name)]:
        raise UpcycleError(f"{where} has {media[0]!r}; chats are text alone, so leave this chat out")
    if row.get("functions"):
        raise UpcycleError(f"{where} has 'functions', OpenAI's older form; give them as 'tools'")
    marked = [_message(each, where) for each in _messages(row, where)]
    messages = tuple(message for message, _ in marked)
    chat = Chat(
        where=where,
        messages=messages,
        tools=_tools(row.get("tools"), where),
        unlearnt=frozenset(place for place, (_, learnt) in enumerate(marked) if not learnt),
    )
    if chat.unlearnt.issuperset(chat.answers):
        which = " without weight = 0 or train = false" if chat.answers else ""
        raise UpcycleError(
            f"{where} has no message of the assistant{which}, so nothing to learn; take it out"
        )
    try:
        json.dumps([messages, chat.tools], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise UpcycleError(f"{where} holds half of a character (a lone surrogate); take it out") from None
    return chat


def _messages(row: Mapping[str, Any], where: str) -> list[Any]:
    """Return the messages of a row, whatever form it has, after the system prompt that stands beside them."""
    messages = _as_messages(row, where)
    if not (told := row.get("system")):
        return messages
    first = messages[0] if isinstance(messages[0], Mapping) else {}
    if first.get("role", first.get("from")) not in ("system", "developer"):
        return [{"role": "system", "content": told}, *messages]
    if told not in (first.get("content"), first.get("value")):
        raise UpcycleError(
            f"{where} has a 'system' beside its messages, and another text in a first message of the system; "
            f"leave one of them out"
        )
    return messages


def _as_messages(row: Mapping[str, Any], where: str) -> list[Any]:
    if row.get("messages") is not None:
        return _list(row["messages"], "messages", where)
    if row.get("conversations") is not None:
        return _list(row["conversations"], "conversations", where)
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _turns(row, "prompt", "user", where) + _turns(row, "completion", ASSISTANT, where)
    raise UpcycleError(
        f"{where} has neither 'messages' nor 'conversations' nor 'prompt' and 'completion'; it has "
        f"{listed(sorted(map(str, row)))}"
    )


def _list(given: Any, name: str, where: str) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise UpcycleError(f"{where}: {name!r} must be a list of messages, and it is {shown(given)}")
    return given


def _turns(row: Mapping[str, Any], name: str, role: str, where: str) -> list[Any]:
    """Return one side of a prompt and its completion: a text of `role`, or messages."""
    given = row[name]
    return [{"role": role, "content": given}] if isinstance(given, str) else _list(given, name, where)


def _message(given: Any, where: str) -> tuple[Message, bool]:
    """Return a message with `role` and with `content` as text, and whether an answer is to be learnt."""
    if not isinstance(given, Mapping):
        raise UpcycleError(f"{where}: {shown(given)} is no message; give an object with role and content")
    message = {name: value for name, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": _SHAREGPT.get(str(role), role), "content": message.pop("value", None), **message}
    role = message.get("role")
    if role not in ROLES:
        raise UpcycleError(f"{where} has the role {shown(role)}; allowed: {', '.join(ROLES)}")
    learnt = _is_learnt(message, where)
    content = _text(message.get("content"), where)
    if not content.strip() and not (role == ASSISTANT and message.get("tool_calls")):
        raise UpcycleError(f"{where} has a message of the role {role!r} without content; take the chat out")
    unmarked = {name: value for name, value in message.items() if name not in _MARKS}
    return unmarked | {"content": content}, learnt


def _is_learnt(message: Message, where: str) -> bool:
    """Return whether the marks of a message leave it to be learnt: OpenAI's `weight`, and `train`."""
    if message["role"] != ASSISTANT:
        if message.get("train"):
            raise UpcycleError(
                f"{where} has train = {shown(message['train'])} on a message of the role "
                f"{message['role']!r}, and only what the assistant says is learnt; take the mark out"
            )
        return True
    for name in _MARKS:
        if (value := message.get(name, 1)) not in (0, 1):
            raise UpcycleError(
                f"{where} has {name} = {shown(value)} on a message; allowed: 1, and 0 for one that is "
                f"not learnt"
            )
    return all(message.get(name, 1) for name in _MARKS)


def _text(content: Any, where: str) -> str:
    """Return the content of a message as one text; it may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise UpcycleError(f"{where}: the content {shown(content)} must be text, or a list of parts")
    odd = next((part for part in content if part.get("type") != "text"), None)
    if odd is not None:
        raise UpcycleError(
            f"{where} has content of the type {shown(odd.get('type'))}; chats are text alone, so leave this "
            f"chat out"
        )
    if not all(isinstance(part.get("text"), str) for part in content):
        raise UpcycleError(f"{where} has a part of the type 'text' without text; take the chat out")
    return "".join(part["text"] for part in content)


def _tools(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Return the tools of a chat: a list of JSON schemas, or that list as a string."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise UpcycleError(f"{where}: 'tools' is not JSON: {error}") from None
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise UpcycleError(f"{where}: 'tools' must be a list of JSON schemas, and it is {shown(given)}")
    return tuple(given)


def _without_none(value: Any) -> Any:
    """Leave out what a column of parquet has for other rows and not for this one."""
    if isinstance(value, dict):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
