"""A list of experts, each from a checkpoint of its own choice, beside one backbone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from upcycle.errors import UpcycleError
from upcycle.init import Donor, Site
from upcycle.init._merging import Expert, Merging
from upcycle.tensors.computed import Mean
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.mixed import Slerp


@dataclass(frozen=True, kw_only=True)
class Experts(Merging):
    """Each table `[[init.expert]]` makes one expert, or an equal block of them; SOURCE is the base.

    The backbone is everything that is no expert. `base` takes it from SOURCE, as mergekit-moe does, and
    `average` is the mean over the models of the experts, each counted once (Branch-Train-MiX,
    arXiv 2403.07816). `slerp` goes along the arcs between these models in the order of the tables, a k-th of
    the way to the k-th of them: the middle of the arc for two (Shoemake 1985).
    """

    summary = "a list of experts: checkpoint, LoRA adapter, share and noise of each, and one backbone"
    needs = "a table [[init.expert]] for each expert"

    # Two keys have the names of methods, which is why everybody asks `make` and `merge` instead.
    expert: tuple[Expert, ...] = ()  # type: ignore[assignment]
    # the origin of everything but the experts: SOURCE, or the models of the experts mixed
    backbone: Literal["base", "average", "slerp"] = "base"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.expert:
            raise UpcycleError(
                "init.expert is empty; init experts needs a table [[init.expert]] for each expert"
            )

    @property
    def tables(self) -> tuple[Expert, ...]:
        return self.expert

    @cached_property
    def donors(self) -> tuple[Donor, ...]:
        found = (table.donor for table in self.expert)
        return tuple(dict.fromkeys(donor for donor in found if donor is not None))

    @cached_property
    def places(self) -> tuple[int, ...]:
        models: list[Donor | None] = [None, *self.donors]
        return tuple(models.index(table.donor) for table in self.expert)

    @property
    def in_backbone(self) -> tuple[int, ...]:
        return (0,) if self.backbone == "base" else tuple(dict.fromkeys(self.places))

    @property
    def uses_source(self) -> bool:
        adapted = any(not donor.source for donor in self.donors)
        return adapted or 0 in self.in_backbone or 0 in self.in_experts

    def merge(self, tensors: list[Lazy]) -> Lazy:
        if len(tensors) == 1:
            return tensors[0]
        if self.backbone == "slerp":
            return Slerp(tuple(tensors), tuple(1 / k for k in range(2, len(tensors) + 1)))
        return Mean(tuple(tensors))

    def warnings(self, site: Site) -> list[str]:
        places = enumerate(self.expert)
        seen: dict[Expert, int] = {}
        alike = [(seen.setdefault(table, i), i) for i, table in places if table.donor and not table.noise]
        return [
            f"init.expert[{first}] and init.expert[{i}] are the same model, so that their experts are equal "
            f"until they are trained"
            for first, i in alike
            if first != i
        ]

    def _uneven(self, site: Site) -> str:
        count = len(self.expert)
        return (
            f"moe.num_experts = {site.num_experts} and init.expert lists {count}; each table makes as many "
            f"experts as the others, so make moe.num_experts {count} or a multiple of it"
        )


init = Experts
