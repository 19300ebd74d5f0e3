"""Turn a trained dense checkpoint into a Mixture of Experts, and prove it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from upcycle.system.first_import import after_import

if TYPE_CHECKING:
    from upcycle.api.advice import advise
    from upcycle.api.calibration import calibrate
    from upcycle.api.evaluation import evaluate
    from upcycle.api.forecasting import foretell
    from upcycle.api.inspection import inspect
    from upcycle.api.reporting import report
    from upcycle.api.training import train
    from upcycle.api.translating import translate
    from upcycle.blueprints.cost import plan
    from upcycle.blueprints.making import blueprint
    from upcycle.conversion.gguf import gguf
    from upcycle.conversion.write import convert
    from upcycle.errors import UpcycleError
    from upcycle.hf.models import open
    from upcycle.loading import load
    from upcycle.recipe import Recipe
    from upcycle.system.progress import Progress
    from upcycle.training.export import export
    from upcycle.verification import verify

    __version__: str

__all__ = [
    "Progress", "Recipe", "UpcycleError", "advise", "blueprint", "calibrate", "convert", "evaluate", "export",
    "foretell", "gguf", "inspect", "load", "open", "plan", "report", "train", "translate", "verify",
]  # fmt: skip

_HOMES = {
    "Progress": "system.progress",
    "Recipe": "recipe",
    "UpcycleError": "errors",
    "advise": "api.advice",
    "blueprint": "blueprints.making",
    "calibrate": "api.calibration",
    "convert": "conversion.write",
    "evaluate": "api.evaluation",
    "export": "training.export",
    "foretell": "api.forecasting",
    "gguf": "conversion.gguf",
    "inspect": "api.inspection",
    "load": "loading",
    "open": "hf.models",
    "plan": "blueprints.cost",
    "report": "api.reporting",
    "train": "api.training",
    "translate": "api.translating",
    "verify": "verification",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is used: `upcycle --help` must not wait for numpy.
    if name == "__version__":
        from importlib.metadata import version

        return version("upcycle")
    if name not in _HOMES:
        raise AttributeError(f"module 'upcycle' has no attribute {name!r}")
    from upcycle.system.needed import said_if_missing

    with said_if_missing():
        return getattr(import_module(f"upcycle.{_HOMES[name]}"), name)


def _register() -> None:
    """Let AutoModel*.from_pretrained open what upcycle wrote, unless transformers is too old for it."""
    from upcycle.errors import UpcycleError

    try:
        from upcycle.hf import registration
    except UpcycleError as error:
        from upcycle.system import progress

        progress.warn(str(error))
    else:
        registration.register()


after_import("transformers.models.auto.configuration_auto", _register)
