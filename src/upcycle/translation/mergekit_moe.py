"""A configuration of mergekit-moe (0.1.5) as a recipe, with what cannot be translated in sentences.

What its keys mean was read in its source (mergekit/moe/config.py, router.py, common.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from upcycle.checkpoints.header import refuse_special
from upcycle.errors import UpcycleError, listed, shown
from upcycle.nn.router_starts._measured import Measured
from upcycle.recipe import Recipe
from upcycle.settings import AtLeast, Settings, keys, read, table_at, writing
from upcycle.system.wording import quoted
from upcycle.translation import _base, _target

STATISTICS = "statistics.safetensors"  # what `upcycle calibrate` writes and the router's start reads
PROMPTS = "prompts.toml"
_TARGETS = {
    "mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe",
}  # fmt: skip
_DTYPES = ("float32", "bfloat16", "float16")
_NUMBERS = {"noise_scale": float, "residual_scale": float, "experts_per_token": int}
# How a router starts in each mode, and what `calibrate` has to collect for it.
_STARTS: dict[str, dict[str, Any]] = {
    "hidden": {"name": "mergekit_hidden"},
    "hidden_last": {"name": "mergekit_hidden"},
    "hidden_avg": {"name": "mergekit_hidden", "average": True},
    "cheap_embed": {"name": "cheap_embed"},
}


@dataclass(frozen=True, kw_only=True)
class _Expert(Settings):
    """An expert as mergekit-moe describes it."""

    section: ClassVar[str] = "experts"

    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: Annotated[float, AtLeast(0)] = 0.0
    residual_scale: float = 1.0

    @property
    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.positive_prompts, self.negative_prompts


@dataclass(frozen=True, kw_only=True)
class _Config(Settings):
    """A configuration of mergekit-moe."""

    base_model: str
    experts: tuple[_Expert, ...]
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = (
        "hidden"
    )
    dtype: str = ""
    experts_per_token: Annotated[int, AtLeast(1)] = 2
    shared_experts: tuple[_Expert, ...] = ()
    architecture: str = ""


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A recipe in place of a foreign configuration, for the checkpoint `source`.

    `prompts` is the table of the file that `upcycle calibrate --prompts` reads, and is empty if the router
    needs none. `remarks` has what is not translated, or means something else here, one sentence each.
    """

    source: str
    table: Mapping[str, Any]
    prompts: Mapping[str, Any]
    remarks: tuple[str, ...]

    @property
    def collect(self) -> str:
        """The statistics that `upcycle calibrate` has to collect for the router; empty if none."""
        start = Recipe.of(self.table).router.start
        return start.collect if isinstance(start, Measured) else ""

    def commands(self, recipe: str, prompts: str = PROMPTS) -> tuple[str, ...]:
        """Return the commands that make the model, for the names of the two files."""
        found = []
        if self.prompts:
            found.append(
                f"upcycle calibrate {quoted(self.source)} --prompts {quoted(prompts)} "
                f"--collect {self.collect} --out {STATISTICS}"
            )
        return (*found, f"upcycle convert {quoted(self.source)} OUT --recipe {quoted(recipe)}")

    def recipe_text(self, recipe: str, prompts: str = PROMPTS) -> str:
        """Return the recipe as a TOML file, with the commands above it."""
        return writing.text(self.table, [f"# {line}" for line in self.commands(recipe, prompts)])

    @property
    def prompts_text(self) -> str:
        """The prompts as a TOML file."""
        return writing.text(self.prompts)

    def as_dict(self) -> dict[str, Any]:
        """Return the translation as JSON."""
        return {
            "source": self.source,
            "recipe": dict(self.table),
            "prompts": dict(self.prompts),
            "remarks": list(self.remarks),
        }


