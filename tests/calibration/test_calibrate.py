"""`upcycle calibrate`: the statistics that numpy makes of all activations, however they come in batches."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

from heard import Counted
from marks import quick, sampled
from tiny import make, make_headers
from upcycle import cli, families
from upcycle.calibration import calibration, sweep
from upcycle.calibration.calibration import ToCalibrate, calibrate
from upcycle.calibration.domains import Domain
from upcycle.calibration.observer import Observer
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.header import read_header
from upcycle.dense.admission import admit
from upcycle.errors import UpcycleError
from upcycle.records.statistics import Statistics

EVERYTHING = ("l1", "l2", "count", "co_activation")
ROWS, LENGTH = 13, 16
MARKS = ["[PAD]", "[UNK]", "[MASK]", "</s>", *[f"<extra_id_{i}>" for i in range(6)]]
WORDS = "the a cat dog bird sees likes fears red blue old new and runs far".split()


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*MARKS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]",
        eos_token="</s>", additional_special_tokens=MARKS[4:],
    ).save_pretrained(folder)  # fmt: skip


ARCHITECTURES = {
    "vit": "ViTForImageClassification",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "classifier": "BertForSequenceClassification",
    "headless": "BertModel",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense models, images of three colours, and made-up sentences."""
    folder = tmp_path_factory.mktemp("calibrate")
    draw = np.random.default_rng(0)
    for name, architecture in ARCHITECTURES.items():
        # relu: numbers that are 0 to the bit, and not above a threshold of 0
        changes = {"t5": {"feed_forward_proj": "gated-gelu"}, "headless": {"hidden_act": "relu"}}
        make(folder / name, architecture, **changes.get(name, {}))
        if name != "vit":
            make_tokenizer(folder / name)
    for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
        (folder / "images" / str(label)).mkdir(parents=True)
        for i in range(6):
            pixels = np.clip(draw.normal(colour, 60, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{i}.png")
    (folder / "text.txt").write_text(" ".join(draw.choice(WORDS, 600)))
    with (folder / "labelled.jsonl").open("w") as file:
        for i in range(20):
            text = " ".join(draw.choice(WORDS, 1 + i % 12))
            file.write(json.dumps({"text": text, "label": i % 2}) + "\n")
    return folder


@pytest.fixture
def collect(data: Path, tmp_path: Path) -> Callable[..., Statistics]:
    """`calibrate` on the data of a kind of model, to a file of its own."""

    def run(kind: str, name: str = "out", **options: Any) -> Statistics:
        where: dict[str, Any] = {"images": data / "images"}
        if kind != "vit":
            where = {
                "text": data / ("labelled.jsonl" if kind == "classifier" else "text.txt"),
                "length": LENGTH,
            }
        hooks = {k: options.pop(k) for k in ("progress", "save_every") if k in options}
        asked = ToCalibrate(**{**where, "limit": ROWS, "batch_size": 4, "device": "cpu", **options})
        return calibrate(data / kind, tmp_path / f"{name}.safetensors", asked, **hooks)

    return run


# --- what numpy makes of it


def shown(kind: str, data: Path) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """The model, the first rows of its data as inputs, and labels; each written out again."""
    model = getattr(transformers, ARCHITECTURES[kind]).from_pretrained(data / kind).eval()
    if kind == "vit":
        files = sorted((data / "images").rglob("*.png"))[:ROWS]
        pixels = np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2) / 255
        labels = torch.tensor([int(f.parent.name) for f in files])
        return model, {"pixel_values": torch.tensor((pixels - 0.5) / 0.5, dtype=torch.float32)}, labels
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / kind)
    if kind == "classifier":
        lines = [json.loads(line) for line in (data / "labelled.jsonl").read_text().splitlines()[:ROWS]]
        made = tokenizer([x["text"] for x in lines], padding=True, return_tensors="pt")
        inputs = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        return model, inputs, torch.tensor([x["label"] for x in lines])
    ids = tokenizer((data / "text.txt").read_text()).input_ids
    rows = torch.tensor([ids[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(ROWS)])
    return model, {"input_ids": rows[:, :-1]}, rows[:, 1:]


PLACES = {
    "vit": ("vit.layers.{}.", "mlp.fc2", "mlp", "attention.o_proj"),
    "llama": ("model.layers.{}.", "mlp.down_proj", "mlp", "self_attn.o_proj"),
    "headless": ("encoder.layer.{}.", "output.dense", "intermediate", "attention.output.dense"),
    "classifier": ("bert.encoder.layer.{}.", "output.dense", "intermediate", "attention.output.dense"),
}


@contextmanager
def recorded(
    model: Any, places: dict[str, str], *, leaves: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """All that goes into the modules at `places`; as leaves that a gradient comes back to."""
    kept: dict[str, torch.Tensor] = {}
    hooks = []
    for key, path in places.items():

        def see(module: Any, args: Any, key: str = key) -> Any:
            kept[key] = args[0] * 1 if leaves else args[0].detach()
            if leaves:
                kept[key].retain_grad()
                return (kept[key], *args[1:])
            return None

        hooks.append(model.get_submodule(path).register_forward_pre_hook(see))
    yield kept
    for hook in hooks:
        hook.remove()


def places_of(kind: str, layers: int) -> dict[str, str]:
    start, *paths = PLACES[kind]
    return {
        f"{position}.layers.{i}": start.format(i) + path
        for i in range(layers)
        for position, path in zip(("neurons", "channels", "heads"), paths, strict=True)
    }


def naive(x: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """Statistics of activations [T, n], token by token."""
    x = x.astype(np.float64)
    on = x > threshold
    both = np.zeros((x.shape[1], x.shape[1]))
    for token in on:
        both += np.outer(token, token)
    return {
        "l1": np.abs(x).mean(0),
        "l2": np.sqrt((x**2).mean(0)),
        "count": on.mean(0),
        "co_activation": both / len(x),
    }


def compare(found: Statistics, key: str, wanted: dict[str, np.ndarray]) -> None:
    position, stack, layer = key.split(".")
    for name, values in wanted.items():
        if name == "co_activation" and position != "neurons":
            continue
        got = found.of(position, stack, int(layer), name)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, values, rtol=2e-5, atol=2e-6, err_msg=f"{key}.{name}")


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["vit", "llama", "headless"])
def test_statistics_are_those_of_all_activations(kind, threshold, collect, data):
    found = collect(kind, collect=EVERYTHING, threshold=threshold, in_order=True)
    model, inputs, _ = shown(kind, data)
    places = places_of(kind, 4)
    with recorded(model, places) as kept, torch.no_grad():
        model(**inputs)
    assert len(kept) == 12
    for key, x in kept.items():
        compare(found, key, naive(x.reshape(-1, x.shape[-1]).numpy(), threshold))
    sizes = {key.split(".")[0]: x.shape[-1] for key, x in kept.items()}
    config = model.config
    assert sizes["neurons"] == config.intermediate_size
    assert sizes["channels"] == config.hidden_size
    assert len(read_header(found.path)) == 4 * (3 * 3 + 1)
    tokens = ROWS * (LENGTH if kind != "vit" else 10)
    assert found.provenance["tokens"] == {"layers": tokens}
    assert found.provenance["examples"] == ROWS


def test_both_stacks_of_t5(collect, data, monkeypatch):
    """Encoder and decoder see other tokens; `heads` is self-attention's."""
    asked: list[dict[str, torch.Tensor]] = []
    batch = sweep._batch

    def spied(model: Any, observer: Any, dense: Any, part: Any, places: Any, **options: Any) -> None:
        read = {k: torch.from_numpy(v) for k, v in part.rows.read(places).items()}
        asked.append(part.rows.ask(read).inputs)
        batch(model, observer, dense, part, places, **options)

    monkeypatch.setattr(sweep, "_batch", spied)
    found = collect("t5", collect=EVERYTHING, in_order=True)
    inputs = {k: torch.cat([a[k] for a in asked]) for k in ("input_ids", "decoder_input_ids")}
    model = transformers.T5ForConditionalGeneration.from_pretrained(data / "t5").eval()
    places = {}
    for stack, layers, network in (("encoder", 4, 1), ("decoder", 2, 2)):
        for i in range(layers):
            block = f"{stack}.block.{i}.layer."
            places[f"neurons.{stack}.{i}"] = f"{block}{network}.DenseReluDense.wo"
            places[f"channels.{stack}.{i}"] = f"{block}{network}.DenseReluDense"
            places[f"heads.{stack}.{i}"] = f"{block}0.SelfAttention.o"
    with recorded(model, places) as kept, torch.no_grad():
        model(**inputs)
    for key, x in kept.items():
        compare(found, key, naive(x.reshape(-1, x.shape[-1]).numpy(), 0.0))
    counts = {k: inputs[n].numel() for k, n in (("encoder", "input_ids"), ("decoder", "decoder_input_ids"))}
    assert found.provenance["tokens"] == counts
    assert counts["encoder"] != counts["decoder"]


def test_padding_does_not_count(collect, data):
    found = collect("classifier", collect=EVERYTHING, in_order=True)
    model, inputs, _ = shown("classifier", data)
    real = inputs["attention_mask"].bool()
    assert not real.all()
    with recorded(model, places_of("classifier", 4)) as kept, torch.no_grad():
        model(**inputs)
    for key, x in kept.items():
        compare(found, key, naive(x[real].numpy(), 0.0))
    assert found.provenance["tokens"] == {"layers": int(real.sum())}


@pytest.mark.parametrize("kind", ["vit", "llama", "classifier"])
def test_gradients_are_those_of_autograd(kind, collect, data):
    """|x dL/dx| with the loss written out, gradients kept on copies of the inputs."""
    found = collect(kind, collect=("l1", "gradient"), in_order=True)
    model, inputs, labels = shown(kind, data)
    with recorded(model, places_of(kind, 4), leaves=True) as kept:
        logits = model(**inputs).logits
        F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum").backward()
    real = inputs.get("attention_mask", torch.ones(kept["neurons.layers.0"].shape[:2])).bool()
    for key, x in kept.items():
        assert x.grad is not None
        wanted = (x * x.grad).detach()[real].double().abs().mean(0).numpy()
        assert wanted.max() > 0
        compare(found, key, {"gradient": wanted, "l1": x.detach()[real].double().abs().mean(0).numpy()})


@pytest.mark.parametrize("kind", ["vit", "llama", "t5", "bert", "classifier"])
def test_any_batch_size_gives_the_same(kind, collect):
    options = {"collect": (*EVERYTHING, "gradient"), "seed": 3}
    one, other = (collect(kind, f"by {size}", batch_size=size, **options) for size in (5, ROWS))
    assert set(one.tensors) == set(other.tensors)
    for name in one.tensors:
        position, stack, layer, what = name.split(".")
        a, b = (s.of(position, stack, int(layer), what) for s in (one, other))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)


