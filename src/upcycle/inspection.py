"""`upcycle inspect`: describe the experts of a checkpoint, layer by layer, from its weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycle import targets
from upcycle.blueprints.making import blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.dtypes import ITEMS, TORCH_NAMES
from upcycle.checkpoints.hub import open_checkpoint
from upcycle.dense import mixtures, places
from upcycle.dense.admission import admit, has_experts, refuse_packed, refuse_quantised
from upcycle.dense.leaving_out import that_find
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, listed, shown
from upcycle.families._wrappers import TEXT, config_key
from upcycle.nn import router_rows, routers
from upcycle.nn.router_rows import RouterRows
from upcycle.recipe import Recipe
from upcycle.records.provenance import Provenance
from upcycle.system.wording import layers_of, place_of
from upcycle.targets import Block, Target, natives
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy, Stored, blocks

_OTHER_SHAPE = "experts are not of the shape of the dense networks: no similarity to them"


def inspect(
    checkpoint: str | Path, source: str | Path | None = None, drop: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return width, dtype, similarity and router norms of every layer as a table that JSON can hold.

    `source` is the dense checkpoint to compare the experts with. By default it is the one named in the
    provenance, if it still exists. `drop` has names and patterns of tensors of the dense checkpoint to leave
    out, besides those that the provenance names. Cosine similarities are taken over all matrices together.
    """
    with open_checkpoint(checkpoint, allow_nonfinite=True) as opened:
        made = Provenance.read(opened.folder) if (opened.folder / Provenance.FILE).exists() else None
        notes: list[str] = []
        target = targets.opened(opened.config)
        if target is None:
            _refuse_unknown_mixture(opened)
            layers = _dense_layers(admit(opened, drop=drop))
        else:
            dense = _dense_source(source, made, opened.folder, target.parts, drop, notes)
            if drop and not dense:
                raise UpcycleError(f"--drop is for the dense model to compare with, and {notes[-1]}")
            layers = _layers_with_experts(opened, target, made, dense, notes)
        return {
            "checkpoint": str(opened.folder),
            "model_type": opened.config.get("model_type"),
            "num_layers": len(layers),
            "parameters": sum(math.prod(t.shape) for t in opened.tensors.values()),
            "layers": layers,
            "provenance": None if made is None else made.as_table(),
            "notes": notes,
        }


def _layers_with_experts(
    opened: Checkpoint,
    target: Target,
    made: Provenance | None,
    dense: Mapping[str, Dense],
    notes: list[str],
) -> list[dict[str, Any]]:
    """Return the layers of a model with experts, compared with those of the dense model if it is there."""
    try:
        tensors: dict[str, Lazy] = {n: Stored(opened, info) for n, info in opened.tensors.items()}
        _refuse_empty(opened)
        refuse_quantised(opened)
        refuse_packed(opened, (n for n, info in opened.tensors.items() if info.dtype not in ITEMS))
        parts = target.layers(opened.config, tensors, opened.folder)
        for part in parts:
            _refuse_odd_shapes(part)
        for name, each in dense.items():
            _refuse_other_depth(each, [part for part in parts if part.part == name])
        layers = [_row(part, dense.get(part.part), notes) for part in parts]
        notes += _not_finite(parts, layers)
        notes += _of_routers(parts, layers, opened.config)
        if made is not None and made.training and (first := next(iter(dense.values()), None)):
            _add_start(layers, target, opened, made, first, notes)
        return layers
    except KeyError as error:
        raise UpcycleError(f"{opened.folder} lacks {error.args[0]} in one of its layers") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        # The tensors and the config can be anything, so the readers of layouts can raise any error.
        model_type = opened.config.get("model_type")
        raise UpcycleError(f"{opened.folder} does not hold the tensors of a {model_type}: {error}") from error
    finally:
        for each in dense.values():
            each.checkpoint.close()


def _refuse_unknown_mixture(opened: Checkpoint) -> None:
    """Refuse a Mixture of Experts of a type that no target has."""
    raw = opened.config
    own = places.own_config(raw) if places.is_wrapper(raw) else raw
    if has_experts(own):
        raise UpcycleError(
            f"{opened.folder} is a Mixture of Experts of the type {shown(own.get('model_type'))}, whose "
            f"tensors inspect does not know; it reads upcycled ones and {', '.join(natives.names())}"
        )


def _refuse_empty(opened: Checkpoint) -> None:
    """Refuse tensors that have rows according to their shape but hold no elements."""
    if empty := sorted(name for name, info in opened.tensors.items() if not math.prod(info.shape)):
        raise UpcycleError(f"{opened.folder} holds {listed(empty)} without a single number")


