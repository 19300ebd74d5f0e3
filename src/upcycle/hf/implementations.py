"""How attention and experts are computed, if a config.json asks for it.

transformers heeds such keys of a config.json. What it has itself is taken. A package that may be missing, or
a kernel of the hub, which transformers would fetch and run, is for whoever opens the model to ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from transformers import PreTrainedConfig

from upcycle.errors import listed, shown
from upcycle.nn import kernels
from upcycle.system import progress

# What transformers and upcycle have themselves, by the key of config.json.
OWN: Mapping[str, frozenset[str]] = {
    "attn_implementation": frozenset({"eager", "sdpa", "flex_attention"}),
    kernels.KEY: frozenset(
        {kernels.ONE_BY_ONE, "batched_mm", kernels.GROUPED, kernels.FOLLOWING, kernels.EXPERT_BY_EXPERT}
    ),
}


def refrain(config: PreTrainedConfig, said_by: str) -> bool:
    """Take implementations of somebody else out of a config; return whether there were any.

    A warning names them, and `said_by`, the file that asks for them.
    """
    found = False
    for key, own in OWN.items():
        foreign = [each for each in _all_of(config) if getattr(each, f"_{key}") not in (None, *own)]
        if not foreign:
            continue
        found = True
        names = dict.fromkeys(shown(getattr(each, f"_{key}")) for each in foreign)
        for each in foreign:
            setattr(each, f"_{key}", {"": None})  # of this one alone
        _warn_once(
            f"{said_by}: {key} = {listed([*names])} is not heeded: it is no part of transformers, and a "
            f"checkpoint does not decide which code is fetched and run (in a run, train.{key} asks for one)"
        )
    return found


def _all_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Return a config and those of its parts."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _all_of(part)


@lru_cache
def _warn_once(sentence: str) -> None:
    progress.warn(sentence)
