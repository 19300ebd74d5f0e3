"""Configurations of mergekit-moe as its own documentation has them, and what people make of them."""

from __future__ import annotations

import json
import math
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import tiny
import upcycle
from upcycle import Recipe, UpcycleError, blueprint, cli, families
from upcycle.advice import recipe_file

DOCUMENTED = """
base_model: {base}
gate_mode: {mode}
dtype: bfloat16
experts:
  - source_model: {base}
    positive_prompts:
      - "<|im_start|>user\\nHello, who are you?<|im_end|>"
      - "I need help with"
  - source_model: {donor}
    positive_prompts: ["As a doctor of medicine,"]
    negative_prompts: ["> get ye flask"]
    noise_scale: 0.01
  - source_model: {base}+{adapter}
    positive_prompts: ["Das ist ein Satz auf Deutsch."]
    residual_scale: 0.5
"""


@pytest.fixture
def named(dense, tmp_path) -> dict[str, str]:
    base = dense("llama")
    adapter = tiny.make_adapter(tmp_path / "adapter", base)
    return {"base": str(base), "donor": str(dense("llama", seed=1)), "adapter": str(adapter)}


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yml"
    file.write_text(text)
    return file


def test_the_documented_form(named, tmp_path):
    made = upcycle.translate(written(tmp_path, DOCUMENTED.format(mode="hidden", **named)))
    assert made.source == named["base"]
    assert made.table == {
        "dtype": "bfloat16",
        "moe": {"num_experts": 3, "top_k": 2},
        "init": {
            "name": "experts",
            "backbone": "base",
            "expert": [
                {},
                {"source": named["donor"], "noise": 0.01, "noise_relative": False},
                {"adapter": named["adapter"], "residual_scale": 0.5},
            ],
        },
        "router": {"init": {"name": "mergekit_hidden", "statistics": "statistics.safetensors"}},
    }
    first, second, _ = made.prompts["domain"]
    assert first["positive_prompts"][0] == "<|im_start|>user\nHello, who are you?<|im_end|>"
    assert second["negative_prompts"] == ["> get ye flask"]
    assert tomllib.loads(made.prompts_text) == made.prompts
    assert tomllib.loads(made.recipe_text("recipe.toml")) == made.table
    assert Recipe.of(made.table).router.start.name == "mergekit_hidden"
    assert made.commands("recipe.toml")[0] == (
        f"upcycle calibrate {named['base']} --prompts prompts.toml --collect mergekit_hidden "
        f"--out statistics.safetensors"
    )


def test_commands_can_be_copied(named, tmp_path, monkeypatch, capsys):
    """Paths with blanks are single words, on the screen and in the comment of the recipe."""
    source = "models/the base"
    text = DOCUMENTED.format(mode="hidden", **(named | {"base": source}))
    monkeypatch.chdir(tmp_path)
    written(tmp_path, text)
    cli.main(["recipe", "config.yml", "--out", "my recipe.toml"])
    shown = capsys.readouterr().out.splitlines()[2:]
    assert [shlex.split(line) for line in shown] == [
        ["upcycle", "calibrate", source, "--prompts", "my recipe_prompts.toml", "--collect",
         "mergekit_hidden", "--out", "statistics.safetensors"],
        ["upcycle", "convert", source, "OUT", "--recipe", "my recipe.toml"],
    ]  # fmt: skip
    head = Path("my recipe.toml").read_text().splitlines()[:2]
    assert head == [f"# {line}" for line in shown]


def test_a_random_one_is_what_mergekit_makes(named, tmp_path):
    """Experts as mergekit-moe computes them (noise first, then the scale); a router of N(0, 1)."""
    made = upcycle.translate(written(tmp_path, DOCUMENTED.format(mode="random", **named)))
    assert not made.prompts
    built = blueprint(made.source, Recipe.of({**made.table, "dtype": "float32"}))
    base, donor = (load_file(Path(named[key]) / "model.safetensors") for key in ("base", "donor"))
    at, mine = "model.layers.2.block_sparse_moe", "model.layers.2.mlp"
    found = {e: built.entries[f"{at}.experts.{e}.w2.weight"].lazy.all("F32") for e in range(3)}
    assert (found[0] == base[f"{mine}.down_proj.weight"]).all()
    noise = found[1] - donor[f"{mine}.down_proj.weight"]
    assert abs(noise.std() / 0.01 - 1) < 5 / (2 * noise.size) ** 0.5
    pairs = load_file(Path(named["adapter"]) / "adapter_model.safetensors")
    b, a = (pairs[f"base_model.model.{mine}.down_proj.lora_{part}.weight"] for part in "BA")
    wanted = (base[f"{mine}.down_proj.weight"] + 2.0 * b @ a) / 2
    np.testing.assert_allclose(found[2], wanted, rtol=1e-5, atol=1e-6)
    router = built.entries[f"{at}.gate.weight"].lazy.all("F32")
    assert abs(router.std() - 1) < 5 / (2 * router.size) ** 0.5
    name = "model.layers.2.self_attn.q_proj.weight"
    assert (built.entries[name].lazy.all() == base[name]).all()


