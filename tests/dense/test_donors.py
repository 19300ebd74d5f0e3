"""Donors and adapters are compared with the source before they are mixed: what is refused or said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import tiny
import tiny_wrappers
from upcycle import Recipe, UpcycleError, blueprint, families, plan

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def asked(*tables, backbone="base", **sections) -> Recipe:
    init = {"name": "experts", "expert": [{}, *tables], "backbone": backbone}
    return Recipe.of(moe={"num_experts": len(tables) + 1, "top_k": 1}, init=init, **sections)


def refused(source: Path, *tables, **more) -> str:
    with pytest.raises(UpcycleError) as found:
        blueprint(source, asked(*tables, **more))
    assert "\n" not in str(found.value)
    return str(found.value)


def warnings(source: Path, *tables, **more) -> str:
    return "\n".join(plan(source, asked(*tables, **more)).warnings)


def test_an_activation_that_was_learned_is_the_backbones(dense):
    """The experts of an Apertus share the numbers of their activation (xIELU)."""
    source, other = dense("apertus"), dense("apertus", seed=1)
    init = {"name": "experts", "expert": [{}, {"source": str(other)}]}
    for backbone, whose in (
        ("base", f"activation, that of {source}"),
        ("average", "which is mixed like all"),
    ):
        recipe = Recipe.of(moe={"num_experts": 2, "target": "upcycled"}, init={**init, "backbone": backbone})
        said = "\n".join(plan(source, recipe).warnings)
        assert whose in said
        assert "its own model.layers.0.mlp.act_fn" in said
    init["expert"] = [{}, {"source": str(source)}]
    recipe = Recipe.of(moe={"num_experts": 2, "target": "upcycled"}, init=init)
    assert "act_fn" not in "\n".join(plan(source, recipe).warnings)


@pytest.fixture
def base(dense, tmp_path) -> Path:
    return Path(shutil.copytree(dense("llama"), tmp_path / "base"))


@pytest.fixture
def donor(dense, tmp_path) -> Path:
    return Path(shutil.copytree(dense("llama", seed=1), tmp_path / "donor"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return tiny.make_adapter(tmp_path / "adapter", base)


def edit(folder: Path, file: str = "config.json", **changes) -> None:
    found = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**found, **changes}))


def edit_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def tokens(folder: Path, *names: str) -> None:
    vocab = {name: number for number, name in enumerate(names)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))


@pytest.mark.parametrize("backbone", ["base", "average"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": 1e-3}, "differ in rms_norm_eps: 0.001 and"),
        ({"hidden_act": "gelu"}, "differ in hidden_act: 'gelu' and 'silu'"),
    ],
)
def test_what_matters_is_refused_whatever_the_backbone(backbone, changes, said, base, donor):
    edit(donor, **changes)
    assert said in refused(base, {"source": str(donor)}, backbone=backbone)


def test_heads_are_compared_although_shapes_agree(base, dense, tmp_path):
    """Four heads of 12 and twelve of 4 have the same matrices and another meaning."""
    other = Path(shutil.copytree(dense("llama", seed=1), tmp_path / "other"))
    edit(other, num_attention_heads=12, num_key_value_heads=6, head_dim=4)
    said = refused(base, {"source": str(other)})
    assert "differ in head_dim: 4 and 12" in said


def test_shapes_name_the_key_that_makes_them(base, dense):
    said = refused(base, {"source": str(dense("llama", seed=1, intermediate_size=64))})
    assert "not of the same shape" in said
    assert "intermediate_size: 64 and 48" in said
    assert "is a qwen3, and that a llama" in refused(base, {"source": str(dense("qwen3"))})


def test_rotary_positions_matter_where_attention_is_mixed(base, donor):
    edit(donor, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert "differ in rope_parameters" in refused(base, {"source": str(donor)}, backbone="average")
    said = warnings(base, {"source": str(donor)})
    assert "differ in rope_parameters" in said
    assert f"the result has what {base} has" in said


SPELLED = {  # a type, what a config.json of the hub says, and a change that matters
    "qwen2": ({"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28},
              {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "gemma3_text": ({"rope_theta": 1e6, "rope_local_base_freq": 1e4}, {"rope_local_base_freq": 777.0}),
    "phi3": ({"rope_theta": 1e4, "rope_scaling": None}, {"partial_rotary_factor": 0.5}),
    "gpt_neox": ({"rotary_emb_base": 10000, "rotary_pct": 0.25}, {"rotary_pct": 0.5}),
    "falcon": ({"rope_theta": 1e4}, {"rope_theta": 777.0}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", SPELLED)
def test_a_branch_that_transformers_saved_has_another_spelling(model_type, dense, tmp_path):
    """Both mean the same, until one says something else."""
    given, change = SPELLED[model_type]
    source, branch = (Path(shutil.copytree(dense(model_type, seed=n), tmp_path / str(n))) for n in (0, 1))
    raw = json.loads((source / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if key not in ("rope_parameters", "layer_types")} | given
    if model_type == "gemma3_text":
        raw["sliding_window_pattern"] = 6
    (source / "config.json").write_text(json.dumps(raw))
    recipe = Recipe.of(
        moe={"num_experts": 2, "target": "upcycled"},
        init={"name": "branch_train_mix", "sources": [str(branch)]},
    )
    assert "differ" not in "\n".join(plan(source, recipe).warnings)
    edit(source, **change)
    with pytest.raises(UpcycleError, match=r"differ in (layer_types|rope_parameters)"):
        plan(source, recipe)


ROTATED = {  # rotary settings in a spelling of the hub, and one of them otherwise
    "modernbert": ({"global_rope_theta": 80_000.0, "local_rope_theta": 1e4}, {"local_rope_theta": 777.0}),
    "nomic_bert": ({"rope_theta": 5000.0}, {"rope_theta": 777.0}),
    "pixtral": ({"rope_theta": 5000.0}, {"rope_theta": 777.0}),
    "gpt_neox": ({"rotary_emb_base": 5000, "rotary_pct": 0.5}, {"rotary_emb_base": 777}),
    "falcon": ({"rope_theta": 5000.0}, {"rope_theta": 777.0}),
}


@pytest.mark.parametrize("model_type", ROTATED)
def test_a_family_reads_rotary_settings_in_both_spellings(model_type):
    """The new spelling is what the class of transformers makes of the old one."""
    family, (old, change) = families.find(model_type), ROTATED[model_type]
    saved = AutoConfig.for_model(model_type, **old).to_dict()
    sizes = {key: value for key, value in saved.items() if "rope" not in key and key not in old}
    found = [
        family.compared(family.config(sizes | given))["rope_parameters"]
        for given in (old, {"rope_parameters": saved["rope_parameters"]}, {**old, **change})
    ]
    assert found[0] == found[1] != found[2]


def test_what_does_not_matter_is_said(base, donor):
    edit(donor, eos_token_id=5, max_position_embeddings=128, initializer_range=0.5)
    for folder, eos in ((base, "</s>"), (donor, {"content": "<|im_end|>"})):
        edit(folder, "tokenizer_config.json", eos_token=eos)
    (donor / "chat_template.jinja").write_text("{{ messages }}")
    said = warnings(base, {"source": str(donor)}, backbone="average")
    assert "differ in eos_token_id (5 and 2), max_position_embeddings (128 and 64)" in said
    assert "initializer_range" not in said
    assert "differ in eos_token ('<|im_end|>' and '</s>')" in said
    assert "different chat templates" in said
    assert "differ" not in warnings(base, {"source": str(base)})


def test_other_tokens_of_the_same_number(base, donor):
    tokens(base, "a", ".", "b")
    tokens(donor, "a", "b", ".")
    for backbone in ("base", "average"):
        said = refused(base, {"source": str(donor)}, backbone=backbone)
        assert "have other tokens: '.' is number 2 and 1" in said


def test_a_larger_vocabulary(base, dense, tmp_path):
    """Two rows more: taken if the embeddings are the source's, and otherwise refused with what to do."""
    other = Path(shutil.copytree(dense("llama", seed=1, vocab_size=98), tmp_path / "other"))
    tokens(base, "a", "b")
    tokens(other, "a", "b", "<x>", "<y>")
    said = refused(base, {"source": str(other)}, backbone="average")
    assert "vocabularies of 98 and 96 tokens, such as '<x>', '<y>'" in said
    assert "resize_token_embeddings" in said
    said = warnings(base, {"source": str(other)})
    assert "vocab_size (98 and 96)" in said
    assert "knows tokens that" in said
    made = blueprint(base, asked({"source": str(other)}))
    assert made.entries["model.embed_tokens.weight"].shape == (96, 32)


