"""Branch-Train-MiX: experts from several checkpoints, with the rest averaged (arXiv 2403.07816)."""

from dataclasses import dataclass

from upcycle.errors import UpcycleError
from upcycle.init import Donor, Site
from upcycle.init._merging import Expert, Merging, absolute
from upcycle.tensors.feed_forward import FeedForward


@dataclass(frozen=True, kw_only=True)
class BranchTrainMix(Merging):
    """Experts are the networks of SOURCE and of `sources`, dealt out in equal blocks; the rest is averaged.

    The checkpoints must have the same architecture and shapes. `include_source = false` leaves SOURCE's own
    networks out of the experts and its weights out of the average. It is short for init `experts` with a
    table for each checkpoint and `backbone = "average"`.
    """

    summary = "experts from several dense checkpoints, the rest averaged (Branch-Train-MiX)"
    needs = "init.sources = [checkpoints of the same shape]"

    sources: tuple[str, ...]  # more dense checkpoints of the same shapes; experts take turns among them
    include_source: bool = True  # whether experts are made from the source as well

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UpcycleError("init.sources is empty; branch_train_mix needs at least one more checkpoint")
        object.__setattr__(self, "sources", tuple(map(absolute, self.sources)))

    @property
    def tables(self) -> tuple[Expert, ...]:
        return (Expert(),) * self.include_source + tuple(Expert(source=name) for name in self.sources)

    @property
    def donors(self) -> tuple[Donor, ...]:
        return tuple(Donor(source=name) for name in self.sources)

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(range(not self.include_source, len(self.sources) + 1))

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        return self.make(dense, e, site)

    def preserves(self, site: Site) -> bool:
        return False

    @property
    def uses_source(self) -> bool:
        return self.include_source

    @property
    def in_backbone(self) -> tuple[int, ...]:
        return self.places

    def _uneven(self, site: Site) -> str:
        count = len(self.places)
        return (
            f"{count} checkpoints cannot be dealt out equally to {site.num_experts} experts; "
            f"make moe.num_experts a multiple of {count}"
        )


init = BranchTrainMix
