"""The recipe: what to build, read from TOML, `--set KEY=VALUE`, a dictionary or a run file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from upcycle import settings
from upcycle.errors import UpcycleError, shown
from upcycle.families._wrappers import TEXT, VISION
from upcycle.init import Init
from upcycle.nn.balance import Balance
from upcycle.nn.routers import Router
from upcycle.settings import AtLeast, FileLayout, Settings, families, keys, parted, table_at

Layers = Literal["all", "every_other", "last_half"]

# The keys of [moe] of which a model has one, whatever stacks of blocks it has.
OF_THE_MODEL = ("target", "pooling", "depth", "untie", "part", "part_only", "mtp")
# The stacks of blocks that may have a table of their own.
STACKS = ("decoder", "vision", "stage_1", "stage_2", "stage_3", "stage_4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe(Settings):
    """The shape of the Mixture of Experts."""

    section: ClassVar[str] = "moe"

    num_experts: Annotated[int, AtLeast(1)] = 8  # number of experts in each layer
    top_k: Annotated[int, AtLeast(1)] = 2  # experts per token, for a router in which tokens choose
    # which blocks get experts: a name or a list of block numbers from 0; every_other is 1, 3, 5, ...
    layers: Layers | tuple[int, ...] = "all"
    # native (the family's MoE class in transformers), the name of a native one, upcycled, depth_tiled or
    # dense
    target: str = "native"
    granularity: Annotated[int, AtLeast(1)] = 1  # G: an expert has 1 / G of the neurons of the dense network
    # neurons of an expert; 0 means the width of the dense network / granularity
    expert_width: Annotated[int, AtLeast(0)] = 0
    # number of narrower experts beside the others, for routers with slots (MoE Jetpack)
    universal_experts: Annotated[int, AtLeast(0)] = 0
    # neurons of a universal expert; 0 means a quarter of the others' width
    universal_width: Annotated[int, AtLeast(0)] = 0
    # 0 or G; with G, the dense network itself stands beside the experts
    shared_experts: Annotated[int, AtLeast(0)] = 0
    pooling: Literal["class_token", "mean"] = "class_token"  # what the head of an upcycled ViT reads
    # store a copy of the embeddings as the head if the dense model ties the two; some clients never tie
    untie: bool = False
    # which parts of a multimodal model get experts; the others stay as they are
    part: Literal["text", "vision", "text+vision"] = "text"
    # text takes the text model out of a multimodal one and leaves out the rest; empty keeps all of it
    part_only: Literal["", "text"] = ""
    # blocks of the source that predict further tokens (DeepSeek-V3, 2412.19437, 2.2), which serving programs
    # draft with: left out, kept as they are (upcycled targets), or with experts as the layers (native ones)
    mtp: Literal["drop", "keep", "upcycle"] = "drop"
    depth: int = 2  # how many times each block is repeated, for the target depth_tiled

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_width and self.granularity > 1:
            raise UpcycleError(
                "moe.expert_width and moe.granularity both say how wide an expert is; give one"
            )
        if self.part_only and self.part != Moe.part:
            raise UpcycleError(
                f"moe.part = {self.part} is about a whole multimodal model, and moe.part_only takes the text "
                f"model out of it; give one"
            )
        if self.top_k > self.num_experts:
            raise UpcycleError(
                f"moe.top_k = {self.top_k} is more than moe.num_experts = {self.num_experts}; "
                f"a token cannot use more experts than there are"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Successor(Settings):
    """The smaller dense model that the source, a larger one, is narrowed to.

    The experts are made from the source. `hidden_size` is a list in a model of several stages; 0 keeps the
    source's. `intermediate_size` 0 keeps the ratio. `rest` says where everything except the experts comes
    from: the source itself, or a checkpoint of the successor's size.
    """

    section: ClassVar[str] = "successor"

    # channels of the narrower model; in a ConvNeXt a list with one entry per stage; 0 keeps the source's
    hidden_size: int | tuple[int, ...] = 0
    intermediate_size: int = 0  # neurons of its feed-forward networks; 0 keeps the ratio
    # source of everything except the experts: predecessor (the source), or a checkpoint of that size
    rest: str = "predecessor"

    def __post_init__(self) -> None:
        super().__post_init__()
        # The recipe is stored with its result and may be read from another directory.
        if self.rest != "predecessor" and Path(self.rest).is_dir():
            object.__setattr__(self, "rest", str(Path(self.rest).resolve()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grow(Settings):
    """More experts for a source that is a Mixture of Experts already: E experts become m E.

    Experts stay under their numbers. Copies of experts follow, with copies of their rows of the router
    (Expert Upcycling, arXiv 2604.19835). With `choose = "all"` and m times as many experts per token, the m
    copies of an expert share its weight, so the function is kept. With fewer experts per token, copies of one
    expert take the places of other experts, and it is not.

    Copies that tokens always take together have the same gradients, so training alone never tells them apart.
    `noise` does, and with `noise_on = "down"` the function is still kept, up to rounding.
    """

    section: ClassVar[str] = "grow"

    factor: Annotated[int, AtLeast(1)] = 2  # m: experts of a layer, divided by those of the source
    # experts of a layer; 0 means factor times those of the source
    experts: Annotated[int, AtLeast(0)] = 0
    # experts per token; 0 means that they grow as the experts do, which keeps the function
    top_k: Annotated[int, AtLeast(0)] = 0
    # all copies every expert equally often; utility copies those that tokens choose most, layer by layer
    choose: Literal["all", "utility"] = "all"
    # for utility: the routing.json that `upcycle inspect SOURCE --text NAME=FILE` writes
    statistics: str = ""
    most_copies: Annotated[int, AtLeast(2)] = 3  # for utility: the most copies of an expert, itself included
    # noise that tells copies apart, N(0, 1) times so many standard deviations of a matrix
    noise: Annotated[float, AtLeast(0)] = 0.0
    # down: on the last matrix of an expert and its copies, in pairs of opposite signs, which cancel if a
    # token takes both; all: on every matrix of copies, and the source's own experts stay as they are
    noise_on: Literal["down", "all"] = "down"
    # likewise on the rows of the router that are copies, so that they score a token differently
    router_noise: Annotated[float, AtLeast(0)] = 0.0
    # neurons of the shared expert, if the class has one; more than the source's have no output at first; 0
    # keeps the source's
    shared_width: Annotated[int, AtLeast(0)] = 0
    # layers without experts become MoE layers too, by [init] and [router]
    dense_layers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts and self.factor != Grow.factor:
            raise UpcycleError("grow.factor and grow.experts both say how many experts there are; give one")
        if (self.choose == "utility") != bool(self.statistics):
            raise UpcycleError(
                "grow.choose = utility takes grow.statistics = FILE, the routing.json that `upcycle inspect "
                "SOURCE --text NAME=FILE` writes; give both or neither"
            )
        self._make_absolute("statistics")

    @property
    def noisy(self) -> bool:
        """True if copies get noise that does not cancel."""
        return self.router_noise > 0 or (self.noise > 0 and self.noise_on == "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Settings):
    """The MoE layers of one stack of blocks and their router."""

    moe: Moe
    router: Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Everything that decides the bytes of the output, apart from the bytes of the source.

    `parts` holds the stacks of blocks that differ from `moe` and `router`. In TOML they are `[decoder.moe]`
    and `[decoder.router]` with the keys that differ, and likewise `[stage_1]` to `[stage_4]` in a ConvNeXt.
    """

    seed: int = 0  # seeds every random number
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # dtype of the written weights
    drop: tuple[str, ...] = ()  # tensors of the source to leave out, as names or patterns such as v_head.*
    moe: Moe = Moe()
    init: Init = dataclasses.field(default_factory=lambda: settings.read(Init, {}, "init"))
    router: Router = dataclasses.field(default_factory=lambda: settings.read(Router, {}, "router"))
    successor: Successor | None = None
    grow: Grow | None = None
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grow is not None and self.moe.target == Moe.target:
            object.__setattr__(self, "moe", dataclasses.replace(self.moe, target="grown"))

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any] | str | Path | None = None, /, **sections: Any) -> Recipe:
        """Return a recipe made from any form that a caller may have.

        `given` is a nested table as in TOML, the path of a TOML file, or a recipe. `sections` override it, as
        in `Recipe.of(moe={"num_experts": 4})`. Raises `UpcycleError` if it is not a valid recipe.
        """
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
        """Read the recipe in the TOML file `path` (a recipe or run file) and apply `KEY=VALUE` overrides."""
        return cls.of(override(of_run_file(read_toml(path)), overrides))

    def at(self, stack: str) -> Recipe:
        """Return the recipe for one stack of blocks."""
        part = self.parts.get(stack) or Part(moe=self.moe, router=self.router)
        return dataclasses.replace(self, moe=part.moe, router=part.router, parts={})

    def of_part(self, part: str) -> Recipe:
        """Return the recipe for one part of a multimodal model; a vision tower becomes an upcycled one."""
        if part == TEXT:
            parts = {name: own for name, own in self.parts.items() if name != VISION}
            return dataclasses.replace(self, moe=dataclasses.replace(self.moe, part=TEXT), parts=parts)
        own = self.at(VISION)
        further = own.moe.mtp if self.moe.part == VISION else "drop"  # they belong to the text model
        moe = dataclasses.replace(own.moe, part=VISION, target="upcycled", mtp=further)
        return dataclasses.replace(own, moe=moe)

    def as_table(self) -> dict[str, Any]:
        """Return the recipe as a nested table, the form that `Recipe.of` takes and the provenance keeps.

        It has `drop` only if there is something to drop, so older recipes keep their tables and hashes.
        """
        table = super().as_table()
        if dropped := list(table.pop("drop")):
            table["drop"] = dropped
        return table | table.pop("parts")


