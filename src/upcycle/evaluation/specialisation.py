"""The specialisation of a trained model's experts: which tokens go to which expert, domain by domain.

It takes a Mixture of Experts and named sets of rows, and gives sums over the real tokens for each MoE layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from upcycle.checkpoints.checkpoint import Checkpoint, read_json
from upcycle.data.corpus import read_tokenizer
from upcycle.data.documents import Source
from upcycle.dense import fingerprint
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError, refuse_fraction
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.no_numbers import refuse_nan
from upcycle.evaluation.patches import FAVOURITES, Patches
from upcycle.hf import models
from upcycle.hf.quiet import quiet
from upcycle.records.routing import RoutingDomain, RoutingLayer, RoutingRecord
from upcycle.system import claim, scratch, whole_file
from upcycle.system.paths import as_paths
from upcycle.system.progress import work
from upcycle.tasks._rows import Rows, of_images, of_text
from upcycle.tasks._tokens import refuse_idle
from upcycle.tensors import rng
from upcycle.training.routing import RouterOutput, Routers

OFTEN = 5  # a token must have occurred this often to be named


@dataclass(frozen=True, kw_only=True)
class ToWatch:
    """The rows to look at: texts or images by the name of their domain.

    `limit` is the largest number of rows of each domain; 0 means all.
    """

    text: Mapping[str, Path] | None = None
    images: Mapping[str, Path] | None = None
    limit: int = 256
    length: int | None = None
    field: str = Source.field  # the text field of JSON lines, parquet and datasets
    batch_size: int = 16
    seed: int = 0
    cache: Path | None = None

    def __post_init__(self) -> None:
        as_paths(self, "text", "images", "cache")
        for name in ("limit", "length", "batch_size", "seed"):
            refuse_fraction(f"--{name.replace('_', '-')}", getattr(self, name))
        if bool(self.text) == bool(self.images):
            raise UpcycleError("give either --text [NAME=]FILE or --images [NAME=]SET, once for each domain")
        if self.limit < 0:
            raise UpcycleError(f"--limit {self.limit}; it must be 0 (all) or more")
        if self.images and (self.length is not None or self.field != Source.field):
            raise UpcycleError("--length and --field are of texts, and images are given; leave them out")
        for name in ("length", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UpcycleError(f"--{name.replace('_', '-')} {value}; it must be 1 or more")


@dataclass(kw_only=True)
class Domain:
    """The decisions of one layer's router on the rows of one domain, for E experts."""

    counts: np.ndarray  # [E], how often each expert was chosen
    weights: np.ndarray  # [E], router probabilities summed over tokens
    tokens: int = 0
    left_behind: int = 0
    confidence: float = 0.0  # sum over tokens of the largest probability
    entropy: float = 0.0  # nats, summed over tokens


@dataclass(kw_only=True)
class Kinds:
    """The router probabilities of each kind of token: an id of the vocabulary, or a place in an image."""

    weights: dict[int, np.ndarray]  # [E], summed probabilities
    counts: dict[int, int]

    def add(self, kinds: np.ndarray, probabilities: np.ndarray) -> None:
        """Add tokens of `kinds` [T] with their probabilities [T, E]."""
        known, places = np.unique(kinds, return_inverse=True)
        sums = np.zeros((len(known), probabilities.shape[1]))
        np.add.at(sums, places, probabilities)
        for kind, row, count in zip(known.tolist(), sums, np.bincount(places).tolist(), strict=True):
            self.weights[kind] = self.weights.get(kind, 0.0) + row
            self.counts[kind] = self.counts.get(kind, 0) + count

    def favourites(self) -> list[list[tuple[int, float]]]:
        """Return the kinds with the largest mean probability for each expert, if they occurred often."""
        often = [kind for kind, count in self.counts.items() if count >= OFTEN] or [*self.counts]
        means = np.stack([self.weights[kind] / self.counts[kind] for kind in often])
        best = np.argsort(-means, axis=0, kind="stable")[:FAVOURITES]
        return [[(often[i], float(means[i, e])) for i in best[:, e]] for e in range(means.shape[1])]


@dataclass(kw_only=True)
class Layer:
    """One MoE layer: what its router did with each domain and with each kind of token."""

    stack: str
    layer: int
    balanced: bool  # True if every expert gets equally many tokens by construction
    domains: dict[str, Domain]
    kinds: Kinds
    patches: Patches | None  # None for text


