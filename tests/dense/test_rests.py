"""`successor.rest`: which checkpoints fit, and what the result is that has everything but its experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
import upcycle
from arrays import stored
from upcycle import Recipe, blueprint, convert, verify
from upcycle.errors import UpcycleError

BIG = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
SMALL = {"hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2}
DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
MOE = {"target": "upcycled", "layers": "last_half", "num_experts": 5, "top_k": 2}
HEADS = {"vit": ("ViTModel", "ViTForImageClassification"), "llama": ("LlamaModel", "LlamaForCausalLM")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that makes a ViT once per class and config."""
    found: dict[str, Path] = {}

    def make(architecture: str, **sizes: object) -> Path:
        key = repr((architecture, sorted(sizes.items())))
        if key not in found:
            found[key] = tiny.make(tmp_path_factory.mktemp("made") / "model", architecture, **sizes)
        return found[key]

    return make


def recipe_of(rest: Path) -> Recipe:
    successor = {"hidden_size": 16, "rest": str(rest)}
    return Recipe.of(moe=MOE, init={"name": "uniform"}, successor=successor)


@pytest.mark.parametrize("family", [*HEADS])
@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 0)])
def test_the_head_is_that_of_the_rest(family, one, other, made, tmp_path):
    """Whether the predecessor has one or not: its names then have another prefix."""
    large, little = (BIG, SMALL) if family == "vit" else ({}, DECODER)
    source, rest = made(HEADS[family][one], **large), made(HEADS[family][other], **little)
    convert(source, tmp_path / "out", recipe_of(rest))
    proof = verify(source, tmp_path / "out")
    assert proof.holds, proof.checks
    assert type(upcycle.open(tmp_path / "out")).__name__ == f"Upcycled{HEADS[family][other]}"
    found, theirs, mine = stored(tmp_path / "out"), stored(rest), stored(source)
    base = {"vit": "vit.", "llama": "model."}[family]
    found, theirs, mine = ({n.removeprefix(base): t for n, t in x.items()} for x in (found, theirs, mine))
    block = {"vit": "encoder.layer.3", "llama": "layers.3"}[family]
    down = {"vit": "output.dense", "llama": "mlp.down_proj"}[family]
    for name in theirs.keys() & found.keys():
        np.testing.assert_array_equal(found[name], theirs[name], err_msg=name)
    assert [n for n in found if n not in theirs and ".mlp." not in n] == []
    np.testing.assert_array_equal(
        found[f"{block}.mlp.experts.down_proj"][4], mine[f"{block}.{down}.weight"][::2, ::2]
    )


def test_a_rest_may_have_other_classes(made, tmp_path):
    source, rest = (
        made("ViTForImageClassification", **BIG),
        made("ViTForImageClassification", num_labels=7, **SMALL),
    )
    convert(source, tmp_path / "out", recipe_of(rest))
    proof = verify(source, tmp_path / "out")
    assert proof.holds, proof.checks
    assert upcycle.open(tmp_path / "out")(torch.randn(2, 3, 12, 12)).logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (BIG, "not a vit of the successor's size"),
        ({**SMALL, "num_hidden_layers": 5}, "not a vit of the successor's size"),
        ({**SMALL, "hidden_act": "relu"}, "have the activation 'relu'.* 'gelu'; a layer has one"),
    ],
)
def test_a_rest_that_does_not_fit_is_refused(changes, said, made):
    source, rest = made("ViTForImageClassification", **BIG), made("ViTForImageClassification", **changes)
    with pytest.raises(UpcycleError, match=rf"successor\.rest: .*{said}"):
        blueprint(source, recipe_of(rest))


def test_a_rest_of_another_kind_is_refused(made, tmp_path):
    import tiny_wrappers

    source = made("LlamaForCausalLM")
    with pytest.raises(UpcycleError, match="is a vit, and the source a llama"):
        blueprint(source, recipe_of(made("ViTModel", **SMALL)))
    wrapper = tiny_wrappers.make(tmp_path / "llava", "llava")
    with pytest.raises(UpcycleError, match="is a multimodal model"):
        blueprint(source, recipe_of(wrapper))


