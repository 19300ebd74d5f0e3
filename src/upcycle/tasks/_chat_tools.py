"""Whether the text of a chat shows its tools and the calls of them, which a chat template can leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from upcycle.data.chats import Chat
from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle.hf.chat_templates import Template

_CALLS = "tool_calls"
_ASKING = ("system", "user")
_AFTER = "in a run, set task.chat_template to one that writes them, or take"


@dataclass(frozen=True, kw_only=True)
class ToolsShown:
    """The kinds of chats and of messages whose tools and calls the template has been seen to write.

    To see it, a chat is rendered once more without them. That is done for the first of each kind alone, so
    that chats with tools cost little more than others. A kind is what a template can go by, but for words.
    Tools that a system or user message names are shown, and so are calls that stand in their own message.
    """

    kinds: set[tuple[Any, ...]] = field(default_factory=set)

    def refuse_left_out(self, chat: Chat, template: Template, text: str) -> None:
        """Raise `UpcycleError` if the template's `text` of a chat is the same without tools or calls."""
        for place, message in enumerate(chat.messages):
            if (
                message.get(_CALLS)
                and not _tells(message["content"], message[_CALLS])
                and self._is_new(_kind_of_calls(chat, place))
            ):
                silent = {name: value for name, value in message.items() if name != _CALLS}
                messages = (*chat.messages[:place], silent, *chat.messages[place + 1 :])
                if _writes(replace(chat, messages=messages), template) == text:
                    raise UpcycleError(
                        f"{chat.where}: the chat template leaves out what message {place + 1} calls "
                        f"(tool_calls), so that the model would learn an answer without them; {_AFTER} the "
                        f"chat out"
                    )
        asked = " ".join(message["content"] for message in chat.messages if message["role"] in _ASKING)
        if not chat.tools or _tells(asked, chat.tools) or not self._is_new(_kind_of_tools(chat)):
            return
        if _writes(replace(chat, tools=()), template) == text:
            raise UpcycleError(
                f"{chat.where}: the chat template leaves out the tools of the chat, so that the model would "
                f"learn to call what it is not shown; {_AFTER} 'tools' out of the chats"
            )

    def _is_new(self, kind: tuple[Any, ...]) -> bool:
        """Return whether a kind has not been seen, and note it."""
        new = kind not in self.kinds
        self.kinds.add(kind)
        return new


def _tells(text: str, functions: Any) -> bool:
    """Return whether a text has the names of all of some tools, or of all that are called."""
    listed = functions if isinstance(functions, Sequence) else ()
    inner = [each.get("function", each) if isinstance(each, Mapping) else None for each in listed]
    names = [each.get("name") if isinstance(each, Mapping) else None for each in inner]
    return bool(names) and all(isinstance(name, str) and name and name in text for name in names)


def _writes(chat: Chat, template: Template) -> str | None:
    """Return what the template writes; None if it refuses the chat, and so heeds what is missing."""
    try:
        return template.render(chat.messages, chat.tools)[0]
    except Exception:  # a template can raise anything
        return None


def _kind_of_tools(chat: Chat) -> tuple[Any, ...]:
    """Return the kind of a chat with tools: a template may write them beside its first or last message."""
    return ("tools", chat.messages[0]["role"], chat.messages[-1]["role"])


def _kind_of_calls(chat: Chat, place: int) -> tuple[Any, ...]:
    """Return the kind of a message that calls tools: its parts, those of its calls, and what follows it."""
    message, after = chat.messages[place], chat.messages[place + 1 : place + 2]
    return (
        bool(chat.tools),
        message["role"],
        frozenset(message),
        bool(message["content"].strip()),
        _kind_of(message[_CALLS]),
        *(each["role"] for each in after),
    )


def _kind_of(calls: Any) -> tuple[Any, ...]:
    """Return the parts of calls, and whether there are several."""
    if not isinstance(calls, Sequence):
        return (type(calls),)
    parts = {name for call in calls if isinstance(call, Mapping) for name in call}
    return (type(calls), len(calls) > 1, frozenset(parts))
