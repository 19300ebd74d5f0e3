"""Tokenizers and processors of the dense model types, registered for their upcycled twins.

Many folders do not name the class of their tokenizer or processor. transformers then goes by the model type,
and so it must know ours.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    processing_auto,
    tokenization_auto,
)

from upcycle.hf.configs import config_class
from upcycle.nn.upcycled_config import PREFIX


def register_readers(model_type: str) -> None:
    """Register whatever reads the inputs of the dense `model_type` for its upcycled twin."""
    dense, made = CONFIG_MAPPING[model_type], config_class(model_type)
    for mapping in _mappings():
        if dense in mapping:
            mapping.register(made, mapping[dense], exist_ok=True)
    # AutoTokenizer also looks into these two by name, before it looks at the class of the config.
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if model_type in names:
        names[PREFIX + model_type] = names[model_type]
    if model_type in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(PREFIX + model_type)


def _mappings() -> tuple[Any, ...]:
    return (
        tokenization_auto.TOKENIZER_MAPPING,
        image_processing_auto.IMAGE_PROCESSOR_MAPPING,
        feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
        processing_auto.PROCESSOR_MAPPING,
    )
