"""Several processes load and train upcycled models as one does: the same bits, the same gradients."""

from __future__ import annotations

import pytest
import torch

import gloo
import ranks
import tiny
import upcycle
from upcycle import Recipe, convert

TWO = [{"fsdp": 2}, {"fsdp": 2, "ep": 2}]
FOUR = [{"fsdp": 4, "ep": 2}]
MOE = {"num_experts": 4, "top_k": 2, "target": "upcycled"}
CHOSEN = {"name": "expert_choice", "capacity_factor": 1.0, "std": 0.5}
UNIVERSAL = {**MOE, "universal_experts": 8, "universal_width": 12}
SPHERICAL = {"name": "spherical", "std": 0.5, "noise": 0.0}
STILL = {"name": "image_classification", "augment": {"flip": 0.0}}
# The class, changes of its config, and of the run file.
CASES: dict[str, tuple[str, dict, dict]] = {
    "llama": ("LlamaForCausalLM", {"mlp_bias": True, "num_hidden_layers": 2}, {"moe": MOE}),
    "llama-capacity": (
        "LlamaForCausalLM",
        {"num_hidden_layers": 2},
        {"moe": {**MOE, "shared_experts": 1}, "router": {"capacity_factor": 1.0}},
    ),
    "llama-chats": ("LlamaForCausalLM", {"num_hidden_layers": 2}, {"moe": MOE, "task": {"name": "sft"}}),
    "llama-apart": (
        "LlamaForCausalLM",
        {"num_hidden_layers": 2},
        {"moe": MOE, "data": {"isolate": True}, "train": {"micro_batch": 1}},
    ),
    "lfm2-apart": (
        "Lfm2ForCausalLM",
        {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        {"moe": MOE, "data": {"isolate": True}},
    ),
    "granite-apart": (
        "GraniteMoeHybridForCausalLM",
        {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
        {"moe": MOE, "data": {"isolate": True}},
    ),
    "vit": (
        "ViTForImageClassification",
        {"num_hidden_layers": 2},
        {"moe": MOE, "router": CHOSEN, "task": STILL, "train": {"batch_size": 4}},
    ),
    "vit-universal": (
        "ViTForImageClassification",
        {"num_hidden_layers": 2},
        {
            "moe": UNIVERSAL,
            "init": {"name": "random"},
            "router": SPHERICAL,
            "task": STILL,
            "train": {"batch_size": 4},
        },
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"depths": [1, 1, 1, 1]},
        {"moe": MOE, "router": {"std": 0.5}, "task": STILL, "train": {"batch_size": 4}},
    ),
}

RESPONSE_NORM = {
    "moe": {**MOE, "layers": [1, 3]},
    "router": CHOSEN,
    "task": STILL,
    "train": {"batch_size": 4},
}
DECAYED = CASES["vit"][2] | {
    "train": {"batch_size": 4, "layer_decay": 0.5, "weight_decay": 100.0, "eps": 1e-3}
}


BIASED = {"router": {"name": "sigmoid", "bias_update_rate": 1e-3, "std": 0.5}, "train": {"micro_batch": 1}}
# The routers that one process reads in float32 under mixed precision: ours, and one of transformers.
IN_FLOAT32 = {
    "llama": {"moe": MOE, **BIASED},
    "ernie": {"router": {"bias_update_rate": 1e-3, "std": 0.5}},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    made = {case: tiny.make(folder / case, name, **changes) for case, (name, changes, _) in CASES.items()}
    made["ernie"] = tiny.make_dense(folder / "ernie", "ernie4_5", num_hidden_layers=2)
    for name in ("BertForMaskedLM", "T5ForConditionalGeneration", "ConvNextV2ForImageClassification"):
        made[name] = tiny.make(folder / name, name)
    return {case: str(source) for case, source in made.items()}


@pytest.fixture(scope="module")
def tables(sources):
    """Sources and recipes to load."""
    split = {"decoder": {"router": {"name": "top_k"}, "moe": {"layers": [1]}}}
    init = {"name": "drop", "ratio": 0.5}
    return [
        (sources["llama"], {"moe": MOE, "init": init}),
        (sources["vit"], {"moe": MOE, "router": CHOSEN, "init": init}),
        (sources["convnext"], {"moe": {**MOE, "layers": "last_half"}, "router": {"name": "soft"}}),
        (sources["vit"], {"moe": UNIVERSAL, "router": SPHERICAL, "init": {"name": "random"}}),
        (sources["BertForMaskedLM"], {"moe": MOE, "router": {"name": "soft"}}),
        (sources["T5ForConditionalGeneration"], {"moe": MOE, "router": CHOSEN, **split}),
    ]


@pytest.fixture(scope="module")
def two(sources, tables):
    """What two ranks load, and the gradients of each case: of the first at each layout, of others at one."""
    at = dict.fromkeys(CASES, TWO[1:]) | {next(iter(CASES)): TWO}
    wanted = [(sources[case], [(layout, run) for layout in at[case]]) for case, (*_, run) in CASES.items()]
    calls = [("loads", (tables, TWO)), *(("gradients", each) for each in wanted)]
    calls.append(("gradients", (sources["ConvNextV2ForImageClassification"], [({"fsdp": 2}, RESPONSE_NORM)])))
    calls.append(("updated", (sources["vit"], [(layout, DECAYED) for layout in TWO])))
    calls += [
        ("routed", (sources[case], [(layout, run) for layout in TWO])) for case, run in IN_FLOAT32.items()
    ]
    return gloo.run(2, "ranks:several", calls)


@pytest.fixture(scope="module")
def four(sources, tables):
    """What four ranks load, and the gradients of one case, as one batch and in pieces."""
    run = CASES["llama"][2]
    pieces = run | {"train": {"micro_batch": 1}}
    wanted = [(layout, table) for layout in FOUR for table in (run, pieces)]
    calls = [("loads", (tables, FOUR)), ("gradients", (sources["llama"], wanted))]
    return gloo.run(4, "ranks:several", calls)


@pytest.mark.parametrize(
    ("world", "layouts"), [("two", TWO), pytest.param("four", FOUR, marks=pytest.mark.slow)]
)
def test_load_is_convert_at_every_layout(world, layouts, tables, request, tmp_path):
    """Every parameter is bit-identical; each rank reads its own experts and holds its part."""
    results = [each[0] for each in request.getfixturevalue(world)]
    for number, (source, table) in enumerate(tables):
        convert(source, tmp_path / str(number), Recipe.of(table))
        wanted = ranks.digests(upcycle.open(tmp_path / str(number)))
        for place, layout in enumerate(layouts):
            found = [result[number * len(layouts) + place] for result in results]
            for result in found:
                assert result["digests"] == wanted, (table, layout)
            assert sum(result["read"] for result in found) == found[0]["experts"], (table, layout)
            assert max(result["held"] for result in found) < 1.3 / len(results), (table, layout)


def same(found, reference, tolerance=1e-6):
    """Gradients, parameter by parameter, and all that the step reports."""
    assert found["gradients"].keys() == reference["gradients"].keys()
    least = 1e-2 * reference["norm"]  # some have a gradient of rounding alone: the bias of keys
    for name, wanted in reference["gradients"].items():
        off = (found["gradients"][name] - wanted).norm() / max(float(wanted.norm()), least)
        assert off <= (tolerance if ".mlp." in name else 3 * tolerance), (name, float(off))
    assert torch.equal(found["counts"], reference["counts"])
    for key in ("loss", "norm", "balance", "z", "held_out"):
        assert found[key] == pytest.approx(reference[key], rel=tolerance), key
    assert found["router_norms"] == pytest.approx(reference["router_norms"], rel=1e-5)


def rounding(case):
    """A gradient behind slots goes through two softmaxes over all tokens: as much rounding as the rest of a
    model has."""
    return 3e-6 if case == "vit-universal" else 1e-6


@pytest.fixture(scope="module")
def one_process(sources):
    return {case: ranks.gradients(sources[case], [({}, changes)])[0] for case, (*_, changes) in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_reference_trains_what_it_should(case, one_process):
    """Routers, experts and biases of every layer have gradients that rounding does not explain."""
    reference = one_process[case]
    for part in (".router.weight", ".experts.down_proj", ".experts."):
        norms = [float(g.norm()) for name, g in reference["gradients"].items() if part in name]
        assert len(norms) >= 2
        assert min(norms) > 1e-3 * reference["norm"], part
    assert (reference["balance"] == 0) == case.startswith("vit")
    assert reference["z"] > 0


@pytest.mark.parametrize("case", CASES)
def test_accumulated_gradients_are_those_of_one_batch(case, sources, one_process):
    changes = CASES[case][2]
    pieces = changes | {"train": {**changes.get("train", {}), "micro_batch": 1}}
    same(ranks.gradients(sources[case], [({}, pieces)])[0], one_process[case], rounding(case))


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_two_processes_are_those_of_one(case, two, one_process):
    for result in two:
        for found in result[1 + list(CASES).index(case)]:
            same(found, one_process[case], rounding(case))


@pytest.mark.slow
def test_gradients_of_two_processes_that_share_no_experts(sources, one_process):
    """The cases of which the test above has one layout."""
    others = [*CASES][1:]
    calls = [("gradients", (sources[case], [(TWO[0], CASES[case][2])])) for case in others]
    for result in gloo.run(2, "ranks:several", calls):
        for case, (found,) in zip(others, result, strict=True):
            same(found, one_process[case], rounding(case))


def test_a_response_norm_has_its_image_on_two_processes(two, sources):
    (reference,) = ranks.gradients(sources["ConvNextV2ForImageClassification"], [({}, RESPONSE_NORM)])
    norms = [float(g.norm()) for n, g in reference["gradients"].items() if ".grn_weight" in n]
    assert min(norms) > 1e-3 * reference["norm"]
    for result in two:
        same(result[-4][0], reference)


@pytest.mark.slow
def test_gradients_of_four_processes_are_those_of_one(four, one_process):
    for _, gradients in four:
        for found in gradients:
            same(found, one_process["llama"])


def test_rates_of_two_processes_are_those_of_one(two, sources):
    """Layer-wise decay and weight decay reach the parts of a parameter wherever they are."""
    (reference,) = ranks.updated(sources["vit"], [({}, DECAYED)])
    (before,) = ranks.updated(
        sources["vit"], [({}, {**DECAYED, "train": {**DECAYED["train"], "layer_decay": 1.0}})]
    )
    assert {rate for rate, _ in reference["rates"].values()} == {1e-3 * 0.5**n for n in (0, 1, 2, 3)} - {0.0}
    assert {rate for rate, _ in before["rates"].values()} == {1e-3}
    for result in two:
        for found in result[-3]:
            assert found["rates"] == reference["rates"]
            for name, value in reference["values"].items():
                torch.testing.assert_close(found["values"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number", range(len(IN_FLOAT32)), ids=[*IN_FLOAT32])
def test_mixed_precision_leaves_routers_in_float32(number, two, sources):
    """Two processes read the bits that they hold, as one does, and the gradients reach them once."""
    case, changes = [*IN_FLOAT32.items()][number]
    (alone,) = ranks.routed(sources[case], [({}, changes)])
    for result in two:
        for found in result[number - len(IN_FLOAT32)]:
            assert {name.rpartition(".")[2] for name in found["read"]} == {
                "weight",
                "e_score_correction_bias",
            }
            for name, wanted in alone["read"].items():
                assert not torch.equal(wanted, wanted.bfloat16().float()), name
                assert found["read"][name].dtype == torch.float32, name
                assert torch.equal(found["read"][name], wanted), name
                if name.endswith("bias"):
                    moved = found["after"][name] - found["before"][name]
                    assert 0 < float(moved.abs().max()) == pytest.approx(1e-3, abs=1e-7)
                else:  # what comes from the blocks is of bfloat16
                    off = found["gradients"][name] - alone["gradients"][name]
                    assert off.norm() < 0.05 * alone["gradients"][name].norm(), name
            assert found["gradients"].keys() == alone["gradients"].keys()
            assert found["loss"] == pytest.approx(alone["loss"], rel=0.01)
            assert found["norm"] == pytest.approx(alone["norm"], rel=0.05)
