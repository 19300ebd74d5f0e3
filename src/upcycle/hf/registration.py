"""Registers upcycled models with transformers' Auto classes.

`register` only adds names to transformers' registry of model types. It makes no class and does not change
existing model types. Classes are made when an upcycled config is first read.

`upcycle/__init__.py` calls it as soon as transformers' registry is imported, because no code of ours runs
between `AutoModel.from_pretrained` and the lookup in the registry.
"""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from upcycle.hf import configs
from upcycle.nn.upcycled_config import CLASS_PREFIX, PREFIX


def register() -> None:
    """Register the upcycled model types of all families that the installed transformers knows."""
    configs.when_first_read(_register_models)
    # Register names, not classes: this runs during transformers' import, when its configs cannot be imported.
    for model_type in configs.upcycled_types():
        if model_type in CONFIG_MAPPING_NAMES:
            CONFIG_MAPPING._mapping[PREFIX + model_type] = CLASS_PREFIX + CONFIG_MAPPING_NAMES[model_type]
            # transformers looks modules up with an underscore for each hyphen
            CONFIG_MAPPING._modules[(PREFIX + model_type).replace("-", "_")] = configs


def _register_models(model_type: str) -> None:
    """Register classes of models and readers too. This is done late because torch takes seconds to import."""
    from upcycle.hf.models import register_models
    from upcycle.hf.readers import register_readers

    register_models(model_type)
    register_readers(model_type)
