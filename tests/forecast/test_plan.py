"""`upcycle plan --world`: the same forecast from a run file, from options and from Python; bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
import upcycle
from upcycle import Recipe, UpcycleError, cli
from upcycle.api.forecasting import foretell_run
from upcycle.data.corruption import span_lengths
from upcycle.forecast import outlook, time
from upcycle.forecast.traffic import Collective
from upcycle.system import gpus
from upcycle.system.wording import size
from upcycle.training.rehearsal import rehearse
from upcycle.training.run import Run

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
MOE = {"moe": {"num_experts": 8}}
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6}


@pytest.fixture(scope="module")
def run(dense, tmp_path_factory):
    """A run of 64 rows of 16 tokens, two a forward pass."""
    path = tmp_path_factory.mktemp("run") / "run.toml"
    path.write_text(
        f'''source = "{dense("llama", head_dim=8)}"
out = "runs/moe"
moe = {{num_experts = 8}}
data = {{sources = [{{path = "none.txt"}}]}}
train = {{steps = 1, batch_tokens = 1024, sequence_length = 16, micro_batch = 2, activation_checkpointing = true}}
schedule = {{peak = 1e-3}}
parallel = {{ep = 4}}
'''  # noqa: E501
    )
    return path


def planned(capsys, *options):
    cli.main(["plan", *map(str, options), "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_run_file_foretells_what_its_options_do(run, capsys):
    found = planned(capsys, run, "--world", "16")
    source = Run.load(run).source
    again = planned(
        capsys, source, "--experts", "8", "--world", "16", "--ep", "4", "--rows", "2", "--context", "16"
    )
    assert found["blueprint_hash"] == again["blueprint_hash"]
    once, twice = again["forecast"], found["forecast"]
    assert (once["passes"], twice["passes"]) == (1, 2)
    assert twice["held"] == once["held"]
    assert twice["tokens"] == 2 * once["tokens"] == 1024
    assert twice["seconds"]["arithmetic"] == pytest.approx(2 * once["seconds"]["arithmetic"])
    for each, other in zip(twice["collectives"], once["collectives"], strict=True):
        assert each["times"] == (other["times"] if each["what"].startswith("norm") else 2 * other["times"])
    python = upcycle.foretell(source, MOE, world=16, ep=4, rows=2, context=16)
    assert json.loads(json.dumps(python.as_dict())) == once
    assert "forecast" not in planned(capsys, run)


@pytest.mark.parametrize(
    ("recompute", "words"),
    [
        (True, "blocks recomputed"),
        ("selective", "blocks recomputed but for products and attention"),
        (False, "nothing recomputed"),
    ],
)
def test_a_run_file_says_what_is_recomputed(recompute, words, run, capsys):
    keys = (
        "--set",
        f"train.activation_checkpointing={json.dumps(recompute)}",
        "--set",
        "train.batch_tokens=512",
    )
    found = planned(capsys, run, "--world", "16", *keys)["forecast"]
    source = Run.load(run).source
    python = upcycle.foretell(source, MOE, world=16, ep=4, rows=2, context=16, recompute=recompute)
    assert found == json.loads(json.dumps(python.as_dict()))
    cli.main(["plan", str(run), "--world", "16", *keys])
    assert f"16 tokens, {words}\n" in capsys.readouterr().out


def shown(capsys, *options):
    cli.main(["plan", *map(str, options)])
    return " ".join(capsys.readouterr().out.split())


def test_an_update_that_is_not_counted_is_named(run, capsys):
    said = "not counted: in each update optimizer.name = muon exchanges the matrices that ranks share"
    assert said in shown(capsys, run, "--world", "16", "--set", "optimizer.name=muon")
    assert "not counted" not in shown(capsys, run, "--world", "16")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of Llama 3 8B with 2048 rows of 8192 tokens a step, which does not say how many are in a pass."""
    folder = tmp_path_factory.mktemp("large")
    path = folder / "run.toml"
    path.write_text(
        f'''source = "{tiny.make_headers(folder / "llama", LLAMA_8B)}"
out = "runs/moe"
moe = {{num_experts = 8}}
data = {{sources = [{{path = "none.txt"}}]}}
train = {{steps = 1, batch_tokens = 16777216, sequence_length = 8192, activation_checkpointing = true}}
schedule = {{peak = 1e-3}}
parallel = {{ep = 8}}
'''
    )
    return path


