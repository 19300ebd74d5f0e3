"""What `verify` sees of a folder beside its weights, and what it says of rounding; what a folder tells of its
source."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from upcycle import Recipe, blueprint, cli, convert, plan, verify
from upcycle.advice.situation import Budget, Situation
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.header import read_header
from upcycle.cli.views.plan import show_plan
from upcycle.conversion import provenance
from upcycle.conversion.plain import plain
from upcycle.errors import UpcycleError
from upcycle.inspection import inspect
from upcycle.records.provenance import MadeFrom
from upcycle.verification import Proof

CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    """A source with everything that is carried, and a sharded conversion that promises no function."""
    folder = tmp_path_factory.mktemp("verify")
    source = Path(shutil.copytree(dense("llama"), folder / "source"))
    for name in CARRIED:
        (source / name).write_text(f'{{"name": "{name}"}}')
    convert(source, folder / "moe", Recipe.of(init={"name": "drop"}), shard_size=200_000)
    return source, folder / "moe"


@pytest.fixture
def moe(converted, tmp_path):
    return Path(shutil.copytree(converted[1], tmp_path / "moe"))


def files(source: Path, folder: Path) -> tuple[bool | None, str]:
    proof = verify(source, folder, logits=False)
    (check,) = [check for check in proof.checks if check.name == "files"]
    assert proof.holds == (check.holds is True), proof.checks
    return check.holds, check.detail


def test_every_file_that_convert_wrote_is_hashed(converted, moe):
    source, _ = converted
    recorded = json.loads((moe / "upcycle.json").read_text())["files"]
    beside = {p.name for p in moe.iterdir() if p.suffix != ".safetensors"} - {"upcycle.json"}
    assert set(recorded) == beside
    assert files(source, moe) == (True, f"{len(beside)} files beside the weights as they were written")


@pytest.mark.parametrize("name", [*CARRIED, "generation_config.json", "model.safetensors.index.json"])
def test_a_file_that_is_changed_or_gone(name, converted, moe):
    text = (moe / name).read_text()
    (moe / name).write_text(text.replace("}", " }", 1) if "}" in text else text + " ")
    assert files(converted[0], moe) == (False, f"changed: {name}")
    if name != "model.safetensors.index.json":
        (moe / name).unlink()
        assert files(converted[0], moe) == (False, f"missing: {name}")


def test_a_file_that_is_changed_with_its_hash(converted, moe):
    """The source has another one, whatever upcycle.json says."""
    (moe / "tokenizer.json").write_text("{}")
    record = json.loads((moe / "upcycle.json").read_text())
    from upcycle.checkpoints.checkpoint import file_hash

    record["files"]["tokenizer.json"] = file_hash(moe / "tokenizer.json")
    (moe / "upcycle.json").write_text(json.dumps(record))
    assert files(converted[0], moe) == (False, "changed: tokenizer.json")


@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "modeling_x.py", "merges.txt",
     "model-00099-of-00100.safetensors", "custom_generate", "processor_config.json", "model.gguf"],
)  # fmt: skip
def test_a_file_that_a_loader_would_read(name, converted, moe):
    if "." in name:
        (moe / name).write_text("x")
    else:
        (moe / name).mkdir()
    holds, detail = files(converted[0], moe)
    assert not holds
    assert detail == f"not written by convert, and read by those who load it: {name}"


def test_other_files_are_named(converted, moe):
    (moe / "eval.json").write_text("{}")
    (moe / "notes.md").write_text("x")
    (moe / ".gitattributes").write_text("x")
    (moe / "README.md").write_text("a better card")
    holds, detail = files(converted[0], moe)
    assert holds
    assert detail.endswith("; edited: README.md; not written by convert: .gitattributes, eval.json, notes.md")


def test_a_rogue_file_of_weights(converted, moe, tmp_path, capsys):
    """transformers would read it in place of the shards."""
    save_file({"x": torch.ones(1)}, moe / "model.safetensors")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", str(converted[0]), str(moe), "--no-logits"])
    assert exit_.value.code == 1
    assert "two sets of weights" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_two_sets_of_weights_in_a_source(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "source"))
    names = load_file(source / "model.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    convert(source, tmp_path / "same", Recipe.of())
    shutil.copyfile(source / "model.safetensors", source / "other.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "other.safetensors")}))
    with pytest.raises(UpcycleError, match="two sets of weights"):
        convert(source, tmp_path / "out", Recipe.of())


@pytest.mark.parametrize("key", ["preserves_function", "moe_layers", "target", "left_out_tensors"])
def test_what_upcycle_json_says_is_so(key, converted, moe):
    record = json.loads((moe / "upcycle.json").read_text())
    record[key] = {
        "preserves_function": True,
        "moe_layers": [1],
        "target": "x",
        "left_out_tensors": {"a": "b"},
    }[key]
    (moe / "upcycle.json").write_text(json.dumps(record))
    assert [c.name for c in verify(converted[0], moe, logits=False).checks if c.holds is False] == [
        "provenance"
    ]


def test_a_folder_of_an_older_version(converted, moe):
    """Without hashes, and with an absolute path."""
    record = json.loads((moe / "upcycle.json").read_text())
    del record["files"]
    record["source"]["path"] = str(converted[0])
    (moe / "upcycle.json").write_text(json.dumps(record))
    assert files(converted[0], moe)[0]
    (moe / "adapter_config.json").write_text("{}")
    assert not files(converted[0], moe)[0]
    assert inspect(moe)["layers"][0]["cosine_to_dense"]


def test_whose_home_a_source_was_in_is_not_published(dense, tmp_path, monkeypatch):
    """What is read again is found again, by whoever has it in a home of the same layout."""
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    source = Path(shutil.copytree(dense("llama"), tmp_path / "somebody" / "models" / "llama"))
    convert(source, tmp_path / "moe", Recipe.of())
    text = (tmp_path / "moe" / "upcycle.json").read_text() + (tmp_path / "moe" / "README.md").read_text()
    assert json.loads((tmp_path / "moe" / "upcycle.json").read_text())["source"]["path"] == "~/models/llama"
    assert "somebody" not in text
    assert inspect(tmp_path / "moe")["layers"][0]["cosine_to_dense"]


def test_where_a_source_outside_home_was_is_not_published(dense, tmp_path, monkeypatch):
    """The path goes from the folder that was made, so both may move together; elsewhere it is a name."""
    source = Path(shutil.copytree(dense("llama"), tmp_path / "secret" / "models" / "llama"))
    moe = tmp_path / "secret" / "made" / "moe"
    convert(source, moe, Recipe.of())
    text = (moe / "upcycle.json").read_text() + (moe / "README.md").read_text()
    assert json.loads((moe / "upcycle.json").read_text())["source"]["path"] == "../../models/llama"
    assert "secret" not in text
    monkeypatch.chdir(moe.parent)
    assert inspect("moe")["layers"][0]["cosine_to_dense"]
    (tmp_path / "secret").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert inspect(tmp_path / "moved" / "made" / "moe")["layers"][0]["cosine_to_dense"]


@pytest.mark.parametrize(
    ("source", "out", "path"),
    [
        ("/models/llama", "/made/moe", "llama"),  # they share the root alone
        ("/data/llama", "/data/moe", "../llama"),
        ("/home/me/llama", "/data/moe", "~/llama"),
    ],
)
def test_the_path_that_is_written(source, out, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert provenance.published(Path(source), Path(out)) == path
    made = MadeFrom(name="llama", path=path, sha256={}, donors={})
    assert made.seen_from(Path(out)) == Path("/made/moe/llama" if path == "llama" else source)


def proof_of(source: Path, out: Path, **table: object) -> Proof:
    convert(source, out, Recipe.of(**table))
    return verify(source, out)


def test_rounding_is_said(dense, tmp_path):
    """What is exact to the rounded model is far from the one that is stored; card and verify say both."""
    proof = proof_of(dense("llama"), tmp_path / "moe", dtype="bfloat16")
    assert proof.holds
    found = proof.logits["random"]
    assert found.source_difference is not None
    assert found.relative < 1e-6 < 1e-3 < found.source_difference / found.scale
    (said,) = [check.detail for check in proof.checks if check.name == "logits, random"]
    assert re.search(r"to the dense model rounded to bfloat16; .* to the dense model as it is stored", said)
    card = " ".join((tmp_path / "moe" / "README.md").read_text().split())
    assert "computes what the dense model computes, once that is rounded to bfloat16" in card
    assert "The rounding itself changes the output" in card
    exact = proof_of(dense("llama"), tmp_path / "same")
    assert exact.logits["random"].source_difference is None
    assert "rounded" not in (tmp_path / "same" / "README.md").read_text()
    wider = proof_of(dense("llama", dtype="bfloat16"), tmp_path / "wider", dtype="float32")
    assert wider.logits["random"].source_difference is None


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])
def test_what_is_stored_is_rounded_and_nothing_else(model_type, dense, tmp_path):
    """The scale of Gemma's embeddings, the root of 24, is a buffer that no file has."""
    source = dense(model_type, hidden_size=24, head_dim=8)
    proof = proof_of(source, tmp_path / "moe", dtype="bfloat16", moe={"num_experts": 2, "target": "upcycled"})
    assert proof.holds, proof.checks
    assert proof.logits["random"].relative < 1e-5


