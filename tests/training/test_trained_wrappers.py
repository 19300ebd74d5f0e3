"""A multimodal model learns from texts what its text model learns alone, and the rest keeps its bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ranks
import tiny_wrappers
from upcycle import UpcycleError, convert, export
from upcycle.calibration.calibration import ToCalibrate, calibrate
from upcycle.families._training import trained
from upcycle.records.provenance import Provenance
from upcycle.training import drop_path, effort, micro_batch, saving, start, step
from upcycle.training.anatomy import Anatomy
from upcycle.training.loop import train
from upcycle.training.parallel import ranks as world
from upcycle.training.rehearsal import rehearse
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.start import Start

WITHIN = "language_model."  # what a wrapper's names in memory have more than those of its text model


@pytest.fixture(scope="module")
def around(trainable, tmp_path_factory) -> Path:
    """A LLaVA around a trained text model."""
    folder = tmp_path_factory.mktemp("around") / "llava"
    text = transformers.AutoModelForCausalLM.from_pretrained(trainable[0])
    given = {**tiny_wrappers.KINDS["llava"].config, "text_config": text.config, "image_token_index": 511}
    config = transformers.LlavaConfig(**given, tie_word_embeddings=text.config.tie_word_embeddings)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trainable[0] / name, folder)
    return folder


def table(source: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "source": str(source), "out": str(out),
        "data": {"sources": [{"path": str(text)}], "held_out": 0.1},
        "train": {"steps": 2, "batch_size": 4, "sequence_length": 32, "eval_examples": 6},
        "schedule": {"name": "constant", "peak": 1e-3},
        "checkpoint": {"every": 1, "keep": 2},
        **changes,
    }  # fmt: skip


def files(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, those of a text model by its own names."""
    found = load_file(folder / "model.safetensors")
    return {name.removeprefix(WITHIN): tensor for name, tensor in found.items()}


def test_a_dense_run_is_that_of_the_text_model(trainable, around, tmp_path):
    """Also taught, resumed, rehearsed and exported; the tower has the bits of the source."""
    alone, text = trainable
    learns = {"teacher": {"source": str(alone), "weight": 0.5}}
    wanted = train(table(alone, text, tmp_path / "alone", **learns))
    whole = table(around, text, tmp_path / "run", teacher={"source": str(around), "weight": 0.5})
    found = train(whole)
    assert (found.loss, found.held_out_loss) == (wanted.loss, wanted.held_out_loss)
    shutil.rmtree(dict(saving.checkpoints(tmp_path / "run"))[2])
    assert train(whole, resume=True).loss == wanted.loss
    told = export(tmp_path / "run", tmp_path / "out", with_optimizer=True)
    export(tmp_path / "alone", tmp_path / "text", with_optimizer=True)
    made, before, trained = files(tmp_path / "out"), files(around), files(tmp_path / "text")
    assert made.keys() == before.keys()
    assert told.parameters == sum(tensor.numel() for tensor in made.values())
    for name, tensor in made.items():
        assert torch.equal(tensor, trained.get(name, before[name])), name
    assert trained.keys() < made.keys()
    transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    rehearsed = rehearse(Run.of(whole))
    assert (rehearsed.parameters, rehearsed.stepped) == (told.parameters, 2)
    # A later run with experts goes on with the optimizer's moments.
    carried = {"moe": {"num_experts": 2}, "optimizer": {"carry_state": True}}
    losses = [train(table(tmp_path / n, text, tmp_path / f"{n} up", **carried)).loss for n in ("out", "text")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("target", [None, "native", pytest.param("upcycled", marks=pytest.mark.slow)])
def test_a_vision_tower_with_experts_is_left_alone(target, trainable, around, tmp_path):
    """Texts do not reach its routers. The card imports what opens its class."""
    convert(around, tmp_path / "moe", {"moe": {"num_experts": 2, "part": "vision"}})
    moe = {"moe": {"num_experts": 2, "target": target}} if target else {}
    wanted = train(table(around, trainable[1], tmp_path / "wanted", **moe))
    found = train(table(tmp_path / "moe", trainable[1], tmp_path / "run", **moe))
    assert (found.loss, found.held_out_loss) == (wanted.loss, wanted.held_out_loss)
    for run in ("wanted", "run"):
        export(tmp_path / run, tmp_path / f"{run} out")
        card = (tmp_path / f"{run} out" / "README.md").read_text()
        assert ("import upcycle" in card) == (run == "run" or target == "upcycled")
    before, after = files(tmp_path / "moe"), files(tmp_path / "run out")
    tower = [name for name in before if "vision" in name]
    assert any(".experts." in name for name in tower)
    assert all(torch.equal(before[name], after[name]) for name in tower)


def test_an_export_says_what_the_routers_within_were_trained_with(trainable, around, tmp_path):
    """In the config of the text model, which is where trainers look for it."""
    router = {"balance_loss_coef": 0.037, "jitter": 0.01}
    train(table(around, trainable[1], tmp_path / "run", moe={"num_experts": 2}, router=router))
    export(tmp_path / "run", tmp_path / "out")
    own = transformers.AutoConfig.from_pretrained(tmp_path / "out").text_config
    assert (own.router_aux_loss_coef, own.router_jitter_noise) == (0.037, 0.01)
    whole = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"router_aux_loss_coef", "router_jitter_noise"} & whole.keys()