def translate(path: str | Path) -> Translation:
    """Translate a configuration of mergekit-moe, a YAML file.

    Raises `UpcycleError` for a file that is none, and for one that mergekit-moe itself would refuse.
    """
    config, remarks = _read(Path(path))
    base = source, adapter = _parts(config.base_model)
    if adapter:
        remarks.append(
            f"base_model has an adapter ({adapter}): merge it into {source} first (merge_and_unload of "
            f"peft), and name the merged folder in place of {source} in the commands"
        )
    _refuse_prompts(config)
    experts = [_expert(number, expert, base, remarks) for number, expert in enumerate(config.experts)]
    table = {
        **_dtype(config, remarks),
        "moe": {
            "num_experts": len(experts),
            "top_k": config.experts_per_token,
            **_moe(config, source, remarks),
        },
        "init": {"name": "experts", "backbone": "base", "expert": experts},
    }
    table["router"] = _router(config, source, remarks)
    Recipe.of(table)  # refuses what no recipe can be
    prompts = _prompts(config) if config.gate_mode in _STARTS else {}
    return Translation(source=source, table=table, prompts=prompts, remarks=tuple(remarks))


def _read(path: Path) -> tuple[_Config, list[str]]:
    """Return the configuration in a file, and remarks on keys that mergekit-moe does not read."""
    import yaml

    refuse_special(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UpcycleError(f"no configuration at {path}") from None
    except OSError as error:
        raise UpcycleError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split()) or "it is nested too deeply"
        raise UpcycleError(f"{path} is not YAML: {said}") from None
    if not isinstance(raw, Mapping):
        raise UpcycleError(f"{path} holds {shown(raw)}, not the keys of a configuration of mergekit-moe")
    if "merge_method" in raw or "models" in raw or "slices" in raw:
        raise UpcycleError(
            f"{path} mixes weights into one dense model (mergekit-yaml); only configurations of mergekit-moe "
            f"are translated, which have base_model and experts"
        )
    unread: set[str] = set()
    table = _known(raw, _Config, "", unread)
    for key in ("experts", "shared_experts"):
        if isinstance(rows := table.get(key), list):
            table[key] = [
                _known(table_at(r, f"{key}[{i}]"), _Expert, f"{key}.", unread) for i, r in enumerate(rows)
            ]
    remarks = (
        [f"mergekit-moe does not read {listed(sorted(unread))}, and nothing is made of it"] if unread else []
    )
    return read(_Config, table), remarks


def _known(raw: Mapping[Any, Any], cls: type, at: str, unread: set[str]) -> dict[str, Any]:
    """Return the keys of a table that mergekit-moe reads, without nulls; models are written as text.

    YAML reads `1e-3` as text, and mergekit-moe takes it for the number.
    """
    unread |= {f"{at}{key}" for key in raw if key not in keys(cls)}
    found = {key: value for key, value in raw.items() if key in keys(cls) and value is not None}
    for key, number in _NUMBERS.items():
        if isinstance(given := found.get(key), str):
            with suppress(ValueError):
                found[key] = number(given)
    for key in ("base_model", "source_model"):
        if isinstance(found.get(key), Mapping):
            found[key] = _as_text(found[key], f"{at}{key}")
    return found


def _as_text(model: Mapping[str, Any], where: str) -> str:
    """Return a model that is written as a table in the form PATH@REVISION+ADAPTER."""

    def one(given: Any) -> str:
        if not isinstance(given, Mapping):
            return str(given)
        revision = given.get("revision")
        return f"{given.get('path', '')}{f'@{revision}' if revision else ''}"

    if not model.get("model"):
        raise UpcycleError(f"{where} = {shown(dict(model))}; it must be a text, or a table with `model`")
    adapter = model.get("lora")
    return one(model["model"]) + (f"+{one(adapter)}" if adapter else "")


def _parts(model: str) -> tuple[str, str]:
    """Return checkpoint and adapter of a model."""
    checkpoint, _, adapter = model.partition("+")
    return checkpoint.strip(), adapter.strip()


def _refuse_prompts(config: _Config) -> None:
    """Refuse prompts from which no router can be made, as mergekit-moe does."""
    if config.gate_mode not in _STARTS:
        return
    for number, expert in enumerate(config.experts):
        if not any(prompt.strip() for prompt in expert.positive_prompts):
            raise UpcycleError(
                f"experts[{number}] has no positive_prompts, of which gate_mode {config.gate_mode} makes its "
                f"router; give some, or take gate_mode random"
            )
    if len(config.experts) > 1 and len({expert.prompts for expert in config.experts}) == 1:
        raise UpcycleError(
            "all experts have the same prompts, so that no router can tell them apart; give each its own, or "
            "take gate_mode random"
        )


