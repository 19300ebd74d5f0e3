"""Greedy generation with a cache, past every switch of the config, and the settings that generation heeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.blueprints.blueprint import Blueprint
from upcycle.families import CAUSAL_HEADS
from upcycle.verification.outputs import TOLERANCE, random
from upcycle.verification.proof import Check, relative_to

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NEW = 8  # tokens that are generated
BEFORE = 4  # of these, tokens before a switch
LONGEST = 1024  # tokens of the longest row that is generated


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy generation of `NEW` tokens with a cache, from prompts of several lengths."""

    prompts: tuple[int, ...]  # tokens of each prompt
    at_switches: bool  # each prompt ends `BEFORE` tokens before a switch
    vocabulary: int
    beyond: str  # says which switches lie too far to be checked
    differs: str | None  # why the target is known to differ past a switch
    promised: bool
    heard: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # the inputs of an encoder

    name: ClassVar[str] = "generation"

    def ask(self, model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return, for each prompt, the new tokens [T] and the logits that chose them [T, V]."""
        import torch
        from transformers import GenerationMixin

        out = []
        for length in self.prompts:
            generator = torch.Generator().manual_seed(length)
            given = torch.randint(self.vocabulary, (1, length), generator=generator)
            said = {"inputs": given, "attention_mask": torch.ones_like(given)}
            if self.heard:
                said = random(self.heard, self.vocabulary) | {"decoder_input_ids": given}
            # The common method: Whisper's own one cuts sound into pieces, and wants settings for it.
            made: Any = GenerationMixin.generate(
                model,
                **said,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                return_dict_in_generate=True,
                output_logits=True,
            )
            logits = torch.stack([step[0].float() for step in made.logits])
            out.append((made.sequences[0, -len(logits) :], logits))
        return out

    def compare(self, dense: Any, moe: Any, stored: Any | None) -> Check:
        """Return the check of the logits of every step until the texts part, that step included.

        A token that two logits tie for may come out either way, so tokens alone decide nothing.
        """
        worst, parted = 0.0, []
        for (tokens, logits), (theirs, their_logits) in zip(dense, moe, strict=True):
            other = (tokens != theirs).nonzero()
            until = int(other[0]) + 1 if len(other) else len(tokens)
            scale = float(logits[:until].abs().max())
            steps = (logits[:until] - their_logits[:until]).abs().amax(1).tolist()
            for number, difference in enumerate(steps):
                relative = relative_to(difference, scale)
                worst = worst if relative <= worst else relative
                if not relative <= TOLERANCE:  # NaN is not
                    parted.append(number)
        lengths = " and ".join(f"{n} to {n + NEW}" for n in self.prompts)
        said = f"greedy with a cache, rows of {lengths} tokens: largest difference of logits {worst:.1g}"
        if parted and self.differs and self.at_switches and min(parted) >= BEFORE:
            return Check(name=self.name, holds=None, detail=f"{said}; {self.differs}")
        said += self.beyond + (f"; {self.differs}" if self.differs else "")
        if not self.promised:
            return Check(name=self.name, holds=None, detail=said + "; none promised by this recipe")
        return Check(name=self.name, holds=not parted, detail=said)


def generation(built: Blueprint) -> list[Generation]:
    """Return the question about generation; none for a model that does not go on from a text."""
    dense = built.dense
    kinds = dense.family.inputs(dense.config, NEW)
    causal = [stack.name for stack in dense.stacks if stack.causal]
    if not causal or not {"input_ids", "decoder_input_ids"} & {*kinds}:
        return []
    heard = {} if "input_ids" in kinds else {n: k for n, k in kinds.items() if n != "decoder_input_ids"}
    speak = (*CAUSAL_HEADS, "ForConditionalGeneration")  # a successor's head may not be the source's
    if not all(model.architecture.endswith(speak) for model in (dense, dense.whole)):
        return []
    switches = dense.family.switches(dense.config)
    length = dense.family.length(dense.config)
    room = max(1, min(LONGEST, length) - NEW)
    near = {name: at for name, at in switches.items() if at <= length and at - BEFORE <= LONGEST - NEW}
    far = [f"{name} at {at:,} tokens" for name, at in switches.items() if name not in near]
    prompts = {max(1, at - BEFORE) for at in near.values()} or {min(8, room)}
    return [
        Generation(
            prompts=tuple(sorted(prompts)),
            at_switches=bool(near),
            vocabulary=dense.config["vocab_size"],
            heard=heard,
            beyond=f"; not checked, as it lies far out: {', '.join(far)}" if far else "",
            differs=dense.family.parts_ways(dense.config, built.target.computes),
            promised=built.preserves_function,
        )
    ]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The settings that generation heeds: the ids of special tokens, and generation_config.json."""

    name: ClassVar[str] = "generation settings"

    def ask(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the settings that differ from transformers' own."""
        from upcycle.hf import generation as heeded

        return heeded.settings(model)

    def compare(self, dense: dict[str, Any], moe: dict[str, Any], stored: Any | None) -> Check:
        """Return the check that both models have the same settings.

        A source's `use_cache = false` is a setting of a training script, and the result does not have it.
        """
        dense = {key: value for key, value in dense.items() if (key, value) != ("use_cache", False)}
        different = sorted(
            f"{key} {dense.get(key)} became {moe.get(key)}"
            for key in {*dense, *moe}
            if dense.get(key) != moe.get(key)
        )
        return Check(
            name=self.name,
            holds=not different,
            detail="; ".join(different)
            or (f"{len(dense)} settings as the source has them" if dense else "neither has any of its own"),
        )


def settings(built: Blueprint) -> list[GenerationSettings]:
    """Return the question about settings; none for a model that does not generate."""
    return [GenerationSettings()] if generation(built) else []
