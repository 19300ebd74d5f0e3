"""The domains that routers tell apart: one for each expert, described by prompts or by a text.

A file of prompts is TOML with a `[[domain]]` for each expert.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from upcycle import settings
from upcycle.errors import UpcycleError, listed
from upcycle.settings import FileLayout, Settings, Verbatim


@dataclass(frozen=True, kw_only=True)
class Domain(Settings):
    """The domain of an expert: examples of it, and of what does not belong to it."""

    section: ClassVar[str] = "domain"

    name: str = ""  # a name for messages and for router.init.domains; its number if it has none
    # prompts that the expert should win, each a row of its own (mergekit-moe)
    positive_prompts: Annotated[tuple[str, ...], Verbatim()] = ()
    # prompts whose mean is taken off that of the positive ones (mergekit-moe)
    negative_prompts: Annotated[tuple[str, ...], Verbatim()] = ()
    text: str = ""  # a file or a folder of text, JSON lines or parquet, in place of positive prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.text) == bool(self.positive_prompts):
            raise UpcycleError(
                f"domain {self.name or '?'} has {'both' if self.text else 'neither'} positive_prompts "
                f"{'and' if self.text else 'nor'} a text; give it one of them"
            )

    @property
    def examples(self) -> tuple[object, ...]:
        """The examples that distinguish it from another domain."""
        return self.positive_prompts, self.negative_prompts, self.text

    def about(self) -> dict[str, Any]:
        """Return what identifies it in a provenance: the prompts are hashed, because they may be private."""
        found: dict[str, Any] = {"name": self.name}
        for key, prompts in (("positive", self.positive_prompts), ("negative", self.negative_prompts)):
            if prompts:
                digest = hashlib.sha256(json.dumps(prompts).encode(errors="surrogatepass")).hexdigest()
                found[key] = {"prompts": len(prompts), "sha256": digest}
        return found


@dataclass(frozen=True, kw_only=True)
class _Prompts(Settings):
    """A file of prompts."""

    domain: tuple[Domain, ...]


def read(path: str | Path) -> tuple[Domain, ...]:
    """Return the domains in a file of prompts; paths of texts in it are relative to it.

    Raises `UpcycleError` if it is not TOML or has other keys.
    """
    table = settings.read_toml(path, "file of prompts", FileLayout())
    try:
        found = settings.read(_Prompts, table).domain
    except UpcycleError as error:
        raise UpcycleError(f"{path}: {error}") from None
    if not found:
        raise UpcycleError(f"{path} holds no [[domain]]; give one for each expert")
    beside = Path(path).parent
    return tuple(replace(each, text=str(beside / each.text)) if each.text else each for each in found)


def given(prompts: str | Path | None, texts: Mapping[str, str | Path]) -> tuple[Domain, ...]:
    """Return the domains in the file `prompts`, if there is one, and then one for each text by its name."""
    found = read(prompts) if prompts is not None else ()
    return (*found, *(Domain(name=name, text=str(path)) for name, path in texts.items()))


def named(domains: Sequence[Domain]) -> tuple[Domain, ...]:
    """Return the domains, each with a name. Raises `UpcycleError` if no router could tell them apart."""
    out = tuple(each if each.name else replace(each, name=str(number)) for number, each in enumerate(domains))
    names = [each.name for each in out]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UpcycleError(f"two domains are called {listed(twice)}; give each a name of its own")
    if len(out) == 1:
        raise UpcycleError(
            f"{names[0]} is the only domain, and a router needs two or more to tell apart; give one for each "
            f"expert"
        )
    if out and all(each.examples == out[0].examples for each in out):
        raise UpcycleError(
            f"all {len(out)} domains have the same prompts or text, so that every expert would get the same "
            f"row of the router; give each expert its own"
        )
    return out