@pytest.mark.parametrize("only", ["", "text"])
def test_an_expert_is_taken_out_with_what_is_around_it(only, trainable, around, tmp_path):
    """The anchor has the bits of the source, and so has the tower; `part_only` leaves it out."""
    moe = {"num_experts": 2, "part_only": only}
    parts = {"steps": 1, "batch_size": 4, "sequence_length": 32, "freeze": ["experts[0]"]}
    train(table(around, trainable[1], tmp_path / "run", moe=moe, train=parts))
    made = [export(tmp_path / "run", tmp_path / str(number), expert=number).parameters for number in (0, 1)]
    before = files(around)
    first, second = files(tmp_path / "0"), files(tmp_path / "1")
    if only:
        before = {name: tensor for name, tensor in before.items() if name in files(trainable[0])}
    assert before.keys() == first.keys() == second.keys()
    assert made == [sum(tensor.numel() for tensor in before.values())] * 2
    for name, tensor in before.items():
        is_text, is_network = name.startswith(("model.", "lm_head.")), ".mlp." in name and "layers" in name
        assert torch.equal(tensor, first[name]) == (not is_text or is_network), name
        assert torch.equal(first[name], second[name]) == (not is_text or not is_network), name
    auto = transformers.AutoModelForCausalLM if only else transformers.AutoModelForImageTextToText
    opened = auto.from_pretrained(tmp_path / "1")
    assert type(opened).__name__ == ("LlamaForCausalLM" if only else "LlavaForConditionalGeneration")
    assert Provenance.read(tmp_path / "1").target == ("llama" if only else "llava")


