"""Routers that start from data: each against a naive account of its formula, on random and on real input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from scipy.optimize import linear_sum_assignment, linprog

import tiny
from upcycle import Recipe, blueprint, cli
from upcycle.advice import recipe_file
from upcycle.api.calibration import calibrate
from upcycle.blueprints.cost import plan
from upcycle.errors import UpcycleError
from upcycle.init._assignment import balanced
from upcycle.nn.router_rows import RouterRows, seen, warnings
from upcycle.nn.router_starts.centroids import spherical_kmeans
from upcycle.records.statistics import KEY, NEGATIVE, Statistics
from upcycle.tensors import rng

PROMPTS = """
[[domain]]
name = "stories"
positive_prompts = ["Once upon a time there was a little girl", "The dog ran to the park and"]
negative_prompts = ["The king shall"]

[[domain]]
name = "plays"
positive_prompts = ["The king shall have his crown, my lord", "I pray you"]

[[domain]]
name = "films"
positive_prompts = ["The film was released in 1994 by"]
negative_prompts = ["Once", "The dog and the cat"]
"""
COLLECT = ("mean", "second_moment", "sample", "mergekit_hidden", "mergekit_hidden_avg", "cheap_embed")
DOMAINS = ("stories", "plays", "films")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.toml"
    file.write_text(PROMPTS)
    return file


@pytest.fixture(scope="module")
def measured(stories: Path, prompts: Path) -> Statistics:
    """Everything that routers start from, of a trained model and three domains of prompts."""
    out = prompts.with_name("found.safetensors")
    return calibrate(
        stories, out, prompts=prompts, collect=COLLECT, positions=("channels",), batch_size=2, device="cpu"
    )


def sides(prompts: Path) -> list[tuple[list[str], list[str]]]:
    domains = tomllib.loads(prompts.read_text())["domain"]
    return [(each["positive_prompts"], each.get("negative_prompts", [])) for each in domains]


def rows_of(source: Path, start: dict, experts: int = 3, **others) -> list[np.ndarray]:
    """The router of every layer of a blueprint."""
    moe = {"num_experts": experts, **others.pop("moe", {})}
    built = blueprint(source, Recipe.of(moe=moe, router={"init": start}, **others))
    names = [name for name in built.entries if name.endswith("block_sparse_moe.gate.weight")]
    return [built.entries[name].lazy.all("F32") for name in names]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# --- what is measured


def inputs_of(stories: Path, texts: list[str], layer: int) -> list[np.ndarray]:
    """What the network of a layer reads for each text, one at a time, without the BOS token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    kept: list[np.ndarray] = []
    module = model.model.layers[layer].mlp
    module.register_forward_pre_hook(lambda _, args: kept.append(args[0][0].numpy()))
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id
        with torch.no_grad():
            model(ids)
    return [x[1:].astype(np.float64) for x in kept]


@pytest.mark.parametrize("layer", [0, 4])
def test_means_and_moments_are_those_of_the_prompts_alone(layer, measured, stories, prompts):
    """Padding, the BOS token and, for all but their own mean, negative prompts do not count."""
    positive, negative, everything = [], [], []
    for good, bad in sides(prompts):
        tokens = np.concatenate(inputs_of(stories, good, layer))
        positive.append(tokens.mean(0))
        everything.append(tokens)
        negative.append(np.concatenate(inputs_of(stories, bad, layer)).mean(0) if bad else np.zeros(64))
    tokens = np.concatenate(everything)
    for name, wanted in (
        ("mean", positive), (NEGATIVE, negative), ("second_moment", tokens.T @ tokens / len(tokens)),
        ("sample", tokens),
    ):  # fmt: skip
        found = measured.of("channels", "layers", layer, name)
        assert found.dtype == (np.float32 if name == "sample" else np.float64)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5, err_msg=name)
    assert [domain.name for domain in measured.domains] == list(DOMAINS)
    assert [domain.tokens["layers"] for domain in measured.domains] == [len(x) for x in everything]
    assert measured.provenance["tokens"] == {"layers": len(tokens)}


