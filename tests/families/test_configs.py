"""config.json with values of the wrong type, size or meaning: a sentence that names the key, no traceback."""

from __future__ import annotations

import json
import random

import pytest

import tiny
from marks import sampled
from upcycle import Recipe, UpcycleError, blueprint, families
from upcycle.blueprints.cost import plan_of
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.families import _checked, granitemoehybrid
from upcycle.targets import natives

ENCODERS = {
    "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification", "dinov2": "Dinov2Model",
    "convnext": "ConvNextForImageClassification", "convnextv2": "ConvNextV2Model", "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration", "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM", "opt": "OPTForCausalLM", "roberta": "RobertaForMaskedLM",
    "xlm-roberta": "XLMRobertaModel", "camembert": "CamembertModel", "electra": "ElectraModel",
    "mpnet": "MPNetModel", "distilbert": "DistilBertForMaskedLM", "modernbert": "ModernBertModel",
    "clip": "CLIPModel", "siglip": "SiglipModel", "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel", "pixtral": "PixtralVisionModel",
}  # fmt: skip

ODD = [
    None, "", "x", "1e-5", True, False, -1, 0, 1, 7, 10**9, 10**30, 0.5, -1.5, float("nan"), float("inf"),
    1e308, [], [1], ["x"], [None] * 4, [[]], {}, {"a": 1}, {"rope_type": "nonsense"}, {"rope_type": ["yarn"]},
    {"0": {"1": float("nan")}},
]  # fmt: skip


def refusal(call, *args) -> str:
    """What `call` says against its arguments; empty where it takes them. Any other error goes through."""
    try:
        call(*args)
    except UpcycleError as error:
        return str(error)
    return ""


