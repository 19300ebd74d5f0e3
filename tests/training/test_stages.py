"""Parts of a model that are trained while the rest stays to the bit, and runs of several stages."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import tomllib
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gloo
import ranks
import tiny
from marks import quick, sampled
from simulated import Traffic
from upcycle import Recipe, UpcycleError, convert, tasks
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.data import leaks
from upcycle.dense.admission import admit
from upcycle.families._training import trained
from upcycle.records.provenance import Provenance
from upcycle.training import beginning, enter, fit, late_experts, run_folder, start, step
from upcycle.training.anatomy import Anatomy
from upcycle.training.course import Course
from upcycle.training.export import export
from upcycle.training.feeds import Feeds
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.parallel import Ranks
from upcycle.training.rehearsal import rehearse
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.spikes import Recent
from upcycle.training.trainee import Trainee

HERE = Ranks(device=torch.device("cpu"))
MOE = {"num_experts": 4, "top_k": 2}


def table(trainable, out: Path, **changes) -> dict:
    source, text = trainable
    made = {
        "source": str(source),
        "out": str(out),
        "moe": MOE,
        "data": {"sources": [{"path": str(text), "separator": "<|endoftext|>"}], "held_out": 0.1},
        "train": {"batch_tokens": 256, "sequence_length": 64, "eval_tokens": 512},
        "schedule": {"name": "constant", "peak": 1e-2},
        "checkpoint": {"every": 1, "keep": 9},
    }
    for key, value in changes.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


def saved(run: dict, step: int) -> dict[str, dict]:
    """Everything in a checkpoint: `model` by parameter, and `optimizer`."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(Path(run["out"]) / "checkpoints" / f"step-{step}", Path(folder) / "all")
        return torch.load(Path(folder) / "all", weights_only=True)


def weights(run: dict, step: int) -> dict[str, torch.Tensor]:
    """The parameters of a checkpoint, by name; those of step 0 are what the run began with."""
    if step:
        return saved(run, step)["model"]
    return {name: p.detach() for name, p in start.plain_model(start.start_of(Run.of(run))).named_parameters()}


def digests(run: dict, step: int) -> dict[str, str]:
    """A digest of every tensor of a checkpoint."""
    tensors = [
        pair for part in saved(run, step).values() for pair in part.items() if torch.is_tensor(pair[1])
    ]
    return {name: ranks.digest(tensor.flatten()) for name, tensor in tensors}


def moved(run: dict, first: int, last: int) -> set[str]:
    """The parameters that differ between two checkpoints; of stacks, each expert by its number."""
    return differing(weights(run, first), weights(run, last))


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    out = set()
    for name, old in before.items():
        if ".experts." in name:
            out |= {f"{name}[{e}]" for e in range(len(old)) if not torch.equal(old[e], after[name][e])}
        elif not torch.equal(old, after[name]):
            out.add(name)
    return out


# --- the parts of a model ---


def parts_of(source: Path, **changes) -> Anatomy:
    run = Run.of(
        {"source": str(source), "out": "x", "data": {"sources": [{"path": "x"}]}, "train": {"steps": 1},
         "schedule": {"peak": 1.0}, **changes}
    )  # fmt: skip
    begun = start.start_of(run)
    model = start.model_of(begun, run, HERE, "float32")
    return Anatomy(
        model=model,
        family=trained(begun.dense.family, "train.only"),
        stacks=begun.dense.stacks,
        routers=Routers.of(model),
    )


