"""Our own runs as a source of advice: the table is what the experiment recorded, and it has a range."""

from __future__ import annotations

import importlib
import statistics

import numpy as np
import pytest

import scripts
import tiny
from upcycle.advice import own_runs, published
from upcycle.advice.gather import advise
from upcycle.advice.reading import readings
from upcycle.advice.situation import Budget, Situation
from upcycle.blueprints.cost import plan_of
from upcycle.blueprints.making import blueprint
from upcycle.recipe import Recipe, override

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4,
    "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip
HALVES = {
    "moe": {"num_experts": 16, "top_k": 2, "granularity": 2},
    "init": {"name": "virtual_group"},
    "router": {"init": "grouped"},
}


def test_the_table_is_what_was_recorded():
    experiments = {(measured.of.name, measured.of.script): measured.of for measured in own_runs.MEASURED}
    for (folder, script), experiment in experiments.items():
        with scripts.loaded(f"{folder}/{script}") as loaded:
            outcome = importlib.import_module("outcome").Outcome.of(loaded.EXPERIMENT)
            assert loaded.EXPERIMENT.extra == experiment.extra
            assert loaded.EXPERIMENT.decay == experiment.decay
            for measured in (each for each in own_runs.MEASURED if each.of == experiment):
                key = (int(measured.start), measured.variant)
                assert len(outcome[key]) == 3
                gap, error = outcome.gap(*key)
                assert (round(gap, 4), round(error, 4)) == (measured.less_dense, measured.error)
                turns = outcome.behind(*key), outcome.ahead(*key)
                rounded = [None if at is None else round(at, 2) for at in turns]
                assert rounded == [measured.behind, measured.ahead]


def test_what_is_said_of_the_two_dense_vits_is_what_was_recorded():
    (measured,) = (each for each in own_runs.MEASURED if each.of == own_runs.JETPACK)
    with scripts.loaded("vision/jetpack") as loaded:
        outcome = importlib.import_module("outcome").Outcome.of(loaded.EXPERIMENT)
        ours = {run["seed"]: run["curve"][-1][4] for run in outcome[42, measured.variant]}

        def ahead(name):
            return [ours[run["seed"]] - run["curve"][-1][4] for run in outcome[42, name]]

        said = " ".join(measured.besides.split())
        for words, name in (("ends another", "large"), ("ends", "small_of_all_flops")):
            by = ahead(name)
            error = statistics.stdev(by) / len(by) ** 0.5
            assert f" {words} {statistics.mean(by):.3f} ± {error:.3f} nats ahead" in said


def test_they_speak_of_models_like_theirs_alone(tmp_path):
    source = tiny.make_headers(tmp_path / "llama", LLAMA)
    recipe = Recipe.of(HALVES)
    size = advise(source, recipe, Budget(tokens=10**6)).plan.dense_parameters

    def said(seen: float, extra: float):
        asked = Budget(tokens=round(extra * seen * size), dense_tokens=round(seen * size))
        found = advise(source, recipe, asked)
        own = {s.said.partition(" tokens per")[0].rpartition(" ")[2]: s for s in found.statements
               if s.source == own_runs.CODE.source}  # fmt: skip
        return found.verdict, own

    verdict, own = said(80, 0.25)
    assert own["80"].inside
    assert not own["10"].inside
    assert "80 tokens per parameter seen before, found at 10" in own["10"].why
    assert verdict.choice == "upcycling"
    assert own_runs.CODE.source in verdict.sentence
    verdict, own = said(10, 0.25)
    assert own["10"].inside
    assert verdict.choice == "dense continuation"
    verdict, own = said(80, 0.05)  # before the curves cross
    assert own["80"].inside
    assert verdict.choice == "dense continuation"


DROP = {"init": {"name": "drop", "ratio": 0.5}}
SLICES = {**HALVES, "init": {"name": "shuffle_slice"}, "router": {}}


