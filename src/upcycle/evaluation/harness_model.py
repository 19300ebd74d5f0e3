"""A model as lm-evaluation-harness asks it. The class is our own, so that upcycled models work too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from upcycle.errors import UpcycleError
from upcycle.evaluation.language_model import LanguageModel, Pair
from upcycle.evaluation.text import windows
from upcycle.system import progress

_GENERATED = 256  # tokens, if a task does not say how many


class HarnessModel(TemplateLM):
    """A `LanguageModel` behind the model interface of the harness."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        self._language = language
        self.tokenizer = language.tokenizer
        self.backend = "seq2seq" if language.encoder_decoder else "causal"
        self.shortened: dict[str, set[int]] = {}  # by task: examples whose continuation was too long
        self._asked: list[Instance] = []

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self._language.begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begun = self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token)
        if add_special_tokens is None:
            add_special_tokens = not (begun and self.backend == "causal")
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._asked = requests
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        for request, pair in zip(self._asked, pairs, strict=True):
            if not pair.context or not pair.continuation:
                part = "continuation" if pair.context else "context"
                raise UpcycleError(f"{_place(request)} has an empty {part}, which has no likelihood")
            if self._language.too_long(pair):
                self.shortened.setdefault(str(request.task_name), set()).add(int(request.doc_id or 0))
        with progress.work("continuations", "examples", total=len(pairs)) as work:
            found = self._language.likelihoods(pairs, work.advance)
        return [(-float(likelihood.nats.sum()), bool(likelihood.likeliest.all())) for likelihood in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text; the prefix of the tokenizer is read but not scored."""
        length = self._language.length or 2048
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in windows(len(ids), length, length):
                before = ids[max(0, window.begin) : window.first]
                context = [self.prefix_token_id, *before] if window.begin < 0 else before
                pairs.append(Pair(context, ids[window.first : window.end]))
                owners.append(owner)
        out = np.zeros(len(requests))
        with progress.work("windows", "examples", total=len(pairs)) as work:
            found = self._language.likelihoods(pairs, work.advance)
            for owner, likelihood in zip(owners, found, strict=True):
                out[owner] -= likelihood.nats.sum()
        return list(map(float, out))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        out = [""] * len(requests)
        for most, until in {_how(request) for request in requests}:
            places = [i for i, request in enumerate(requests) if _how(request) == (most, until)]
            prompts = [self.tok_encode(requests[i].args[0]) for i in places]
            answering = progress.work("answers", "examples", total=len(prompts))
            with answering as work, _named(requests[places[0]]):
                texts = self._language.generate(prompts, most=most, until=until, advance=work.advance)
            for place, text in zip(places, texts, strict=True):
                out[place] = text
        return out


def _how(request: Instance) -> tuple[int, tuple[str, ...]]:
    """Return the largest number of tokens and the stop strings of a request.

    Raises `UpcycleError` if the task wants sampled text.
    """
    options = request.args[1]
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise UpcycleError(
            f"the task {request.task_name} wants sampled text, and texts are generated greedily here; leave "
            f"it out"
        )
    until = options.get("until") or ()
    most = options.get("max_gen_toks") or options.get("max_new_tokens") or _GENERATED
    return int(most), (until,) if isinstance(until, str) else tuple(until)


def _place(request: Instance) -> str:
    """Return the task and the example of a request, for an error message."""
    return f"task {request.task_name}, example {int(request.doc_id or 0) + 1}"


@contextlib.contextmanager
def _named(request: Instance) -> Iterator[None]:
    """Add the name of the task to an error."""
    try:
        yield
    except UpcycleError as error:
        raise UpcycleError(f"task {request.task_name}: {error}") from None
