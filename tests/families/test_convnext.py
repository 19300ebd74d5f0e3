"""ConvNeXt: blocks counted through four stages, an image one row of tokens, MoE Jetpack's C-JetMoE-F."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import tiny
import upcycle
from arrays import made, stored
from conftest import SHARED
from marks import quick
from promises import claims
from ranks import trainee_of
from upcycle import Recipe, UpcycleError, blueprint, convert, families, plan, verify
from upcycle.blueprints.cost import flops_per_row
from upcycle.calibration.calibration import ToCalibrate, calibrate
from upcycle.evaluation import scores
from upcycle.hf.models import architecture
from upcycle.nn import MoE
from upcycle.nn.response_norm import normalise
from upcycle.training import drop_path, start
from upcycle.training.export import export
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.moments import carry_state
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run

CLASS = "ConvNextForImageClassification"
TINY = {"model_type": "convnext", "architectures": [CLASS]}  # the defaults are those of ConvNeXt-T
MOE = {"target": "upcycled", "num_experts": 4, "top_k": 2}
WIDE = {
    "hidden_sizes": [16, 24, 32, 48],
    "image_size": 32,
    "patch_size": 2,
}  # stages of 256, 64, 16, 4 tokens


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("small"), CLASS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("wide"), CLASS, **WIDE)


@pytest.fixture(scope="module")
def headers(tmp_path_factory) -> Path:
    """ConvNeXt-T with 1000 classes."""
    labels = {"id2label": {str(i): str(i) for i in range(1000)}}
    return tiny.make_headers(tmp_path_factory.mktemp("headers") / "convnext", TINY | labels, "F32")


# --- where the layers are


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ("last_half", {"stage_3": [3, 4, 5, 6, 7, 8], "stage_4": [0, 1, 2]}),
        ("every_other", {"stage_1": [1], "stage_2": [0, 2], "stage_3": [1, 3, 5, 7], "stage_4": [0, 2]}),
        ([17, 2, 3, 15], {"stage_1": [2], "stage_2": [0], "stage_4": [0, 2]}),
        ([14], {"stage_3": [8]}),
    ],
)
def test_layers_are_counted_through_all_stages(layers, wanted, headers):
    recipe = Recipe.of(moe={**MOE, "layers": layers})
    assert plan(headers, recipe).moe_layers == wanted
    assert blueprint(headers, recipe).moe_layers == wanted
    assert {e["stack"]: e["layers"] for e in blueprint(headers, recipe).config["moe"]} == wanted


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"moe": {**MOE, "layers": [18]}}, r"has \[18\]; the model has layers 0 to 17"),
        ({"moe": MOE, "stage_4": {"moe": {"layers": [0]}}}, r"stage_4\.moe\.layers: a model has one"),
        (
            {"moe": {**MOE, "pooling": "mean"}},
            "convnext has none; leave its head as it is: --set moe.pooling=class_token",
        ),
        ({"moe": {"num_experts": 4}}, "no exact native MoE"),
        ({"moe": MOE, "decoder": {"moe": {"top_k": 1}}}, "it has stage_1, stage_2, stage_3, stage_4"),
        (
            {"moe": {**MOE, "layers": [0]}, "stage_4": {"moe": {"num_experts": 2}}},
            "chooses no block of that stage",
        ),
        ({"moe": MOE, "init": {"name": "random"}, "successor": {"hidden_size": 8}}, "a number for each"),
    ],
)
def test_mistakes(table, said, headers):
    with pytest.raises(UpcycleError, match=said):
        blueprint(headers, Recipe.of(table))


@pytest.mark.parametrize(
    "changes",
    [{"depths": [3, 3, 9]}, {"hidden_sizes": [8, 8, 0, 8]}, {"hidden_sizes": 96}, {"depths": [1, 1, 1.5, 1]}],
)
def test_a_config_of_other_stages_is_refused(changes):
    with pytest.raises(UpcycleError, match="4 whole numbers"):
        families.find("convnext").config({**TINY, **changes})


def test_tokens_of_an_image():
    family = families.find("convnext")
    assert list(family.lengths(family.config(TINY)).values()) == [56**2, 28**2, 14**2, 7**2]
    odd = family.config({**TINY, "image_size": [231, 100], "patch_size": [4, 2]})
    assert list(family.lengths(odd).values()) == [57 * 50, 28 * 25, 14 * 12, 7 * 6]
    model = transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[2, 2, 2, 2], depths=[1, 1, 1, 1], patch_size=[4, 2])
    )
    states = model(torch.zeros(1, 3, 231, 100), output_hidden_states=True).hidden_states
    assert [x.shape[-2] * x.shape[-1] for x in states[-4:]] == list(family.lengths(odd).values())
    with pytest.raises(UpcycleError, match="leaves nothing for the last stage"):
        family.lengths(family.config({**TINY, "image_size": 28}))


def test_places_are_checked_by_stage(small, headers):
    """An expert's part of 49 tokens, and not of 3136; a stage without MoE layers is not asked."""
    router = {"name": "expert_choice", "capacity_factor": 0.04}
    with pytest.raises(UpcycleError, match="an expert's part of 49 tokens"):
        blueprint(headers, Recipe.of(moe={**MOE, "layers": "last_half"}, router=router))
    blueprint(headers, Recipe.of(moe={**MOE, "layers": [14]}, router=router))
    with pytest.raises(UpcycleError, match="an expert's part of 1 tokens"):
        blueprint(small, Recipe.of(moe=MOE, router={"name": "expert_choice", "capacity_factor": 1.0}))


# --- an image is one row of tokens