def test_logits_that_are_all_zero(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "source"))
    tensors = {name: torch.zeros_like(t) for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    proof = proof_of(source, tmp_path / "moe")
    assert proof.holds
    assert proof.logits["random"].relative == 0
    (said,) = [check.detail for check in proof.checks if check.name == "logits, random"]
    assert "gives zeros alone" in said


# --- cards


def card_of(source: Path, out: Path, recipe: Recipe) -> str:
    convert(source, out, recipe)
    return (out / "README.md").read_text()


def test_a_card_escapes_names(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "a`b <b>x\n# [l](x)"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "<i>\n# evil`": 1}))
    card = card_of(source, tmp_path / "moe", Recipe.of())
    assert r"# a\`b \<b\>x \# \[l\](x), upcycled" in card.splitlines()
    assert "`` a`b <b>x # [l](x) ``" in card
    assert not re.search(r"(?m)^# evil", card)
    assert "<i>" not in card.replace(r"\<", "")


@pytest.mark.parametrize("name", [b"bad\xff", "über".encode()])
def test_a_source_whose_name_is_no_text(name, dense, tmp_path):
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    shutil.copytree(dense("llama"), source)
    convert(source, tmp_path / "moe", Recipe.of())
    assert verify(source, tmp_path / "moe", logits=False).holds