# what functions accept as a recipe; see `Recipe.of`
RecipeLike = Recipe | Mapping[str, Any] | str | Path | None

# The keys of a run file that mean the same whether a recipe reads them or not.
OF_ANY_RUN = ("seed", "drop")
# The sections and keys of a run file that no recipe has; a test compares them with `Run`.
OF_RUNS = (
    "source", "out", "from_scratch", "task", "teacher", "data", "train", "schedule", "stage", "optimizer",
    "parallel", "log", "checkpoint", "spikes", "eval",
)  # fmt: skip
# The sections and keys of a run file that only a recipe reads, apart from keys of [router].
OF_EXPERTS = (*(key for key in keys(Recipe) if key not in (*OF_ANY_RUN, "router", "parts")), *STACKS)


def _part(name: str, value: Any, model: Mapping[str, Any]) -> Part:
    """Return the part for a stack: its own table laid over those of the model."""
    own, moe = table_at(value, name), table_at(model.get("moe", {}), "moe")
    other = table_at(own.get("moe", {}), f"{name}.moe")
    # block numbers count through all stages
    of_the_model = (*OF_THE_MODEL, "layers") if name.startswith("stage_") else OF_THE_MODEL
    for key in of_the_model:
        default = getattr(Moe, key)
        if other.get(key, moe.get(key, default)) != moe.get(key, default):
            raise UpcycleError(f"{name}.moe.{key}: a model has one; set moe.{key}")
    router = table_at(model.get("router", {}), "router")
    changed = table_at(own.get("router", {}), f"{name}.router")
    usual = router.get("name", Router.usual)
    if changed.get("name", usual) != usual:
        router = {k: v for k, v in router.items() if k in Router.common}
    return settings.read(Part, {**own, "moe": {**moe, **other}, "router": {**router, **changed}}, name)