@dataclass(frozen=True, kw_only=True)
class Specialisation:
    """The observations of a model: every MoE layer, in order."""

    folder: Path
    weights: str  # a hash that identifies those of the model
    about: list[RoutingDomain]
    kind: Literal["text", "images"]
    names: Mapping[int, str]  # the texts of the favourite tokens
    layers: list[Layer]

    @property
    def record(self) -> RoutingRecord:
        """Return the record for routing.json."""
        layers = tuple(_told(layer, self.names) for layer in self.layers)
        return RoutingRecord(kind=self.kind, weights=self.weights, domains=tuple(self.about), layers=layers)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of routing.json."""
        return self.record.as_table()

    def save(self) -> Path:
        """Write routing.json into the folder of the model."""
        path = self.folder / RoutingRecord.FILE
        try:
            claim.may_replace(path, _is_routing, "what `upcycle inspect` writes")
            whole_file.write_json(path, self.as_dict())
        except UpcycleError as error:
            raise UpcycleError(f"{error}; what was seen is above") from None
        except OSError as error:
            raise UpcycleError(
                f"{path} cannot be written ({error.strerror or error}); what was seen is above"
            ) from None
        return path


def _is_routing(path: Path) -> bool:
    try:
        found = read_json(path, "")
    except (UpcycleError, OSError):
        return False
    return found.get("format") == RoutingRecord.FORMAT and isinstance(found.get("layers"), list)


def specialisation(
    folder: str | Path,
    asked: ToWatch,
) -> Specialisation:
    """Watch the routers of the model in `folder` on the given rows.

    The result holds, for every layer, the load, confidence and favourites of the experts and the divergence
    between domains. This is the Jensen-Shannon divergence in bits: 0 if two domains use the experts alike, 1
    if they share none. It compares the loads or, if a router gives every expert equally many tokens, the mean
    probabilities. Raises `UpcycleError` for a dense model and for rows it cannot read, and `NoNumbersError`
    if a router gives NaN.
    """
    folder = Path(folder)
    subject = Subject.of(folder)
    if subject.tower_has_experts:
        raise UpcycleError(
            f"{folder} has experts in its vision tower, and what is watched are the routers of a model that "
            f"reads texts or images alone; leave the sets out"
        )
    refuse_idle((asked.text or {}).values(), field=asked.field)
    with scratch.folder() as made_here:
        cache = asked.cache or made_here
        sets = {
            name: _rows(path, subject, asked, cache)
            for name, path in (asked.text or asked.images or {}).items()
        }
        with quiet():
            model = models.open(folder).eval()
        routers = Routers.of(model)
        if routers is None:
            raise UpcycleError(f"{folder} is a dense model: it has no router to watch; leave the sets out")
        if torch.accelerator.is_available():
            model = model.to(torch.accelerator.current_accelerator())
        chosen = {name: _chosen(rows.count, asked) for name, rows in sets.items()}
        layers: list[Layer] = []
        total = sum(map(len, chosen.values()))
        with work("watching", "examples", total=total) as watching:
            for name, rows in sets.items():
                watch = partial(_watch, model, routers, layers, name, rows, subject)
                BatchSize(asked.batch_size).over(chosen[name].tolist(), watch, advance=watching.advance)
        names = _names(subject, layers) if asked.text else {}
    with Checkpoint.open(folder, allow_nonfinite=True) as opened:
        weights = fingerprint.of_weights(opened)
    return Specialisation(
        folder=folder,
        weights=weights,
        about=[_about(name, rows, len(chosen[name])) for name, rows in sets.items()],
        kind="text" if asked.text else "images",
        names=names,
        layers=layers,
    )


def _about(name: str, rows: Rows, count: int) -> RoutingDomain:
    """Describe a domain."""
    about = dict(rows.about)
    return RoutingDomain(name=name, file=about.pop("name"), rows=count, unknown=about)


def _names(subject: Subject, layers: list[Layer]) -> dict[int, str]:
    """Return the text of each token of the vocabulary that occurred."""
    tokenizer = read_tokenizer(subject.folder)
    came = sorted({kind for layer in layers for kind in layer.kinds.counts})
    return dict(zip(came, tokenizer.convert_ids_to_tokens(came), strict=True))


def _rows(path: Path, subject: Subject, asked: ToWatch, cache: Path) -> Rows:
    if asked.images:
        return of_images(path, subject, cache, gradient=False, seed=asked.seed)
    return of_text(
        path, subject, cache, gradient=False, seed=asked.seed, length=asked.length, field=asked.field
    )  # fmt: skip


def _chosen(count: int, asked: ToWatch) -> np.ndarray:
    """Choose the numbers of the rows to look at, in a random order of the seed."""
    order = rng.permutation(rng.key(asked.seed, "specialisation"), count)
    return order[: min(count, asked.limit or count)]


@torch.inference_mode()
def _watch(
    model: PreTrainedModel,
    routers: Routers,
    layers: list[Layer],
    name: str,
    rows: Rows,
    subject: Subject,
    places: Sequence[int],
) -> list[None]:
    """Run the model on the rows numbered `places`, and add the decisions of its routers to the layers."""
    read = rows.read(np.array(places))
    batch = {n: torch.from_numpy(np.ascontiguousarray(a)).to(model.device) for n, a in read.items()}
    inputs = rows.ask(batch).inputs
    with routers.recording(inputs.get("attention_mask")):
        model.base_model(**inputs)
    if not layers:
        layers += [
            Layer(
                stack=stack,
                layer=layer,
                balanced=output.balanced,
                domains={},
                kinds=Kinds(weights={}, counts={}),
                patches=Patches.none() if "pixel_values" in inputs else None,
            )
            for stack, layer, output in zip(routers.stacks, routers.layers, routers.outputs, strict=True)
        ]  # fmt: skip
    for layer, output in zip(layers, routers.outputs, strict=True):
        refuse_nan(output.of_tokens(output.probabilities), subject, "the load of an expert")
        _add(layer, name, output, _kinds(inputs, layer.stack, output, len(places)))
        if layer.patches is not None:
            given = output.of_tokens(output.probabilities).cpu().numpy()
            given = given.reshape(len(places), -1, given.shape[-1])
            grid = subject.grid(layer.stack)
            layer.patches.add(inputs["pixel_values"].cpu().numpy(), given, grid)
    return [None] * len(places)


def _kinds(inputs: Mapping[str, Any], stack: str, output: RouterOutput, rows: int) -> np.ndarray:
    """Return the kind of each real token of a stack, [T'].

    It is the id in the vocabulary, or the place in an image.
    """
    if "pixel_values" in inputs:
        return np.tile(np.arange(len(output.of_tokens(output.logits)) // rows), rows)
    ids, mask = (
        ("decoder_input_ids", "decoder_attention_mask")
        if stack == "decoder"
        else ("input_ids", "attention_mask")
    )
    tokens = inputs[ids].flatten()
    if output.real is not None:
        tokens = tokens[output.real[: len(tokens)]]  # behind them is what fills up the last group
    elif (real := inputs.get(mask)) is not None and len(output.logits) < len(tokens):
        tokens = tokens[real.flatten().bool()]
    out: np.ndarray = tokens.cpu().numpy()
    return out


def _add(layer: Layer, name: str, output: RouterOutput, kinds: np.ndarray) -> None:
    given = output.of_tokens(output.probabilities).cpu().double()
    experts = given.shape[-1]
    domain = layer.domains.setdefault(
        name, Domain(counts=np.zeros(experts, np.int64), weights=np.zeros(experts))
    )
    domain.counts += output.counts.cpu().numpy()
    domain.weights += given.sum(0).numpy()
    domain.tokens += len(given)
    domain.left_behind += int(output.left_behind)
    domain.confidence += float(given.amax(-1).sum())
    domain.entropy += float(torch.special.entr(given).sum())
    layer.kinds.add(kinds, given.numpy())


def _told(layer: Layer, names: Mapping[int, str]) -> RoutingLayer:
    """Return the record of one layer for routing.json."""
    domains = layer.domains
    used = {n: _share(d.weights if layer.balanced else d.counts) for n, d in domains.items()}
    tokens = sum(d.tokens for d in domains.values())
    experts = len(next(iter(domains.values())).counts)
    return RoutingLayer(
        stack=layer.stack,
        layer=layer.layer,
        load=_rounded(_share(np.sum([d.counts for d in domains.values()], 0))),
        load_by_domain={n: _rounded(_share(d.counts)) for n, d in domains.items()},
        weight_by_domain={n: _rounded(d.weights / d.tokens) for n, d in domains.items()},
        confidence=round(sum(d.confidence for d in domains.values()) / tokens, 6),
        entropy=round(sum(d.entropy for d in domains.values()) / tokens / math.log(max(2, experts)), 6),
        left_behind=round(sum(d.left_behind for d in domains.values()) / tokens, 6),
        tokens=tokens,
        divergence_of="weights" if layer.balanced else "loads",
        divergence=tuple(tuple(round(divergence(a, b), 6) for b in used.values()) for a in used.values()),
        favourites=tuple(
            tuple((names.get(kind, kind), round(mean, 6)) for kind, mean in favourites)
            for favourites in layer.kinds.favourites()
        ),
    )


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Return the Jensen-Shannon divergence of two distributions [E] in bits, between 0 and 1."""
    middle = (p + q) / 2

    def relative(a: np.ndarray) -> float:
        there = a > 0
        return float((a[there] * np.log2(a[there] / middle[there])).sum())

    return max(0.0, (relative(p) + relative(q)) / 2)


def _share(values: np.ndarray) -> np.ndarray:
    """Return the values divided by their sum."""
    out: np.ndarray = values / max(values.sum(), 1e-300)
    return out


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.round(6).tolist())