def _expert(number: int, expert: _Expert, base: tuple[str, str], remarks: list[str]) -> dict[str, Any]:
    """Return the table of an expert. `base` has checkpoint and adapter of the base model, to be merged."""
    own = checkpoint, adapter = _parts(expert.source_model)
    table: dict[str, Any] = {}
    if checkpoint != base[0] or (base[1] and own != base):
        table["source"] = checkpoint
    if adapter and own != base:
        table["adapter"] = adapter
    if expert.noise_scale:
        table |= {"noise": expert.noise_scale, "noise_relative": False}
    if expert.residual_scale > 0:
        return table | ({"residual_scale": expert.residual_scale} if expert.residual_scale != 1 else {})
    remarks.append(
        f"experts[{number}].residual_scale = {expert.residual_scale:g} is left out: a factor must be above 0"
    )
    return table


def _dtype(config: _Config, remarks: list[str]) -> dict[str, Any]:
    wanted = config.dtype.removeprefix("torch.")
    if wanted in _DTYPES:
        return {"dtype": wanted}
    if wanted:
        remarks.append(f"dtype = {shown(config.dtype)} is none of {', '.join(_DTYPES)}: the source's is kept")
    return {}


def _moe(config: _Config, source: str, remarks: list[str]) -> dict[str, Any]:
    """Return the target and the shared expert."""
    target, said = _target.chosen(source, _asked(config, remarks), shared=bool(config.shared_experts))
    remarks += said
    table: dict[str, Any] = {"target": target} if target else {}
    if config.shared_experts:
        table["shared_experts"] = 1
        remarks.append(
            "shared_experts: the shared expert here is the network of the backbone, and it and the experts "
            "count half each, so that copies keep the function; other models, scales, noise and prompts of a "
            "shared expert are left out"
        )
    return table


def _asked(config: _Config, remarks: list[str]) -> str:
    """Return the native target that `architecture` names; empty if it names none."""
    wanted = config.architecture.lower().replace(" ", "").replace("moe", "").replace("_", "")
    if config.architecture and wanted not in _TARGETS:
        remarks.append(
            f"architecture = {shown(config.architecture)} has no target here, so it is left out (`upcycle "
            f"list` prints those that are here)"
        )
    return _TARGETS.get(wanted, "")


def _router(config: _Config, source: str, remarks: list[str]) -> dict[str, Any]:
    """Return how the router starts."""
    if config.gate_mode in _STARTS:
        if config.gate_mode != "cheap_embed":
            remarks.append(
                f"gate_mode {config.gate_mode} compares another vector than a router reads; "
                f'router.init.name = "prompts" (upcycle calibrate --collect mean) takes the one that it reads'
            )
        return {"init": {**_STARTS[config.gate_mode], "statistics": STATISTICS}}
    if config.gate_mode == "random":
        return {"init": "normal", "std": 1.0}
    if hidden := _base.hidden_size(source):
        return {"init": "uniform", "std": round(1 / math.sqrt(3 * hidden), 9)}
    remarks.append(
        f"gate_mode uniform_random draws from +-1 / sqrt(H), and {source} is no folder here that says H: set "
        f"router.std to 1 / sqrt(3 H)"
    )
    return {"init": "uniform"}


def _prompts(config: _Config) -> dict[str, Any]:
    """Return the table of a file of prompts: a domain for each expert, in their order."""
    domains = []
    for number, expert in enumerate(config.experts):
        name = f"expert_{number}"
        domain: dict[str, Any] = {"name": name, "positive_prompts": list(expert.positive_prompts)}
        if expert.negative_prompts:
            domain["negative_prompts"] = list(expert.negative_prompts)
        domains.append(domain)
    return {"domain": domains}
