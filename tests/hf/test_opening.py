"""A model is opened whole or refused by name, runs no code of its folder, and runs on any width."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ranks
import upcycle
from tiny import make, make_bytes_tokenizer, make_dense
from upcycle import Recipe, UpcycleError, cli, convert
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.evaluation.scores import evaluate
from upcycle.evaluation.to_score import ToScore
from upcycle.training import step
from upcycle.training.parallel import ranks as world

NATIVE = Recipe.of(moe={"num_experts": 4, "top_k": 2})
IDS = torch.arange(24).view(2, 12) % 90


def changed(folder: Path, out: Path, edit) -> Path:
    """A copy of a model whose tensors went through `edit`."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = make_dense(tmp_path_factory.mktemp("opened") / "dense", "llama", vocab_size=300)
    make_bytes_tokenizer(folder, "<unk>", "<s>", "</s>")
    return folder


@pytest.fixture(scope="module")
def mixtral(llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("opened") / "moe"
    convert(llama, out, NATIVE)
    return out


@pytest.mark.parametrize("target", ["mixtral", "ernie4_5_moe", "upcycled"])
@pytest.mark.parametrize("wanted", [None, "grouped_mm"])
def test_experts_of_a_mixed_run_compute_in_bfloat16(wanted, target, dense, monkeypatch):
    """On one process autocast says so, and grouped products do not follow it; the loop of experts does."""
    products, seen = torch.nn.functional.grouped_mm, []

    def look(a, b, **options):
        seen.append((a.dtype, b.dtype))
        return products(a, b, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", look)
    source = str(dense("ernie4_5" if target == "ernie4_5_moe" else "llama"))
    found = {}
    for how in (wanted, "eager"):
        chosen = {"experts_implementation": how} if how else {}
        run = ranks.run_of(source, {}, {"moe": {"target": target}, "train": chosen})
        with world(run.parallel) as here:
            trainee = ranks.trainee_of(run, here, "mixed")
        trainee.optimizer.register_step_pre_hook(
            lambda *_, model=trainee.model, how=how: found.update(
                {how: {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}
            )
        )
        step.train_step(trainee, ranks.batch_of(run, trainee.task), 0, 1e-3)
    assert {*seen} == {(torch.bfloat16, torch.bfloat16)}
    experts = [name for name in found["eager"] if ".experts." in name]
    assert len(experts) >= 4
    for name in experts:
        gradient, reference = found[wanted][name], found["eager"][name]
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 0.05 * reference.norm(), name


DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGED = {
    "nothing": (
        lambda t: [t.pop(n) for n in list(t) if n != "x"] and t.update(x=torch.zeros(1)),
        "lacks .*x,",
    ),
    "missing": (lambda t: t.pop(DOWN), f"lacks {DOWN}"),
    "headless": (lambda t: t.pop("lm_head.weight"), r"lacks lm_head.weight \(the head of the model"),
    "unexpected": (lambda t: t.update({"model.spare": torch.zeros(2)}), "holds model.spare"),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.zeros(2)}),
        r"other shapes of model.norm.weight \(\[2\] in place of \[32\]\)",
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_folder_that_is_not_whole_is_refused_by_name(how, llama, tmp_path):
    edit, said = DAMAGED[how]
    folder = changed(llama, tmp_path / "model", edit)
    (tmp_path / "text.txt").write_text("It was a small text. " * 9)
    with pytest.raises(UpcycleError, match=said):
        upcycle.open(folder)
    with pytest.raises(UpcycleError, match=said):
        evaluate(folder, ToScore(text=tmp_path / "text.txt"))
    assert not (folder / "eval.json").exists()


EXPERT = r"model.layers.1.block_sparse_moe.experts.2.w2.weight"
EXPERTS = {
    "missing": (lambda t: t.pop(EXPERT), f"lacks {EXPERT}"),
    "misshapen": (lambda t: t.update({EXPERT: torch.zeros(3, 4)}), rf"other shapes of {EXPERT} \(\[3, 4\]"),
    "one expert": (
        lambda t: [t.pop(n) for n in list(t) if "layers.1" in n and ".experts.3." in n],
        r"model.layers.1.mlp.experts.\w+ \(\[3, ",
    ),
    "a layer": (
        lambda t: [t.pop(n) for n in list(t) if "layers.1" in n and ".experts." in n],
        "lacks model.layers.1.mlp.experts.down_proj",
    ),
}


@pytest.mark.parametrize("how", EXPERTS)
def test_experts_that_are_not_whole_are_refused_by_name(how, mixtral, tmp_path):
    edit, said = EXPERTS[how]
    assert EXPERT in load_file(mixtral / "model.safetensors")
    with pytest.raises(UpcycleError, match=said):
        upcycle.open(changed(mixtral, tmp_path / "model", edit))


@pytest.mark.parametrize("name", ["nope", "nope/a/b", "config.json"])
def test_a_folder_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for folder in (name, tmp_path / name):
        with pytest.raises(UpcycleError, match=r"does not exist|is a file, not a folder"):
            upcycle.open(folder)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "much"])