def test_co_activation_is_symmetric_with_the_counts_on_its_diagonal(collect):
    found = collect("llama", collect=("count", "co_activation"), threshold=0.05)
    for layer in range(4):
        pairs = found.of("neurons", "layers", layer, "co_activation")
        np.testing.assert_array_equal(pairs, pairs.T)
        np.testing.assert_array_equal(np.diag(pairs), found.of("neurons", "layers", layer, "count"))
        assert 0 < pairs.mean() < 1


def test_examples_are_taken_in_an_order_of_the_seed(collect):
    found = {
        name: collect("vit", name, **options).of("neurons", "layers", 0, "l1")
        for name, options in (
            ("0", {}), ("again", {}), ("1", {"seed": 1}), ("first", {"in_order": True}),
            ("all", {"limit": 0}), ("all of 1", {"limit": 0, "seed": 1}),
        )
    }  # fmt: skip
    np.testing.assert_array_equal(found["0"], found["again"])
    assert not np.array_equal(found["0"], found["1"])
    assert not np.array_equal(found["0"], found["first"])
    np.testing.assert_allclose(found["all"], found["all of 1"], rtol=1e-6)


@pytest.mark.parametrize(
    "architecture", ["T5Model", "T5EncoderModel", "ViTModel", "BertForQuestionAnswering"]
)
def test_classes_without_a_task_are_calibrated_too(architecture, data, tmp_path):
    folder = make(tmp_path / "dense", architecture)
    where: dict[str, Any] = {"images": data / "images"}
    if architecture != "ViTModel":
        make_tokenizer(folder)
        where = {"text": data / "text.txt", "length": LENGTH}
    asked = ToCalibrate(**where, device="cpu", limit=8)
    found = calibrate(folder, tmp_path / "out.safetensors", asked)
    stacks = ["encoder", "decoder"][: 1 + (architecture == "T5Model")] if "T5" in architecture else ["layers"]
    assert list(found.provenance["tokens"]) == stacks
    assert all(found.of("heads", stack, 1, "l2").min() > 0 for stack in stacks)
    with pytest.raises(UpcycleError, match=f"{architecture} has no head for one"):
        calibrate(
            folder, tmp_path / "b.safetensors", ToCalibrate(**where, device="cpu", collect=("gradient",))
        )


