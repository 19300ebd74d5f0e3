"""Upcycled models become known to transformers' Auto classes.

`register` adds names to transformers' registry of model types, and no more: no class is made, and no model
type that was there behaves otherwise. Classes are made when a config of ours is read for the first time.

`import upcycle` asks for it as soon as transformers' registry is imported (`upcycle/__init__.py`), because
nothing of ours runs between `AutoModel.from_pretrained` and the look into the registry.
"""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from upcycle import families
from upcycle.hf import configs
from upcycle.nn.upcycled_config import CLASS_PREFIX, PREFIX


def register() -> None:
    """Add the upcycled model types of all families that this transformers knows."""
    configs.when_first_read(_register_models)
    # Names and no classes: this runs while transformers is being imported, when its configs cannot be.
    for model_type in families.names():
        if model_type in CONFIG_MAPPING_NAMES:
            CONFIG_MAPPING._mapping[PREFIX + model_type] = CLASS_PREFIX + CONFIG_MAPPING_NAMES[model_type]
            CONFIG_MAPPING._modules[PREFIX + model_type] = configs


def _register_models(model_type: str) -> None:
    """Make the model classes known as well; only now, because torch takes seconds to import."""
    from upcycle.hf.models import register_models

    register_models(model_type)
