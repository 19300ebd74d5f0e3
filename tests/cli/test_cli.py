"""The command line as a person meets it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys

import pytest

from marks import quick
from upcycle import cli
from upcycle.demo import corpus, story
from upcycle.training import loop

COMMANDS = [
    [], ["plan"], ["convert"], ["verify"], ["inspect"], ["list"], ["demo"], ["train"], ["export"],
    ["calibrate"], ["advise"], ["report"], ["recipe"],
]  # fmt: skip


def test_help_imports_nothing_heavy():
    """Of any command: all of them are asked in one process."""
    script = (
        "import sys\nfrom upcycle.cli import main\n"
        "for words in eval(sys.argv[1]):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as e: print('exit', e.code)\n"
        "print(*[m for m in ('numpy', 'torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script, repr(COMMANDS)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == ""
    assert run.stdout.count("exit 0") == run.stdout.count("usage: upcycle") == len(COMMANDS)


@pytest.mark.parametrize("command", quick(COMMANDS, [], ["train"]), ids=lambda c: " ".join(c) or "upcycle")
def test_help_is_quick_and_imports_nothing_heavy(command):
    """Under 0.5 s of CPU; neither numpy nor torch nor transformers is loaded."""
    script = (
        "import sys\nfrom upcycle.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: print('exit', e.code)\n"
        "print(*[m for m in ('numpy', 'torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    best = float("inf")
    for _ in range(3):  # other processes take caches, and so CPU seconds that are not all ours
        if best < 0.5:
            break
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run(
            [sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert run.stdout.splitlines()[-2:] == ["exit 0", ""]
    assert "usage: upcycle" in run.stdout
    assert best < 0.5


def test_help_names_every_key_of_a_recipe_option():
    run = subprocess.run(
        [sys.executable, "-m", "upcycle", "convert", "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    wanted = {
        "recipe",
        "set",
        "experts",
        "top-k",
        "init",
        "layers",
        "target",
        "dtype",
        "seed",
        "resume",
        "jobs",
    }
    assert wanted <= set(re.findall(r"--([a-z-]+)", run.stdout))
    assert "SOURCE OUT" in run.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["keys", "--markdown", "--json"], "--markdown and --json are both given"),
        (["list", "--markdown", "--json"], "--markdown and --json are both given"),
        (["verify", "a", "b", "--no-logits", "--text", "t.txt"], "--text is what logits are compared on"),
        (["verify", "a", "b", "--no-logits", "--images", "i"], "--images is what logits are compared on"),
        (["train", "run.toml", "--dry-run", "--resume"], "a dry run begins at the first step"),
    ],
)
def test_options_of_which_one_would_not_be_read(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_plan_json(dense, capsys):
    cli.main(["plan", str(dense("llama", head_dim=8)), "--json"])
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert err == ""
    assert {
        "dense_parameters", "total_parameters", "active_parameters", "dense_flops_per_token",
        "flops_per_token", "output_bytes", "peak_memory_bytes", "blueprint_hash", "preserves_function",
        "warnings",
    } <= set(plan)  # fmt: skip
    assert plan["preserves_function"] is True
    assert plan["warnings"] == []


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("llama", ["--top-k", "1"], "no gradient"),
        ("llama", ["--set", "router.init=zeros"], "same experts"),
        ("llama", ["--set", "router.std=0"], "same experts"),
        ("llama", ["--init", "drop"], "50-100 B"),
        ("llama", ["--init", "virtual_group", "--set", "moe.granularity=2"], "grouped"),
        ("llama", ["--init", "virtual_group", "--experts", "32", "--top-k", "32",
                   "--set", "moe.granularity=32"], "no multiple of 16"),
        ("qwen2", [], "llama.cpp never renormalises"),
        ("qwen2", [], "mlx-lm never renormalises"),
        ("qwen2", ["--set", "router.normalize=false"], "scaled by 4"),
        ("qwen2", [], "zero down projection"),
        ("qwen3", ["--set", "router.normalize=false"], "llama.cpp always renormalises"),
        ("olmo2", [], "llama.cpp has no flex_olmo"),
        ("gemma", [], "hard-codes SiLU"),
    ],
)  # fmt: skip
def test_warnings(model_type, options, words, dense, capsys):
    cli.main(
        [
            "plan",
            str(dense(model_type, intermediate_size=48 if model_type != "llama" else 96)),
            "--json",
            *options,
        ]
    )
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any(words in w for w in warnings), warnings


def test_a_session(dense, tmp_path, capsys):
    """plan, convert, verify, inspect: text for people, on standard output."""
    source, out = str(dense("llama")), str(tmp_path / "moe")
    cli.main(["plan", source])
    assert "computes what the dense model computes: yes" in capsys.readouterr().out
    cli.main(["convert", source, out, "--experts", "4", "--layers", "all", "--dtype", "bfloat16"])
    assert f"upcycle verify {source} {out}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", source, out])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.endswith("holds\n")
    cli.main(["inspect", out])
    assert "bfloat16" in capsys.readouterr().out
    cli.main(["inspect", source])
    assert "dense" in capsys.readouterr().out
    cli.main(["list"])
    listed = capsys.readouterr().out
    for name in ("qwen3_5_text", "granitemoe_swa", "branch_train_mix", "orthogonal"):
        assert name in listed


def test_recipe_file_and_options(dense, tmp_path, capsys):
    (tmp_path / "r.toml").write_text('[moe]\nnum_experts = 4\n[init]\nname = "drop"\nratio = 0.25\n')
    source = str(dense("qwen3"))
    cli.main(
        ["plan", source, "--json", "--recipe", str(tmp_path / "r.toml"), "--layers", "1,3", "--top-k", "1"]
    )
    plan = json.loads(capsys.readouterr().out)
    assert (plan["num_experts"], plan["top_k"], plan["moe_layers"]) == (4, 1, [1, 3])


def tampered(dense, tmp_path, change) -> tuple[str, str]:
    source, out = dense("llama"), tmp_path / "moe"
    cli.main(["convert", str(source), str(out)])
    change(out)
    return str(source), str(out)


def flip_a_byte(out):
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)
        file.seek(-100, 2)
        file.write(bytes([byte[0] ^ 1]))


def drop_a_tensor(out):
    from safetensors.torch import load_file, save_file

    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.2.block_sparse_moe.experts.3.w1.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def change_config(out):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("change", "check"),
    [(flip_a_byte, "bytes"), (drop_a_tensor, "target coverage, transformers"), (change_config, "config")],
)
def test_verify_fails_with_1(change, check, dense, tmp_path, capsys):
    source, out = tampered(dense, tmp_path, change)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", source, out, "--json", "--no-logits"])
    assert exit_.value.code == 1
    proof = json.loads(capsys.readouterr().out)
    assert proof["holds"] is False
    assert check in [c["name"] for c in proof["checks"] if c["holds"] is False]


def test_verify_of_another_source(dense, tmp_path, capsys):
    _, out = tampered(dense, tmp_path, lambda out: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", str(dense("llama", seed=1)), out, "--json"])
    assert exit_.value.code == 1
    failed = {c["name"] for c in json.loads(capsys.readouterr().out)["checks"] if c["holds"] is False}
    assert failed == {"bytes", "provenance", "logits, random", "logits, padded on the left", "generation"}


def test_inspect_numbers(dense, tmp_path, capsys):
    """Cosines and norms against torch's own on the loaded model."""
    import torch
    from transformers import AutoModelForCausalLM

    for model_type, init in (("llama", "drop"), ("granite", "noise"), ("qwen2", "drop")):
        source, out = str(dense(model_type)), str(tmp_path / model_type)
        cli.main(["convert", source, out, "--init", init, "--experts", "4"])
        capsys.readouterr()
        cli.main(["inspect", out, "--json"])
        found = json.loads(capsys.readouterr().out)
        model = AutoModelForCausalLM.from_pretrained(out)
        original = AutoModelForCausalLM.from_pretrained(source)
        for row, layer, dense_layer in zip(
            found["layers"], model.model.layers, original.model.layers, strict=True
        ):
            moe = layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp
            router = moe.router if hasattr(moe, "router") else moe.gate
            experts = torch.cat([moe.experts.gate_up_proj.flatten(1), moe.experts.down_proj.flatten(1)], 1)
            mlp = dense_layer.mlp
            flat = torch.cat([m.weight.flatten() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)])
            wanted = torch.nn.functional.cosine_similarity(experts[:, None], experts[None], dim=-1)
            assert torch.allclose(torch.tensor(row["cosine"]), wanted, atol=1e-5)
            to_dense = torch.nn.functional.cosine_similarity(experts, flat[None], dim=-1)
            assert torch.allclose(torch.tensor(row["cosine_to_dense"]), to_dense, atol=1e-5)
            assert torch.allclose(torch.tensor(row["router_norms"]), router.weight.norm(dim=1), atol=1e-5)
            assert (row["num_experts"], row["width"], row["dtype"]) == (4, 48, "float32")


