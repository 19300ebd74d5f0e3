"""What to build: the recipe, from TOML, `--set KEY=VALUE`, a dictionary or a run file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from upcycle import settings
from upcycle.errors import UpcycleError, shown
from upcycle.init import Init
from upcycle.nn.balance import Balance
from upcycle.nn.routers import Router
from upcycle.settings import AtLeast, Layout, Settings, families, keys, parted, table_at

Layers = Literal["all", "every_other", "last_half"]

# Stacks of blocks that may have a table of their own.
STACKS = ("decoder", "stage_1", "stage_2", "stage_3", "stage_4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe(Settings):
    """The shape of the Mixture of Experts."""

    section: ClassVar[str] = "moe"

    num_experts: Annotated[int, AtLeast(1)] = 8  # in each layer
    top_k: Annotated[int, AtLeast(1)] = 2  # experts that a token uses, of a router that lets tokens choose
    # which blocks get experts: a name, or their numbers from 0; every_other is 1, 3, 5, ...
    layers: Layers | tuple[int, ...] = "all"
    # native (the family's MoE class of transformers), one by name, upcycled, depth_tiled or dense
    target: str = "native"
    granularity: Annotated[int, AtLeast(1)] = 1  # G: an expert is 1 / G of the dense network wide
    # neurons of an expert; 0: those of the dense network / granularity
    expert_width: Annotated[int, AtLeast(0)] = 0
    # narrower experts beside them, for routers of slots (MoE Jetpack)
    universal_experts: Annotated[int, AtLeast(0)] = 0
    universal_width: Annotated[int, AtLeast(0)] = 0  # neurons of those; 0: a quarter of the others'
    # 0, or G: the dense network itself stands beside the experts
    shared_experts: Annotated[int, AtLeast(0)] = 0
    pooling: Literal["class_token", "mean"] = "class_token"  # what the head of an upcycled ViT sees
    depth: int = 2  # how often each block stands, for the target depth_tiled

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_width and self.granularity > 1:
            raise UpcycleError(
                "moe.expert_width and moe.granularity both say how wide an expert is; give one"
            )
        if self.top_k > self.num_experts:
            raise UpcycleError(
                f"moe.top_k = {self.top_k} is more than moe.num_experts = {self.num_experts}; "
                f"a token cannot use more experts than there are"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Successor(Settings):
    """The smaller dense model that a larger one, the source, is narrowed to; its experts come from the
    source.

    `hidden_size` in a model of several stages is a list; 0 keeps the source's. `intermediate_size` 0 keeps
    the ratio. `rest`: where all but the experts comes from, the source itself or a checkpoint of the
    successor's size.
    """

    section: ClassVar[str] = "successor"

    # channels of the narrower model; a list, one a stage, in a ConvNeXt; 0 keeps the source's
    hidden_size: int | tuple[int, ...] = 0
    intermediate_size: int = 0  # neurons of its networks; 0 keeps the ratio
    # where all but the experts comes from: predecessor (the source), or a checkpoint of that size
    rest: str = "predecessor"

    def __post_init__(self) -> None:
        super().__post_init__()
        # The recipe is kept with its result, and read from elsewhere.
        if self.rest != "predecessor" and Path(self.rest).is_dir():
            object.__setattr__(self, "rest", str(Path(self.rest).resolve()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Settings):
    """The MoE layers of one stack of blocks and their router."""

    moe: Moe
    router: Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Everything that decides the bytes of the output, besides the bytes of the source.

    `parts` are stacks of blocks that are not as `moe` and `router` say: in TOML, `[decoder.moe]` and
    `[decoder.router]` with the keys that differ, and likewise `[stage_1]` to `[stage_4]` in a ConvNeXt.
    """

    seed: int = 0  # of every random number
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # of the weights that are written
    moe: Moe = Moe()
    init: Init = dataclasses.field(default_factory=lambda: settings.read(Init, {}, "init"))
    router: Router = dataclasses.field(default_factory=lambda: settings.read(Router, {}, "router"))
    successor: Successor | None = None
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any] | str | Path | None = None, /, **sections: Any) -> Recipe:
        """A recipe from what there is: a nested table as TOML has it, `Recipe.of(moe={"num_experts": 4})`, a
        TOML file by its path, or a recipe. `sections` go over it."""
        if isinstance(given, Recipe) and not sections:
            return given
        table = {**_given(given), **sections}
        if table.get("moe") is False:
            raise UpcycleError(
                "moe = false trains the dense model itself, and a recipe is of experts; take it out"
            )
        parts = {name: _part(name, table.pop(name), table) for name in STACKS if name in table}
        return settings.read(cls, table, made={"parts": parts}, beside=dict.fromkeys(STACKS))

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """The recipe in the TOML file `path`, a recipe or a run file, with `KEY=VALUE` overrides."""
        return cls.of(override(of_run_file(read_toml(path)), overrides))

    def at(self, stack: str) -> Recipe:
        """The recipe for one stack of blocks."""
        part = self.parts.get(stack) or Part(moe=self.moe, router=self.router)
        return dataclasses.replace(self, moe=part.moe, router=part.router, parts={})

    def as_table(self) -> dict[str, Any]:
        """The recipe as a nested table: what `Recipe.of` takes and the provenance keeps."""
        table = super().as_table()
        return table | table.pop("parts")