def test_a_tied_head(base, dense):
    tied = dense("llama", seed=1, tie_word_embeddings=True)
    said = refused(base, {"source": str(tied)}, backbone="average")
    assert "differ in tie_word_embeddings: True and False" in said
    assert "tie_word_embeddings (True and False)" in warnings(base, {"source": str(tied)})


def test_another_dtype(base, dense):
    other = str(dense("llama", seed=1, dtype="bfloat16"))
    assert "set dtype to the one to write" in refused(base, {"source": other})
    blueprint(base, asked({"source": other}, dtype="float32"))


def test_a_donor_by_two_paths(base, donor, tmp_path):
    """A link leads to the donor itself; hard links, as some stores make them, are another path to it."""
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(donor)
    built = blueprint(base, asked({"source": str(donor)}, {"source": str(link)}))
    assert len(built.donors) == 1
    said = warnings(base, {"source": str(donor)}, {"source": str(link)})
    assert "init.expert[1] and init.expert[2] are the same model" in said
    sources = Recipe.of(
        moe={"num_experts": 3}, init={"name": "branch_train_mix", "sources": [str(donor), str(link)]}
    )
    said = "\n".join(plan(base, sources).warnings)
    assert "is named more than once, and counts once more in an average" in said
    shutil.copytree(donor, other, copy_function=os.link)
    said = refused(base, {"source": str(donor)}, {"source": str(other)})
    assert "are one checkpoint, by two paths" in said
    mixed = warnings(base, {"source": str(base)}, backbone="average")
    assert "is the source itself, and counts once more in an average" in mixed
    alone = warnings(base, {"source": str(base)})
    assert "is the source itself" in alone
    assert "counts once more" not in alone


