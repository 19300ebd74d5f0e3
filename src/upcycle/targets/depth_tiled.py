"""Depth tiling: the dense model with every block repeated.

It is the dense baseline of Sparse Upcycling (figure 5). Each block of a stack is repeated several times in a
row, as Rae et al. (2021) grow models. The result is a deeper dense model of the same class, which needs
further training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.families._checked import MOST_BLOCKS
from upcycle.init import Site
from upcycle.targets import refuse_experts
from upcycle.targets._dense_class import DenseClass
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class DepthTiled(DenseClass):
    """The dense class with every block repeated several times in a row."""

    kind: ClassVar[str] = "deeper"
    summary: str = "the dense class, every block repeated: a dense baseline of more FLOPs"
    needs: ClassVar[str] = "moe.depth = how often"

    def admit(self, dense: Dense, recipe: Recipe) -> None:
        """Raise `UpcycleError` if the recipe asks for experts, which this target would ignore."""
        refuse_experts(recipe, ("moe", "init", "router"))

    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return config.json of the deeper model."""
        return _config(dense, recipe.moe.depth)

    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Return every tensor of the deeper model by its name on disk."""
        return _tensors(models[0], recipe.moe.depth)

    def warnings(self, built: Blueprint) -> list[str]:
        """Warn that the function is not kept."""
        return ["every block stands several times: the function is not kept, and the model has to be trained"]

    def origin(self, recipe: Recipe) -> str:
        """Return how many times each block is repeated."""
        return f"every block {recipe.moe.depth} times"

    @classmethod
    def label(cls, recipe: Mapping[str, Any]) -> str:
        """Return how many times each block is repeated."""
        return f"every block {recipe['moe'].get('depth')} times"

    @classmethod
    def made_by(cls, recipe: Mapping[str, Any]) -> str:
        """Return the end of a sentence that says how many times each block is repeated."""
        return f", every block {recipe['moe']['depth']} times"


target = DepthTiled


def of(dense: Dense, recipe: Recipe) -> DepthTiled:
    """Return the deeper twin of the dense class."""
    return DepthTiled(model_type=dense.family.model_type, architecture=dense.own_class)


def _config(dense: Dense, times: int) -> Config:
    """Return config.json of the deeper model: block counts times `times`, and per-block entries repeated."""
    if times < 2:
        raise UpcycleError(f"moe.depth = {times}; a deeper model repeats its blocks 2 times or more")
    if (blocks := sum(stack.count for stack in dense.stacks)) * times > MOST_BLOCKS:
        raise UpcycleError(
            f"moe.depth = {times} makes {blocks * times:,} blocks of {blocks}; {MOST_BLOCKS:,} are taken at "
            f"most"
        )
    raw = dense.raw
    return {**raw, **dense.family.repeated(dense.config, raw, times)}


def _tensors(dense: Dense, times: int) -> dict[str, Lazy]:
    """Return every tensor of the deeper model: block j is block j // `times` of the dense one."""
    wanted = dense.family.shapes(dense.family.config(_config(dense, times)))
    out = dict(dense.tensors)
    for prefix, count in {s.path.partition("{i}")[0]: s.count for s in dense.stacks}.items():
        blocks: dict[int, dict[str, Lazy]] = {}
        for name in [name for name in out if name.startswith(prefix)]:
            number, _, rest = name.removeprefix(prefix).partition(".")
            if number.isdigit():
                blocks.setdefault(int(number), {})[rest] = out.pop(name)
        for j in range(count * times):
            for rest, tensor in blocks[j // times].items():
                if (name := f"{prefix}{j}.{rest}") in wanted:  # T5 has its position biases in block 0 only
                    out[name] = tensor
    spared = dense.family.may_lack(dense.config)
    if missing := wanted.keys() - out.keys() - spared:
        raise AssertionError(f"a deeper {dense.family.model_type} lacks {sorted(missing)[:3]}")
    return out
