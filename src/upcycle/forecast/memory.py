"""The memory of the most loaded rank in a step: what is alive at each moment that may be the largest.

A step is walked through as FSDP2 does it (torch 2.13, `torch/distributed/fsdp/_fully_shard`). To gather a
group it fills one buffer, copies it to a tensor for each parameter, by way of another copy for those that are
not cut along their first axis, and frees the buffer. In the backward pass the group before is gathered while
this one computes, and the last gradients stay in float32 until the next ones are ready to be reduced. What an
allocator loses to fragments, and the CUDA context, are not counted. The update of a fused optimizer needs no
memory of its own; the others say what they work with (`Optimizer.update_bytes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

from upcycle.families import Stack
from upcycle.forecast import activations, head
from upcycle.forecast.groups import Group
from upcycle.forecast.setting import F32, Setting
from upcycle.sharding.placement import elements, part

LOGITS_MADE = 4 + 4  # bytes a logit in the forward pass, beside itself: in float32, and its log-softmax
LOGITS_TAUGHT = 4 + 4  # of a teacher, beside themselves: their log-softmax, and the divergence of each word
LOGITS_BACK = 3 * 4  # as the backward pass begins: the log-softmax, and the gradients behind and before it


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank at one moment of a step."""

    moment: str
    weights: float
    moments: float  # of the optimizer
    gradients: float = 0.0  # sharded, as the optimizer takes them
    gathered: float = 0.0  # parameters that are whole for a while, with the buffers they come through
    reduced: float = 0.0  # gradients that are whole, and the buffers from which they are reduced
    activations: float = 0.0
    logits: float = 0.0
    teacher: float = 0.0  # weights of the model that is learned from
    masks: float = 0.0  # that keep documents apart
    update: float = 0.0  # what the optimizer works with

    @property
    def total(self) -> float:
        """The sum of all parts in bytes."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "moment")


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a rank holds when the optimizer updates the weights."""

    weights: int
    gradients: int
    moments: int
    teacher: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts in bytes."""
        return self.weights + self.gradients + self.moments + self.teacher


def held(setting: Setting) -> Held:
    """Return what the most loaded rank holds of the model, between two steps but for the gradients."""
    own = [(group.trained(setting.trained).share(setting.layout), group) for group in setting.groups]
    return Held(
        weights=sum(setting.stored_in(group) * group.share(setting.layout) for group in setting.groups),
        gradients=sum(setting.stored_in(group) * share for share, group in own),
        moments=round(sum(setting.state_in(group) * share for share, group in own)),
        teacher=taught(setting),
    )


def taught(setting: Setting) -> int:
    """Return the bytes of a rank's even share of the teacher, which is in the type of the arithmetic."""
    if setting.teacher is None:
        return 0
    return setting.width * sum(t.size for t in setting.teacher.tensors.values()) // setting.layout.replica


def update(setting: Setting) -> float:
    """Return the bytes that an update holds beside weights, gradients and moments."""
    if setting.update is None:
        return 0.0
    inside: list[int] = []
    outside: list[int] = []
    for group in setting.groups:
        sizes = [elements(part(p, setting.layout, 0)) for p in group.trained(setting.trained).parameters]
        (outside if group.block is None else inside).extend(sizes)
    return setting.update(inside, outside)


def masks(setting: Setting, blocks: int) -> float:
    """Return the bytes of a mask of the rows of a pass, and of its copy in each of `blocks` blocks.

    sdpa turns a mask of truth values into numbers, and keeps those for the backward pass.
    """
    if not setting.masked:
        return 0.0
    pairs = max(setting.rows * length**2 for length in setting.lengths.values())
    return float(pairs * (1 + blocks * setting.width))


def peak(setting: Setting) -> Memory:
    """Return the moment of a step at which the most memory is in use."""
    return max(moments(setting), key=lambda memory: memory.total)


def moments(setting: Setting) -> Iterator[Memory]:
    """Yield the moments of a step that may be the largest."""
    walk = _Walk(setting)
    yield from walk.ends()
    for number in reversed(range(len(walk.blocks))):
        yield from walk.block(number)
    yield from walk.last()


