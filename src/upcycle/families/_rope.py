"""The rotary settings of a config.json, in either spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError

# Kinds of rotation that know the length of the first training, which may stand beside their table.
LENGTHENED = {"llama3", "yarn", "longrope"}


def rope_parameters(raw: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """Return the rotary settings of a config.json, in either spelling, as a new dict in the new spelling.

    The length of the first training is in it, too; if config.json has it at its top as well, that one counts,
    as in transformers.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = raw.get("rope_theta") or default_theta
    if not isinstance(given, Mapping) or not isinstance(theta, (int, float)):
        raise UpcycleError(
            f"config.json: rope_theta must be a number, rope_scaling and rope_parameters tables; they are "
            f"{theta!r} and {given!r}"
        )
    rope = dict(given)
    _refuse_two_thetas(raw, rope)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.setdefault("rope_theta", theta)
    if (share := raw.get("partial_rotary_factor")) is not None:
        rope.setdefault("partial_rotary_factor", share)
    first = raw.get("original_max_position_embeddings")
    if rope["rope_type"] in LENGTHENED and first is not None:
        rope["original_max_position_embeddings"] = first
    return rope


def _refuse_two_thetas(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Refuse a config.json with two bases of rotation, of which readers take one or the other."""
    outer = raw.get("rope_theta")
    tables = [rope, *(table for table in rope.values() if isinstance(table, Mapping))]
    inner = [table["rope_theta"] for table in tables if table.get("rope_theta") is not None]
    if outer is not None and inner and outer not in inner:
        raise UpcycleError(
            f"config.json: rope_theta = {outer} stands beside rope_theta = {inner[0]} inside the rotary "
            f"settings; readers take one or the other, so keep the one that is meant"
        )
