"""Every mistake gets one or two lines, exit code 2, no traceback, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from upcycle import cli, families, verify
from upcycle.blueprints import cost
from upcycle.conversion import write


@pytest.fixture
def source(dense, tmp_path):
    """A copy of a tiny dense checkpoint that a test may damage."""
    return Path(shutil.copytree(dense("llama"), tmp_path / "source"))


@pytest.fixture
def fails(tmp_path, capsys):
    """Run the command line, expect a mistake, and give its message."""

    def run(*args: object, keeps_partial: bool = False) -> str:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert exit_.value.code == 2
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("upcycle: error: ")
        assert len(err) < 500
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.partial").exists() == keeps_partial
        return err

    return run


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rewrite_header(folder: Path, change) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def shard(folder: Path) -> dict:
    """Split the only weight file in two, with an index; the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


GATE = "model.layers.1.mlp.gate_proj.weight"


def test_the_copy_itself_is_fine(source, tmp_path):
    cli.main(["convert", str(source), str(tmp_path / "out")])
    assert (tmp_path / "out" / "config.json").exists()


def test_a_sharded_copy_is_fine(source, tmp_path):
    shard(source)
    cli.main(["convert", str(source), str(tmp_path / "out")])


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_missing_folder(command, fails, tmp_path):
    out = [tmp_path / "out"] if command == "convert" else []
    assert "does not exist" in fails(command, tmp_path / "nowhere", *out)


def test_a_file_as_source(fails, source, tmp_path):
    assert "is a file, not a folder" in fails("convert", source / "config.json", tmp_path / "out")


def test_a_folder_as_config(fails, source, tmp_path):
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    assert "Is a directory" in fails("convert", source, tmp_path / "out")


