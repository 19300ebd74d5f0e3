"""The parts that commands share: the program, and common options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle.recipe import Recipe

app = tyro.extras.SubcommandApp()


def _plain(metavar: str | None = None, help: str | None = None) -> Any:
    """Make an option whose help states its default, because tyro would add `(default: None)`."""
    return arg(metavar=metavar, help=help, help_behavior_hint="")


Flag = Annotated[bool, _plain()]
File = Annotated[Path | None, _plain("PATH")]
Text = Annotated[str | None, _plain("TEXT")]
Field = Annotated[str, arg(metavar="NAME")]
Whole = Annotated[int | None, _plain("N")]
Number = Annotated[float | None, _plain("X")]
Count = Annotated[int, arg(metavar="N")]
Names = Annotated[str, _plain("NAMES")]
Domains = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="[NAME=]PATH")]
Source = Annotated[
    Positional[str],
    arg(metavar="SOURCE", help="dense checkpoint: a folder, or a hub id (owner/name, owner/name@revision)"),
]
RunOrSource = Annotated[
    Positional[str],
    arg(
        metavar="SOURCE",
        help="dense checkpoint: a folder, or a hub id; or RUN.toml, a run file, which has it",
    ),
]
Drop = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(metavar="NAME", help="a tensor of the source to leave out, or a pattern such as v_head.*"),
]
Out = Annotated[Positional[Path], arg(metavar="OUT")]
Jobs = Annotated[int, arg(metavar="N", help="threads that read, compute and write")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The model to build."""

    recipe: Annotated[Path | None, _plain("FILE.toml", "a recipe; the options below go over it")] = None
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="KEY=VALUE",
            help="any key of a recipe, such as init.ratio=0.25; `upcycle keys` lists them",
        ),
    ] = ()
    experts: Annotated[int | None, _plain("N", "moe.num_experts (8)")] = None
    top_k: Annotated[int | None, _plain("K", "moe.top_k (2)")] = None
    init: Annotated[str | None, _plain("NAME", "init.name (copy); see `upcycle list`")] = None
    layers: Annotated[
        str | None, _plain("SPEC", "moe.layers: all, every_other, last_half or 1,3,5 (all)")
    ] = None
    target: Annotated[str | None, _plain("NAME", "moe.target (native); see `upcycle list`")] = None
    part: Annotated[
        str | None, _plain("PART", "moe.part: text, vision or text+vision, of a multimodal model (text)")
    ] = None
    part_only: Annotated[
        str | None, _plain("PART", "text takes the text model out of a multimodal one (moe.part_only)")
    ] = None
    drop: Drop = ()
    dtype: Annotated[str | None, _plain("D", "source, float32, bfloat16 or float16 (source)")] = None
    seed: Annotated[int | None, _plain("N", "seed of every random number (0)")] = None

    def read(self) -> Recipe:
        """Return the recipe that these options describe."""
        from upcycle.recipe import Recipe, of_run_file, override, read_toml

        table = of_run_file(read_toml(self.recipe)) if self.recipe else {}
        return Recipe.of(override(table, self.overrides()))

    def overrides(self) -> list[str]:
        """Return the options as `KEY=VALUE`, those of --set last."""
        shortcuts = {
            "moe.num_experts": self.experts,
            "moe.top_k": self.top_k,
            "init.name": self.init,
            "moe.layers": _layers(self.layers),
            "moe.target": self.target,
            "moe.part": self.part,
            "moe.part_only": self.part_only,
            "drop": json.dumps(self.drop) if self.drop else None,
            "dtype": self.dtype,
            "seed": self.seed,
        }
        given = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
        return [*given, *self.set]


def _layers(spec: str | None) -> str | None:
    """Convert `1,3,5` to TOML; names are kept."""
    if spec is None or not spec.replace(",", "").replace(" ", "").strip("[]").isdigit():
        return spec
    return f"[{spec.strip('[]')}]"


def names(listed: str) -> tuple[str, ...]:
    """Split `a, b` into names."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def domains(
    given: tuple[str, ...], name_of: Callable[[Path], str] = lambda path: path.stem
) -> dict[str, Path]:
    """Parse `NAME=PATH` or a path, whose name comes from `name_of`, into paths by name."""
    out: dict[str, Path] = {}
    for domain in given:
        name, equals, path = domain.partition("=")
        if not equals or Path(domain).exists():
            name, path = name_of(Path(domain)), domain
        if not name or not path:
            raise UpcycleError(f"{domain!r} names no set; give PATH or NAME=PATH")
        if name in out:
            raise UpcycleError(f"two sets are called {name}; give them names of their own: NAME=PATH")
        out[name] = Path(path)
    return out


def refuse_both(first: str, second: str, given: bool, why: str) -> None:
    """Raise `UpcycleError` if two options that exclude each other are both `given`; `why` says it."""
    if given:
        raise UpcycleError(f"{first} and {second} are both given, and {why}; give one of them")
