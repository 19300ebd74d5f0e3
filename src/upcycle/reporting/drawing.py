"""Rendering of pictures: as SVG in the colours of the page, or as PNG on white.

The global state of matplotlib is not changed.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from upcycle.errors import UpcycleError
from upcycle.reporting.document import Picture, clean
from upcycle.reporting.inks import LIGHT, VARIABLES, with_variables

MADE_BY = "upcycle report"
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_SETTINGS: Any = {
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "upcycle",  # reproducible ids
    "text.parse_math": False,  # a dollar in the name of a run is not maths
    "font.family": "DejaVu Sans",
    "font.size": 10,
}
_FONT = re.compile(r"(font: [^;]*?)'DejaVu Sans'[^;]*")


def need_matplotlib() -> None:
    """Raise an error that says how to install matplotlib if it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UpcycleError(
            'figures are drawn by matplotlib, which is not installed: pip install "upcycle[report]"'
        ) from None


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font lacks some glyphs of names that users gave
        yield


def png(picture: Picture) -> bytes:
    """Render the picture on white at 200 dpi."""
    out = io.BytesIO()
    with _settings():
        picture.draw(LIGHT).savefig(
            out, format="png", dpi=200, facecolor=LIGHT.card, metadata={"Software": MADE_BY}
        )
    return out.getvalue()


def svg(picture: Picture) -> str:
    """Render the picture as an SVG element without a fixed size; its ids begin with its name."""
    out = io.StringIO()
    with _settings():
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.draw(VARIABLES).savefig(out, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(out.getvalue())
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    for parent in root.iter():
        for child in [c for c in parent if c.tag == f"{{{_SVG}}}metadata"]:
            parent.remove(child)
    for element in root.iter():
        for key, value in [*element.attrib.items()]:
            element.attrib[key] = _within(key, value, picture.name)
    root.attrib |= {"role": "img", "aria-labelledby": f"{picture.name}-title", "focusable": "false"}
    title = ElementTree.Element(f"{{{_SVG}}}title", {"id": f"{picture.name}-title"})
    title.text = clean(picture.title)
    root.insert(0, title)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return with_variables(ElementTree.tostring(root, encoding="unicode"))


def _within(key: str, value: str, name: str) -> str:
    """Adapt an attribute: ids get the name of the picture as a prefix, and the font is that of the page."""
    if key == "id":
        return f"{name}-{value}"
    if key == _LINK and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key == "style":
        value = _FONT.sub(r"\1var(--font)", value)
    return value.replace("url(#", f"url(#{name}-")