def naive_mergekit(stories: Path, prompts: Path, *, average: bool) -> torch.Tensor:
    """Rows [L, D, H] as the dossier of mergekit-moe describes them, prompt by prompt where that is the same.

    Written with Hugging Face's hidden states, a loop over prompts, and padding by hand.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)

    def mean(texts: list[str]) -> torch.Tensor:
        rows = [tokenizer(tokenizer.bos_token + text, add_special_tokens=False).input_ids for text in texts]
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        ids = [[tokenizer.bos_token_id] * pad + row for pad, row in zip(pads, rows, strict=True)]
        mask = [[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]
        with torch.no_grad():
            states = model(
                torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True
            ).hidden_states[:-1]
        found = torch.stack([s.sum(1) / longest if average else s[:, -1] for s in states])  # [L, B, H]
        return found.sum(1) / len(texts)

    out = []
    for good, bad in sides(prompts):
        row = mean(good) - mean(bad) if bad else mean(good)
        out.append(row / row.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("average", [False, True])
def test_mergekit_hidden_is_a_naive_account_of_it(average, measured, stories, prompts):
    wanted = naive_mergekit(stories, prompts, average=average)
    start = {"name": "mergekit_hidden", "statistics": str(measured.path), "average": average}
    for row, found in zip(wanted, rows_of(stories, start), strict=True):
        np.testing.assert_array_equal(found, row.float().numpy())


def test_cheap_embed_is_the_sum_of_embeddings(measured, stories, prompts):
    table = load_file(stories / "model.safetensors")
    embedding = next(t for name, t in table.items() if "embed_tokens" in name).astype(np.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)

    def summed(texts: list[str]) -> np.ndarray:
        ids = [i for text in texts for i in tokenizer(text).input_ids]
        total = embedding[ids].sum(0)
        return total / np.linalg.norm(total)

    wanted = unit(np.array([summed(a) - summed(b) if b else summed(a) for a, b in sides(prompts)]))
    for found in rows_of(stories, {"name": "cheap_embed", "statistics": str(measured.path)}):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


# --- what is made of it


def test_prompts_take_off_what_all_experts_share(measured, stories):
    start = {"name": "prompts", "statistics": str(measured.path), "temperature": 0.5}
    for layer, found in enumerate(rows_of(stories, start)):
        means = measured.of("channels", "layers", layer, "mean").astype(np.float64)
        means = means - measured.of("channels", "layers", layer, NEGATIVE)
        np.testing.assert_allclose(found, 2 * unit(means - means.mean(0)), atol=2e-6)


def test_domains_go_to_the_experts_that_are_named(measured, stories):
    start = {"name": "mergekit_hidden", "statistics": str(measured.path)}
    whole = rows_of(stories, start)
    named = rows_of(stories, {**start, "domains": ["films", "films", "stories", "plays"]}, experts=4)
    for a, b in zip(whole, named, strict=True):
        np.testing.assert_array_equal(b, a[[2, 2, 0, 1]])


def test_ridge_is_least_squares_on_all_tokens(stories, tmp_path):
    """The closed form from sums, against a solve over every token with its domain as one-hot."""
    texts = {"ab": "the cat and the dog ran. " * 30, "cd": "A king, a queen, my lord! " * 30}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    found = calibrate(
        stories, tmp_path / "found.safetensors", domains={n: tmp_path / f"{n}.txt" for n in texts},
        collect=("mean", "second_moment", "sample"), positions=("channels",), length=32, sample=4096,
        device="cpu", in_order=True,
    )  # fmt: skip
    start = {"name": "ridge", "statistics": str(found.path)}
    counts = [domain.tokens["layers"] for domain in found.domains]
    for layer, rows in enumerate(rows_of(stories, start, experts=2, moe={"top_k": 1})):
        tokens = found.of("channels", "layers", layer, "sample").astype(np.float64)  # all, in order
        assert len(tokens) == sum(counts)
        y = np.repeat(np.eye(2), counts, axis=0)
        solved = np.linalg.lstsq(
            np.vstack([tokens, 0.1 * np.eye(64)]), np.vstack([y, np.zeros((64, 2))]), rcond=None
        )[0]
        np.testing.assert_allclose(rows, unit(solved.T) / 0.1, atol=1e-5)
        assert ((tokens @ rows.T).argmax(1) == y.argmax(1)).mean() > 0.9


def test_centroids_find_clusters_that_are_there(stories, tmp_path):
    """Tokens round five directions, which k-means must find whatever the seed draws first."""
    draw = np.random.default_rng(0)
    centres = unit(draw.normal(size=(5, 64)))
    tokens = np.concatenate(
        [draw.normal(c, 0.02, (n, 64)) for c, n in zip(centres, (9, 30, 5, 20, 7), strict=True)]
    )
    for seed in range(3):
        found = spherical_kmeans(tokens, 5, rng.key(seed, "k"), 50)
        nearest = found @ centres.T
        assert sorted(nearest.argmax(1)) == [0, 1, 2, 3, 4]
        assert nearest.max(1).min() > 0.99
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_the_sample_is_the_same_for_any_batch_size_and_every_token_is_as_likely(stories, tmp_path):
    (tmp_path / "a.txt").write_text("the cat and the dog ran to a house. " * 200)

    def drawn(name: str, **options) -> np.ndarray:
        found = calibrate(
            stories, tmp_path / f"{name}.safetensors", text=tmp_path / "a.txt", collect=("sample",),
            positions=("channels",), length=16, sample=40, device="cpu", in_order=True, **options,
        )  # fmt: skip
        return found.of("channels", "layers", 0, "sample")

    np.testing.assert_allclose(drawn("3", batch_size=3), drawn("64", batch_size=64), atol=1e-5)
    assert np.abs(drawn("other", seed=1) - drawn("same", seed=2)).max() > 0.1
    places = np.zeros(300, np.int64)
    for seed in range(200):  # the same draw written out: which of 300 tokens are in a sample of 40
        u = rng.uniforms(rng.key(seed, "sample", "layers"), 0, 300).astype(np.float64)
        held = np.arange(40)
        for t in range(40, 300):
            if (j := int(u[t] * (t + 1))) < 40:
                held[j] = t
        places[held] += 1
    assert abs(places[:40].mean() - places[260:].mean()) < 4  # of 26.7, with a deviation of 0.8 each


# --- how rows lie to one another


def test_experts_that_can_never_win_are_those_within_the_hull_of_the_others():
    draw = np.random.default_rng(0)
    positives = 0
    for trial in range(40):
        experts, hidden = int(draw.integers(2, 14)), int(draw.integers(1, 5))
        weight = draw.normal(size=(experts, hidden))
        if trial % 3 == 0 and experts > 2:
            weight[0] = weight[1:].mean(0)
        found = seen(weight)
        wanted = []
        for e in range(experts):
            others = np.delete(weight, e, 0)
            equal = np.vstack([others.T, np.ones(len(others))])
            solved = linprog(
                np.zeros(len(others)), A_eq=equal, b_eq=np.append(weight[e], 1), bounds=(0, None)
            )
            wanted += [e] if solved.status == 0 else []
        assert list(found.never_first) == wanted
        positives += len(wanted)
        np.testing.assert_allclose(found.cosine, unit(weight) @ unit(weight).T, atol=1e-12)
        if experts <= hidden:
            wanted_condition = float(np.linalg.cond(weight))
            assert (found.condition or np.inf) == pytest.approx(wanted_condition, rel=1e-5) or (
                found.condition is None and wanted_condition > 1e12
            )
    assert positives > 50


def test_plan_and_inspect_say_what_a_router_cannot_do(measured, stories, tmp_path, capsys):
    """Two experts of one domain have one row, and one between two others never wins."""
    start = {"name": "mergekit_hidden", "statistics": str(measured.path)}
    said = plan(
        stories,
        {"moe": {"num_experts": 4}, "router": {"init": {**start, "domains": [*DOMAINS, "plays"]}}},
    )
    assert len(said.routers) == 5
    assert np.array(said.routers[0]["cosine"])[1, 3] == pytest.approx(1)
    assert said.routers[0]["condition"] is None
    assert any("experts 1 and 3 have rows of the router with a cosine above 0.99" in w for w in said.warnings)
    assert "(layers 0, 1, 2, 3, 4)" in " ".join(said.warnings)
    out = tmp_path / "moe"
    cli.main(
        ["convert", str(stories), str(out), "--experts", "3", "--set", "router.init.name=mergekit_hidden",
         "--set", f"router.init.statistics={measured.path}"]
    )  # fmt: skip
    weights = load_file(out / "model.safetensors")
    name = "model.layers.2.block_sparse_moe.gate.weight"
    weights[name][0] = (weights[name][1] + weights[name][2]) / 2
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    cli.main(["inspect", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][2]["router"]["never_first"] == [0]
    assert found["layers"][1]["router"]["never_first"] == []
    assert any(
        "expert 0 has the largest logit for no token" in n and "(layer 2)" in n for n in found["notes"]
    )


def test_rows_of_zeros_are_told_as_alike():
    """They have no direction, so that no cosine tells. One alone is no fault: the others may be around it."""
    row = np.eye(4)[:1]
    for weight, zero in (
        (np.zeros((3, 4)), "experts 0, 1, 2 have rows of zeros"),
        (np.concatenate([row, 0 * row, -row, 0 * row]), "experts 1, 3 have rows of zeros"),
        (np.concatenate([row, 0 * row]), None),
    ):
        said = [each for each in warnings({"layer 0": seen(weight)}) if "zeros" in each]
        assert [each.split(" in the router")[0] for each in said] == ([] if zero is None else [zero])
        again = RouterRows.of(json.loads(json.dumps(seen(weight).as_dict())))
        assert again.zero == seen(weight).zero


def test_prompts_of_one_domain_for_all_experts_leave_nothing(measured, stories):
    """Less their mean, nothing is left of rows that are all the same; one expert needs no row."""
    start = {"name": "prompts", "statistics": str(measured.path), "domains": ["plays", "plays"]}
    two = {"moe": {"num_experts": 2, "top_k": 1}, "router": {"init": start}}
    assert any("experts 0, 1 have rows of zeros" in each for each in plan(stories, two).warnings)
    one = {"moe": {"num_experts": 1, "top_k": 1}, "router": {"init": {**start, "domains": ["plays"]}}}
    assert not any("zeros" in each for each in plan(stories, one).warnings)


# --- the recipe


def test_a_recipe_takes_a_name_or_a_table(measured, stories):
    plain = Recipe.of(router={"init": {"name": "normal"}})
    assert plain.router.init == "normal"
    assert plain.as_table() == Recipe.of().as_table()
    table = {"name": "prompts", "statistics": str(measured.path), "temperature": 2.0}
    recipe = Recipe.of(router={"init": table})
    assert Recipe.of(recipe.as_table()) == recipe
    assert Recipe.of(tomllib.loads(recipe_file.text(recipe, []))) == recipe
    built = blueprint(
        stories, Recipe.of(moe={"num_experts": 3, "target": "upcycled"}, router={"init": table})
    )
    assert built.config["moe"][0]["router"]["init"] == "prompts"
    assert str(measured.path) not in json.dumps(built.config)
    other = blueprint(
        stories, Recipe.of(moe={"num_experts": 3}, router={"init": {**table, "temperature": 1.0}})
    )
    assert other.hash != blueprint(stories, Recipe.of(moe={"num_experts": 3}, router={"init": table})).hash


@pytest.mark.parametrize(
    ("router", "experts", "said"),
    [
        ({"init": "prompts"}, 3, "calibrate SOURCE --collect mean --prompts"),
        ({"init": {"name": "prompts"}}, 4, "fewer domains than experts"),
        ({"init": {"name": "prompts"}}, 2, "more domains than experts"),
        ({"init": {"name": "ridge", "domains": ["stories", "stroies", "plays"]}}, 3, "did you mean stories"),
        ({"init": {"name": "centroids"}}, 90, r"sample of \d+ tokens and a layer 90 experts"),
        ({"init": {"name": "prompts", "temperature": 0}}, 3, "must be"),
    ],
)
def test_mistakes_in_a_recipe_are_named(router, experts, said, measured, stories):
    if isinstance(router["init"], dict):
        router = {**router, "init": {"statistics": str(measured.path), **router["init"]}}
    with pytest.raises(UpcycleError, match=said):
        blueprint(stories, Recipe.of(moe={"num_experts": experts, "target": "upcycled"}, router=router))


@pytest.mark.parametrize("average", [False, True])
def test_what_mergekit_hidden_asks_for_is_what_it_reads(average, measured, stories):
    wanted = "mergekit_hidden_avg" if average else "mergekit_hidden"
    start = {"name": "mergekit_hidden", "average": average}
    with pytest.raises(UpcycleError, match=f"--collect {wanted} --prompts PROMPTS.toml --out"):
        rows_of(stories, start)
    assert rows_of(stories, {**start, "statistics": str(measured.path)})


def test_statistics_of_another_model_or_without_domains_are_refused(measured, stories, dense, tmp_path):
    start = {"name": "prompts", "statistics": str(measured.path)}
    with pytest.raises(UpcycleError, match="was calibrated on stories260k"):
        rows_of(dense("llama"), start)
    plain = tiny.make_statistics(tmp_path / "plain.safetensors", stories)
    with pytest.raises(UpcycleError, match="knows no domains; calibrate with --collect mean --prompts"):
        rows_of(stories, {**start, "statistics": str(plain)})
    with pytest.raises(UpcycleError, match="holds no sample of channels; calibrate with --collect"):
        rows_of(stories, {"name": "centroids", "statistics": str(plain)})
    bert = tiny.make(tmp_path / "bert", "BertForMaskedLM")
    plain = tiny.make_statistics(tmp_path / "bert.safetensors", bert)
    slots = {"name": "soft", "slots": 2, "init": {**start, "statistics": str(plain)}}
    with pytest.raises(UpcycleError, match="a row for each expert, and this router has 6 slots for 3"):
        blueprint(bert, Recipe.of(moe={"num_experts": 3, "target": "upcycled"}, router=slots))


def test_a_damaged_list_of_domains_is_refused(measured, tmp_path):
    raw = measured.path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + header])
    for change in (
        [],
        [{"name": 3}],
        "no",
        [{"name": "a", "tokens": {"layers": -1}, "negative_tokens": {}}] * 3,
    ):
        made = json.loads(table["__metadata__"][KEY]) | {"domains": change}
        text = json.dumps(table | {"__metadata__": {KEY: json.dumps(made)}}).encode()
        (tmp_path / "b.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + header :])
        with pytest.raises(UpcycleError, match="is damaged"):
            Statistics.open(tmp_path / "b.safetensors")


# --- bad prompts


def domain(*prompts: str, **others: str) -> str:
    """A domain in TOML."""
    keys = {key: json.dumps(value) for key, value in others.items()}
    keys |= {"positive_prompts": json.dumps(prompts)} if prompts else {}
    return "\n".join(["[[domain]]", *(f"{key} = {value}" for key, value in keys.items()), ""])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "domain is missing"),
        ("domain = []", r"holds no \[\[domain\]\]"),
        (domain(name="a"), "domain a has neither positive_prompts nor a text"),
        (domain("b", text="a"), "both positive_prompts and a text"),
        (domain(positive_prompt="b"), r"prompts.toml: unknown key domain\[0\].positive_prompt; did"),
        (domain("b"), "is the only domain"),
        (domain("b") * 2, "all 2 domains have the same"),
        (domain("b", name="a") + domain("c", name="a"), "two domains are called a"),
        (domain("") + domain("b"), "the prompt '' has no token"),
        (domain("a b " * 600) + domain("b"), "tokens and the model takes 512; shorten it"),
    ],
)
def test_bad_prompts_are_one_sentence(text, said, stories, tmp_path):
    (tmp_path / "prompts.toml").write_text(text)
    with pytest.raises(UpcycleError, match=said):
        calibrate(stories, tmp_path / "out.safetensors", prompts=tmp_path / "prompts.toml", device="cpu")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"collect": ("mean",), "text": Path("a")}, "has a row for each domain"),
        ({"collect": ("cheap_embed",), "domains": {"a": "a", "b": "b"}}, "made of prompts, and domain a"),
        (
            {"collect": ("mean",), "positions": ("neurons",), "domains": {"a": "a", "b": "b"}},
            "is of channels",
        ),
        ({"text": Path("a"), "domains": {"a": "a", "b": "b"}}, "give one thing to calibrate on"),
        ({"collect": ("sample",), "text": Path("a"), "sample": 0}, "--sample 0"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, said, stories, tmp_path):
    with pytest.raises(UpcycleError, match=said):
        calibrate(stories, tmp_path / "out.safetensors", device="cpu", **options)


# --- mergekit itself


def donors_of(stories: Path, out: Path) -> list[Path]:
    """Three models near stories260k."""
    draw, donors = np.random.default_rng(0), [out / f"donor-{number}" for number in range(3)]
    for donor in donors:
        shutil.copytree(stories, donor, copy_function=shutil.copyfile)
        donor.chmod(0o755)
        weights = load_file(stories / "model.safetensors")
        moved = {name: w + draw.normal(0, 0.01, w.shape).astype(w.dtype) for name, w in weights.items()}
        save_file(moved, donor / "model.safetensors", metadata={"format": "pt"})
    return donors


def in_our_names(folder: Path) -> dict[str, torch.Tensor]:
    """What mergekit-moe wrote: its experts are stacked, and ours are those of the hub's Mixtral."""
    found = {k: v for f in folder.glob("*.safetensors") for k, v in torch_file(f).items()}
    out = {name.replace("mlp.gate", "block_sparse_moe.gate"): t for name, t in found.items()}
    for name in [name for name in out if "mlp.experts" in name]:
        stacked, at = out.pop(name), name.split("mlp.experts")[0] + "block_sparse_moe.experts"
        for e, expert in enumerate(stacked):
            parts = (
                {"w2": expert} if "down" in name else dict(zip(("w1", "w3"), expert.chunk(2), strict=True))
            )
            out |= {f"{at}.{e}.{part}.weight": tensor for part, tensor in parts.items()}
    return out


