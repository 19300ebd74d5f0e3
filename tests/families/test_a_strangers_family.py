"""A family of a kind that is not there yet: one file, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upcycle import UpcycleError
from upcycle.families import Family
from upcycle.families._training import trained
from upcycle.families._weights import Weight
from upcycle.families.llama import Llama
from upcycle.training import drop_path, layer_decay
from upcycle.training.run import Run
from upcycle.training.start import start_of

HERE = Path(__file__).parent


def test_one_file_converts_is_verified_and_trains_from_scratch(tmp_path):
    (tmp_path / "files").mkdir()
    shutil.copy(HERE / "strange_persimmon.py", tmp_path / "files" / "persimmon.py")
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(HERE / "strange_run.py"), str(tmp_path), str(tmp_path / "files")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("trained\n")


@pytest.fixture
def strange(monkeypatch):
    """Llama with a parameter of which only the shape is known."""
    plain = Llama.attention

    def attention(self, config, layer):
        return {**plain(self, config, layer), "self_attn.temperature": Weight((4,))}

    monkeypatch.setattr(Llama, "attention", attention)


@pytest.mark.parametrize("moe", [None, {"num_experts": 2}, {"num_experts": 2, "target": "upcycled"}])
def test_a_parameter_that_nobody_knows_is_refused_by_name(strange, moe, tmp_path):
    config = {
        "model_type": "llama", "vocab_size": 16, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = Run.of(
        {
            "source": str(tmp_path), "out": "unused", "from_scratch": True, "schedule": {"peak": 1.0},
            "data": {"sources": [{"path": "unused"}]}, "train": {"steps": 1, "batch_size": 1},
            **({} if moe is None else {"moe": moe}),
        }
    )  # fmt: skip
    with pytest.raises(UpcycleError, match=r"what model\.layers\.0\.self_attn\.temperature of a llama"):
        start_of(run)


class Short(Family):
    """A family that only converts."""

    model_type = "short"

    def config(self, raw):
        return dict(raw)

    def weights(self, config):
        return {}

    def stacks(self, config):
        return ()

    def feed_forward(self, config, layer, tensors, stack="layers"):
        raise AssertionError


def test_a_family_that_only_converts_is_told_apart():
    with pytest.raises(UpcycleError, match="from_scratch = true: the family short only converts"):
        trained(Short(), "from_scratch = true")
    with pytest.raises(UpcycleError, match=r"take train\.drop_path out"):
        drop_path.install(torch.nn.Module(), Short(), {}, 0.1)
    with pytest.raises(UpcycleError, match=r"take train\.layer_decay out"):
        layer_decay.scales(torch.nn.Module(), Short(), {}, 0.5)


def test_a_depth_that_nobody_says_is_an_error():
    counts = {"layers": 2}
    family = Llama()
    assert [family.depth(n, counts) for n in ("embed_tokens.weight", "layers.1.x", "norm.weight")] == [
        0,
        2,
        3,
    ]
    with pytest.raises(UpcycleError, match=r"train\.layer_decay: .* how deep positions\.weight lies"):
        family.depth("positions.weight", counts)