@pytest.mark.parametrize("home", [False, True])
def test_where_donors_and_files_were_is_not_published(home, dense, tmp_path, monkeypatch):
    """The card says the way to them from the folder or the home; without any, its recipe is as it was."""
    mine = tmp_path / "somebody"
    monkeypatch.setenv("HOME", str(mine if home else tmp_path / "other"))
    source = Path(shutil.copytree(dense("llama"), mine / "base"))
    donor = Path(shutil.copytree(dense("llama", seed=1), mine / "donor"))
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps({**config, "bos_token_id": 5}))
    init = {"name": "experts", "expert": [{}, {"source": str(donor)}]}
    out = mine / "moe"
    card = card_of(source, out, Recipe.of(moe={"num_experts": 2}, init=init))
    way = "~" if home else ".."
    assert f'"source": "{way}/donor"' in card
    assert plain(f"{way}/donor and {way}/base differ in bos_token_id") in card
    assert "somebody" not in card
    assert "Paths are seen from this folder" in card
    assert verify(source, out, logits=False).holds
    recipe = Recipe.of(moe={"num_experts": 2}, router={"std": 0.5})
    card = card_of(source, mine / "other", recipe)
    assert json.dumps(recipe.as_table(), indent=2) + "\n```\n\nBlueprint" in card
    assert "Paths are seen" not in card


def test_a_card_names_every_source(dense, tmp_path):
    recipe = Recipe.of(init={"name": "branch_train_mix", "sources": [str(dense("qwen3", seed=1))]})
    names = (dense("qwen3").name, dense("qwen3", seed=1).name)
    assert f"checkpoints `{names[0]}` and `{names[1]}` with" in card_of(
        dense("qwen3"), tmp_path / "moe", recipe
    )


