"""The groups of parameters that the forecast counts: those that torch makes, also around a text model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModel
from transformers.distributed import DistributedConfig

import simulated
import tiny
import tiny_wrappers
import upcycle
from marks import sampled
from upcycle import Recipe, cli, families
from upcycle.blueprints.making import blueprint
from upcycle.forecast import groups, head
from upcycle.forecast.setting import Setting
from upcycle.hf import building, distributing, meshes, models
from upcycle.sharding.layout import Layout

TEXT = {
    "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
    "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
LLAVA = {
    "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": TEXT,
    "vision_config": VISION, "image_token_index": 32000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
WIDE = [("ernie4_5", "ernie4_5_moe"), ("hunyuan_v1_dense", "hunyuan_v1_moe")]  # by their class
ALONE = {"moe": {"part_only": "text"}}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Headers of a LLaVA 1.5 7B, as the hub has it."""
    shapes = {
        "multi_modal_projector.linear_1.weight": (4096, 1024), "multi_modal_projector.linear_1.bias": (4096,),
        "multi_modal_projector.linear_2.weight": (4096, 4096), "multi_modal_projector.linear_2.bias": (4096,),
    }  # fmt: skip
    for prefix, config in (("language_model.", TEXT), ("vision_tower.", VISION)):
        family = families.find(config["model_type"])
        own = family.shapes(family.config({"tie_word_embeddings": False, **config}))
        shapes |= {prefix + name: shape for name, shape in own.items()}
    return tiny.write_headers(tmp_path_factory.mktemp("forecast") / "llava", LLAVA, shapes)


def of_torch(built, layout, precision="float32"):
    """The names on disk of the parameters of each group that FSDP makes, and whether it stays gathered."""
    mixed = precision == "mixed"
    config = DistributedConfig(fsdp_size=layout.fsdp, ep_size=layout.ep, fsdp_mixed_precision=mixed)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with simulated.world(layout.world):
        model = building.on_meta(models.architecture(built.target.architecture), built.config, dtype=dtype)
        names = building.renamed(model, built.target.in_memory(built.entries))
        distributing.distribute(model, config, meshes.meshes(layout))
        known = {id(parameter): names[name] for name, parameter in model.named_parameters()}
        found = {}
        for state in {m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)}:
            for group in state._fsdp_param_groups:
                members = frozenset(known[id(each.sharded_param)] for each in group.fsdp_params)
                trained = (each.sharded_param for each in group.fsdp_params)
                assert len({each.dtype for each in trained if each.requires_grad}) == 1
                found[members] = state is model._get_fsdp_state() or not group._reshard_after_forward
        return found


@pytest.mark.parametrize("layout", [Layout(fsdp=2), Layout(fsdp=2, ep=2)], ids=str)
@pytest.mark.parametrize(
    ("kind", "target"),
    [("llava", "native"), ("internvl", "native"), ("qwen3_5", "native"), ("gemma3", "upcycled")],
)
def test_groups_are_those_that_torch_makes(kind, target, layout, tmp_path):
    """A head of its own in the whole model, a tied one, one that the plan of the class names."""
    built = blueprint(
        tiny_wrappers.make(tmp_path / kind, kind), Recipe.of(moe={"num_experts": 4, "target": target})
    )
    found = groups.of(built, layout)
    assert {frozenset(group.names): group.kept for group in found} == of_torch(built, layout)


@pytest.mark.parametrize(("kind", "target"), [("llama", "upcycled"), *WIDE])
def test_routers_in_float32_are_groups_of_their_own(kind, target, dense):
    """The forecast knows which they are, in mixed precision and in bfloat16."""
    built = blueprint(dense(kind), Recipe.of(moe={"num_experts": 4, "target": target}))
    for layout, precision in itertools.product((Layout(fsdp=2), Layout(fsdp=2, ep=2)), ("mixed", "bfloat16")):
        found = groups.of(built, layout, precision)
        assert {frozenset(group.names): group.kept for group in found} == of_torch(built, layout, precision)
        wide = [group for group in found if group.wide]
        assert len(wide) == (len(built.sites) if precision in built.target.wide_router else 0)
        assert all("gate" in group.names[0] or "router" in group.names[0] for group in wide)


NATIVES = {native: name for name in reversed(tiny.DECODERS) for native in families.find(name).natives}
OTHERS = [(name, native) for native, name in NATIVES.items() if (name, native) not in WIDE]


@pytest.mark.parametrize(("kind", "target"), sampled(OTHERS, 6))
def test_other_routers_are_with_their_blocks(kind, target, dense):
    """And each group has one type, which `of_torch` asserts."""
    built = blueprint(dense(kind), Recipe.of(moe={"num_experts": 4, "target": target}))
    assert not built.target.wide_router
    routers = [name for name in built.entries if name.endswith(built.target.router)]
    for precision in ("mixed", "bfloat16"):
        found = of_torch(built, Layout(fsdp=2), precision)
        assert not any(group <= {*routers} for group in found)


