"""A Gemma 4 of two widths: two stacks that share one list of blocks."""

from __future__ import annotations

import pytest

import ranks
import tiny
from upcycle import Recipe, UpcycleError, blueprint, convert, verify
from upcycle.blueprints.cost import flops_per_row
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.admission import admit
from upcycle.dense.subject import Subject
from upcycle.families import _stacks
from upcycle.forecast import groups
from upcycle.sharding.layout import Layout
from upcycle.tasks.causal_lm import CausalLM
from upcycle.training import drop_path
from upcycle.training.start import plain_model, start_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model with networks of one width and of two."""
    root = tmp_path_factory.mktemp("gemma4")
    return {
        wide: tiny.make_dense(root / str(wide), "gemma4_text", use_double_wide_mlp=wide)
        for wide in (False, True)
    }


def scores(dense):
    """The FLOPs of attention scores of a row of 16 tokens, less twice those of 8."""
    once, twice = (flops_per_row(dense, None, dict.fromkeys(dense.lengths, n)) for n in (8, 16))
    return twice - 2 * once


def test_attention_scores_count_once(folders):
    one, two = (admit(Checkpoint.open(folder)) for folder in folders.values())
    assert (len(one.stacks), len(two.stacks)) == (1, 2)
    assert scores(one) == scores(two) > 0


def test_blocks_are_listed_once_and_know_their_stack(folders):
    stacks = admit(Checkpoint.open(folders[True])).stacks
    assert _stacks.lists_of(stacks) == ["layers"]
    assert [_stacks.at(stacks, "layers", i).name for i in range(4)] == ["layers"] * 2 + ["wide"] * 2
    built = blueprint(folders[True], Recipe.of(moe={"num_experts": 2, "target": "upcycled"}))
    found = {group.block for group in groups.of(built, Layout()) if group.block}
    assert found == {("layers", 0), ("layers", 1), ("wide", 2), ("wide", 3)}


def test_training_knows_the_rows_of_both_stacks_and_drops_a_branch_once(folders):
    run = ranks.run_of(str(folders[True]), {}, {"moe": {"num_experts": 2, "target": "upcycled"}})
    start = start_of(run)
    lengths = CausalLM().lengths(16, Subject.of(folders[True]))
    assert lengths == {"layers": 16, "wide": 16}
    assert start.training_flops_per_row(lengths) == 16 * start.training_flops(16)
    model = plain_model(start)
    drop_path.install(model, start.dense.family, start.dense.config, 0.5)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert max(hooks) == 1


def test_blocks_that_cannot_be_repeated_are_refused(folders, tmp_path):
    deeper = Recipe.of(moe={"target": "depth_tiled"})
    with pytest.raises(UpcycleError, match="its blocks cannot be repeated"):
        blueprint(folders[True], deeper)
    changes = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    plain = tiny.make_dense(tmp_path / "plain", "gemma4_text", **changes)
    convert(plain, tmp_path / "deeper", deeper)
    proof = verify(plain, tmp_path / "deeper")
    assert proof.holds, proof.checks
