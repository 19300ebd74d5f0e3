"""The parts of a pass: the rows of all the data, or those of one domain, in the order they are read in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.calibration.domains import Domain
from upcycle.calibration.to_calibrate import ToCalibrate
from upcycle.dense.source import Dense
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.tasks._rows import Rows, of_images, of_prompts, of_text
from upcycle.tasks._tokens import refuse_idle


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that are read one batch after another. A batch never has rows of two parts."""

    rows: Rows
    order: np.ndarray  # the numbers of the rows to read, int64 [N]
    domain: int | None = None  # the number of the domain; None: there are none
    negative: bool = False  # whether these are the domain's negative prompts


def parts(dense: Dense, asked: ToCalibrate, cache: Path) -> list[Part]:
    """Return the parts of a pass: one, or those of each domain in turn."""
    subject = Subject.of_dense(dense)
    refuse_idle(asked.texts, field=asked.field)
    if asked.domains:
        return [
            part
            for number, domain in enumerate(asked.domains)
            for part in _of_domain(number, domain, subject, asked, cache, dense)
        ]
    gradient = "gradient" in asked.collect
    if asked.images is not None:
        rows = of_images(asked.images, subject, cache, gradient=gradient, seed=asked.seed)
    else:
        assert asked.text is not None
        rows = _of_text(asked.text, subject, asked, cache)
    return [Part(rows=rows, order=asked.order(rows.count))]


def _of_text(path: Path, subject: Subject, asked: ToCalibrate, cache: Path) -> Rows:
    gradient = "gradient" in asked.collect
    return of_text(
        path, subject, cache, gradient=gradient, seed=asked.seed, length=asked.length, field=asked.field
    )


def _of_domain(
    number: int, domain: Domain, subject: Subject, asked: ToCalibrate, cache: Path, dense: Dense
) -> Iterator[Part]:
    if domain.text:
        rows = _of_text(Path(domain.text), subject, asked, cache)
        rows = replace(rows, about={**rows.about, **domain.about()})
        yield Part(rows=rows, order=asked.order(rows.count), domain=number)
    for prompts, negative in ((domain.positive_prompts, False), (domain.negative_prompts, True)):
        if prompts:
            _refuse_prompts(dense, subject)
            rows = of_prompts(prompts, subject)
            rows = replace(rows, about={**rows.about, **domain.about()})
            yield Part(rows=rows, order=np.arange(rows.count), domain=number, negative=negative)


def _refuse_prompts(dense: Dense, subject: Subject) -> None:
    """Refuse prompts for a model that does not read one text from its first token to its last."""
    if "image_size" in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads images and no prompts; give --images PATH")
    if any(stack.name != "layers" for stack in dense.stacks):
        raise UpcycleError(
            f"prompts are for models with one stack of blocks, and {subject.architecture} has several; give "
            f"--domain NAME=PATH with a text for each expert"
        )


def about(asked: ToCalibrate, found: Sequence[Part]) -> dict[str, Any]:
    """Return what identifies the data, as JSON."""
    if not asked.domains:
        return dict(found[0].rows.about)
    return {"kind": "domains", "domains": [dict(part.rows.about) for part in found if not part.negative]}


def batches(found: Sequence[Part], size: int, done: int) -> Iterator[tuple[Part, np.ndarray]]:
    """Yield the batches of at most `size` rows that follow after the first `done` rows of all parts."""
    before = 0
    for part in found:
        start = min(len(part.order), max(0, done - before))
        for at in range(start, len(part.order), size):
            yield part, part.order[at : at + size]
        before += len(part.order)
