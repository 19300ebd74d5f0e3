"""The collectives of one step of training: which, how many, among how many ranks, of how many bytes.

Bytes are those of the whole tensor on one rank: the output of an all-gather, the input of a reduce-scatter,
the tensor of an all-reduce, what an all-to-all sends. Sums of losses and counts of tokens, a few kilobytes a
step, are left out, and so is what Muon and Adafactor exchange in an update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from upcycle.forecast import activations, head
from upcycle.forecast.setting import Setting
from upcycle.sharding.placement import Split

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
NORM = 8  # bytes of the squared norm of a parameter's gradient (`training/gradients.py`)
COUNT = 8  # bytes of a number of tokens for an expert


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind and size. The ranks of a group are `apart` numbers from each other."""

    kind: Kind
    what: str
    ranks: int
    apart: int
    times: int
    bytes: int
    waited_for: bool = False  # whether the arithmetic that follows needs the result at once

    @property
    def total(self) -> int:
        """The bytes of all calls."""
        return self.times * self.bytes


def collectives(setting: Setting) -> tuple[Collective, ...]:
    """Return the collectives of a step on one rank, leaving out groups of one."""
    found = (*_parameters(setting), *_experts(setting), *_tensor_parallel(setting), *_norms(setting))
    return tuple(each for each in found if each.ranks > 1 and each.times and each.bytes)


def by_kind(found: Iterable[Collective]) -> dict[tuple[Kind, int], tuple[int, int]]:
    """Return the calls and the bytes of each kind of collective and number of ranks."""
    out: dict[tuple[Kind, int], tuple[int, int]] = {}
    for each in found:
        calls, size = out.get((each.kind, each.ranks), (0, 0))
        out[each.kind, each.ranks] = calls + each.times, size + each.total
    return out


def _parameters(setting: Setting) -> Iterator[Collective]:
    """Yield what FSDP does: gather in the forward and, if freed, in the backward pass, then reduce."""
    if not setting.sharded:
        return
    layout = setting.layout
    for group in setting.groups:
        ranks, apart = group.ranks(layout), layout.ep if group.experts else layout.tp
        share = group.share(layout)
        reduced = group.trained(setting.trained).share(layout)
        yield Collective(
            kind="all_gather", what=group.name, ranks=ranks, apart=apart,
            times=setting.passes * (1 if group.kept else 2), bytes=ranks * share * setting.width_in(group),
        )  # fmt: skip
        yield Collective(
            kind="reduce_scatter", what=group.name, ranks=ranks, apart=apart, times=setting.passes,
            bytes=ranks * reduced * setting.stored_in(group),
        )  # fmt: skip
        yield Collective(
            kind="all_reduce", what=group.name, ranks=layout.replicate, apart=layout.replica,
            times=setting.passes, bytes=reduced * setting.stored_in(group),
        )  # fmt: skip
    if (teacher := setting.teacher) is not None:
        # It is gathered block by block in its forward pass, which is the only one.
        blocks = sum(stack.count for stack in teacher.stacks) + 1
        whole = sum(tensor.size for tensor in teacher.tensors.values()) // layout.tp
        yield Collective(
            kind="all_gather", what="the teacher", ranks=layout.fsdp, apart=layout.tp,
            times=setting.passes * blocks, bytes=setting.width * whole // blocks,
        )  # fmt: skip


