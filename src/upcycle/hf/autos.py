"""The Auto class that a user opens a checkpoint with."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

_FIRST = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


def auto_class(model_type: str, architecture: str) -> Any:
    """Return the Auto class that gives `architecture` for `model_type`, the best known one first.

    None if no Auto class knows it.
    """
    config = CONFIG_MAPPING[model_type]
    for auto in sorted(autos(), key=lambda a: (a.__name__ not in _FIRST, a.__name__)):
        if config in auto._model_mapping:
            made = auto._model_mapping[config]
            if architecture in [cls.__name__ for cls in (made if isinstance(made, tuple) else (made,))]:
                return auto
    return None


def knows(model_type: str) -> bool:
    """Return whether the Auto classes know a model_type."""
    return model_type in CONFIG_MAPPING


def autos() -> list[Any]:
    """Return transformers' Auto classes of models."""
    found = {
        name: auto
        for name, auto in vars(modeling_auto).items()
        if inspect.isclass(auto)
        and issubclass(auto, _BaseAutoModelClass)
        and getattr(auto, "_model_mapping", None) is not None
    }
    return list(found.values())