UP = {"moe": {**MOE, "target": "upcycled"}}
# A class, its run, and an example of each part: what it has, and what it has not.
PARTS = {
    "mixtral": ("llama", {"moe": MOE}, {
        "router": "model.layers.0.mlp.gate.weight", "experts": "model.layers.1.mlp.experts.down_proj",
        "attention": "model.layers.0.self_attn.q_proj.weight", "norms": "model.norm.weight",
        "embeddings": "model.embed_tokens.weight", "head": "lm_head.weight", "network": None,
        "shared_expert": None,
    }),
    "qwen2_moe": ("qwen2", {"moe": {**MOE, "layers": [1]}}, {
        "shared_expert": "model.layers.1.mlp.shared_expert_gate.weight",
        "network": "model.layers.0.mlp.up_proj.weight", "experts": "model.layers.1.mlp.experts.gate_up_proj",
    }),
    "granitemoehybrid": ("granitemoehybrid", {"moe": MOE}, {
        "shared_expert": "model.layers.0.shared_mlp.input_linear.weight", "network": None,
        "attention": "model.layers.0.mamba.A_log", "norms": "model.layers.0.mamba.norm.weight",
    }),
    "bert": ("BertForMaskedLM", UP, {
        "attention": "bert.encoder.layer.0.attention.self.key.weight", "head": "cls.predictions.bias",
        "norms": "bert.encoder.layer.0.output.LayerNorm.bias",
        "embeddings": "bert.embeddings.position_embeddings.weight", "network": None,
    }),
    "t5": ("T5ForConditionalGeneration", UP, {
        "attention": "decoder.block.0.layer.1.EncDecAttention.q.weight",
        "norms": "encoder.final_layer_norm.weight", "embeddings": "shared.weight",
    }),
    "vit": ("ViTForImageClassification", UP, {
        "embeddings": "vit.embeddings.cls_token", "head": "classifier.weight", "norms": "vit.layernorm.bias",
    }),
    "convnext": ("ConvNextForImageClassification", UP, {
        "attention": None, "experts": "convnext.encoder.stages.1.layers.0.pwconv1.experts.down_proj_bias",
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_parts_go_by_their_names(case, dense, tmp_path):
    kind, changes, wanted = PARTS[case]
    source = dense(kind) if kind.islower() else tiny.make(tmp_path / kind, kind)
    anatomy = parts_of(source, **changes)
    for part, example in wanted.items():
        if example is None:
            with pytest.raises(
                UpcycleError, match=rf"train\.only names {part}, which this model does not have"
            ):
                anatomy.chosen((part,), None)
        else:
            assert example in anatomy.chosen((part,), None), part
    # Every parameter is in a part, but for what mixes the places of a ConvNeXt.
    found = set().union(*(anatomy.chosen((part,), None) for part in anatomy.found()))
    rest = {name for name in anatomy.everything if name not in found}
    assert all(".dwconv." in n or "layer_scale" in n or "downsampling" in n for n in rest), rest
    # What is not frozen is trained.
    only, freeze = anatomy.chosen(("experts",), None), anatomy.chosen(None, ("experts",))
    assert {**only, **freeze} == anatomy.everything
    assert not only.keys() & freeze.keys()


def test_experts_go_by_their_numbers(mixtral):
    some = mixtral.chosen(("experts[1-2]",), None)
    assert set(some.values()) == {frozenset({1, 2})}
    assert mixtral.chosen(("experts",), ("experts[0, 3]",)) == some
    assert mixtral.size(some) * 2 == mixtral.size(mixtral.chosen(("experts",), None))
    assert len(mixtral.chosen(("*.layers.[01].*",), ("*norm*",))) == 2 * 7


BAD = {
    "name": ({"only": ["routr"]}, r"train\.only names 'routr', which is no part .*did you mean router"),
    "part": ({"freeze": ["shared_expert"]}, r"names shared_expert.*it has router, experts, att"),
    "pattern": ({"only": ["*.nothing.*"]}, r"'\*\.nothing\.\*' matches no parameter .*names are like"),
    "number": ({"freeze": ["experts[1,7]"]}, r"experts of a layer have the numbers 0 to 3, not 7"),
    "everything": ({"freeze": ["*"]}, r"train\.freeze leave no parameter to train"),
    "both": ({"only": ["router"], "freeze": ["router"]}, r"train\.only and train\.freeze leave no parameter"),
    "range": ({"only": ["experts[2-1]"]}, r"experts of a layer have the numbers 0 to 3"),
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(dense) -> Anatomy:
    return parts_of(dense("llama"), moe=MOE)


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_frozen(case, mixtral):
    keys, message = BAD[case]
    with pytest.raises(UpcycleError, match=message):
        mixtral.chosen(keys.get("only"), keys.get("freeze"))


FEW, ALL = {"train": {"steps": 300, "only": ["experts[1]"]}}, {"train": {"steps": 5, "only": ["experts"]}}
BRIEF = {"train": {"steps": 5, "only": ["experts[1]"]}}
APART = {"train": {"steps": 300, "only": ["router"]}}


@pytest.mark.parametrize(
    ("stages", "optimizer", "said"),
    [
        ([FEW, ALL], {"beta2": 0.999}, ["stage 2 begins to train experts .* up to 3.4 times"]),
        ([FEW, ALL], {}, []),
        ([FEW, ALL], {"name": "muon"}, []),
        ([FEW, APART, ALL], {"beta2": 0.999}, []),  # no state goes on
        ([ALL, FEW, ALL], {"beta2": 0.999}, ["stage 3 begins to train experts .* up to 3.1 times"]),
        ([ALL, BRIEF, ALL], {"beta2": 0.999}, []),
        ([BRIEF, ALL, ALL], {"beta2": 0.999}, []),
        ([FEW, ALL], {"beta2": 0.999, "carry_state": True}, []),  # it is not forgotten in 300 steps
    ],
)
def test_experts_that_begin_late_step_far(stages, optimizer, said, mixtral, tmp_path):
    course = Course(Run.of(table(("x", "x"), tmp_path, stage=stages, optimizer=optimizer)))
    found = [*late_experts.warnings(course, mixtral)]
    assert len(found) == len(said)
    assert all(re.search(*pair) for pair in zip(said, found, strict=True)), found


def test_a_run_warns_of_experts_that_begin_late(trainable, tmp_path, caplog):
    few, both = {"train": {"steps": 4, "only": ["experts[1]"]}}, {"train": {"steps": 1, "only": ["experts"]}}
    run = table(trainable, tmp_path / "run", stage=[few, both], optimizer={"beta1": 0.0, "beta2": 0.9999})
    train(Run.of(run))
    assert "stage 2 begins to train experts beside others of their layer" in caplog.text


def test_a_stage_that_trains_nothing_is_refused_before_the_first_step(trainable, tmp_path):
    last = {"train": {"steps": 1, "freeze": ["*"]}}
    run = table(trainable, tmp_path / "run", stage=[{"train": {"steps": 3}}, last])
    for refused in (train, rehearse):
        with pytest.raises(UpcycleError, match=r"train\.freeze leave no parameter to train"):
            refused(Run.of(run))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- what stays, stays ---


@pytest.fixture(scope="module")
def staged(trainable, tmp_path_factory):
    """A run of two stages: the router alone, then all but it and two experts, on more data."""
    folder = tmp_path_factory.mktemp("staged")
    (folder / "other.txt").write_text(trainable[1].read_text()[-40_000:])
    paths = (folder / "other.txt", trainable[1])
    other = {"sources": [{"path": str(path), "separator": "<|endoftext|>"} for path in paths]}
    rest = {"steps": 2, "freeze": ["router", "experts[0,2]"]}
    run = table(
        trainable,
        folder / "run",
        router={"balance_loss_coef": 1.0, "balance_counts": "buffered"},
        stage=[
            {"name": "router", "train": {"steps": 2, "only": ["router"]}},
            {
                "name": "rest",
                "train": rest,
                "data": other,
                "schedule": {"name": "cosine", "peak": 4e-3, "warmup": 2},
            },
        ],
        train={"weight_decay": 0.5},
    )
    assert train(Run.of(run)).finished
    return run


ROUTERS = {f"model.layers.{i}.mlp.gate.weight" for i in range(5)}


def test_frozen_parts_keep_their_bits(staged):
    """With weight decay, a balance loss on the router, and clipping by the norm of what is trained."""
    assert moved(staged, 0, 2) == ROUTERS
    rest = moved(staged, 2, 4)
    assert not rest & ROUTERS
    assert {name[-3:] for name in rest if ".experts." in name} == {"[1]", "[3]"}
    assert rest >= {name for name in weights(staged, 0) if ".experts." not in name} - ROUTERS
    # The state of the optimizer is that of what is trained.
    assert saved_moments(staged, 2) == ROUTERS
    assert saved_moments(staged, 4) == set(weights(staged, 0)) - ROUTERS


def test_records_say_which_stage_a_step_is_in(staged):
    lines = read(Path(staged["out"]))
    assert [line.stage for line in lines] == ["router", "router", "rest", "rest"]
    assert [line.lr for line in lines] == [1e-2, 1e-2, 2e-3, 4e-3]  # each schedule begins with its stage
    assert [line.held_out_loss is not None for line in lines] == [False, True, False, True]
    record = json.loads((Path(staged["out"]) / "run.json").read_text())
    assert record["run"]["train"]["steps"] == 4
    assert Run.of(record["run"]) == run_folder._settled_as(Run.of(staged), None)


def test_a_step_costs_what_its_stage_costs(staged, tmp_path):
    """Steps of the router alone cost less: records and exports say so, as metrics.jsonl does."""
    out = Path(staged["out"])
    record, lines = run_folder.read_record(out), read(out)
    rows = Run.of(staged).train.rows
    counted = [line.active_flops_per_s * line.seconds / rows for line in lines]
    assert [cost.first for cost in record.stage_costs] == [0, 2]
    alone, rest = (cost.training_flops_per_row for cost in record.stage_costs)
    assert counted == pytest.approx([alone, alone, rest, rest], rel=1e-3)
    assert alone < 0.8 * rest
    assert record.training_flops_per_row == (2 * alone + 2 * rest) // 4
    for done, spent in ((2, 2 * rows * alone), (4, 2 * rows * (alone + rest))):
        export(out, tmp_path / str(done), step=done)
        (told,) = Provenance.read(tmp_path / str(done)).training
        assert told.training_flops == told.spent == spent


def test_a_run_resumed_in_any_stage_is_the_run(staged, tmp_path):
    whole = Path(staged["out"])
    for done in (1, 2, 3):
        again = {**staged, "out": str(tmp_path / str(done))}
        (tmp_path / str(done) / "checkpoints").mkdir(parents=True)
        shutil.copytree(
            whole / "checkpoints" / f"step-{done}", Path(again["out"]) / "checkpoints" / f"step-{done}"
        )
        assert train(Run.of(again), resume=True).finished
        assert [r.loss for r in read(Path(again["out"]))] == [r.loss for r in read(whole)][done:]
        assert digests(again, 4) == digests(staged, 4)


WEIGHTS = ((1.0, 1.0), (3.0, 1.0), (1.0, 5.0))


def rows_of(run: Run, counts: tuple[int, ...]) -> list[list[bytes]]:
    """The ids of so many rows of each stage, in the order in which the run reads them."""
    begun, course = start.start_of(run), Course(run)
    task = tasks.of(begun.dense.architecture)
    feeds = Feeds(course, lambda leg, readings: task.feed(leg.feeding(task, readings), begun.subject))
    return [
        [row.tobytes() for row in feeds.of(leg).next(count)["rows"]]
        for leg, count in zip(course.legs, counts, strict=True)
    ]


@pytest.fixture(scope="module")
def two_sources(trainable, tmp_path_factory) -> list[dict]:
    """Two sources of 41 and 61 rows or so, of different texts; with a tokenizer of bytes, of more."""
    folder, text = tmp_path_factory.mktemp("two"), trainable[1].read_text()
    parts = {"a.txt": text[:8_000], "b.txt": text[-12_000:]}
    for name, part in parts.items():
        (folder / name).write_text(part)
    return [{"path": str(folder / name)} for name in parts]


def mixed(trainable, two_sources: list[dict], out: Path, *stages: dict) -> dict:
    return table(trainable, out, data={"sources": two_sources}, stage=list(stages))


def weighted(two_sources: list[dict], *weights: float) -> dict:
    return {"sources": [{**s, "weight": w} for s, w in zip(two_sources, weights, strict=True)]}


@pytest.mark.parametrize("order", [1, -1])
def test_a_stage_of_other_weights_reads_what_is_left(order, trainable, two_sources, tmp_path):
    """Whatever the order of its sources; a stage in which documents are apart does so too."""
    stages = [{"train": {"steps": 1}, "data": weighted(two_sources, *each)} for each in WEIGHTS]
    stages[1]["data"]["sources"] = stages[1]["data"]["sources"][::order]
    stages.append({"train": {"steps": 1}, "data": {"isolate": True}})
    run = mixed(trainable, two_sources, tmp_path, *stages)
    rows = [row for stage in rows_of(Run.of(run), (12, 12, 12, 6)) for row in stage]
    assert len({*rows}) == 42
    # The rows of the first stage are those of a run without stages, as they have always been.
    alone = {key: value for key, value in run.items() if key != "stage"}
    alone["train"] = {**alone["train"], "steps": 1}
    assert rows_of(Run.of(alone), (12,))[0] == rows[:12]


def test_a_stage_goes_on_to_the_next_epoch(trainable, two_sources, tmp_path):
    """A source is read to its end before it begins anew, in another order."""
    (first, _), length = two_sources, 20
    only = {"sources": [{**first, "weight": 2.0}]}
    run = mixed(trainable, [first], tmp_path, {"train": {"steps": 1}}, {"train": {"steps": 1}, "data": only})
    rows = [row for stage in rows_of(Run.of(run), (length, 1_000)) for row in stage]
    whole = len({*rows})
    epochs = [rows[i : i + whole] for i in range(0, len(rows) - whole, whole)]
    assert len(epochs) > 1
    assert all(sorted(epoch) == sorted({*rows}) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_stage_can_read_its_data_anew(trainable, two_sources, tmp_path):
    """As stages of earlier versions did, in the order of a run of that data alone."""
    last = {"train": {"steps": 1}, "data": weighted(two_sources, 3.0, 1.0)}
    run = mixed(trainable, two_sources, tmp_path, {"train": {"steps": 1}}, {**last, "anew": True})
    alone = mixed(trainable, two_sources, tmp_path, last)
    assert rows_of(Run.of(run), (12, 12))[1] == rows_of(Run.of(alone), (12,))[0]


def test_a_stage_cannot_read_anew_what_an_earlier_one_has(
    trainable, two_sources, tmp_path, monkeypatch, caplog
):
    """Both have one feed. A run that has trained so goes on with a warning."""
    first = {"train": {"steps": 1}}
    own = {**first, "data": weighted(two_sources, 3.0, 1.0)}
    said = "anew = true is for .* and stage 1 has the same"

    def run(*stages: dict) -> Run:
        made = mixed(trainable, two_sources, tmp_path / "run", *stages)
        made["train"] = {"sequence_length": 16, "batch_tokens": 64, "eval_every": 0}
        return Run.of(made)

    assert fit.not_anew(run({**own, "anew": True}, first)) is None
    assert fit.not_anew(run(first, {**own, "anew": True})) is None
    with pytest.raises(UpcycleError, match=f"stage 3: {said}"):
        train(run(first, own, {**first, "anew": True}))
    again = run(own, {**own, "anew": True})
    with pytest.raises(UpcycleError, match=f"stage 2: {said}"):
        rehearse(again)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "not_anew", lambda run: None)
        train(again)
    train(again, resume=True)
    assert re.search(f"stage 2: {said}", caplog.text)


def test_a_run_of_an_earlier_version_reads_its_data_as_it_began(trainable, two_sources, tmp_path):
    last = {"train": {"steps": 2}, "data": weighted(two_sources, 3.0, 1.0)}
    run = mixed(trainable, two_sources, tmp_path / "run", {"train": {"steps": 1}}, {**last, "anew": True})
    train(Run.of(run))
    wanted = [line.loss for line in read(tmp_path / "run")]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-3")
    file = tmp_path / "run" / "checkpoints" / "step-2" / "state.json"
    state = json.loads(file.read_text())
    assert [stage.pop("anew") for stage in state["identity"]["stage"]] == [False, True]
    del state["state_sha256"]
    file.write_text(json.dumps(state))
    run["stage"] = [run["stage"][0], last]
    train(Run.of(run), resume=True)
    assert [line.loss for line in read(tmp_path / "run")] == wanted
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-3" / "state.json").read_text())
    assert [stage["anew"] for stage in state["identity"]["stage"]] == [True, True]
    other = {**run, "stage": [run["stage"][0], {**last, "anew": False}]}
    with pytest.raises(UpcycleError, match=r"stage\[1\]\.anew \(True there, False here\)"):
        train(Run.of(other), resume=True)


def test_a_run_of_other_stages_is_not_gone_on_with(staged):
    first, second = staged["stage"]
    other = {**second, "train": {**second["train"], "freeze": ["head"]}}
    cases = {
        r"stage\[1\]\.train\.freeze": [first, other],
        r"stage \(2 there, 3 here\)": [first, second, {**second, "name": "third"}],
    }
    for said, stages in cases.items():
        with pytest.raises(UpcycleError, match=rf"is of another run: it differs in .*{said}"):
            train(Run.of({**staged, "stage": stages}), resume=True)


def test_the_last_stage_is_extended(trainable, tmp_path):
    """To the run that it would have been; steps that would have had other rates are refused."""
    stages = [{"train": {"steps": 1, "only": ["router"]}}, {"train": {"steps": 1}}]
    longer = [stages[0], {"train": {"steps": 3}}]
    run = table(trainable, tmp_path / "run", stage=stages)
    train(Run.of(run))
    assert train(Run.of({**run, "stage": longer}), resume=True).steps == 4
    whole = {**run, "stage": longer, "out": str(tmp_path / "whole")}
    train(Run.of(whole))
    assert [line.loss for line in read(tmp_path / "run")] == [line.loss for line in read(tmp_path / "whole")]
    assert digests(run, 4) == digests(whole, 4)
    with pytest.raises(UpcycleError, match="is of step 4, and the run file ends it at 3"):
        train(Run.of({**run, "stage": [stages[0], {"train": {"steps": 2}}]}), resume=True)
    with pytest.raises(UpcycleError, match=r"differs in stage\[0\]\.train\.steps \(1 there, 2 here\)"):
        train(Run.of({**run, "stage": [{"train": {"steps": 2, "only": ["router"]}}, longer[1]]}), resume=True)


@pytest.mark.parametrize("done", [2, 4])
def test_a_last_stage_that_has_come_down_is_not_extended(done, trainable, tmp_path):
    """With a schedule of its own; a stage of which no step is taken can have any length."""
    down = {"name": "cosine"}
    run = table(
        trainable, tmp_path, stage=[{"train": {"steps": 2}}, {"train": {"steps": 3}, "schedule": down}]
    )
    longer = {"train": {"steps": 4}, "schedule": down}
    before, now = Run.of(run), Run.of({**run, "stage": [run["stage"][0], longer]})
    refused = pytest.raises(UpcycleError, match=r"cannot go on to 6 steps instead of 5.*the 2 steps")
    with refused if done == 4 else nullcontext():
        run_folder._refuse_other_length(now, "there", before.identity(), now.identity(), done)


def test_a_stage_can_end_what_the_run_began(trainable, tmp_path):
    """A bias that stays, and no warm-up: TOML cannot take out the keys that go with them."""
    run = table(
        trainable, tmp_path, router={"bias_update_rate": 0.1, "bias_update_steps": 2},
        schedule={"warmup": 2, "warmup_from": 1e-4},
        stage=[
            {"train": {"steps": 2}},
            {"train": {"steps": 2}, "router": {"bias_update_rate": 0.0}, "schedule": {"warmup": 0}},
        ],
    )  # fmt: skip
    first, second = Course(Run.of(run)).legs
    assert (first.run.router.bias_rate(0), second.run.router.bias_rate(0)) == (0.1, 0.0)
    assert (first.rate(0), second.rate(2)) == (pytest.approx(5.05e-3), 1e-2)


CHANGES = {
    "trained": ({"train": {"only": ["experts"]}}, False),
    "router": ({"router": {"balance_loss_coef": 1.0}}, False),
    "data": ({"data": {"held_out": 0.2}}, False),
    "schedule": ({"schedule": {"peak": 1e-3}}, True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_stage_is_judged_by_its_own_steps(case, trainable, tmp_path):
    """The gradient of a router is a thousandth of that of a model; only the rate changes neither."""
    change, goes_on = CHANGES[case]
    first = {"train": {"steps": 4, "only": ["router"]}}
    second = {**change, "train": {**first["train"], **change.get("train", {})}}
    legs = Course(Run.of(table(trainable, tmp_path, stage=[first, second]))).legs
    recent = Recent(legs[0].run.spikes, HERE.device)
    recent.restore([(1.0, 2.0)])
    begun = Trainee(
        model=None, task=None, start=None, optimizer=None, routers=None, run=legs[0].run, ranks=HERE,
        precision="float32", recent=recent,
    )  # fmt: skip
    assert enter.next_stage(begun, legs[1], None).run == legs[1].run
    assert recent.known() == (((1.0, 2.0),) if goes_on else ())


def test_what_is_no_longer_trained_leaves_the_memory(trainable, tmp_path, monkeypatch):
    """The moments of the first stage's experts are gone when the second one begins, which trains routers."""
    left, real = [], enter.next_stage

    def watched(trainee: Trainee, *rest: object) -> Trainee:
        moments = [weakref.ref(t) for state in trainee.optimizer.state.values() for t in state.values()]
        assert moments
        made = real(trainee, *rest)
        left.append(sum(moment() is not None for moment in moments))
        return made

    monkeypatch.setattr(enter, "next_stage", watched)
    stages = [{"train": {"steps": 1, "only": [part]}} for part in ("experts", "router")]
    train(Run.of(table(trainable, tmp_path, stage=stages)))
    assert left == [0]


def test_documents_apart_in_one_stage(trainable, tmp_path, monkeypatch):
    """Attention that reads no masks is refused as well if a later stage alone needs them."""
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 1}, "data": {"isolate": True}}]
    run = Run.of(table(trainable, tmp_path, stage=stages))
    monkeypatch.setattr(start.packing, "attention", lambda model: "something")
    with pytest.raises(
        UpcycleError, match=r"data\.isolate = true: .* something, which cannot keep documents"
    ):
        start.model_of(start.start_of(run), run, HERE, "float32")


def test_what_a_later_stage_cannot_have_is_said(trainable, tmp_path):
    bias = {"bias_update_rate": 0.1, "bias_update_steps": 2}
    stages = [{"train": {"steps": 2, "only": ["router"]}}, {"train": {"steps": 2}, "router": bias}]
    run = table(trainable, tmp_path, stage=stages, optimizer={"carry_state": True})
    late, carried = fit.warnings(Run.of(run), None)
    assert "stage 2: router.bias_update_steps = 2 counts from the first step of the run" in late
    assert "what a later one trains besides begins without" in carried
    # Those of the run may be over, and more of them reach into the stage.
    assert not fit.warnings(Run.of({**run, "router": bias, "optimizer": {}}), None)
    later = {**bias, "bias_update_steps": 3}
    assert not fit.warnings(Run.of({**run, "stage": [stages[0], {**stages[1], "router": later}],
                                    "optimizer": {}}), None)  # fmt: skip


def test_a_stage_is_not_scored_on_what_an_earlier_one_trained_on(trainable, tmp_path, caplog):
    """A run that has begun so goes on, with a warning."""
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 1}, "data": {"held_out": 0.3}}]
    run = table(trainable, tmp_path / "run", stage=stages)
    said = "is scored on 0.3 of .*, because it holds out 0.1 of"
    with pytest.raises(UpcycleError, match=said):
        train(Run.of(run))
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(leaks, "later", lambda *_: None)
        train(Run.of(run))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    train(Run.of(run), resume=True)
    assert [line.step for line in read(tmp_path / "run")] == [1, 2]
    assert re.search(said, caplog.text)


