"""The writer: same bytes whatever the number of threads, the shard size and the crashes in between."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

import tiny
from files import digests
from upcycle import Recipe, blueprint, cli, convert, plan, verify
from upcycle.blueprints.shards import parse_size
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.errors import UpcycleError

INITS = [
    {"name": "copy"},
    {"name": "drop", "ratio": 0.3, "indices": "independent"},
    {"name": "noise"},
]


def tensors(folder: Path) -> dict[str, bytes]:
    with Checkpoint.open(folder) as opened:
        return {n: opened.pread(t, 0, t.nbytes).tobytes() for n, t in opened.tensors.items()}


@pytest.mark.parametrize("init", INITS, ids=lambda i: i["name"])
def test_any_number_of_jobs_gives_the_same_folder(init, dense, tmp_path):
    source, recipe = dense("llama", dtype="bfloat16"), Recipe.of(init=init)
    for jobs in (1, 2, 7):
        convert(source, tmp_path / str(jobs), recipe, jobs=jobs)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "7")


def test_another_seed_gives_other_experts_and_the_same_backbone(dense, tmp_path):
    source = dense("llama")
    for seed in (0, 1):
        convert(source, tmp_path / str(seed), Recipe.of(seed=seed, init={"name": "drop"}))
    a, b = tensors(tmp_path / "0"), tensors(tmp_path / "1")
    assert {n for n in a if a[n] != b[n]} == {n for n in a if "block_sparse_moe" in n}


def test_shards(dense, tmp_path):
    source, recipe = dense("llama"), Recipe.of()
    convert(source, tmp_path / "one", recipe)
    convert(source, tmp_path / "many", recipe, shard_size=parse_size("100KB"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.stat().st_size < 100_000 + 4096 for f in files)
    assert tensors(tmp_path / "one") == tensors(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(map(len, tensors(tmp_path / "one").values()))
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_a_sharded_source_gives_the_same_bytes(dense, tmp_path):
    source = dense("llama")
    sharded = dense("llama", shard="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    recipe = Recipe.of(init={"name": "drop"})
    convert(source, tmp_path / "a", recipe)
    convert(sharded, tmp_path / "b", recipe)
    assert digests(tmp_path / "a")["model.safetensors"] == digests(tmp_path / "b")["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dtype(dtype, stored, dense, tmp_path):
    """A cast is torch's own cast, tensor by tensor."""
    source = dense("llama", dtype=stored)
    convert(source, tmp_path / "moe", Recipe.of(dtype=dtype))
    with (
        safe_open(source / "model.safetensors", "pt") as a,
        safe_open(tmp_path / "moe" / "model.safetensors", "pt") as b,
    ):
        for l in range(4):  # noqa: E741
            wanted = a.get_tensor(f"model.layers.{l}.mlp.up_proj.weight").to(getattr(torch, dtype))
            found = b.get_tensor(f"model.layers.{l}.block_sparse_moe.experts.5.w3.weight")
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
        assert b.get_tensor("model.norm.weight").dtype == getattr(torch, dtype)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype


def test_files_that_are_carried_over(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "source"))
    carried = [
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "special_tokens_map.json",
    ]
    for name in [*carried, "modeling_evil.py", "optimizer.pt"]:
        (source / name).write_text(name)
    convert(source, tmp_path / "moe", Recipe.of())
    record = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert set(record["carried_files"]) == {*carried, "generation_config.json"}
    assert record["left_behind_files"] == ["modeling_evil.py", "optimizer.pt"]
    for name in carried:
        assert (tmp_path / "moe" / name).read_text() == name
    assert not (tmp_path / "moe" / "modeling_evil.py").exists()
    assert Recipe.of(record["recipe"]) == Recipe.of()
    assert record["source"]["sha256"] == {"model.safetensors": digests(source)["model.safetensors"]}


