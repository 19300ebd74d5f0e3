"""Typed tables: ranges beside fields, tables whose name decides on their keys, and one file over another."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest

from upcycle import UpcycleError, settings
from upcycle.nn import routers
from upcycle.nn.balance import Balance
from upcycle.settings import Above, AtLeast, FileLayout, Finite, Named, Settings, Verbatim, Within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    section: ClassVar[str] = "outer.inner"

    depth: Annotated[int, AtLeast(1)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Settings):
    section: ClassVar[str] = "outer"

    count: Annotated[int, AtLeast(0)] | tuple[str, ...] = 0
    share: Annotated[float, Within("[0, 1)")] | None = None
    scale: Annotated[float, Above(0)] = 1.0
    means: tuple[Annotated[float, Finite()], ...] = ()
    sinks: tuple[Literal["a", "b"], ...] = ()
    cut: Annotated[str, Verbatim()] = ""
    inner: Inner = Inner()
    stages: tuple[Inner, ...] = ()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": -1}, "outer.count = -1; it must be 0 or more"),
        ({"share": 1.0}, "outer.share = 1.0; it must be in [0, 1)"),
        ({"share": NAN}, "outer.share = nan; it must be in [0, 1)"),
        ({"scale": 0.0}, "outer.scale = 0.0; it must be a number above 0"),
        ({"scale": INF}, "outer.scale = inf; it must be a number above 0"),
        ({"means": (0.5, NAN)}, "outer.means = [0.5, nan]; it must be a number that is finite"),
    ],
)
def test_a_range_holds_for_a_table_and_for_an_instance_alike(values, said):
    for make in (lambda: Outer(**values), lambda: settings.read(Outer, values, "outer")):
        with pytest.raises(UpcycleError) as error:
            make()
        assert str(error.value) == said


@pytest.mark.parametrize(
    "values",
    [{"count": ("x", "y")}, {"share": 0.0}, {"share": None}, {"means": (-1.0, 2.0)}, {"scale": 1e300}],
)
def test_what_lies_in_a_range(values):
    assert Outer(**values) == dataclasses.replace(Outer(), **values)


def test_the_bounds_of_an_interval():
    closed, opened = Within("[0, 1]"), Within("(0, 1)")
    assert [closed.holds(x) for x in (-0.1, 0.0, 0.5, 1.0, 1.1)] == [False, True, True, True, False]
    assert [opened.holds(x) for x in (0.0, 0.5, 1.0)] == [False, True, False]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"inner": {"depth": 0}}, "outer.inner.depth = 0; it must be 1 or more"),
        ({"stages": [{}, {"depth": 0}]}, "outer.stages[1].depth = 0; it must be 1 or more"),
        ({"stages": [{}, {"dept": 1}]}, "unknown key outer.stages[1].dept; did you mean depth?"),
        ({"stages": {"depth": 1}}, "[[outer.stages]] must be a list of sections"),
        ({"depth": 1}, "unknown key outer.depth; did you mean inner.depth?"),
        ({"sinks": ["c"]}, "outer.sinks = ['c']; allowed: a, b, in a list"),
        ({"count": 1.5}, "outer.count = 1.5; allowed: whole number or a list of strings"),
    ],
)
def test_an_error_says_where(table, said):
    with pytest.raises(UpcycleError) as error:
        settings.read(Outer, table, "outer")
    assert said in str(error.value)


def test_a_text_that_is_no_path_may_hold_anything():
    assert settings.read(Outer, {"cut": "\0"}, "outer").cut == "\0"


# --- a family of tables: a package that this test writes


FAMILY = """
from dataclasses import dataclass
from typing import Annotated, ClassVar

from upcycle.settings import AtLeast, Named

@dataclass(frozen=True, kw_only=True)
class Shape(Named):
    section: ClassVar[str] = "shape"
    package: ClassVar[str] = __name__
    usual: ClassVar[str | None] = "circle"
    common: ClassVar[tuple[str, ...]] = ("colour",)

    colour: str = "red"