def test_types_that_no_model_is_loaded_in(dtype, dense):
    with pytest.raises(
        UpcycleError, match=f"dtype = '{dtype}'; allowed: float64, float32, float16, bfloat16"
    ):
        upcycle.load(dense("llama"), dtype=dtype)


def test_double_precision(dense, tmp_path):
    """Grouped products do not take it."""
    ids = torch.arange(8)[None]
    model = upcycle.load(dense("llama"), {"moe": {"num_experts": 4}}, dtype=torch.float64).eval()
    wanted = upcycle.load(dense("llama"), {"moe": {"num_experts": 4}}).eval()
    with torch.no_grad():
        assert float((model(ids).logits - wanted(ids).logits).abs().max()) < 1e-4


def test_the_config_of_a_vit_without_a_tensor_of_it_has_no_accuracy(tmp_path):
    """Neither accuracy nor a record of one."""
    folder = make(tmp_path / "vit", "ViTForImageClassification")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UpcycleError, match="is no whole ViTForImageClassification"):
        upcycle.open(folder)


def test_tied_weights_are_not_missing_and_what_a_family_never_reads_is_not_in_the_way(tmp_path):
    tied = make_dense(tmp_path / "tied", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(tied).tensors
    assert upcycle.open(tied).config.tie_word_embeddings
    t5 = make(tmp_path / "t5", "T5ForConditionalGeneration")
    old = changed(
        t5, tmp_path / "old",
        lambda t: t.update(
            {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 4)}
        ),
    )  # fmt: skip
    assert type(upcycle.open(old)).__name__ == "T5ForConditionalGeneration"


def test_calibrate_and_verify_open_through_the_same_door(llama, tmp_path, monkeypatch):
    """They look at headers first, so what they would miss is what only transformers sees."""
    from upcycle.calibration import calibration
    from upcycle.hf import opening

    opened = []
    fill = opening.fill

    def seen(cls, folder, **options):
        opened.append(Path(folder).name)
        return fill(cls, folder, **options)

    monkeypatch.setattr(opening, "fill", seen)
    (tmp_path / "text.txt").write_text("It was a small text. " * 40)
    convert(llama, tmp_path / "moe", NATIVE)
    assert upcycle.verify(llama, tmp_path / "moe").holds
    asked = calibration.ToCalibrate(text=tmp_path / "text.txt", collect=("l1",), limit=2, length=16)
    calibration.calibrate(llama, tmp_path / "stats.safetensors", asked)
    assert opened == ["dense", "moe", "dense"]