def test_anchors_are_the_experts_of_the_source(dense, tmp_path):
    """Two of four experts, beside two of a donor; a run of copies alone has none."""
    init = {"name": "experts", "expert": [{}, {"source": str(dense("llama", seed=1))}]}
    moe = {**MOE, "num_experts": 4}

    def frozen(**changes) -> dict[str, frozenset[int]]:
        data = {"sources": [{"path": "x"}]}
        train = {"steps": 1, "freeze": ["anchors"]}
        run = Run.of({"source": str(dense("llama")), "out": str(tmp_path / "out"), "data": data, "moe": moe,
                      "train": train, "schedule": {"peak": 1.0}, **changes})  # fmt: skip
        begun = start.start_of(run)
        model = start.model_of(begun, run, HERE, "float32")
        anatomy = enter.anatomy_of(Course(run), begun, model, Routers.of(model))
        assert anatomy is not None
        return dict(anatomy.chosen(None, run.train.freeze))

    for name, numbers in frozen(init=init).items():
        assert numbers == ({2, 3} if ".experts." in name else {0}), name
    with pytest.raises(UpcycleError, match=r"names anchors, and no expert .* such as experts\[0\]"):
        frozen()


def test_one_rank_looks_for_rows_that_are_trained_on(trainable, tmp_path, monkeypatch):
    """To compare folders takes long; the others are told."""
    monkeypatch.setattr(leaks, "later", lambda *_: pytest.fail("another rank looks as well"))
    run = Run.of(table(trainable, tmp_path / "run", train={"steps": 1}))
    begun, other = (
        start.start_of(run),
        SimpleNamespace(first=False, share=lambda _: (["it is trained on"], None)),
    )
    task = beginning.admitted(run, begun)
    with pytest.raises(UpcycleError, match="it is trained on"):
        beginning._warn(run, run, begun, task, other, begins=True)


