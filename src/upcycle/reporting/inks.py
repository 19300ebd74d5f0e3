"""The colours of a report, on light and on dark paper, and as variables of a page that has both.

The six colours of series were searched for: 3.2 to 1 or more against their paper (WCAG 1.4.11 asks for 3),
and as far apart as could be found for people with protanopia, deuteranopia and tritanopia (Machado 2009).
A test computes both. Series differ in dash and marker as well.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Inks:
    """A colour for each part of a page, as #rrggbb."""

    paper: str
    card: str
    ink: str
    faint: str  # text that matters less
    rule: str  # lines between things
    link: str
    warning: str
    warning_paper: str
    series: tuple[str, ...]

    def named(self) -> dict[str, str]:
        """Every colour by the name that its variable has in a page."""
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
    """Colours that nothing else has: each is replaced by its variable once a figure is drawn."""
    plain = [f.name for f in fields(Inks) if f.name != "series"]
    made = {name: f"#0101{i + 1:02x}" for i, name in enumerate(plain)}
    return Inks(**made, series=tuple(f"#0102{i + 1:02x}" for i in range(len(LIGHT.series))))


VARIABLES = _standing_in()


def with_variables(text: str) -> str:
    """A drawing in the colours of `VARIABLES`, in those of the page that it stands in."""
    for name, colour in VARIABLES.named().items():
        text = text.replace(colour, f"var(--{name})")
    return text
