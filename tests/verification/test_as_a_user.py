"""`verify` uses both folders as a user does: Auto classes, generation past every switch, padded rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
from upcycle import Recipe, convert, plan, verify
from upcycle.verification import generation
from upcycle.verification.proof import Proof

MOE = {"num_experts": 2, "top_k": 1}
LONG = {
    "max_position_embeddings": 96, "original_max_position_embeddings": 16, "sliding_window": None,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.05, 1.16, 1.85],
        "long_factor": [1.08, 9.09, 57.9, 64.8], "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def line(proof: Proof, name: str) -> tuple[bool | None, str]:
    return next((check.holds, check.detail) for check in proof.checks if check.name == name)


def converted(source: Path, out: Path, target: str = "native") -> Proof:
    convert(source, out, Recipe.of(moe={**MOE, "target": target}))
    return verify(source, out)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_every_line_is_there(dense, tmp_path):
    proof = converted(dense("mistral"), tmp_path / "moe")
    assert proof.holds
    classes = "the source opens as MistralForCausalLM, the result as MixtralForCausalLM"
    assert line(proof, "Auto classes") == (True, classes)
    assert line(proof, "logits, padded on the left")[0]
    holds, said = line(proof, "generation")
    assert holds
    assert "rows of 4 to 12 tokens" in said  # past the window of 8
    assert line(proof, "generation settings")[0]


def test_a_switch_that_lies_far_out_is_named(tmp_path):
    source = tiny.make_dense(tmp_path / "dense", "mistral", sliding_window=4096, max_position_embeddings=8192)
    holds, said = line(converted(source, tmp_path / "moe"), "generation")
    assert holds
    assert said.endswith("not checked, as it lies far out: the sliding window at 4,096 tokens")


@pytest.mark.parametrize("target", ["mixtral", "upcycled"])
def test_long_rope_past_its_switch(target, tmp_path):
    """Phi-3 computes its cache anew there. Mixtral does not, and plan and verify say so."""
    import torch
    from transformers import AutoModelForCausalLM

    source = tiny.make_dense(tmp_path / "dense", "phi3", **LONG)
    proof = converted(source, tmp_path / "moe", target)
    assert proof.holds
    holds, said = line(proof, "generation")
    warned = [w for w in plan(source, Recipe.of(moe={**MOE, "target": target})).warnings if "past 16" in w]
    given = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(2))
    texts = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).generate(
            given, do_sample=False, max_new_tokens=12, min_new_tokens=12
        )
        for f in (source, tmp_path / "moe")
    ]
    assert torch.equal(*texts) == (target == "upcycled")
    if target == "upcycled":
        assert (holds, warned) == (True, [])
    else:
        assert holds is None
        assert "phi3 computes its cache anew with the long factors and mixtral does not" in said
        assert len(warned) == 1


def test_a_cache_that_goes_wrong_is_seen(dense, tmp_path, monkeypatch):
    """Only generation shows it: a forward pass over a whole row uses no cache."""
    from transformers.models.mixtral import modeling_mixtral

    convert(dense("llama"), tmp_path / "moe", Recipe.of(moe=MOE))
    forward = modeling_mixtral.MixtralAttention.forward

    def broken(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states * (1.0 if hidden_states.shape[1] > 1 else 1.01), *args, **kwargs)

    monkeypatch.setattr(modeling_mixtral.MixtralAttention, "forward", broken)
    proof = verify(dense("llama"), tmp_path / "moe")
    assert line(proof, "logits, random")[0]
    assert line(proof, "generation")[0] is False


def test_padding_that_is_not_heeded_is_seen(dense, tmp_path, monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    convert(dense("llama"), tmp_path / "moe", Recipe.of(moe=MOE))
    forward = modeling_mixtral.MixtralModel.forward

    def broken(self, input_ids=None, attention_mask=None, *args, **kwargs):
        return forward(self, input_ids, None, *args, **kwargs)

    monkeypatch.setattr(modeling_mixtral.MixtralModel, "forward", broken)
    proof = verify(dense("llama"), tmp_path / "moe")
    assert line(proof, "logits, random")[0]
    assert line(proof, "logits, padded on the left")[0] is False


@pytest.mark.parametrize("target", ["granitemoe_swa", "upcycled"])
def test_a_mistral_with_kinds_of_layers(target, dense, tmp_path):
    """transformers opens it as Ministral, whatever its config names, and so does upcycle."""
    source = Path(shutil.copytree(dense("mistral"), tmp_path / "dense"))
    edit(source, layer_types=["full_attention", *["sliding_attention"] * 3])
    proof = converted(source, tmp_path / "moe", target)
    assert proof.holds, proof.checks
    assert line(proof, "Auto classes")[1].startswith("the source opens as MinistralForCausalLM")


def test_another_class_than_was_converted_is_seen(dense, tmp_path, monkeypatch):
    from upcycle.families.mistral import Mistral

    source = Path(shutil.copytree(dense("mistral"), tmp_path / "dense"))
    edit(source, layer_types=["full_attention", *["sliding_attention"] * 3])
    monkeypatch.setattr(Mistral, "meant", lambda self, raw: "mistral")
    proof = converted(source, tmp_path / "moe")
    assert not proof.holds
    holds, said = line(proof, "Auto classes")
    assert not holds
    assert "opens the source as MinistralForCausalLM, and not as the MistralForCausalLM" in said


def test_a_source_that_transformers_does_not_open_ends_in_a_sentence(tmp_path):
    source = tiny.make_dense(tmp_path / "dense", "mistral", num_key_value_heads=4)
    edit(source, num_key_value_heads=None)  # upcycle reads it as before; transformers wants a number
    proof = converted(source, tmp_path / "moe")
    holds, said = line(proof, "Auto classes")
    assert holds is False
    assert said.startswith("the source cannot be opened: ")
    assert "num_key_value_heads" in said
    assert all("\n" not in check.detail for check in proof.checks)


def test_a_model_that_raises_in_its_forward_pass_ends_in_a_sentence(dense, tmp_path, monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    convert(dense("llama"), tmp_path / "moe", Recipe.of(moe=MOE))
    monkeypatch.setattr(modeling_mixtral.MixtralModel, "forward", lambda *_, **__: 1 / 0)
    proof = verify(dense("llama"), tmp_path / "moe")
    assert line(proof, "logits, random") == (False, "the result cannot be run: division by zero")
    assert line(proof, "generation settings")[0]


def test_settings_of_generation_that_differ_are_seen(dense, tmp_path):
    convert(dense("llama"), tmp_path / "moe", Recipe.of(moe=MOE))
    settings = json.loads((tmp_path / "moe" / "generation_config.json").read_text())
    (tmp_path / "moe" / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    holds, said = line(verify(dense("llama"), tmp_path / "moe"), "generation settings")
    assert not holds
    assert "eos_token_id 2 became 7" in said


def question(**changes) -> generation.Generation:
    asked = {"prompts": (4,), "at_switches": False, "vocabulary": 3, "beyond": "", "differs": None}
    return generation.Generation(**{**asked, "promised": True, **changes})


@pytest.mark.parametrize(
    ("at_switches", "step", "holds"), [(True, 5, None), (True, 3, False), (False, 5, False)]
)
def test_only_what_lies_past_a_switch_may_differ(at_switches, step, holds):
    """A target that is known to differ past a switch is held to everything before it."""
    import torch

    logits, tokens = torch.ones(8, 3), torch.zeros(8, dtype=torch.long)
    other = logits.clone()
    other[step:] += 0.1
    asked = question(at_switches=at_switches, differs="it differs past the switch")
    assert asked.compare([(tokens, logits)], [(tokens, other)], None).holds is holds


def test_texts_may_part_where_two_tokens_tie():
    """What decides is the logits of every step until then."""
    import torch

    asked = question()
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    other = logits.clone()
    other[2] = torch.tensor([9.0, 0.0, 0.0])  # after another token, anything may follow
    tie = asked.compare([(torch.tensor([0, 0, 1]), logits)], [(torch.tensor([0, 1, 0]), other)], None)
    assert tie.holds
    wrong = asked.compare([(torch.tensor([0, 0, 1]), logits)], [(torch.tensor([0, 0, 0]), other)], None)
    assert wrong.holds is False


@pytest.mark.parametrize("side", ["dense", "moe"])
def test_logits_of_generation_that_are_no_numbers_fail(side):
    """NaN is neither larger nor smaller than the tolerance."""
    import torch

    asked = question()
    logits, tokens = torch.ones(3, 3), torch.tensor([0, 0, 0])
    given = {"dense": logits, "moe": logits} | {side: logits.clone().fill_(torch.nan)}
    found = asked.compare([(tokens, given["dense"])], [(tokens, given["moe"])], None)
    assert found.holds is False
    assert "largest difference of logits nan" in found.detail