def test_interrupt(dense, tmp_path, capsys, monkeypatch):
    from upcycle.conversion import write

    monkeypatch.setattr(write, "_write_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["convert", str(dense("llama")), str(tmp_path / "moe")])
    assert exit_.value.code == 130
    assert "--resume" in capsys.readouterr().err


def test_public_names():
    import upcycle

    for name in upcycle.__all__:
        assert getattr(upcycle, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        upcycle.nosuch  # noqa: B018


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch):
    """The whole story on some of the standard library's sources, with a second of training, from the model
    within."""
    monkeypatch.setattr(corpus, "BYTES", 400_000)
    monkeypatch.setattr(story, "EVAL_ROWS", 16)
    cli.main(["demo", "--out", str(tmp_path / "demo"), "--seconds", "1"])
    out = capsys.readouterr().out
    assert "At equal FLOPs the best MoE" in out
    assert "NO" not in out
    assert "bits_per_byte" in out
    page = (tmp_path / "demo" / "report.html").read_text()
    for said in ("8 experts, top-2, copy", "16 experts, top-2, shuffle_slice", "What a longer training gave"):
        assert said in page
    assert (tmp_path / "demo" / "report.md").exists()
    for name in ("copy", "granular"):
        trained = tmp_path / "demo" / "trained" / name
        assert {"eval.json", "routing.json", "upcycle.json"} <= {path.name for path in trained.iterdir()}


def test_a_demo_whose_training_was_stopped_ends(tmp_path, monkeypatch):
    """SIGTERM ends a training with a checkpoint; a model that was trained for less is not compared."""
    real, runs = loop.train, []

    def stopped(run, **options):
        runs.append(run.out)
        found = real(run, **options)
        return found if len(runs) < 2 else dataclasses.replace(found, finished=False)

    monkeypatch.setattr(corpus, "BYTES", 400_000)
    monkeypatch.setattr(story, "EVAL_ROWS", 16)
    monkeypatch.setattr(loop, "train", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--out", str(tmp_path / "demo"), "--seconds", "1"])
    assert ended.value.code == 130
    assert len(runs) == 2
    assert not (tmp_path / "demo" / "report.html").exists()


def test_split_and_the_router_that_keeps_its_function(dense, capsys):
    """README, warnings and what is planned name the same setting."""
    source = str(dense("llama", intermediate_size=64, head_dim=8))
    split = ["plan", source, "--json", "--init", "split", "--experts", "4", "--set", "moe.granularity=4"]
    found = {}
    for top_k in (2, 4):
        for router in ("zeros", "uniform", "normal"):
            cli.main([*split, "--top-k", str(top_k), "--set", f"router.init={router}"])
            plan = json.loads(capsys.readouterr().out)
            found[top_k, router] = plan["preserves_function"], " ".join(plan["warnings"])
    assert found[4, "zeros"] == (True, "")
    for router in ("uniform", "normal"):
        kept, said = found[4, router]
        assert not kept
        assert "router.init = zeros keeps the function" in said
    assert "same experts" in found[2, "zeros"][1]
    assert found[2, "uniform"] == (False, "")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "nowhere.toml"], "no run file at nowhere.toml"),
        (["train", "RUN", "--set", "source=nowhere"], "nowhere does not exist"),
        (["train", "RUN", "--set", "moe.num_experts=many"], "allowed: whole number"),
        (["train", "RUN", "--set", "moe.target=olmoe"], "does not compute the same"),
        (["train", "RUN", "--set", 'data.sources=[{path="nowhere.txt"}]'], "no data at nowhere.txt"),
        (["eval", "nowhere", "--text", "RUN"], "nowhere does not exist"),
        (["eval", "SOURCE", "--text", "nowhere.txt"], "no data at nowhere.txt"),
        (["eval", "SOURCE", "--images", "nowhere"], "no data at nowhere"),
        (["eval", "SOURCE"], "give either --text FILE or --images SET"),
        (["eval", "--text", "RUN"], "give at least one CHECKPOINT"),
        (["demo", "--seconds", "nan", "--out", "nowhere"], "--seconds nan; it must be a number above zero"),
    ],
)
def test_trivial_mistakes_do_not_wait_for_torch(command, said, dense, tmp_path, monkeypatch, capsys):
    source, slow = (
        dense("llama"),
        ("upcycle.training.loop", "upcycle.evaluation.scores", "upcycle.tasks"),
    )
    for module in slow:  # those that import torch
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(
        f'source = "{source}"\nout = "out"\ntrain.steps = 1\nschedule.peak = 1e-3\nmoe.num_experts = 2\n'
        'data.sources = [{path = "run.toml"}]\n'
    )
    named = {"RUN": "run.toml", "SOURCE": str(source)}
    with pytest.raises(SystemExit) as exit_:
        cli.main([named.get(word, word) for word in command])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
    assert command[0] == "demo" or not set(slow) & set(sys.modules)


