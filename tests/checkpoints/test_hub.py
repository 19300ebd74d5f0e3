"""Hub ids, against a small stand-in for the hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file, save_file

import upcycle as library
from marks import quick
from tiny import make_adapter
from upcycle import Recipe
from upcycle.api.forecasting import foretell_run
from upcycle.api.training import rehearse
from upcycle.checkpoints import hub as hub_ids
from upcycle.checkpoints.checkpoint import WEIGHTS
from upcycle.checkpoints.header import read_header
from upcycle.dense.admission import admit
from upcycle.errors import UpcycleError
from upcycle.training import beginning
from upcycle.training.run import Run
from upcycle.training.start import start_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-llama"


class Hub:
    """Serves one folder as REPO and remembers how many bytes of each file it sent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent = folder, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                if path.startswith(f"/api/models/{REPO}"):
                    self.api(path.removeprefix(f"/api/models/{REPO}"))
                elif path.startswith(f"/{REPO}/resolve/"):
                    self.file(path.split("/", 5)[5], body)
                else:
                    self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            def api(self, rest: str) -> None:
                files = [p for p in sorted(hub.folder.rglob("*")) if p.is_file()]
                names = [str(p.relative_to(hub.folder)) for p in files]
                if rest.startswith("/tree"):
                    tree = [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                        for n, p in zip(names, files, strict=True)
                    ]
                    self.reply(200, json.dumps(tree).encode())
                else:
                    info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                    self.reply(200, json.dumps(info).encode())

            def file(self, name: str, body: bool) -> None:
                path = hub.folder / name
                if not path.is_file():
                    return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                data = path.read_bytes()
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
                status = 200
                if wanted := self.headers.get("Range"):
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    end = min(len(data), int(last or len(data)) + 1)
                    headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                    data, status = data[int(first) : end], 206
                if body:
                    hub.sent[name] = hub.sent.get(name, 0) + len(data)
                return self.reply(status, data, headers, body)

            def reply(self, status: int, data: bytes, headers: dict | None = None, body: bool = True) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body and self.command == "GET":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(dense, tmp_path) -> Iterator[Hub]:
    folder = Path(shutil.copytree(dense("llama", intermediate_size=480), tmp_path / "repo"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    for name in ("1_Pooling/config.json", "additional_chat_templates/tool_use.jinja"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"no")
    (folder / "pytorch_model.bin").write_bytes(b"no")
    served = Hub(folder)
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def upcycle(hub, server, tmp_path):
    """A function that runs a command line in a process of its own, for which this is the hub."""
    host, port = hub.server.server_address[:2]
    more = {
        "HF_ENDPOINT": f"http://{host}:{port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [*map(str, arguments)]
        return server.run(line, tmp_path, more=more, before="before:import_the_hub_anew")

    return run


def test_plan_fetches_headers_only(upcycle, hub, tmp_path):
    run = upcycle("plan", REPO, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["source"] == REPO
    weights = (hub.folder / "model.safetensors").stat().st_size
    assert weights > 700_000
    assert hub.sent["model.safetensors"] < weights / 4


@pytest.mark.parametrize("revision", quick(["", "@main", f"@{COMMIT}"], "@main"))
def test_convert_and_verify(revision, upcycle, hub, dense, tmp_path):
    run = upcycle("convert", REPO + revision, tmp_path / "moe")
    assert run.returncode == 0, run.stderr
    assert not {"onnx/model.safetensors", "pytorch_model.bin"} & set(hub.sent)
    record = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    weights = (hub.folder / "model.safetensors").read_bytes()
    assert record["source"]["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    below = {"1_Pooling/config.json", "additional_chat_templates/tool_use.jinja"}
    assert {"tokenizer.json", "modules.json", *below} <= set(record["carried_files"])
    assert record["source"]["name"] == REPO + revision
    assert f"# {REPO}{revision}, upcycled" in (tmp_path / "moe" / "README.md").read_text()
    run = upcycle("verify", REPO + revision, tmp_path / "moe", "--no-logits")
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_such_model(upcycle, hub, tmp_path):
    for command in (["plan", "nobody/nothing"], ["convert", "nobody/nothing", tmp_path / "moe"]):
        run = upcycle(*command)
        assert run.returncode == 2
        assert "no such model on the hub" in run.stderr
        assert "Traceback" not in run.stderr


def test_no_hub(upcycle, hub, tmp_path):
    hub.server.shutdown()
    hub.server.server_close()
    run = upcycle("convert", REPO, tmp_path / "moe")
    assert run.returncode == 2
    assert "no such folder" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_model_without_safetensors(upcycle, hub, tmp_path):
    (hub.folder / "model.safetensors").unlink()
    for command in (["plan", REPO], ["convert", REPO, tmp_path / "moe"]):
        run = upcycle(*command)
        assert run.returncode == 2, run.stderr
        assert "safetensors" in run.stderr
        assert "Traceback" not in run.stderr


def test_an_adapter_from_the_hub(upcycle, hub, dense, tmp_path):
    """Its two files are fetched, and nothing of what lies beside them."""
    source = dense("llama", intermediate_size=480)
    for file in make_adapter(tmp_path / "adapter", source).iterdir():
        file.rename(hub.folder / file.name)
    tables = f'init.expert=[{{}}, {{adapter="{REPO}"}}]'
    asked = ["--init", "experts", "--experts", "2", "--set", tables]
    run = upcycle("convert", source, tmp_path / "moe", *asked)
    assert run.returncode == 0, run.stderr
    assert set(hub.sent) == {"adapter_config.json", "adapter_model.safetensors"}
    record = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert record["source"]["donors"]["adapter 1"]["name"] == REPO


# --- headers of a hub id, in this process


@pytest.fixture
def on_the_hub(monkeypatch, tmp_path):
    """A function that puts folders on the hub by name; it returns the names that are downloaded whole."""
    import huggingface_hub

    folders: dict[str, Path] = {}
    downloaded: list[str] = []

    def header(self, repo: str, weights: str, *, revision: str | None = None) -> SimpleNamespace:
        tensors = {
            name: SimpleNamespace(dtype=t.dtype, shape=t.shape, data_offsets=(t.offset, t.offset + t.nbytes))
            for name, t in read_header(folders[repo] / weights).items()
        }
        return SimpleNamespace(tensors=tensors)

    def headers(self, repo: str, *, revision: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(files_metadata={WEIGHTS: header(self, repo, WEIGHTS)})

    def only(name: str, wanted: tuple[str, ...]) -> Path:
        if any(file.endswith(".safetensors") for file in wanted):
            downloaded.append(name)
        return folders[name]

    def config(repo: str, file: str, *, revision: str | None = None) -> str:
        """Return the file in a snapshot of its own, as the hub's cache has it before weights are fetched."""
        snapshot = tmp_path / "snapshots" / repo
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(folders[repo] / file, snapshot))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", config)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", headers)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", header)
    monkeypatch.setattr(hub_ids, "_download", lambda name: downloaded.append(name) or folders[name])
    monkeypatch.setattr(hub_ids, "_download_only", only)

    def put(**named: Path) -> list[str]:
        folders.update({f"someone/{name}": folder for name, folder in named.items()})
        return downloaded

    return put


def test_no_weights_of_donors_are_fetched_before_they_are_needed(on_the_hub, dense):
    """A plan and advice read the headers of donors, and find the model that is then converted."""
    source, donors = dense("llama"), {"one": dense("llama", seed=1), "two": dense("llama", seed=2)}
    downloaded = on_the_hub(**donors)

    def recipe(*sources: object) -> dict:
        init = {"name": "branch_train_mix", "sources": [*map(str, sources)]}
        return {"moe": {"num_experts": 3}, "init": init}

    there = recipe("someone/one", "someone/two")
    found = library.plan(source, there)
    library.advise(source, there, tokens="1B")
    library.foretell(source, there, world=4)
    assert downloaded == []
    assert found.blueprint_hash == library.plan(source, recipe(*donors.values())).blueprint_hash
    said = "only headers were read, so `upcycle convert` will compare the tokens of someone/one and"
    assert any(warning.startswith(said) for warning in found.warnings)
    built = library.blueprint(source, there)
    assert downloaded == ["someone/one", "someone/two"]
    assert built.hash == found.blueprint_hash


def test_no_weights_of_an_adapter_are_fetched_before_they_are_needed(on_the_hub, dense, tmp_path):
    source = dense("llama")
    downloaded = on_the_hub(adapter=make_adapter(tmp_path / "adapter", source))

    def recipe(adapter: object) -> dict:
        experts = {"name": "experts", "expert": [{}, {"adapter": str(adapter)}]}
        return {"moe": {"num_experts": 2}, "init": experts}

    found = library.plan(source, recipe("someone/adapter"))
    library.foretell(source, recipe("someone/adapter"), world=2)
    assert downloaded == []
    assert found.blueprint_hash == library.plan(source, recipe(tmp_path / "adapter")).blueprint_hash
    assert library.blueprint(source, recipe("someone/adapter")).hash == found.blueprint_hash
    assert downloaded == ["someone/adapter"]


def test_no_weights_of_the_rest_are_fetched_before_they_are_needed(on_the_hub, dense):
    rest = dense("llama", hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    downloaded = on_the_hub(rest=rest)
    recipe = Recipe.of(
        moe={"num_experts": 2, "target": "upcycled", "expert_width": 24},
        init={"name": "uniform"},
        successor={"hidden_size": 16, "rest": "someone/rest"},
    )
    found = library.plan(dense("llama"), recipe)
    assert downloaded == []
    assert library.blueprint(dense("llama"), recipe).hash == found.blueprint_hash
    assert downloaded == ["someone/rest"]


def test_a_dry_run_fetches_no_weights(on_the_hub, dense, tmp_path):
    """Nor does the forecast of a run that trains a part; both say what they say of the folder."""
    downloaded = on_the_hub(model=dense("llama"), teacher=dense("llama", seed=1))
    (text := tmp_path / "text.txt").write_text("a")
    found = {}
    for source, teacher in (("someone/model", "someone/teacher"), (dense("llama"), dense("llama", seed=1))):
        run = {
            "source": str(source), "out": str(tmp_path / "run"), "moe": {"num_experts": 4},
            "data": {"sources": [{"path": str(text)}]}, "teacher": {"source": str(teacher)},
            "schedule": {"name": "constant", "peak": 1e-3},
            "train": {
                "steps": 2, "batch_tokens": 32, "sequence_length": 8, "precision": "float32",
                "only": ["router"],
            },
        }  # fmt: skip
        found[source] = rehearse(run, world=2).as_dict(), foretell_run(Run.of(run), world=2).as_dict()
    assert downloaded == []
    here, there = found.values()
    assert here == there


def test_a_head_on_the_hub_is_not_read(on_the_hub, dense, tmp_path):
    """Whether it is the embedding is asked when the weights are there."""
    folder = Path(shutil.copytree(dense("llama", tie_word_embeddings=True), tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    downloaded = on_the_hub(model=folder)
    run = {
        "source": "someone/model", "out": str(tmp_path / "run"), "data": {"sources": [{"path": "a"}]},
        "schedule": {"name": "constant", "peak": 1e-3},
        "train": {"steps": 1, "batch_tokens": 8, "sequence_length": 8},
    }  # fmt: skip
    assert "lm_head.weight" in start_of(Run.of(run), hub_ids.outline).dense.left_out
    assert downloaded == []
    begun = start_of(Run.of(run))
    (said,) = beginning.first_refusals(Run.of(run), begun, beginning.admitted(Run.of(run), begun))
    assert "stores an lm_head.weight that differs" in said


def test_a_file_of_the_current_folder_is_not_one_of_the_hub(on_the_hub, dense, monkeypatch):
    """Though it has the name of one: a fingerprint of headers has nothing of the weights."""
    on_the_hub(model=dense("llama"))
    monkeypatch.chdir(dense("qwen2"))
    peeked = hub_ids.peek("someone/model")
    assert peeked.headers_only
    assert not peeked.stamps
    whole = admit(hub_ids.open_checkpoint(dense("llama"))).fingerprint
    assert admit(peeked).fingerprint == {key: whole[key] for key in ("config", "tensors")}


# --- a hub id whose files are in the cache, with no hub


@pytest.fixture
def in_the_cache(monkeypatch, tmp_path, dense) -> Path:
    """A snapshot of REPO with two files of weights in the hub's cache, on a machine without a network."""
    from huggingface_hub import constants

    cached = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    folder = Path(shutil.copytree(dense("llama"), cached / "snapshots" / COMMIT))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in (0, 1):
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        save_file(part, folder / f"model-0000{i + 1}-of-00002.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-0000{i + 1}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize("revision", quick(["", "@main", f"@{COMMIT}"], ""))
def test_what_is_in_the_cache_needs_no_hub(revision, in_the_cache):
    """A plan, advice and a dry run read the headers there, and find what a conversion finds."""
    recipe = {"moe": {"num_experts": 4}}
    found = library.plan(REPO + revision, recipe)
    assert found.source == REPO + revision
    assert found.blueprint_hash == library.plan(in_the_cache, recipe).blueprint_hash
    assert library.blueprint(REPO + revision, recipe).hash == found.blueprint_hash
    library.advise(REPO + revision, recipe, tokens="1B")
    assert hub_ids.outline(REPO + revision).folder == in_the_cache


def test_what_is_in_part_in_the_cache(in_the_cache):
    (in_the_cache / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UpcycleError, match="the hub cannot be reached"):
        library.plan(REPO)
