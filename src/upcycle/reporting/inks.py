"""The colours of a report for light and dark backgrounds, also as CSS variables of the page.

The six colours of series were found by a search. Their contrast with the background is at least 3.2 to 1
(WCAG 1.4.11 asks for 3), and they are as distinct as possible for people with protanopia, deuteranopia and
tritanopia (Machado 2009). A test computes both. Series also differ in dash and marker.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Inks:
    """The colours of the parts of a page, as #rrggbb."""

    paper: str
    card: str
    ink: str
    faint: str  # less important text
    rule: str  # separating lines
    link: str
    warning: str
    warning_paper: str
    series: tuple[str, ...]

    def named(self) -> dict[str, str]:
        """Return every colour by the name of its CSS variable."""
        plain = {f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self) if f.name != "series"}
        return plain | {f"series-{i}": colour for i, colour in enumerate(self.series)}


LIGHT = Inks(
    paper="#f5f6f8",
    card="#ffffff",
    ink="#1b1f24",
    faint="#57606a",
    rule="#d5d9df",
    link="#1945b7",
    warning="#7a4100",
    warning_paper="#fff3dc",
    series=("#1945b7", "#9f2700", "#069a7f", "#772d62", "#a87401", "#976af3"),
)
DARK = Inks(
    paper="#0f1216",
    card="#171b21",
    ink="#e8eaed",
    faint="#a3acb8",
    rule="#343b45",
    link="#8cc4ff",
    warning="#ffd58a",
    warning_paper="#33270f",
    series=("#6ab6fe", "#ec8760", "#5bfbd3", "#bd5079", "#fdcf1d", "#8660e5"),
)


def _standing_in() -> Inks:
    """Return placeholder colours, which are replaced by their CSS variables once a figure is drawn."""
    plain = [f.name for f in fields(Inks) if f.name != "series"]
    made = {name: f"#0101{i + 1:02x}" for i, name in enumerate(plain)}
    return Inks(**made, series=tuple(f"#0102{i + 1:02x}" for i in range(len(LIGHT.series))))


VARIABLES = _standing_in()


def with_variables(text: str) -> str:
    """Replace the placeholder colours of a drawing by the variables of the page."""
    for name, colour in VARIABLES.named().items():
        text = text.replace(colour, f"var(--{name})")
    return text