def test_statistics_are_those_of_the_text_model(trainable, around, tmp_path):
    asked = ToCalibrate(
        text=trainable[1], limit=4, length=32, collect=("l2",), positions=("neurons", "heads")
    )
    found, wanted = (
        calibrate(source, tmp_path / f"{source.name}.safetensors", asked) for source in (around, trainable[0])
    )
    mine, theirs = (load_file(each.path) for each in (found, wanted))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that gives the dense folder of a kind."""
    folder = tmp_path_factory.mktemp("kinds")

    def make(kind: str) -> str:
        path = folder / kind
        return str(path if path.exists() else tiny_wrappers.make(path, kind))

    return make


@pytest.mark.parametrize("kind", tiny_wrappers.KINDS)
def test_the_loss_of_a_dense_model_is_that_of_transformers(kind, made):
    run = Run.of(table(Path(made(kind)), Path("unused"), Path("unused")))
    with world(run.parallel) as here:
        trainee = ranks.trainee_of(run, here)
    rows = ranks.rows_of(run).clamp(max=tiny_wrappers.IMAGE - 1)
    opened = transformers.AutoModelForImageTextToText.from_pretrained(made(kind), dtype=torch.float32)
    logits = opened(input_ids=rows[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    found = step.train_step(trainee, {"rows": rows}, 0, 1e-3)
    assert found.loss == pytest.approx(float(wanted), rel=1e-5)


@dataclass(frozen=True)
class Built:
    """A model of a run, and what the run knows about it."""

    run: Run
    begun: Start
    model: Any
    anatomy: Anatomy

    @classmethod
    def of(cls, source: str, **moe: Any) -> Built:
        run = ranks.run_of(source, {}, {"moe": {"top_k": 2, **moe}, "train": {"layer_decay": 0.5}})
        begun = start.start_of(run)
        with world(run.parallel) as here:
            model = start.model_of(begun, run, here, "float32")
        family, routers = trained(begun.dense.family, "train.only"), Routers.of(model)
        stacks = begun.dense.stacks
        return cls(run, begun, model, Anatomy(model=model, family=family, stacks=stacks, routers=routers))

    def own(self, names: Iterable[str]) -> dict[str, str]:
        """The names within the text model by those in the model."""
        within = self.model.base_model.get_decoder() if hasattr(self.model.config, "text_config") else None
        path = next((f"{n}." for n, m in self.model.named_modules() if m is within), "model.")
        return {n: n.replace(path, "model.") for n in names if n.startswith((path, "lm_head."))}

    def passed(self, rate: float) -> dict[str, float]:
        """The rate at which each module is passed by."""
        family, config = self.begun.dense.family, self.begun.dense.config
        drop_path.install(self.model, family, config, rate)
        found = {
            name: hook.args[0]
            for name, module in self.model.named_modules()
            for hook in module._forward_hooks.values()
            if isinstance(hook, partial) and hook.func is drop_path._drop
        }
        own = self.own(found)
        return {own[name]: rate for name, rate in found.items()}


CASES = {
    "internvl": {"num_experts": 4, "layers": [1]},
    "gemma3": {"num_experts": 4, "target": "upcycled"},
    "qwen3_5": {"num_experts": 4},
    "idefics3": {"num_experts": 4, "target": "upcycled", "layers": [1]},
}


@pytest.mark.parametrize("kind", CASES)
def test_parts_and_depths_are_those_of_the_text_model(kind, made):
    """What is around it is in no part and costs nothing, and would learn as slowly as the embeddings."""
    found, wanted = Built.of(made(kind), **CASES[kind]), Built.of(made(kind), **CASES[kind], part_only="text")
    own = found.own(name for name, _ in found.model.named_parameters())
    assert {*own.values()} == {name for name, _ in wanted.model.named_parameters()}
    assert found.anatomy.found() == wanted.anatomy.found()
    for part in [*wanted.anatomy.found(), "experts[1-2]", "*.layers.1.*"]:
        for given in (((part,), None), (None, (part,))):
            mine, theirs = found.anatomy.chosen(*given), wanted.anatomy.chosen(*given)
            assert {own[name]: numbers for name, numbers in mine.items()} == theirs, part
            costs = [
                effort.passes(each.anatomy, chosen, {"layers": 16}, each.begun)
                for each, chosen in ((found, mine), (wanted, theirs))
            ]
            assert costs[0] == pytest.approx(costs[1])
    scales = [
        start.scales(each.begun, each.run, each.model, each.anatomy.routers) for each in (found, wanted)
    ]
    assert {own[name]: scale for name, scale in scales[0].items() if name in own} == scales[1]
    assert {scale for name, scale in scales[0].items() if name not in own} == {0.5**3}
    blocks = [[*map(id, start._blocks(each.model, each.begun))] for each in (found, wanted)]
    places = [{id(module): name for name, module in each.model.named_modules()} for each in (found, wanted)]
    own_blocks = found.own(f"{places[0][block]}." for block in blocks[0])
    assert [*own_blocks.values()] == [f"{places[1][block]}." for block in blocks[1]]
    bytes_of = [
        micro_batch.bytes_of_row(each.run, each.begun, {"layers": 16}, "float32") for each in (found, wanted)
    ]
    assert bytes_of[0] == bytes_of[1]
    if kind == "qwen3_5":
        for each in (found, wanted):
            with pytest.raises(UpcycleError, match="have no place where a branch can be left out"):
                each.passed(0.3)
    else:
        rates = found.passed(0.3)
        assert rates == wanted.passed(0.3)
        assert rates


def test_a_run_that_would_train_the_tower_alone_is_refused(made):
    with pytest.raises(UpcycleError, match=r"train\.only leave no parameter to train"):
        Built.of(made("internvl"), **CASES["internvl"]).anatomy.chosen(("*.vision_tower.*",), None)
