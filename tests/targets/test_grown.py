"""Growth: a Mixture of Experts gets more experts, and keeps its function where that is promised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from tiny_mixtures import NAMES, make_mixture
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense import fingerprint
from upcycle.errors import UpcycleError
from upcycle.forecast import activations
from upcycle.training.run import Run

IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes a tiny Mixture of Experts once per module and set of arguments."""
    made: dict[object, Path] = {}

    def make(model_type: str, **changes: Any) -> Path:
        key = (model_type, repr(sorted(changes.items())))
        if key not in made:
            made[key] = make_mixture(tmp_path_factory.mktemp("mixture") / model_type, model_type, **changes)
        return made[key]

    return make


def opened(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


@torch.inference_mode()
def difference(source: Path, out: Path) -> float:
    """The largest difference of logits of the two, relative to the largest logit, by transformers alone."""
    before, after = (opened(folder)(IDS).logits for folder in (source, out))
    return float((before - after).abs().max() / before.abs().max())


def stored(folder: Path) -> dict[str, Any]:
    with Checkpoint.open(folder) as found:
        return {name: bytes(found.pread(info, 0, info.nbytes)) for name, info in found.tensors.items()}


@pytest.mark.parametrize("model_type", NAMES)
def test_copies_of_all_experts_keep_the_function(model_type, mixture, tmp_path):
    source, out = mixture(model_type), tmp_path / "out"
    upcycle.convert(source, out, {"grow": {"factor": 2}})
    proof = upcycle.verify(source, out)
    assert proof.holds
    assert proof.preserves_function
    assert difference(source, out) < 1e-5
    # The reference: the parameters that transformers holds, put together by torch.
    before, after = opened(source).state_dict(), opened(out).state_dict()
    assert before.keys() == after.keys()
    several = [name for name, p in after.items() if p.shape != before[name].shape]
    assert {name.rpartition(".")[2] for name in several} == {"gate_up_proj", "down_proj", "weight"}
    for name, p in after.items():
        assert torch.equal(p, torch.cat([before[name]] * 2) if name in several else before[name]), name


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("mixtral", {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
    ],
)
def test_three_copies_keep_the_function_whether_weights_are_renormalised_or_not(
    model_type, changes, mixture, tmp_path
):
    source, out = mixture(model_type, **changes), tmp_path / "out"
    built = upcycle.convert(source, out, {"grow": {"experts": 12}})
    assert built.preserves_function
    assert difference(source, out) < 1e-5


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_with_as_many_experts_per_token_as_before_nothing_is_promised(model_type, mixture, tmp_path):
    source, out = mixture(model_type), tmp_path / "out"
    upcycle.convert(source, out, {"grow": {"top_k": 2}})
    proof = upcycle.verify(source, out)
    assert proof.holds
    assert not proof.preserves_function
    assert difference(source, out) > 0.01  # both places of a token go to copies of its best expert
    warnings = upcycle.plan(source, {"grow": {"top_k": 2}}).warnings
    assert any("grow.top_k = 4 keeps it" in said for said in warnings)


@pytest.mark.parametrize("model_type", NAMES)
def test_the_names_that_transformers_holds_give_the_same_bytes(model_type, mixture, tmp_path):
    hub, held = mixture(model_type), mixture(model_type, as_hub=False)
    assert stored(hub).keys() != stored(held).keys()
    for source, name in ((hub, "hub"), (held, "held")):
        upcycle.convert(source, tmp_path / name, {"grow": {}})
    assert stored(tmp_path / "hub") == stored(tmp_path / "held")


@pytest.mark.parametrize("model_type", ["granitemoe", "qwen2_moe"])
def test_a_model_in_memory_has_the_bits_of_the_folder(model_type, mixture, tmp_path):
    source, recipe = mixture(model_type), {"grow": {"noise": 0.1, "noise_on": "all", "router_noise": 0.1}}
    upcycle.convert(source, tmp_path / "out", recipe)
    loaded, read = upcycle.load(source, recipe).state_dict(), opened(tmp_path / "out").state_dict()
    assert loaded.keys() == read.keys()
    assert all(torch.equal(loaded[name], p) for name, p in read.items())


def test_noise_changes_copies_and_rows_of_copies_alone(mixture, tmp_path):
    source, out = mixture("mixtral"), tmp_path / "out"
    built = upcycle.convert(source, out, {"grow": {"noise": 0.1, "noise_on": "all", "router_noise": 0.5}})
    assert not built.preserves_function
    before, after = opened(source).state_dict(), opened(out).state_dict()
    for name, shares in (("experts.gate_up_proj", 0.1), ("experts.down_proj", 0.1), ("gate.weight", 0.5)):
        old, new = (state[f"model.layers.0.mlp.{name}"] for state in (before, after))
        assert torch.equal(new[:4], old)
        noise = (new[4:] - old).std() / old.std()
        assert noise == pytest.approx(shares, rel=0.2)


@pytest.mark.parametrize("factor", [2, 3])
def test_noise_of_opposite_signs_keeps_the_function_and_tells_copies_apart(factor, mixture, tmp_path):
    source, out = mixture("qwen3_moe"), tmp_path / "out"
    grow = {"factor": factor, "noise": 0.2}
    assert upcycle.convert(source, out, {"grow": grow}).preserves_function
    assert upcycle.verify(source, out).holds
    assert difference(source, out) < 1e-5
    down = opened(out).state_dict()["model.layers.0.mlp.experts.down_proj"].unflatten(0, (factor, 4))
    old = opened(source).state_dict()["model.layers.0.mlp.experts.down_proj"]
    assert torch.allclose(down.mean(0), old, atol=1e-6)
    assert torch.equal(down[0], old) == (factor == 3)
    assert ((down[-1] - old).std() / old.std()).item() == pytest.approx(0.2, rel=0.1)
    model = opened(out)
    model(IDS, labels=IDS).loss.backward()
    gradient = model.model.layers[0].mlp.experts.gate_up_proj.grad
    assert not torch.allclose(gradient[:4], gradient[4:8], rtol=0.01)
    # bfloat16 rounds what should cancel
    assert not upcycle.blueprint(source, {"grow": grow, "dtype": "bfloat16"}).preserves_function


def test_copies_without_noise_have_the_same_gradients(mixture, tmp_path):
    source, out = mixture("mixtral"), tmp_path / "out"
    upcycle.convert(source, out, {"grow": {}})
    model = opened(out)
    model(IDS, labels=IDS).loss.backward()
    for parameter in model.model.layers[0].mlp.parameters():
        assert torch.allclose(parameter.grad[:4], parameter.grad[4:], rtol=1e-3, atol=1e-6)
    assert any("never tells them apart" in said for said in upcycle.plan(source, {"grow": {}}).warnings)


def routing(folder: Path, loads: list[list[float]]) -> Path:
    """A routing.json with the loads of each layer, as `inspect` writes it."""
    rows = [
        {"layer": i, "load": load, "load_by_domain": {"a": load}, "divergence": [[0.0]]}
        for i, load in enumerate(loads)
    ]
    table = {"format": 1, "kind": "text", "domains": [{"name": "a"}], "layers": rows}
    (folder / "routing.json").write_text(json.dumps(table))
    return folder / "routing.json"


def test_the_most_used_experts_are_copied_layer_by_layer(mixture, tmp_path):
    source, out = mixture("mixtral"), tmp_path / "out"
    file = routing(tmp_path, [[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.4, 0.3]])
    grow = {"choose": "utility", "statistics": str(file), "experts": 7, "top_k": 3}
    built = upcycle.convert(source, out, {"grow": grow})
    # 0.7 / 1, 0.7 / 2, then three copies are the most; of equal loads, the first
    assert built.sites[0].growth.parents == (0, 1, 2, 3, 0, 0, 1)
    assert built.sites[1].growth.parents == (0, 1, 2, 3, 2, 3, 1)
    assert not built.preserves_function
    assert upcycle.verify(source, out).holds
    before, after = opened(source).state_dict(), opened(out).state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(after[name], before[name][[0, 1, 2, 3, 2, 3, 1]])
    routing(tmp_path, [[0.7, 0.1, 0.1, 0.1]])
    with pytest.raises(UpcycleError, match="routing of the 4 experts of layer 1"):
        upcycle.plan(source, {"grow": grow})


@pytest.mark.parametrize(
    ("grow", "reason", "keeps"),
    [
        ({"experts": 12, "top_k": 2}, "a token takes 2 experts", {"top_k": 6}),
        ({"experts": 12, "top_k": 2, "router_noise": 0.1}, "a token takes 2 experts", None),
        ({"experts": 8, "top_k": 4}, "different numbers of copies", {"choose": "all", "statistics": ""}),
        ({"experts": 8, "top_k": 4, "router_noise": 0.1}, "different numbers of copies", None),
        ({"experts": 8, "top_k": 2}, "different numbers of copies", None),
        ({"experts": 6, "top_k": 3}, "different numbers of copies", None),
    ],
)
def test_the_reason_why_the_function_is_not_kept_is_true(grow, reason, keeps, mixture, tmp_path):
    """Three copies of each expert are equally many, however they were chosen; a promise is kept."""
    source = mixture("mixtral")
    file = routing(tmp_path, [[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.4, 0.3]])
    grow = {"choose": "utility", "statistics": str(file), **grow}
    plan = upcycle.plan(source, {"grow": grow})
    (said,) = [each for each in plan.warnings if "function is not kept" in each]
    assert reason in said
    assert said.endswith(" keeps it") == (keeps is not None)
    if keeps is not None:
        key, value = next(iter(keeps.items()))
        assert f"grow.{key} = {value} keeps it" in said
        assert upcycle.blueprint(source, {"grow": {**grow, **keeps}}).preserves_function


def test_the_routing_of_other_weights_is_refused(mixture, tmp_path):
    """What `inspect` writes says of which weights it is; older files do not."""
    source, other = mixture("mixtral"), mixture("mixtral", vocab_size=112)
    file = routing(tmp_path, [[0.7, 0.1, 0.1, 0.1]] * 2)
    grow = {"choose": "utility", "statistics": str(file), "experts": 6, "top_k": 3}
    table = json.loads(file.read_text())
    for folder, refused in ((source, False), (other, True)):
        with Checkpoint.open(folder) as of:
            file.write_text(json.dumps({**table, "weights": fingerprint.of_weights(of)}))
        if refused:
            with pytest.raises(UpcycleError, match="is of other weights than those in"):
                upcycle.plan(source, {"grow": grow})
        else:
            assert upcycle.plan(source, {"grow": grow}).num_experts == 6


def test_a_dense_layer_beside_experts_keeps_as_much_as_it_is_wide(mixture):
    """It is wider than the experts of the source, which are what its family calls the width."""
    found = {}
    for width in (48, 480):
        source = mixture("qwen3_moe", mlp_only_layers=[1], intermediate_size=width)
        built = upcycle.blueprint(source, {"grow": {"factor": 2}})
        (stack,) = built.dense.stacks
        found[width] = activations.block_bytes(built, stack, 1)
    assert found[480] - found[48] == 8 * (480 - 48)


def test_dense_layers_get_experts_and_keep_the_function(mixture, tmp_path):
    source, out = mixture("qwen3_moe", mlp_only_layers=[1]), tmp_path / "out"
    recipe = {
        "grow": {"dense_layers": True},
        "init": {"name": "virtual_group"},
        "router": {"init": "grouped", "std": 0.5},
    }
    built = upcycle.convert(source, out, recipe)
    assert [site.growth is None for site in built.sites] == [False, True]
    proof = upcycle.verify(source, out)
    assert proof.holds
    assert proof.preserves_function
    assert difference(source, out) < 1e-5
    assert json.loads((out / "config.json").read_text())["mlp_only_layers"] == []


def test_a_shared_expert_grows_without_output(mixture, tmp_path):
    source, out = mixture("qwen2_moe"), tmp_path / "out"
    built = upcycle.convert(source, out, {"grow": {"factor": 1, "shared_width": 48}})
    assert built.preserves_function
    assert upcycle.verify(source, out).holds
    assert difference(source, out) < 1e-5
    shared = opened(out).state_dict()["model.layers.0.mlp.shared_expert.up_proj.weight"]
    assert shared.shape == (48, 32)
    assert shared[32:].std() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({}, "already a Mixture of Experts .* section \\[grow\\]"),
        ({"grow": {"factor": 1}}, "which are the same"),
        ({"grow": {"factor": 2, "experts": 6}}, "no multiple of 4"),
        ({"grow": {"factor": 3, "experts": 12}}, "give one"),
        ({"grow": {"experts": 2}}, "give more"),
        ({"grow": {"top_k": 9}}, "more than the 8 experts"),
        ({"grow": {"choose": "utility"}}, "give both or neither"),
        ({"grow": {"choose": "utility", "statistics": "nowhere.json"}}, "no file nowhere.json"),
        ({"grow": {"dense_layers": True}}, "all layers .* have experts"),
        ({"grow": {"shared_width": 64}}, "has no shared expert"),
        ({"grow": {}, "moe": {"num_experts": 16}}, "moe.num_experts = 16"),
        ({"grow": {}, "moe": {"target": "upcycled"}}, "stays one"),
        ({"grow": {}, "init": {"name": "drop"}}, "init.name = drop"),
        ({"grow": {}, "router": {"name": "sigmoid"}}, "keeps its router"),
        ({"moe": {"target": "grown"}}, "already a Mixture of Experts"),
    ],
)
def test_what_does_not_fit_is_refused(recipe, said, mixture):
    with pytest.raises(UpcycleError, match=said):
        upcycle.plan(mixture("mixtral"), recipe)


