"""Turn a trained dense checkpoint into a Mixture of Experts, and prove it."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from upcycle.hf.announce import announce

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import blueprint
    from upcycle.blueprints.cost import plan
    from upcycle.conversion.write import convert
    from upcycle.errors import UpcycleError
    from upcycle.hf.models import open
    from upcycle.loading import load
    from upcycle.recipe import Recipe
    from upcycle.training.export import export
    from upcycle.training.loop import train
    from upcycle.verification import verify

__version__ = version("upcycle")
__all__ = [
    "Recipe", "UpcycleError", "blueprint", "convert", "export", "load", "open", "plan", "train", "verify",
]  # fmt: skip

_HOMES = {
    "Recipe": "recipe",
    "UpcycleError": "errors",
    "blueprint": "blueprints.blueprint",
    "convert": "conversion.write",
    "export": "training.export",
    "load": "loading",
    "open": "hf.models",
    "plan": "blueprints.cost",
    "train": "training.loop",
    "verify": "verification",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is used: `upcycle --help` must not wait for numpy.
    if name not in _HOMES:
        raise AttributeError(f"module 'upcycle' has no attribute {name!r}")
    return getattr(import_module(f"upcycle.{_HOMES[name]}"), name)


announce()  # AutoModel*.from_pretrained opens what upcycle wrote
