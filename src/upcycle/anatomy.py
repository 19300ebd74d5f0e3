"""`upcycle inspect`: the experts of a checkpoint, layer by layer, read from its weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from upcycle import natives, provenance
from upcycle.checkpoint import Checkpoint
from upcycle.dtypes import TORCH_NAMES
from upcycle.errors import UpcycleError
from upcycle.feed_forward import FeedForward
from upcycle.hub import open_checkpoint
from upcycle.lazy import Lazy, Stored, blocks
from upcycle.source import Dense, admit


def inspect(checkpoint: str | Path, source: str | Path | None = None) -> dict[str, Any]:
    """Width, dtype, similarity and router norms of every layer, as a table that JSON can hold.

    `source` is the dense checkpoint to compare experts with; without it, the one that the provenance
    names, if it is still there. Cosine similarities are over gate, up and down together.
    """
    with open_checkpoint(checkpoint, allow_nonfinite=True) as opened:
        made = provenance.read(opened.folder) if (opened.folder / provenance.FILE).exists() else None
        model_type = opened.config.get("model_type")
        notes: list[str] = []
        if model_type in natives.names():
            dense = _dense_source(source, made, notes)
            try:
                layers = _moe_layers(opened, natives.find(str(model_type)), dense, notes)
            except KeyError as error:
                raise UpcycleError(f"{opened.folder} lacks {error.args[0]} in one of its layers") from None
            finally:
                if dense is not None:
                    dense.checkpoint.close()
        else:
            layers = _dense_layers(admit(opened))
        return {
            "checkpoint": str(opened.folder),
            "model_type": model_type,
            "num_layers": len(layers),
            "parameters": sum(int(np.prod(t.shape)) for t in opened.tensors.values()),
            "layers": layers,
            "provenance": made,
            "notes": notes,
        }


def _dense_source(source: str | Path | None, made: dict[str, Any] | None, notes: list[str]) -> Dense | None:
    """The dense model that experts are compared with, if it can be found."""
    if source is None and made is None:
        notes.append("no provenance: name the dense checkpoint with --source to compare experts with it")
        return None
    if source is None and made is not None:
        source = Path(made["source"]["path"])
        if not source.is_dir():
            notes.append(
                f"its source {source} is not there; name it with --source to compare experts with it"
            )
            return None
    return admit(open_checkpoint(str(source), allow_nonfinite=True))


def _moe_layers(
    opened: Checkpoint, native: natives.Native, dense: Dense | None, notes: list[str]
) -> list[dict[str, Any]]:
    by_layer: dict[int, dict[str, Lazy]] = {}
    for name, info in opened.tensors.items():
        if name.startswith("model.layers."):
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            by_layer.setdefault(int(layer), {})[rest] = Stored(opened, info)
    if not by_layer:
        raise UpcycleError(f"{opened.folder} has no tensors of layers (model.layers.N. ...)")
    rows = []
    for number, tensors in sorted(by_layer.items()):
        experts = native.layout.read(tensors)
        if not experts:
            rows.append(_dense_row(number, tensors["mlp.gate_proj.weight"]))
            continue
        router = tensors[native.router].all("F32")
        original = None if dense is None else dense.feed_forward(number)
        comparable = original is not None and original.gate.shape == experts[0].gate.shape
        if original is not None and not comparable and not notes:
            notes.append("experts are not of the shape of the dense networks: no similarity to them")
        everyone = [*experts, original] if comparable and original is not None else experts
        cosine = _cosines(everyone)
        count = len(experts)
        pairs = cosine[:count, :count][np.triu_indices(count, 1)]
        rows.append(
            {
                "layer": number,
                "num_experts": count,
                "width": experts[0].width,
                "dtype": TORCH_NAMES[experts[0].gate.dtype],
                "cosine": cosine[:count, :count].round(6).tolist(),
                "cosine_between": _summary(pairs),
                "cosine_to_dense": cosine[:count, count].round(6).tolist() if comparable else None,
                "router_norms": np.linalg.norm(router, axis=1).round(6).tolist(),
            }
        )
    return rows


def _summary(values: np.ndarray) -> dict[str, float] | None:
    if not values.size:
        return None
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def _cosines(networks: list[FeedForward]) -> np.ndarray:
    """Cosine similarity of all pairs over gate, up and down together; [n, n], float64."""
    gram = np.zeros((len(networks), len(networks)))
    for name in FeedForward.NEURON_AXES:
        matrices = [getattr(network, name) for network in networks]
        for index in blocks(tuple((0, n) for n in matrices[0].shape)):
            values = np.stack([m.read(index, "F32").ravel() for m in matrices])
            gram += values.astype(np.float64) @ values.T.astype(np.float64)
    norms = np.sqrt(np.diag(gram))
    return gram / np.maximum(np.outer(norms, norms), 1e-300)


def _dense_layers(dense: Dense) -> list[dict[str, Any]]:
    layers = range(dense.config["num_hidden_layers"])
    return [_dense_row(layer, dense.feed_forward(layer).gate) for layer in layers]


def _dense_row(layer: int, gate: Lazy) -> dict[str, Any]:
    return {"layer": layer, "num_experts": 0, "width": gate.shape[0], "dtype": TORCH_NAMES[gate.dtype]}