@pytest.mark.parametrize("same", [True, False])
def test_both_read_the_same_tokens(same, made, tmp_path):
    """The embeddings are those of the rest, and the tokenizer lies beside the source."""
    source = Path(shutil.copytree(made("LlamaForCausalLM"), tmp_path / "source"))
    rest = Path(shutil.copytree(made("LlamaForCausalLM", **DECODER), tmp_path / "rest"))
    tokens = {token: number for number, token in enumerate("abcdefgh")}
    swapped = tokens if same else {**tokens, "a": 1, "b": 0}
    for folder, vocabulary in ((source, tokens), (rest, swapped)):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    if same:
        assert blueprint(source, recipe_of(rest)).entries
        return
    with pytest.raises(UpcycleError, match=r"other tokens: 'a' is number 1 and 0; .*must have the same"):
        blueprint(source, recipe_of(rest))


def test_both_read_the_same_tokens_whatever_their_files(made, tmp_path):
    source = Path(shutil.copytree(made("LlamaForCausalLM"), tmp_path / "source"))
    rest = Path(shutil.copytree(made("LlamaForCausalLM", **DECODER), tmp_path / "rest"))
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    (rest / "vocab.txt").write_text("a\r\nb\r\n", newline="")
    assert blueprint(source, recipe_of(rest)).entries
    (rest / "vocab.txt").write_text("b\na\n")
    with pytest.raises(UpcycleError, match="other tokens: 'a' is number 1 and 0"):
        blueprint(source, recipe_of(rest))


HALVES = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize("here", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("there", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_are_compared_whichever_file_says_them(here, there, made, tmp_path):
    source = Path(shutil.copytree(made("ViTModel", **BIG), tmp_path / "source"))
    rest = Path(shutil.copytree(made("ViTModel", **SMALL), tmp_path / "rest"))

    def say(folder: Path, file: str, settings: dict[str, object]) -> None:
        nested = {"image_processor": settings} if file == "processor_config.json" else settings
        (folder / file).write_text(json.dumps(nested))

    say(rest, there, HALVES)
    with pytest.raises(UpcycleError, match=rf"do not both have .*\bcopy {there}"):
        blueprint(source, recipe_of(rest))
    say(source, here, {**HALVES, "image_std": [0.2] * 3})
    with pytest.raises(UpcycleError, match=rf"differ in image_std of .*{there}"):
        blueprint(source, recipe_of(rest))
    say(source, here, HALVES)
    assert blueprint(source, recipe_of(rest)).entries


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        (HALVES, HALVES, ""),
        (HALVES, {**HALVES, "size": {"height": 12}}, ""),
        (HALVES, None, ""),
        (HALVES, {"do_normalize": True}, ""),
        (HALVES, {**HALVES, "image_mean": [0.5001] * 3}, ""),
        ({**HALVES, "do_normalize": False}, {"do_normalize": False, "image_mean": [0.2] * 3}, ""),
        (HALVES, {**HALVES, "do_normalize": False}, "differ in do_normalize"),
        (HALVES, {**HALVES, "image_std": [0.2] * 3}, "differ in image_std .* [0.2, 0.2, 0.2] and [0.5"),
        (None, HALVES, "do not both have preprocessor_config.json"),
    ],
)
def test_both_read_the_same_pixels(mine, theirs, said, made, tmp_path):
    source = Path(shutil.copytree(made("ViTModel", **BIG), tmp_path / "source"))
    rest = Path(shutil.copytree(made("ViTModel", **SMALL), tmp_path / "rest"))
    for folder, settings in ((source, mine), (rest, theirs)):
        if settings is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if not said:
        assert blueprint(source, recipe_of(rest)).entries
        return
    with pytest.raises(UpcycleError, match=said.replace("[", r"\[")):
        blueprint(source, recipe_of(rest))
