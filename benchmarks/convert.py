"""Speed and memory of `upcycle convert`, compared with mergekit-moe and with cp + sync of the same bytes.

    python benchmarks/convert.py [--mergekit mergekit-moe] [--repeats 4] [--only cp,copy] [--out FILE.json]

The script makes a random Llama (hidden 1024, 24 layers, intermediate 4096, 3 shards of bf16, 0.94 GB) and
converts it to 8 experts. It times every contender in turn, for `repeats` rounds in rotating order: whole
processes, with start-up and sync.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS, SHARDS = 1024, 4096, 32000, 16, 8, 3


def make_llama(folder: Path, layers: int) -> None:
    """Write a random Llama in bfloat16 without holding it in memory."""
    head = HIDDEN // HEADS
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (HEADS * head, HIDDEN),
            p + "self_attn.k_proj.weight": (KV_HEADS * head, HIDDEN),
            p + "self_attn.v_proj.weight": (KV_HEADS * head, HIDDEN),
            p + "self_attn.o_proj.weight": (HIDDEN, HEADS * head),
            p + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            p + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            p + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            p + "input_layernorm.weight": (HIDDEN,),
            p + "post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    folder.mkdir(parents=True)
    names, weight_map, total = list(shapes), {}, 0
    per_shard = -(-len(names) // SHARDS)
    generator = np.random.default_rng(0)
    for number in range(SHARDS):
        part = names[number * per_shard : (number + 1) * per_shard]
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in part:
            nbytes = 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + nbytes]}
            end += nbytes
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in part:
                values = 0.02 * generator.standard_normal(int(np.prod(shapes[name])), dtype=np.float32)
                handle.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        total += end
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_tokenizer(folder: Path) -> None:
    """Write a minimal tokenizer; mergekit does not start without one."""
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2}
    model = {"type": "WordLevel", "vocab": tokens, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )


def run(command: list[str]) -> dict[str, float]:
    """Return wall seconds, CPU seconds and peak memory in MB of a command followed by a sync."""
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:  # ru_maxrss would include the memory of this process at the fork
        peak = max(peak, high_water(process.pid))
        time.sleep(0.01)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()[-2000:]}")
    os.sync()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime,
        "system_seconds": usage.ru_stime - before.ru_stime,
        "load": os.getloadavg()[0],
        "peak_mb": peak / 1e6,
    }


def high_water(pid: int) -> int:
    """Return the peak memory of a process in bytes; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(li.split()[1]) * 1024 for li in status.splitlines() if li.startswith("VmHWM")), 0)


def machine() -> dict[str, object]:
    """Describe the machine that was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", help="the mergekit-moe executable, if it is to be timed")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--only", help="contenders to time, with commas between; no memory by layers then")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="where to write the result (default: standard output)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="upcycle-bench-", dir=options.folder))
    try:
        only = options.only.split(",") if options.only else None
        result = measure(work, options.repeats, options.mergekit, only)
    finally:
        shutil.rmtree(work)
    text = json.dumps(result, indent=2) + "\n"
    options.out.write_text(text) if options.out else sys.stdout.write(text)


def measure(work: Path, repeats: int, mergekit: str | None, only: list[str] | None) -> dict[str, object]:
    dense, out, reference = work / "dense", work / "out", work / "reference"
    make_llama(dense, 24)
    make_tokenizer(dense)
    upcycle = [sys.executable, "-m", "upcycle", "convert", str(dense)]
    run([*upcycle, str(reference)])
    contenders = {
        "cp": ["cp", "-r", str(reference), str(out)],
        "copy": [*upcycle, str(out)],
        "drop": [*upcycle, str(out), "--init", "drop"],
    }
    if mergekit:
        recipe = work / "mergekit.yml"
        experts = [{"source_model": str(dense)} for _ in range(8)]
        recipe.write_text(
            json.dumps(
                {"base_model": str(dense), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
            )
        )
        contenders["mergekit"] = [
            mergekit,
            str(recipe),
            str(out),
            "--i-understand-this-is-not-useful-without-training",
        ]
    contenders = {name: command for name, command in contenders.items() if only is None or name in only}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(repeats):
        # Each round begins with another contender, because each one changes the page cache for the next.
        order = list(contenders)[number % len(contenders) :] + list(contenders)[: number % len(contenders)]
        for name in order:
            runs[name].append(run(contenders[name]))
            shutil.rmtree(out)
    floor = statistics.median(r["seconds"] for r in runs["cp"])
    worst = max(r["seconds"] for r in runs["cp"])
    summary = {
        name: {
            "median_seconds": statistics.median(r["seconds"] for r in rs),
            "ratio_to_cp": statistics.median(r["seconds"] for r in rs) / floor,
            "ratio_to_cp_by_round": [
                r["seconds"] / c["seconds"] for r, c in zip(rs, runs["cp"], strict=True)
            ],
            "worst_seconds": max(r["seconds"] for r in rs),
            "worst_ratio_to_worst_cp": max(r["seconds"] for r in rs) / worst,
            "median_cpu_seconds": statistics.median(r["cpu_seconds"] for r in rs),
            "median_system_seconds": statistics.median(r["system_seconds"] for r in rs),
            "peak_mb": max(r["peak_mb"] for r in rs),
        }
        for name, rs in runs.items()
    }
    source = sum(f.stat().st_size for f in dense.glob("*.safetensors"))
    written = sum(f.stat().st_size for f in reference.glob("*.safetensors"))
    return {
        "machine": machine(),
        "source_bytes": source,
        "output_bytes": written,
        "summary": summary,
        "crc32_seconds_of_source": crc32_seconds(dense),
        "memory_by_layers": memory_by_layers(work) if only is None else None,
        "runs": runs,
    }


def crc32_seconds(folder: Path) -> float:
    """Return the processor seconds of a conversion's checksums: one CRC-32 of every byte of the source."""
    seconds = 0.0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            while data := handle.read(8 << 20):
                began = time.thread_time()
                zlib.crc32(data)
                seconds += time.thread_time() - began
    return seconds


def memory_by_layers(work: Path) -> dict[str, dict[str, float]]:
    """Return the peak memory in MB of copy and drop at 6, 12 and 24 layers."""
    out: dict[str, dict[str, float]] = {"copy": {}, "drop": {}}
    for layers in (6, 12, 24):
        dense, target = work / f"dense-{layers}", work / "out"
        make_llama(dense, layers)
        for init, peaks in out.items():
            command = [sys.executable, "-m", "upcycle", "convert", str(dense), str(target), "--init", init]
            peaks[str(layers)] = run(command)["peak_mb"]
            shutil.rmtree(target)
        shutil.rmtree(dense)
    return out


if __name__ == "__main__":
    main()