@pytest.mark.parametrize(
    ("table", "seen", "taken", "choice", "words"),
    [
        ({}, 41, 0.08, "dense continuation", "upcycling was behind to the end"),  # of a tenth
        ({}, 41, 0.17, None, "which come out level on models like this one"),
        (HALVES, 41, 0.14, "dense continuation", "upcycling was behind until 17 % and ahead from 24 % on"),
        (HALVES, 41, 0.2, None, "which come out level on models like this one"),
        (DROP, 42, 0.25, "dense continuation", "upcycling was behind until 26 %, level at the end, and this"),
        (DROP, 42, 0.28, None, "which come out level on models like this one"),
        (HALVES, 41, 0.29, "upcycling", "had seen 40 tokens per parameter"),
        ({}, 60, 0.17, "upcycling", "had seen 80 tokens per parameter"),
        (
            HALVES,
            110,
            0.12,
            None,
            "had seen 80 tokens per parameter: upcycling was behind until 11 % and",
        ),
        (HALVES, 120, 0.16, "upcycling", "behind until 6 % and ahead from 11 %"),
    ],
)
def test_the_nearest_start_decides(tmp_path, table, seen, taken, choice, words):
    """Of the runs that cover an input, the one whose dense model was trained most nearly as long."""
    source, recipe = tiny.make_headers(tmp_path / "llama", LLAMA), Recipe.of(table)
    built = blueprint(source, recipe)
    trained = round(seen * plan_of(built).dense_parameters)
    any_budget = Situation(asked=Budget(tokens=10**6, dense_tokens=trained), built=built)
    asked = Budget(tokens=round(taken * 10**6 / any_budget.share_of_cost), dense_tokens=trained)
    found = advise(source, recipe, asked).verdict
    assert found.choice == choice
    assert words in found.sentence
    assert found.sure == "published runs"


def test_level_results_decide_nothing():
    better = {(m.of.name, m.start, m.variant): m.better for m in own_runs.MEASURED}
    assert better["code", 40, "drop_0.5"] is better["encoder", 160, "expert_choice_1"] is None
    assert better["code", 40, "copy"] == "upcycling"
    assert better["encoder", 160, "expert_choice_2"] == "dense continuation"


@pytest.mark.parametrize(
    "comparison", [c for c in own_runs.COMPARISONS if c.behind], ids=lambda c: f"{c.trained[0]}-{c.inits[0]}"
)
def test_upcycling_is_behind_for_as_long_as_is_said(comparison):
    """However the two end."""
    assert comparison.better_for(comparison.behind) == "dense continuation"
    later = comparison.better_for(comparison.behind + 0.005)
    assert later is (comparison.better if comparison.ahead is None else None)
    lost = comparison.better == "dense continuation"
    until = "to the end" if lost else f"until {100 * comparison.behind:.0f} %"
    assert f"behind {until}" in comparison.found


def asked_of(source, seen, taken):
    """Tokens that cost a share `taken` of a dense training on `seen` tokens per parameter."""
    size = advise(source, None, Budget(tokens=10**6)).plan.dense_parameters
    return Budget(tokens=round(taken * seen * size), dense_tokens=round(seen * size))


@pytest.mark.parametrize(
    ("seen", "taken", "init", "words"),
    [
        (80, 0.2, "shuffle_slice", "found ahead of dense continuation"),
        (80, 0.1, "shuffle_slice", "found behind dense continuation"),
        (40, 0.1, "shuffle_slice", "+0.0354 ± 0.0024 nats against dense continuation after 10% more FLOPs"),
        (10, 0.2, "shuffle_slice", "found behind dense continuation"),
        (80, 0.6, "shuffle_slice", "have for smaller budgets"),
        (2, 0.2, "virtual_group", "with narrower experts, add"),  # no run of ours began so early
    ],
)
def test_narrower_experts_are_those_of_our_runs_where_these_reach(seen, taken, init, words, tmp_path):
    source = tiny.make_headers(tmp_path / "llama", LLAMA)
    asked = asked_of(source, seen, taken)
    found = advise(source, None, asked).recommended
    (keys,) = (reason for reason in found.reasons if reason.startswith("  --set"))
    (said,) = (reason for reason in found.reasons if reason.startswith("A token takes"))
    table = override(found.recipe.as_table(), keys.replace("--set", "").split())
    assert table["init"] == {"name": init}
    assert (table["moe"]["num_experts"], table["moe"]["granularity"]) == (16, 2)
    assert words in said
    ahead = "found ahead of dense continuation" in said
    assert ahead == (advise(source, Recipe.of(table), asked).verdict.choice == "upcycling")


@pytest.mark.parametrize(
    ("table", "seen", "taken", "choice", "pays"),
    [
        ({}, 350, 0.19, None, True),
        (DROP, 42, 0.16, "dense continuation", False),  # slices are level there
        (DROP, 42, 0.2, "dense continuation", True),
        ({}, 10, 0.2, "dense continuation", False),
    ],
)
def test_slices_are_recommended_where_they_alone_are_known_to_pay(
    table, seen, taken, choice, pays, tmp_path, monkeypatch
):
    if choice is None:  # as if no copies had been run from near there
        known = [c for c in published.EVERY_COMPARISON if (c.inits, c.trained) != (("copy",), (320, 320))]
        assert len(known) == len(published.EVERY_COMPARISON) - 1
        monkeypatch.setattr(published, "EVERY_COMPARISON", known)
    source = tiny.make_headers(tmp_path / "llama", LLAMA)
    asked = asked_of(source, seen, taken)
    found = advise(source, Recipe.of(table), asked)
    slices = Recipe.of({"moe": {"num_experts": 16, "granularity": 2}, "init": {"name": "shuffle_slice"}})
    of_slices = advise(source, slices, asked).verdict
    assert (found.verdict.choice, of_slices.choice == "upcycling") == (choice, pays)
    given = found.recommended
    assert (given.recipe == slices) is pays
    assert given.reasons[0] == (of_slices if pays else found.verdict).sentence
    if pays:
        (changed,) = given.reasons[1:]
        assert "moe.num_experts = 16, not 8" in changed