# Widths


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A dense model whose rows take no multiple of 16 bytes."""
    folder = make_dense(
        tmp_path_factory.mktemp("odd") / "dense", "llama", dtype="bfloat16", intermediate_size=44,
        vocab_size=300,
    )  # fmt: skip
    make_bytes_tokenizer(folder, "<unk>", "<s>", "</s>")
    return folder


@pytest.mark.parametrize("target", ["native", "granitemoe", "upcycled"])
def test_experts_of_any_width_run_wherever_they_are_opened(target, odd, tmp_path, capsys):
    """In upcycle.open and load, Auto classes as in the card, eval, and inspect with a text."""
    recipe = Recipe.of(moe={"num_experts": 4, "top_k": 2, "target": target})
    convert(odd, tmp_path / "moe", recipe)
    wanted = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe", experts_implementation="eager"
    )(IDS).logits  # fmt: skip
    for model in (
        upcycle.open(tmp_path / "moe"),
        upcycle.load(odd, recipe),
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe"),
    ):
        assert torch.equal(model(IDS).logits, wanted)
    (tmp_path / "text.txt").write_text("It was a small text. " * 40)
    text = ["--text", str(tmp_path / "text.txt"), "--length", "32"]
    cli.main(["eval", str(tmp_path / "moe"), *text])
    cli.main(["inspect", str(tmp_path / "moe"), *text])


def test_config_says_how_experts_run_only_where_transformers_would_fail(odd, llama, tmp_path):
    """Nothing changes in the config of a model that opened before."""
    for name, source, moe, says in (
        ("odd", odd, {}, True),
        ("odd-upcycled", odd, {"target": "upcycled"}, False),
        ("even", llama, {}, False),
    ):
        built = convert(source, tmp_path / name, Recipe.of(moe={"num_experts": 4, "top_k": 2, **moe}))
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config.get("experts_implementation") == "eager") == says
        assert "experts_implementation" not in built.config
        assert upcycle.verify(source, tmp_path / name).holds
    # A folder of before is what its recipe makes as well.
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    config.pop("experts_implementation")
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    assert upcycle.verify(odd, tmp_path / "odd").holds
    assert upcycle.open(tmp_path / "odd")(IDS).logits.isfinite().all()


def test_an_implementation_that_nobody_knows_and_one_that_cannot_run(odd, llama, tmp_path):
    convert(odd, tmp_path / "moe", NATIVE)
    for call in (
        lambda name: upcycle.open(tmp_path / "moe", experts_implementation=name),
        lambda name: upcycle.load(odd, NATIVE, experts_implementation=name),
    ):
        with pytest.raises(UpcycleError, match=r"'nonsense'; allowed: eager, .*grouped_mm"):
            call("nonsense")
        with pytest.raises(UpcycleError, match="rows of 44 numbers of 2 bytes; take 'eager'"):
            call("grouped_mm")
    assert upcycle.load(llama, NATIVE).config._experts_implementation == "grouped_mm"


# Code


EVIL = "from pathlib import Path\nPath({ran!r}).write_text('ran')\n"


def test_no_code_of_a_folder_is_run(llama, mixtral, tmp_path, monkeypatch, capsys):
    """Not even where somebody, or `yes`, answers the question that transformers would ask."""
    ran = tmp_path / "ran"
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "evil.py").write_text(
        EVIL.format(ran=str(ran)) + "class T: pass\nclass C: model_type = 'evil'\nclass M: pass\n"
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("It was a small text. " * 40)
    text = ["--text", str(tmp_path / "text.txt")]
    moe = Path(shutil.copytree(mixtral, tmp_path / "moe"))
    for name in ("evil.py", "tokenizer_config.json"):
        shutil.copy(folder / name, moe / name)

    def answered(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 99))
        monkeypatch.setattr("builtins.input", lambda *_: "yes")
        try:
            cli.main(arguments)
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    for arguments in (
        ["eval", str(folder), *text],
        ["inspect", str(moe), *text],
        ["verify", str(folder), str(moe), *text],
        ["calibrate", str(folder), "--out", str(tmp_path / "s.safetensors"), *text],
    ):
        assert answered(arguments) in (0, 1, 2)
        assert not ran.exists()
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": named}))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    with pytest.raises(UpcycleError):
        upcycle.open(folder)
    assert answered(["eval", str(folder), *text]) == 2
    assert not ran.exists()


# Images


def test_verify_compares_on_images_and_calls_them_so(llama, mixtral, tmp_path, capsys):
    """Random ones, and those of a folder as eval takes them."""
    source = make(tmp_path / "vit", "ViTForImageClassification")
    convert(source, tmp_path / "moe", Recipe.of(moe={"num_experts": 4, "top_k": 4, "target": "upcycled"}))
    random = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "set" / str(label)).mkdir(parents=True)
        for i in range(7):
            image = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
            image.save(tmp_path / "set" / str(label) / f"{i}.png")
    images = tmp_path / "set"
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(source), str(tmp_path / "moe"), "--images", str(images)])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert re.search(r"logits, random: .* on \d+ images", shown)
    assert re.search(r"logits, images: .* on 16 images", shown)
    found = upcycle.verify(source, tmp_path / "moe", images=images)
    assert found.logits["images"].images == 16
    assert found.logits["images"].scale > 0
    assert found.logits["images"].relative < 1e-5
    text = upcycle.verify(llama, mixtral)
    assert text.logits["random"].images is None
    with pytest.raises(UpcycleError, match="--images is for models that read images, and llama does not"):
        upcycle.verify(llama, mixtral, images=images)
    with pytest.raises(UpcycleError):
        upcycle.verify(source, tmp_path / "moe", images=tmp_path / "nowhere")
