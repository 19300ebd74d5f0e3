"""Published configs, small, through plan, convert and verify: what holds, and what is refused and why."""

from __future__ import annotations

import pytest

import published
from marks import sampled
from upcycle import Recipe, UpcycleError, blueprint, convert, families, plan, verify
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.families._wrappers import WRAPPERS

TABLE = published.table()
MOE = {"num_experts": 2, "top_k": 1}


def test_the_table():
    assert len(TABLE) >= 120
    assert published.FILE.stat().st_size < 200_000
    known = {*families.names(), *families.SAME, *WRAPPERS}
    assert all(row.source and row.config["model_type"] in known for row in TABLE.values())


def test_every_family_has_a_row():
    """But for those whose checkpoints are parts of others, and those that nobody seems to have published."""
    inside = {"clip_vision_model", "siglip_vision_model", "pixtral", "qwen3_vl_text"}
    unseen = {"granite_swa", "ministral"}  # Ministral 8B was published as a `mistral`
    found = {row.config["model_type"] for row in TABLE.values()}
    assert {*families.names()} - found == inside | unseen


@pytest.mark.parametrize("name", sampled(TABLE, 10))
def test_a_published_config(name, tmp_path):
    """It becomes its native MoE, or the upcycled one; verify looks at both as a user does."""
    row = TABLE[name]
    config = published.small(row.config)
    if row.refused:
        source = published.placeholder(tmp_path / "dense", config)
        with pytest.raises(UpcycleError, match=row.refused):
            blueprint(source, Recipe.of(moe={**MOE, "target": "upcycled"}))
        return
    source = published.checkpoint(tmp_path / "dense", config)
    target = "native" if published.family(config).natives and not row.native else "upcycled"
    if row.native:
        with pytest.raises(UpcycleError, match=row.native):
            plan(source, Recipe.of(moe=MOE))
    recipe = Recipe.of(moe={**MOE, "target": target})
    costs = plan(source, recipe)
    built = convert(source, tmp_path / "moe", recipe)
    assert costs.total_parameters == sum(e.lazy.size for e in built.entries.values())
    proof = verify(source, tmp_path / "moe")
    assert proof.preserves_function == (not row.otherwise)
    assert not row.otherwise or any(row.otherwise in warning for warning in costs.warnings)
    assert [(c.name, c.detail) for c in proof.checks if c.holds is False] == []
    with Checkpoint.open(tmp_path / "moe") as moe:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key in config:
                assert moe.config[key] == config[key], key
