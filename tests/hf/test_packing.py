"""Documents in a packed row compute what each computes alone, in every family of decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import naive_flash
import tiny
import tiny_wrappers
from upcycle import UpcycleError, families
from upcycle.hf import carriers, packing

ROWS = [[13, 1, 10], [4, 20]]  # lengths of the documents of each row; a sliding window has 8 tokens
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {}),
    "falcon-alibi": ("FalconForCausalLM", {"alibi": True}),
}
NAMES = [
    *dict.fromkeys([*tiny.DECODERS, *tiny.OTHERS, *tiny.RECENT]),
    "qwen2-sliding",
    "qwen3-windows",
    *PLAIN,
]
JOINED = {"nemotron_h", "falcon-alibi"}


def model_of(name: str) -> Any:
    """A model of a family with random weights, in eval mode."""
    if name in PLAIN:
        architecture, changes = PLAIN[name]
        cls = getattr(transformers, architecture)
        config = cls.config_class(**{**tiny._SIZES[cls.config_class.model_type], **changes})
        return tiny.shake(cls(config).float()).eval()
    model_type, changes = tiny.VARIANTS.get(name, (name, {}))
    config = tiny.config_of(model_type, **changes)
    return tiny.shake(transformers.AutoModelForCausalLM.from_config(config).float()).eval()


def rows_of(model: Any) -> tuple[Tensor, Tensor]:
    """Random ids and the positions of the documents of `ROWS`."""
    size = (len(ROWS), sum(ROWS[0]))
    ids = torch.randint(3, model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ROWS])


@torch.no_grad()
def flashed(model: Any, inputs: dict[str, Any]) -> tuple[set[int], Tensor]:
    """The logits with flash attention, which is naive here, and how many sequences it was asked about."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = "flash_attention_2"
    with naive_flash.installed() as calls, packing.told(model, inputs) as given:
        logits = model(**given).logits
    model.config._attn_implementation = usual
    return {*calls}, logits


@torch.no_grad()
def distance(model: Any, ids: Tensor, packed: Tensor) -> float:
    """How far the logits of documents in rows are from those of each document alone."""
    furthest, beginning = 0.0, [0] * len(ROWS)
    for row, lengths in enumerate(ROWS):
        for length in lengths:
            place = slice(beginning[row], beginning[row] + length)
            alone = model(input_ids=ids[row : row + 1, place], use_cache=False).logits[0]
            furthest = max(furthest, float((packed[row, place] - alone).abs().max()))
            beginning[row] += length
    return furthest / float(packed.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_documents_in_a_row_are_those_alone(name):
    """A family that says that masks are not enough is right: a document then depends on others."""
    model = model_of(name)
    family = families.find(model.config.model_type)
    ids, positions = rows_of(model)
    carriers.install(model, carriers.layers_of(model, family, family.config(model.config.to_dict())))
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad(), packing.told(model, inputs) as given:
        packed = model(**given).logits
    joined = family.tells_apart(family.config(model.config.to_dict()), ids.shape[1])
    assert (joined is not None) == (name in JOINED)
    if joined is None:
        assert distance(model, ids, packed) < 1e-5
    if model._supports_flash_attn and model.config.model_type != "falcon":
        sequences, logits = flashed(model, inputs)
        assert (sequences == {sum(map(len, ROWS))}) == family.borders, "some layer has not seen the borders"
        assert (float((logits - packed).abs().max() / packed.abs().max()) < 1e-5) == family.borders
    plain = model(input_ids=ids, use_cache=False).logits
    assert float((plain - packed).detach().abs().max()) > (0 if name == "falcon-alibi" else 1e-2)


@pytest.mark.parametrize("kind", tiny_wrappers.KINDS)
def test_documents_within_a_multimodal_model_are_those_alone(kind):
    """Its masks are made, and its layers with a state run, in the text model within it."""
    found = tiny_wrappers.KINDS[kind]
    config = transformers.CONFIG_MAPPING[found.model_type](**found.config)
    model = tiny.shake(transformers.AutoModelForImageTextToText.from_config(config).float()).eval()
    text = model.config.text_config
    family = families.find(text.model_type)
    carriers.install(model, carriers.layers_of(model, family, family.config(text.to_dict())))
    ids, positions = rows_of(model.model.get_decoder())
    inputs = {"input_ids": ids.clamp(max=tiny_wrappers.IMAGE - 1), "position_ids": positions}
    with torch.no_grad(), packing.told(model, inputs | {"use_cache": False}) as given:
        packed = model(**given).logits
    assert distance(model, inputs["input_ids"], packed) < 1e-5
    plain = model(input_ids=inputs["input_ids"], use_cache=False).logits
    assert float((plain - packed).detach().abs().max()) > 1e-2


def test_layers_with_a_state_that_are_not_found_are_an_error():
    """They would mix documents in silence."""
    model = model_of("lfm2")
    family = families.find("lfm2")
    config = family.config(model.config.to_dict())
    assert len(carriers.layers_of(model, family, config)) == 2
    del model.model.layers[2].conv
    with pytest.raises(UpcycleError, match=r"has 2 layers that carry a state .* finds 1 of them"):
        carriers.layers_of(model, family, config)


def test_biases_of_falcon_are_rounded_by_the_place_in_the_row():
    """Why alibi is refused: at place 300, bfloat16 has no odd multiples of a slope."""
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 400, dtype=torch.long), 8, torch.float32)[0, 0]
    steps = alibi.diff()
    assert float(steps[:200].std()) < 1e-6
    assert float(steps[300:].std()) > 0.1 * float(steps[0])


@pytest.mark.parametrize("implementation", packing.MASKED[:2])
def test_masks_are_those_of_a_naive_loop(implementation):
    """Padding is a document of its own, and an attention mask changes nothing; windows go on."""
    model = model_of("mistral")
    model.set_attn_implementation(implementation)
    ids, positions = rows_of(model)
    seen: list[Tensor] = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
    mask = torch.ones_like(ids)
    mask[0, -10:] = 0
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
    with torch.no_grad(), packing.told(model, inputs) as given:
        model(**given)
    shown = seen[0][:, 0] if seen[0].dtype == torch.bool else seen[0][:, 0] == 0
    window = model.config.sliding_window
    for row, lengths in enumerate(ROWS):
        number = [i for i, length in enumerate(lengths) for _ in range(length)]
        for query in range(ids.shape[1]):
            for key in range(ids.shape[1]):
                sees = key <= query < key + window and number[query] == number[key]
                assert bool(shown[row, query, key]) == sees


def test_transformers_is_as_it_was_afterwards():
    """Also after an error, and rows without positions are one text."""
    model = model_of("llama")
    ids, positions = rows_of(model)
    before = dict(vars(transformers.masking_utils))
    plain = model(input_ids=ids, use_cache=False).logits
    with pytest.raises(ZeroDivisionError), packing.told(model, {"position_ids": positions}):
        1 / 0  # noqa: B018
    with packing.told(model, {"input_ids": ids}):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    assert vars(transformers.masking_utils) == before
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
