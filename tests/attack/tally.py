"""What a campaign has counted: in a file that the next run of the campaign goes on from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from upcycle.system import whole_file


@dataclass
class Row:
    """What came of a target, or of the kills of a command: started, killed, ended before."""

    name: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)
    lost: int = 0  # cases that went down with the process of another one; they are not tried again

    @property
    def next(self) -> int:
        """The number of the first case that was not tried."""
        return self.cases + self.lost


class Tally:
    """The rows of all targets, kept in a file where there is one."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path is not None and path.exists() else []
        self.rows = {row["name"]: Row(**row) for row in known}

    def row(self, name: str) -> Row:
        """The row of this name."""
        return self.rows.setdefault(name, Row(name))

    def keep(self) -> None:
        """Write the file; the old one stays until the new one is on disk."""
        if self.path is not None:
            whole_file.write_json(self.path, [asdict(row) for row in self.rows.values()])


def table(rows: list[Row], *, head: str = "target | cases | accepted | refused | crashes") -> str:
    """The rows as Markdown, with their sum."""
    total = Row(
        "all",
        *(sum(getattr(row, key) for row in rows) for key in ("cases", "accepted", "refused", "crashes")),
    )
    lines = [f"| {head} |", "|---|--:|--:|--:|--:|"]
    for row in [*rows, total]:
        lines.append(f"| {row.name} | {row.cases:,} | {row.accepted:,} | {row.refused:,} | {row.crashes:,} |")
    return "\n".join(lines)
