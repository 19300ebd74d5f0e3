"""What the experts of a trained model are for: who goes where on given texts or images, domain by domain.

Takes a Mixture of Experts and named sets of rows; gives, for each of its layers, sums over the real tokens.
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

from upcycle.checkpoints.checkpoint import read_json
from upcycle.data.corpus import read_tokenizer
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.patches import FAVOURITES, Patches
from upcycle.hf import models
from upcycle.hf.quiet import quiet
from upcycle.records.routing import RoutingDomain, RoutingLayer, RoutingRecord
from upcycle.system import claim, scratch, whole_file
from upcycle.system.paths import as_paths
from upcycle.system.progress import work
from upcycle.tasks._rows import Rows, of_images, of_text
from upcycle.tensors import rng
from upcycle.training.routing import Routers, Said

OFTEN = 5  # times that a token must have come to be named


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which rows to look at: sets by the name of their domain, texts or images. `limit` is the number of rows
    of each at most; 0: all."""

    text: Mapping[str, Path] | None = None
    images: Mapping[str, Path] | None = None
    limit: int = 256
    length: int | None = None
    batch_size: int = 16
    seed: int = 0
    cache: Path | None = None

    def __post_init__(self) -> None:
        as_paths(self, "text", "images", "cache")
        if bool(self.text) == bool(self.images):
            raise UpcycleError("give either --text [NAME=]FILE or --images [NAME=]SET, once for each domain")
        if self.limit < 0:
            raise UpcycleError(f"--limit {self.limit}; it must be 0 (all) or more")
        for name in ("length", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UpcycleError(f"--{name.replace('_', '-')} {value}; it must be 1 or more")


@dataclass(kw_only=True)
class Domain:
    """What one layer's router did with the rows of one domain; E experts."""

    counts: np.ndarray  # [E], how often each was chosen
    weights: np.ndarray  # [E], probabilities summed over tokens
    tokens: int = 0
    left_behind: int = 0
    confidence: float = 0.0  # the largest probability of each token, summed
    entropy: float = 0.0  # nats, summed


@dataclass(kw_only=True)
class Kinds:
    """For each kind of token (a number of the vocabulary, a place in an image) what a router gave it."""

    weights: dict[int, np.ndarray]  # probabilities summed, [E]
    counts: dict[int, int]

    def add(self, kinds: np.ndarray, probabilities: np.ndarray) -> None:
        """Tokens of `kinds` [T] with their probabilities [T, E]."""
        known, places = np.unique(kinds, return_inverse=True)
        sums = np.zeros((len(known), probabilities.shape[1]))
        np.add.at(sums, places, probabilities)
        for kind, row, count in zip(known.tolist(), sums, np.bincount(places).tolist(), strict=True):
            self.weights[kind] = self.weights.get(kind, 0.0) + row
            self.counts[kind] = self.counts.get(kind, 0) + count

    def favourites(self) -> list[list[tuple[int, float]]]:
        """The kinds with the largest mean probability of each expert, among those that came often enough."""
        often = [kind for kind, count in self.counts.items() if count >= OFTEN] or [*self.counts]
        means = np.stack([self.weights[kind] / self.counts[kind] for kind in often])
        best = np.argsort(-means, axis=0, kind="stable")[:FAVOURITES]
        return [[(often[i], float(means[i, e])) for i in best[:, e]] for e in range(means.shape[1])]


@dataclass(kw_only=True)
class Layer:
    """One MoE layer: what its router did with each domain, and with each kind of token of all of them."""

    stack: str
    layer: int
    balanced: bool  # every expert gets as much by construction
    domains: dict[str, Domain]
    kinds: Kinds
    patches: Patches | None  # of images


@dataclass(frozen=True, kw_only=True)
class Specialisation:
    """What was seen of a model: every MoE layer, in order."""

    folder: Path
    about: list[RoutingDomain]
    kind: Literal["text", "images"]
    names: Mapping[int, str]  # of the favourite tokens of a text
    layers: list[Layer]

    @property
    def record(self) -> RoutingRecord:
        """What routing.json says of it."""
        layers = tuple(_told(layer, self.names) for layer in self.layers)
        return RoutingRecord(kind=self.kind, domains=tuple(self.about), layers=layers)

    def as_dict(self) -> dict[str, Any]:
        """As routing.json has it."""
        return self.record.as_table()

    def save(self) -> Path:
        """Write routing.json into the model's folder."""
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
    asked: Asked,
) -> Specialisation:
    """Watch the routers of the model in `folder` on the rows asked for: load, confidence, favourites and
    divergence between domains of every layer.

    The divergence is Jensen and Shannon's, in bits: 0 where two domains use the experts of a layer alike, 1
    where they share none. It is that of the loads or, where a router gives every expert as much, of the mean
    probabilities. Raises `UpcycleError` for a dense model and for rows it cannot read.
    """
    folder = Path(folder)
    subject = Subject.of(folder)
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
    return Specialisation(
        folder=folder,
        about=[_about(name, rows, len(chosen[name])) for name, rows in sets.items()],
        kind="text" if asked.text else "images",
        names=names,
        layers=layers,
    )