@dataclass(frozen=True)
class _Block:
    """One block: its groups, and what it keeps of its tokens."""

    stack: Stack
    layer: int
    own: Group
    routers: tuple[Group, ...]  # apart from `own` if they are in float32 and the block is not
    experts: tuple[Group, ...]  # apart from `own` under expert parallelism

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of its groups."""
        return self.own, *self.routers, *self.experts


class _Walk:
    """The step of a setting, from the loss back to the embedding."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.layout = setting, setting.layout
        stacks = {stack.name: stack for stack in setting.built.dense.stacks}
        inside: dict[tuple[str, int], list[Group]] = {}
        for group in setting.groups:
            if group.block is not None:
                inside.setdefault(group.block, []).append(group)
        self.blocks = [
            _Block(
                stacks[name],
                layer,
                members[0],
                tuple(group for group in members[1:] if group.wide),
                tuple(group for group in members[1:] if group.experts),
            )
            for (name, layer), members in inside.items()
        ]
        outside = [group for group in setting.groups if group.block is None]
        self.root = next((g for g in outside if g.name == "the rest"), None)
        self.embedding = next((g for g in outside if not g.kept), None)
        self.head = next((g for g in outside if g.kept and g is not self.root), None)
        self.kept = [activations.kept(setting, b.stack, b.layer) for b in self.blocks]
        self.shares = [
            sum(setting.stored_in(g) * self._share(self._trained(g)) for g in b.groups) for b in self.blocks
        ]
        whole_routers = (sum(self._whole(g) for g in b.routers) for b in self.blocks)
        self.routers = [*itertools.accumulate(whole_routers)]  # of the blocks so far; they stay gathered
        whole = held(setting)
        self.always = {"weights": whole.weights, "moments": whole.moments, "teacher": whole.teacher}
        self.accumulated = whole.gradients if setting.passes > 1 else 0  # gradients of earlier passes

    # --- sizes in bytes

    def _trained(self, group: Group | None) -> Group | None:
        return None if group is None else group.trained(self.setting.trained)

    def _share(self, group: Group | None) -> int:
        return group.share(self.layout) if group else 0

    def _whole(self, group: Group | None) -> float:
        """The gathered group. Without FSDP, autocast makes a copy of every weight instead."""
        if group is None or not (self.setting.sharded or self.setting.precision == "mixed"):
            return 0.0
        return self.setting.width_in(group) * group.gathered(self.layout)

    def _buffer(self, group: Group | None) -> float:
        """The buffer that a group arrives in; one rank alone copies straight."""
        alone = group is None or not self.setting.sharded or group.ranks(self.layout) == 1
        return 0.0 if alone else self._whole(group)

    def _through(self, group: Group) -> float:
        """The copies of parameters that are cut along another axis than the first, on arrival."""
        alone = not self.setting.sharded or group.ranks(self.layout) == 1
        return 0.0 if alone else self.setting.width * group.inner(self.layout)

    def _grads(self, *groups: Group) -> float:
        """The gradients of whole parameters."""
        if not self.setting.sharded:
            return 0.0  # they are the gradients that the optimizer takes
        own = [group.trained(self.setting.trained) for group in groups]
        return sum(self.setting.width_in(group) * group.gathered(self.layout) for group in own)

    def _reduced(self, group: Group | None) -> float:
        """The buffer from which gradients are reduced."""
        if group is None or not self.setting.sharded:
            return 0.0
        own = group.trained(self.setting.trained)
        return self.setting.stored_in(group) * own.gathered(self.layout)

    def _root(self, *, backward: bool) -> tuple[float, float]:
        """The parameters that are gathered all the time, and the gradients that wait with them."""
        if self.root is None:
            return 0.0, 0.0
        return self._whole(self.root), self._grads(self.root) if backward else 0.0

    def _memory(self, moment: str, **parts: float) -> Memory:
        return Memory(moment=moment, **{**self.always, **parts})

    # --- moments

    def ends(self) -> Iterator[Memory]:
        """The loss, forward and backward, and the head."""
        setting, dense = self.setting, self.setting.built.dense
        last = dense.stacks[-1]
        tokens, width = setting.tokens(last.name), setting.width
        narrow = width if width < 4 else 0
        gathered = self._whole(self.head) + self._root(backward=False)[0] + self.routers[-1]
        logits, made, added = head.of(setting), 0, 0
        count = logits.at_once if logits else 0
        if logits and logits.chunk is not None:
            # The gradients of chunks are summed up in float32, and those of the states are kept.
            matrix = logits.words * logits.hidden if logits.trained else 0
            made, added = F32 * matrix + tokens * last.hidden * width, narrow * matrix
            # FSDP frees the last buffer after the forward pass, and chunks are computed inside it.
            gathered += self._buffer(self.head or (self.blocks[-1].own, *self.blocks[-1].experts)[-1])
        # The last norm keeps its input in float32 and twice in the precision of the arithmetic.
        norm = tokens * last.hidden * (4 + 2 * width)
        alive = sum(self.kept) + tokens * last.hidden * width + norm
        if not setting.sharded and setting.precision == "mixed":
            gathered += sum(self._whole(g) for b in self.blocks for g in b.groups)
        common = {"gradients": float(self.accumulated), "activations": alive, "gathered": gathered}
        common["masks"] = masks(setting, 1 if setting.recompute is True else len(self.blocks))
        said = 0
        if logits and setting.teacher is not None:
            # FSDP frees a teacher's head after its forward pass, so all of its logits are there by then.
            whole = logits.tokens * logits.words if setting.sharded else count
            said = whole * width + count * LOGITS_TAUGHT
        yield self._memory("the loss", **common, logits=made + count * (narrow + LOGITS_MADE) + said)
        back = made + max(count * LOGITS_BACK, count * width + added) + said
        yield self._memory("the gradient of the loss", **common, logits=back)
        if self.head is None or not setting.sharded:
            return
        common["gathered"] = self._root(backward=False)[0] + self._buffer(self.blocks[-1].own)
        common["gathered"] += self.routers[-1]
        for name, reduced in self._reductions(self.head):
            yield self._memory(f"{name} of the head", **common, reduced=reduced)

    def block(self, number: int) -> Iterator[Memory]:
        """The backward pass of one block."""
        setting, block, after = self.setting, self.blocks[number], number + 1
        gathered, waiting = self._root(backward=True)
        gathered += self.routers[number]
        tokens = setting.tokens(block.stack.name)
        masked = masks(setting, 1 if setting.recompute is True else after)
        back = tokens * block.stack.hidden * setting.width  # the gradient of the block's output
        entered = sum(self.kept[:number]) + back * (2 if setting.recompute else 1)  # with its input
        entered += masked
        grads = self._gradients(after)
        previous = self._previous(number)
        before = self.blocks[number - 1].own if number else self.embedding
        beside = activations.attention(setting, block.stack, block.layer)
        middle, first = activations.alive_in_network(setting, block.stack, block.layer)
        whole = self._whole(block.own) + sum(self._whole(g) for g in block.experts)
        ahead = self._buffer(before)
        # 1. The block, gathered while the one after it computed, is copied to its tensors.
        yield self._memory(
            f"the arrival of block {number}", gradients=grads, activations=entered,
            gathered=gathered + self._buffer(block.own) + self._through(block.own) + self._whole(block.own),
            reduced=waiting + previous,
        )  # fmt: skip
        for group in block.experts:
            arrives = self._buffer(group) + self._through(group) + self._whole(group)
            yield self._memory(
                f"the arrival of the experts of block {number}",
                gradients=grads,
                activations=entered + beside,
                gathered=gathered + self._whole(block.own) + arrives,
                reduced=waiting + previous,
            )
        # 2. Its network goes back: the gradients of the last matrix are there, then those of the first.
        last, both = self._of_network(block)
        yield self._memory(
            f"the activation of block {number}", gradients=grads, activations=entered + beside + middle,
            gathered=gathered + whole + ahead, reduced=waiting + previous + last,
        )  # fmt: skip
        yield self._memory(
            f"the network of block {number}", gradients=grads, activations=entered + beside + first,
            gathered=gathered + whole + ahead, reduced=waiting + previous + both,
        )  # fmt: skip
        # 3. Its gradients are reduced: those of the experts first, if they are apart.
        for group in (*block.experts, block.own):
            kept = beside if group is not block.own else 0.0
            for name, reduced in self._reductions(group):
                yield self._memory(
                    f"{name} of {group.name}", gradients=grads, activations=entered + kept,
                    gathered=gathered + ahead + (self._whole(block.own) if group is not block.own else 0.0),
                    reduced=waiting + reduced,
                )  # fmt: skip

    def last(self) -> Iterator[Memory]:
        """The gradient of the embedding, and of what was gathered with the whole model."""
        for group in filter(None, (self.embedding, self.root)):
            for name, reduced in self._reductions(group):
                yield self._memory(
                    f"{name} of {group.name}", gradients=self._gradients(0), reduced=reduced,
                )  # fmt: skip
        yield self._memory(
            "the update", gradients=float(held(self.setting).gradients), update=update(self.setting)
        )

    # --- parts of them

    def _gradients(self, after: int) -> float:
        """The sharded gradients once all blocks from number `after` on have theirs."""
        done = self.setting.stored * self._share(self._trained(self.head)) + sum(self.shares[after:])
        return float(max(self.accumulated, done))

    def _previous(self, number: int) -> float:
        """The buffer that still holds the gradients that were reduced last."""
        if number + 1 < len(self.blocks):
            return self._reduced(self.blocks[number + 1].own)
        return self._reduced(self.head)

    def _of_network(self, block: _Block) -> tuple[float, float]:
        """The whole gradients of a block's network: of the last matrix alone, and of all."""
        groups = block.experts or (block.own,)
        sizes = [
            self.setting.width * (g.ranks(self.layout) * elements(part(p, self.layout, 0)))
            for g in groups
            for p in g.trained(self.setting.trained).parameters
            if len(p.shape) == 3
        ]
        if not self.setting.sharded or not sizes:
            return 0.0, 0.0
        return float(min(sizes)), float(sum(sizes))

    def _reductions(self, group: Group) -> Iterator[tuple[str, float]]:
        """Return the bytes of reducing a group's gradients: cut to pieces in order, then in the buffer."""
        group = group.trained(self.setting.trained)
        if not self.setting.sharded or not group.parameters:
            return
        grads, ranks = self._grads(group), group.ranks(self.layout)
        if ranks == 1:  # copied, divided and summed by hand
            yield "the gradients", grads + self._reduced(group)
            if group.experts:  # whose divisor is not the number of ranks
                yield "the gradients, divided,", 3 * self._reduced(group)
            return
        cut = [p for p in group.parameters if p.fsdp]
        most = max((ranks * elements(part(p, self.layout, 0)) for p in cut), default=0)
        yield "the gradients", grads + max(self.setting.width * most, self._reduced(group))
