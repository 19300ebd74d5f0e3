"""Dropout of the whole model, as a run sets it: in the config that its class is built from, and in no other.

Classes of transformers read their rates from config.json when they are built, under a dozen names. All of
them have `dropout` in them, or end in `pdrop` as GPT-2's do; those of experts are in the entries of `moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.hf import models


def set_in(config: Config, architecture: str, rate: float) -> Config:
    """Return the config of a class with all its rates of dropout set to `rate`.

    Raises `UpcycleError` if the class has none and would have some.
    """
    kind = models.architecture(architecture).config_class
    whole = kind.from_dict(kind._decode_special_floats(dict(config)))
    found = [_rates(whole, rate)]
    out = {**config, **found[0]}
    for name in whole.sub_configs:
        if (part := getattr(whole, name, None)) is not None:
            found.append(_rates(part, rate))
            out[name] = {**(config.get(name) or {}), **found[-1]}
    if isinstance(experts := config.get("moe"), list):
        found.append({"dropout": rate})
        out["moe"] = [{**entry, "dropout": rate} for entry in experts]
    if rate and not any(found):
        raise UpcycleError(
            f"train.dropout = {rate}: config.json of {architecture} has no rate of dropout; take it out, or "
            f"set it to 0"
        )
    return out


def _rates(config: Any, rate: float) -> Mapping[str, float]:
    """Return `rate` under each name that a config has for dropout; one that is null follows another."""
    return {
        name: rate
        for name, value in vars(config).items()
        if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float)
    }
