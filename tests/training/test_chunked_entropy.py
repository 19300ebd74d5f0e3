"""The cross-entropy in chunks of tokens against that of all logits at once, for the head of every family."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

import every_wrapper
import ranks
import tiny
import tiny_wrappers
from upcycle import UpcycleError, families
from upcycle.data.corruption import IGNORED
from upcycle.hf import heads
from upcycle.hf.heads import Head
from upcycle.training import chunked_entropy, step
from upcycle.training.parallel import ranks as world

HEADS = {"gemma2": {"final_logit_softcapping": 2.0}, "gemma3_text": {"final_logit_softcapping": 3.0}}


def both_ways(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> list[tuple[torch.Tensor, list]]:
    """The loss and the gradients of all parameters, plain and in chunks."""
    head = Head.of(model)
    assert head is not None
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
    plain = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    chunked = chunked_entropy.cross_entropy(hidden, labels, head)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [(loss, torch.autograd.grad(loss / 7, parameters, allow_unused=True)) for loss in (plain, chunked)]


def random_ids(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 96, size, generator=generator) for _ in range(2))
    return ids, labels.where(labels % 7 > 0, IGNORED)


@pytest.mark.parametrize("name", [*tiny.DECODERS, *tiny.OTHERS, "llama-tied"])
def test_chunks_give_the_loss_and_gradients_of_every_family(name):
    """48 tokens in several chunks; a head that is tied gets the gradients of both its uses."""
    model_type, changes = tiny.VARIANTS.get(name, (name, HEADS.get(name, {})))
    model = tiny.shake(
        AutoModelForCausalLM.from_config(tiny.config_of(model_type, **changes)).float()
    ).eval()  # seed_oss has dropout
    ids, labels = random_ids(2, 24)
    (plain, wanted), (chunked, found) = both_ways(model, ids, labels)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-9)


FINISHING = {"logit_scale": 0.25, "logits_scaling": 4.0, "final_logit_softcapping": 2.0}
"""What the heads of some text models do; a wrapper around one has a head of its own."""
WRAPPED = {name: partial(every_wrapper.built, name) for name in every_wrapper.CASES}
WRAPPED |= {name: partial(tiny_wrappers.built, name) for name in tiny_wrappers.KINDS}
WRAPPED |= {
    f"llava_next-{text}": partial(every_wrapper.built, "llava_next", model_type=text)
    for text in ("granite", "gemma2", "cohere2")
}


def plain_and_in_chunks(model: Any) -> list[float]:
    """The summed loss of all logits, and the one that is computed inside the class's own forward pass."""
    ids, labels = random_ids(2, 12)
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.flatten(0, 1)
        plain = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)
        chunked = heads.without_logits(
            model, inputs, lambda hidden, head: chunked_entropy.cross_entropy(hidden, labels, head)
        )
    return [plain.item(), chunked.item()]


@pytest.mark.parametrize("name", WRAPPED)
def test_chunks_do_to_logits_what_a_wrapper_does(name):
    plain, chunked = plain_and_in_chunks(WRAPPED[name](**FINISHING))
    assert chunked == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    "changed", [lambda x: x * 0.5, lambda x: x + 1.0, lambda x: torch.tanh(x / 50.0) * 50.0]
)
def test_a_class_that_does_something_else_to_its_logits_is_refused(changed):
    """As a wrapper of a later version may."""
    model = tiny.shake(AutoModelForCausalLM.from_config(tiny.config_of("llama")))
    original = model.forward

    def forward(**inputs: Any) -> Any:
        out = original(**inputs)
        out.logits = changed(out.logits)
        return out

    model.forward = forward
    with pytest.raises(UpcycleError, match=r"LlamaForCausalLM does something to its logits .*micro_batch"):
        plain_and_in_chunks(model)


def test_scores_are_those_of_all_logits():
    model = tiny.shake(AutoModelForCausalLM.from_config(tiny.config_of("gemma2", **HEADS["gemma2"])))
    ids, labels = random_ids(2, 24)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        hidden = model.base_model(input_ids=ids).last_hidden_state
        loss, right = chunked_entropy.scores(hidden, labels, Head.of(model))
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert int(right) == int((logits.argmax(-1) == labels).sum())


def test_a_head_with_a_bias_and_narrow_numbers():
    """As autocast has them: products in bfloat16, sums of gradients in float32."""
    head = Head(weight=torch.randn(96, 32).requires_grad_(), bias=torch.randn(96).requires_grad_())
    hidden = torch.randn(4, 12, 32, requires_grad=True)
    _, labels = random_ids(4, 12)
    given = [hidden, head.weight, head.bias]
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, head.weight, head.bias).float().flatten(0, 1)
        plain = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)
        chunked = chunked_entropy.cross_entropy(hidden, labels, head)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(x, given) for x in (chunked, plain)), strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01


NATIVES = {native: name for name in reversed(tiny.DECODERS) for native in families.find(name).natives}


@pytest.mark.parametrize("native", NATIVES)
def test_a_step_in_chunks_is_the_plain_step(native, tmp_path, monkeypatch):
    """Losses, the gradient's norm and the score of a whole step; a native's head is its family's."""
    source = tiny.make_dense(tmp_path / "dense", NATIVES[native])
    run = ranks.run_of(str(source), {}, {"moe": {"target": native}})
    found = []
    for worth in (1 << 60, 0):
        monkeypatch.setattr(chunked_entropy, "WORTH", worth)
        with world(run.parallel) as here:
            trainee = ranks.trainee_of(run, here)
        batch = ranks.batch_of(run, trainee.task)
        outcome = step.train_step(trainee, batch, 0, 1e-3)
        score = ranks.score_of(trainee, {"rows": batch["rows"][:3]})
        found.append((outcome.loss, outcome.grad_norm, outcome.balance_loss, score.loss, score.accuracy))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[1][0] != 0.0