def test_a_pass_has_as_many_rows_as_fit(large, capsys):
    """Of 16 rows on a GPU, those of 80 GB hold 8 in a pass, as the forecasts of each number say."""
    by_rows = {
        rows: foretell_run(Run.load(large, [f"train.micro_batch={rows}"]), world=128)
        for rows in (1, 2, 4, 8, 16)
    }
    assert [rows for rows, each in by_rows.items() if each.fits] == [1, 2, 4, 8]
    found = foretell_run(Run.load(large), world=128)
    assert replace(found, notes=()).as_dict() == by_rows[8].as_dict()
    said = shown(capsys, large, "--world", "128")
    assert "2 x 8 rows of 8192 tokens" in said
    assert "it fits" in said
    assert "8 of a GPU's 16 rows in a pass are the most that fit; a run without train.micro_batch" in said
    whole = foretell_run(Run.load(large), world=128, gpu="H200")
    assert (whole.setting.rows, whole.fits, whole.notes) == (16, True, ())


@pytest.mark.parametrize(
    ("world", "key", "rows"),
    [
        (8, "train.activation_checkpointing=false", 1),
        (128, "router.balance_loss=pooled", 16),  # losses of parts do not add up
    ],
)
def test_a_run_that_cannot_be_cut_until_it_fits(world, key, rows, large):
    found = foretell_run(Run.load(large, [key]), world=world)
    assert (found.setting.rows, found.fits) == (rows, False)
    assert found.notes == (
        f"no number of rows in a pass fits: the fewest, {rows}, need {size(found.peak.total)}",
    )


def of_rows(length: int, source: Path) -> Run:
    """A run of 16 rows a step, which no data are there for."""
    return Run.of(
        {
            "source": str(source),
            "out": "runs/out",
            "data": {"sources": [{"path": "none.txt"}]},
            "moe": {"num_experts": 4, "target": "upcycled", "layers": "every_other"},
            "train": {"steps": 1, "batch_tokens": 16 * length, "sequence_length": length, "micro_batch": 2},
            "schedule": {"peak": 1e-3},
        }
    )


@pytest.mark.parametrize(
    ("architecture", "most"),
    [("BertForMaskedLM", 40), ("RobertaForMaskedLM", 38), ("BartForConditionalGeneration", 40)],
)
def test_rows_beyond_the_positions_of_an_encoder_are_refused(architecture, most, tmp_path):
    source = tiny.make(tmp_path / "dense", architecture)
    said = rf"train\.sequence_length = 64 and the model takes {most} tokens"
    for foreseen in (foretell_run, rehearse):
        with pytest.raises(UpcycleError, match=said):
            foreseen(of_rows(64, source), world=2)


def test_a_model_of_sound_has_no_forecast_as_it_has_no_run(tmp_path):
    source = tiny.make(tmp_path / "whisper", "WhisperForConditionalGeneration")
    with pytest.raises(UpcycleError, match="reads sound and no text"):
        foretell_run(of_rows(64, source), world=2)


def test_rows_of_two_stacks_are_those_of_the_dry_run(tmp_path):
    """The spans that are cut out make a decoder's row much shorter than the encoder's."""
    run = of_rows(64, tiny.make(tmp_path / "t5", "T5ForConditionalGeneration"))
    found, rehearsed = foretell_run(run, world=2), rehearse(run, world=2)
    spans = span_lengths(64, noise_density=0.15, mean_span=3)
    assert found.tokens == rehearsed.tokens_per_step == 16 * (64 + spans.targets)


@pytest.mark.parametrize("taught", [True, False])
def test_the_rows_of_the_memory_table_sum_to_its_total(taught, run, tmp_path, capsys):
    """With the weights of a teacher and the masks that keep documents apart, which few runs have."""
    text = run.read_text().replace("ep = 4", "ep = 1").replace("_length = 16", "_length = 64")
    text = text.replace("activation_checkpointing = true", "activation_checkpointing = false")
    if taught:
        text = text.replace("data = {", "data = {isolate = true, ")
        text += f'teacher = {{source = "{Run.load(run).source}"}}\n'
    path = tmp_path / "run.toml"
    path.write_text(text)
    cli.main(["plan", str(path), "--world", "2"])
    table = capsys.readouterr().out.split("at the peak\n")[1].split("the peak is")[0]
    rows = {
        re.split(r"  |\d", line)[0].strip(): re.findall(r"([\d.]+) (B|kB|MB)", line)
        for line in table.splitlines()
    }
    assert ("weights of the teacher" in rows, "masks of attention" in rows) == (taught, taught)
    both = {said: [float(n) * UNITS[unit] for n, unit in sizes] for said, sizes in rows.items()}
    held, peak = both.pop("total")
    assert sum(sizes[0] for sizes in both.values() if len(sizes) == 2) == pytest.approx(held, rel=5e-3)
    assert sum(sizes[-1] for sizes in both.values()) == pytest.approx(peak, rel=5e-3)


