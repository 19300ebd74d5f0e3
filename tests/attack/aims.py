"""Every file that upcycle reads, as a target: whole inputs that damage starts from, and what reads them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
from mutations import Mutation
from trial import Start, Target
from workshop import GLUE, HUB, MOE, SHARD, WORDS, Workshop

import tiny
from files import digests, toml
from upcycle import cli, families
from upcycle.api.training import refuse_what_cannot_begin
from upcycle.blueprints import cost
from upcycle.calibration.calibration import calibrate
from upcycle.cli.options import RecipeOptions
from upcycle.conversion.journal import JOURNAL
from upcycle.conversion.write import convert
from upcycle.data import corpus
from upcycle.data.documents import Source, documents
from upcycle.data.images import ImageSet
from upcycle.data.texts import TextSet
from upcycle.evaluation import results, superglue, task_files
from upcycle.hf import models
from upcycle.inspection import inspect
from upcycle.recipe import Recipe, of_run_file, read_toml
from upcycle.records.evaluation import EvaluationRecord
from upcycle.records.provenance import Provenance
from upcycle.records.statistics import Statistics
from upcycle.reporting import report, sections
from upcycle.reporting.starts import DenseCost
from upcycle.reporting.study import study
from upcycle.training.export import export
from upcycle.training.loop import train
from upcycle.training.run import Run
from upcycle.translation import mergekit_moe
from upcycle.verification import verify

ENCODERS = {
    "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification", "dinov2": "Dinov2Model",
    "convnext": "ConvNextForImageClassification", "convnextv2": "ConvNextV2Model", "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration", "dinov3_vit": "DINOv3ViTModel",
}  # fmt: skip
MARKS = (
    "pad_token_id",
    "cls_token_id",
    "sep_token_id",
)  # tokens whose numbers a class fixes beyond a tiny vocabulary
SMALL = {"num_experts": 2, "top_k": 1, "target": "upcycled"}

MERGEKIT = """\
base_model: {model: {path: owner/base, revision: main}}
gate_mode: hidden
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: owner/base
    positive_prompts: ["one", "two"]
  - source_model: owner/other+owner/adapter
    positive_prompts:
      - three
    negative_prompts: [four]
    noise_scale: 0.01
    residual_scale: 0.5