def test_a_folder_that_is_not_what_it_is_named_as(base, donor, adapter):
    said = refused(base, {"source": str(adapter)})
    assert "is an adapter (LoRA) without the model" in said
    assert "name it as `adapter` of an [[init.expert]]" in said
    with pytest.raises(UpcycleError, match="name it as `adapter`"):
        blueprint(adapter)
    assert "is a whole model and no adapter; name it as `source`" in refused(base, {"adapter": str(donor)})
    assert "does not exist" in refused(base, {"adapter": "nowhere"})
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert f"has no {WEIGHTS}" in refused(base, {"adapter": str(adapter)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "has new embeddings"),
        ({"bias": "all"}, "learns biases"),
        ({"lora_bias": True}, "learns biases"),
        ({"layer_replication": [[0, 4]]}, "repeats layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "peft changes the model itself"),
        ({"peft_type": "IA3"}, "of type 'IA3', not LORA"),
        ({"peft_type": None}, "of type None, not LORA"),
        ({"r": "4"}, "r = '4'; it must be a number above 0"),
        ({"r": 0}, "r = 0; it must be a number above 0"),
        ({"lora_alpha": None}, "lora_alpha = None; it must be a number above 0"),
        ({"rank_pattern": [1]}, "rank_pattern = [1]; it must be a table"),
        ({"alpha_pattern": {"(": 1}}, "'(' is no pattern"),
        ({"target_modules": "("}, "'(' is no pattern"),
        ({"target_modules": 3}, "it must be a list of names"),
        ({"layers_to_transform": ["a"]}, "it must be a list of block numbers"),
        ({"r": 8}, "the settings say a rank of 8"),
        ({"rank_pattern": {"layers.2.mlp.up_proj": 2}}, "the settings say a rank of 2"),
        ({"target_modules": ["up_proj", "down_proj"]}, "its target_modules do not name"),
        ({"target_modules": None}, "its target_modules do not name"),
        ({"exclude_modules": ["up_proj"]}, "its target_modules do not name"),
        ({"layers_to_transform": [0, 1]}, "its target_modules do not name"),
    ],
)
def test_settings_of_an_adapter_that_are_refused(changes, said, base, adapter):
    edit(adapter, CONFIG, **changes)
    assert said in refused(base, {"adapter": str(adapter)})