def test_version(capsys):
    import upcycle

    cli.main(["--version"])
    assert capsys.readouterr().out == f"upcycle {upcycle.__version__}\n"


def test_no_sentence_of_the_help_is_broken_off(monkeypatch, capsys):
    """tyro breaks a line where a docstring does; on a wide screen every option has one line."""
    monkeypatch.setenv("COLUMNS", "500")
    for command in {c[0] for c in COMMANDS if c} | {"eval", "keys"}:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert any(re.match(r"\W?\s*-h, --help  ", line) for line in lines)
        assert [line for line in lines if re.match(r"\W? {8,}\w", line)] == []


@pytest.mark.parametrize("command", [c[0] for c in COMMANDS if c] + ["eval", "keys"])
def test_help_says_what_options_do(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for odd in (
        "(default: )",
        "(default: None)",
        "(default: False)",
        "(default: '')",
        "{None}",
        "repeatable (",
    ):
        assert odd not in said
    if command == "verify":
        assert "--no-logits leave out the comparison of logits" in said


def test_texts_of_eval_may_have_names(trainable, tmp_path, capsys):
    import shutil

    source, text = trainable
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text.read_text()[:2000])
    model = shutil.copytree(source, tmp_path / "model")
    cli.main(["eval", str(model), "--json", "--text", f"first={tmp_path / 'one' / 'text.txt'}",
              "--text", str(tmp_path / "two" / "text.txt")])  # fmt: skip
    found = json.loads(capsys.readouterr().out)["checkpoints"][0]["results"]
    assert [result["name"] for result in found] == ["first", "text.txt"]