def test_the_forecast_is_shown(run, capsys):
    cli.main(["plan", str(run), "--world", "16", "--gpu", "A100"])
    out = capsys.readouterr().out
    for words in (
        "on 16 A100: fsdp 16 x ep 4",
        "memory of the most loaded GPU",
        "it fits into 90%",
        "all-to-all",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--world", "8", "--set", "train.sequence_length=128"],
            "train.sequence_length = 128 and the model takes 64 tokens",
        ),
        (["--world", "12"], "64 rows of a global batch do not divide among 12 groups of ranks"),
        (["--world", "16", "--set", "parallel.ep=16"], "ep must divide the 8 experts"),
        (["--world", "16", "--gpu", "H9"], "unknown GPU 'H9'"),
        (["--world", "0"], "0 process"),
        (["--set", "moe=false"], "has no [moe]"),
        (["--recipe", "none.toml"], "so --recipe none.toml would not be read"),
        (["--world", "16", "--tp", "1", "--rows", "4"], "--rows, --tp would not be read; use --set"),
        (["--world", "16", "--no-recompute"], "--no-recompute would not be read; use --set"),
        (["--gpu", "B9000"], "without --world N no training is foretold, and --gpu would not be read"),
    ],
)
def test_bad_input(run, options, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", str(run), *options])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--gpu B9000", "--replicate 1", "--ep 4", "--context 16", "--no-recompute"]
)
def test_options_of_a_forecast_ask_for_one(option, dense, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", str(dense("llama", head_dim=8)), *option.split()])
    assert exit_.value.code == 2
    assert f"{option.split()[0]} would not be read; add it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"world": 13, "replicate": 4}, "ask for 12 process"),
        ({"world": 8, "tp": 8}, "tp must divide the 4 heads"),
        ({"world": 8, "rows": 0}, "rows = 0; it must be"),
        ({"world": 8, "context": -1}, "context = -1; it must be"),
        ({"world": 8, "context": 65}, "context = 65 and the model takes 64 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(dense, asked, words):
    with pytest.raises(UpcycleError, match=words):
        upcycle.foretell(dense("llama", head_dim=8), Recipe.of(MOE), **asked)


def test_a_layout_that_training_refuses_has_no_forecast(dense):
    recipe = Recipe.of({"moe": {**MOE["moe"], "target": "upcycled"}})
    with pytest.raises(UpcycleError, match=r"tensor parallelism \(tp\) is for native MoE"):
        upcycle.foretell(dense("llama", head_dim=8), recipe, world=2, tp=2)


def test_seconds_of_a_ring_by_hand():
    """A gigabyte over 8 GPUs of a machine, over 64 of 8 machines that share 8 ports each, and over 8 machines
    with a port each."""
    gpu, size = gpus.find("H100"), 10**9

    def seconds(kind, ranks, apart):
        return time.seconds(
            Collective(kind=kind, what="", ranks=ranks, apart=apart, times=1, bytes=size), gpu
        )

    nvlink, port = 0.8 * 450e9, 0.8 * 50e9
    assert seconds("all_gather", 8, 1) == pytest.approx(7 / 8 * size / nvlink, rel=0.03)
    assert seconds("all_reduce", 8, 1) == pytest.approx(2 * seconds("reduce_scatter", 8, 1), rel=0.01)
    assert seconds("all_gather", 64, 1) == pytest.approx(63 / 64 * size / (8 * port), rel=0.12)
    assert seconds("all_gather", 8, 8) == pytest.approx(7 / 8 * size / port, rel=0.01)
    assert seconds("all_to_all", 16, 1) == pytest.approx(8 / 16 * size / port, rel=0.01)


def test_published_utilisations_lie_between_the_bounds(tmp_path):
    """FSDP with expert parallelism reached 23.4 % and 19.6 % (MoE Parallel Folding, Table 1)."""
    base = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    mixtral = {
        "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
        "vocab_size": 32768,
    }  # fmt: skip
    llama = {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "vocab_size": 128256,
    }  # fmt: skip
    for name, config, world, mfu in (("mixtral", mixtral, 128, 0.234), ("llama", llama, 256, 0.196)):
        source = tiny.make_headers(tmp_path / name, base | config)
        found: outlook.Outlook = upcycle.foretell(source, MOE, world=world, ep=8, context=4096)
        assert found.fits
        assert found.mfu(found.time.in_turn) < mfu < found.mfu(found.time.overlapped), name