@pytest.mark.mergekit
def test_the_model_is_that_of_mergekit_moe(measured, stories, prompts, tmp_path):
    """mergekit-moe 0.1.5 in its own environment, MERGEKIT_PYTHON, on the same donors and prompts.

    Every tensor is the same to the bit: routers, experts, and the rest, which is that of the base.
    """
    python = os.environ.get("MERGEKIT_PYTHON")
    if not python:
        pytest.skip("MERGEKIT_PYTHON does not name the Python of an environment with mergekit 0.1.5")
    donors = donors_of(stories, tmp_path)
    for mode, start in (
        ("hidden", {"name": "mergekit_hidden"}),
        ("hidden_avg", {"name": "mergekit_hidden", "average": True}),
        ("cheap_embed", {"name": "cheap_embed"}),
    ):
        config = {
            "base_model": str(stories),
            "gate_mode": mode,
            "dtype": "bfloat16",
            "experts": [
                {"source_model": str(donor), "positive_prompts": good, "negative_prompts": bad}
                for donor, (good, bad) in zip(donors, sides(prompts), strict=True)
            ],
        }
        (tmp_path / f"{mode}.yaml").write_text(json.dumps(config))  # JSON is YAML
        out = tmp_path / mode
        command = [python, "-m", "mergekit.scripts.moe", str(tmp_path / f"{mode}.yaml"), str(out)]
        flags = ["--device", "cpu", "--i-understand-this-is-not-useful-without-training"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([*command, *flags], check=True, env=environment, capture_output=True)
        recipe = Recipe.of(
            dtype="bfloat16", moe={"num_experts": 3},
            init={"name": "experts", "expert": [{"source": str(donor)} for donor in donors]},
            router={"init": {**start, "statistics": str(measured.path)}},
        )  # fmt: skip
        theirs, ours = in_our_names(out), blueprint(stories, recipe).entries
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(torch.from_numpy(ours[name].lazy.all("F32")).bfloat16(), tensor), (mode, name)


def torch_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load

    return load(path)


# --- balanced assignment


@pytest.mark.parametrize(("n", "k"), [(6, 3), (24, 4), (60, 5), (64, 32)])
def test_the_balanced_assignment_is_the_cheapest(n, k):
    draw = np.random.default_rng(n)
    for spread in (3, 1000):
        cost = draw.integers(0, spread, (n, k))
        labels = balanced(cost)
        assert (np.bincount(labels, minlength=k) == n // k).all()
        repeated = np.repeat(cost, n // k, axis=1)
        rows, columns = linear_sum_assignment(repeated)
        assert cost[np.arange(n), labels].sum() == repeated[rows, columns].sum()