def _refuse_odd_shapes(part: Block) -> None:
    """Refuse experts that are not networks of one shape."""
    where = place_of(part.place, part.layer)
    for group in (part.experts, part.universal):
        shapes = [{name: matrix.shape for name, matrix in x.matrices().items()} for x in group]
        for shape in shapes:
            up, down = shape["up"], shape["down"]
            if len(up) != 2 or down != up[::-1] or shape.get("gate", up) != up:
                raise UpcycleError(f"layer {where}: the matrices of an expert do not fit: {shape}")
            if shape != shapes[0]:
                raise UpcycleError(f"layer {where}: experts are of different shapes, {shapes[0]} and {shape}")
    if part.router is not None and len(part.router.shape) != 2:
        raise UpcycleError(f"layer {where}: its router has shape {list(part.router.shape)}, and is no matrix")


def _refuse_other_depth(dense: Dense, parts: list[Block]) -> None:
    """Refuse a dense model with fewer blocks, because the experts cannot come from it."""
    blocks = {(stack.name, i) for stack in dense.stacks for i in stack.numbers}
    if missing := sorted({(part.stack, part.layer) for part in parts if part.experts} - blocks):
        raise UpcycleError(
            f"{dense.checkpoint.folder} has no layer {missing[0][1]} to compare experts with; it is not the "
            f"source of this checkpoint. Name another with --source"
        )


def _add_start(
    layers: list[dict[str, Any]],
    target: Target,
    opened: Checkpoint,
    made: Provenance,
    dense: Dense,
    notes: list[str],
) -> None:
    """Add to `layers` how similar the experts of a trained model were when its training began."""
    try:
        built = blueprint(dense.checkpoint, Recipe.of(made.recipe))
    except UpcycleError as error:
        notes.append(f"what the experts began as cannot be made again: {error}")
        return
    known = {"source": made.source.sha256, **{n: d.sha256 for n, d in made.source.donors.items()}}
    if (
        built.hash != made.blueprint_hash
        or (made.training and made.training[0].from_scratch)
        or any(_differs(each, known.get(each.label, {})) for each in built.checkpoints)
    ):
        notes.append("what the experts began as cannot be made again: it was not from these files")
        return
    lazies = {name: entry.lazy for name, entry in built.entries.items()}
    begun = target.layers(opened.config, lazies, opened.folder)
    for row, part in zip(layers, begun, strict=True):
        if part.router is not None:
            row["cosine_between_at_start"] = _between(_cosines(part.experts))


def _differs(opened: Checkpoint, recorded: Mapping[str, str]) -> bool:
    """Return whether files of weights are not those whose hashes were recorded, if any were."""
    return bool(recorded) and sorted(opened.hashes().values()) != sorted(recorded.values())


def _dense_source(
    source: str | Path | None,
    made: Provenance | None,
    folder: Path,
    parts: Sequence[str],
    drop: tuple[str, ...],
    notes: list[str],
) -> dict[str, Dense]:
    """Return the dense model that the experts of each part in `folder` are compared with, if it is found."""
    if source is not None:
        found = _admitted(str(source), parts, drop, made, notes)
        notes += _not_its_source(source, found, made)
        return found
    if made is None:
        notes.append("no provenance: name the dense checkpoint with --source to compare experts with it")
        return {}
    recorded = made.source.seen_from(folder)
    if not recorded.is_dir():
        lost = f"its source {recorded} is not there"
        if made.source.path == made.source.name:  # it lay far from the folder
            lost = f"where its source {made.source.name} lies is not recorded"
        notes.append(f"{lost}; name it with --source to compare experts with it")
        return {}
    try:
        found = _admitted(str(recorded), parts, drop, made, notes)
    except UpcycleError as error:
        notes.append(f"its source cannot be compared with: {error}")
        return {}
    notes += _not_its_source(recorded, found, made)
    return found


def _not_its_source(place: str | Path, found: Mapping[str, Dense], made: Provenance | None) -> list[str]:
    """Return a note if the dense model in `place` is not among the checkpoints of the provenance."""
    first = next(iter(found.values()))
    if made is None:
        return []
    if first.family.model_type != made.source.model_type:
        return [f"compared with a {first.family.model_type}, which is not what it was made from"]
    known = (made.source.sha256, *(donor.sha256 for donor in made.source.donors.values()))
    if all(_differs(first.checkpoint, hashes) for hashes in known):
        return [f"compared with {place}, whose files are not those that it was made from"]
    return []


def _admitted(
    source: str, parts: Sequence[str], drop: tuple[str, ...], made: Provenance | None, notes: list[str]
) -> dict[str, Dense]:
    """Return the model in `source`, which may be a Mixture of Experts that has grown, for each part.

    Tensors that its recipe dropped are left out as well. Another copy of the source need not have them.
    """
    opened = open_checkpoint(source, allow_nonfinite=True)
    recorded = None if made is None or made.recipe is None else made.recipe.get("drop")
    if isinstance(recorded, (list, tuple)):
        drop = (*drop, *that_find(opened, map(str, recorded)))
    if not has_experts(opened.config):
        return {part: admit(opened, part=part, drop=drop) for part in parts}
    notes.append("its experts were copied from experts, so there is no dense network to compare with")
    return {TEXT: mixtures.admit(opened, drop=drop)}