@pytest.mark.parametrize("eval_every", [0, 1])
def test_rows_that_are_held_out_from_no_score_may_be_trained_on(eval_every, trainable, tmp_path):
    """By a later stage, and by two sources that have a file in common."""
    file = table(trainable, tmp_path / "run")["data"]["sources"][0]["path"]
    twice = [{"path": file}, {"path": file, "separator": "#"}]
    stages = [{"train": {"steps": 1}, "data": data} for data in ({}, {"held_out": 0.3})]
    for change in ({"stage": stages}, {"data": {"sources": twice}, "train": {"steps": 1}}):
        run = table(trainable, tmp_path / "run", **change)
        run = Run.of({**run, "train": {**run["train"], "eval_every": eval_every}})
        begun = start.start_of(run)
        wrong = beginning.first_refusals(run, begun, beginning.admitted(run, begun))
        assert len(wrong) == bool(eval_every), wrong


def saved_moments(run: dict, step: int) -> set[str]:
    """The parameters whose moments a checkpoint holds."""
    keys = saved(run, step)["optimizer"]
    return {k.removeprefix("state.").removesuffix(".exp_avg") for k in keys if k.endswith(".exp_avg")}


# Of the others: a class, what is trained, and the ends of the names of what may move.
NORMS = ("LayerNorm.weight", "LayerNorm.bias")
HEAD = ("predictions.bias", "transform.dense.weight", "transform.dense.bias")
OTHERS = {
    "bert": ("BertForMaskedLM", {"only": ["norms", "experts[2]"]}, (*NORMS, "[2]")),
    "bert-dense": ("BertForMaskedLM", {"freeze": ["embeddings", "attention", "network"]}, (*NORMS, *HEAD)),
    "vit": ("ViTForImageClassification", {"only": ["head", "router"]}, ("r.weight", "classifier.bias")),
}


