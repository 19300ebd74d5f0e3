"""The outputs of both models in one forward pass: on random input, on a text, on images, on padded rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upcycle.blueprints.blueprint import Blueprint
from upcycle.dense.places import Tower
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.nn.upcycled_config import PREFIX
from upcycle.verification.proof import Check, Difference, reason, relative_to

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOLERANCE = 1e-5  # relative to the logit scale, in float32
IMAGES = 16  # images taken from a set
TOKENS = 256  # tokens taken from a text, and of random input


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The files that both models are run on besides random input."""

    text: Path | None = None
    images: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Logits, or the last hidden states of a model without a head, of one forward pass.

    `kept` says which positions of a row count, [B, L]; without it, all do. `tower` has the model types of a
    vision tower within a multimodal model, which is asked by itself.
    """

    name: str
    inputs: Mapping[str, torch.Tensor]
    built: Blueprint
    kept: torch.Tensor | None = None
    tower: tuple[str, ...] = ()
    found: dict[str, Difference] = field(default_factory=dict)  # filled in by `compare`, under the name

    def ask(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the output, [B, ..., V], or [N, V] for the positions that count."""
        if self.tower:
            from upcycle.hf import parts

            model = parts.tower(model, self.tower)
        output: torch.Tensor = model(**self.inputs)[0]
        return output if self.kept is None or output.shape[:2] != self.kept.shape else output[self.kept]

    def compare(self, dense: torch.Tensor, moe: torch.Tensor, stored: torch.Tensor | None) -> Check:
        """Return the check of the largest difference, relative to the largest output of the dense model.

        A model that promises another function may have outputs of another shape. What must hold then is that
        they are numbers where the dense model's are.
        """
        promised = self.built.preserves_function
        if not moe.isfinite().all() and dense.isfinite().all():
            said = "the result gives infinities or NaN, and the dense model does not"
            return Check(name=self.name, holds=False, detail=said)
        if dense.shape != moe.shape:
            said = f"outputs have other shapes, {[*dense.shape]} and {[*moe.shape]}; nothing to compare"
            return Check(name=self.name, holds=False if promised else None, detail=said)
        difference = Difference(
            max_difference=float((dense - moe).abs().max()),
            scale=float(dense.abs().max()),
            tokens=moe.shape[:-1].numel(),
            images=len(moe) if "pixel_values" in self.inputs else None,
            source_difference=None if stored is None else float((stored - moe).abs().max()),
        )
        self.found[self.name.removeprefix("logits, ")] = difference
        said = self._said(difference)
        if not promised:
            return Check(name=self.name, holds=None, detail=said + "; none promised by this recipe")
        return Check(name=self.name, holds=difference.relative <= TOLERANCE, detail=said)

    def _said(self, difference: Difference) -> str:
        what = f"{difference.tokens} tokens" if difference.images is None else f"{difference.images} images"
        said = (
            f"largest difference {difference.max_difference:.2g} of a scale of {difference.scale:.3g} "
            f"({difference.relative:.1g}) on {what}"
        )
        if not difference.scale:
            said += "; the dense model gives zeros alone, which tells little"
        if (far := difference.source_difference) is not None:
            said += (
                f", to the dense model rounded to {self.built.narrowed}; {far:.2g} "
                f"({relative_to(far, difference.scale):.1g}) to the dense model as it is stored"
            )
        return said


def outputs(built: Blueprint, shown: Shown) -> list[Outputs]:
    """Return the questions about logits: on random input, and on what `shown` names."""
    import torch

    if built.tower is not None:
        text, seen = replace(shown, images=None), replace(shown, text=None)
        return [*outputs(replace(built, tower=None), text), *outputs(built.tower, seen)]
    dense = built.dense
    kinds = dense.family.inputs(dense.config, TOKENS)
    beside = {name: torch.tensor(rows) for name, rows in dense.family.beside(dense.config).items()}
    inputs = {"random": random(kinds, dense.config.get("vocab_size", 0)) | beside}
    if shown.text is not None:
        ids = _tokens(built.source.folder, shown.text, dense.family.length(dense.config))
        names = [name for name, (kind, _) in kinds.items() if kind == "tokens"]
        if not names:
            raise UpcycleError(f"--text is for models that read text, and {dense.family.model_type} does not")
        inputs["text"] = dict.fromkeys(names, ids)
    if shown.images is not None:
        inputs["images"] = _pixels(dense, shown.images)
    if isinstance(dense.place, Tower):
        types = dense.family.model_type, PREFIX + dense.family.model_type
        return [
            Outputs(name=f"vision tower, {name}", inputs=given, built=built, tower=types)
            for name, given in inputs.items()
        ]
    return [
        Outputs(name=f"logits, {name}", inputs=_as_read(dense, given), built=built)
        for name, given in inputs.items()
    ]