def test_growth_is_offered_to_what_can_grow(mixture, tmp_path):
    with pytest.raises(UpcycleError, match=r"give a dense checkpoint, or add a section \[grow\] to a recipe"):
        upcycle.plan(mixture("qwen3_moe"))
    source = Path(shutil.copytree(mixture("qwen3_moe"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    for model_type in ("qwen3_5_moe", "qwen3_5_moe_text", "olmoe"):
        (source / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        with pytest.raises(
            UpcycleError, match=r"is already a Mixture of Experts .*; give a dense checkpoint$"
        ):
            upcycle.plan(source)


def test_a_dense_source_does_not_grow(dense):
    with pytest.raises(UpcycleError, match=r"\[grow\] makes more experts .* without experts"):
        upcycle.plan(dense("llama"), {"grow": {}})
    with pytest.raises(UpcycleError, match=r"what a section \[grow\] makes"):
        upcycle.plan(dense("llama"), {"moe": {"target": "grown"}})


def test_a_source_that_is_not_whole_is_refused(mixture, tmp_path):
    source = tmp_path / "source"
    make_mixture(source, "qwen3_moe")
    path = source / "config.json"
    config = json.loads(path.read_text())

    def fails(**changes: Any) -> str:
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UpcycleError) as found:
            upcycle.plan(source, {"grow": {}})
        return str(found.value)

    assert "lacks" in fails(num_local_experts=5)
    assert "gate.weight has shape [4, 32]" in fails(num_local_experts=3)
    assert "holds model.layers.1" in fails(num_hidden_layers=1)
    assert "gate_proj.weight has shape [24, 32]" in fails(moe_intermediate_size=23)
    assert "mean the same" in fails(num_experts=5)
    assert "whole number of 1 or more" in fails(num_experts_per_tok=0)
    assert "a token cannot use more" in fails(num_experts_per_tok=9)
    assert "65,536 are taken at most" in fails(num_local_experts=10**9)
    assert "architectures" in fails(architectures={"a": 1})
    assert "decoder_sparse_step" in fails(decoder_sparse_step="1")
    assert "list of numbers of layers" in fails(mlp_only_layers="all")
    assert "takes a Qwen3MoeForCausalLM alone" in fails(architectures=["Qwen3MoeForTokenClassification"])
    assert "does not know" in fails(model_type="olmoe", num_experts=4)
    stored = load_file(source / "model.safetensors") | {"d2t": torch.zeros(5, dtype=torch.int64)}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    assert "holds d2t as I64" in fails()
    upcycle.plan(source, {"grow": {}, "drop": ["d2t"]})


def test_a_recorded_recipe_makes_the_same_and_inspect_shows_copies(mixture, tmp_path):
    source, out = mixture("qwen3_moe"), tmp_path / "out"
    built = upcycle.convert(source, out, {"grow": {}})
    recorded = json.loads((out / "upcycle.json").read_text())
    assert upcycle.plan(source, recorded["recipe"]).blueprint_hash == built.hash
    assert recorded["recipe"]["moe"]["num_experts"] == 8
    found = upcycle.inspect(out)
    assert [block.experts.count for block in found.blocks] == [8, 8]
    assert found.blocks[0].experts.cosine[0][4] == pytest.approx(1.0)
    assert found.blocks[0].to_dense is None
    assert any("copied from experts" in note for note in found.notes)
    card = (out / "README.md").read_text()
    assert "computes what the MoE model computes" in card


def test_a_plan_counts_the_experts_that_a_token_meets(mixture):
    source = mixture("mixtral")
    plan = upcycle.plan(source, {"grow": {}})
    each = 3 * 32 * 48 * 2  # the matrices of an expert, in two layers
    assert plan.dense_parameters - plan.dense_active_parameters == 2 * each
    assert plan.total_parameters - plan.dense_parameters == 4 * each + 4 * 32 * 2
    assert plan.total_parameters - plan.active_parameters == 4 * each
    assert plan.flops_per_token - plan.dense_flops_per_token == 2 * (2 * each + 4 * 32 * 2)
    assert (plan.num_experts, plan.top_k, plan.source_kind, plan.kind) == (8, 4, "MoE", "grown")


def test_a_run_file_grows_without_a_section_moe(mixture):
    table = {
        "source": str(mixture("mixtral")), "out": "out", "grow": {"factor": 3},
        "data": {"sources": [{"path": "text.txt"}]}, "train": {"steps": 1},
        "schedule": {"name": "constant", "peak": 1e-3},
    }  # fmt: skip
    run = Run.of(table)
    assert run.recipe is not None
    assert run.recipe.grow is not None
    assert upcycle.plan(table["source"], run.recipe).num_experts == 12
    assert Run.of({**table, "moe": False}).recipe == run.recipe  # the [moe] of a base file is taken away