def _row(part: Block, dense: Dense | None, notes: list[str]) -> dict[str, Any]:
    place: dict[str, Any] = {"layer": part.layer}
    if part.place != "layers":
        place["stack"] = part.place
    dtype = TORCH_NAMES[part.up.dtype]
    if part.router is None:
        return {**place, "num_experts": 0, "width": part.up.shape[0], "dtype": dtype}
    experts = part.experts
    original = None if dense is None else dense.comparable(part.layer, part.stack)
    comparable = original is not None and original.up.shape == experts[0].up.shape
    if original is not None and not comparable and _OTHER_SHAPE not in notes:
        notes.append(_OTHER_SHAPE)
    everyone = [*experts, original] if comparable and original is not None else experts
    cosine = _cosines(everyone)
    count = len(experts)
    rows = router_rows.seen(part.router.all("F32"))
    row = {
        **place,
        "num_experts": count,
        "width": experts[0].width,
        "dtype": dtype,
        "cosine": cosine[:count, :count].round(6).tolist(),
        "cosine_between": _between(cosine[:count, :count]),
        "cosine_to_dense": cosine[:count, count].round(6).tolist() if comparable else None,
        "router": rows.as_dict(),
        "router_norms": np.linalg.norm(part.router.all("F32"), axis=1).round(6).tolist(),
    }
    if part.universal:
        among = _cosines(part.universal)
        row["universal"] = {
            "num_experts": len(part.universal),
            "width": part.universal[0].width,
            "cosine": among.round(6).tolist(),
            "cosine_between": _between(among),
        }
    return row


def _not_finite(parts: Sequence[Block], layers: Sequence[dict[str, Any]]) -> list[str]:
    """Return a note for all routers, and one for all experts, that hold NaN or inf."""
    found: dict[str, list[str]] = {"routers": [], "experts": []}
    for part, row in zip(parts, layers, strict=True):
        if part.router is None:
            continue
        groups = [row, *([row["universal"]] if "universal" in row else [])]
        for what, cosines in (("routers", [row["router"]]), ("experts", groups)):
            if not all(np.isfinite(each["cosine"]).all() for each in cosines):
                found[what].append(place_of(part.place, part.layer))
    return [f"{what} hold NaN or inf ({layers_of(places)})" for what, places in found.items() if places]


def _of_routers(
    parts: Sequence[Block], layers: Sequence[dict[str, Any]], config: Mapping[str, Any]
) -> list[str]:
    """Return a note for experts that can never win, in routers whose scores are products with their rows."""
    found = {
        place_of(part.place, part.layer): RouterRows.of(row["router"])
        for part, row in zip(parts, layers, strict=True)
        if part.router is not None and routers.find(_router_of(part, config)).linear
    }
    return router_rows.warnings(found)


def _router_of(block: Block, config: Mapping[str, Any]) -> str:
    """Return the name of the router of a block. A multimodal model says it in the config of the part."""
    own = config.get(config_key(block.part))
    moe = (own if isinstance(own, Mapping) and "moe" in own else config).get("moe")
    table = moe if isinstance(moe, list) else []
    names = {entry["stack"]: entry.get("router", {}).get("name", "top_k") for entry in table}
    return str(names.get(block.stack, "top_k"))


def _between(cosine: np.ndarray) -> dict[str, float] | None:
    """Summarise the cosine similarities of pairs of different experts."""
    values = cosine[np.triu_indices(len(cosine), 1)]
    if not values.size:
        return None
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def _cosines(networks: Sequence[FeedForward]) -> np.ndarray:
    """Return the cosine similarity of all pairs over all matrices together; [n, n], float64."""
    gram = np.zeros((len(networks), len(networks)))
    for name in networks[0].matrices():
        matrices = [getattr(network, name) for network in networks]
        for index in blocks(tuple((0, n) for n in matrices[0].shape)):
            values = np.stack([m.read(index, "F32").ravel() for m in matrices])
            with np.errstate(invalid="ignore"):
                gram += values.astype(np.float64) @ values.T.astype(np.float64)
    norms = np.sqrt(np.diag(gram))
    with np.errstate(invalid="ignore"):  # inf / inf, where an expert holds inf
        return gram / np.maximum(np.outer(norms, norms), 1e-300)


def _dense_layers(dense: Dense) -> list[dict[str, Any]]:
    return [
        _row(
            Block(
                stack=stack.name,
                layer=i,
                experts=[],
                router=None,
                up=dense.feed_forward(i, stack.name).up,
            ),
            None,
            [],
        )
        for stack in dense.stacks
        for i in stack.numbers
    ]
