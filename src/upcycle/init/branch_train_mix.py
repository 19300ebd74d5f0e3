"""Branch-Train-MiX: experts from several checkpoints, with the rest averaged (arXiv 2403.07816)."""

from dataclasses import dataclass
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.init import Init, Site
from upcycle.tensors.feed_forward import FeedForward


@dataclass(frozen=True, kw_only=True)
class BranchTrainMix(Init):
    """Experts are the networks of SOURCE and of `sources`, dealt out in equal blocks; the rest is averaged.

    The checkpoints must have the same architecture and shapes. `include_source = false` leaves SOURCE's own
    networks out of the experts and its weights out of the average.
    """

    summary = "experts from several dense checkpoints, the rest averaged (Branch-Train-MiX)"
    needs = "init.sources = [checkpoints of the same shape]"

    sources: tuple[str, ...]  # more dense checkpoints of the same shapes; experts take turns among them
    include_source: bool = True  # whether experts are made from the source as well

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UpcycleError("init.sources is empty; branch_train_mix needs at least one more checkpoint")
        # The recipe is stored with its result and may be read from another directory.
        absolute = tuple(str(Path(s).resolve()) if Path(s).is_dir() else s for s in self.sources)
        object.__setattr__(self, "sources", absolute)

    @property
    def donors(self) -> tuple[str, ...]:
        return self.sources

    @property
    def uses_source(self) -> bool:
        return self.include_source

    def check(self, site: Site) -> None:
        super().check(site)
        count = len(self.sources) + self.include_source
        if site.num_experts % count:
            raise UpcycleError(
                f"{count} checkpoints cannot be dealt out equally to {site.num_experts} experts; "
                f"make moe.num_experts a multiple of {count}"
            )

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        given = self._given(dense)
        return given[e * len(given) // site.num_experts]

    def backbone(self, tensors):  # type: ignore[no-untyped-def]
        return super().backbone(self._given(tensors))

    def preserves(self, site: Site) -> bool:
        return False

    def _given(self, items: list) -> list:
        return items if self.include_source else items[1:]


init = BranchTrainMix
