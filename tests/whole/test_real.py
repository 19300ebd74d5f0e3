"""A really trained Llama: nothing is lost, in transformers and in clients that this project did not write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clients import llama_cpp_logits, mlx_logits, mlx_model, transformers_logits
from upcycle import Recipe, convert, plan, verify

PUBLISHED = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
NEW_TOKENS = 100


@pytest.fixture(scope="module")
def moe(stories, tmp_path_factory) -> Path:
    """stories260k as 8 experts, top-2."""
    folder = tmp_path_factory.mktemp("real") / "moe"
    convert(stories, folder, Recipe.of())
    return folder


def held_out_loss(folder: Path, tinystories: Path) -> float:
    """Nats per token on the last tenth of the text, in float64 sums over 64 rows of 256 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tinystories.read_text()
    stories = text[len(text) * 9 // 10 :].split("<|endoftext|>")
    ids = [i for story in stories for i in tokenizer(story.strip()).input_ids]
    rows = torch.tensor(ids[: 64 * 256]).view(64, 256)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = torch.cat([model(batch).logits for batch in rows.split(16)])
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), rows[:, 1:].flatten())
    )


def greedy(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([[1]]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0].tolist()


def test_held_out_loss(stories, moe, tinystories):
    dense = held_out_loss(stories, tinystories)
    assert 1.2 < dense < 1.6  # a trained model: random is log 512 = 6.2
    assert abs(held_out_loss(moe, tinystories) - dense) < 1e-5


def test_greedy_text(stories, moe):
    ids = greedy(moe)
    assert ids == greedy(stories)
    assert AutoTokenizer.from_pretrained(moe).decode(ids, skip_special_tokens=True).startswith(PUBLISHED)


def test_verified(stories, moe, tinystories):
    proof = verify(stories, moe, text=tinystories)
    assert proof.holds, proof.checks
    assert proof.logits["text"].tokens == 256
    assert proof.logits["text"].relative < 1e-5


def test_mlx_lm_logits(stories, moe):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    ids = greedy(stories)
    dense = transformers_logits(stories, ids)
    assert np.abs(mlx_logits(moe, ids) - dense).max() < 1e-5 * np.abs(dense).max()


def test_mlx_lm_greedy_text(stories, moe):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array([1]), mlx_model(moe), max_tokens=NEW_TOKENS)
    assert [1, *(int(token) for token, _ in steps)] == greedy(stories)


def test_llama_cpp(stories, moe):
    pytest.importorskip("cyllama", reason="cyllama, which carries llama.cpp, is not installed")
    ids = greedy(stories)
    dense = transformers_logits(stories, ids)
    found = llama_cpp_logits(moe, ids)
    assert np.abs(found - dense).max() < 5e-4 * np.abs(dense).max()
    assert (found.argmax(axis=1)[:-1] == np.array(ids[1:])).all()  # its greedy text is the dense one's


@pytest.mark.parametrize(
    ("init", "moe_keys", "router"),
    [
        ({"name": "virtual_group"}, {"granularity": 4, "num_experts": 16, "top_k": 4}, {"init": "grouped"}),
        pytest.param({"name": "shuffle_slice"}, {}, {}, marks=pytest.mark.slow),
        pytest.param({"name": "drop", "ratio": 0.0}, {}, {}, marks=pytest.mark.slow),
        ({"name": "split"}, {"granularity": 4, "num_experts": 4, "top_k": 4}, {"init": "zeros"}),
    ],
)
def test_other_exact_initialisations(init, moe_keys, router, stories, tinystories, tmp_path):
    recipe = Recipe.of(moe=moe_keys, init=init, router=router)
    assert plan(stories, recipe).preserves_function
    convert(stories, tmp_path / "moe", recipe)
    proof = verify(stories, tmp_path / "moe", text=tinystories)
    assert proof.holds, proof.checks


@pytest.mark.slow
def test_damage_grows_with_the_dropped_share(stories, tinystories, tmp_path):
    """On trained weights: more neurons redrawn, more loss; independent indices cost more than shared."""
    losses = []
    for ratio in (0.0, 0.1, 0.25, 0.5):
        convert(stories, tmp_path / f"{ratio}", Recipe.of(init={"name": "drop", "ratio": ratio}))
        losses.append(held_out_loss(tmp_path / f"{ratio}", tinystories))
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 1
    convert(
        stories, tmp_path / "i", Recipe.of(init={"name": "drop", "ratio": 0.25, "indices": "independent"})
    )
    assert held_out_loss(tmp_path / "i", tinystories) > losses[2]