def test_tensors_of_an_adapter_that_are_refused(base, adapter, dense, tmp_path):
    kept = (adapter / WEIGHTS).read_bytes()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"

    def after(change) -> str:
        (adapter / WEIGHTS).write_bytes(kept)
        edit_tensors(adapter / WEIGHTS, change)
        return refused(base, {"adapter": str(adapter)})

    magnitude = {name.format("magnitude_vector"): torch.zeros(48)}
    assert "is a DoRA" in after(lambda t: t.update(magnitude))
    table = {"base_model.model.model.embed_tokens.weight": torch.zeros(96, 32)}
    assert "has new embeddings" in after(lambda t: t.update(table))
    assert "is no pair of LoRA matrices" in after(lambda t: t.pop(name.format("B")))
    other = {
        "base_model.model.model.layers.0.mlp.up.lora_A.weight": torch.zeros(4, 32),
        "base_model.model.model.layers.0.mlp.up.lora_B.weight": torch.zeros(48, 4),
    }
    assert "changes model.layers.0.mlp.up, which" in after(lambda t: t.update(other))
    assert "as I64" in after(lambda t: t.update({name.format("A"): torch.zeros(4, 32, dtype=torch.int64)}))
    assert "has shape [4]" in after(lambda t: t.update({name.format("A"): torch.zeros(4)}))
    assert "holds no LoRA matrices" in after(lambda t: t.clear())
    wide = tiny.make_adapter(tmp_path / "wide", dense("llama", seed=1, intermediate_size=64))
    said = refused(base, {"adapter": str(wide)})
    assert "was made for another base" in said
    assert "as a matrix of [32, 64], and" in said


def test_what_becomes_of_attention_is_said(base, tmp_path):
    modules = ("q_proj", "v_proj", "up_proj")
    adapter = tiny.make_adapter(tmp_path / "adapter", base, modules)
    said = warnings(base, {"adapter": str(adapter)})
    assert "adapter: 4 of the 12 matrices that it changes are merged into experts; 8 are left out" in said
    assert "(self_attn.q_proj, self_attn.v_proj)" in said
    assert "left out" not in warnings(base, {"adapter": str(adapter)}, backbone="average")
    alone = tiny.make_adapter(tmp_path / "alone", base, ("q_proj",))
    assert "changes no network that becomes experts" in refused(base, {"adapter": str(alone)})
    blueprint(base, asked({"adapter": str(alone)}, backbone="average"))


def test_an_adapter_of_another_name_is_said(base, adapter):
    assert "says that it belongs to" not in warnings(base, {"adapter": str(adapter)})
    edit(adapter, CONFIG, base_model_name_or_path="someone/another-8B")
    said = warnings(base, {"adapter": str(adapter)})
    assert "says that it belongs to 'someone/another-8B', and it is merged into base" in said


def test_lists_that_say_nothing(base):
    with pytest.raises(UpcycleError, match=r"init\.expert is empty"):
        Recipe.of(init={"name": "experts"})
    with pytest.raises(UpcycleError, match="mixes SOURCE with itself"):
        asked({"weight": 0.5})
    with pytest.raises(UpcycleError, match=r"weight = 0.0; it must be in \(0, 1\]"):
        asked({"source": "a", "weight": 0})
    with pytest.raises(UpcycleError, match=r"unknown key init.expert\[1\].sauce"):
        asked({"sauce": "a"})
    with pytest.raises(UpcycleError, match=r"unknown key init \(copy\).expert; it is a key of init experts"):
        Recipe.of(init={"expert": [{}]})


AROUND = {  # keys of config.json around the text model, and other values
    "image_token_index": 7,
    "projector_hidden_act": "relu",
    "vision_feature_layer": -1,
    "vision_config.layer_norm_eps": 0.1,
    "vision_config.num_attention_heads": 4,
}


def test_what_is_averaged_around_a_text_model_must_mean_the_same(tmp_path):
    base = tiny_wrappers.make(tmp_path / "base", "llava")
    donor = tiny_wrappers.make(tmp_path / "donor", "llava", seed=1)
    path = donor / "config.json"
    config = json.loads(path.read_text())
    silent = {"transformers_version": "4.0.0", "ignore_index": -1, "_attn_implementation_autoset": True,
              "unsloth_version": "2025.3.2"}  # fmt: skip
    for folder in (base, donor):
        kept = json.loads((folder / "config.json").read_text())
        given = silent if folder is donor else dict.fromkeys(silent, "other")
        (folder / "config.json").write_text(json.dumps({**kept, **given}))
    blueprint(base, asked({"source": str(donor)}, backbone="average"))
    for key, value in AROUND.items():
        outer, _, inner = key.rpartition(".")
        changed = {outer: {**config[outer], inner: value}} if outer else {inner: value}
        path.write_text(json.dumps({**config, **changed}))
        said = refused(base, {"source": str(donor)}, backbone="average")
        assert f"differ in {key}: {value!r} and " in said
        blueprint(base, asked({"source": str(donor)}))  # the tower of the base alone