def _experts(setting: Setting) -> Iterator[Collective]:
    """Yield what transformers' `AllToAllEP` does in every layer.

    The numbers of tokens go first, then the tokens, then the results come back; the backward pass does the
    last two again. A layer that is recomputed does all three again.
    """
    layout, again = setting.layout, 2 if setting.recompute else 1
    if layout.ep == 1:
        return
    for site in setting.built.sites:
        for count, _, top_k in activations.experts(setting.built, site, setting.lengths[site.stack]):
            pairs = -(-setting.tokens(site.stack) // layout.tp) * top_k
            yield Collective(
                kind="all_to_all", what="numbers of tokens", ranks=layout.ep, apart=1,
                times=setting.passes * again, bytes=count * COUNT, waited_for=True,
            )  # fmt: skip
            yield Collective(
                kind="all_to_all", what="tokens of experts", ranks=layout.ep, apart=1,
                times=setting.passes * 2 * (again + 1), bytes=round(pairs * site.hidden) * setting.width,
                waited_for=True,
            )  # fmt: skip


def _norms(setting: Setting) -> Iterator[Collective]:
    """Yield the sums of squared norms: one a mesh, a dimension of it, and a kind of cut."""
    layout = setting.layout
    plain: Counter[tuple[int, Split | None]] = Counter()
    shared: Counter[tuple[int, Split | None]] = Counter()
    for group in setting.groups:
        (shared if group.experts else plain).update(group.trained(setting.trained).cuts(layout))
    for kinds, ranks, apart, inner in (
        (plain, layout.fsdp, layout.tp, layout.tp),
        (shared, layout.efsdp, layout.ep, layout.ep),
    ):
        for (_, split), count in kinds.items():
            yield _norm(count, ranks, apart)
            if split is not None or kinds is shared:
                yield _norm(count, inner, 1)


def _norm(count: int, ranks: int, apart: int) -> Collective:
    return Collective(
        kind="all_reduce", what="norm of the gradient", ranks=ranks, apart=apart, times=1, bytes=count * NORM
    )


def _tensor_parallel(setting: Setting) -> Iterator[Collective]:
    """Yield what transformers' tensor parallelism does, without sequence parallelism.

    A matrix cut by rows sums its outputs, and each one cut by columns sums the gradient of its input. So do
    experts that are cut inside. Experts that are shared out take a slice of the tokens on each rank, and
    gather the results and the gradients. Recomputing a block stops before the last sum or gather.
    """
    layout, width = setting.layout, setting.width
    if layout.tp == 1:
        return
    again = 2 if setting.recompute else 1
    dense = setting.built.dense
    hidden = {stack.name: setting.tokens(stack.name) * stack.hidden * width for stack in dense.stacks}
    routed = {(site.stack, site.layer) for site in setting.built.sites}
    for group in setting.groups:
        if group.block is None or group.experts:
            continue
        cuts = [p.tp.axis for p in group.parameters if p.tp is not None and len(p.shape) == 2]
        networks = 0 if group.block in routed else 1
        times = again * (cuts.count(1) - networks) + networks + cuts.count(0)
        yield _of_activations("all_reduce", setting, times, hidden[group.block[0]])
    for site in setting.built.sites:
        row = setting.lengths[site.stack]
        for _, _, chosen in activations.experts(setting.built, site, row):
            weights = round(setting.tokens(site.stack) * chosen)
            if layout.ep == 1:
                yield _of_activations("all_reduce", setting, 2, hidden[site.stack])
                yield _of_activations("all_reduce", setting, 1, weights * 4)
            else:
                yield _of_activations("all_gather", setting, 2, hidden[site.stack])
                yield _of_activations("all_gather", setting, 1, weights * width)
    if (logits := head.of(setting)) is not None:
        last = dense.stacks[-1].name
        yield _of_activations(
            "all_reduce", setting, 2, hidden[last]
        )  # the embedding's, and the head's gradient
        if logits.chunk is None:
            yield _of_activations("all_gather", setting, 1, logits.tokens * logits.words * width)
        else:  # three numbers a token: its largest logit; the sum of powers, and the label's logit
            for numbers in (1, 2):
                rest = logits.tokens % logits.chunk
                yield _of_activations(
                    "all_reduce", setting, logits.tokens // logits.chunk, numbers * 4 * logits.chunk
                )
                yield _of_activations("all_reduce", setting, bool(rest), numbers * 4 * rest)


def _of_activations(kind: Kind, setting: Setting, times: int, size: int) -> Collective:
    return Collective(
        kind=kind, what="activations", ranks=setting.layout.tp, apart=1, times=setting.passes * times,
        bytes=size, waited_for=True,
    )  # fmt: skip
