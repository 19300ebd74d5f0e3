"""Chats as tokens, by the tokenizer's chat template, and which of them are the assistant's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle.data.chat_rows import ChatTokens
from upcycle.data.chats import Chat
from upcycle.errors import UpcycleError, cut, shown
from upcycle.tasks._chat_tools import ToolsShown

if TYPE_CHECKING:
    from upcycle.hf.chat_templates import Span, Template

_BATCH = 1024  # chats given to the tokenizer at once


def with_template(tokenizer: Any, path: str | None) -> Any:
    """Return the tokenizer with the chat template in the file `path`, or with its own if that is None.

    Raises `UpcycleError` if there is none, or if the tokenizer does not say where its tokens stand.
    """
    if path is not None:
        tokenizer.chat_template = read_template(path)
    if not tokenizer.chat_template:
        raise UpcycleError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; in a run, set "
            f"task.chat_template to a file with one (Jinja), or data.tokenizer to a folder that has one; "
            f"elsewhere, put it there as chat_template.jinja"
        )
    if not tokenizer.is_fast:
        raise UpcycleError(
            f"the tokenizer of {tokenizer.name_or_path} does not say which text its tokens are of, which "
            f"chats need; put tokenizer.json there, or in a run, set data.tokenizer to a folder that has it"
        )
    return tokenizer


def read_template(path: str) -> str:
    """Return the chat template in a file. Raises `UpcycleError` if it cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UpcycleError(f"task.chat_template = {path} cannot be read: {error}") from None
    if not text.strip():
        raise UpcycleError(f"task.chat_template = {path} is empty; give a file with a chat template (Jinja)")
    return text


def tokens_of(chats: Iterator[Chat], tokenizer: Any, today: date) -> list[ChatTokens]:
    """Return the tokens of each chat; `today` is the day that a template writes as today's.

    Raises `UpcycleError` for a chat that the template refuses, whose tools or calls it leaves out, or whose
    answers cannot be told apart.
    """
    find = cache(lambda tools: _template(tokenizer, tools=tools, today=today))
    shown_tools = ToolsShown()
    found: list[ChatTokens] = []
    while some := list(islice(chats, _BATCH)):
        rendered = [_rendered(chat, find(bool(chat.tools)), shown_tools) for chat in some]
        made = tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True
        )
        for chat, (_, spans), ids, offsets in zip(
            some, rendered, made["input_ids"], made["offset_mapping"], strict=True
        ):
            answers = _covered(np.array(offsets, np.int64).reshape(-1, 2), spans)
            if not answers[1:].any():
                raise UpcycleError(
                    f"{chat.where}: the chat template shows nothing of the assistant's messages as its own; "
                    f"take the chat out, or in a run, set task.chat_template to one that marks them "
                    f"(generation)"
                )
            found.append(ChatTokens(ids=np.array(ids, np.int32), answers=answers))
    return found


def end_of_answer(tokenizer: Any, today: date) -> int | None:
    """Return the special token that the chat template writes after an answer; None if there is none."""
    asked, answer = ({"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."})
    try:
        text, _ = _template(tokenizer, tools=False, today=today).render([asked, answer], ())
    except Exception:  # a template can refuse these two messages for any reason
        return None
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    answered = text.rfind(answer["content"]) + len(answer["content"])
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next(
        (
            id
            for id, (first, _) in zip(made["input_ids"], made["offset_mapping"], strict=True)
            if first >= answered and id in special
        ),
        None,
    )


def _template(tokenizer: Any, *, tools: bool, today: date) -> Template:
    from upcycle.hf.chat_templates import Template

    try:
        return Template.of(tokenizer, tools=tools, today=today)
    except ValueError as error:
        raise UpcycleError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template for these chats "
            f"({cut(str(error))}); in a run, set task.chat_template to a file with one (Jinja)"
        ) from None


