"""`inspect` of a Mixture of Experts that upcycle did not make: it is described, or refused for what it is."""

from __future__ import annotations

import json
import math
import struct
import warnings
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tiny_mixtures import make_mixture
from upcycle import UpcycleError, cli, inspect
from upcycle.checkpoints.header import read_header


def refused(folder: Path) -> str:
    with pytest.raises(UpcycleError) as found:
        inspect(folder)
    return str(found.value)


def test_a_dense_layer_of_an_lfm2_moe(tmp_path):
    """Its matrices have the names of a dense LFM2."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "num_dense_layers": 1}
    make_mixture(tmp_path / "moe", "lfm2_moe", layer_types=["conv", "full_attention"], **sizes)
    dense, sparse = inspect(tmp_path / "moe").blocks
    assert (dense.experts.count, dense.experts.width) == (0, 48)
    assert (sparse.experts.count, sparse.experts.width) == (4, 24)


@pytest.mark.parametrize("said", ["quantised (fp8)", "as F8_E4M3: it is quantised or packed"])
def test_experts_of_eight_bits(said, tmp_path):
    """They are not missing: the config says what they are, or their type does."""
    folder = make_mixture(tmp_path / "moe", "qwen3_moe")
    if "fp8" in said:
        edit(folder, quantization_config={"quant_method": "fp8"})
    file = folder / "model.safetensors"
    table, place = {}, 0
    for name, info in read_header(file).items():
        dtype, item = ("F8_E4M3", 1) if "experts" in name else (info.dtype, 4)
        end = place + item * math.prod(info.shape)
        table[name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))
    assert said in refused(folder)


def test_a_type_that_is_not_known(tmp_path):
    """Nobody who inspects one is told to give a dense checkpoint."""
    folder = make_mixture(tmp_path / "moe", "qwen3_moe")
    edit(folder, model_type="olmoe")
    said = refused(folder)
    assert "is a Mixture of Experts of the type 'olmoe'" in said
    assert "it reads upcycled ones and cohere2_moe, " in said
    assert "dense" not in said


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.mlp.gate.weight", "routers hold NaN or inf (layer 0)"),
        ("model.layers.1.mlp.experts.2.up_proj.weight", "experts hold NaN or inf (layer 1)"),
    ],
)
def test_numbers_that_are_none(number, name, said, tmp_path, capsys):
    """A model that has diverged is described, and it is said where the numbers are."""
    folder = make_mixture(tmp_path / "moe", "qwen3_moe")
    weights = load_file(folder / "model.safetensors")
    weights[name][0, 0] = number
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cli.main(["inspect", str(folder)])
        assert said in capsys.readouterr().out
        cli.main(["inspect", str(folder), "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [note for note in found["notes"] if "NaN" in note] == [said]
    broken = found["layers"][int(name.split(".")[2])]
    where = broken["router"] if "gate.weight" in name else broken
    assert None in where["cosine"][2]


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