def _given(given: Any) -> dict[str, Any]:
    """Return the table of a recipe, in whatever form the caller has it."""
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
    """Return the recipe in the table of a run file, which holds more; a recipe is returned as it is.

    Keys that neither has are kept, so that the reader of the recipe refuses them.
    """
    if "source" not in table:
        return dict(table)
    out = {k: v for k, v in table.items() if k not in OF_RUNS}
    if isinstance(out.get("router"), Mapping):
        _, out["router"] = parted(out["router"], Balance)
    return out


def without_experts(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return `table` without what only a Mixture of Experts has, which `moe = false` takes away."""
    out = {k: v for k, v in table.items() if k not in OF_EXPERTS}
    if isinstance(out.get("router"), Mapping):
        out["router"], _ = parted(out["router"], Balance)
    return out


def _layout() -> FileLayout:
    of_stacks = [place for stack in STACKS for place in families(Part, stack)]
    return FileLayout(
        named={**families(Recipe), **dict.fromkeys(of_stacks, Router)},
        short=[f"{place}.init" for place in ("router", *of_stacks)],
        shared={"router": Balance, **dict.fromkeys(of_stacks, Balance)},
        follows=dict.fromkeys(of_stacks, "router"),
        off={"moe": without_experts},
    )


LAYOUT = _layout()


def read_toml(path: str | Path, what: str = "recipe", layout: FileLayout = LAYOUT) -> dict[str, Any]:
    """Read the table in a TOML file and lay it over that of its `base`; see `settings.read_toml`.

    `moe = false` takes away the experts of the base.
    """
    return settings.read_toml(path, what, layout)


def override(table: Mapping[str, Any], given: Iterable[str], layout: FileLayout = LAYOUT) -> dict[str, Any]:
    """Return `table` with each `section.key=value` applied; see `settings.override`."""
    return settings.override(table, given, layout)