@pytest.mark.parametrize("moe", [{}, {"target": "upcycled"}, {"target": "depth_tiled", "depth": 2}])
def test_code_beside_the_source_is_not_asked_for(moe, dense, tmp_path):
    """The class of the result is that of transformers, or ours; `auto_map` would make it look for a file."""
    source = shutil.copytree(dense("llama"), tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    built = convert(source, tmp_path / "out", Recipe.of(moe=moe))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(opened).__name__ == built.target.architecture
    assert verify(source, tmp_path / "out").holds


def test_model_card(dense, tmp_path):
    convert(dense("llama"), tmp_path / "moe", Recipe.of(init={"name": "drop", "ratio": 0.25}))
    card = (tmp_path / "moe" / "README.md").read_text()
    costs = plan(dense("llama"), Recipe.of(init={"name": "drop", "ratio": 0.25}))
    for text in (
        f"{costs.total_parameters:,}",
        f"{costs.active_parameters:,}",
        '"ratio": 0.25',
        "from_pretrained",
    ):
        assert text in card


# --- crashes ------------------------------------------------------------------------------------


@pytest.fixture
def killed(server, tmp_path):
    """A function that converts in a process of its own, which is killed before call number `at`.

    It returns how the process ended: its exit code, or minus the signal.
    """
    folder = tmp_path / "process"
    folder.mkdir()

    def run(source: Path, out: Path, at: int, init: str, *, resume: bool = False) -> int:
        (folder / "arguments").write_bytes(pickle.dumps((str(source), str(out), at, init, resume)))
        return server.wait(server.call("killing:convert", folder, "calls", {}, 100))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("init", ["copy", "drop"])
def test_a_kill_at_any_moment(init, dense, killed, tmp_path):
    """SIGKILL before the n-th system call, for n spread over the whole run; then resume."""
    source = dense("llama")
    assert killed(source, tmp_path / "whole", 0, init) == 0
    calls = pickle.loads((tmp_path / "process" / "calls").read_bytes())
    reference = digests(tmp_path / "whole")
    moments = sorted({1, 2, *range(3, calls + 1, max(1, calls // 10)), *range(calls - 9, calls + 1)})
    deaths = 0
    for at in moments:
        out = tmp_path / f"at-{at}"
        partial = tmp_path / f"at-{at}.partial"
        # How often threads sync varies by a few calls, so the last moments may come too late.
        deaths += killed(source, out, at, init) == -signal.SIGKILL
        if not (out / "config.json").exists():
            assert_nothing_takes_it_for_a_model(out if out.exists() else partial)
            recipe = Recipe.of(init={"name": init})
            convert(source, out, recipe, resume=True, shard_size=120_000)
        assert not partial.exists()
        assert digests(out) == reference, at
        shutil.rmtree(out)
    assert deaths >= len(moments) * 3 // 4


def assert_nothing_takes_it_for_a_model(partial: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial)
    with pytest.raises(UpcycleError):
        Checkpoint.open(partial)


def test_shards_are_no_safetensors_before_their_data_is_there(dense, killed, tmp_path):
    source = dense("llama")
    assert killed(source, tmp_path / "out", 30, "copy") == -signal.SIGKILL
    for shard in (tmp_path / "out.partial").glob("*.safetensors"):
        with pytest.raises(SafetensorError):
            safe_open(shard, "pt").__enter__()


def test_killed_twice_and_resumed_twice(dense, killed, tmp_path):
    source = dense("llama")
    killed(source, tmp_path / "whole", 0, "drop")
    assert killed(source, tmp_path / "out", 60, "drop") == -signal.SIGKILL
    assert killed(source, tmp_path / "out", 60, "drop", resume=True) == -signal.SIGKILL
    assert killed(source, tmp_path / "out", 0, "drop", resume=True) == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_resume_does_not_write_what_is_there(dense, killed, tmp_path, monkeypatch):
    source = dense("llama")
    killed(source, tmp_path / "out", 150, "copy")
    journal = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    done = {name for line in journal[1:] for name in json.loads(line)["done"]}
    assert len(done) > 10
    written = []
    from upcycle.conversion import write

    real = write.ShardFiles.write
    monkeypatch.setattr(
        write.ShardFiles, "write", lambda self, place, *a: (written.append(place), real(self, place, *a))
    )
    convert(source, tmp_path / "out", Recipe.of(), resume=True, shard_size=120_000)
    entries = blueprint(source, Recipe.of()).entries
    assert len({(p.shard, p.offset) for p in written if p.offset}) == len(entries) - len(done)


def test_a_torn_journal_line_is_ignored(dense, killed, tmp_path):
    source = dense("llama")
    killed(source, tmp_path / "whole", 0, "copy")
    killed(source, tmp_path / "out", 150, "copy")
    with (tmp_path / "out.partial" / "journal.jsonl").open("a") as journal:
        journal.write('{"done": ["model.norm.we')
    convert(source, tmp_path / "out", Recipe.of(), resume=True, shard_size=120_000)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_resume_notices_another_source(dense, killed, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "source"))
    killed(source, tmp_path / "out", 150, "copy")
    shutil.copyfile(dense("llama", seed=1) / "model.safetensors", source / "model.safetensors")
    with pytest.raises(UpcycleError, match="has changed since"):
        convert(source, tmp_path / "out", Recipe.of(), resume=True, shard_size=120_000)


def test_resume_without_anything_to_resume_is_a_fresh_run(dense, tmp_path):
    cli.main(["convert", str(dense("llama")), str(tmp_path / "out"), "--resume"])
    assert (tmp_path / "out" / "config.json").exists()


def test_a_really_full_disk(dense, tmp_path, capsys):
    """A file system of 1.5 MB: refused before the first byte, and kept when it fills up in the middle."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        from upcycle.conversion import write

        source = dense("llama", intermediate_size=192)
        with pytest.raises(UpcycleError, match="free; make room"):
            convert(source, small / "out", Recipe.of())
        assert not list(small.iterdir())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write, "_check_space", lambda *_: None)
            with pytest.raises(UpcycleError, match="is full; what is written is kept"):
                convert(source, small / "out", Recipe.of(), shard_size=300_000)
        assert (small / "out.partial").exists()
        subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
        convert(source, small / "out", Recipe.of(), shard_size=300_000, resume=True)
        # As deep as the small one, since upcycle.json has the way to the source.
        convert(source, tmp_path / "large" / "out", Recipe.of(), shard_size=300_000)
        assert digests(small / "out") == digests(tmp_path / "large" / "out")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_memory_stays_below_the_plan(dense, tmp_path):
    """The peak of a real run, in a process of its own, is below what plan says, with a tokenizer or not."""
    script = (
        "import sys; from upcycle import convert, plan, Recipe\n"
        "r = Recipe.of(init={'name': 'drop'})\n"
        "convert(sys.argv[1], sys.argv[2], r)\n"
        "peak = next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) * 1024\n"
        "print(peak, plan(sys.argv[1], r).peak_memory_bytes)"
    )
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc to read the peak memory from")
    source = dense("llama", hidden_size=512, intermediate_size=4096, num_attention_heads=4, head_dim=128)
    spoken = shutil.copytree(source, tmp_path / "spoken")
    tiny.make_bytes_tokenizer(spoken)
    for folder, most in ((source, 400_000_000), (spoken, 720_000_000)):
        run = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(tmp_path / f"{folder.name} out")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peak, planned = map(int, run.stdout.split())
        assert (tmp_path / f"{folder.name} out" / "model.safetensors").stat().st_size > 700_000_000
        assert 0.5 * planned < peak < planned < most


def test_resume_after_a_shard_was_lost(dense, killed, tmp_path):
    """A shard that is gone is written again, whatever the journal says of it."""
    source = dense("llama")
    killed(source, tmp_path / "whole", 0, "copy")
    killed(source, tmp_path / "out", 150, "copy")
    sorted((tmp_path / "out.partial").glob("*.safetensors"))[0].unlink()
    convert(source, tmp_path / "out", Recipe.of(), resume=True, shard_size=120_000)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_provenance_is_read_from_anywhere(dense, tmp_path, monkeypatch):
    """Relative paths of donors and labels are kept absolute, and that of the source goes from the folder."""
    shutil.copytree(dense("qwen3"), tmp_path / "here" / "a")
    shutil.copytree(dense("qwen3", seed=1), tmp_path / "here" / "b")
    monkeypatch.chdir(tmp_path / "here")
    convert("a", "moe", Recipe.of(init={"name": "branch_train_mix", "sources": ["b"]}))
    monkeypatch.chdir(tmp_path)
    proof = verify("here/a", "here/moe", logits=False)
    assert proof.holds, proof.checks
    record = json.loads((tmp_path / "here" / "moe" / "upcycle.json").read_text())
    assert record["source"]["path"] == "../a"
    (tmp_path / "here" / "b" / "model.safetensors").write_bytes(
        (dense("qwen3", seed=2) / "model.safetensors").read_bytes()
    )
    failed = {c.name for c in verify("here/a", "here/moe", logits=False).checks if not c.holds}
    assert failed == {"bytes", "provenance"}


def test_files_are_closed(dense, tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to count open files in")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        convert(dense("llama"), tmp_path / str(number), Recipe.of())
    assert len(os.listdir("/proc/self/fd")) == before