def _covered(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Return which tokens have a character of a span, bool [T].

    Blanks can be trimmed from offsets; then a token of blanks alone is empty, and stands after them.
    """
    starts, ends = offsets.T
    found = np.zeros(len(offsets), bool)
    for first, stop in spans:
        empty = (starts == ends) & (first < ends) & (ends <= stop)
        found |= ((starts < stop) & (ends > first) & (starts < ends)) | empty
    return found


def _rendered(chat: Chat, template: Template, shown_tools: ToolsShown) -> tuple[str, list[Span]]:
    """Return the text of a chat, and the spans of the assistant's answers that are to be learnt."""
    text, spans = _render(chat, template, len(chat.messages))
    shown_tools.refuse_left_out(chat, template, text)
    if not template.marks:
        return text, _by_prefix(chat, template, text)
    return text, _learnt(chat, template, text, spans) if chat.unlearnt else spans


def _learnt(chat: Chat, template: Template, text: str, spans: list[Span]) -> list[Span]:
    """Return the marked spans of the answers that are to be learnt.

    The spans of an answer are those that the chat has more with it than before it.
    """
    whole, kept, first = _parts(text, spans), [], 0
    for place in chat.answers:
        told = _parts(*_render(chat, template, place + 1))
        if told != whole[: len(told)] or len(told) < first:
            raise UpcycleError(
                f"{chat.where}: the chat template marks earlier messages in another way once later ones "
                f"follow, so that nobody knows which text has weight = 0 or train = false; take the chat out"
            )
        kept += [] if place in chat.unlearnt else spans[first : len(told)]
        first = len(told)
    return kept


def _parts(text: str, spans: Sequence[Span]) -> list[str]:
    return [text[first:stop] for first, stop in spans]


def _by_prefix(chat: Chat, template: Template, text: str) -> list[Span]:
    """Return what each of the assistant's messages adds to the text of those before it.

    What the template writes as the prompt of an answer is not part of the answer.
    """
    spans = []
    for place in chat.answers:
        if place in chat.unlearnt:
            continue
        before, after = _prompt(chat, template, place), _render(chat, template, place + 1)[0]
        if not text.startswith(after) or not after.startswith(before):
            raise UpcycleError(
                f"{chat.where}: the chat template does not mark the assistant's messages, and "
                f"{_why_not(chat, template, place, text)}; in a run, set task.chat_template to one that "
                f"marks them ({{% generation %}} ... {{% endgeneration %}})"
            )
        spans.append((len(before), len(after)))
    return spans


def _prompt(chat: Chat, template: Template, place: int) -> str:
    """Return the text before the answer at `place`, with what the template writes as its prompt."""
    try:
        return _render(chat, template, place, prompt=True)[0]
    except UpcycleError:
        if place:
            raise
        raise UpcycleError(
            f"{chat.where} begins with the assistant, and the chat template neither marks the assistant's "
            f"messages nor writes the prompt of a first one; begin the chat with another message, or in a "
            f"run, set task.chat_template to one that marks them "
            f"({{% generation %}} ... {{% endgeneration %}})"
        ) from None


def _why_not(chat: Chat, template: Template, place: int, text: str) -> str:
    """Return the reason why an answer is not what follows its prompt in the text of the chat."""
    before = _render(chat, template, place)[0] if place else ""
    after, prompted = _render(chat, template, place + 1)[0], _prompt(chat, template, place)
    if text.startswith(after) and after.startswith(before) and prompted.startswith(before):
        return f"begins this answer otherwise than its prompt for one, which ends in {shown(prompted[-20:])}"
    return "writes earlier messages in another way once later ones follow"


def _render(chat: Chat, template: Template, messages: int, *, prompt: bool = False) -> tuple[str, list[Span]]:
    try:
        return template.render(chat.messages[:messages], chat.tools, prompt=prompt)
    except Exception as error:  # a template can raise anything; its reason is passed on
        reason = cut(next(iter(str(error).splitlines()), type(error).__name__), 160)
        raise UpcycleError(
            f"{chat.where}: the chat template refuses "
            f"{'the chat' if messages == len(chat.messages) else f'its first {messages} messages'}: {reason}"
        ) from None