@pytest.mark.parametrize("model_type", sampled(families.names(), 4))
def test_every_family_is_watched(model_type, tmp_path):
    """Each block gives all positions that it has, of the sizes that its matrices have."""
    family = families.find(model_type)
    architecture = family.architectures[0]
    folder = make(tmp_path / "dense", architecture)
    with Checkpoint.open(folder) as opened:
        dense = admit(opened)
        model = getattr(transformers, dense.architecture).from_pretrained(folder).eval()
        observer = Observer(
            model,
            dense.stacks,
            positions=("neurons", "channels", "heads"),
            names=("l1", "gradient"),
            threshold=0,
        )
        shapes = family.inputs(dense.config, 64)
        inputs = {
            name: torch.randint(dense.config["vocab_size"], shape) if kind == "tokens" else torch.randn(shape)
            for name, (kind, shape) in shapes.items()
        }
        inputs |= {name: torch.tensor(rows) for name, rows in family.beside(dense.config).items()}
        with observer.watching({}):
            model(**inputs)[0].square().sum().backward()
    positions = sum(len(stack.numbers) * (3 if stack.heads else 2) for stack in dense.stacks)
    assert len(observer.sums) == 2 * positions
    for name, total in observer.sums.items():
        assert float(total.max()) > 0, name
    for stack in dense.stacks:
        for i in stack.numbers:
            network = dense.feed_forward(i, stack.name)
            assert len(observer.sums[f"neurons.{stack.name}.{i}.l1"]) == network.width
            assert len(observer.sums[f"channels.{stack.name}.{i}.l1"]) == network.hidden