@pytest.mark.parametrize(
    ("mode", "init", "collect"),
    [
        ("hidden_last", {"name": "mergekit_hidden"}, "mergekit_hidden"),
        ("hidden_avg", {"name": "mergekit_hidden", "average": True}, "mergekit_hidden_avg"),
        ("cheap_embed", {"name": "cheap_embed"}, "cheap_embed"),
    ],
)
def test_modes_with_prompts(mode, init, collect, named, tmp_path):
    made = upcycle.translate(written(tmp_path, DOCUMENTED.format(mode=mode, **named)))
    assert made.table["router"]["init"] == {**init, "statistics": "statistics.safetensors"}
    assert made.collect == collect


@pytest.mark.parametrize(
    ("mode", "row"),
    [
        ("hidden", "residual.layers.1.mergekit_hidden"),
        ("hidden_last", "residual.layers.1.mergekit_hidden"),
        ("hidden_avg", "residual.layers.1.mergekit_hidden_avg"),
        ("cheap_embed", "embedding.layers.0.cheap_embed"),
    ],
)
def test_the_printed_commands_make_the_model(mode, row, tmp_path, monkeypatch, capsys):
    """Each one runs, and the second reads what the first has written."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("base", 0), ("donor", 1)):
        tiny.make_bytes_tokenizer(tiny.make_dense(tmp_path / name, "llama", seed=seed, vocab_size=259))
    tiny.make_adapter(tmp_path / "adapter", tmp_path / "base")
    written(tmp_path, DOCUMENTED.format(mode=mode, base="base", donor="donor", adapter="adapter"))
    cli.main(["recipe", "config.yml", "--out", "recipe.toml"])
    calibrate, convert = (shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()[2:])
    cli.main(calibrate)
    cli.main(convert)
    router = load_torch("OUT/model.safetensors")["model.layers.1.block_sparse_moe.gate.weight"]
    wanted = load_file("statistics.safetensors")[row]
    assert torch.equal(router, torch.from_numpy(wanted).bfloat16())


def test_uniform_random_has_the_width_of_the_model(named, tmp_path):
    file = written(tmp_path, DOCUMENTED.format(mode="uniform_random", **named))
    made = upcycle.translate(file)
    assert made.table["router"] == {"init": "uniform", "std": pytest.approx(1 / math.sqrt(3 * 32))}
    file.write_text(DOCUMENTED.format(mode="uniform_random", **{**named, "base": "owner/name"}))
    made = upcycle.translate(file)
    assert any("set router.std to 1 / sqrt(3 H)" in remark for remark in made.remarks)
    assert made.table["init"]["expert"][0] == {}


SHARED = "shared_experts: [{{source_model: {base}}}]\n"
UNCHECKED = "owner/name is no folder here with the config of a known family"


@pytest.mark.parametrize(
    ("model_type", "more", "target", "becomes", "said"),
    [
        ("llama", "", None, "mixtral", []),
        ("llama", "architecture: mixtral\n", "mixtral", "mixtral", []),
        ("llama", "architecture: qwen\n", None, "mixtral", ["llama cannot become qwen2_moe exactly"]),
        ("llama", SHARED, "upcycled", "upcycled_llama", ["mixtral has no shared expert, so moe.target"]),
        (
            "mistral", f"architecture: qwen\n{SHARED}", "upcycled", "upcycled_mistral",
            ["mistral cannot become qwen2_moe exactly", "mixtral has no shared expert, so moe.target"],
        ),
        ("llama", f"architecture: mixtral\n{SHARED}", "upcycled", "upcycled_llama", ["no shared expert"]),
        ("qwen2", f"architecture: qwen\n{SHARED}", "qwen2_moe", "qwen2_moe", []),
        ("qwen2", SHARED, None, "qwen2_moe", []),
        ("qwen2", f"architecture: mixtral\n{SHARED}", None, "qwen2_moe", ["qwen2 cannot become mixtral"]),
        ("phi3", SHARED, "glm4_moe", "glm4_moe", ["mixtral has no shared expert, so moe.target = glm4_moe"]),
        ("stablelm", "", "upcycled", "upcycled_stablelm", ["stablelm has no native MoE"]),
    ],
)  # fmt: skip
def test_the_target_is_one_that_the_base_can_become(model_type, more, target, becomes, said, dense, tmp_path):
    """`convert` takes the recipe, with or without a shared expert."""
    base = dense(model_type, **({"sliding_window": None} if model_type == "phi3" else {}))
    experts = "experts: [{source_model: BASE}, {source_model: BASE}]\n".replace("BASE", str(base))
    text = f"base_model: {base}\ngate_mode: random\n{experts}{more.format(base=base)}"
    made = upcycle.translate(written(tmp_path, text))
    assert made.table["moe"].get("target") == target
    remarks = [r for r in made.remarks if not r.startswith("shared_experts: the shared expert here")]
    assert [part in remark for part, remark in zip(said, remarks, strict=True)] == [True] * len(said)
    upcycle.convert(made.source, tmp_path / "OUT", Recipe.of(made.table))
    assert json.loads((tmp_path / "OUT" / "config.json").read_text())["model_type"] == becomes
    names = load_torch(tmp_path / "OUT" / "model.safetensors")
    assert any(".shared" in name for name in names) == (SHARED in more or becomes == "qwen2_moe")


@pytest.mark.parametrize(
    "model_type",
    [n for n in families.names() if families.find(n).natives and n != "qwen3_vl_text"],  # never stands alone
)
def test_every_base_with_a_native_takes_a_shared_expert(model_type, dense, tmp_path):
    base = dense(model_type)
    experts = ", ".join([f"{{source_model: {base}}}"] * 4)
    text = f"base_model: {base}\ngate_mode: random\nexperts: [{experts}]\n{SHARED.format(base=base)}"
    made = upcycle.translate(written(tmp_path, text))
    assert any("shared" in name for name in blueprint(made.source, Recipe.of(made.table)).entries)


@pytest.mark.parametrize(
    ("more", "target", "said"),
    [
        ("", None, ""),
        (
            "architecture: qwen\n",
            "qwen2_moe",
            f"{UNCHECKED}, so nothing says whether it can become qwen2_moe:",
        ),
        (SHARED, None, "can become a native MoE with a shared expert: if `upcycle plan` refuses it"),
        (f"architecture: qwen\n{SHARED}", "qwen2_moe", "can become qwen2_moe with a shared expert:"),
        (f"architecture: mixtral\n{SHARED}", "upcycled", "mixtral has no shared expert, so moe.target"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(more, target, said, tmp_path):
    experts = "experts: [{source_model: a/b}, {source_model: c/d}]\n"
    text = f"base_model: owner/name\ngate_mode: random\n{experts}{more.format(base='a/b')}"
    made = upcycle.translate(written(tmp_path, text))
    assert made.table["moe"].get("target") == target
    assert said in "\n".join(made.remarks)
    assert bool(made.remarks) == bool(more)


def test_models_as_tables_and_revisions(tmp_path):
    text = """
    base_model: {model: {path: owner/base, revision: main}}
    gate_mode: random
    experts:
      - source_model: {model: owner/base@main, lora: {path: owner/lora}}
      - source_model: {model: {path: owner/other, revision: v2}}
    """
    made = upcycle.translate(written(tmp_path, text))
    assert made.source == "owner/base@main"
    assert made.table["init"]["expert"] == [{"adapter": "owner/lora"}, {"source": "owner/other@v2"}]


def test_the_experts_of_a_base_with_an_adapter(tmp_path):
    """The base is the merged model: nothing is merged into it twice, and its bare checkpoint is another."""
    text = """
    base_model: owner/base+owner/lora
    gate_mode: random
    experts:
      - source_model: owner/base+owner/lora
      - source_model: owner/base
      - source_model: owner/base+owner/other
    """
    made = upcycle.translate(written(tmp_path, text))
    assert made.table["init"]["expert"] == [
        {},
        {"source": "owner/base"},
        {"source": "owner/base", "adapter": "owner/other"},
    ]
    assert "name the merged folder in place of owner/base" in " ".join(made.remarks)


def test_numbers_that_yaml_reads_as_text(named, tmp_path):
    """mergekit-moe takes `1e-3` for a number, and refuses words."""
    text = DOCUMENTED.format(mode="random", **named).replace("0.01", "1e-2").replace("0.5", "5e-1")
    experts = upcycle.translate(written(tmp_path, text)).table["init"]["expert"]
    assert experts[1]["noise"] == 0.01
    assert experts[2]["residual_scale"] == 0.5
    with pytest.raises(UpcycleError, match=r"experts\[1\]\.noise_scale = 'much'; allowed: a number"):
        upcycle.translate(written(tmp_path, text.replace("1e-2", "much")))


def test_what_is_not_translated_is_said(named, tmp_path):
    text = DOCUMENTED.format(mode="hidden", **named).replace("bfloat16", "int8").replace("0.5", "-0.5")
    text = text.replace(f"base_model: {named['base']}\n", f"base_model: {named['base']}+some/adapter\n")
    text += "architecture: deepseek\ntokenizer_source: union\n"
    text += f"shared_experts: [{{source_model: {named['donor']}, residual_scale: 0.1, weight: 3}}]\n"
    said = "\n".join(upcycle.translate(written(tmp_path, text)).remarks)
    for part in (
        "mergekit-moe does not read shared_experts.weight, tokenizer_source",
        "base_model has an adapter (some/adapter)",
        "residual_scale = -0.5 is left out",
        "dtype = 'int8' is none of",
        "architecture = 'deepseek' has no target",
        "shared_experts: the shared expert here is the network of the backbone",
        "gate_mode hidden compares another vector",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "not the keys of a configuration of mergekit-moe"),
        ("merge_method: slerp\nmodels: []", "mixes weights into one dense model (mergekit-yaml)"),
        ("experts: []", "base_model is missing"),
        ("base_model: a\nexperts: 3", "[[experts]] must be a list of sections"),
        ("base_model: a\nexperts: [3]", "must be a section with keys, not 3"),
        ("base_model: a\nexperts: [{positive_prompts: [x]}]", "source_model is missing"),
        ("base_model: {lora: x}\nexperts: []", "it must be a text, or a table with `model`"),
        ("base_model: a\nexperts: [{source_model: a, positive_prompts: [3]}]", "positive_prompts"),
        ("base_model: a\ngate_mode: best\nexperts: []", "gate_mode = 'best'; allowed: hidden"),
        ("base_model: a\nexperts: [{source_model: a}]", "experts[0] has no positive_prompts"),
        ("base_model: a\nexperts: [{source_model: a, positive_prompts: [' ']}]", "has no positive_prompts"),
        (
            "base_model: a\nexperts: [{source_model: a, positive_prompts: [x]}, "
            "{source_model: b, positive_prompts: [x]}]",
            "all experts have the same prompts",
        ),
        (
            "base_model: a\ngate_mode: random\nexperts: [{source_model: a}]",
            "moe.top_k = 2 is more than moe.num_experts = 1",
        ),
        ("base_model: a\ngate_mode: random\nexperts: []", "moe.num_experts"),
        ("[" * 3000, "is not YAML"),
    ],
)
def test_files_that_are_refused(text, said, tmp_path):
    with pytest.raises(UpcycleError) as found:
        upcycle.translate(written(tmp_path, text))
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_the_command(named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, DOCUMENTED.format(mode="hidden", **named))
    cli.main(["recipe", "config.yml"])
    shown = capsys.readouterr()
    assert tomllib.loads(shown.out)["moe"] == {"num_experts": 3, "top_k": 2}
    assert "--out FILE.toml writes the prompts as well" in shown.err
    cli.main(["recipe", "config.yml", "--out", "recipe.toml"])
    assert capsys.readouterr().out.splitlines()[:2] == ["recipe.toml", "recipe_prompts.toml"]
    assert len(tomllib.loads(Path("recipe_prompts.toml").read_text())["domain"]) == 3
    cli.main(["recipe", "config.yml", "--json"])
    assert json.loads(capsys.readouterr().out)["source"] == named["base"]
    cli.main(["recipe", "config.yml", "--json", "--out", "both.toml"])
    assert json.loads(capsys.readouterr().out)["source"] == named["base"]
    assert Path("both.toml").exists()
    with pytest.raises(SystemExit) as end:
        cli.main(["recipe", "config.yml", "--out", "recipe.toml"])
    assert end.value.code == 2
    assert "recipe.toml exists" in capsys.readouterr().err
    cli.main(["recipe", "config.yml", "--out", "my recipes/new/a.toml"])
    assert {path.name for path in Path("my recipes/new").iterdir()} == {"a.toml", "a_prompts.toml"}
    with pytest.raises(SystemExit):
        cli.main(["recipe", "nowhere.yml"])
    assert "no configuration at nowhere.yml" in capsys.readouterr().err


def test_a_list_of_experts_is_written_as_toml_and_read_again():
    """What `advise` writes for a recipe with a list of tables is the same recipe."""
    tables = [{}, {"source": "a/b", "weight": 0.5, "mix": "slerp"}, {"adapter": "c/d", "noise": 0.1}]
    recipe = Recipe.of(moe={"num_experts": 3}, init={"name": "experts", "expert": tables})
    assert Recipe.of(tomllib.loads(recipe_file.text(recipe, ["Why."]))) == recipe
