"""`upcycle list --markdown`: the page that says what each model becomes, made from families and wrappers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from upcycle import families
from upcycle.families import Family
from upcycle.families._wrappers import WRAPPERS, Wrapper

TITLE = "What each model becomes"
ABOUT = """
`model_type` stands in a checkpoint's config.json. A native Mixture of Experts is a class of transformers
that other programs know as well; the first one named is the default, and it computes what the dense model
computes. An `upcycled` one is the dense class itself with experts in it (`--target upcycled`); every model of
this page can become one, and only transformers opens it, after `import upcycle`. `upcycle list --markdown`
prints this page.
""".strip()
AROUND = """
The networks of the text model inside become experts, and everything around it (vision, audio, projector)
stays as it is, byte for byte. `--part vision` gives experts to the vision tower instead, and `--part
text+vision` to both. `--part-only text` takes the text model out as a plain language model. A wrapper that
holds any text model holds every Mixture of Experts that it can become.
""".strip()
TOWERS = """
A wrapper that builds the vision tower that its config names can have experts there. The tower must be one of
{sees}. `video_llava` has two of them and is refused.
""".strip()
NOT = """
These are refused, with the reason.
""".strip()


def markdown() -> str:
    """Return the page."""
    known = [families.find(name) for name in families.names()]
    native, other = [f for f in known if f.natives], [f for f in known if not f.natives]
    parts = [
        f"# {TITLE}",
        ABOUT,
        "## Models with a native Mixture of Experts",
        _table(("model", "model_type", "becomes"), (_row(f, ", ".join(f.natives)) for f in native)),
        "## Models that become an upcycled one",
        _table(("model", "model_type", "why there is no native one"), (_row(f, f.no_native) for f in other)),
        f"The types {_names(families.SAME)} are the class of {_names(set(families.SAME.values()))} in "
        f"transformers and are taken as such.",
        "## Multimodal models around a text model",
        AROUND,
        textwrap.fill(TOWERS.format(sees=", ".join(f"`{f.model_type}`" for f in known if f.sees)), 110),
        _table(
            ("wrapper", "its usual text model", "holds", "its usual vision tower"),
            ((f"`{name}`", f"`{w.text}`", _held(w), _tower(w)) for name, w in WRAPPERS.items()),
        ),
        "## Not taken",
        NOT,
        _table(("model_type", "why"), ((f"`{name}`", why) for name, why in families.REFUSED.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _row(family: Family, last: str) -> tuple[str, ...]:
    return family.summary, f"`{family.model_type}`", last


def _held(wrapper: Wrapper) -> str:
    """Say which text models with experts a wrapper holds."""
    if wrapper.free:
        return "any text model"
    twins = [f"`{text}`, as a `{model_type}`" for text, (model_type, _) in wrapper.twins.items()]
    return ", ".join([*twins, "an upcycled one"])


def _tower(wrapper: Wrapper) -> str:
    """Name the vision tower of a wrapper that builds the one that its config names."""
    return f"`{wrapper.vision}`" if wrapper.vision else "its own, or none"


def _names(names: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in sorted(names))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
