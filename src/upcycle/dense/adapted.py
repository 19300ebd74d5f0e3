"""A dense model with a LoRA adapter merged into it, tensor by tensor, when a tensor is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.adapters import Adapter, Pair
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, listed
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.mixed import LowRank

# What the names of a text model's modules begin with in the classes of today and of before.
_WITHIN = ("model.language_model.", "language_model.model.", "language_model.")


@dataclass(frozen=True, kw_only=True)
class Adapted(Dense):
    """A dense model whose matrices have what an adapter adds to them."""

    bare: Dense  # the model without the adapter
    adapter: Adapter

    @cached_property
    def tensors(self) -> dict[str, Lazy]:
        return {name: self._merged(name, tensor) for name, tensor in self.bare.tensors.items()}

    @cached_property
    def around(self) -> dict[str, Lazy]:
        return {name: self._merged(name, tensor) for name, tensor in self.bare.around.items()}

    @property
    def others(self) -> tuple[Checkpoint, ...]:
        return (self.adapter.checkpoint,)

    def _merged(self, name: str, tensor: Lazy) -> Lazy:
        pair = self.changes.get(name)
        return tensor if pair is None else LowRank(tensor, pair.left, pair.right, pair.scale)

    @cached_property
    def changes(self) -> dict[str, Pair]:
        """The changes that the adapter makes, by the names of the tensors that it changes."""
        pairs = self.adapter.pairs
        return {name: pairs[module] for module, name in self._places.items() if name is not None}

    @cached_property
    def _places(self) -> dict[str, str | None]:
        """The name of the tensor that each changed module is stored as; None if there is none."""
        return {module: self._place(module) for module in self.adapter.pairs}

    def refuse_misfit(self) -> None:
        """Raise `UpcycleError` if the adapter does not belong to this model."""
        where, base = self.adapter.checkpoint.folder, self.checkpoint.folder
        if strange := sorted(module for module, name in self._places.items() if name is None):
            raise UpcycleError(
                f"{where} changes {listed(strange)}, which {base} ({self.family.model_type}) does not have; "
                f"give the model that the adapter was trained on"
            )
        for name, pair in self.changes.items():
            if name in self._stored and self._stored[name] != pair.shape:
                raise UpcycleError(
                    f"{where} was made for another base: it changes {name} as a matrix of "
                    f"{list(pair.shape)}, and {base} has {list(self._stored[name])}"
                )
        if odd := sorted(module for module in self._places if not self.adapter.targets(module)):
            raise UpcycleError(
                f"{where} holds matrices for {listed(odd)}, which its target_modules do not name; give the "
                f"adapter_config.json that belongs to these weights"
            )

    @cached_property
    def homeless(self) -> list[str]:
        """The changed tensors that are not stored, because they are tied to others."""
        return [name for name in self.changes if name not in self._stored]

    @cached_property
    def _stored(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's tensors, and of those around it."""
        return {name: t.shape for name, t in (self.bare.tensors | self.bare.around).items()}

    def _place(self, module: str) -> str | None:
        """Return the name of the tensor that a module's matrix is stored as; None if there is none."""
        known = self._stored
        head = self.family.tied[0] if self.family.tied and self.config["tie_word_embeddings"] else None
        return next((n for n in self._spellings(f"{module}.weight") if n in known or n == head), None)

    def _spellings(self, name: str) -> Iterator[str]:
        """Yield what a name in the class may be called here: by the family, or in the files."""
        renamed = f".{name}"
        for now, on_disk in self.family.modules.items():
            renamed = renamed.replace(now, on_disk)
        for each in dict.fromkeys((name, renamed[1:])):
            yield each
            if (own := self.place.own(each)) is not None:
                yield own
            yield self.family.root + each
            yield each.partition(".")[2]
            for start in _WITHIN:
                if each.startswith(start):
                    yield self.family.root + each.removeprefix(start)


def adapted(dense: Dense, adapter: Adapter) -> Adapted:
    """Return a dense model with an adapter merged into it. Raises `UpcycleError` if they do not fit."""
    given = {field.name: getattr(dense, field.name) for field in fields(Dense)}
    made = Adapted(**given, bare=dense, adapter=adapter)
    made.refuse_misfit()
    return made