@pytest.mark.parametrize(
    ("factor", "taken", "choice"),
    [(1, 0.05, "dense continuation"), (1, 0.2, None), (2, 0.2, "dense continuation")],
)
def test_a_t5_like_ours(tmp_path, factor, taken, choice):
    source = tiny.make_headers(tmp_path / "t5", T5)
    recipe = Recipe.of(
        {
            "moe": {"num_experts": 8, "layers": "every_other", "target": "upcycled"},
            "router": {"name": "expert_choice", "capacity_factor": float(factor)},
            "decoder": {"moe": {"layers": []}},
        }
    )
    seen = round(160 * 157 / 128 * 236e3)
    found = advise(source, recipe, Budget(tokens=round(taken * seen), dense_tokens=seen))
    (own,) = [s for s in found.statements if s.source == own_runs.ENCODER.source and s.inside]
    assert f"C = {factor}" in own.said
    assert found.verdict.choice == choice


def test_recycling_like_ours_is_compared_with_the_smaller_model(tmp_path):
    config = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 384, "image_size": 32,
        "patch_size": 8, "num_channels": 3, "hidden_act": "gelu",
    }  # fmt: skip
    source = tiny.make_headers(tmp_path / "vit", config)
    statistics = tiny.make_statistics(tmp_path / "of-the-larger-one.safetensors", source)
    table = {
        "successor": {"hidden_size": 48},
        "moe": {"target": "upcycled", "layers": "last_half", "num_experts": 8, "universal_experts": 16},
        "init": {"name": "importance", "statistics": str(statistics)},
        "router": {"name": "spherical"},
    }
    seen = 42 * 50_000 * 17
    asked = Budget(tokens=round(0.35 * seen), dense_tokens=seen)

    def own(table):
        found = advise(source, Recipe.of(table), asked)
        return found, [
            s for s in found.statements if s.source == own_runs.JETPACK.source and "469 k" in s.said
        ]

    found, (said,) = own(table)
    assert said.inside
    assert found.verdict.choice == "upcycling"
    assert f"at equal cost against {own_runs.JETPACK.against}" in found.verdict.sentence
    _, (said,) = own(table | {"moe": table["moe"] | {"universal_experts": 8}})
    assert not said.inside
    assert "with 16 universal experts" in said.why


VIT = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 32,
    "patch_size": 8, "num_channels": 3, "hidden_act": "gelu",
}  # fmt: skip
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 1056,
    "d_model": 48, "d_ff": 128, "d_kv": 16, "num_heads": 3, "num_layers": 4, "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SOURCES = {"decoder": LLAMA, "vision transformer": VIT, "encoder-decoder": T5}


@pytest.fixture(scope="module")
def recipes():
    """The recipes of all variants, from the scripts that ran them, by folder, script and variant."""
    out = {}
    for of in {(m.of.name, m.of.script) for m in own_runs.MEASURED if m.of != own_runs.JETPACK}:
        with scripts.loaded("/".join(of)) as loaded:
            for name, changes in loaded.EXPERIMENT.variants.items():
                kept = {key: changes[key] for key in ("moe", "init", "router", "decoder") if key in changes}
                out[*of, name] = Recipe.of(kept) if "moe" in kept else None
    return out


@pytest.mark.parametrize(
    ("measured", "comparison"),
    [
        pytest.param(*pair, id=f"{pair[0].of.script}-{pair[0].start}-{pair[0].variant}")
        for pair in zip(own_runs.MEASURED, own_runs.COMPARISONS, strict=True)
        if pair[0].of != own_runs.JETPACK
    ],
)
def test_a_budget_as_a_run_had_it_is_covered_by_that_run(measured, comparison, recipes, tmp_path):
    """And read as that run ended. At the dense FLOPs a token it may be said in tokens."""
    of = measured.of
    source = tiny.make_headers(tmp_path / "source", SOURCES[of.kind])
    built = blueprint(source, recipes[of.name, of.script, measured.variant])
    seen = round(comparison.trained[0] * of.size)
    cost = Situation(asked=Budget(tokens=1), built=built)
    ratio = cost.moe_flops / cost.dense_flops
    for times in [1.0, ratio] if "at the dense FLOPs" in of.variants[measured.variant].said else [ratio]:
        asked = Budget(tokens=round(of.extra * seen / times), dense_tokens=seen)
        here = Situation(asked=asked, built=built)
        (read,) = [r for r in readings(here, own_runs.COMPARISONS) if r.run == comparison]
        assert read.better == measured.better
        assert read.caveat == ""