@pytest.mark.parametrize("layout", [Layout(fsdp=8), Layout(fsdp=8, ep=8), Layout(fsdp=4, tp=2)], ids=str)
def test_blocks_are_those_of_the_text_model_alone(llava, layout):
    """At true size: what is around it is in the group of the whole model, and so is its head."""
    whole, alone = blueprint(llava, Recipe.of()), blueprint(llava, Recipe.of(ALONE))
    found, wanted = (groups.of(built, layout) for built in (whole, alone))

    def blocks(each):
        return [(g.block, g.name, g.experts, g.parameters) for g in each if g.block is not None]

    assert blocks(found) == blocks(wanted)
    assert len({g.block for g in found}) == 1 + 32
    within, text = ({g.name: g for g in each} for each in (found, wanted))
    assert within["embedding"].parameters == text["embedding"].parameters
    around = {name for name in whole.entries if not name.startswith("language_model.")}
    assert {*within["the rest"].names} == {*around, "language_model.lm_head.weight"}
    one, other = (
        head.of(Setting(built=built, layout=layout, lengths={"layers": 2048})) for built in (whole, alone)
    )
    assert one == other


def test_plan_and_advise_take_it(llava, capsys):
    cli.main(["plan", str(llava), "--world", "8", "--ep", "8", "--json"])
    found = json.loads(capsys.readouterr().out)["forecast"]
    alone = upcycle.foretell(llava, ALONE, world=8, ep=8).as_dict()
    around = 4 * (sum(t.size for t in blueprint(llava).dense.around.values())) / 8
    assert found["held"]["weights"] - alone["held"]["weights"] == pytest.approx(around, rel=1e-3)
    for part in ("activations", "logits"):
        assert found["peak"][part] == alone["peak"][part]
    assert found["peak"]["total"] > alone["peak"]["total"] + 3 * around
    needs = [
        next(s.value for s in upcycle.advise(llava, recipe, tokens="1B").statements if s.topic == "memory")
        for recipe in (None, ALONE)
    ]
    assert needs[0] >= needs[1] > 1


def test_a_head_that_is_not_trained(llava):
    built = blueprint(llava, Recipe.of())
    setting = Setting(built=built, layout=Layout(), lengths={"layers": 2048})
    names = frozenset(name for group in setting.groups for name in group.names)
    for trained in (names, names - {"language_model.lm_head.weight"}):
        assert head.of(replace(setting, trained=trained)).trained is (trained == names)


@pytest.mark.parametrize("layout", [Layout(fsdp=2), Layout(fsdp=2, ep=2)], ids=str)
def test_groups_of_a_head_that_the_recipe_unties(layout, tmp_path):
    """It is gathered with the last norm, and the embedding apart, as of a model that was never tied."""
    config = {
        **tiny.SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
    }  # fmt: skip
    source = tiny.make_headers(tmp_path / "llama", config)
    built = blueprint(source, Recipe.of(moe={"num_experts": 4, "untie": True}))
    setting = Setting(built=built, layout=layout, lengths={"layers": 8})
    assert {frozenset(group.names): group.kept for group in setting.groups} == of_torch(built, layout)
    assert [group.name for group in setting.groups][:: len(setting.groups) - 1] == ["embedding", "head"]
    names = frozenset(name for group in setting.groups for name in group.names)
    assert not head.of(replace(setting, trained=names - {"lm_head.weight"})).trained
    assert head.of(replace(setting, trained=names - {"model.embed_tokens.weight"})).trained


@pytest.mark.parametrize("layout", [Layout(fsdp=2), Layout(fsdp=2, ep=2)], ids=str)
def test_groups_of_stages(layout, tmp_path):
    """Each block of each stage of a ConvNeXt is gathered by itself, and its experts are shared out."""
    source = tiny.make(tmp_path / "convnext", "ConvNextForImageClassification", depths=[1, 1, 2, 1])
    built = blueprint(source, Recipe.of(moe={"num_experts": 4, "target": "upcycled"}))
    found = groups.of(built, layout)
    assert {frozenset(group.names): group.kept for group in found} == of_torch(built, layout)
    assert len(found) == 1 + 5 * layout.ep


@pytest.mark.parametrize("target", ["native", "upcycled"])
def test_groups_of_a_model_without_a_head(target, dense, tmp_path):
    AutoModel.from_pretrained(dense("llama")).save_pretrained(tmp_path / "base")
    built = blueprint(tmp_path / "base", Recipe.of(moe={"num_experts": 4, "target": target}))
    found = groups.of(built, Layout(fsdp=2))
    assert {frozenset(group.names): group.kept for group in found} == of_torch(built, Layout(fsdp=2))


@pytest.mark.parametrize("part", ["vision", "text+vision"])
def test_experts_that_no_text_reaches_are_refused(llava, part, capsys):
    assert not blueprint(llava, Recipe.of(moe={"part": "vision"})).dense.has_language_head
    for command in (["plan", "--world", "8"], ["advise", "--tokens", "1B"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([command[0], str(llava), *command[1:], "--part", part])
        assert stop.value.code == 2
        assert "texts, which never reach a vision tower" in capsys.readouterr().err


def test_a_block_that_is_not_found_is_no_forecast(llava, monkeypatch):
    built = blueprint(llava, Recipe.of())
    monkeypatch.setattr(type(built.target), "own", lambda self, name: name)
    with pytest.raises(AssertionError, match="no parameters of the blocks"):
        groups.of(built, Layout(fsdp=8))