@pytest.mark.parametrize("name", ["expert_choice", "soft", "spherical", "top_k"])
def test_a_router_sees_the_whole_image(name, small):
    """On a feature map a layer computes what it computes on the row of its places, each image by itself."""
    options = {"capacity_factor": 1.0} if name in ("expert_choice", "top_k") else {}
    recipe = Recipe.of(moe={**MOE, "layers": [3, 4]}, router={"name": name, "std": 0.5, **options})
    model = upcycle.load(small, recipe).eval()
    layer = model.convnext.encoder.stages[2].layers[0].pwconv1
    assert isinstance(layer, MoE)
    images = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    found = layer(images)
    torch.testing.assert_close(found, layer(images.flatten(1, 2)).view(images.shape))
    assert not torch.allclose(found, layer(images.flatten(0, 1)).view(images.shape), atol=1e-3)
    torch.testing.assert_close(found[1:], layer(images[1:]))
    seen = []
    layer.router.register_forward_hook(lambda _, args, routing: seen.append((args[0].shape, routing.groups)))
    model(torch.randn(2, 3, 12, 12))
    assert seen == [((2, 9, 16), 2)]


def test_layer_scale_stays_outside_of_the_experts(small, tmp_path):
    """The block multiplies what experts give; with all of it taken away, nothing of them is left."""
    convert(small, tmp_path / "moe", Recipe.of(moe=MOE, router={"std": 0.5}))
    found, dense = stored(tmp_path / "moe"), stored(small)
    for name in [name for name in dense if name.endswith("layer_scale_parameter")]:
        np.testing.assert_array_equal(found[name], dense[name])
    block = "convnext.encoder.stages.2.layers.1."
    for e in range(4):
        np.testing.assert_array_equal(
            found[f"{block}pwconv1.experts.down_proj"][e], dense[f"{block}pwconv2.weight"]
        )
    model = upcycle.open(tmp_path / "moe").eval()
    states = torch.randn(2, 16, 3, 3)
    one = model.get_submodule(block[:-1])
    with torch.no_grad():
        assert not torch.allclose(one(states), states)
        one.layer_scale_parameter.zero_()
        assert torch.equal(one(states), states)


# --- narrower


def narrowed(arrays: dict[str, np.ndarray], channels, neurons) -> dict[str, np.ndarray]:
    """A ConvNeXt cut by hand: `channels(s)` of stage s, `neurons(s, i)` of its block i."""
    out = {}
    for name, x in arrays.items():
        parts = name.removeprefix("convnext.").split(".")
        if parts[0] == "encoder":
            s = int(parts[2])
            if parts[3] == "downsampling_layer":
                x = x[channels(s)][:, channels(s - 1)] if x.ndim == 4 else x[channels(s - (parts[4] == "0"))]
            elif parts[5] == "pwconv1":
                kept = neurons(s, int(parts[4]))
                x = x[kept][:, channels(s)] if x.ndim == 2 else x[kept]
            elif parts[5] == "pwconv2" and x.ndim == 2:
                x = x[channels(s)][:, neurons(s, int(parts[4]))]
            else:
                x = x[channels(s)]
        elif parts[0] == "embeddings":
            x = x[channels(0)]
        elif parts[0] == "layernorm":
            x = x[channels(3)]
        elif name == "classifier.weight":
            x = x[:, channels(3)]
        out[name] = x
    return out


HALF = {"hidden_size": [8, 12, 16, 24]}


def test_a_uniform_successor_is_cut_by_hand(wide, tmp_path):
    """Weight Selection: every tensor of a model of half the channels, which transformers' class opens."""
    recipe = Recipe.of(moe={"target": "dense"}, init={"name": "uniform"}, successor=HALF)
    convert(wide, tmp_path / "half", recipe)
    assert verify(wide, tmp_path / "half").holds
    found = stored(tmp_path / "half")
    wanted = narrowed(
        stored(wide),
        lambda s: np.arange(0, WIDE["hidden_sizes"][s], 2),
        lambda s, i: np.arange(0, 4 * WIDE["hidden_sizes"][s], 2),
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    model = transformers.ConvNextForImageClassification.from_pretrained(tmp_path / "half")
    assert model.config.hidden_sizes == HALF["hidden_size"]
    assert model(torch.randn(2, 3, 32, 32)).logits.isfinite().all()


def test_stages_choose_their_own_channels(wide):
    """Drawn by stage; the norm and the convolution between two stages fit the ones before and behind."""
    recipe = Recipe.of(moe={"target": "dense"}, init={"name": "random"}, successor=HALF)
    found, whole = made(blueprint(wide, recipe)), stored(wide)
    stages = "convnext.encoder.stages."

    def places(name: str) -> np.ndarray:
        return np.array([np.flatnonzero(whole[name] == x)[0] for x in found[name]])

    chosen = [places(f"{stages}{s}.layers.0.dwconv.bias") for s in range(4)]
    assert chosen[1].tolist() != (chosen[2][chosen[2] < 24]).tolist()
    kept = [places(f"{stages}{s}.layers.{i}.pwconv1.bias") for s, i in ((0, 0), (0, 1))]
    assert kept[0].tolist() != kept[1].tolist()
    wanted = narrowed(whole, lambda s: chosen[s], lambda s, i: places(f"{stages}{s}.layers.{i}.pwconv1.bias"))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("successor", "said"),
    [
        ({"hidden_size": 8}, "wants a number for each of its 4 stacks"),
        ({"hidden_size": [8, 8]}, "wants a number for each of its 4 stacks"),
        ({"hidden_size": [8, 12, 16, 64]}, "must not be wider"),
        ({"hidden_size": [8, 12, 16, 24], "intermediate_size": 32}, "4 neurons a channel"),
    ],
)
def test_mistakes_of_a_successor(successor, said, wide):
    with pytest.raises(UpcycleError, match=said):
        blueprint(wide, Recipe.of(moe={"target": "dense"}, init={"name": "uniform"}, successor=successor))