def small_config(model_type: str) -> dict:
    """A config.json of a tiny model."""
    if model_type in ENCODERS:
        from transformers import CONFIG_MAPPING

        made = CONFIG_MAPPING[model_type](**tiny._SIZES[model_type], architectures=[ENCODERS[model_type]])
    else:
        made = tiny.config_of(model_type)
    return json.loads(made.to_json_string(use_diff=False))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A function that gives a checkpoint of headers alone, made once for each family."""
    made: dict[str, Checkpoint] = {}

    def make(model_type: str) -> Checkpoint:
        if model_type not in made:
            folder = tmp_path_factory.mktemp("headers") / model_type
            made[model_type] = Checkpoint.open(tiny.make_headers(folder, small_config(model_type), "F32"))
        return made[model_type]

    return make


def planned(checkpoint: Checkpoint, config: dict) -> None:
    """Plan an MoE of a checkpoint whose config.json says something else."""
    changed = Checkpoint(checkpoint.folder, config, checkpoint.tensors)
    plan_of(blueprint(changed, Recipe.of(moe={"num_experts": 2, "target": "upcycled", "top_k": 1})))
    if families.find(config["model_type"]).natives:
        blueprint(changed, Recipe.of(moe={"num_experts": 2, "top_k": 1}))


def test_the_configs_themselves_are_fine(opened):
    for model_type in families.names():
        assert "config.json" not in refusal(planned, opened(model_type), opened(model_type).config)


def read(model_type: str, config: dict) -> None:
    """Ask a family everything it works out from a config.json."""
    family = families.find(model_type)
    found = family.config(config)
    family.shapes(found), family.optional(found), family.stacks(found), family.inputs(found, 64)
    family.lengths(found)


@pytest.mark.parametrize("model_type", sampled(families.names(), 3))
def test_any_value_of_any_key_is_taken_or_refused_in_a_sentence(model_type, opened):
    checkpoint = opened(model_type)
    known = families.find(model_type).defaults
    extra = ["rope_theta", "rope_scaling", "rope_parameters", "id2label", "architectures", "drop_path_rate"]
    for key in sorted({*checkpoint.config, *known, *extra} - {"model_type"}):
        for value in ODD:
            said = refusal(read, model_type, {**checkpoint.config, key: value})
            assert "\n" not in said
            assert len(said) < 700, said


def test_plans_of_configs_with_odd_values(opened):
    chosen = random.Random(0)
    for _ in range(600):
        checkpoint = opened(chosen.choice(families.names()))
        keys = chosen.sample(sorted({*checkpoint.config} - {"model_type"}), chosen.randint(1, 2))
        config = {**checkpoint.config, **{key: chosen.choice(ODD) for key in keys}}
        for key in chosen.sample(sorted({*config} - {"model_type"}), chosen.randrange(3)):
            del config[key]
        assert "\n" not in refusal(planned, checkpoint, config)


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("llama", {"hidden_act": "nonsense"}, "hidden_act = 'nonsense'; it must be one of gelu"),
        ("llama", {"rope_scaling": {"rope_type": "nonsense"}}, "rope_scaling.rope_type = 'nonsense'"),
        ("llama", {"rope_theta": -1}, "rope_theta = -1"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'; it must be a number"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps = -1"),
        ("llama", {"bos_token_id": float("nan")}, "bos_token_id = nan"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ("t5", {"num_layers": 10**9}, "num_layers = 1000000000"),
        ("t5", {"num_decoder_layers": "two"}, "num_decoder_layers = 'two'"),
        ("t5", {"feed_forward_proj": None}, "feed_forward_proj = None"),
        ("t5", {"feed_forward_proj": "gated-x"}, "feed_forward_proj = 'gated-x'"),
        ("convnext", {"depths": [2, 10**9, 1, 1]}, "depths"),
        ("vit", {"architectures": "ViTModel"}, "'ViTModel'; it must be a list, each entry text"),
        ("vit", {"architectures": [5]}, "architectures = [5]"),
        ("vit", {"patch_size": None}, "patch_size = None"),
        ("vit", {"some_key": [float("nan")]}, "some_key holds nan"),
        ("dinov2", {"mlp_ratio": "4"}, "mlp_ratio = '4'"),
        ("qwen3", {"layer_types": [[]] * 4}, "layer_types"),
        ("llama", {"use_cache": None}, "use_cache = None; it must be true or false"),
        ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings = None"),
        ("llama", {"max_position_embeddings": 131072.0}, "max_position_embeddings = 131072.0"),
        ("llama", {"pad_token_id": 96}, "pad_token_id = 96, and a vocab_size of 96 has rows 0 to 95"),
        ("bert", {"pad_token_id": 60}, "pad_token_id = 60"),
        ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "keep the one that is meant"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
            "write longrope in its place",
        ),
    ],
)  # fmt: skip
def test_what_is_said(model_type, changes, said, opened):
    checkpoint = opened(model_type)
    with pytest.raises(UpcycleError) as error:
        planned(checkpoint, {**checkpoint.config, **changes})
    assert said in str(error.value)


def test_a_pattern_of_layers_in_letters():
    """EXAONE 4 writes LLLG, beside the kinds of its layers or without them."""
    config = small_config("exaone4") | {"sliding_window_pattern": "LLLG", "layer_types": None}
    four = ["sliding_attention"] * 3 + ["full_attention"]
    assert families.find("exaone4").config(config)["layer_types"] == four
    assert families.find("exaone4").config(config | {"layer_types": four[::-1]})["layer_types"] == four[::-1]
    with pytest.raises(UpcycleError, match="L and G for each layer"):
        families.find("exaone4").config(config | {"sliding_window_pattern": "LX"})


def test_every_key_with_a_default_has_a_kind_that_takes_it():
    for model_type in families.names():
        for key, value in families.find(model_type).defaults.items():
            kind = _checked.KINDS[key]
            assert kind.fits(value) or value is None, (model_type, key, value)


def test_names_are_those_of_transformers():
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ACT2FN) <= _checked.ACTIVATIONS
    assert set(ROPE_INIT_FUNCTIONS) <= _checked.ROPE_TYPES


def test_natives_write_no_value_that_a_family_would_refuse(opened):
    for name in natives.names():
        model_type = next(f for f in families.names() if name in families.find(f).natives)
        built = blueprint(opened(model_type), Recipe.of(moe={"num_experts": 2, "target": name}))
        kinds = built.config.get("layer_types")
        now = {"layer_types": [granitemoehybrid._FORMERLY.get(k, k) for k in kinds]} if kinds else {}
        _checked.check(name, built.config | now)  # families read the hub's older names of layers, too


def test_what_transformers_refuses_is_refused():
    """A value that its own class does not open makes neither a source nor a result."""
    from huggingface_hub.errors import StrictDataclassFieldValidationError
    from transformers import CONFIG_MAPPING

    taken = []
    for model_type in [*tiny.DECODERS, *tiny.OTHERS]:
        config, family = small_config(model_type), families.find(model_type)
        for key in {*family.defaults, "use_cache", "vocab_size"} & {*config}:
            values = [None] if isinstance(config[key], bool) else []
            values += [float(config[key])] if type(config[key]) is int else []
            for value in values:
                changed = config | {key: value}
                if not refusal(family.config, changed):
                    try:
                        cls = CONFIG_MAPPING[model_type]
                        cls.from_dict(cls._decode_special_floats(changed))  # as from a file, with Infinity
                    except Exception:
                        taken.append((model_type, key, value))
    with pytest.raises(StrictDataclassFieldValidationError, match="expected int"):  # as ours is, too
        CONFIG_MAPPING["llama"].from_dict(small_config("llama") | {"max_position_embeddings": 131072.0})
    # The class of Gemma 2 takes no such float, and it is the same number.
    assert {key for _, key, _ in taken} <= {"query_pre_attn_scalar"}


def test_gelu_of_gemma_is_its_tanh_form():
    config = small_config("gemma") | {"hidden_act": "gelu"}
    assert families.find("gemma").config(config)["hidden_act"] == "gelu_pytorch_tanh"