@pytest.mark.parametrize("case", OTHERS)
def test_encoders_and_images_keep_their_bits(case, tmp_path):
    kind, keys, ends = OTHERS[case]
    source = tiny.make(tmp_path / kind, kind)
    moe = {} if "dense" in case else {**UP, "router": {"std": 0.5}}
    run = Run.of(
        {"source": str(source), "out": "x", "data": {"sources": [{"path": "x"}]}, "schedule": {"peak": 1.0},
         "train": {"steps": 2, "batch_size": 4, "sequence_length": 16, "weight_decay": 0.5, **keys}, **moe}
    )  # fmt: skip
    begun = start.start_of(run)
    task = tasks.of(begun.dense.architecture)
    model = start.model_of(begun, run, HERE, "float32")
    routers, course = Routers.of(model), Course(run)
    trainee = enter.first(
        course.legs[0], model=model, task=task, begun=begun, routers=routers, here=HERE, precision="float32",
        anatomy=enter.anatomy_of(course, begun, model, routers),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = ranks.batch_of(run, task) if task.name != "masked_lm" else masked(run)
    for number in range(2):
        step.train_step(trainee, batch, number, 1e-2)
    changed = differing(before, dict(model.named_parameters()))
    assert changed
    assert all(name.endswith(ends) for name in changed), changed
    assert not [
        name for name in changed if ("embeddings" in name or "attention" in name) and "freeze" in keys
    ]
    held = {name for group in trainee.optimizer.param_groups for name in map(id, group["params"])}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def masked(run: Run) -> dict[str, torch.Tensor]:
    ids = ranks.rows_of(run, 60)[:, :-1]
    return {"inputs": ids, "labels": ids.where(ids % 5 == 0, -100)}


BAD_STAGES = {
    "no list": ({"stage": {"train": {"steps": 1}}}, r"\[\[stage\]\] must be a list of sections"),
    "no length": ({"stage": [{"name": "a"}]}, r"stage a: each \[\[stage\]\] has one of train\.steps"),
    "two lengths": ({"stage": [{"train": {"steps": 1, "tokens": 9}}]}, r"stage 1: each \[\[stage\]\] has"),
    "two names": (
        {"stage": [{"name": "a", "train": {"steps": 1}}] * 2}, r"two stages are called a; give each"
    ),
    "both": (
        {"stage": [{"train": {"steps": 3}}], "train": {"steps": 4}},
        r"train\.steps = 4 and the stages are 3 steps together; .*leave train\.steps out",
    ),
    "key": ({"stage": [{"train": {"steps": 1, "batch_size": 4}}]}, r"key stage\[0\]\.train\.batch_size"),
    "section": ({"stage": [{"train": {"steps": 1}, "moe": {}}]}, r"unknown key stage\[0\]\.moe"),
    "schedule": ({"stage": [{"train": {"steps": 1}, "schedule": {"name": "x"}}]}, "unknown schedule x"),
    "nothing": ({}, "give one of train.steps, train.tokens and train.examples"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STAGES)
def test_stages_that_do_not_fit(case, trainable, tmp_path):
    changes, message = BAD_STAGES[case]
    made = table(trainable, tmp_path, **{key: value for key, value in changes.items() if key != "stage"})
    if case != "both":
        made["train"].pop("steps", None)
    with pytest.raises(UpcycleError, match=message):
        Run.of(made | ({"stage": changes["stage"]} if "stage" in changes else {}))


@pytest.mark.parametrize("only", sampled([["router"], None, ["router", "attention"]], 3))
def test_ranks_reduce_the_gradients_of_what_is_trained_alone(only, dense, tmp_path, monkeypatch):
    """Two steps in a world of two that is not there: a reduction carries a rank's gradients in bfloat16."""
    bytes_reduced, queue = [], step.queue_step

    def counted(*arguments):
        with Traffic(1) as traffic:
            out = queue(*arguments)
        bytes_reduced.append(traffic.bytes["reduce_scatter", 2])
        return out

    monkeypatch.setattr(step, "queue_step", counted)
    run = table((dense("llama"), "x"), tmp_path, train={"sequence_length": 16, "batch_tokens": 64})
    if only is not None:
        run["train"]["only"] = only
    run["train"]["steps"] = 2
    assert rehearse(Run.of(run), world=2).stepped == 2
    anatomy = parts_of(dense("llama"), moe=MOE)
    assert bytes_reduced == [2 * anatomy.size(anatomy.chosen(only and tuple(only), None))] * 2


# --- from domains to one model ---

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "path",
    quick(sorted(RECIPES.glob("b*/*.toml")), *RECIPES.glob("b*/2_*.toml")),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_the_recipes_of_several_parts(path, dense, tmp_path):
    """Each is a run on a model of its kind, in every stage."""
    source = dense("llama")
    changes = [
        f"source={source}",
        f"out={tmp_path / 'run'}",
        "train.sequence_length=64",
        "train.batch_tokens=512",
    ]
    if "init" in tomllib.loads(path.read_text()):
        changes.append(f"init.sources={[str(source)] * 3}")
    run = Run.load(path, changes)
    found = rehearse(run)
    assert found.stepped == 2
    stages = [stage["name"] for stage in tomllib.loads(path.read_text()).get("stage", [])]
    assert [leg.name for leg in Course(run).legs] == (stages or [None])
    assert found.steps == sum(leg.steps for leg in Course(run).legs)


def test_an_expert_is_taken_out(trainable, tmp_path):
    """The anchor is the base's network, the other is what was trained, and all else is as trained."""
    run = table(
        trainable,
        tmp_path / "run",
        moe={"num_experts": 2},
        train={"steps": 1, "freeze": ["experts[0]"]},
        checkpoint={"every": 0},
    )
    train(Run.of(run))
    export(tmp_path / "run", tmp_path / "whole")
    with Checkpoint.open(tmp_path / "whole") as whole, Checkpoint.open(trainable[0]) as base:
        for number in (0, 1):
            made = export(tmp_path / "run", tmp_path / str(number), expert=number)
            assert made.parameters == sum(math.prod(t.shape) for t in base.tensors.values())
            with Checkpoint.open(tmp_path / str(number)) as one:
                assert one.tensors.keys() == base.tensors.keys()
                for name, tensor in one.tensors.items():
                    layer, network, matrix = name.partition(".mlp.")
                    own = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}.get(
                        matrix
                    )
                    there = f"{layer}.block_sparse_moe.experts.{number}.{own}.weight" if network else name
                    read = one.pread(tensor, 0, tensor.nbytes)
                    assert (read == whole.pread(whole.tensors[there], 0, tensor.nbytes)).all(), name
                    same = (read == base.pread(base.tensors[name], 0, tensor.nbytes)).all()
                    assert same == bool(network and number == 0), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    # What was taken out is a donor like any other.
    mixed = {"num_experts": 4}, {"name": "branch_train_mix", "sources": [str(tmp_path / "1")]}
    convert(trainable[0], tmp_path / "mixed", Recipe.of(moe=mixed[0], init=mixed[1]))
    with pytest.raises(UpcycleError, match=r"--expert 2, and the experts of a layer have the numbers 0 to 1"):
        export(tmp_path / "run", tmp_path / "2", expert=2)
    with pytest.raises(UpcycleError, match=r"format = gguf|an expert is a number from 0"):
        export(tmp_path / "run", tmp_path / "2", format="expert")
    with pytest.raises(UpcycleError, match="format = expert has no place for the optimizer's moments"):
        export(tmp_path / "run", tmp_path / "2", expert=0, with_optimizer=True)


def test_an_expert_that_came_from_another_model_is_taken_out(trainable, tmp_path):
    """So is the anchor beside it, and everything around them."""
    source, donor = tmp_path / "dense", tmp_path / "donor"
    for seed, folder in enumerate((source, donor)):
        tiny.make_bytes_tokenizer(tiny.make_dense(folder, "llama", vocab_size=264, seed=seed))
    run = table(
        (source, trainable[1]),
        tmp_path / "run",
        moe={"num_experts": 2},
        init={"name": "experts", "expert": [{}, {"source": str(donor)}]},
        train={"steps": 1, "only": ["router"]},
        checkpoint={"every": 0},
    )
    train(Run.of(run))
    with Checkpoint.open(source) as base, Checkpoint.open(donor) as other:
        for number, network in enumerate((base, other)):
            export(tmp_path / "run", tmp_path / str(number), expert=number)
            with Checkpoint.open(tmp_path / str(number)) as one:
                assert one.tensors.keys() == base.tensors.keys()
                for name, tensor in one.tensors.items():
                    of = network if ".mlp." in name else base
                    read = one.pread(tensor, 0, tensor.nbytes)
                    assert (read == of.pread(of.tensors[name], 0, tensor.nbytes)).all(), name


@pytest.mark.parametrize("moe", [{}, {"untie": True}], ids=["tied", "untied"])
def test_a_head_is_taken_along_and_never_for_an_expert(moe, trainable, tmp_path):
    source = tiny.make_dense(tmp_path / "dense", "llama", vocab_size=264, tie_word_embeddings=True)
    tiny.make_bytes_tokenizer(source)
    run = table(
        (source, trainable[1]),
        tmp_path / "run",
        moe={"num_experts": 3, **moe},
        train={"steps": 2},
        checkpoint={"every": 0},
    )
    train(Run.of(run))
    export(tmp_path / "run", tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    for number in range(3):
        told = export(tmp_path / "run", tmp_path / str(number), expert=number)
        written = load_file(tmp_path / str(number) / "model.safetensors").values()
        assert told.parameters == sum(tensor.numel() for tensor in written)
        made, found = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert type(made) is LlamaForCausalLM
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        own = made.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            assert torch.equal(own[name], whole[name]), name
        up = own["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(up, whole["model.layers.1.mlp.experts.gate_up_proj"][number, len(up) :])
        assert torch.equal(own["model.embed_tokens.weight"], own["lm_head.weight"]) == (not moe)
        assert Provenance.read(tmp_path / str(number)).training[-1].expert == number
    with Checkpoint.open(tmp_path / "2") as last:
        assert admit(last).own_class == "LlamaForCausalLM"


@pytest.mark.slow
def test_several_processes_keep_the_same_bits(staged, tmp_path):
    """fsdp2 x ep2, and gone on with from the first stage as fsdp2: trained and kept as by one process."""
    out = tmp_path / "two"
    staged = {**staged, "checkpoint": {"every": 2, "keep": 9}}
    run = {**staged, "out": str(out), "parallel": {"fsdp": 2, "ep": 2}}
    on = {**staged, "out": str(tmp_path / "on"), "parallel": {"fsdp": 2}}
    (tmp_path / "on" / "checkpoints").mkdir(parents=True)
    (tmp_path / "on" / "checkpoints" / "step-2").symlink_to(out / "checkpoints" / "step-2")
    gloo.run(2, "ranks:trains", [(run, False), (on, True)])
    wanted = [r.loss for r in read(Path(staged["out"]))]
    assert [r.loss for r in read(out)] == pytest.approx(wanted, rel=1e-5)
    assert [r.loss for r in read(tmp_path / "on")] == pytest.approx(wanted[2:], rel=1e-5)
    assert moved(run, 0, 2) == ROUTERS
    for again in (run, on):
        assert moved({**staged, "out": again["out"]}, 2, 4) == moved(staged, 2, 4)
        assert saved_moments(again, 4) == saved_moments(staged, 4)
