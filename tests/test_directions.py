"""Which room of the house may import which, as data; and that no import, wherever it stands, closes a circle.

A room is the first folder, or file, below `src/upcycle`. It may import rooms of lower floors. Imports that
are there for the type checker alone do not count; imports inside functions do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import upcycle

ROOT = Path(upcycle.__file__).parent

# From the roof to the ground. Rooms of one floor do not import each other.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"demo"},
    {"api"},
    {"advice", "calibration", "reporting", "translation", "verification"},
    {"evaluation", "inspection"},
    {"training"},
    {"loading", "tasks"},
    {"conversion", "data", "forecast", "hf"},
    {"blueprints"},
    {"targets"},
    {"dense"},
    {"recipe"},
    {"init", "nn"},
    {"families"},
    {"settings"},
    {"registry"},
    {"records", "sharding", "tensors"},
    {"checkpoints"},
    {"system"},
    {"errors"},
)
# What goes up all the same, and why. A line that is no longer needed must go.
UPWARDS = {
    ("dense", "targets"): "natives say how a source that has experts is read, and which one is refused",
    ("nn", "hf"): "experts run through transformers' implementations",
}
# Circles of modules that are known and not yet broken. A line that is no longer needed must go.
CIRCLES: tuple[set[str], ...] = ()

# The rooms that a conversion walks through. They and the command line load without these libraries.
OF_MODELS = {"torch", "transformers", "accelerate", "safetensors", "tokenizers"}
WITHOUT_MODELS = {
    "__main__", "advice", "api", "blueprints", "checkpoints", "cli", "conversion", "dense", "errors",
    "families", "forecast", "init", "inspection", "recipe", "records", "registry", "reporting", "settings",
    "sharding", "system", "targets", "tasks", "tensors", "translation", "verification",
}  # fmt: skip
# Modules of transformers that any room may import; what lies deeper is for the room `hf`.
PUBLIC = {"transformers", "transformers.distributed"}
# The only rooms that may draw: progress bars, tables, colours.
DRAWING = {"cli"}


@dataclass(frozen=True)
class Import:
    """One import: who, what, and whether it runs when the module is loaded."""

    module: str
    name: str
    when_loaded: bool


@cache
def modules() -> dict[str, Path]:
    """The files of the package by the names of their modules."""
    return {
        ".".join(("upcycle", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }


@cache
def imports() -> tuple[Import, ...]:
    """Every import of the package that is not for the type checker alone."""
    return tuple(
        Import(module, name, when_loaded)
        for module, path in modules().items()
        for name, when_loaded in _imports(ast.parse(path.read_text()), when_loaded=True)
    )


def _imports(node: ast.AST, *, when_loaded: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, when_loaded) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are written in full"
            yield from ((f"{child.module}.{alias.name}", when_loaded) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from _imports(other, when_loaded=when_loaded)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, when_loaded=when_loaded and not inside)


def module_of(name: str) -> str:
    """The module that an imported name is, or lies in."""
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> str:
    """The room that a module lies in; the package itself is none."""
    return [*module.split("."), ""][1]


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """Who imports whom, of our modules. The package itself is left out: every import of a module loads it."""
    found = {(i.module, module_of(i.name)) for i in imports() if i.name.partition(".")[0] == "upcycle"}
    return frozenset((a, b) for a, b in found if "upcycle" not in (a, b) and a != b)


def doors() -> dict[tuple[str, str], list[str]]:
    """Who imports whom, of the rooms, with the modules."""
    found: dict[tuple[str, str], list[str]] = {}
    for a, b in sorted(arrows()):
        if room_of(a) != room_of(b):
            found.setdefault((room_of(a), room_of(b)), []).append(f"{a} imports {b}")
    return found


def test_the_page_draws_the_same_floors() -> None:
    """docs/architecture.md shows the floors, and a table says what each room knows."""
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    drawn = page.partition("```text\n")[2].partition("```")[0].splitlines()
    assert [set(floor.split()) for floor in drawn] == [set(floor) for floor in FLOORS]
    told = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert told == set().union(*FLOORS) - {"__main__"}


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in modules()} - {""}
    assert rooms == set().union(*FLOORS)
    assert len(rooms) == sum(map(len, FLOORS)), "a room stands on two floors"


def test_rooms_import_downwards():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    up = {pair: said for pair, said in doors().items() if floor[pair[0]] >= floor[pair[1]]}
    assert {pair: said for pair, said in up.items() if pair not in UPWARDS} == {}
    assert set(UPWARDS) <= set(up), "an exception that is no longer needed"


def test_no_import_closes_a_circle():
    """Imports inside functions count: none is there to break a circle."""
    after: dict[str, set[str]] = {}
    for a, b in arrows():
        after.setdefault(a, set()).add(b)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            left += (new := after.get(left.pop(), set()) - seen)
            seen |= new
        return seen

    reach = {module: reached(module) for module in modules()}
    circles = {frozenset(m for m in reach[a] if a in reach[m]) for a in modules() if a in reach[a]}
    assert circles == set(map(frozenset, CIRCLES))


def test_the_package_itself_imports_next_to_nothing():
    own = {i.name for i in imports() if i.module == "upcycle" and i.when_loaded}
    assert own == {
        "importlib.import_module",
        "typing.TYPE_CHECKING",
        "typing.Any",
        "upcycle.system.first_import.after_import",
    }


def test_a_conversion_loads_no_library_of_models():
    heavy = [i for i in imports() if i.when_loaded and i.name.partition(".")[0] in OF_MODELS]
    assert [i for i in heavy if room_of(i.module) in WITHOUT_MODELS] == []
    loaded = {i.module for i in heavy}
    for room in WITHOUT_MODELS:  # nor by way of another room
        for module in filter(lambda m: room_of(m) == room, modules()):
            assert not _loads(module) & loaded, module


def _loads(module: str) -> set[str]:
    """The modules that are loaded when `module` is, packages included."""
    seen: set[str] = set()
    left = [module]
    while left:
        one = left.pop()
        if one in seen:
            continue
        seen.add(one)
        names = [i.name for i in imports() if i.module == one and i.when_loaded]
        left += [module_of(name) for name in names if name.partition(".")[0] == "upcycle"]
        if "." in one:
            left.append(one.rpartition(".")[0])
    return seen


def test_the_insides_of_transformers_are_for_one_room():
    deep = [
        i
        for i in imports()
        if i.name.startswith("transformers.")
        and room_of(i.module) != "hf"
        and i.name.rpartition(".")[0] not in PUBLIC
    ]
    assert deep == []


@pytest.mark.parametrize(
    "private",
    ["_weight_conversions", "HF_DEACTIVATE", "CONFIG_MAPPING", "_can_record_outputs", "_BaseAutoModelClass"],
)
def test_private_names_of_transformers_are_for_one_room(private):
    assert [m for m, path in modules().items() if private in path.read_text() and room_of(m) != "hf"] == []


def test_the_library_does_not_draw():
    drawing = [
        i
        for i in imports()
        if i.name.partition(".")[0] in ("rich", "tqdm", "tyro") and room_of(i.module) not in DRAWING
    ]
    assert drawing == []
    for module, path in modules().items():
        if room_of(module) not in DRAWING:
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], module