def padded(built: Blueprint) -> list[Outputs]:
    """Return the question about rows of text that are padded on the left; none for models that see images."""
    import torch

    kinds = built.dense.family.inputs(built.dense.config, TOKENS)
    if "input_ids" not in kinds or any(kind != "tokens" for kind, _ in kinds.values()):
        return []
    rows, length = 2, min(kinds["input_ids"][1][1], TOKENS // 4)
    shapes = {n: (kind, (rows, length)) for n, (kind, _) in kinds.items()}
    given = random(shapes, built.dense.config["vocab_size"])
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    given["attention_mask"] = mask
    kept = None if "decoder_input_ids" in kinds else mask.bool()
    given = _as_read(built.dense, given)
    return [Outputs(name="logits, padded on the left", inputs=given, built=built, kept=kept)]


def _as_read(dense: Dense, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return rows of tokens in the form that the head reads.

    BART and T5 read a class at the end of a text, so each row has one end. A head that chooses between rows
    reads [B, rows, L].
    """
    rows = {n for n, given in inputs.items() if n.endswith("input_ids") or n == "attention_mask"}
    out, ids = dict(inputs), inputs.get("input_ids")
    ends = dense.config.get("eos_token_id")
    if ids is not None and "decoder_input_ids" in inputs and dense.architecture.endswith("Classification"):
        end = ends[0] if isinstance(ends, list) else 2 if ends is None else ends
        out["input_ids"] = ids.where(ids != end, (end + 1) % dense.config["vocab_size"])
        out["input_ids"][:, -1] = end
    if dense.architecture.endswith("ForMultipleChoice"):
        out |= {n: out[n].view(-1, min(2, len(out[n])), *out[n].shape[1:]) for n in rows}
    return out


def random(shapes: Mapping[str, tuple[str, tuple[int, ...]]], vocabulary: int) -> dict[str, torch.Tensor]:
    """Return random input of the given kinds and shapes; it is the same in every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(vocabulary, shape, generator=generator)
        if kind == "tokens"
        else torch.randn(shape, generator=generator)
        for name, (kind, shape) in shapes.items()
    }


def _tokens(source: Path, text: Path, limit: int) -> torch.Tensor:
    """Return the first tokens of a text, [1, L]."""
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")[: 64 * TOKENS]
    except (OSError, UnicodeDecodeError) as error:
        raise UpcycleError(f"--text {text} cannot be read as text: {error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise UpcycleError(f"{source} has no tokenizer for --text: {reason(error)}") from None
    ids: torch.Tensor = tokenizer(content, return_tensors="pt").input_ids[:, : min(TOKENS, limit)]
    if not ids.numel():
        raise UpcycleError(f"--text {text} holds no text")
    return ids


def _pixels(dense: Dense, images: Path) -> dict[str, torch.Tensor]:
    """Return the first images of a set, preprocessed as in an evaluation."""
    import torch

    from upcycle.dense.subject import Subject
    from upcycle.system import scratch
    from upcycle.tasks._rows import of_images

    if not any(kind == "pixels" for kind, _ in dense.family.inputs(dense.config, TOKENS).values()):
        raise UpcycleError(f"--images is for models that read images, and {dense.family.model_type} does not")
    with scratch.folder() as cache:
        found = of_images(images, Subject.of_dense(dense), cache, gradient=False, seed=0)
        read = found.read(np.arange(min(IMAGES, found.count)))
        batch = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in read.items()}
        inputs: dict[str, torch.Tensor] = dict(found.ask(batch).inputs)
    return inputs
