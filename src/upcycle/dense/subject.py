"""A model as a task sees it, dense or Mixture of Experts: a folder and what its config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle import families, targets
from upcycle.checkpoints.checkpoint import read_json
from upcycle.checkpoints.preprocessors import Preprocessor
from upcycle.dense import places
from upcycle.errors import UpcycleError
from upcycle.families import Family, Grid
from upcycle.families._wrappers import TEXT, VISION

if TYPE_CHECKING:
    from upcycle.dense.source import Dense


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The facts about a model that a task needs before it is loaded. `config` is config.json."""

    folder: Path  # holds the tokenizer files
    config: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Subject:
        """Return the model in a folder."""
        return cls(
            folder=folder,
            config=read_json(
                folder / "config.json", f"{folder} has no config.json; give a folder of a model"
            ),
        )

    @classmethod
    def of_dense(cls, dense: Dense) -> Subject:
        """Return a dense checkpoint as the class that it was admitted as."""
        tower = isinstance(dense.place, places.Tower)
        config = {**dense.checkpoint.config, "architectures": [dense.architecture]}
        if tower:
            config = {**dense.raw, "architectures": [dense.own_class]}
        return cls(folder=dense.checkpoint.folder, config=config)

    @property
    def architecture(self) -> str:
        """The transformers class, without what upcycling adds to its name."""
        named = self.config.get("architectures")
        if not named:
            raise UpcycleError(f"{self.folder}/config.json names no architecture")
        if not isinstance(named, list) or not isinstance(named[0], str):
            raise self._odd("architectures", "a list with the name of a class")
        name = targets.dense_class(named[0])
        # The text model within a multimodal one predicts the next token of a text.
        return name.replace("ForConditionalGeneration", "ForCausalLM") if self._is_wrapper else name

    @property
    def _is_wrapper(self) -> bool:
        return places.is_wrapper(self.config)

    @property
    def tower_has_experts(self) -> bool:
        """True if its vision tower, which no task reaches, has experts."""
        target = targets.opened(self.config)
        return target is not None and VISION in target.parts

    @cached_property
    def _dense_config(self) -> Mapping[str, Any]:
        """The config of the dense class within the config, or the whole config if there is none."""
        target = targets.opened(self.config)
        if target and TEXT not in target.parts:  # tasks are about its text model, which is dense
            target = None
        own = places.own_config(self.config) if self._is_wrapper else self.config
        return (target.dense_config(self.config) if target else None) or own

    @cached_property
    def _family(self) -> Family | None:
        """The dense family, or None for a class that only exists as MoE."""
        model_type = self._dense_config.get("model_type")
        return families.find(str(model_type)) if model_type in families.names() else None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The config with the defaults of its dense family in place, if it has one."""
        return self._dense_config if self._family is None else self._family.config(self._dense_config)

    @property
    def length(self) -> int:
        """The number of tokens of a row: those of an image, or the number of positions."""
        if self._family is None:
            return self._count("max_position_embeddings", self._dense_config)
        return self._family.length(dict(self.settings))

    @property
    def positions(self) -> int | None:
        """The most tokens that a row of text may have; None if the class takes any number."""
        return None if self.settings.get(self.positions_key) is None else self.length

    @property
    def positions_key(self) -> str:
        """The key of the config that limits `positions`."""
        return Family.positions_key if self._family is None else self._family.positions_key

    @property
    def reads_text(self) -> bool:
        """Return whether the model reads tokens; a class that only exists as MoE is taken to do so."""
        return self._family is None or "input_ids" in self._family.inputs(dict(self.settings), self.length)

    @property
    def lengths(self) -> dict[str, int]:
        """The number of tokens of a row in each stack of blocks."""
        family = self._family or families.find(str(self._dense_config.get("model_type")))
        return family.lengths(dict(self.settings))

    def all_of(self, length: int) -> dict[str, int]:
        """Return `length` as the number of tokens of a row in each stack of blocks."""
        stacks = () if self._family is None else self._family.stacks(dict(self.settings))
        return dict.fromkeys([stack.name for stack in stacks] or ["layers"], length)

    def tells_apart(self, length: int) -> str | None:
        """Return why the documents in a row cannot be kept apart; None if they can."""
        return None if self._family is None else self._family.tells_apart(dict(self.settings), length)

    def grid(self, stack: str) -> Grid:
        """Return the image patches that are the positions of a stack.

        Raises `UpcycleError` for a model that reads text.
        """
        grid = None if self._family is None else self._family.grid(self.settings, stack)
        if grid is None:
            raise UpcycleError(f"{self.folder} reads texts and cuts no image into patches")
        return grid

    @property
    def vocab_size(self) -> int:
        """The number of rows of the embedding."""
        return self._count("vocab_size", self.settings)

    @cached_property
    def preprocessor(self) -> Preprocessor | None:
        """What the files beside the weights say of images; None if they say nothing."""
        return Preprocessor.of(self.folder)

    @property
    def num_labels(self) -> int:
        """The number of classes of the head."""
        labels = self.config.get("id2label")
        if labels is not None and not isinstance(labels, (list, Mapping)):
            raise self._odd("id2label", "a table of names")
        return len(labels) if labels else 2

    def _count(self, key: str, config: Mapping[str, Any]) -> int:
        found = config.get(key)
        if type(found) is not int or found < 1:
            raise self._odd(key, "a whole number of 1 or more")
        return found

    def _odd(self, key: str, allowed: str) -> UpcycleError:
        return UpcycleError(
            f"{self.folder}/config.json: {key} = {self.config.get(key)!r}; it must be {allowed}"
        )

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes of the head in config.json, in order; empty if it has none."""
        labels = self.config.get("id2label")
        if not isinstance(labels, Mapping) or {*map(str, labels)} != {*map(str, range(len(labels)))}:
            return ()
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