# --- stopped and gone on with


def test_a_stopped_pass_goes_on_to_the_same_bits(collect, tmp_path):
    options = {"collect": (*EVERYTHING, "gradient"), "batch_size": 2, "save_every": 2}
    whole = collect("llama", "whole", **options)
    seen: list[int] = []

    def stop(done: int) -> None:
        seen.append(done)
        if sum(seen) >= 10:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        collect("llama", "broken", progress=Counted("calibrating", stop), **options)
    assert sorted(p.name for p in tmp_path.glob("broken*")) == ["broken.safetensors.partial"]
    with pytest.raises(UpcycleError, match="not finished"):
        Statistics.open(tmp_path / "broken.safetensors")
    rest: list[int] = []
    again = collect("llama", "broken", progress=Counted("calibrating", rest.append), **options)
    assert rest[0] == 8  # the last sums that were saved
    assert sum(rest) == ROWS
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert again.digest == whole.digest
    assert sorted(p.name for p in tmp_path.glob("broken*")) == ["broken.safetensors"]


def test_another_pass_does_not_take_what_was_left(collect, tmp_path):
    def stop(done: int) -> None:
        if done:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        collect("vit", progress=Counted("calibrating", stop), save_every=1)
    with pytest.raises(UpcycleError, match=r"begun with another threshold, seed; start again"):
        collect("vit", seed=1, threshold=0.5)
    partial = tmp_path / "out.safetensors.partial"
    partial.write_bytes(partial.read_bytes()[:-5])
    with pytest.raises(UpcycleError, match="delete it to start anew"):
        collect("vit")


