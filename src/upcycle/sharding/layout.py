"""The layout of a run: how many ranks replicate, shard, split matrices and share out experts.

Ranks are numbered in row-major order over (replicate, fsdp, tp). The experts of a layer lie on the same ranks
in another order: (replicate, efsdp, ep), so that replicate x fsdp x tp = replicate x efsdp x ep. The ranks of
one expert-parallel group are neighbours, and so are those of one tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from upcycle.errors import UpcycleError

OF_A_RUN = {
    "replicate": "replicate",
    "fsdp": "fsdp",
    "tp": "tp",
    "ep": "ep",
}  # as [parallel] spells the sizes
OF_TRANSFORMERS = {
    "replicate": "dp_replicate_size", "fsdp": "fsdp_size", "tp": "tp_size", "ep": "ep_size",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The coordinates of one rank."""

    replicate: int
    fsdp: int
    tp: int
    efsdp: int
    ep: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The numbers of ranks. A world of one has a layout of ones."""

    replicate: int = 1  # copies of the whole model (HSDP)
    fsdp: int = 1  # ranks that see different rows and share the parameters of a copy
    tp: int = 1  # ranks that see the same rows and split the matrices of a layer
    ep: int = 1  # ranks that share out the experts of a layer, taken out of fsdp x tp

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.replicate * self.fsdp * self.tp

    @property
    def replica(self) -> int:
        """The number of ranks that hold one copy of the model together."""
        return self.fsdp * self.tp

    @property
    def dp(self) -> int:
        """The number of groups of ranks that see different rows."""
        return self.replicate * self.fsdp

    @property
    def efsdp(self) -> int:
        """The number of ranks of a copy that hold the same experts and shard them among each other."""
        return self.replica // self.ep

    def at(self, rank: int) -> Coordinates:
        """Return the coordinates of a rank of the world."""
        copy, within = divmod(rank, self.replica)
        fsdp, tp = divmod(within, self.tp)
        efsdp, ep = divmod(within, self.ep)
        return Coordinates(replicate=copy, fsdp=fsdp, tp=tp, efsdp=efsdp, ep=ep)

    def refuse(
        self,
        world: int,
        *,
        experts: Collection[int] | None = None,
        heads: Collection[int] = (),
        names: Mapping[str, str] = OF_A_RUN,
        prefix: str = "",
    ) -> None:
        """Raise `UpcycleError` if the sizes do not fit the world or the model.

        `experts` are the numbers of experts of its layers (None: unknown), `heads` those of its attention
        heads, keys and values included. `names` spells the sizes as the user did, and `prefix` stands before
        the first.
        """
        sizes = asdict(self)
        said = prefix + ", ".join(f"{names[k]} = {n}" for k, n in sizes.items() if k != "replicate" or n != 1)
        said += f" on {world} process(es)"
        if min(sizes.values()) < 1:
            raise UpcycleError(f"{said}: each must be 1 or more")
        copies = f"{names['replicate']} x " if self.replicate > 1 else ""
        if self.world != world:
            raise UpcycleError(
                f"{said}: {copies}{names['fsdp']} x {names['tp']} ask for {self.world} process(es) and there "
                f"are {world}; start as many with torchrun, or change them"
            )
        if self.ep > 1 and (self.ep % self.tp or self.replica % self.ep):
            raise UpcycleError(
                f"{said}: {names['ep']} must be a multiple of {names['tp']} and divide {names['fsdp']} x "
                f"{names['tp']}"
            )
        if self.ep > 1 and experts is not None and not experts:
            raise UpcycleError(f"{said}: a dense model has no experts to share out; set {names['ep']} = 1")
        if wrong := [count for count in experts or () if count % self.ep]:
            raise UpcycleError(f"{said}: {names['ep']} must divide the {wrong[0]} experts of a layer")
        if odd := [count for count in heads if count % self.tp]:
            raise UpcycleError(
                f"{said}: {names['tp']} must divide the {odd[0]} heads of attention (queries, and keys and "
                f"values) of the model"
            )

    def __str__(self) -> str:
        sizes = {name: size for name, size in asdict(self).items() if size > 1}
        return " x ".join(f"{name} {size}" for name, size in sizes.items()) or "one process"
