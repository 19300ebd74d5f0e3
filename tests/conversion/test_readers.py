"""What reads the inputs of a model: tokenizer, processor, pooling. The result reads as the source does."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import tiny
from upcycle import Recipe, UpcycleError, convert, families, verify
from upcycle.checkpoints import carried
from upcycle.conversion import tokenizer
from upcycle.families._wrappers import WRAPPERS
from upcycle.targets import natives

MOE = {"num_experts": 2, "top_k": 1}
TEXT = "the cat sat on the mat and the dog ate the bone in the yard .\n"


def lines_of(source: Path, out: Path) -> dict[str, tuple[bool | None, str]]:
    proof = verify(source, out, logits=False)
    return {check.name: (check.holds, check.detail) for check in proof.checks}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A sentencepiece model of bytes and words, as Llama 1 and 2 have it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text(TEXT * 80)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "sp"), vocab_size=300, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "sp.model"


@pytest.fixture(scope="module")
def llama(pieces, tmp_path_factory):
    """A Llama whose only tokenizer is tokenizer.model, as vicuna and open_llama are."""
    source = tiny.make_dense(tmp_path_factory.mktemp("llama") / "dense", "llama", vocab_size=320)
    shutil.copyfile(pieces, source / "tokenizer.model")
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "legacy": False, "model_max_length": 4096, "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return source


@pytest.mark.parametrize("target", ["mixtral", "granitemoe", "upcycled"])
@pytest.mark.parametrize("stored", ["tokenizer.model", "tokenizer.json"])
def test_llama_tokens_stay_what_they_are(stored, target, llama, tmp_path):
    """As Mixtral, transformers opens the same files by another class: newlines and blanks are lost."""
    from transformers import AutoTokenizer

    source = Path(shutil.copytree(llama, tmp_path / "dense"))
    if stored == "tokenizer.json":  # as Llama 2 has it: the blank in front of a text is a normaliser's
        whole = json.loads(AutoTokenizer.from_pretrained(source).backend_tokenizer.to_str())
        steps = [{"type": "Prepend", "prepend": "▁"},
                 {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]  # fmt: skip
        whole |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": steps}}
        (source / "tokenizer.json").write_text(json.dumps(whole))
        (source / "tokenizer.model").unlink()
    convert(source, tmp_path / "moe", Recipe.of(moe={**MOE, "target": target}))
    found = lines_of(source, tmp_path / "moe")
    assert found["tokens"][0], found["tokens"]
    assert found["files"][0], found["files"]
    record = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    made_anew = record.get("made_anew_files") or {}
    assert bool(made_anew) == ("tokenizer.json" in made_anew) == (target != "upcycled")
    a, b = (AutoTokenizer.from_pretrained(f) for f in (source, tmp_path / "moe"))
    text = "  return x\n\nthe cat</s> the dog"
    assert a(text).input_ids == b(text).input_ids
    if made_anew:  # without it, they differ, and verify says so
        if (source / "tokenizer.json").exists():
            shutil.copyfile(source / "tokenizer.json", tmp_path / "moe" / "tokenizer.json")
        else:
            (tmp_path / "moe" / "tokenizer.json").unlink()
        holds, said = lines_of(source, tmp_path / "moe")["tokens"]
        assert not holds
        assert "give other tokens" in said


def test_further_chat_templates_stay_with_a_tokenizer_that_is_made_anew(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "dense"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    convert(source, tmp_path / "moe", Recipe.of(moe={**MOE, "target": "mixtral"}))
    found = lines_of(source, tmp_path / "moe")
    assert found["tokens"][0], found["tokens"]
    assert found["files"][0], found["files"]


def test_encoders_that_name_no_tokenizer_class(tmp_path):
    """transformers goes by the model type, and ours are registered with it."""
    from transformers import AutoTokenizer, BertTokenizer

    source = tiny.make(tmp_path / "bert", "BertForMaskedLM")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]
    (source / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    BertTokenizer.from_pretrained(source).save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "tokenizer.json", source)
    (source / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    convert(source, tmp_path / "moe", Recipe.of(moe={**MOE, "target": "upcycled"}))
    found = lines_of(source, tmp_path / "moe")["tokens"]
    assert found[0], found
    opened = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert (opened.pad_token, opened.mask_token, opened.cls_token) == ("[PAD]", "[MASK]", "[CLS]")


def test_t5_with_pieces_alone(tmp_path):
    import sentencepiece

    source = tiny.make(tmp_path / "t5", "T5ForConditionalGeneration", vocab_size=160)
    (tmp_path / "text.txt").write_text(TEXT * 80)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=30, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    shutil.copy(tmp_path / "sp.model", source / "spiece.model")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    convert(source, tmp_path / "moe", Recipe.of(moe={**MOE, "target": "upcycled"}))
    found = lines_of(source, tmp_path / "moe")["tokens"]
    assert found[0], found


def test_an_image_processor_that_names_no_class(tmp_path):
    source = tiny.make(tmp_path / "vit", "ViTForImageClassification")
    settings = {"do_normalize": True, "do_resize": True, "image_mean": [0.4] * 3, "image_std": [0.5] * 3,
                "resample": 2, "size": 12}  # fmt: skip
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "moe", Recipe.of(moe={**MOE, "target": "upcycled"}))
    holds, said = lines_of(source, tmp_path / "moe")["processor"]
    assert holds, said
    assert "ViTImageProcessor" in said


def test_sentence_transformers_pool_as_before(tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import BertTokenizer

    source = tiny.make(tmp_path / "bert", "BertModel")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]
    (source / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    BertTokenizer.from_pretrained(source).save_pretrained(source)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
    }
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    convert(source, tmp_path / "moe", Recipe.of(moe={**MOE, "target": "upcycled"}))
    assert lines_of(source, tmp_path / "moe")["files"][0]
    sentences = ["the cat sat on the mat", "the dog ate the bone"]
    a, b = (SentenceTransformer(str(f), device="cpu").encode(sentences) for f in (source, tmp_path / "moe"))
    assert abs(a - b).max() < 1e-5
    (tmp_path / "moe" / "1_Pooling" / "config.json").write_text(json.dumps(pooling | {"x": 1}))
    assert lines_of(source, tmp_path / "moe")["files"] == (False, "changed: 1_Pooling/config.json")


def test_everything_that_goes_with_a_model_is_carried_and_no_code_is_run(dense, tmp_path):
    source = Path(shutil.copytree(dense("llama"), tmp_path / "dense"))
    names = ("additional_chat_templates/tool_use.jinja", "processor_config.json", "preprocessor_config.json",
             "tekken.json", "tokenization_own.py", "config_sentence_transformers.json",
             "sentence_bert_config.json", "2_Dense/model.safetensors")  # fmt: skip
    (source / "modules.json").write_text('[{"path": "2_Dense"}, {"path": "../up"}, {"path": 5}, 7]')
    for name in names:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("raise SystemExit(9)" if name.endswith("py") else '{"x": 1}')
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"no")
    convert(source, tmp_path / "moe", Recipe.of(moe=MOE))
    for name in (*names, "modules.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "moe" / "2_Dense" / "pytorch_model.bin").exists()
    record = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert set(names) <= set(record["carried_files"]) & set(record["files"])
    assert lines_of(source, tmp_path / "moe")["files"][0]
    (tmp_path / "moe" / "2_Dense" / "rogue.py").write_text("x")
    assert "2_Dense/rogue.py" in lines_of(source, tmp_path / "moe")["files"][1]
    (source / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UpcycleError, match=r"2_Dense/pytorch_model\.bin is a pickle, .* writes safetensors"):
        convert(source, tmp_path / "lost", Recipe.of(moe=MOE))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("lost")]


def test_the_rules_by_which_tokenizers_are_opened_are_those_of_transformers():
    from transformers.models.auto import tokenization_auto

    known = tokenization_auto.TOKENIZER_MAPPING_NAMES
    always = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

    def rule(model_type: str) -> str:
        name = (known.get(model_type) or "").replace("MistralCommonBackend", "TokenizersBackend")
        return f"{name} always" if model_type in always and name != "TokenizersBackend" else name

    for model_type in families.names():
        family = families.find(model_type)
        if family.natives:
            assert family.tokenizer == rule(model_type), model_type
            for native in family.natives:
                assert natives.find(native).reader == rule(native), native


def test_the_files_of_every_tokenizer_are_carried():
    from transformers.models.auto import tokenization_auto as auto

    types = [*families.names(), *WRAPPERS]
    # A model may come with the tokenizer of another: PhoBERT is a `roberta`.
    names = {found for each in types if (found := auto.TOKENIZER_MAPPING_NAMES.get(each))} | {
        "PhobertTokenizer"
    }
    kinds = [kind for name in sorted(names) if (kind := auto.tokenizer_class_from_name(name))]
    assert len(kinds) > 10
    for file in {file for kind in kinds for file in kind.vocab_files_names.values()}:
        assert any(fnmatchcase(file, pattern) for pattern in carried.CARRIED), file
        assert carried.of_tokenizer([file]), file


def test_transformers_is_imported_beside_the_writing_if_there_is_a_tokenizer(tmp_path, monkeypatch):
    seen, goes_on = [], threading.Event()
    monkeypatch.delitem(sys.modules, "transformers")

    def slow(source):
        seen.append(threading.current_thread())
        goes_on.wait(5)

    monkeypatch.setattr(tokenizer, "_import", slow)
    with tokenizer.imported_beside(tmp_path):
        pass
    assert seen == []
    (tmp_path / "tokenizer.json").write_text("{}")
    with tokenizer.imported_beside(tmp_path):
        threading.Timer(0.2, goes_on.set).start()
    assert [thread.is_alive() for thread in seen] == [False]
    assert seen[0] is not threading.main_thread()
    goes_on.clear()
    with pytest.raises(KeyboardInterrupt), tokenizer.imported_beside(tmp_path):
        raise KeyboardInterrupt
    assert seen[1].is_alive(), "the one who interrupts does not wait"
    goes_on.set()