"""
KIND = """
from dataclasses import dataclass
from typing import Annotated

from {family} import Shape
from upcycle.settings import AtLeast

@dataclass(frozen=True, kw_only=True)
class Kind(Shape):
    {key}: Annotated[int, AtLeast(1)] = 1

shape = Kind
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = f"shapes_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(FAMILY)
    for kind, key in (("circle", "radius"), ("square", "side")):
        (tmp_path / name / f"{kind}.py").write_text(KIND.format(family=name, key=key))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__(name).Shape
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]


def holder(family: type[Named]) -> type[Any]:
    fields: list[Any] = [
        ("shape", family, dataclasses.field(default_factory=lambda: family.find("circle")()))
    ]
    fields.append(("shapes", tuple[family, ...], ()))  # type: ignore[valid-type]
    return dataclasses.make_dataclass("Holder", fields, bases=(Settings,), frozen=True, kw_only=True)


def test_a_field_of_a_family_s_type_is_all_that_the_reader_needs(family):
    read: Callable[..., Any] = lambda table: settings.read(holder(family), table)  # noqa: E731
    assert read({}).shape.as_table() == {"name": "circle", "colour": "red", "radius": 1}
    square = read({"shape": {"name": "square", "side": 3}}).shape
    assert (square.name, square.side) == ("square", 3)
    assert [s.name for s in read({"shapes": [{"name": "square"}, {}]}).shapes] == ["square", "circle"]
    for table, said in (
        ({"shape": {"name": "squre"}}, "unknown shape squre; did you mean square? Known: circle, square"),
        ({"shape": {"name": "square", "radius": 3}}, "unknown key shape (square).radius"),
        ({"shape": {"name": "square", "side": 0}}, "shape.side = 0; it must be 1 or more"),
        ({"shape": {"name": "square"}, "side": 1}, "did you mean shape.side?"),
        ({"shape": {"name": 3}}, "shape 3 is no name; give one of circle, square"),
    ):
        with pytest.raises(UpcycleError) as error:
            read(table)
        assert said in str(error.value)


def test_a_name_that_changes_takes_its_keys_with_it(family, tmp_path):
    cls = holder(family)
    layout = FileLayout(named=settings.families(cls), shared={"shape": Inner})
    assert layout.named == {"shape": family}
    (tmp_path / "base.toml").write_text('shape = {name = "circle", radius = 2, colour = "blue", depth = 4}\n')
    (tmp_path / "over.toml").write_text('base = "base.toml"\nshape = {name = "square"}\n')
    wanted = {"shape": {"name": "square", "colour": "blue", "depth": 4}}
    assert settings.read_toml(tmp_path / "over.toml", "file", layout) == wanted
    base = settings.read_toml(tmp_path / "base.toml", "file", layout)
    assert settings.override(base, ["shape.name=square"], layout) == wanted
    assert settings.override(base, ["shape.name=circle"], layout) == base


def test_two_types_that_share_a_table():
    own, others = settings.parted({"jitter": 0.1, "std": 0.5, "layers": "sum"}, Balance)
    assert (own, others) == ({"jitter": 0.1, "layers": "sum"}, {"std": 0.5})


@pytest.mark.parametrize("name", routers.names())
def test_no_key_of_a_router_is_one_of_its_training(name):
    """They share [router] in a run file, so a key of both would be read by one alone."""
    assert not {*settings.keys(routers.find(name))} & {*settings.keys(Balance)}


def test_a_task_of_another_name_over_a_base(tmp_path):
    from upcycle.training.run import LAYOUT

    table = {"task": {"name": "span_corruption", "mean_span": 2.0}}
    changed = settings.override(table, ["task.name=causal_lm"], LAYOUT)
    assert changed == {"task": {"name": "causal_lm"}}


def test_settings_are_read_without_torch():
    code = "import sys, upcycle.training.run; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, upcycle.settings; assert 'numpy' not in sys.modules, 'numpy'"
    subprocess.run([sys.executable, "-c", code], check=True)