def test_the_rest_may_be_of_a_second_checkpoint(wide, tmp_path):
    other = tiny.make(tmp_path / "other", CLASS, seed=1, image_size=32, patch_size=2)
    recipe = Recipe.of(
        moe={**MOE, "layers": "last_half"}, init={"name": "uniform"}, successor={**HALF, "rest": str(other)}
    )
    found, own, whole = made(blueprint(wide, recipe)), stored(other), stored(wide)
    assert all(np.array_equal(found[n], own[n]) for n in found if ".pwconv1." not in n or n in own)
    block = "convnext.encoder.stages.3.layers.0."
    np.testing.assert_array_equal(
        found[block + "pwconv1.experts.up_proj"][3], whole[block + "pwconv1.weight"][::2, ::2]
    )


def test_a_deeper_one_repeats_its_blocks(small, tmp_path):
    convert(small, tmp_path / "deeper", Recipe.of(moe={"target": "depth_tiled", "depth": 2}))
    model = transformers.ConvNextForImageClassification.from_pretrained(tmp_path / "deeper")
    assert model.config.depths == [4, 2, 4, 2]
    assert verify(small, tmp_path / "deeper").holds
    found, dense = stored(tmp_path / "deeper"), stored(small)
    for j in range(4):
        name = "convnext.encoder.stages.2.layers.{}.dwconv.weight"
        np.testing.assert_array_equal(found[name.format(j)], dense[name.format(j // 2)])


# --- C-JetMoE-F


FEMTO, DEPTHS = (48, 96, 192, 384), (3, 3, 9, 3)
EXPERTS = {2: (6, 98, 196), 3: (3, 24, 48)}  # stage: MoE layers, core and universal experts


def dense_parameters(sizes: tuple[int, ...], classes: int) -> int:
    """Of a ConvNeXt of so many channels, by its layers."""
    stem, head = 3 * 16 * sizes[0] + 3 * sizes[0], 2 * sizes[3] + sizes[3] * classes + classes
    between = sum(2 * a + 4 * a * b + b for a, b in pairwise(sizes))
    # Kernels, norm, layer scale, and the network of the block.
    blocks = sum(n * (50 * d + 2 * d + d + 8 * d * d + 5 * d) for n, d in zip(DEPTHS, sizes, strict=True))
    return stem + between + blocks + head


def moe_parameters(repo: bool) -> int:
    """What MoE layers have more than the networks in their place: the formula of Table 4's counts."""
    total = 0
    for stage, (layers, core, universal) in EXPERTS.items():
        d = FEMTO[stage]
        extra = core * (8 * d * d + 5 * d) + universal * (2 * d * d + 2 * d) + (core + universal) * d
        extra += 2 * d + 2 if repo else 2 * d + 1 + d * d + d
        total += layers * (extra - (8 * d * d + 5 * d))
    return total


@pytest.mark.parametrize("preset", quick(["paper", "repo"], "paper"))
def test_parameters_of_c_jetmoe_f(preset, headers):
    recipe = Recipe.of(
        moe={"target": "upcycled", "layers": "last_half", "num_experts": 98, "universal_experts": 196},
        stage_4={"moe": {"num_experts": 24, "universal_experts": 48}},
        init={"name": "uniform", "preset": preset},
        successor={"hidden_size": list(FEMTO)},
        router={"name": "spherical", "preset": preset},
    )
    found = plan(headers, recipe)
    assert plan(headers, Recipe.of(moe=MOE)).dense_parameters == dense_parameters((96, 192, 384, 768), 1000)
    assert found.dense_parameters == dense_parameters(FEMTO, 1000)
    assert found.total_parameters == found.dense_parameters + moe_parameters(preset == "repo")
    assert found.num_layers == 18
    # The paper prints 1.1 G: 18 blocks of these widths, and not the 12 of ConvNeXt-F (0.8 G).
    dense = blueprint(headers, recipe).dense
    assert round(flops_per_row(dense, None, dense.family.lengths(dense.config)) / 2e9, 1) == 1.1
    assert found.made == (
        "98 experts of 768 neurons and 196 universal ones of 192 in stage_3, "
        "24 experts of 1536 neurons and 48 universal ones of 384 in stage_4, spherical, in 9 of 18 layers"
    )
    with torch.device("meta"):
        cls = architecture(f"Upcycled{CLASS}")
        model = cls(cls.config_class.from_dict(blueprint(headers, recipe).config))
    assert sum(p.numel() for p in model.parameters()) == found.total_parameters
    layer = model.convnext.encoder.stages[3].layers[0].pwconv1
    assert layer.experts.up_proj.shape == (24, 1536, 384)
    assert layer.universal.up_proj.shape == (48, 384, 384)
    assert isinstance(model.convnext.encoder.stages[2].layers[2].pwconv1, nn.Linear)


def test_flops_of_an_image_are_those_of_its_stages(headers):
    """Products of each stage times its tokens, by hand; what is said of a token is a share of that."""
    sizes, tokens = (96, 192, 384, 768), (3136, 784, 196, 49)
    macs = 3 * 16 * sizes[0] * tokens[0]
    for s in range(4):
        macs += DEPTHS[s] * tokens[s] * (49 * sizes[s] + 8 * sizes[s] ** 2)
        macs += 4 * sizes[s - 1] * sizes[s] * tokens[s] if s else 0
    built = blueprint(headers, Recipe.of(moe={**MOE, "layers": "last_half"}))
    lengths = built.dense.family.lengths(built.dense.config)
    assert flops_per_row(built.dense, None, lengths) == 2 * macs
    assert 4.4e9 < macs < 4.5e9  # 4.5 G in the paper of ConvNeXt
    # A second expert, and the router.
    more = sum(
        layers * tokens[s] * (8 * sizes[s] ** 2 + 4 * sizes[s]) for s, (layers, _, _) in EXPERTS.items()
    )
    assert flops_per_row(built.dense, built, lengths) == 2 * (macs + more)
    found = plan(headers, Recipe.of(moe={**MOE, "layers": "last_half"}))
    assert found.dense_flops_per_token == pytest.approx(2 * macs / 3136, abs=2)
    assert found.flops_per_token == pytest.approx(2 * (macs + more) / 3136, abs=4)


def test_the_recipe_is_the_papers_model(headers, tmp_path):
    path = Path(__file__).parents[2] / "recipes" / "moe_jetpack_convnext.toml"
    measured = tiny.make_statistics(tmp_path / "found.safetensors", headers)
    settings = [f"init.statistics={measured}", f"source={headers}", f"out={tmp_path}"]
    recipe = Recipe.load(path, settings[:1])
    built = blueprint(headers, recipe)
    assert {(s.stack, s.layer, s.num_experts, s.universal_experts, s.width) for s in built.sites} == {
        *(("stage_3", i, 98, 196, 768) for i in range(3, 9)),
        *(("stage_4", i, 24, 48, 1536) for i in range(3)),
    }
    assert {(s.stack, s.universal_width, s.hidden) for s in built.sites} == {
        ("stage_3", 192, 192),
        ("stage_4", 384, 384),
    }
    assert plan(headers, recipe).total_parameters == dense_parameters(FEMTO, 1000) + moe_parameters(False)
    run = Run.load(path, settings)
    assert run.recipe == recipe
    assert run.train.total_steps == math.ceil(300 * 1_281_167 / 4096)
    assert run.schedule.warmup == math.ceil(50 * 1_281_167 / 4096)
    assert (run.schedule.peak, run.optimizer.weight_decay, run.train.batch_size) == (4e-3, 0.05, 4096)
    assert start.start_of(run).dense.config["layer_scale_init_value"] == 1e-6


# --- rates by depth, branches left out, from nothing


def trainee(source: Path, train: dict, **changes):
    table = {
        "source": str(source), "out": "unused", "data": {"sources": [{"path": "unused"}]},
        "train": {"steps": 1, "batch_size": 4, **train}, "schedule": {"name": "constant", "peak": 1.0},
    }  # fmt: skip
    return trainee_of(Run.of(table | changes), Ranks(device=torch.device("cpu")))


def test_rates_by_depth(small):
    """Six blocks in four stages: what leads into a stage learns with its first block, as timm groups them."""
    moe = {**MOE, "layers": "last_half"}
    model = trainee(small, {"layer_decay": 0.5}, moe=moe, router={"name": "spherical", "preset": "repo"})
    names = {p: name for name, p in model.model.named_parameters()}
    found = {names[p]: group["scale"] for group in model.optimizer.param_groups for p in group["params"]}
    blocks = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)]
    for name, scale in found.items():
        parts = name.removeprefix("convnext.").split(".")
        if parts[0] == "embeddings":
            depth = 0
        elif parts[0] in ("classifier", "layernorm"):
            depth = 7
        else:
            s = int(parts[2])
            number = blocks.index((s, int(parts[4]) if parts[3] == "layers" else 0))
            depth = number + 1
            if number >= 3 and parts[3] == "layers" and parts[5] in ("pwconv1", "layernorm"):
                depth = 7  # experts, router, and the norm that they read
        assert scale == 0.5 ** (7 - depth), name
    groups = {names[p]: g["weight_decay"] for g in model.optimizer.param_groups for p in g["params"]}
    block = "convnext.encoder.stages.2.layers.0."
    assert groups[block + "layer_scale_parameter"] == groups[block + "pwconv1.experts.up_proj_bias"] == 0.0
    assert groups[block + "dwconv.weight"] == groups[block + "pwconv1.experts.up_proj"] > 0


@pytest.mark.parametrize("target", ["dense", "upcycled"])
def test_branches_are_left_out_linearly_over_all_blocks(target, tmp_path, monkeypatch):
    """The rates of transformers' own class; a run's rate takes their place, and none leaves them."""
    source = tiny.make(tmp_path / "x", CLASS, drop_path_rate=0.3)
    changes = {"moe": MOE} if target == "upcycled" else {}
    seen: list[float] = []

    def look(branch: torch.Tensor, rate: float) -> torch.Tensor:
        seen.append(rate)
        return branch

    monkeypatch.setattr(drop_path, "dropped", look)
    pixels = torch.rand(4, 3, 12, 12)

    def rates(model: nn.Module) -> list[float]:
        kind = type(model.base_model.encoder.stages[3].layers[0].drop_path)
        return [m.drop_prob for m in model.modules() if type(m) is kind]

    own = trainee(source, {}, **changes).model
    wanted = [0.06, 0.12, 0.18, 0.24, 0.3]
    assert rates(own) == pytest.approx(wanted)  # the first block has an identity in its place
    torch.manual_seed(0)
    assert not torch.allclose(own(pixels).logits, own.eval()(pixels).logits)
    assert seen == []
    model = trainee(source, {"drop_path": 0.5}, **changes).model
    trained = model(pixels).logits
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates(model) == [0.0] * 5
    torch.testing.assert_close(model.eval()(pixels).logits, trained)


def test_from_nothing_it_starts_as_transformers_starts_it(tmp_path):
    source = tiny.make(tmp_path / "x", CLASS, **WIDE)
    model = trainee(source, {}, from_scratch=True).model
    reference = transformers.ConvNextForImageClassification(model.config)
    for name, p in reference.named_parameters():
        found = model.get_parameter(name).detach()
        if p.ndim == 1:
            assert torch.equal(found, p.detach()), name
        else:
            assert abs(float(found.std()) - 0.02) < 4 * 0.02 / (2 * p.numel()) ** 0.5, name
            assert abs(float(found.mean())) < 4 * 0.02 / p.numel() ** 0.5, name
    kernels = model.convnext.encoder.stages[1].downsampling_layer[1].weight.detach()
    assert len({*kernels.flatten().tolist()}) > 0.99 * kernels.numel()  # no kernel twice
    again = trainee(source, {}, from_scratch=True).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_kernels_from_nothing_are_the_same_in_any_slice(wide):
    run = Run.of(
        {
            "source": str(wide), "out": "unused", "from_scratch": True, "schedule": {"peak": 0.0},
            "data": {"sources": [{"path": "unused"}]}, "train": {"steps": 1, "batch_size": 4},
        }
    )  # fmt: skip
    lazy = start.start_of(run).entries["convnext.encoder.stages.3.downsampling_layer.1.weight"].lazy
    whole = lazy.all("F32")
    assert whole.shape == lazy.shape == (48, 32, 2, 2)
    part = lazy.read(((5, 20), (3, 31), (1, 2), (0, 2)), "F32")
    np.testing.assert_array_equal(part, whole[5:20, 3:31, 1:2, 0:2])


def test_moments_are_tiled(small_v2, images, tmp_path):
    """Every expert starts from the dense network's moments, those of its response norm among them."""
    train(Run.of(carried(small_v2, images, tmp_path / "dense")))
    export(tmp_path / "dense", tmp_path / "trained", with_optimizer=True)
    changes = {"moe": {**MOE, "layers": "last_half"}, "optimizer": {"carry_state": True}}
    run = Run.of(carried(tmp_path / "trained", images, tmp_path / "moe") | changes)
    here, begun = Ranks(device=torch.device("cpu")), start.start_of(run)
    found = trainee_of(run, here)
    assert carry_state(begun, run, here, found.model, found.optimizer) == 2
    moments = stored(tmp_path / "trained" / "optimizer" / "exp_avg_sq")
    states = {n: found.optimizer.state[p]["exp_avg_sq"].numpy() for n, p in found.model.named_parameters()}
    block = "convnextv2.encoder.stages.2.layers.0."
    for name, dense in {"up_proj": "pwconv1.weight", "grn_weight": "grn.weight"}.items():
        wanted = moments[block + dense].squeeze()
        assert wanted.any()
        for e in range(4):
            np.testing.assert_array_equal(states[f"{block}pwconv1.experts.{name}"][e], wanted)
    kernels = block + "dwconv.weight"
    np.testing.assert_array_equal(states[kernels], moments[kernels])


def carried(source: Path, data: Path, out: Path) -> dict:
    return {
        "source": str(source), "out": str(out), "schedule": {"peak": 1e-3},
        "data": {"sources": [{"path": str(data)}], "held_out": 0.25},
        "train": {"steps": 2, "batch_size": 8, "eval_every": 0},
    }  # fmt: skip


def test_activation_checkpointing_is_refused(small):
    with pytest.raises(UpcycleError, match="transformers has none for ConvNextForImageClassification"):
        trainee(small, {"activation_checkpointing": True})


# --- from calibration to a model that was trained


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three colours with noise."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
        (folder / str(label)).mkdir()
        for i in range(12):
            pixels = np.clip(random.normal(colour, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def measured(wide, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "found.safetensors"
    return calibrate(
        wide,
        out,
        ToCalibrate(images=images, collect=("l2", "count", "co_activation"), device="cpu", batch_size=8),
    )


def test_statistics_are_of_all_places_of_all_images(wide, images, measured, tmp_path, capsys):
    assert measured.provenance["positions"] == ["channels", "neurons"]
    lengths = {"stage_1": 256, "stage_2": 64, "stage_3": 16, "stage_4": 4}
    assert measured.provenance["tokens"] == {name: 36 * n for name, n in lengths.items()}
    model = transformers.ConvNextForImageClassification.from_pretrained(wide).eval()
    block = model.convnext.encoder.stages[2].layers[1]
    seen: dict[str, list[torch.Tensor]] = {"channels": [], "neurons": []}
    block.pwconv1.register_forward_pre_hook(lambda _, args: seen["channels"].append(args[0]))
    block.pwconv2.register_forward_pre_hook(lambda _, args: seen["neurons"].append(args[0]))
    from PIL import Image

    with torch.inference_mode():
        for path in sorted(images.rglob("*.png")):
            pixels = torch.tensor(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
            model((pixels - 0.5) / 0.5)
    for position, tensors in seen.items():
        x = torch.cat([t.flatten(0, -2) for t in tensors]).double()
        found = measured.of(position, "stage_3", 1, "l2")
        np.testing.assert_allclose(found, x.square().mean(0).sqrt().numpy(), rtol=1e-5)
        if position == "neurons":
            on = (x > 0).double()
            both = measured.of("neurons", "stage_3", 1, "co_activation")
            np.testing.assert_allclose(both, (on.T @ on / len(x)).numpy(), atol=1e-3)
    with pytest.raises(UpcycleError, match="convnext has no attention heads"):
        calibrate(
            wide, tmp_path / "no.safetensors", ToCalibrate(images=images, positions=("heads",), device="cpu")
        )
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(
    "name", quick(["importance", "co_activation", "uniform", "random"], "co_activation", "uniform")
)
def test_it_is_recycled(name, wide, measured, tmp_path):
    """Half the channels, core and universal experts under the spherical router, in two stages' blocks."""
    options = {"importance": {}, "co_activation": {"parts": 8}}.get(name)
    init = {"name": name} if options is None else {"name": name, "statistics": str(measured.path), **options}
    recipe = Recipe.of(
        moe={"target": "upcycled", "layers": "last_half", "num_experts": 5, "universal_experts": 4},
        stage_4={"moe": {"num_experts": 2, "universal_experts": 3}},
        init=init,
        successor=HALF,
        router={"name": "spherical"},
    )
    convert(wide, tmp_path / "moe", recipe)
    proof = verify(wide, tmp_path / "moe")
    assert proof.holds, proof.checks
    assert not proof.preserves_function
    model = upcycle.open(tmp_path / "moe").eval()
    auto = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "moe").eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(pixels).logits, auto(pixels).logits)
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    assert [(len(m.experts.up_proj), len(m.universal.up_proj)) for m in layers] == [(5, 4), (5, 4), (2, 3)]
    norm = model.convnext.encoder.stages[2].layers[0].layernorm
    assert torch.equal(layers[0].router.query_norm_weight, norm.weight)
    whole = stored(wide)
    taken = layers[0].experts.up_proj_bias.detach().numpy()
    bias = whole["convnext.encoder.stages.2.layers.0.pwconv1.bias"]
    assert all(np.isin(row, bias).all() and len({*row}) == 64 for row in taken)
    if name == "importance":
        for s, (count, depth) in enumerate(zip(HALF["hidden_size"], [2, 1, 2, 1], strict=True)):
            norms = np.sum([measured.of("channels", f"stage_{s + 1}", i, "l2") for i in range(depth)], 0)
            best = np.sort(np.argsort(-norms, kind="stable")[:count])
            kernels = f"convnext.encoder.stages.{s}.layers.0.dwconv.weight"
            np.testing.assert_array_equal(stored(tmp_path / "moe")[kernels], whole[kernels][best])


def recycled(source: Path, out: Path, data: Path, statistics: Path, **changes) -> Run:
    table = {
        "source": str(source), "out": str(out),
        "moe": {"target": "upcycled", "layers": "last_half", "num_experts": 4, "universal_experts": 4},
        "stage_4": {"moe": {"num_experts": 2, "universal_experts": 2}},
        "init": {"name": "importance", "statistics": str(statistics)},
        "successor": HALF,
        "router": {"name": "spherical", "expert_dropout": 0.1},
        "data": {"sources": [{"path": str(data)}], "held_out": 0.25},
        "train": {
            "steps": 6, "batch_size": 8, "eval_every": 3, "eval_examples": 8, "layer_decay": 0.9,
            "drop_path": 0.1, "micro_batch": 4,
        },
        "schedule": {"peak": 2e-3, "warmup": 2},
    }  # fmt: skip
    return Run.of(table | changes)


def test_it_is_trained_exported_and_scored(wide, images, measured, tmp_path):
    run = recycled(wide, tmp_path / "run", images, measured.path)
    train(run)
    lines = read(tmp_path / "run")
    assert all(np.isfinite(line.loss) for line in lines)
    assert [(layer.stack, layer.layer) for layer in lines[0].layers] == [
        ("stage_3", 0),
        ("stage_3", 1),
        ("stage_4", 0),
    ]
    out = export(tmp_path / "run", tmp_path / "out").out
    found = scores.evaluate(out, scores.ToScore(images=images))
    model, right = upcycle.open(out).eval(), 0
    from PIL import Image

    with torch.inference_mode():
        for path in sorted(images.rglob("*.png")):
            pixels = torch.tensor(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
            right += int(model((pixels - 0.5) / 0.5).logits.argmax()) == int(path.parent.name)
    assert found["accuracy"] == right / 36


def test_dense_and_expert_choice_learn_the_colours(wide, images, tmp_path):
    for name, changes in {
        "dense": {},
        "moe": {
            "moe": {**MOE, "layers": "last_half"},
            "router": {"name": "expert_choice", "capacity_factor": 2.0},
        },
    }.items():
        table = {
            "source": str(wide), "out": str(tmp_path / name),
            "data": {"sources": [{"path": str(images)}], "held_out": 0.25},
            "train": {"steps": 20, "batch_size": 12, "eval_every": 20},
            "schedule": {"peak": 3e-3, "warmup": 2},
        }  # fmt: skip
        train(Run.of(table | changes))
        assert read(tmp_path / name)[-1].held_out_accuracy == 1.0


def test_features_without_a_head_are_those_that_a_head_sees(wide, images, tmp_path):
    base = tmp_path / "base"
    transformers.ConvNextForImageClassification.from_pretrained(wide).convnext.save_pretrained(base)
    shots = Path(shutil.copytree(images, tmp_path / "shots"))
    one, other = (
        scores.evaluate(f, scores.ToScore(images=images, shots=shots, per_class=3))["few_shot"]
        for f in (wide, base)
    )
    assert one["accuracies"] == other["accuracies"]


@pytest.mark.slow
def test_real_images(tmp_path):
    """CIFAR-10: calibrated, recycled, trained for a few steps, exported, scored."""
    folder = SHARED / "real" / "images"
    data = folder / "cifar10-test.parquet"
    if not data.is_file():
        pytest.skip(f"CIFAR-10 is not at {folder}")
    source = tiny.make(tmp_path / "dense", CLASS, **{**WIDE, "num_labels": 10, "patch_size": 4})
    found = calibrate(
        source,
        tmp_path / "found.safetensors",
        ToCalibrate(images=data, limit=64, device="cpu", collect=("l2",)),
    )
    task = {"task": {"name": "image_classification", "classes": 10}}
    train(recycled(source, tmp_path / "run", data, found.path, **task))
    out = export(tmp_path / "run", tmp_path / "out").out
    assert sum(isinstance(m, MoE) for m in upcycle.open(out).modules()) == 3
    assert 0 <= scores.evaluate(out, scores.ToScore(images=data, limit=64))["accuracy"] <= 1


# --- ConvNeXt V2: a norm over the tokens that an expert has


V2 = "ConvNextV2ForImageClassification"


@pytest.fixture(scope="module")
def small_v2(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("small") / "v2", V2, image_size=16)


def logits(model: nn.Module) -> torch.Tensor:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(pixels).logits


def off(source: Path, recipe: Recipe) -> float:
    wanted = logits(transformers.ConvNextV2ForImageClassification.from_pretrained(source))
    found = logits(upcycle.load(source, recipe, experts_implementation="eager"))
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_the_norm_is_that_of_transformers():
    """On whole images, its gradients as well; where a neuron is zero everywhere they stay finite."""
    from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

    reference = tiny.shake(ConvNextV2GRN(6).double())
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[..., 2] = 0.0
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = reference(one)
    flat = (reference.weight.flatten(), reference.bias.flatten())
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(3).repeat_interleave(20)[shuffled]
    found = normalise(other.view(60, 6)[shuffled], rows, *flat)
    torch.testing.assert_close(found, wanted.view(60, 6)[shuffled])
    (wanted.square() * 3).sum().backward()
    (found.square() * 3).sum().backward()
    torch.testing.assert_close(other.grad, one.grad)
    assert normalise(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), *flat).shape == (0, 6)


@pytest.mark.parametrize("name", ["top_k", "expert_choice", "soft", "spherical"])
def test_an_expert_normalises_over_what_comes_to_it(name, small_v2):
    """Expert by expert and image by image, with transformers' own norm on the tokens or slots of each."""
    from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

    options: dict = {"slots": 3} if name in ("soft", "spherical") else {"capacity_factor": 1.0}
    if name in ("soft", "spherical"):
        options |= {"noise": 0.0} if name == "spherical" else {}
    recipe = Recipe.of(moe={**MOE, "layers": [3]}, router={"name": name, "std": 0.5, **options})
    layer = upcycle.load(small_v2, recipe).eval().convnextv2.encoder.stages[2].layers[0].pwconv1
    experts = tiny.shake(layer.experts)
    images = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(0))
    rows = images.flatten(1, 2)

    def network(e: int, tokens: torch.Tensor) -> torch.Tensor:
        norm = ConvNextV2GRN(64)
        with torch.no_grad():
            norm.weight.copy_(experts.grn_weight[e])
            norm.bias.copy_(experts.grn_bias[e])
        inner = nn.functional.gelu(tokens @ experts.up_proj[e].T + experts.up_proj_bias[e])
        return norm(inner[None, None])[0, 0] @ experts.down_proj[e].T + experts.down_proj_bias[e]

    dispatch = layer.router(rows, None).dispatch
    wanted = torch.zeros_like(rows)
    for g in range(2):
        for e in range(4):
            if name in ("soft", "spherical"):
                slots = dispatch.dispatch[g, :, e].T @ rows[g]
                wanted[g] += dispatch.combine[g, :, e] @ network(e, slots)
            else:
                mine = (dispatch.experts == e) & (dispatch.tokens // 16 == g)
                tokens = dispatch.tokens[mine]
                if len(tokens):
                    made_ = network(e, rows.flatten(0, 1)[tokens]) * dispatch.weights[mine][:, None]
                    wanted[g] = wanted[g].index_add(0, tokens - 16 * g, made_)
    torch.testing.assert_close(layer(images).flatten(1, 2), wanted, rtol=1e-4, atol=1e-5)


ALL = {**MOE, "top_k": 4}


@pytest.mark.parametrize(
    ("moe", "router", "kept"),
    [
        (ALL, {}, True),
        (MOE, {"name": "expert_choice", "capacity_factor": 4.0}, True),
        ({**ALL, "shared_experts": 1}, {}, True),
        (ALL, {"name": "sigmoid"}, True),
        (ALL, {"normalize": False}, True),
        (MOE, {}, False),
        ({**MOE, "shared_experts": 1}, {}, False),
        (MOE, {"name": "expert_choice", "capacity_factor": 2.0}, False),
        (ALL, {"group": 4}, False),
        ({**ALL, "granularity": 4}, {"init": "zeros"}, False),
        (ALL, {"name": "soft"}, False),
    ],
)
def test_the_function_is_claimed_where_every_expert_has_every_token(moe, router, kept, small_v2):
    init = {"name": "virtual_group" if moe.get("granularity") else "copy"}
    recipe = Recipe.of(moe={**moe, "layers": [1, 3]}, init=init, router={"std": 0.5, **router})
    built = blueprint(small_v2, recipe)
    assert built.preserves_function == kept
    assert any("normalises responses" in w for w in plan(small_v2, recipe).warnings) != kept
    assert (off(small_v2, recipe) < 1e-5) == kept


def test_every_claim_of_every_initialisation_holds(tmp_path):
    """All recipes of the test of the other families; those that claim the dense function have it."""
    source, tried = tiny.make(tmp_path, V2, image_size=16, depths=[1, 1, 1, 1]), set()
    for table in claims():
        try:
            built = blueprint(source, Recipe.of(table))
        except UpcycleError:
            continue
        if built.preserves_function:
            assert off(source, Recipe.of(table)) < 1e-5, table
            tried.add((table["init"]["name"], Recipe.of(table).router.name))
    assert {("copy", "expert_choice")} <= tried


def test_v2_is_verified(small_v2, tmp_path):
    for name, moe, kept in (("all", ALL, True), ("two", MOE, False)):
        convert(small_v2, tmp_path / name, Recipe.of(moe=moe, router={"std": 0.5}))
        proof = verify(small_v2, tmp_path / name)
        assert proof.holds, proof.checks
        assert (proof.preserves_function, proof.checks[-1].holds) == ((True, True) if kept else (False, None))
        model = upcycle.open(tmp_path / name)
        found = plan(small_v2, Recipe.of(moe=moe, router={"std": 0.5}))
        assert found.total_parameters == sum(p.numel() for p in model.parameters())
        experts = [p for m in model.modules() if isinstance(m, MoE) for p in m.experts.parameters()]
        idle = sum(p.numel() for p in experts) * (4 - moe["top_k"]) // 4
        assert found.active_parameters == found.total_parameters - idle
        model.save_pretrained(tmp_path / "again")
        assert stored(tmp_path / "again").keys() == stored(tmp_path / name).keys()


def test_v2_is_narrowed_with_its_norms(tmp_path):
    source = tiny.make(tmp_path / "wide", V2, **WIDE)
    convert(
        source, tmp_path / "half", Recipe.of(moe={"target": "dense"}, init={"name": "random"}, successor=HALF)
    )
    model = transformers.ConvNextV2ForImageClassification.from_pretrained(tmp_path / "half")
    assert model(torch.randn(2, 3, 32, 32)).logits.isfinite().all()
    found, whole = stored(tmp_path / "half"), stored(source)
    block = "convnextv2.encoder.stages.2.layers.1."
    kept = [np.flatnonzero(whole[block + "pwconv1.bias"] == x)[0] for x in found[block + "pwconv1.bias"]]
    np.testing.assert_array_equal(found[block + "grn.weight"], whole[block + "grn.weight"][..., kept])
    np.testing.assert_array_equal(found[block + "grn.bias"], whole[block + "grn.bias"][..., kept])


def test_v2_is_calibrated_recycled_and_trained(images, tmp_path):
    source = tiny.make(tmp_path / "wide", V2, **WIDE)
    found = calibrate(
        source, tmp_path / "found.safetensors", ToCalibrate(images=images, collect=("l2",), device="cpu")
    )
    train(recycled(source, tmp_path / "run", images, found.path))
    assert all(np.isfinite(line.loss) for line in read(tmp_path / "run"))
    out = export(tmp_path / "run", tmp_path / "out").out
    made_, whole = stored(out), stored(source)
    block = "convnextv2.encoder.stages.2.layers.0."
    assert made_[f"{block}pwconv1.experts.grn_weight"].shape == (4, 64)
    assert made_[f"{block}pwconv1.universal.grn_weight"].shape == (4, 16)
    assert block + "grn.weight" in whole
    assert block + "grn.weight" not in made_
    # Neurons keep their norm's weight.
    recipe = recycled(source, tmp_path / "run", images, found.path).recipe
    first = made(blueprint(source, recipe))
    bias = whole[block + "pwconv1.bias"]
    for e in range(4):
        kept = [np.flatnonzero(bias == x)[0] for x in first[f"{block}pwconv1.experts.up_proj_bias"][e]]
        np.testing.assert_array_equal(
            first[f"{block}pwconv1.experts.grn_weight"][e], whole[block + "grn.weight"][0, 0, 0, kept]
        )


def test_v2_from_nothing(tmp_path):
    """Response norms start as the identity and have no weight decay, in blocks and in experts."""
    source = tiny.make(tmp_path / "x", V2)
    model = trainee(source, {}, from_scratch=True, moe={**MOE, "layers": "last_half"})
    names = {p: name for name, p in model.model.named_parameters()}
    norms = {name: p for p, name in names.items() if ".grn" in name}
    assert {name.rpartition(".")[2] for name in norms} == {"weight", "bias", "grn_weight", "grn_bias"}
    assert not any(p.any() for p in norms.values())
    decays = {names[p]: g["weight_decay"] for g in model.optimizer.param_groups for p in g["params"]}
    assert {decays[name] for name in norms} == {0.0}


def test_expert_parallelism_of_v2_is_refused(small_v2, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UpcycleError, match="experts with a response norm"):
        upcycle.load(small_v2, Recipe.of(moe=MOE), distributed_config={"fsdp_size": 2, "ep_size": 2})


@pytest.mark.parametrize("value", [None, 224.0, [224], "224", 0])
def test_an_image_size_that_is_none(value, tmp_path):
    folder = tiny.make(tmp_path / "dense", "ConvNextForImageClassification")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": value}))
    with pytest.raises(
        UpcycleError, match=r"image_size = .*; it must be a whole number of 1 or more, or two of"
    ):
        plan(folder, Recipe.of(moe={"target": "upcycled", "num_experts": 2}))
