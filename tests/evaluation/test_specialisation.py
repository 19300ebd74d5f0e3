"""What inspect sees of a model at work, against transformers' own router outputs and plain loops."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import upcycle
from marks import sampled
from upcycle import Recipe, cli, convert, families
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense import fingerprint
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.evaluation.patches import Patches
from upcycle.evaluation.specialisation import ToWatch, divergence, specialisation
from upcycle.inspection import inspect
from upcycle.reporting.plots import plot
from upcycle.tasks._rows import of_images, of_text
from upcycle.training.export import export
from upcycle.training.loop import train
from upcycle.training.run import Run


@pytest.fixture(scope="module")
def texts(tmp_path_factory, trainable) -> dict[str, Path]:
    """Two domains: stories, and the same letters in capitals."""
    folder = tmp_path_factory.mktemp("texts")
    text = trainable[1].read_text()[:20_000]
    (folder / "stories.txt").write_text(text)
    (folder / "loud.txt").write_text(text.upper())
    return {"stories": folder / "stories.txt", "loud": folder / "loud.txt"}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory, trainable) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "moe"
    router = {"std": 1.0}
    convert(
        trainable[0],
        folder,
        Recipe.of(moe={"num_experts": 4}, init={"name": "drop", "ratio": 0.5}, router=router),
    )
    return folder


def naive(distributions: list[np.ndarray]) -> float:
    """Jensen-Shannon as the entropy of the mean less the mean of the entropies, in bits."""

    def entropy(p):
        return -sum(x * math.log2(x) for x in p if x > 0)

    return entropy(np.mean(distributions, 0)) - np.mean([entropy(p) for p in distributions])


def test_divergence_in_closed_form():
    assert divergence(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0
    assert divergence(np.array([1.0, 0, 0]), np.array([0, 0.5, 0.5])) == pytest.approx(1)
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(6), 2)
    assert divergence(p, q) == pytest.approx(naive([p, q]))


def test_a_native_class_is_what_transformers_says(mixtral, texts, tmp_path):
    """Loads, confidence, divergence and favourites from `output_router_logits`, token by token."""
    found = specialisation(
        mixtral, ToWatch(text=texts, limit=12, length=64, batch_size=5, cache=tmp_path)
    ).as_dict()
    model = upcycle.open(mixtral).eval()
    subject = Subject.of(mixtral)
    tokenizer = upcycle_tokenizer(mixtral)
    loads, sure, seen = (
        defaultdict(lambda: np.zeros(4)),
        defaultdict(list),
        [defaultdict(list) for _ in range(5)],
    )
    for name, path in texts.items():
        rows = of_text(path, subject, tmp_path, gradient=False, seed=0, length=64)
        order = next(d for d in found["domains"] if d["name"] == name)
        assert order["rows"] == 12
        for number in upcycle_order(rows.count)[:12]:
            tokens = torch.from_numpy(rows.read(np.array([number]))["rows"][:, :-1])
            with torch.inference_mode():
                logits = model(tokens, output_router_logits=True).router_logits
            for layer, scores in enumerate(logits):
                for token, row in zip(tokens[0].tolist(), scores.softmax(-1).numpy(), strict=True):
                    for e in np.argsort(-row)[:2]:
                        loads[layer, name][e] += 1
                    sure[layer].append(row.max())
                    seen[layer][token].append(row)
    for layer, row in enumerate(found["layers"]):
        assert (row["stack"], row["layer"], row["left_behind"]) == ("layers", layer, 0)
        shares = {name: loads[layer, name] / loads[layer, name].sum() for name in texts}
        for name in texts:
            np.testing.assert_allclose(row["load_by_domain"][name], shares[name], atol=2e-6)
        assert row["confidence"] == pytest.approx(np.mean(sure[layer]), abs=1e-5)
        assert row["divergence"][0][1] == pytest.approx(naive([*shares.values()]), abs=1e-5)
        assert row["divergence"][0][1] > 0.001
        means = {t: np.mean(rows, 0) for t, rows in seen[layer].items() if len(rows) >= 5}
        for e, favourites in enumerate(row["favourites"]):
            best = sorted(means, key=lambda t: -means[t][e])[:8]
            np.testing.assert_allclose([m for _, m in favourites], [means[t][e] for t in best], atol=1e-5)
            assert favourites[0][0] == tokenizer.convert_ids_to_tokens(best[0])


def upcycle_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def upcycle_order(count):
    from upcycle.tensors import rng

    return rng.permutation(rng.key(0, "specialisation"), count)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for domain, low in (("dark", 0), ("light", 150)):
        for i in range(6):
            (folder / domain / "a").mkdir(parents=True, exist_ok=True)
            pixels = random.integers(low, low + 100, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / domain / "a" / f"{i}.png")
    return {name: folder / name for name in ("dark", "light")}


@pytest.mark.parametrize(
    "router",
    sampled([{"name": "expert_choice", "capacity_factor": 1.0}, {"name": "soft"}, {"name": "spherical"}], 2),
)
def test_images_and_their_patches(router, pictures, tmp_path):
    """Counts of experts that choose, mean weights where all have as much, the patches they are surest of."""
    source = tiny.make(tmp_path / "vit", "ViTForImageClassification", image_size=12, patch_size=3)
    moe = {"num_experts": 4, "target": "upcycled", "layers": "last_half"}
    convert(source, tmp_path / "moe", Recipe.of(moe=moe, router={**router, "std": 1.0}))
    seen = specialisation(tmp_path / "moe", ToWatch(images=pictures, batch_size=4, cache=tmp_path))
    found = seen.as_dict()
    model, subject = upcycle.open(tmp_path / "moe").eval(), Subject.of(tmp_path / "moe")
    routings = []
    place = next(i for i, block in enumerate(model.vit.layers) if hasattr(block.mlp, "router"))
    model.vit.layers[place].mlp.router.register_forward_hook(lambda m, a, out: routings.append(out))
    every, left, means, patches = [], 0, {}, []
    for name, path in pictures.items():
        rows = of_images(path, subject, tmp_path, gradient=False, seed=0)
        given = []
        for number in range(6):
            batch = {k: torch.from_numpy(v) for k, v in rows.read(np.array([number])).items()}
            pixels = rows.ask(batch).inputs["pixel_values"]
            with torch.inference_mode():
                model(pixel_values=pixels)
            weights = routings[-1].probabilities.numpy()
            given.append(weights)
            left += int(routings[-1].left_behind)
            for n in range(16):
                y, x = 3 * (n // 4), 3 * (n % 4)
                patches.append((weights[n + 1], pixels[0, :, y : y + 3, x : x + 3].numpy()))
        means[name] = np.concatenate(given).mean(0)
        every += given
    row = found["layers"][0]
    assert (row["layer"], row["divergence_of"]) == (place, "weights")
    for name in pictures:
        np.testing.assert_allclose(row["weight_by_domain"][name], means[name], atol=1e-5)
    assert row["left_behind"] == pytest.approx(left / (12 * 17), abs=1e-6)
    assert (left > 0) is (router["name"] == "expert_choice")
    assert row["confidence"] == pytest.approx(np.concatenate(every).max(1).mean(), abs=1e-5)
    assert row["divergence"][0][1] == pytest.approx(naive([*means.values()]), abs=1e-5)
    for e in range(4):
        best = sorted(patches, key=lambda p: -p[0][e])[:8]
        kept = seen.layers[0].patches
        np.testing.assert_allclose(kept.weights[e], [w[e] for w, _ in best], rtol=1e-5)
        np.testing.assert_allclose(kept.pixels[e][0], best[0][1])
    plot("moe", inspect(tmp_path / "moe"), seen, tmp_path / "plots")
    assert (tmp_path / "plots" / f"patches-{place}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("kind", ["images", "text"])
def test_rows_that_are_no_whole_groups_are_watched(kind, pictures, texts, tmp_path):
    """With experts that take every token, groups change nothing, and neither does what fills up the last."""
    if kind == "images":
        source, group = tiny.make(tmp_path / "dense", "ViTModel", image_size=12, patch_size=3), 34
    else:
        source, group = tiny.make(tmp_path / "dense", "T5ForConditionalGeneration", vocab_size=300), 100
        tiny.make_bytes_tokenizer(source, *(f"<extra_id_{i}>" for i in range(6)))
    asked = {"images": {"images": pictures}, "text": {"text": texts, "length": 48}}[kind]
    found = []
    for size in (group, 0):
        router = {"name": "expert_choice", "capacity_factor": 4.0, "std": 1.0, "group": size}
        recipe = {"moe": {"num_experts": 4, "target": "upcycled"}, "router": router}
        extra = {} if kind == "images" else {"decoder": {"router": {"name": "top_k"}}}
        convert(source, tmp_path / str(size), Recipe.of(**recipe, **extra))
        seen = specialisation(tmp_path / str(size), ToWatch(**asked, limit=3, batch_size=3))
        found.append((seen.as_dict(), [layer.patches for layer in seen.layers]))
    assert found[0][0]["layers"] == found[1][0]["layers"]
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert (ours is None) == (theirs is None) == (kind == "text")
        assert ours is None or np.array_equal(ours.weights, theirs.weights)


def test_both_stacks_of_t5(tmp_path, texts):
    source = tiny.make(tmp_path / "t5", "T5ForConditionalGeneration", vocab_size=300)
    tiny.make_bytes_tokenizer(source, *(f"<extra_id_{i}>" for i in range(6)))
    convert(
        source,
        tmp_path / "moe",
        Recipe.of(moe={"target": "upcycled", "num_experts": 4, "layers": "every_other"}),
    )
    found = specialisation(tmp_path / "moe", ToWatch(text=texts, limit=4, length=48)).as_dict()
    assert {row["stack"] for row in found["layers"]} == {"encoder", "decoder"}
    for row in found["layers"]:
        assert sum(row["load"]) == pytest.approx(1, abs=1e-5)
        for favourites in row["favourites"]:
            means = [mean for _, mean in favourites]
            assert means == sorted(means, reverse=True)
            assert 0 < means[0] <= 1


def test_the_command_line(mixtral, texts, trainable, tmp_path, capsys):
    both = [f"--text={name}={path}" for name, path in texts.items()]
    plots = tmp_path / "plots"
    cli.main(["inspect", str(mixtral), *both, "--limit", "4", "--length", "32", "--plot", str(plots)])
    assert sorted(p.name for p in plots.iterdir()) == [
        "routing-1.png", "similarity-between.png", "similarity-dense.png",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "on stories, loud" in said
    assert "layer 4, expert 3:" in said
    kept = json.loads((mixtral / "routing.json").read_text())
    with Checkpoint.open(mixtral) as opened:
        assert kept["weights"] == fingerprint.of_weights(opened)
    assert [d["name"] for d in kept["domains"]] == ["stories", "loud"]
    assert not [*mixtral.glob("*.partial")]
    for arguments, message in (
        ([str(trainable[0]), both[0]], "is a dense model"),
        ([str(mixtral), both[0], both[0]], "two sets are called stories"),
        ([str(mixtral), f"--images={texts['loud']}"], "reads text and no images"),
        ([str(mixtral), both[0], f"--images={texts['loud']}"], "give either --text"),
        ([str(mixtral), both[0], "--limit", "-1"], "must be 0"),
        ([str(trainable[0]), "--plot", str(plots)], "there are no experts to plot"),
        ([str(mixtral), "--plot", str(texts["loud"])], "is a file"),
        ([str(mixtral), "--text", str(tmp_path / "nowhere.txt")], "nowhere.txt"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["inspect", *arguments])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_similarity_when_training_began(trainable, tmp_path, capsys):
    """Of a trained checkpoint: what `inspect` says of what `convert` writes by the same recipe."""
    source, text = Path(shutil.copytree(trainable[0], tmp_path / "dense")), trainable[1]
    recipe = {"moe": {"num_experts": 4}, "init": {"name": "drop", "ratio": 0.5}}
    run = {
        "source": str(source), "out": str(tmp_path / "run"), "data": {"sources": [{"path": str(text)}]},
        "train": {"steps": 4, "batch_tokens": 512, "sequence_length": 64, "eval_every": 0},
        "schedule": {"peak": 1e-2}, **recipe,
    }  # fmt: skip
    train(Run.of(run))
    export(tmp_path / "run", tmp_path / "trained")
    convert(source, tmp_path / "begun", Recipe.of(recipe))
    rows, begun = inspect(tmp_path / "trained")["layers"], inspect(tmp_path / "begun")["layers"]
    for row, start in zip(rows, begun, strict=True):
        assert row["cosine_between_at_start"] == pytest.approx(start["cosine_between"])
        assert row["cosine_between"]["mean"] != pytest.approx(start["cosine_between"]["mean"], rel=1e-4)
        assert "cosine_between_at_start" not in start
    cli.main(["inspect", str(tmp_path / "trained")])
    assert "began at" in capsys.readouterr().out
    # If the source has other files now, nothing is said about how the experts began, or what has changed.
    weights = source / "model.safetensors"
    save_file({n: t.clone() for n, t in load_file(weights).items()}, weights, {"saved": "again"})
    found = inspect(tmp_path / "trained")
    assert not any("cosine_between_at_start" in row for row in found["layers"])
    assert found["notes"] == [
        f"compared with {source}, whose files are not those that it was made from",
        "what the experts began as cannot be made again: it was not from these files",
    ]


def test_a_source_by_name_is_compared_with_the_provenance(tmp_path):
    """The same files say nothing, wherever they lie, nor do those of a donor; other weights are a note."""
    sources = [tiny.make_dense(tmp_path / name, "llama", seed=seed) for seed, name in enumerate("abc")]
    convert(sources[0], tmp_path / "moe", Recipe.of(moe={"num_experts": 2}))
    donors = {"name": "branch_train_mix", "sources": [str(sources[1])]}
    convert(sources[0], tmp_path / "mixed", Recipe.of(moe={"num_experts": 2}, init=donors))
    copy = shutil.copytree(sources[0], tmp_path / "copy")
    said = f"compared with {sources[2]}, whose files are not those that it was made from"
    for made, source, notes in (
        ("moe", sources[0], []),
        ("moe", copy, []),
        ("moe", sources[2], [said]),
        ("mixed", sources[1], []),
        ("mixed", sources[2], [said]),
    ):
        assert inspect(tmp_path / made, source)["notes"] == notes


@pytest.mark.parametrize(
    ("settings", "stack", "grid"),
    [
        ({"image_size": [12, 24], "patch_size": 4}, "layers", (3, 6, 4, 4)),
        ({"image_size": 14, "patch_size": 4}, "layers", (3, 3, 4, 4)),
        ({"image_size": 44, "patch_size": 4}, "stage_2", (5, 5, 8, 8)),
        ({"image_size": 224, "patch_size": 4}, "stage_4", (7, 7, 32, 32)),
    ],
)
def test_patches_are_those_of_the_image(settings, stack, grid):
    """Also where the image is no square, or its side no multiple; cut by hand."""
    rows, columns, height, width = grid
    found = families.find("vit" if stack == "layers" else "convnext").grid(settings, stack)
    assert (found.rows, found.columns, found.height, found.width) == grid
    size = settings["image_size"]
    image = np.random.default_rng(0).random((1, 3, *(size if isinstance(size, list) else (size, size))))
    wanted = rows * columns - 2  # in the last row, the one before the last
    probabilities = np.zeros((1, rows * columns + 1, 1))
    probabilities[0, 1 + wanted] = 1.0
    patches = Patches.none()
    patches.add(image, probabilities, found)
    y, x = wanted // columns * height, wanted % columns * width
    np.testing.assert_array_equal(patches.pixels[0, 0], image[0, :, y : y + height, x : x + width])


def test_a_convnext_is_watched(pictures, tmp_path):
    source = tiny.make(tmp_path / "convnext", "ConvNextForImageClassification")
    convert(
        source,
        tmp_path / "moe",
        Recipe.of(moe={"target": "upcycled", "num_experts": 4, "layers": "last_half"}),
    )
    seen = specialisation(tmp_path / "moe", ToWatch(images=pictures, cache=tmp_path))
    for layer in seen.layers:
        grid = Subject.of(tmp_path / "moe").grid(layer.stack)
        assert layer.patches.pixels.shape[-2:] == (grid.height, grid.width)
        assert sum(d.tokens for d in layer.domains.values()) == 12 * grid.rows * grid.columns


def test_rows_beyond_the_positions_are_refused(mixtral, texts):
    most = Subject.of(mixtral).length
    with pytest.raises(UpcycleError, match=f"^length = {most + 1} and the model takes {most} tokens"):
        specialisation(mixtral, ToWatch(text=texts, limit=4, length=most + 1))


def test_a_field_is_for_the_texts_that_can_have_one(mixtral, texts, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"body": texts["stories"].read_text()}))
    asked = {"limit": 2, "length": 32, "field": "body"}
    seen = specialisation(mixtral, ToWatch(text={"plain": texts["stories"], "lines": lines}, **asked))
    for layer in seen.layers:
        assert np.array_equal(*(domain.counts for domain in layer.domains.values()))
    with pytest.raises(UpcycleError, match=r"stories\.txt is text alone; take field out"):
        specialisation(mixtral, ToWatch(text=texts, **asked))


def test_a_model_that_gives_nan_has_no_routing(mixtral, texts, tmp_path, capsys):
    """Its routers would choose the first experts."""
    weights = Path(shutil.copytree(mixtral, tmp_path / "moe")) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.input_layernorm.weight"][0] = math.nan
    save_file(tensors, weights, {"format": "pt"})
    (tmp_path / "moe" / "routing.json").unlink(missing_ok=True)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", str(tmp_path / "moe"), "--text", str(texts["loud"]), "--limit", "1"])
    assert stopped.value.code == 2
    assert "gives NaN where the load of an expert needs numbers" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "moe" / "routing.json").exists()


def test_words_in_brackets_are_words(capsys):
    """Tokens and paths are shown as they are: `[/` is a token of many vocabularies."""
    from upcycle.cli.screen import show_warnings
    from upcycle.cli.views.anatomy import show_routing

    row = {
        "stack": "encoder", "layer": 0, "load": [1.0], "divergence": [[0.0]], "confidence": 1.0,
        "left_behind": 0.0, "favourites": [[["[/", 1.0], ["[unused1]", 0.5]]],
    }  # fmt: skip
    show_routing({"kind": "text", "domains": [{"name": "[red]"}], "layers": [row]})
    show_warnings(["[/x] is a folder"])
    said = capsys.readouterr().out
    for word in ("[/ [unused1]", "on [red]", "[/x] is a folder", "layer encoder 0, expert 0"):
        assert word in said


def test_what_was_seen_is_shown_where_it_cannot_be_kept(mixtral, texts, tmp_path, capsys):
    """A read-only folder, simulated by a folder of that name; and a hub's cache is left alone."""
    copy = tmp_path / "moe"
    shutil.copytree(mixtral, copy)
    (copy / "routing.json").unlink(missing_ok=True)
    (copy / "routing.json").mkdir()
    arguments = [f"--text=stories={texts['stories']}", "--limit", "2", "--length", "32"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(copy), *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "on stories" in said.out
    assert "what was seen is above" in said.err
    assert not [*copy.glob("*.partial")]


def test_a_source_that_cannot_be_read_is_a_note(trainable, tmp_path, capsys):
    shutil.copytree(trainable[0], tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", Recipe.of(moe={"num_experts": 4}))
    next((tmp_path / "dense").glob("*.safetensors")).unlink()
    assert any("cannot be compared with" in note for note in inspect(tmp_path / "moe")["notes"])
    shallow = tiny.make_dense(tmp_path / "shallow", "llama", num_hidden_layers=1)
    with pytest.raises(UpcycleError, match="has no layer 1 to compare experts with"):
        inspect(tmp_path / "moe", shallow)


def test_nothing_asked_for():
    with pytest.raises(UpcycleError, match="give either"):
        ToWatch()