def _about(name: str, rows: Rows, count: int) -> RoutingDomain:
    """What a domain is."""
    about = dict(rows.about)
    return RoutingDomain(name=name, file=about.pop("name"), rows=count, unknown=about)


def _names(subject: Subject, layers: list[Layer]) -> dict[int, str]:
    """The tokens of the vocabulary that came."""
    tokenizer = read_tokenizer(subject.folder)
    came = sorted({kind for layer in layers for kind in layer.kinds.counts})
    return dict(zip(came, tokenizer.convert_ids_to_tokens(came), strict=True))


def _rows(path: Path, subject: Subject, asked: Asked, cache: Path) -> Rows:
    if asked.images:
        return of_images(path, subject, cache, gradient=False, seed=asked.seed)
    return of_text(
        path, subject, cache, gradient=False, seed=asked.seed, length=asked.length
    )  # fmt: skip


def _chosen(count: int, asked: Asked) -> np.ndarray:
    """The numbers of rows that are looked at, in an order that the seed decides."""
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
    """Show the model the rows numbered `places`, and add what its routers say to the layers."""
    read = rows.read(np.array(places))
    batch = {n: torch.from_numpy(np.ascontiguousarray(a)).to(model.device) for n, a in read.items()}
    inputs = rows.ask(batch).inputs
    with routers.recording():
        model.base_model(**inputs)
    if not layers:
        layers += [
            Layer(
                stack=stack,
                layer=layer,
                balanced=said.balanced,
                domains={},
                kinds=Kinds(weights={}, counts={}),
                patches=Patches.none() if "pixel_values" in inputs else None,
            )
            for stack, layer, said in zip(routers.stacks, routers.layers, routers.said, strict=True)
        ]  # fmt: skip
    for layer, said in zip(layers, routers.said, strict=True):
        _add(layer, name, said, _kinds(inputs, layer.stack, said, len(places)))
        if layer.patches is not None:
            given = said.probabilities.cpu().numpy().reshape(len(places), -1, said.probabilities.shape[-1])
            grid = subject.grid(layer.stack)
            layer.patches.add(inputs["pixel_values"].cpu().numpy(), given, grid)
    return [None] * len(places)


def _kinds(inputs: Mapping[str, Any], stack: str, said: Said, rows: int) -> np.ndarray:
    """What each real token of a stack is, [T']: its number in the vocabulary, or its place in an image."""
    if "pixel_values" in inputs:
        return np.tile(np.arange(len(said.logits) // rows), rows)
    ids, mask = (
        ("decoder_input_ids", "decoder_attention_mask")
        if stack == "decoder"
        else ("input_ids", "attention_mask")
    )
    tokens = inputs[ids].flatten()
    if (real := inputs.get(mask)) is not None and len(said.logits) < len(tokens):
        tokens = tokens[real.flatten().bool()]
    out: np.ndarray = tokens.cpu().numpy()
    return out


def _add(layer: Layer, name: str, said: Said, kinds: np.ndarray) -> None:
    given = said.probabilities.cpu().double()
    experts = given.shape[-1]
    domain = layer.domains.setdefault(
        name, Domain(counts=np.zeros(experts, np.int64), weights=np.zeros(experts))
    )
    domain.counts += said.counts.cpu().numpy()
    domain.weights += given.sum(0).numpy()
    domain.tokens += len(given)
    domain.left_behind += int(said.left_behind)
    domain.confidence += float(given.amax(-1).sum())
    domain.entropy += float(torch.special.entr(given).sum())
    layer.kinds.add(kinds, given.numpy())


def _told(layer: Layer, names: Mapping[int, str]) -> RoutingLayer:
    """One layer as routing.json has it."""
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
    """Jensen and Shannon's divergence of two distributions [E], in bits, 0 to 1."""
    middle = (p + q) / 2

    def relative(a: np.ndarray) -> float:
        there = a > 0
        return float((a[there] * np.log2(a[there] / middle[there])).sum())

    return max(0.0, (relative(p) + relative(q)) / 2)


def _share(values: np.ndarray) -> np.ndarray:
    """Of their sum."""
    out: np.ndarray = values / max(values.sum(), 1e-300)
    return out


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.round(6).tolist())