@pytest.mark.parametrize(
    ("table", "seen", "taken", "words"),
    [
        (
            HALVES,
            80,
            0.4,
            "40 % of the dense cost is past the longest run (30 %), where upcycling ended ahead",
        ),
        (DROP, 40, 0.4, "is past the longest run (30 %), where upcycling ended level"),
        ({}, 10, 0.4, "is past the longest run (30 %), where upcycling ended behind"),
    ],
)
def test_a_budget_past_the_longest_run_is_told_how_that_ended(table, seen, taken, words, tmp_path):
    source, recipe = tiny.make_headers(tmp_path / "llama", LLAMA), Recipe.of(table)
    any_budget = Situation(asked=asked_of(source, seen, 1), built=blueprint(source, recipe))
    asked = asked_of(source, seen, taken / any_budget.share_of_cost)
    found = advise(source, recipe, asked)
    assert words in found.verdict.sentence
    assert (found.verdict.choice, found.verdict.sure) == (None, "not known")
    ((why, inside),) = [
        (s.why, s.inside)
        for s in found.statements
        if s.source == own_runs.CODE.source and f"after {seen} tokens" in s.said and "30% more" in s.said
    ]
    assert not inside
    assert "past the 30 % of this result" in why


def test_whole_runs_of_a_tenth_end_as_docs_advise_says():
    """Less well, beside dense continuation, than longer runs with the same seed stood at that place."""
    outcomes, less = [], {}
    for name in ("code/tenth", "code"):
        with scripts.loaded(name) as loaded:
            outcomes.append(importlib.import_module("outcome").Outcome.of(loaded.EXPERIMENT))
    short, long = outcomes
    for start, variant in (key for key in short.runs if key[1] != "dense"):
        dense = long.share(start, "dense")
        ends = short.share(start, variant)
        stood = {
            seed: np.interp(ends[seed][-1, 0], *curve.T) - np.interp(ends[seed][-1, 0], *dense[seed].T)
            for seed, curve in long.share(start, variant).items()
        }
        ended = dict(zip(ends, short.gaps(start, variant), strict=True))
        less[start, variant] = statistics.mean(ended[seed] - stood[seed] for seed in stood)
    worst = max(less, key=less.__getitem__)
    assert (worst, round(less[worst], 3)) == ((40, "copy"), 0.020)
    assert all(abs(less[start, "shuffle_slice"]) < 0.005 for start in (40, 80, 160))


EARLY = "that run took 30 %, and its rate had not fallen there, which can flatter upcycling"


@pytest.mark.parametrize(
    ("table", "seen", "taken", "choice", "early", "words"),
    [
        ({}, 80, 0.14, None, True, "in a whole run of 10 %, from 40 tokens per parameter, it ended behind"),
        (
            HALVES,
            120,
            0.12,
            None,
            True,
            "in a whole run of 10 %, from 80 tokens per parameter, it ended behind",
        ),
        (SLICES, 160, 0.12, "upcycling", True, "ahead from 11 %"),  # and so it was after a tenth
        ({}, 80, 0.2, "upcycling", True, "ahead from 13 % on"),  # no run is of nearly this budget
        ({}, 80, 0.25, "upcycling", False, "ahead from 13 % on"),
        (SLICES, 160, 0.1, "upcycling", False, "ahead from 9 % on"),  # a run of this very budget
    ],
)
def test_a_crossing_in_a_longer_run_is_called_one(table, seen, taken, choice, early, words, tmp_path):
    source, recipe = tiny.make_headers(tmp_path / "llama", LLAMA), Recipe.of(table)
    any_budget = Situation(asked=asked_of(source, seen, 1), built=blueprint(source, recipe))
    found = advise(source, recipe, asked_of(source, seen, taken / any_budget.share_of_cost)).verdict
    assert found.choice == choice
    assert (EARLY in found.sentence) is early
    assert words in found.sentence


def test_a_real_model_is_out_of_their_range(tmp_path):
    larger = LLAMA | {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048}
    source = tiny.make_headers(tmp_path / "llama", larger)
    asked = Budget(tokens=10**9, dense_tokens=4 * 10**9)
    own = [s for s in advise(source, Recipe.of(HALVES), asked).statements if s.source == own_runs.CODE.source]
    assert own
    assert not any(s.inside for s in own)


@pytest.mark.parametrize("comparison", own_runs.COMPARISONS, ids=lambda c: f"{c.trained[0]}-{c.inits[0]}")
def test_every_line_is_one_of_the_comparisons(comparison):
    assert comparison in published.EVERY_COMPARISON