def test_no_config(fails, source, tmp_path):
    (source / "config.json").unlink()
    assert "no config.json" in fails("convert", source, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", '"a"', "[" * 100_000, '{"a": 1}'])
def test_bad_config(text, fails, source, tmp_path):
    (source / "config.json").write_text(text)
    fails("convert", source, tmp_path / "out")


def test_pickle_only(fails, source, tmp_path):
    (source / "model.safetensors").unlink()
    torch.save({}, source / "pytorch_model.bin")
    message = fails("convert", source, tmp_path / "out")
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_no_weights(fails, source, tmp_path):
    (source / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in fails("convert", source, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated(keep, fails, source, tmp_path):
    raw = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(raw[:keep])
    assert "truncated" in fails("convert", source, tmp_path / "out")


def test_trailing_bytes(fails, source, tmp_path):
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    assert "belong to no tensor" in fails("convert", source, tmp_path / "out")


@pytest.mark.parametrize("length", [2**63, 2**40, 200_000_000])
def test_header_beyond_the_file(length, fails, source, tmp_path):
    raw = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw[8:])
    assert f"claims {length} bytes" in fails("convert", source, tmp_path / "out")


def test_overlapping_tensors(fails, source, tmp_path):
    def overlap(header):
        header[GATE]["data_offsets"] = header["model.layers.0.mlp.gate_proj.weight"]["data_offsets"]

    rewrite_header(source, overlap)
    assert "overlap or leave a hole" in fails("convert", source, tmp_path / "out")


def test_offsets_out_of_range(fails, source, tmp_path):
    def move(header):
        begin, end = header[GATE]["data_offsets"]
        header[GATE]["data_offsets"] = [begin + 10**9, end + 10**9]

    rewrite_header(source, move)
    fails("convert", source, tmp_path / "out")


@pytest.mark.parametrize(
    "entry",
    [
        5, {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
    ],
)  # fmt: skip
def test_malformed_entries(entry, fails, source, tmp_path):
    rewrite_header(source, lambda header: header.update({GATE: entry}))
    fails("convert", source, tmp_path / "out")


def test_a_name_twice(fails, source, tmp_path):
    raw = (source / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    text = raw[8 : 8 + length].replace(b"layers.0.mlp.up_proj", b"layers.0.mlp.gate_proj")
    raw = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    (source / "model.safetensors").write_bytes(raw)
    assert "a name occurs twice" in fails("convert", source, tmp_path / "out")


def test_index_names_a_missing_file(fails, source, tmp_path):
    shard(source)
    (source / "model-00002-of-00002.safetensors").unlink()
    assert "which is missing" in fails("convert", source, tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_index_leaves_the_folder(name, fails, source, tmp_path):
    index = shard(source)
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index["weight_map"][GATE] = name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the folder" in fails("convert", source, tmp_path / "out")


def test_index_lists_what_no_file_holds(fails, source, tmp_path):
    index = shard(source)
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "ghost" in fails("convert", source, tmp_path / "out")


def test_file_holds_what_the_index_does_not_know(fails, source, tmp_path):
    index = shard(source)
    del index["weight_map"][GATE]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert GATE in fails("convert", source, tmp_path / "out")


def test_an_index_that_names_files_of_both(fails, source, tmp_path):
    """Of the single file and of shards, and of shards of two sets."""
    whole = (source / "model.safetensors").read_bytes()
    index, file = shard(source), source / "model.safetensors.index.json"
    second = source / "model-00002-of-00002.safetensors"
    (source / "model.safetensors").write_bytes(whole)
    mixed = {name: "model.safetensors" if "2-of" in at else at for name, at in index["weight_map"].items()}
    file.write_text(json.dumps({**index, "weight_map": mixed}))
    assert "two sets of weights" in fails("convert", source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    other = second.rename(source / "model-00003-of-00003.safetensors")
    mixed = {name: other.name if "2-of" in at else at for name, at in index["weight_map"].items()}
    file.write_text(json.dumps({**index, "weight_map": mixed}))
    said = fails("convert", source, tmp_path / "out")
    assert "files of two sets, model-...-of-00002 and 00003" in said


def test_a_shard_with_other_values_than_its_twin(fails, source, tmp_path):
    """Two files hold one tensor, and a reader of either would take other numbers."""
    index = shard(source)
    name, first = next((name, at) for name, at in index["weight_map"].items() if "1-of" in at)
    tensor = load_file(source / first)[name]
    second = source / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), name: tensor + 1}, second)
    said = fails("convert", source, tmp_path / "out")
    assert f"{second.name} holds {name}, which" in said
    assert f"places in {first}" in said


def test_missing_tensor(fails, source, tmp_path):
    edit_tensors(source, lambda t: t.pop(GATE))
    message = fails("convert", source, tmp_path / "out")
    assert GATE in message
    assert "lacks" in message


def test_wrong_shape(fails, source, tmp_path):
    edit_config(source, intermediate_size=64)
    message = fails("convert", source, tmp_path / "out")
    assert "[48, 32]" in message
    assert "[64, 32]" in message


def test_extra_tensor(fails, source, tmp_path):
    edit_tensors(source, lambda t: t.update({"model.layers.0.adapter.weight": torch.zeros(2)}))
    assert "model.layers.0.adapter.weight" in fails("convert", source, tmp_path / "out")


def test_a_buffer_is_left_out_and_listed(source, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(source, lambda t: t.update({name: torch.zeros(2)}))
    cli.main(["convert", str(source), str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert "computes" in record["left_out_tensors"][name]


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_quantised_by_config(method, fails, source, tmp_path):
    edit_config(source, quantization_config={"quant_method": method})
    assert method in fails("convert", source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_quantised_by_dtype(dtype, fails, source, tmp_path):
    edit_tensors(source, lambda t: t.update({GATE: t[GATE].to(dtype)}))
    message = fails("convert", source, tmp_path / "out")
    assert GATE in message
    assert "quantised" in message


def test_unknown_model_type(fails, source, tmp_path):
    edit_config(source, model_type="lama", architectures=["LamaForCausalLM"])
    message = fails("convert", source, tmp_path / "out")
    assert "'lama'" in message
    assert "llama" in message
    assert "`upcycle list` prints" in message  # there are too many to list them


@pytest.mark.parametrize("model_type", ["m2m_100"])
def test_families_that_are_not_taken_give_their_reason(model_type, fails, source, tmp_path):
    edit_config(source, model_type=model_type)
    assert f"upcycle does not take {model_type}: " in fails("convert", source, tmp_path / "out")


def test_inexact_targets_give_their_reason(fails, source, tmp_path):
    assert "normalises queries" in fails("convert", source, tmp_path / "out", "--target", "olmoe")
    assert "mixtral, granitemoe" in fails("convert", source, tmp_path / "out", "--target", "qwen2_moe")


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("llama", {"mlp_bias": True}, "have biases"),
        ("llama", {"attention_bias": True}, "granitemoe"),
        ("granite", {"mlp_bias": True}, "have biases"),
        ("ernie4_5", {"use_bias": True}, "have biases"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, "sliding"),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                      "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(model_type, changes, reason, dense, fails, tmp_path):
    target = families.find(model_type).natives[0]  # by its name: `native` may be another one that fits
    assert reason in fails("convert", dense(model_type, **changes), tmp_path / "out", "--target", target)


def test_already_a_moe(source, tmp_path, capsys, fails):
    cli.main(["convert", str(source), str(tmp_path / "moe")])
    capsys.readouterr()
    assert "already a Mixture of Experts" in fails("convert", tmp_path / "moe", tmp_path / "out")


def test_out_exists(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["convert", str(source), str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "precious").read_text() == "x"


@pytest.mark.parametrize("inside", ["", "moe", "a/b/moe"])
def test_out_inside_source(inside, source, fails):
    before = sorted(source.rglob("*"))
    assert "lies in or around the source" in fails("convert", source, source / inside)
    assert sorted(source.rglob("*")) == before


def test_out_around_source(source, fails, tmp_path):
    assert "lies in or around the source" in fails("convert", source, tmp_path)


def test_out_below_a_file(source, fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "a part of the path is a file" in fails("convert", source, tmp_path / "file" / "out")


def test_not_enough_disk(source, fails, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "free; make room" in fails("convert", source, tmp_path / "out")


def test_disk_full_in_the_middle(source, fails, tmp_path, monkeypatch, capsys):
    real, left = os.pwrite, [100_000]

    def pwrite(descriptor, data, offset):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert "--resume" in fails("convert", source, tmp_path / "out", keeps_partial=True)
    monkeypatch.undo()
    assert "left from a run that was broken" in fails("convert", source, tmp_path / "out", keeps_partial=True)
    cli.main(["convert", str(source), str(tmp_path / "out"), "--resume"])
    cli.main(["convert", str(source), str(tmp_path / "whole")])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "9"], "top_k = 9 is more than moe.num_experts = 8"),
        (["--experts", "0"], "must be 1 or more"),
        (["--layers", "9"], "layers 0 to 3"),
        (["--layers", "1,2"], "experts in every layer"),
        (["--layers", "some"], "allowed: all, every_other, last_half or a list of whole numbers"),
        (["--set", "moe.granularity=2"], "use virtual_group, shuffle_slice or split"),
        (["--init", "virtual_group", "--set", "moe.granularity=3"], "multiple of moe.granularity"),
        (["--init", "shuffle_slice", "--set", "moe.granularity=5"], "does not divide the dense width 48"),
        (["--init", "split", "--experts", "4"], "granularity must equal moe.num_experts"),
        (["--init", "split", "--experts", "4", "--set", "moe.granularity=4", "--set", "init.by=file"],
         "init.labels names the file"),
        (["--set", "moe.shared_experts=1"], "has no shared expert"),
        (["--set", "router.normalize=false"], "always renormalises"),
        (["--init", "nosuch"], "unknown initialisation nosuch"),
        (["--init", "dorp"], "did you mean drop?"),
        (["--set", "init.ratio=0.5"], "unknown key init (copy).ratio"),
        (["--set", "moe.num_expert=3"], "did you mean num_experts?"),
        (["--set", "mo.num_experts=3"], "unknown key mo; did you mean moe?"),
        (["--set", "moe.num_experts=many"], "allowed: whole number"),
        (["--set", "moe.num_experts"], "expected KEY=VALUE"),
        (["--set", "a.b.c=1"], "unknown key a"),
        (["--set", "a..c=1"], "expected KEY=VALUE"),
        (["--set", "seed.x=1"], "seed = {'x': 1}; allowed: whole number"),
        (["--dtype", "int8"], "allowed: source, float32, bfloat16, float16"),
        (["--init", "drop", "--set", "init.ratio=1.5"], "init.ratio = 1.5; it must be in [0, 1]"),
        (["--set", "router.std=-1"], "router.std = -1"),
        (["--init", "branch_train_mix"], "init.sources is missing"),
        (["--shard-size", "five"], "is not understood"),
        (["--jobs", "0"], "jobs = 0"),
        (["--recipe", "nowhere.toml"], "no recipe at nowhere.toml"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit(options, message, source, fails, tmp_path):
    assert message in fails("convert", source, tmp_path / "out", *options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("init", ["copy", "drop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_weights(value, init, dtype, source, fails, tmp_path):
    def spoil(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[GATE][7, 3] = value

    edit_tensors(source, spoil)
    message = fails("convert", source, tmp_path / "out", "--init", init)
    assert GATE in message
    assert "--allow-nonfinite" in message


def test_nonfinite_weights_can_be_allowed(source, tmp_path):
    edit_tensors(source, lambda t: t[GATE].__setitem__((7, 3), float("nan")))
    cli.main(["convert", str(source), str(tmp_path / "out"), "--allow-nonfinite"])
    expert = load_file(tmp_path / "out" / "model.safetensors")[
        "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    ]
    assert torch.isnan(expert[7, 3])


def test_float16_overflow_names_the_tensor(source, fails, tmp_path):
    edit_tensors(source, lambda t: t[GATE].__setitem__((7, 3), 1e6))
    message = fails("convert", source, tmp_path / "out", "--dtype", "float16")
    assert GATE in message
    assert "65504" in message


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [
        (torch.float64, 1e300, "float32"),
        (torch.float64, 1e300, "bfloat16"),
        (torch.float64, 1e300, "float16"),
        (torch.float32, 3.4028e38, "bfloat16"),
        (torch.bfloat16, 1e6, "float16"),
    ],
)
@pytest.mark.parametrize("init", ["copy", "drop", "noise"])
@pytest.mark.filterwarnings("error")
def test_an_overflow_of_any_cast_names_the_tensor(stored, value, dtype, init, source, fails, tmp_path):
    def enlarge(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(stored)
        tensors[GATE][7, 3] = value

    edit_tensors(source, enlarge)
    message = fails("convert", source, tmp_path / "out", "--dtype", dtype, "--init", init)
    assert GATE in message
    # Noise is worked out in float32, whose limit comes first.
    assert f"beyond {'float32' if value > 1e38 and init == 'noise' else dtype}'s" in message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["init.sigma=1e38", "init.relative=false"], "experts."),
        (["init.sigma=1e300", "init.relative=false"], "experts."),
        (["router.std=1e38"], "gate.weight"),
        (["router.std=1e300"], "gate.weight"),
    ],
)
@pytest.mark.parametrize("dtype", ["source", "bfloat16"])
@pytest.mark.filterwarnings("error")
def test_an_overflow_that_a_recipe_makes(settings, named, dtype, source, fails, tmp_path):
    words = [word for setting in settings for word in ("--set", setting)]
    message = fails("convert", source, tmp_path / "out", "--init", "noise", "--dtype", dtype, *words)
    assert named in message
    assert "holds values beyond float32's" in message


def test_infinities_that_are_allowed_stay_through_a_cast(source, tmp_path):
    edit_tensors(source, lambda t: t[GATE].__setitem__((7, 3), float("inf")))
    cli.main(["convert", str(source), str(tmp_path / "out"), "--allow-nonfinite", "--dtype", "float16"])
    expert = load_file(tmp_path / "out" / "model.safetensors")[
        "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    ]
    assert torch.isinf(expert[7, 3])


def test_donor_of_another_shape(source, dense, fails, tmp_path):
    other = dense("llama", intermediate_size=64)
    message = fails("convert", source, tmp_path / "out", "--init", "branch_train_mix",
                    "--set", f'init.sources=["{other}"]')  # fmt: skip
    assert "not of the same shape" in message


def test_bad_split_labels(source, fails, tmp_path):
    labels = tmp_path / "labels.json"
    settings = ["moe.granularity=4", "init.by=file", f"init.labels={labels}"]
    base = ["convert", source, tmp_path / "out", "--init", "split", "--experts", "4"]
    base += [word for setting in settings for word in ("--set", setting)]
    assert "cannot read" in fails(*base)
    for content in (
        "{",
        "[]",
        json.dumps([[0] * 48] * 4),
        json.dumps([[0, 1, 2, 3] * 11] * 4),
        json.dumps([["a"] * 48]),
    ):
        labels.write_text(content)
        assert "init.labels" in fails(*base)


def test_resume_with_another_recipe(source, fails, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["convert", str(source), str(tmp_path / "out")])
    assert exit_.value.code == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    message = fails("convert", source, tmp_path / "out", "--resume", "--seed", "1", keeps_partial=True)
    assert "begun with another recipe" in message
    message = fails(
        "convert", source, tmp_path / "out", "--resume", "--shard-size", "30KB", keeps_partial=True
    )
    assert "begun with another shard size" in message
    message = fails("convert", source, tmp_path / "out", "--resume", "--experts", "5", keeps_partial=True)
    assert "begun with another recipe;" in message


def test_two_runs_at_once(source, fails, tmp_path):
    import fcntl

    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / write.JOURNAL).open("a+b") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert "another run is writing" in fails(
            "convert", source, tmp_path / "out", "--resume", keeps_partial=True
        )


def test_verify_and_inspect_of_what_is_no_result(source, fails, tmp_path):
    assert "was not made by `upcycle convert`" in fails("verify", source, source)
    assert "does not exist" in fails("verify", source, tmp_path / "nowhere")
    assert "does not exist" in fails("inspect", tmp_path / "nowhere")
    edit_config(source, model_type="nosuch", architectures=["NoSuchForCausalLM"])
    assert "unknown model_type" in fails("inspect", source)


def test_demo_into_an_existing_folder(fails, tmp_path):
    assert "exists already" in fails("demo", "--out", tmp_path)


def test_a_config_without_sizes(source, fails, tmp_path):
    edit_config(source, hidden_size=None, vocab_size=None)
    assert "lacks vocab_size, hidden_size" in fails("convert", source, tmp_path / "out")


def test_unknown_config_keys_are_left_out_and_said(source, tmp_path, capsys):
    """A key that the dense class ignores must not reach a target that would heed it."""
    edit_config(source, attn_temperature=3, sliding_window=4, router_jitter_noise=0.5)
    cli.main(["plan", str(source), "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert any("attn_temperature, router_jitter_noise, sliding_window" in w for w in plan["warnings"])
    cli.main(["convert", str(source), str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("sliding_window") is None
    assert "attn_temperature" not in config
    assert config["router_jitter_noise"] == 0.0


def test_scan_sees_every_position():
    from upcycle.checkpoints.dtypes import FLOATS, is_finite

    for name, dtype in FLOATS.items():
        values = np.ones(70_000, dtype)
        assert is_finite(values.view(np.uint8), name)
        for place in (0, 32_767, 32_768, 69_999):
            values[place] = np.inf
            assert not is_finite(values.view(np.uint8), name)
            values[place] = 1


# --- found in review ----------------------------------------------------------------------------


def test_a_source_called_like_the_partial_folder(source, fails, tmp_path, capsys):
    """`convert x.partial x --resume` must not take the source for its own unfinished work."""
    odd = source.rename(tmp_path / "model.partial")
    before = (odd / "model.safetensors").read_bytes()
    for options in ([], ["--resume"]):
        assert "in or around the source" in fails("convert", odd, tmp_path / "model", *options)
    assert (odd / "model.safetensors").read_bytes() == before


def test_a_partial_folder_of_somebody_else(source, fails, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"precious")
    for options in ([], ["--resume"]):
        message = fails("convert", source, tmp_path / "out", *options, keeps_partial=True)
        assert "it was not left by upcycle" in message
    assert (tmp_path / "out.partial" / "model.safetensors").read_bytes() == b"precious"


def test_a_donor_of_another_dtype(dense, fails, tmp_path):
    """Bytes of two types must not be joined in one tensor; with a dtype to write they may meet."""
    source, other = dense("llama", dtype="float16"), dense("llama", dtype="bfloat16", seed=1)
    options = ["--target", "granitemoe", "--init", "branch_train_mix", "--set", f'init.sources=["{other}"]']
    assert "set dtype to the one to write" in fails("convert", source, tmp_path / "out", *options)
    cli.main(["convert", str(source), str(tmp_path / "out"), *options, "--dtype", "float32"])
    made = load_file(tmp_path / "out" / "model.safetensors")
    fused = made["model.layers.0.block_sparse_moe.output_linear.weight"]
    for e, folder in ((0, source), (7, other)):
        wanted = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
        assert torch.equal(fused[e], wanted.float())


def test_gate_and_up_of_two_dtypes(source, tmp_path):
    """A fused tensor of parts that are stored in two types is cast, not joined byte by byte."""
    edit_tensors(source, lambda t: t.update({GATE: t[GATE].to(torch.bfloat16)}))
    cli.main(["convert", str(source), str(tmp_path / "out"), "--target", "granitemoe"])
    made = load_file(tmp_path / "out" / "model.safetensors")[
        "model.layers.1.block_sparse_moe.input_linear.weight"
    ]
    dense_tensors = load_file(source / "model.safetensors")
    up = dense_tensors[GATE.replace("gate", "up")]
    assert torch.equal(made[3, :48].float(), dense_tensors[GATE].float())
    assert torch.equal(made[3, 48:].float(), up.to(made.dtype).float())


def test_two_heads(dense, fails, tmp_path):
    """A tied config with another head on disk: transformers would use that head, so ask which is meant."""
    source = Path(shutil.copytree(dense("llama", tie_word_embeddings=True), tmp_path / "source"))
    edit_tensors(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    said = fails("convert", source, tmp_path / "out")
    assert (
        "differs from model.embed_tokens.weight, to which its class ties it; set tie_word_embeddings" in said
    )
    assert "leave lm_head.weight out (drop, or --drop lm_head.weight)" in said
    donor = f'init.sources=["{source}"]'
    tied = dense("llama", tie_word_embeddings=True)
    asked = ["--experts", "2", "--init", "branch_train_mix", "--set", donor]
    said = fails("convert", tied, tmp_path / "out", *asked)
    assert "take lm_head.weight out of its files" in said
    cli.main(["convert", str(source), str(tmp_path / "moe"), "--drop", "lm_head.weight"])
    assert "lm_head.weight" not in load_file(tmp_path / "moe" / "model.safetensors")
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks


@pytest.mark.parametrize("name", ["./nope", "../nope", "a..b/c", "nope"])
def test_missing_relative_folder(name, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        "no such folder" in fails("plan", name)
        if name == "a..b/c"
        else "does not exist" in fails("plan", name)
    )


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"rope_scaling": "linear"}), ("llama", {"rope_scaling": 5}),
        ("llama", {"rope_parameters": [1]}), ("llama", {"rope_theta": "x", "rope_parameters": None}),
        ("llama", {"num_attention_heads": 0}), ("llama", {"head_dim": "12"}),
        ("qwen3_5_text", {"layer_types": ["full_attention"]}),
        ("qwen3_5_text", {"layer_types": None, "full_attention_interval": 0}),
        ("smollm3", {"no_rope_layers": [1]}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}),
    ],
)  # fmt: skip
def test_malformed_configs(model_type, changes, dense, fails, tmp_path):
    source = Path(shutil.copytree(dense(model_type), tmp_path / "source"))
    edit_config(source, **changes)
    assert "config.json" in fails("plan", source)


@pytest.mark.parametrize("labels", [[[-1] * 48] * 4, [[[0]] * 48] * 4, [[]] * 4, 3, {"0": 1}])
def test_more_bad_labels(labels, source, fails, tmp_path):
    (tmp_path / "l.json").write_text(json.dumps(labels))
    message = fails("plan", source, "--init", "split", "--experts", "4", "--set", "moe.granularity=4",
                    "--set", "init.by=file", "--set", f"init.labels={tmp_path / 'l.json'}")  # fmt: skip
    assert "init.labels" in message


@pytest.mark.parametrize("text", ["inf", "nan", "-5GB", "1e400"])
def test_odd_shard_sizes(text, source, fails, tmp_path):
    assert "shard size" in fails("convert", source, tmp_path / "out", f"--shard-size={text}")


@pytest.mark.parametrize(
    "damage",
    [{"format": 1}, {"format": 2}, {"format": 1, "recipe": {}, "source": {}, "blueprint_hash": "x"}, []],
)
def test_damaged_provenance(damage, source, fails, tmp_path):
    cli.main(["convert", str(source), str(tmp_path / "moe")])
    (tmp_path / "moe" / "upcycle.json").write_text(json.dumps(damage))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", str(source), str(tmp_path / "moe")])
    assert exit_.value.code == 2


@pytest.mark.parametrize("key", ["model.layers.1.block_sparse_moe.gate.weight",
                                 "model.layers.1.block_sparse_moe.experts.2.w3.weight"])  # fmt: skip
def test_inspect_of_a_damaged_moe(key, source, fails, tmp_path, capsys):
    cli.main(["convert", str(source), str(tmp_path / "moe")])
    edit_tensors(tmp_path / "moe", lambda t: t.pop(key))
    capsys.readouterr()
    assert "lacks" in fails("inspect", tmp_path / "moe")


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "zzz"}, {"num_experts_per_tok": "two"}, {"hidden_act": "nope"}, {"rope_parameters": 5}],
)
def test_verify_of_a_damaged_config(changes, source, tmp_path, capsys):
    """Exit 1, with the finding; no traceback."""
    cli.main(["convert", str(source), str(tmp_path / "moe")])
    edit_config(tmp_path / "moe", **changes)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", str(source), str(tmp_path / "moe"), "--json"])
    assert exit_.value.code == 1
    assert "config" in [
        c["name"] for c in json.loads(capsys.readouterr().out)["checks"] if c["holds"] is False
    ]


def test_a_link_out_of_the_source_is_not_copied(source, fails, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    message = fails("convert", source, tmp_path / "out")
    assert "LICENSE is a link to" in message
    assert "outside the folder" in message


def test_a_link_inside_the_source_is_copied(source, tmp_path):
    (source / "texts").mkdir()
    (source / "texts" / "licence").write_text("free")
    (source / "LICENSE").symlink_to("texts/licence")
    (source / "NOTICE").symlink_to("nowhere")
    cli.main(["convert", str(source), str(tmp_path / "out")])
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "out" / "NOTICE").exists()


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(dense, fails, tmp_path, capsys):
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for place, file in enumerate(sorted(dense("llama").iterdir())):
        shutil.copyfile(file, blobs / str(place))
        (snapshot / file.name).symlink_to(f"../../blobs/{place}")
    cli.main(["convert", str(snapshot), str(tmp_path / "whole")])
    capsys.readouterr()
    assert (tmp_path / "whole" / "generation_config.json").read_bytes() == (
        dense("llama") / "generation_config.json"
    ).read_bytes()
    (tmp_path / "secret").write_text("secret")
    (blobs / "x").symlink_to(tmp_path / "secret")
    (snapshot / "LICENSE").symlink_to("../../blobs/x")
    assert "outside the folder" in fails("convert", snapshot, tmp_path / "out")


@pytest.mark.parametrize("revision", ["../../../t", "/etc/passwd", "a/../b", "a//b", "./a", ".."])
def test_a_revision_that_leaves_the_cache(revision, fails, tmp_path):
    for words in (["plan"], ["convert"]):
        out = [tmp_path / "out"] if words == ["convert"] else []
        assert "is no revision" in fails(*words, f"a/b@{revision}", *out)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"model.gguf": ""}, "a GGUF file"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "merge_and_unload"),
        ({".metadata": "", "__0_0.distcp": ""}, "a distributed checkpoint of torch"),
        ({"run.json": "{}"}, "upcycle export RUN OUT"),
        ({"consolidated.safetensors": ""}, "in Hugging Face form"),
        ({"model-00001-of-00002.safetensors": ""}, "download the index, too"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_folders_that_are_another_thing(made, said, config, fails, source, tmp_path):
    for name in ("model.safetensors", *(() if config else ("config.json",))):
        (source / name).unlink()
    for name, text in made.items():
        (source / name).write_text(text)
    assert said in fails("convert", source, tmp_path / "out")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_names_that_a_training_program_wrapped(prefix, fails, source, tmp_path):
    def wrap(tensors):
        for name in [*tensors]:
            tensors[prefix + name] = tensors.pop(name)

    edit_tensors(source, wrap)
    assert f"called {prefix}..." in fails("convert", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v_head.summary.weight", "a value head, which trl puts beside a model"),
        ("score.weight", "the head of a reward model or classifier"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "matrices of an adapter"),
    ],
)
def test_tensors_of_another_thing_beside_the_model(name, said, fails, source, tmp_path):
    edit_tensors(source, lambda tensors: tensors.update({name: torch.zeros(2)}))
    message = fails("convert", source, tmp_path / "out")
    assert name in message
    assert said in message
    edit_tensors(source, lambda tensors: tensors.pop("lm_head.weight"))  # as a classifier has none
    assert fails("convert", source, tmp_path / "out") == message


def test_what_zero3_leaves(fails, source, tmp_path):
    def hollow(tensors):
        for name in [n for n in tensors if "norm" not in n]:
            tensors[name] = torch.zeros(0)

    edit_tensors(source, hollow)
    assert "run zero_to_fp32.py" in fails("convert", source, tmp_path / "out")


def test_quantization_config_null_is_none(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    for target in ("native", "upcycled"):
        write.convert(source, tmp_path / target, {"moe": {"target": target}})
        assert "quantization_config" not in json.loads((tmp_path / target / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": 1e-3}, "differ in rms_norm_eps: 0.001 and"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "differ in rope_parameters"),
        ({}, "have other tokens: '.' is number 2 and 1"),
    ],
)
def test_donors_that_mean_something_else(changes, said, dense, fails, source, tmp_path):
    other = Path(shutil.copytree(dense("llama", seed=1), tmp_path / "donor"))
    edit_config(other, **changes)
    if not changes:
        for folder, tokens in ((source, "a.b"), (other, "ab.")):
            vocab = {token: number for number, token in enumerate(tokens)}
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    asked = ["--init", "branch_train_mix", "--set", f'init.sources=["{other}"]']
    assert said in fails("convert", source, tmp_path / "out", *asked)


def test_a_network_with_biases_is_not_sent_to_a_target_that_refuses_it(dense, fails, tmp_path):
    source = dense("llama", attention_bias=True, mlp_bias=True)
    message = fails("convert", source, tmp_path / "out")
    assert "granitemoe" not in message
    assert "moe.target = upcycled takes it" in message
    assert cost.plan(source, {"moe": {"target": "upcycled"}}).target == "upcycled_llama"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark; save it without one"),
        (b"\xff\xfe{}", "no UTF-8 text"),
        (b"5", "holds 5, not a JSON object"),
        (b'"text"', "holds 'text', not a JSON object"),
        (b"9" * 5000, "not valid JSON"),
    ],
)
def test_odd_json(data, said, fails, source, tmp_path):
    (source / "config.json").write_bytes(data)
    assert said in fails("convert", source, tmp_path / "out")
