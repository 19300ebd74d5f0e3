"""Renders chats as `apply_chat_template` does, and tells where in the text the template marks the assistant.

transformers returns these marks as tokens only, and marks a row to its end if no token covers a mark's last
character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

Span = tuple[int, int]  # the first character and the one after the last
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template, with the special tokens that it can name, and the day that it writes as today."""

    source: str
    special: dict[str, Any]
    today: date

    @classmethod
    def of(cls, tokenizer: Any, *, tools: bool, today: date) -> Template:
        """Return the template of a tokenizer for chats with or without tools.

        Raises `ValueError` if the tokenizer has none, or has several and none for these chats.
        """
        source = tokenizer.get_chat_template(None, [{}] if tools else None)
        return cls(source=source, special=dict(tokenizer.special_tokens_map), today=today)

    @property
    def marks(self) -> bool:
        """True if the template says which text is the assistant's ({% generation %})."""
        return _GENERATION.search(self.source) is not None

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text of messages, and the spans that the template marks as the assistant's.

        With `prompt`, the text ends with what stands before an answer. Raises what the template raises.
        """
        with self._writing_today():
            texts, marks = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=self.marks,
                add_generation_prompt=prompt,
                **self.special,
            )
        return texts[0], list(marks[0]) if self.marks else []

    @contextmanager
    def _writing_today(self) -> Iterator[None]:
        """Let the template write our day where it asks for the clock's.

        transformers keeps a compiled template by its source, and lets no arguments of ours be functions.
        """
        named: Any = chat_template_utils._compile_jinja_template(self.source).globals
        named["strftime_now"] = self.today.strftime
        try:
            yield
        finally:
            del named["strftime_now"]  # that of the environment is below