def test_no_flipped_bit_in_what_was_left_changes_the_statistics(collect, tmp_path):
    whole = collect("vit", "whole", positions=("neurons",), batch_size=6).path.read_bytes()

    def stop(done: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        collect(
            "vit", positions=("neurons",), batch_size=6, save_every=1, progress=Counted("calibrating", stop)
        )
    partial = tmp_path / "out.safetensors.partial"
    left, refused = partial.read_bytes(), 0
    data = 8 + int.from_bytes(left[:8], "little")
    spots = [8 + left.index(word) for word in (b"sha256", b"done", b"tokens", b"seed", b"F64")]
    for place in [*spots, *range(8, data, data // 4), *range(data, len(left), (len(left) - data) // 4)]:
        partial.write_bytes(left[:place] + bytes([left[place] ^ 1]) + left[place + 1 :])
        found = None
        with contextlib.suppress(UpcycleError):
            found = collect("vit", positions=("neurons",), batch_size=6)
        if found is None:
            refused += 1
        else:
            assert place < data
            assert found.path.read_bytes() == whole
            found.path.unlink()
    assert refused >= 9
    old = json.loads(left[8:data])
    state = json.loads(old["__metadata__"]["upcycle_statistics.partial"])
    del state["sha256"]  # as an older version left it
    old["__metadata__"]["upcycle_statistics.partial"] = json.dumps(state)
    text = json.dumps(old).encode()
    partial.write_bytes(len(text).to_bytes(8, "little") + text + left[data:])
    assert collect("vit", positions=("neurons",), batch_size=6).path.read_bytes() == whole


@pytest.mark.parametrize("number", quick([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_a_signal_saves_and_ends(number, data, server, tmp_path):
    """The command is told to end amid its batches, saves, and goes on when it is given again."""
    out, said = tmp_path / "out.safetensors", tmp_path / "said"
    arguments = [
        "calibrate", str(data / "vit"), "--out", str(out), "--images", str(data / "images"),
        "--batch-size", "1", "--device", "cpu",
    ]  # fmt: skip
    process = server.start(arguments, said, before="before:calibrate_slowly")
    assert server.wait(process, lambda: said.exists() and "batch" in said.read_text()) is None
    time.sleep(0.05)
    os.kill(process, number)
    assert server.wait(process) == 130
    assert "interrupted" in said.read_text()
    assert not out.exists()
    partial = out.with_name(out.name + ".partial")
    with safetensors.safe_open(partial, "np") as file:
        assert 0 < json.loads(file.metadata()["upcycle_statistics.partial"])["done"] < 18
    cli.main(arguments)
    assert not partial.exists()
    cli.main([*arguments[:3], str(tmp_path / "whole.safetensors"), *arguments[4:]])
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


# --- the file


def test_the_file_is_plain_safetensors_and_says_where_it_is_from(collect, data):
    found = collect("vit")
    read = safetensors.numpy.load_file(found.path)
    assert set(read) == {
        f"{p}.layers.{i}.{n}"
        for p in ("neurons", "channels", "heads")
        for i in range(4)
        for n in ("l1", "l2", "count")
    }
    for name, values in read.items():
        position, stack, layer, what = name.split(".")
        np.testing.assert_array_equal(found.of(position, stack, int(layer), what), values)
    made = found.provenance
    assert made["source"]["name"] == "vit"
    assert made["source"]["architecture"] == "ViTForImageClassification"
    assert made["data"]["name"] == "images"
    assert (made["collect"], made["seed"], made["batch_size"]) == (["count", "l1", "l2"], 0, 4)
    assert str(data) not in json.dumps(made)


def test_statistics_know_their_checkpoint(collect, data, tmp_path):
    found = collect("vit")

    def refuse(folder: Path) -> None:
        with Checkpoint.open(folder) as opened:
            found.refuse_other(admit(opened).fingerprint, folder)

    renamed = tmp_path / "another name"
    renamed.mkdir()
    for file in (data / "vit").iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    refuse(renamed)
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    refuse(renamed)
    (renamed / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UpcycleError, match=r"calibrated on vit, which has other config"):
        refuse(renamed)
    with pytest.raises(UpcycleError, match="other weights"):
        refuse(make(tmp_path / "seed", "ViTForImageClassification", seed=1))
    with pytest.raises(UpcycleError, match="other names, shapes or types of tensors"):
        refuse(data / "llama")


def test_a_plain_model_is_known_by_what_it_was_always_known_by(tmp_path):
    """Statistics that were measured before stay valid: these are the hashes of the first version."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    folder = make_headers(tmp_path / "dense", {"model_type": "llama", "num_hidden_layers": 1, **sizes})
    with Checkpoint.open(folder) as opened:
        assert admit(opened).fingerprint == {
            "config": "87235263140f1c93dc04f7c45ed833cb5fd6d339c2ed8a5b7ae06cb9d108d4d4",
            "tensors": "4131f39ce1054e4fa94128315d45ef6415e6616738b95a31d2f83e82273091dc",
            "content": "2127f2dbfb83f4c2e9d3aa6928b2abe5ae4465fdbd6368b273291d307ee2fd6b",
        }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("neurons", "layers", 0, "co_activation"), "--collect l1,co_activation"),
        (
            ("heads", "layers", 0, "l1"),
            "--positions neurons,heads, or without this option for all of neurons, channels, heads",
        ),
        (("neurons", "layers", 4, "l1"), "no neurons of layer 4 of layers; it has 4 layers of layers"),
        (("neurons", "encoder", 0, "l1"), "no neurons of layer 0 of encoder"),
        (("neurones", "layers", 0, "l1"), "positions: neurons, channels, heads"),
    ],
)
def test_what_was_not_collected_is_named(asked, said, collect):
    found = collect("vit", collect=("l1",), positions=("neurons",))
    with pytest.raises(UpcycleError, match=said):
        found.of(*asked)


def test_files_that_are_none_are_refused(collect, data, tmp_path):
    found = collect("vit")
    with pytest.raises(UpcycleError, match="does not exist; `upcycle calibrate"):
        Statistics.open(tmp_path / "none.safetensors")
    with pytest.raises(UpcycleError, match="is a folder"):
        Statistics.open(tmp_path)
    with pytest.raises(UpcycleError, match="no statistics of activations"):
        Statistics.open(data / "vit" / "model.safetensors")
    whole = found.path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(UpcycleError):
            Statistics.open(tmp_path / "cut.safetensors")
    found.path.write_bytes(whole[:-40])
    with pytest.raises(UpcycleError, match="it has changed"):
        found.of(*_last(found))


def _last(found: Statistics) -> tuple[str, str, int, str]:
    name = max(found.tensors.values(), key=lambda t: t.offset).name
    position, stack, layer, what = name.split(".")
    return position, stack, int(layer), what


# --- mistakes


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "vit",
            {"collect": ("l3",)},
            "--collect l3 has 'l3'; allowed: l1, l2, count, co_activation, co_marker, gradient, mean",
        ),
        ("vit", {"collect": ()}, "names none"),
        ("vit", {"collect": ("l1", "l1")}, "or one twice"),
        ("vit", {"positions": ("hands",)}, "allowed: neurons, channels, heads"),
        ("vit", {"collect": ("co_activation",), "positions": ("heads",)}, "add neurons"),
        ("vit", {"batch_size": 0}, "--batch-size 0"),
        ("vit", {"limit": -1}, "--limit -1"),
        ("vit", {"threshold": float("nan")}, "--threshold nan"),
        ("vit", {"length": 5}, "goes with --text"),
        ("vit", {"device": "abacus"}, "--device abacus cannot be used here"),
        ("vit", {"images": None, "text": Path("text.txt")}, "reads images and no text"),
        ("llama", {"images": Path("images"), "text": None, "length": None}, "reads text and no images"),
        ("headless", {"collect": ("gradient",)}, "BertModel has no head for one"),
        ("llama", {"length": 10_000}, "^length = 10000 and the model takes 64 tokens"),
        ("bert", {"length": 10_000}, "^length = 10000 and the model takes 40 tokens"),
        ("vit", {"field": "body"}, "--field body is that of a text, and none is given"),
        ("llama", {"field": "body"}, r"--field = body is for JSON lines.*text\.txt is text alone"),
        ("llama", {"text": Path("empty.jsonl")}, r"empty\.jsonl holds no text; give one that does, or leave"),
        ("llama", {"text": Path("nowhere.txt")}, "no data at nowhere.txt"),
        ("vit", {"images": Path("nowhere")}, "nowhere is not there"),
    ],
)
def test_mistakes_are_named(kind, options, said, collect, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    with pytest.raises(UpcycleError, match=said):
        collect(kind, **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("architecture", ["RobertaForMaskedLM", "MPNetForMaskedLM"])
def test_positions_behind_the_padding_token_are_fewer(architecture, collect, data, tmp_path):
    """A row may have all tokens that the model takes, and not one more."""
    folder = make(data / f"few-{architecture}", architecture, max_position_embeddings=20, pad_token_id=1)
    make_tokenizer(folder)
    assert collect(folder.name, length=18, limit=2).provenance["examples"] == 2
    with pytest.raises(UpcycleError, match=r"^length = 19 and the model takes 18 tokens"):
        collect(folder.name, "more", length=19, limit=2)


@pytest.mark.parametrize("architecture", ["Wav2Vec2Model", "WhisperModel"])
def test_a_model_of_sound_is_refused(architecture, data, tmp_path):
    """`eval`, `inspect`, a run and a forecast say the same sentence."""
    folder = make(tmp_path / "sound", architecture)
    for asked in ({"text": data / "text.txt"}, {"images": data / "images"}):
        with pytest.raises(UpcycleError, match=f"^{architecture} reads sound and no text"):
            calibrate(folder, tmp_path / "out.safetensors", ToCalibrate(**asked))


def test_a_text_that_fills_no_row_is_refused(collect, tmp_path):
    (tmp_path / "short.txt").write_text(WORDS[0])
    with pytest.raises(UpcycleError, match=r"fewer than a row of length \+ 1"):
        collect("llama", text=tmp_path / "short.txt")


def test_a_field_is_named(collect, data, tmp_path):
    text = (data / "text.txt").read_text()
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": "no", "body": text}))
    found = collect("llama", "lines", text=tmp_path / "lines.jsonl", field="body")
    wanted = collect("llama", "plain")
    assert found.digest == wanted.digest


def test_a_field_is_for_the_texts_that_can_have_one(collect, data, tmp_path):
    """As in `eval` and `inspect`."""
    (tmp_path / "lines.jsonl").write_text(json.dumps({"body": (data / "text.txt").read_text()}))
    plain, lines = (Domain(text=str(path)) for path in (data / "text.txt", tmp_path / "lines.jsonl"))
    asked = {"text": None, "collect": ("mean",), "field": "body"}
    found = collect("llama", domains=(plain, lines), **asked)
    assert found.provenance["examples"] == 2 * ROWS
    (tmp_path / "other.txt").write_text("the dog")
    both = (plain, Domain(text=str(tmp_path / "other.txt")))
    with pytest.raises(UpcycleError, match=r"text\.txt is text alone; take field out"):
        collect("llama", "other", domains=both, **asked)


def test_a_file_that_is_there_stays(collect, data, tmp_path):
    (tmp_path / "out.safetensors").write_text("mine")
    with pytest.raises(UpcycleError, match="nothing is overwritten"):
        collect("vit")
    assert (tmp_path / "out.safetensors").read_text() == "mine"
    with pytest.raises(UpcycleError, match=r"must end in \.safetensors"):
        calibrate(data / "vit", tmp_path / "out", ToCalibrate(images=data / "images"))


@pytest.mark.usefixtures("on_screen")
def test_pairs_that_do_not_fit_are_refused_before_anything_is_read(collect, data, monkeypatch, capsys):
    model = sum(info.nbytes for info in read_header(data / "vit" / "model.safetensors").values())
    monkeypatch.setattr(calibration, "_free", lambda _: model + 9_000)
    with pytest.raises(UpcycleError, match="leave co_activation out of --collect"):
        collect("vit", collect=("l1", "co_activation"))
    assert "co_activation of 4 layers takes 9.22 kB" in capsys.readouterr().err
    monkeypatch.setattr(calibration, "_free", lambda _: model - 1)
    with pytest.raises(UpcycleError, match=r"use a machine or a --device with more"):
        collect("vit")


def test_activations_that_are_no_numbers_are_refused(data, tmp_path):
    folder = tmp_path / "broken"
    model = transformers.ViTForImageClassification.from_pretrained(data / "vit")
    with torch.no_grad():
        model.vit.layers[2].mlp.fc1.bias[3] = float("inf")
    model.save_pretrained(folder)
    asked = {"images": data / "images", "device": "cpu"}
    with pytest.raises(UpcycleError, match="NaN or inf; the checkpoint is damaged"):
        calibrate(folder, tmp_path / "out.safetensors", ToCalibrate(**asked))
    said = r"neurons\.layers\.2\.l1 of .* is NaN or inf .*; without --allow-nonfinite, a tensor .* is named"
    with pytest.raises(UpcycleError, match=said):
        calibrate(folder, tmp_path / "out.safetensors", ToCalibrate(**asked, allow_nonfinite=True))
    assert not list(tmp_path.glob("out*"))


# --- as a person meets it


def test_the_command(data, tmp_path, capsys):
    out = tmp_path / "new" / "out.safetensors"
    arguments = [
        "calibrate",
        str(data / "t5"),
        "--text",
        str(data / "text.txt"),
        "--length",
        "16",
        "--device",
        "cpu",
    ]
    cli.main(
        [*arguments, "--out", str(out), "--collect", "l2, count", "--positions", "neurons", "--in-order"]
    )
    said = capsys.readouterr().out
    assert "count, l2 of neurons over 35 examples" in said
    assert "decoder 1" in said
    found = Statistics.open(out)
    assert f"digest {found.digest}" in said
    assert {name.rpartition(".")[2] for name in found.tensors} == {"l2", "count"}
    assert found.provenance["in_order"] is True
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--out", str(out)])
    assert ended.value.code == 2
    cli.main([*arguments, "--out", str(tmp_path / "b.safetensors"), "--limit", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["examples"] == 3


def test_the_command_names_the_positions_that_are_in_the_file(data, tmp_path, capsys):
    """Some statistics are taken at one position, whatever positions are asked for."""
    for collect, said in (
        ("sample", "sample of channels over 3 examples"),
        (
            "sample,l2,co_activation",
            "co_activation of neurons; l2 of channels, heads, neurons; sample of channels",
        ),
    ):
        out = tmp_path / f"{collect}.safetensors"
        cli.main(
            ["calibrate", str(data / "t5"), "--text", str(data / "text.txt"), "--length", "16",
             "--limit", "3", "--device", "cpu", "--collect", collect, "--out", str(out)]
        )  # fmt: skip
        assert f": {said}" in capsys.readouterr().out.replace("\n", " ")


def test_opening_a_file_needs_no_torch(collect):
    found = collect("vit")
    script = (
        "import sys\nfrom upcycle.records.statistics import Statistics\n"
        "found = Statistics.open(sys.argv[1])\n"
        "print(found.of('neurons', 'layers', 1, 'l2').shape, found.digest)\n"
        "print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(found.path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [f"(24,) {found.digest}", ""]


def test_a_trained_model_on_a_text_that_it_knows(stories, tinystories, tmp_path):
    """stories260k in batches of several sizes, against all its activations at once."""
    made = {
        size: calibrate(
            stories,
            tmp_path / f"{size}.safetensors",
            ToCalibrate(
                text=tinystories, collect=(*EVERYTHING, "gradient"), limit=12, length=128, batch_size=size,
                device="cpu", cache=tmp_path, in_order=True,
            ),
        )
        for size in (4, 12)
    }  # fmt: skip
    tokens = np.memmap(next(tmp_path.glob("*.bin")), np.uint16, "r")[: 12 * 128 + 1].astype(np.int64)
    rows = torch.tensor(tokens[:-1].reshape(12, 128))
    labels = torch.tensor(tokens[1:].reshape(12, 128))
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    with recorded(model, places_of("llama", 5), leaves=True) as kept:
        logits = model(input_ids=rows).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for found in made.values():
        for key, x in kept.items():
            assert x.grad is not None
            flat = x.detach().flatten(0, 1).numpy()
            wanted = naive(flat, 0.0)
            position, stack, layer = key.split(".")
            for name in ("l1", "l2"):
                np.testing.assert_allclose(
                    found.of(position, stack, int(layer), name), wanted[name], rtol=1e-4
                )
            # A number that is nearly nothing may fall on either side of the threshold.
            for name in ("count", "co_activation") if position == "neurons" else ("count",):
                got = found.of(position, stack, int(layer), name)
                assert np.abs(got - wanted[name]).max() < 2 / len(flat)
            gradient = (x * x.grad).detach().flatten(0, 1).double().abs().mean(0).numpy()
            np.testing.assert_allclose(
                found.of(position, stack, int(layer), "gradient"), gradient, rtol=2e-3, atol=1e-6
            )
    norms = made[4].of("neurons", "layers", 2, "l2")
    assert norms.max() > 2 * np.median(norms)  # neurons of a trained network differ
