"""Clients that this project did not write, as functions from a folder and token ids to logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


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
    """Convert with the converter of llama.cpp's own sources, at $LLAMA_CPP."""
    script = Path(__file__).parent / "gguf_from_hf.py"
    command = [sys.executable, str(script), os.environ["LLAMA_CPP"], str(folder), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode or not out.exists():
        raise RuntimeError(run.stderr.strip().splitlines()[-1])
    return out


def llama_cpp_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """[L, V]; in a process of its own, for llama.cpp aborts where others raise."""
    gguf, found = folder.with_suffix(".gguf"), folder.with_suffix(".npy")
    to_gguf(folder, gguf)
    script = (
        "import sys, json, numpy as np; from llama_cpp import Llama\n"
        "ids = json.loads(sys.argv[3])\n"
        "m = Llama(sys.argv[1], n_ctx=max(64, len(ids)), logits_all=True, verbose=False, n_threads=2)\n"
        "m.eval(ids); np.save(sys.argv[2], np.array(m.scores[:len(ids)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(gguf), str(found), str(ids)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1])
    return np.load(found)
