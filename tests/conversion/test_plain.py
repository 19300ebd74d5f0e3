"""Text from elsewhere in Markdown."""

from __future__ import annotations

import pytest

from upcycle.conversion.plain import code, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tiny_llama v1.5", "tiny_llama v1.5"),  # inside a word an underscore is a letter
        ("_a_ b__c _", r"\_a\_ b\_\_c \_"),
        ("<b>|`*[a](b)#~$&", r"\<b\>\|\`\*\[a\](b)\#\~\$\&"),
        ("a\n# b\x00\tc", r"a \# b c"),
    ],
)
def test_nothing_in_a_text_is_taken_for_markdown(text, shown):
    assert plain(text) == shown


def test_a_span_of_code_holds_any_text():
    assert code("a") == "`a`"
    assert code("a``b") == "``` a``b ```"
