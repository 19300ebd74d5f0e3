"""`inspect` on checkpoints with anything in config, tensors and provenance: what it is, or a sentence."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from damage import spoil
from marks import quick
from tiny import make, make_dense
from upcycle import Recipe, UpcycleError, cli, convert
from upcycle.dense.subject import Subject
from upcycle.inspection import inspect

MOE = {"num_experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A native MoE, one whose experts are fused, and an upcycled one, with their sources beside them."""
    base = tmp_path_factory.mktemp("odd")
    llama, vit = make_dense(base / "llama", "llama"), make(base / "vit", "ViTForImageClassification")
    sizes = {"mixtral": llama, "granitemoe": llama, "upcycled": vit}
    for target, source in sizes.items():
        convert(source, base / target, Recipe.of(moe={**MOE, "target": target}))
    return {target: base / target for target in sizes}


def looked_at(folder: Path, capsys) -> str:
    """What inspect says of a folder; at worst a sentence and 2."""
    code: object = 0
    try:
        cli.main(["inspect", str(folder)])
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert code in (0, 2)
    return shown.err


@pytest.mark.parametrize("name", quick(["mixtral", "granitemoe", "upcycled"], "upcycled"))
@pytest.mark.parametrize("file", ["config.json", "upcycle.json"])
def test_json_with_anything_in_it(name, file, models, tmp_path, capsys):
    drawn = random.Random(f"{name} {file}")
    folder = Path(shutil.copytree(models[name], tmp_path / "model"))
    text = (folder / file).read_text()
    for _ in range(25):
        (folder / file).write_text(json.dumps(spoil(drawn, json.loads(text))))
        looked_at(folder, capsys)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "upcycled"])
def test_tensors_with_other_names_and_shapes(name, models, tmp_path, capsys):
    drawn = random.Random(name)
    folder = Path(shutil.copytree(models[name], tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    experts = [n for n in stored if "expert" in n or "router" in n or "gate" in n or "moe" in n]
    shapes = [(), (3,), (0,), (2, 3), (2, 0), (2, 3, 4), (1, 1, 1), (5, 0, 2), (1, 2, 3, 4)]
    for _ in range(25):
        tensors = dict(stored)
        for victim in drawn.sample(experts, drawn.choice([1, 1, 2])):
            what = drawn.choice(["shape", "name", "gone"])
            tensor = tensors.pop(victim)
            if what == "shape":
                tensors[victim] = torch.ones(drawn.choice(shapes))
            elif what == "name":
                other = drawn.choice(["x", "-1", "1e3", "99999999", "", "\u0661"])
                tensors[drawn.choice([victim + other, victim.replace("1", other), other])] = tensor
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        looked_at(folder, capsys)


def test_what_is_said_of_them(models, tmp_path):
    for name, change, said in (
        ("model.layers.x.mlp.gate.weight", (2, 2), "'x' is no number of a layer"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", (0, 2), "without a single number"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", (3,), "matrices of an expert do not fit"),
    ):
        folder = Path(shutil.copytree(models["mixtral"], tmp_path / str(len(said))))
        tensors = load_file(folder / "model.safetensors") | {name: torch.ones(change)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UpcycleError, match=said):
            inspect(folder)
    folder = Path(shutil.copytree(models["upcycled"], tmp_path / "moe"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe": [5]}))
    with pytest.raises(UpcycleError, match="`moe` is not the list that upcycle writes"):
        inspect(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [*(("max_position_embeddings", odd) for odd in ("x", -1, None, 10**30, 64.5)), ("sliding_window", "x")],
)
def test_advise_on_a_config_with_odd_numbers(key, value, tmp_path, capsys):
    folder = make_dense(tmp_path / "dense", "mistral" if key == "sliding_window" else "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    code: object = 0
    try:
        cli.main(["advise", str(folder), "--tokens", "1e6"])
    except SystemExit as ended:
        code = ended.code
    assert code in (0, 2)


@pytest.mark.parametrize(
    ("config", "ask", "said"),
    [
        ({"architectures": 5}, "architecture", "architectures = 5; it must be a list"),
        ({"architectures": [None]}, "architecture", "must be a list with the name of a class"),
        ({"model_type": "mixtral"}, "length", "max_position_embeddings = None; it must be a whole number"),
        ({"model_type": "mixtral", "max_position_embeddings": "x"}, "length", "it must be a whole number"),
        ({"model_type": "mixtral", "vocab_size": 2.5}, "vocab_size", "vocab_size = 2.5; it must be"),
        ({"id2label": 7}, "num_labels", "id2label = 7; it must be a table of names"),
    ],
)
def test_what_a_task_asks_of_an_odd_config(config, ask, said, tmp_path):
    with pytest.raises(UpcycleError, match=said):
        getattr(Subject(folder=tmp_path, config=config), ask)
