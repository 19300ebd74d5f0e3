"""The options of `upcycle calibrate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np

from upcycle.calibration import domains
from upcycle.calibration.domains import Domain
from upcycle.data.documents import Source
from upcycle.errors import UpcycleError, refuse_fraction, shown
from upcycle.records.statistics import NAMES, OF_DOMAINS, OF_PROMPTS, ONLY_AT, POSITIONS, refuse_unknown
from upcycle.system.paths import as_paths
from upcycle.tensors import rng

IMAGES = 30_000  # default limit for a set of images; about what MoE Jetpack uses of ImageNet
ROWS = 2_048  # default limit for a text: 2^20 tokens in rows of 512
USUAL = ("l1", "l2", "count")
MARKED = 10  # the default of CMoE's released code
SAMPLE = 2_048  # tokens; about as many as k-means needs for some tens of experts


@dataclass(frozen=True, kw_only=True)
class ToCalibrate:
    """The statistics to collect, and the data to collect them on.

    `limit` is the maximum number of images or rows (of each domain); 0 means all, None means `IMAGES` or
    `ROWS`. Raises `UpcycleError` for options that are invalid or do not go together.
    """

    images: Path | None = None
    text: Path | None = None
    domains: tuple[Domain, ...] = ()  # the domains to tell apart, in the order of the experts
    collect: tuple[str, ...] = USUAL
    positions: tuple[str, ...] = tuple(POSITIONS)
    limit: int | None = None
    length: int | None = None  # tokens per row of text; None: 512, or fewer if the model takes fewer
    field: str = Source.field  # the text field of JSON lines, parquet and datasets
    batch_size: int = 32
    threshold: float = 0.0  # a number above it counts as active
    sample: int = SAMPLE  # tokens in the sample
    marked: int = MARKED  # neurons of a token that co_marker counts as active, K_a of CMoE
    seed: int = 0  # seed of the order of examples
    in_order: bool = False  # take the first examples, as the released code of MoE Jetpack does
    device: str | None = None  # None: an accelerator if there is one
    cache: Path | None = None  # folder for decoded images and token files
    allow_nonfinite: bool = False
    drop: tuple[str, ...] = ()  # tensors of the source to leave out, as names or patterns

    def __post_init__(self) -> None:
        as_paths(self, "text", "images", "cache")
        if sum((self.text is not None, self.images is not None, bool(self.domains))) != 1:
            raise UpcycleError(
                "give one thing to calibrate on: --images PATH, --text PATH, or for the domains of experts "
                "--prompts FILE or --domain NAME=PATH"
            )
        object.__setattr__(self, "domains", domains.named(self.domains))
        refuse_unknown("--collect", self.collect, NAMES)
        refuse_unknown("--positions", self.positions, POSITIONS)
        for name in self.collect:
            position = ONLY_AT.get(name)
            if position in POSITIONS and position not in self.positions:
                raise UpcycleError(
                    f"--collect {name} is of {position}, and --positions is {','.join(self.positions)}; add "
                    f"{position}, or leave it out"
                )
        self._refuse_domains()
        for name in ("sample", "marked", "batch_size", "limit", "length", "seed"):
            refuse_fraction(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.sample < 1:
            raise UpcycleError(f"--sample {self.sample}; it must be 1 or more tokens")
        if self.marked < 1:
            raise UpcycleError(f"--marked {self.marked}; it must be 1 or more neurons")
        if self.batch_size < 1:
            raise UpcycleError(f"--batch-size {self.batch_size}; it must be 1 or more")
        if self.limit is not None and self.limit < 0:
            raise UpcycleError(f"--limit {self.limit}; it must be 0 (all) or more")
        if self.length is not None and (self.length < 1 or self.images is not None):
            raise UpcycleError(f"--length {self.length}; it must be 1 or more tokens, and goes with --text")
        if self.field != Source.field and not self.texts:
            raise UpcycleError(f"--field {self.field} is that of a text, and none is given; leave it out")
        if not (isinstance(self.threshold, Real) and math.isfinite(self.threshold)):
            raise UpcycleError(f"--threshold {shown(self.threshold)}; it must be a number")

    def _refuse_domains(self) -> None:
        """Refuse statistics that the data cannot give."""
        wanted = [name for name in self.collect if name in OF_DOMAINS]
        if wanted and not self.domains:
            raise UpcycleError(
                f"--collect {wanted[0]} has a row for each domain; give them with --prompts or --domain"
            )
        texts = [domain.name for domain in self.domains if domain.text]
        if texts and (wanted := [name for name in self.collect if name in OF_PROMPTS]):
            raise UpcycleError(
                f"--collect {wanted[0]} is made of prompts, and domain {texts[0]} has a text; give it "
                f"positive_prompts"
            )
        if len(texts) < len(self.domains) and "gradient" in self.collect:
            raise UpcycleError(
                "--collect gradient wants a loss, and prompts have none; leave it out, or give texts"
            )

    @property
    def texts(self) -> tuple[Path, ...]:
        """The paths of the texts: the one that is given, or those of the domains."""
        of_domains = tuple(Path(domain.text) for domain in self.domains if domain.text)
        return of_domains if self.text is None else (self.text,)

    def examples(self, there: int) -> int:
        """Return how many of `there` examples are used."""
        default = IMAGES if self.images is not None else ROWS
        return min(there, (default if self.limit is None else self.limit) or there)

    def order(self, there: int) -> np.ndarray:
        """Return the indices of the examples to use, in order, int64 [N]."""
        order = (
            np.arange(there) if self.in_order else rng.permutation(rng.key(self.seed, "calibration"), there)
        )
        return order[: self.examples(there)]