RecipeLike = Recipe | Mapping[str, Any] | str | Path | None  # what functions take for a recipe: `Recipe.of`

# Sections and keys of a run file that a recipe alone reads, besides keys of [router].
OF_EXPERTS = (*(key for key in keys(Recipe) if key not in ("seed", "router", "parts")), *STACKS)


def _part(name: str, value: Any, model: Mapping[str, Any]) -> Part:
    """The part of a stack: its own table over those of the model."""
    own, moe = table_at(value, name), table_at(model.get("moe", {}), "moe")
    other = table_at(own.get("moe", {}), f"{name}.moe")
    of_the_model = {"target": Moe.target, "pooling": Moe.pooling, "depth": Moe.depth}
    if name.startswith("stage_"):
        of_the_model["layers"] = Moe.layers  # counted through all stages
    for key, default in of_the_model.items():
        if other.get(key, moe.get(key, default)) != moe.get(key, default):
            raise UpcycleError(f"{name}.moe.{key}: a model has one; set moe.{key}")
    router = table_at(model.get("router", {}), "router")
    changed = table_at(own.get("router", {}), f"{name}.router")
    usual = router.get("name", Router.usual)
    if changed.get("name", usual) != usual:
        router = {k: v for k, v in router.items() if k in Router.common}
    return settings.read(Part, {**own, "moe": {**moe, **other}, "router": {**router, **changed}}, name)


def _given(given: Any) -> dict[str, Any]:
    """The table of a recipe, whatever a caller has of it."""
    if given is None:
        return {}
    if isinstance(given, Recipe):
        return given.as_table()
    if isinstance(given, (str, Path)):
        return of_run_file(read_toml(given))
    if isinstance(given, Mapping):
        return dict(given)
    raise UpcycleError(
        f"{shown(given)} is no recipe; give a Recipe, a table such as {{'moe': {{'num_experts': 8}}}}, or "
        f"the path of a TOML file"
    )


def of_run_file(table: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in the table of a run file, which is a recipe and more; a recipe as it is."""
    if "source" not in table:
        return dict(table)
    out = {k: v for k, v in table.items() if k in (*keys(Recipe), *STACKS)}
    if isinstance(out.get("router"), Mapping):
        _, out["router"] = parted(out["router"], Balance)
    return out


def without_experts(table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` without what only a Mixture of Experts has: what `moe = false` takes away."""
    out = {k: v for k, v in table.items() if k not in OF_EXPERTS}
    if isinstance(out.get("router"), Mapping):
        out["router"], _ = parted(out["router"], Balance)
    return out


def _layout() -> Layout:
    of_stacks = [place for stack in STACKS for place in families(Part, stack)]
    return Layout(
        named={**families(Recipe), **dict.fromkeys(of_stacks, Router)},
        shared={"router": Balance, **dict.fromkeys(of_stacks, Balance)},
        follows=dict.fromkeys(of_stacks, "router"),
        off={"moe": without_experts},
    )


LAYOUT = _layout()


def read_toml(path: str | Path, what: str = "recipe", layout: Layout = LAYOUT) -> dict[str, Any]:
    """The table in a TOML file, laid over that of its `base`; see `settings.read_toml`. `moe = false` takes
    the experts of the base away."""
    return settings.read_toml(path, what, layout)


def override(table: Mapping[str, Any], given: Iterable[str], layout: Layout = LAYOUT) -> dict[str, Any]:
    """`table` with each `section.key=value` put in; see `settings.override`."""
    return settings.override(table, given, layout)
