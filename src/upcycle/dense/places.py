"""Where a dense model stands in its checkpoint: it is all of it, or a part with other names around it.

A text model can lie within a multimodal one, under `model.language_model.`; an embedding model is stored
without the prefix of its class, and without a head. Everything behind this file sees the names of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle import families
from upcycle.errors import UpcycleError, listed, shown
from upcycle.families import Config, Family, Shapes
from upcycle.families._names import Names
from upcycle.families._wrappers import TEXT, VISION, WRAPPERS, Wrapper, config_key
from upcycle.nn.upcycled_config import CLASS_PREFIX, PREFIX
from upcycle.targets import wrapped
from upcycle.targets._renamed import Headless

if TYPE_CHECKING:
    from upcycle.targets import Target

_CALLED = {TEXT: "text model", VISION: "vision tower"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A model that is all of its checkpoint. `names` says how it is spelled there."""

    speaks: ClassVar[bool] = True  # whether the head of the checkpoint's class, if it has one, reads it
    names: Names = field(default_factory=Names)

    def config(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the model's own config within config.json."""
        return raw

    def architecture(self, family: Family, named: str) -> str:
        """Return the class that opens the checkpoint. `named` is the class that config.json names."""
        return named

    def own_class(self, family: Family, named: str) -> str:
        """Return the class of the model itself."""
        return named

    def own(self, stored: str) -> str | None:
        """Return the model's own name of a stored tensor; None if it belongs to another part."""
        return self.names.own(stored) or stored

    def known_as(self, stored: str) -> str | None:
        """Return the name of a stored tensor in a fingerprint; None if it belongs to another part."""
        return stored

    def known_by(self, config: Config, raw: Mapping[str, Any]) -> Config:
        """Return the config of a fingerprint. `config` is that of the model, and `raw` is config.json."""
        return config

    def stored(self, own: str) -> str:
        """Return the name on disk of a tensor in a checkpoint that is written anew.

        It is that of the family, but for a part of another model, which keeps its place there.
        """
        return own

    def outer(self, family: Family, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return config.json of a checkpoint with the model and what stays around it."""
        return raw

    def shapes(self, family: Family, config: Config) -> Shapes:
        """Return the shapes of the model's tensors by the names of its family."""
        return family.shapes(config)

    def around(self, target: Target) -> Target:
        """Return what the checkpoint becomes if the model becomes `target`."""
        return target

    def set_aside(self, stored: str) -> str | None:
        """Return why a tensor of another part is not in the result, or None if it is."""
        return None


WHOLE = Place()


@dataclass(frozen=True, kw_only=True)
class Body(Place):
    """The body of an encoder, as its class `named` stores it, while config.json names one with a head."""

    named: str

    def config(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**raw, "architectures": [self.named]}

    def outer(self, family: Family, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.config(raw)


@dataclass(frozen=True, kw_only=True)
class WithoutHead(Place):
    """A model without a language head, as embedding models are."""

    def architecture(self, family: Family, named: str) -> str:
        return family.base_class

    def own_class(self, family: Family, named: str) -> str:
        return family.base_class

    def shapes(self, family: Family, config: Config) -> Shapes:
        head = family.tied[0].rpartition(".")[0] + "." if family.tied else " "
        return {name: shape for name, shape in family.shapes(config).items() if not name.startswith(head)}

    def around(self, target: Target) -> Target:
        return Headless.of(target)


@dataclass(frozen=True, kw_only=True)
class Part(Place):
    """A part of a multimodal model."""

    called: ClassVar[str]  # the word for it in a sentence
    model_type: str
    wrapper: Wrapper

    def architecture(self, family: Family, named: str) -> str:
        return self.wrapper.architecture

    def own(self, stored: str) -> str | None:
        return self.names.own(stored)

    def known_as(self, stored: str) -> str | None:
        return self.own(stored)

    def stored(self, own: str) -> str:
        return self.names.stored(own)


@dataclass(frozen=True, kw_only=True)
class Tower(Part):
    """A vision tower within a multimodal model."""

    called: ClassVar[str] = _CALLED[VISION]
    speaks: ClassVar[bool] = False
    text: wrapped.Wrapped | None  # the text model, if it has experts already

    def config(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: value for key, value in own_config(raw, VISION).items() if key != "architectures"}

    def own_class(self, family: Family, named: str) -> str:
        return family.architectures[0]

    def around(self, target: Target) -> Target:
        seeing = wrapped.Seeing.of(target, self.names, self.model_type, self.wrapper)
        return replace(seeing, beside=self.text)


@dataclass(frozen=True, kw_only=True)
class Within(Part):
    """A text model within a multimodal one."""

    called: ClassVar[str] = _CALLED[TEXT]
    tied: bool

    def config(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**own_config(raw), "tie_word_embeddings": self.tied}

    def own_class(self, family: Family, named: str) -> str:
        return family.base_class

    def around(self, target: Target) -> Target:
        return wrapped.Wrapped.of(target, self.names, self.model_type, self.wrapper)


@dataclass(frozen=True, kw_only=True)
class Alone(Within):
    """A text model that is taken out of a multimodal one."""

    def config(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        own = super().config(raw)
        known = families.find(str(own["model_type"]))
        family = families.find(known.alone) if known.alone else known
        return {**own, "model_type": family.model_type, "architectures": [family.architectures[0]]}

    def known_by(self, config: Config, raw: Mapping[str, Any]) -> Config:
        within = super().config(raw)
        return families.find(str(within["model_type"])).config(within)

    def own_class(self, family: Family, named: str) -> str:
        return family.architectures[0]

    def stored(self, own: str) -> str:
        return own

    def outer(self, family: Family, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return family.tidied(self.config(raw))

    def around(self, target: Target) -> Target:
        return target

    def set_aside(self, stored: str) -> str | None:
        return "moe.part_only takes the text model alone"


def is_wrapper(raw: Mapping[str, Any]) -> bool:
    """Return whether config.json is that of a multimodal model around a text model."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        return False  # whoever reads it as a dense model says what it lacks
    return model_type in WRAPPERS or (
        isinstance(raw.get(config_key(TEXT)), Mapping) and model_type not in families.names()
    )


def wrapper_of(raw: Mapping[str, Any]) -> Wrapper | None:
    """Return what is known about the multimodal model of config.json, or None if upcycle does not know it.

    An upcycled one has the class and the text model that upcycling gave it, and all else as it was.
    """
    model_type = str(raw.get("model_type"))
    known = WRAPPERS.get(model_type.removeprefix(PREFIX))
    if known is None or not model_type.startswith(PREFIX):
        return known
    return replace(known, architecture=CLASS_PREFIX + known.architecture, text=PREFIX + known.text)


def own_config(raw: Mapping[str, Any], part: str = TEXT) -> Config:
    """Return the config of a part within that of a wrapper, with the type that it assumes."""
    key = config_key(part)
    inner = raw.get(key)
    if not isinstance(inner, Mapping):
        raise UpcycleError(f"config.json: {key} = {shown(inner)}; it must be the config of a {_CALLED[part]}")
    known = wrapper_of(raw)
    usual = {TEXT: known.text, VISION: known.vision}[part] if known else ""
    own = {**({"model_type": usual} if usual else {}), **inner}
    model_type = own.get("model_type")
    found = families.find(str(model_type)) if model_type in families.names() else None
    return {**(found.assumed if found else {}), **own}


def head_is_tied(raw: Mapping[str, Any], head_is_stored: bool) -> bool:
    """Return whether a wrapper's head is tied.

    The outer key decides, as in transformers, but for a few classes that also heed the inner one. Raises
    `UpcycleError` if the inner one says something else and the files do not settle it.
    """
    inner, outer = own_config(raw).get("tie_word_embeddings"), raw.get("tie_word_embeddings")
    known = wrapper_of(raw)
    if head_is_stored and None not in (inner, outer) and bool(inner) != bool(outer):
        raise UpcycleError(
            f"config.json: tie_word_embeddings = {shown(outer)} and text_config.tie_word_embeddings = "
            f"{shown(inner)}, and a head is stored; set both to the same"
        )
    if inner and not head_is_stored and known and _heeds_text(known, outer):
        return True
    if outer is not None:
        return bool(outer)
    if inner is not None and head_is_stored:
        return bool(inner)
    return known.tied and not head_is_stored if known else not head_is_stored


def _heeds_text(wrapper: Wrapper, outer: object) -> bool:
    """Return whether the text model's key ties the head beside the wrapper's own, `outer`."""
    always = wrapper.tied_by_text == "always"
    return always or (outer is None and wrapper.tied_by_text == "if outer is absent")


def refuse_two(where: object, found: list[Names], part: str = TEXT) -> None:
    """Refuse a checkpoint that holds the tensors of a part twice."""
    if len(found) > 1:
        starts = listed([names.body or "no prefix" for names in found])
        raise UpcycleError(
            f"{where} holds the tensors of a {_CALLED[part]} more than once, below {starts}; give a "
            f"checkpoint with one of them"
        )
