"""`successor.rest`: a checkpoint of the successor's size, which gives everything except the experts.

Its class may be another one of the family than the predecessor's, with another head or without one. Experts
of the predecessor must mean the same in it: they read channels of its size by the same activation. The files
beside the weights are the predecessor's, so both must read tokens and pixels alike.
"""

from __future__ import annotations

from upcycle.checkpoints import preprocessors, vocabularies
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.admission import admit
from upcycle.dense.places import Part
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, listed, shown
from upcycle.families import Config, Shapes

_HEADS = ("classifier", "lm_head")  # parts of the names of tensors that may have another shape


def admit_rest(checkpoint: Checkpoint, predecessor: Dense, sized: Config) -> Dense:
    """Return the dense model in `checkpoint`. `sized` is the predecessor's config in the successor's size.

    Raises `UpcycleError`, with the reason, if experts of the predecessor do not fit it.
    """
    rest = admit(checkpoint)
    if isinstance(rest.place, Part):
        raise UpcycleError(
            f"successor.rest: {checkpoint.folder} is a multimodal model, and [successor] is about a model "
            f"that stands alone; take the text model out of it first (convert with --part-only text)"
        )
    _refuse_another_size(rest, predecessor, sized)
    _refuse_another_activation(rest, predecessor)
    _refuse_other_readings(rest, predecessor)
    return rest


def _refuse_another_size(rest: Dense, predecessor: Dense, sized: Config) -> None:
    family, folder = predecessor.family, rest.checkpoint.folder
    if rest.family is not family:
        raise UpcycleError(
            f"successor.rest: {folder} is a {rest.family.model_type}, and the source a {family.model_type}; "
            f"give one of the same model_type"
        )
    wanted = _body(rest, {**sized, "architectures": [rest.own_class]})
    found = _body(rest, rest.config)
    if different := sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n)):
        raise UpcycleError(
            f"successor.rest: {folder} is not a {family.model_type} of the successor's size "
            f"({listed(different)} differ)"
        )


def _body(rest: Dense, config: Config) -> Shapes:
    """Return the shapes that the class of `rest` has with `config`, without those of a head."""
    family = rest.family
    return {
        name: shape
        for name, shape in rest.place.shapes(family, config).items()
        if name not in family.may_lack(config) and not any(part in name for part in _HEADS)
    }


def _refuse_another_activation(rest: Dense, predecessor: Dense) -> None:
    for mine, theirs in zip(predecessor.stacks, rest.stacks, strict=True):
        if mine.activation != theirs.activation:
            raise UpcycleError(
                f"successor.rest: networks of {rest.checkpoint.folder} have the activation "
                f"{shown(theirs.activation)}, and those of {predecessor.checkpoint.folder}, which experts "
                f"are made of, {shown(mine.activation)}; a layer has one, so give a rest with the same"
            )


def _refuse_other_readings(rest: Dense, predecessor: Dense) -> None:
    """Refuse other tokens or pixels; where only headers were read, whoever reads weights compares them."""
    if rest.checkpoint.headers_only or predecessor.checkpoint.headers_only:
        return
    here, there = predecessor.checkpoint.folder, rest.checkpoint.folder
    for compare in (vocabularies.difference, preprocessors.difference):
        if other := compare(here, there):
            raise UpcycleError(
                f"successor.rest: {there} and {here} {other}; the embeddings of the result are those of "
                f"{there}, and its tokenizer and preprocessor are those of {here}, so both must have the same"
            )
