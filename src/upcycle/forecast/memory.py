"""The memory of the most loaded rank in a step: what is alive at each moment that may be the largest.

A step is walked through as FSDP2 does it (torch 2.13, `torch/distributed/fsdp/_fully_shard`). To gather a
group it fills one buffer, copies it to a tensor for each parameter, by way of another copy for those that are
not cut along their first axis, and frees the buffer. In the backward pass the group before is gathered while
this one computes, and the last gradients stay in float32 until the next ones are ready to be reduced. What an
allocator loses to fragments, and the CUDA context, are not counted. The update is that of a fused optimizer,
which needs no memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from upcycle.families import Stack
from upcycle.forecast import activations
from upcycle.forecast.groups import Group
from upcycle.forecast.setting import Setting
from upcycle.sharding.placement import elements, part

F32 = 4
CHUNKED = 1 << 28  # bytes of float32 logits from which on a head that no ranks share computes them in chunks
LOGITS_MADE = 4 + 4  # bytes a logit in the forward pass, beside itself: in float32, and its log-softmax
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

    @property
    def total(self) -> int:
        """The sum of all parts in bytes."""
        return self.weights + self.gradients + self.moments


def held(setting: Setting) -> Held:
    """Return what the most loaded rank holds of the model, between two steps but for the gradients."""
    share = setting.stored * sum(group.share(setting.layout) for group in setting.groups)
    return Held(weights=share, gradients=share, moments=round(setting.moments * share))


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
    experts: tuple[Group, ...]  # apart from `own` under expert parallelism


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
            _Block(stacks[name], layer, members[0], tuple(members[1:]))
            for (name, layer), members in inside.items()
        ]
        outside = [group for group in setting.groups if group.block is None]
        self.root = next((g for g in outside if g.name == "the rest"), None)
        self.embedding = next((g for g in outside if not g.kept), None)
        self.head = next((g for g in outside if g.kept and g is not self.root), None)
        self.kept = [activations.kept(setting, b.stack, b.layer) for b in self.blocks]
        self.shares = [setting.stored * sum(self._share(g) for g in (b.own, *b.experts)) for b in self.blocks]
        whole = held(setting)
        self.always = {"weights": whole.weights, "moments": whole.moments}
        self.accumulated = whole.gradients if setting.passes > 1 else 0  # gradients of earlier passes

    # --- sizes in bytes

    def _share(self, group: Group | None) -> int:
        return group.share(self.layout) if group else 0

    def _whole(self, group: Group | None) -> float:
        """The gathered group. Without FSDP, autocast makes a copy of every weight instead."""
        if group is None or not (self.setting.sharded or self.setting.precision == "mixed"):
            return 0.0
        return self.setting.width * group.gathered(self.layout)

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
        return self.setting.width * sum(group.gathered(self.layout) for group in groups)

    def _reduced(self, group: Group | None) -> float:
        """The buffer from which gradients are reduced."""
        if group is None or not self.setting.sharded:
            return 0.0
        return self.setting.stored * group.gathered(self.layout)

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
        words = int(dense.config["vocab_size"]) if dense.has_language_head else 0
        count = tokens * words
        if not setting.sharded and setting.layout.tp == 1 and F32 * count >= CHUNKED:
            count = -(-tokens // -(-words // last.hidden)) * words
        # The last norm keeps its input in float32 and twice in the precision of the arithmetic.
        norm = tokens * last.hidden * (4 + 2 * width)
        alive = sum(self.kept) + tokens * last.hidden * width + norm
        gathered = self._whole(self.head) + self._root(backward=False)[0]
        if not setting.sharded and setting.precision == "mixed":
            gathered += sum(self._whole(g) for b in self.blocks for g in (b.own, *b.experts))
        common = {"gradients": float(self.accumulated), "activations": alive, "gathered": gathered}
        narrow = width if width < 4 else 0
        yield self._memory("the loss", **common, logits=count * (narrow + LOGITS_MADE))
        yield self._memory("the gradient of the loss", **common, logits=count * LOGITS_BACK)
        if self.head is None or not setting.sharded:
            return
        common["gathered"] = self._root(backward=False)[0] + self._buffer(self.blocks[-1].own)
        for name, reduced in self._reductions(self.head):
            yield self._memory(f"{name} of the head", **common, reduced=reduced)

    def block(self, number: int) -> Iterator[Memory]:
        """The backward pass of one block."""
        setting, block, after = self.setting, self.blocks[number], number + 1
        gathered, waiting = self._root(backward=True)
        tokens = setting.tokens(block.stack.name)
        back = tokens * block.stack.hidden * setting.width  # the gradient of the block's output
        entered = sum(self.kept[:number]) + back * (2 if setting.recompute else 1)  # with its input
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
        yield self._memory("the update", gradients=float(held(self.setting).gradients))

    # --- parts of them

    def _gradients(self, after: int) -> float:
        """The sharded gradients once all blocks from number `after` on have theirs."""
        done = self.setting.stored * self._share(self.head) + sum(self.shares[after:])
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
            for p in g.parameters
            if len(p.shape) == 3
        ]
        if not self.setting.sharded or not sizes:
            return 0.0, 0.0
        return float(min(sizes)), float(sum(sizes))

    def _reductions(self, group: Group) -> Iterator[tuple[str, float]]:
        """Return the bytes of reducing a group's gradients: cut to pieces in order, then in the buffer."""
        if not self.setting.sharded:
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