shared_experts: [{source_model: owner/base}]
"""

Read = Callable[[], object]


@dataclass(frozen=True)
class Aim:
    """A target that is made when it is called."""

    name: str
    mutate: Mutation
    cases: int
    starts: tuple[Callable[[], Start], ...]

    def __call__(self) -> Target:
        return Target(self.name, self.mutate, [start() for start in self.starts], self.cases)


def targets(shop: Workshop) -> dict[str, Aim]:
    """Every target by name: none is made before it is asked for."""
    known: dict[str, Aim] = {}

    def add(name: str, mutate: Mutation, cases: int, *starts: Callable[[], Start]) -> None:
        known[name] = Aim(name, mutate, cases, starts)

    def of(name: str) -> Path:
        """A folder of its own for what a target changes."""
        return shop.folder / "changed" / name

    # --- the dense checkpoint

    def weights_planned() -> Start:
        folder = shop.copied(shop.dense, "changed/weights")
        return _file(folder / "model.safetensors", lambda: cost.plan(folder, MOE))

    def weights_converted() -> Start:
        folder = shop.copied(shop.dense, "changed/weights-converted")
        return _file(folder / "model.safetensors", lambda: _converted(folder, of("weights-out")))

    add("weights: plan", mutations.any_tensors, 400, weights_planned)
    add("weights: convert", mutations.any_tensors, 30, weights_converted)

    def index() -> Start:
        folder = shop.copied(shop.sharded, "changed/index")
        return _file(folder / "model.safetensors.index.json", lambda: cost.plan(folder, MOE))

    add("index: plan", mutations.any_json, 150, index)

    def config_of(model_type: str) -> Callable[[], Start]:
        def start() -> Start:
            folder = of(f"config-{model_type}")
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            tiny.make_headers(folder, small_config(model_type), "F32")
            has_native = bool(families.find(model_type).natives)
            recipe = {"moe": {"num_experts": 2, "top_k": 1} if has_native else SMALL}
            return _file(folder / "config.json", lambda: cost.plan(folder, recipe))

        return start

    add("config.json: plan", mutations.any_json, 500, *map(config_of, families.names()))

    def config_advised() -> Start:
        folder = of("config-llama-advised")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        tiny.make_headers(folder, small_config("llama"), "F32")
        return _file(folder / "config.json", _command("advise", folder, "--tokens", "1B"))

    add("config.json: advise", mutations.any_json, 20, config_advised)

    def config_converted() -> Start:
        folder = shop.copied(shop.dense, "changed/config-converted")
        return _file(folder / "config.json", lambda: _converted(folder, of("config-out")))

    add("config.json: convert", mutations.any_json, 40, config_converted)

    def beside(name: str) -> Callable[[], Start]:
        def start() -> Start:
            folder = shop.copied(shop.dense, f"changed/{name}")
            read = lambda: _tokenised(folder, shop.text, shop.place("changed/tokens"))  # noqa: E731
            return _file(folder / name, read)

        return start

    add(
        "tokenizer: prepare",
        mutations.any_json,
        100,
        *map(beside, ("tokenizer.json", "tokenizer_config.json")),
    )

    def adapted(name: str) -> Callable[[], Start]:
        def start() -> Start:
            place = of(f"adapter of {name}")
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            folder = tiny.make_adapter(place, shop.dense, rank_pattern={"up_proj": 4}, init_lora_weights=True)
            tables = [{}, {"adapter": str(folder)}]
            recipe = {"moe": {"num_experts": 2}, "init": {"name": "experts", "expert": tables}}
            return _file(folder / name, lambda: cost.plan(shop.dense, recipe))

        return start

    add("adapter_config.json: plan", mutations.any_json, 150, adapted("adapter_config.json"))
    add("adapter_model.safetensors: plan", mutations.any_tensors, 60, adapted("adapter_model.safetensors"))

    # --- what a person writes

    def foreign() -> Start:
        path = shop.place("changed/mergekit") / "mergekit.yaml"
        path.write_text(MERGEKIT)
        return _file(path, lambda: mergekit_moe.translate(path))

    add("mergekit.yaml: recipe", mutations.any_lines, 60, foreign)
    add("mergekit.yaml as bytes: recipe", mutations.any_bytes, 60, foreign)

    def recipe_of(text: str, number: int) -> Callable[[], Start]:
        def start() -> Start:
            path = shop.place(f"changed/recipe-{number}") / "recipe.toml"
            path.write_text(text.replace("FILE", str(shop.statistics)))
            read = lambda: cost.plan(shop.dense, Recipe.of(of_run_file(read_toml(path))))  # noqa: E731
            return _file(path, read)

        return start

    add("recipe", mutations.any_toml, 300, *(recipe_of(text, i) for i, text in enumerate(RECIPES)))

    def setting(line: str) -> Callable[[], Start]:
        *before, last = line.split()
        return lambda: Start(last.encode(), lambda data: _set(shop.dense, before, data))

    add("--set", mutations.any_setting, 500, *map(setting, SETTINGS))

    def on_the_line() -> Start:
        def run(data: bytes) -> None:
            cli.main(["plan", str(shop.dense), "--set", data.decode("utf-8", "surrogateescape")])

        return Start(b"moe.num_experts=4", run)

    add("command line", mutations.any_setting, 30, on_the_line)

    def run_file(number: int) -> Callable[[], Start]:
        def start() -> Start:
            path = shop.place(f"changed/run-file-{number}") / "run.toml"
            path.write_text(toml({**shop.table(of("nowhere")), **RUNS[number]}))
            return _file(path, lambda: refuse_what_cannot_begin(Run.load(path)))

        return start

    add("run file", mutations.any_toml, 300, *map(run_file, range(len(RUNS))))

    # --- what upcycle wrote: a conversion

    def half_converted(name: str, mutate: Mutation, cases: int) -> None:
        def start() -> Start:
            whole = shop.place("whole") / "out"
            convert(shop.dense, whole, MOE, shard_size=SHARD)
            right, file = digests(whole), next(iter(sorted(shop.partial.glob(name)))).name

            def run(data: bytes) -> None:
                out = of("resumed")
                shutil.rmtree(out, ignore_errors=True)
                partial = shop.copied(shop.partial, "changed/resumed.partial")
                (partial / file).write_bytes(data)
                convert(shop.dense, out, MOE, shard_size=SHARD, resume=True)
                assert digests(out) == right, "a resumed conversion has other bytes"

            return Start((shop.partial / file).read_bytes(), run)

        add(f"{name} of OUT.partial: convert --resume", mutate, cases, start)

    half_converted(JOURNAL, mutations.any_lines, 25)
    half_converted("model-00001-*", mutations.any_bytes, 10)

    def made(name: str, read: Callable[[Path], object], folder: str = "out") -> Callable[[], Start]:
        def start() -> Start:
            source: Path = getattr(shop, folder)
            copy = shop.copied(source, f"changed/{folder} {name} {read.__name__}")
            file = next(iter(sorted(copy.glob(name))))
            return _file(file, lambda: read(copy))

        return start

    def inspected(folder: Path) -> None:
        inspect(folder)

    def shown(folder: Path) -> None:
        cli.main(["inspect", str(folder)])

    def proved(folder: Path) -> None:
        proof = verify(shop.dense, folder, logits=False)
        assert not proof.holds or _means_the_same(folder, shop.out), "verify holds for what is changed"

    def opened(folder: Path) -> None:
        models.open(folder)

    def read_back(folder: Path) -> None:
        Provenance.read(folder)

    add("upcycle.json: read", mutations.any_json, 500, made(Provenance.FILE, read_back))
    add("upcycle.json: inspect", mutations.any_json, 80, made(Provenance.FILE, inspected),
        made(Provenance.FILE, shown), made(Provenance.FILE, shown, "exported"))  # fmt: skip
    add("upcycle.json: verify", mutations.any_json, 40, made(Provenance.FILE, proved))
    add("MoE config.json: inspect", mutations.any_json, 150, made("config.json", inspected),
        made("config.json", inspected, "upcycled"), made("config.json", shown, "upcycled"))  # fmt: skip
    add("MoE config.json: verify", mutations.any_json, 40, made("config.json", proved))
    add("MoE config.json: open", mutations.any_json, 60, made("config.json", opened),
        made("config.json", opened, "upcycled"))  # fmt: skip
    add("MoE weights: inspect", mutations.any_tensors, 200, made("model-00001-*", inspected),
        made("model.safetensors", inspected, "upcycled"))  # fmt: skip
    add("MoE weights: verify", mutations.any_tensors, 40, made("model-00001-*", proved))

    # --- what upcycle wrote: a run

    def reported(part: int, name: str) -> Callable[[], Start]:
        def start() -> Start:
            folders = [
                shop.copied(folder, f"changed/report {name} {i}") for i, folder in enumerate(shop.reported)
            ]
            return _file(folders[part] / name, lambda: _told(folders))

        return start

    for part, name, mutate, cases in (
        (0, "run.json", mutations.any_json, 150),
        (0, "metrics.jsonl", mutations.any_lines, 150),
        (1, "upcycle.json", mutations.any_json, 100),
        (1, "eval.json", mutations.any_json, 150),
        (1, "routing.json", mutations.any_json, 100),
    ):
        add(f"{name}: report", mutate, cases, reported(part, name))

    def page() -> list[Callable[[], Start]]:
        def start(part: int, name: str) -> Start:
            folders = [
                shop.copied(folder, f"changed/page {name} {i}") for i, folder in enumerate(shop.reported)
            ]
            out = of(f"{name}.html")
            return _file(folders[part] / name, lambda: report(folders, out))

        names = ((0, "run.json"), (0, "metrics.jsonl"), (1, "eval.json"), (1, "routing.json"))
        return [lambda part=part, name=name: start(part, name) for part, name in names]

    add("the whole page: report", mutations.any_json, 4, *page())

    def scored() -> Start:
        path = shop.place("changed/scored") / EvaluationRecord.FILE
        path.write_text(json.dumps(left_scores()))
        return _file(path, lambda: results.record(path.parent, [], None))

    add("eval.json: eval", mutations.any_json, 300, scored)

    def of_run(name: str, how: str, *, hashless: bool = False) -> Callable[[], Start]:
        def start() -> Start:
            def run(data: bytes) -> None:
                copy = shop.copied(shop.unsigned if hashless else shop.run, "changed/run")
                file = copy / name
                file.write_bytes(data)
                if how == "export":
                    out = of("run-exported")
                    shutil.rmtree(out, ignore_errors=True)
                    export(copy, out)
                else:
                    table = shop.table(copy)
                    train(Run.of({**table, "train": {**table["train"], "steps": 3}}), resume=True)

            return Start(((shop.unsigned if hashless else shop.run) / name).read_bytes(), run)

        return start

    state = "checkpoints/step-2/state.json"
    tokens = lambda: str(next((shop.run / "tokens").glob("*.json")).relative_to(shop.run))  # noqa: E731
    add("run.json: export", mutations.any_json, 10, of_run("run.json", "export"))
    add("state.json: export", mutations.any_json, 15, of_run(state, "export"),
        of_run(state, "export", hashless=True))  # fmt: skip
    add("run.json: train --resume", mutations.any_json, 5, of_run("run.json", "train"))
    add("state.json: train --resume", mutations.any_json, 10, of_run(state, "train"),
        of_run(state, "train", hashless=True))  # fmt: skip
    add("metrics.jsonl: train --resume", mutations.any_lines, 5, of_run("metrics.jsonl", "train"))
    add("token file: train --resume", mutations.any_json, 5, lambda: of_run(tokens(), "train")())
    for name in (".metadata", "__0_0.distcp"):
        file = f"checkpoints/step-2/{name}"
        starts = (of_run(file, "export"), of_run(file, "export", hashless=True))
        add(f"{name}: export", mutations.any_bytes, 20, *starts)

    # --- statistics

    def statistics() -> Start:
        path = shop.place("changed/statistics") / "stats.safetensors"
        shutil.copy(shop.statistics, path)
        recipe = {**MOE, "init": {"name": "importance", "statistics": str(path)}}

        def read() -> None:
            Statistics.open(path)
            convert(shop.dense, shop.place("changed/statistics-out") / "out", recipe)

        return _file(path, read)

    add("statistics: convert", mutations.any_tensors, 60, statistics)

    def half_calibrated() -> Start:
        out = shop.place("changed/half") / shop.half_calibrated.name.removesuffix(".partial")
        partial = out.with_name(shop.half_calibrated.name)
        shutil.copy(shop.half_calibrated, partial)

        def read() -> None:
            out.unlink(missing_ok=True)
            calibrate(shop.dense, out, shop.calibrating())

        return _file(partial, read)

    add("half a calibration: calibrate", mutations.any_tensors, 20, half_calibrated)

    # --- data

    def data(name: str, content: Callable[[], bytes], **options: Any) -> Callable[[], Start]:
        def start() -> Start:
            path = shop.place(f"changed/data-{name}") / name
            path.write_bytes(content())
            return _file(path, lambda: [*documents(Source(path=str(path), **options))])

        return start

    add("text: documents", mutations.any_bytes, 500, data("t.txt", lambda: (WORDS * 4).encode()),
        data("s.txt", lambda: (WORDS * 4).encode(), separator="a "))  # fmt: skip
    add("JSON lines: documents", mutations.any_lines, 1000, data("t.jsonl", lambda: shop.lines))
    add("gzip: documents", mutations.any_bytes, 300, data("t.jsonl.gz", lambda: shop.zipped))
    add("parquet: documents", mutations.any_bytes, 400, data("t.parquet", lambda: shop.parquet))

    def labelled() -> Start:
        path = shop.place("changed/labelled") / "t.jsonl"
        path.write_bytes(shop.lines)
        words = corpus.read_tokenizer(shop.dense)
        words.pad_token = words.eos_token

        def read() -> None:
            TextSet.open(path, words, length=16, fields=("text",), label_field="label")

        return _file(path, read)

    add("JSON lines: labelled texts", mutations.any_lines, 500, labelled)

    def pictures() -> Start:
        folder = shop.place("changed/pictures")
        path = folder / "t.parquet"
        path.write_bytes(shop.images)

        def read() -> None:
            ImageSet.open(path, size=(8, 8), channels=3, cache=shop.place("changed/pictures-cache"))

        return _file(path, read)

    add("parquet: images", mutations.any_bytes, 150, pictures)

    # --- tasks

    def task(name: str) -> Callable[[], Start]:
        def start() -> Start:
            path = shop.place(f"changed/task-{name}") / f"{name}.jsonl"
            path.write_text(json.dumps(HUB[name]) + "\n")
            return _file(path, lambda: task_files.rows(path, name))

        return start

    def glue(name: str) -> Callable[[], Start]:
        def start() -> Start:
            path = shop.place(f"changed/glue-{name}") / f"{name}.jsonl"
            path.write_text(json.dumps(GLUE[name]) + "\n")

            def read() -> None:
                for row in task_files.rows(path, "superglue"):
                    superglue.TASKS[name].example(row, name)

            return _file(path, read)

        return start

    add("task files", mutations.any_lines, 1000, *map(task, HUB))
    add("SuperGLUE files", mutations.any_lines, 1000, *map(glue, GLUE))
    return known


def _file(path: Path, read: Read) -> Start:
    """A file that is replaced by damaged bytes, and what reads it."""
    whole = path.read_bytes()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read()

    return Start(whole, run)


def _command(*words: object) -> Read:
    return lambda: cli.main([*map(str, words)])


def _converted(source: Path, out: Path) -> None:
    for left in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    convert(source, out, MOE)
    for path in out.glob("*.json"):
        json.loads(path.read_bytes(), parse_constant=_no_json)


def _no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is written, which is no JSON")


def _tokenised(folder: Path, text: Path, cache: Path) -> None:
    data = corpus.Data(sources=(Source(path=str(text)),))
    corpus.prepare(data, folder, cache, vocab_size=300)


def _set(source: Path, before: list[str], data: bytes) -> None:
    setting = data.decode("utf-8", "surrogateescape")
    cost.plan(source, RecipeOptions(set=(*before, setting)).read())


def _told(folders: list[Path]) -> None:
    about = study(folders, DenseCost())
    sections.document(about, "A title")
    about.troubles()


def _means_the_same(folder: Path, whole: Path) -> bool:
    """Whether the weights and the config of a folder are those of a whole one, and readers see that."""
    from safetensors.numpy import load_file

    if json.loads((folder / "config.json").read_bytes()) != json.loads((whole / "config.json").read_bytes()):
        return False
    for path in sorted(whole.glob("*.safetensors")):
        a, b = load_file(path), load_file(folder / path.name)
        if a.keys() != b.keys() or any(a[n].tobytes() != b[n].tobytes() for n in a):
            return False
    return True


def left_scores() -> dict[str, Any]:
    """eval.json of two results."""
    metric = {"value": 0.5, "standard_error": 0.1, "higher_is_better": True}
    paired = {"loss": {"units": "windows", "units_sha256": "0", "top": [1.0], "bottom": [2.0]}}
    entry = {"kind": "text", "name": "t", "data": {}, "metrics": {"loss": metric}, "paired": paired}
    return {"format": 1, "results": [entry, {**entry, "kind": "tasks"}]}


def small_config(model_type: str) -> dict[str, Any]:
    """A config.json of a tiny model."""
    if model_type in ENCODERS:
        from transformers import CONFIG_MAPPING

        made = CONFIG_MAPPING[model_type](**tiny._SIZES[model_type], architectures=[ENCODERS[model_type]])
    else:
        made = tiny.config_of(model_type)
    table = dict(json.loads(made.to_json_string(use_diff=False)))
    beyond = [key for key in MARKS if (table.get(key) or 0) >= table.get("vocab_size", math.inf)]
    return table | dict.fromkeys(beyond, 0)


RECIPES = (
    'seed = 1\ndtype = "float32"\n[moe]\nnum_experts = 4\ntop_k = 2\nlayers = "all"\n[init]\nname = "drop"\n'
    'ratio = 0.5\n[router]\nname = "top_k"\ninit = "normal"\nstd = 0.02\n',
    '[moe]\nnum_experts = 4\ntop_k = 2\ntarget = "upcycled"\ngranularity = 4\n[init]\nname = "split"\n'
    '[router]\nname = "sigmoid"\n',
    '[moe]\nnum_experts = 4\ntop_k = 2\n[init]\nname = "importance"\nstatistics = "FILE"\n',
    '[moe]\ntarget = "depth_tiled"\ndepth = 2\n',
    '[moe]\nnum_experts = 4\ntop_k = 1\ntarget = "upcycled"\nlayers = [0]\n[init]\nname = "noise"\n'
    'sigma = 0.1\n[router]\nname = "top_k"\ncapacity_factor = 2.0\n',
)
SETTINGS = (
    "moe.num_experts=4", "moe.top_k=1", "moe.target=upcycled moe.layers=[0]", "moe.target=upcycled",
    "init.name=drop", "init.name=drop init.ratio=0.5", "router.name=top_k", "router.init=zeros",
    "router.std=0.1", "dtype=bfloat16", "seed=3", "init.name=noise init.sigma=0.1",
    "moe.target=upcycled router.capacity_factor=2.0", "init.name=split moe.num_experts=4 moe.granularity=4",
)  # fmt: skip
"""Settings that are taken, the last of which is damaged."""
RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"task": {"name": "causal_lm"}, "optimizer": {"carry_state": False}, "log": {"every": 1, "sinks": []}},
    {"router": {"balance_loss": "per_layer", "z_loss_coef": 0.1}, "parallel": {"tp": 1, "ep": 1}},
    {"schedule": {"name": "warmup_stable_decay", "peak": 1e-3, "warmup": 1, "decay": 1}},
)