def test_a_narrower_model_with_experts_is_compared_with_its_source(tmp_path, capsys):
    source = tiny.make(tmp_path / "vit", "ViTForImageClassification", hidden_size=32)
    recipe = Recipe.of(
        moe={"target": "upcycled", "num_experts": 4}, init={"name": "uniform"}, successor={"hidden_size": 16}
    )
    card = card_of(source, tmp_path / "moe", recipe)
    with Checkpoint.open(source) as opened:
        whole = sum(t.nbytes // 4 for t in opened.tensors.values())
    costs = plan(source, recipe)
    assert whole > costs.dense_parameters
    assert "| | dense | dense, narrower | MoE |" in card
    assert f"| parameters | {whole:,} | {costs.dense_parameters:,} | {costs.total_parameters:,} |" in card
    assert costs.predecessor == {
        "parameters": whole,
        "active_parameters": whole,
        "flops_per_token": plan(source, {"moe": {"target": "upcycled"}}).dense_flops_per_token,
    }
    show_plan(costs)
    assert capsys.readouterr().out.splitlines()[1].split() == ["dense", "dense,", "narrower", "MoE"]
    asked = Budget(tokens=10**6, dense_tokens=10**6)
    situation = Situation(built=blueprint(source, recipe), asked=asked)
    assert situation.before == "the narrower dense model"


def test_an_adapter_beside_the_weights_is_said(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "source"))
    (source / "adapter_config.json").write_text("{}")
    assert any("an adapter beside its weights" in w for w in plan(source, Recipe.of()).warnings)
    assert "an adapter beside its weights" in card_of(source, tmp_path / "moe", Recipe.of())


def test_keys_that_are_there_are_not_listed_as_left_out(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "odd": 1}))
    for target, left in (("upcycled", []), ("native", ["odd"])):
        convert(source, tmp_path / target, Recipe.of(moe={"target": target}))
        assert json.loads((tmp_path / target / "upcycle.json").read_text())["left_out_config_keys"] == left


# --- odd files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_in_place_of_a_file(name, dense, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "source"))
    (source / name).unlink(missing_ok=True)
    if "index" in name:
        (source / "model.safetensors").unlink()
    os.mkfifo(source / name)
    with pytest.raises(UpcycleError, match="is a pipe"):
        convert(source, tmp_path / "out", Recipe.of())


def write_header(path: Path, text: bytes, data: int = 0) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def test_headers_that_would_take_long(tmp_path):
    """Tens of thousands of dimensions, and millions of lists: refused at once, in few words."""
    for size in (1 << 61, 1):
        entry = {"x": {"dtype": "F32", "shape": [size] * 60_000, "data_offsets": [0, 4]}}
        with pytest.raises(UpcycleError, match="has 60000 dimensions") as found:
            read_header(write_header(tmp_path / "a", json.dumps(entry).encode(), 4))
        assert len(str(found.value)) < 500
    lists = b'{"x": [' + b"[]," * 3_000_000 + b"1]}"
    with pytest.raises(UpcycleError, match="is no list of tensors"):
        read_header(write_header(tmp_path / "b", lists))


def test_a_long_header_of_many_tensors_is_read(tmp_path):
    table = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(60_000)}
    text = json.dumps(table, separators=(",", ":")).encode()
    assert len(text) > 1 << 20
    assert len(read_header(write_header(tmp_path / "x", text, 60_000))) == 60_000


@pytest.mark.parametrize("metadata", [5, [], {"a": 1}, "x"])
def test_metadata_that_is_no_text(metadata, tmp_path):
    with pytest.raises(UpcycleError, match="__metadata__"):
        read_header(write_header(tmp_path / "x", json.dumps({"__metadata__": metadata or [1]}).encode()))


@pytest.mark.parametrize(
    "change",
    [
        {"training": 5},
        {"training": [{}]},
        {"training": [5]},
        {"recipe": {"moe": 5, "init": {"name": "copy"}}},
        {"recipe": {"moe": {}, "init": {"name": 5}}},
        {"source": {"name": "x", "sha256": {}, "donors": {"donor 1": {}}}},
        {"source": {"name": 5, "sha256": {}, "donors": {}}},
        {"source": {"name": "x", "path": None, "sha256": {}, "donors": {}}},
        {"files": 5},
        {"carried_files": [5]},
        {"blueprint_hash": None},
    ],
)
def test_a_damaged_upcycle_json(change, converted, moe, capsys):
    record = json.loads((moe / "upcycle.json").read_text())
    (moe / "upcycle.json").write_text(json.dumps({**record, **change}))
    for words in (["verify", str(converted[0]), str(moe), "--no-logits"], ["inspect", str(moe)]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(words)
        assert exit_.value.code == 2
        assert "is damaged" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_a_crash_is_not_taken_for_a_promise_that_does_not_hold(converted, monkeypatch, capsys):
    from upcycle import verification

    monkeypatch.setattr(verification, "verify", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", str(converted[0]), str(converted[1])])
    assert exit_.value.code == 3
    assert "This is a fault of upcycle" in capsys.readouterr().err
