"""What save_pretrained writes has the names that `convert` writes, whatever transformers renames."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

import tiny
import upcycle
from upcycle import Recipe, blueprint


@pytest.mark.parametrize("architecture", ["NomicBertModel", "NemotronHForCausalLM"])
def test_experts_keep_their_names(architecture, tmp_path):
    """Nomic BERT calls the matrices of its networks otherwise on disk, and Nemotron-H takes experts apart."""
    source = tiny.make(tmp_path / "dense", architecture)
    recipe = Recipe.of(moe={"num_experts": 2, "target": "upcycled"})
    upcycle.load(source, recipe).save_pretrained(tmp_path / "saved")
    assert (
        load_file(tmp_path / "saved" / "model.safetensors").keys() == blueprint(source, recipe).entries.keys()
    )
    assert upcycle.inspect(tmp_path / "saved").blocks
