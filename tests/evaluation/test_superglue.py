"""SuperGLUE as T5 runs it: prompts and metrics of T5's code and of lm-evaluation-harness, on a small T5."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from conftest import SHARED
from tiny import make
from upcycle import Recipe, UpcycleError, convert
from upcycle.evaluation import superglue, text_to_text
from upcycle.evaluation.comparison import compare
from upcycle.evaluation.scores import ToScore, evaluate, score
from upcycle.evaluation.superglue import TASKS, Example
from upcycle.hf import models

REAL = SHARED / "real" / "tasks"

# One row a task with the hub's fields, and what T5's code makes of it (preprocessors.py and glue_utils.py).
ROWS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "boolq": (
        {"question": "is tea hot", "passage": "Tea -- It is.", "idx": 0, "label": 1},
        "boolq passage: Tea -- It is. question: is tea hot",
        ("True",),
    ),
    "cb": (
        {
            "premise": "Why couldn't he choose his own? Did he think he was helping?",
            "hypothesis": "He was helping", "idx": 0, "label": 1,
        },
        "cb hypothesis: He was helping premise: Why couldn't he choose his own? Did he think he was helping?",
        ("contradiction",),
    ),
    "copa": (
        {
            "premise": "Political violence broke out in the nation.", "question": "effect",
            "idx": 0, "label": 1, "choice1": "Many citizens relocated to the capitol.",
            "choice2": "Many citizens took refuge in other territories.",
        },
        "copa choice1: Many citizens relocated to the capitol. choice2: Many citizens took refuge in other "
        "territories. premise: Political violence broke out in the nation. question: effect",
        ("choice2",),
    ),
    "multirc": (
        {
            "paragraph": "<b>Sent 1: </b>Once upon a time, there was a squirrel named Joey.<br><b>Sent "
            "2: </b>He ran.",
            "question": "Why was Joey surprised?", "answer": "There was a T-REX in his garden", "label": 0,
            "idx": {"paragraph": 5, "question": 22, "answer": 7},
        },
        "multirc question: Why was Joey surprised? answer: There was a T-REX in his garden paragraph: "
        "Sent 1: Once upon a time, there was a squirrel named Joey. Sent 2: He ran.",
        ("False",),
    ),
    "record": (
        {
            "passage": "This is the passage\n@highlight\nIt ends here.\n@highlight\nAnd here",
            "query": "A @placeholder is a bird.", "entities": ["penguin", "potato", "pigeon"],
            "answers": ["penguin", "pigeon"], "idx": {"passage": 1, "query": 2},
        },
        "record query: A @placeholder is a bird. entities: penguin, potato, pigeon passage: This is the "
        "passage. It ends here. And here",
        ("penguin", "pigeon"),
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is dry.", "idx": 0, "label": 1},
        "rte hypothesis: It is dry. premise: It rains.",
        ("not_entailment",),
    ),
    "wic": (
        {
            "word": "deliberation", "sentence1": "It was the deliberation of his act that was insulting .",
            "sentence2": "The deliberations of the jury .", "start1": 11, "end1": 23, "start2": 4, "end2": 17,
            "idx": 0, "label": 0,
        },
        "wic sentence1: It was the deliberation of his act that was insulting . sentence2: The "
        "deliberations of the jury . word: deliberation",
        ("False",),
    ),
    "wsc": (
        {
            "text": "The stable was very roomy, with four good stalls; a large swinging window opened "
            "into the yard , which made it pleasant and airy.",
            "span1_text": "The stable", "span1_index": 0, "span2_text": "it", "span2_index": 20,
            "idx": 0, "label": 1,
        },
        "wsc: The stable was very roomy, with four good stalls; a large swinging window opened into the "
        "yard , which made *it* pleasant and airy.",
        ("The stable",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_rows_are_asked_as_t5_asks_them(kind):
    row, prompt, answers = ROWS[kind]
    found = TASKS[kind].example(row, "row 1")
    assert (found.prompt, found.answers) == (prompt, answers)


def helpers(task: str) -> Any:
    """The harness's own functions for T5's prompts of a task."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    path = Path(lm_eval.__file__).parent / "tasks" / "super_glue" / task / "t5_utils.py"
    spec = importlib.util.spec_from_file_location(f"t5_utils_{task}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_prompts_are_those_of_the_harness(kind):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import jinja2
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(lm_eval.__file__).parent / "tasks" / "super_glue" / kind / "t5-prompt.yaml"
    config = load_yaml(path, resolve_func=True)
    row = dict(ROWS[kind][0])
    if kind == "multirc":  # T5's code takes the markup out, the harness leaves it
        row["paragraph"] = "Sent 1: Once upon a time."
    template = config["doc_to_text"]
    wanted = template(row) if callable(template) else jinja2.Template(template).render(**row)
    assert TASKS[kind].example(row, "row 1").prompt == wanted
    labels = config.get("doc_to_choice")
    if isinstance(labels, list):
        assert TASKS[kind].labels == tuple(labels)


@pytest.mark.parametrize("kind", TASKS)
def test_rows_with_a_field_missing_or_of_another_kind_are_a_sentence(kind):
    """Of every field, with the row; what holds other things than texts, or names no question, too."""
    good = ROWS[kind][0]
    assert superglue.rows_to_examples(kind, [good], "x.jsonl")
    inner = {
        "idx": [{}, {"passage": [], "query": [], "paragraph": [], "question": []}],
        "answers": [[5], []],
        "entities": [[None]],
    }
    for field in TASKS[kind].fields:
        for odd in (
            "missing",
            None,
            [] if not isinstance(good[field], list) else 5,
            2.5,
            *inner.get(field, []),
        ):
            row = {k: v for k, v in good.items() if k != field}
            if odd != "missing":
                row[field] = odd
            with pytest.raises(UpcycleError, match=r"x\.jsonl, row 2"):
                superglue.rows_to_examples(kind, [good, row], "x.jsonl")


def test_pronouns_that_stand_beside_their_index_are_found():
    """Two rows of WSC: the index is one off, and punctuation is stuck to the pronoun."""
    base = {"span1_text": "the pebble", "label": 1}
    text = "He put the pebble in a safe . Some day they might want to use it , but for now, what more?"
    row = {**base, "text": text, "span2_text": "it", "span2_index": text.split(" ").index("use")}
    assert "want to use *it* , but" in TASKS["wsc"].example(row, "row").prompt
    text = 'John laughed out loud. "Good for him," he said. '
    row = {**base, "text": text, "span2_text": "him", "span2_index": 6}
    assert TASKS["wsc"].example(row, "row").prompt.endswith('"Good for *him* ," he said.')
    with pytest.raises(UpcycleError, match="word 1 of its text is not 'him'"):
        TASKS["wsc"].example({**row, "span2_index": 1}, "row")


# Metrics


def asked(kind: str, labels: list[int], questions: list[Any] | None = None) -> list[Example]:
    names = TASKS[kind].labels
    questions = questions or [None] * len(labels)
    return [Example("", (names[n],), n, q) for n, q in zip(labels, questions, strict=True)]


def test_accuracy_counts_what_is_no_label_as_wrong():
    found = text_to_text.metrics_of("boolq", asked("boolq", [1, 0, 1, 1]), ["True", "False", "true", ""])
    assert found["accuracy"].value == 0.5
    assert found["accuracy"].standard_error == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)


def test_cb_is_scikit_learns_macro_f1():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    said = np.where(random.random(60) < 0.6, labels, random.integers(-1, 3, 60))
    names = [*TASKS["cb"].labels, "banana"]
    found = text_to_text.metrics_of("cb", asked("cb", labels.tolist()), [names[n] for n in said])
    assert found["mean_f1"].value == pytest.approx(f1_score(labels, said, labels=[0, 1, 2], average="macro"))
    assert found["accuracy"].value == pytest.approx(np.mean(labels == said))


def test_multirc_is_the_harness_own():
    utils = helpers("multirc")
    random = np.random.default_rng(1)
    labels, questions = random.integers(0, 2, 80), np.sort(random.integers(0, 20, 80))
    said = [str(x) for x in random.choice(["True", "False", "maybe"], 80, p=[0.5, 0.4, 0.1])]
    said[:40] = [("False", "True")[n] for n in labels[:40]]
    examples = asked("multirc", labels.tolist(), questions.tolist())
    found = text_to_text.metrics_of("multirc", examples, said)
    gold = [f"{q}_{('False', 'True')[n]}" for q, n in zip(questions, labels, strict=True)]
    wanted_f1 = utils.agg_f1([utils.f1([s], [g]) for s, g in zip(said, gold, strict=True)])
    wanted_em = utils.agg_em([utils.em([s], [g]) for s, g in zip(said, gold, strict=True)])
    assert found["f1"].value == pytest.approx(wanted_f1)
    assert found["exact_match"].value == pytest.approx(wanted_em)
    assert 0.2 < found["exact_match"].value < 1


def test_record_is_the_harness_own():
    """One question a group, all its answers: the best of them counts."""
    utils = helpers("record")
    texts = ["The Penguin!", "a pigeon of Rome", "nothing", "potato", "Rome's pigeons"]
    answers = [
        ("penguin", "bird"),
        ("pigeon", "the city of Rome"),
        ("x",),
        ("potatoes", "a potato"),
        ("Rome",),
    ]
    examples = [Example("", a, question=(0, i)) for i, a in enumerate(answers)]
    found = text_to_text.metrics_of("record", examples, texts)
    exact, f1 = [], []  # query by query: the harness counts a query once for each of its answers
    for text, several in zip(texts, answers, strict=True):
        exact.append(utils.squad_em_agg([(text, f"0_{answer}") for answer in several]))
        f1.append(max(utils.squad_f1_agg([(text, f"0_{answer}")]) for answer in several))
    assert found["exact_match"].value == pytest.approx(np.mean(exact))
    assert found["f1"].value == pytest.approx(np.mean(f1))
    doubled = text_to_text.metrics_of("record", [*examples, *examples], [*texts, *["potato"] * 5])
    assert doubled["f1"].value == found["f1"].value  # a query is counted once


@pytest.mark.parametrize(
    ("said", "referent"),
    [("The stable", "stable"), ("Bob", "Bob's hat"), ("fuzzy bunny", "the bunny"), ("the dog", "A cat"),
     ("", "it"), ("his father", "Father"), ("Tom and Ann", "Ann")],
)  # fmt: skip
@pytest.mark.parametrize("label", [0, 1])
def test_wsc_is_the_harness_own(said, referent, label):
    wanted = helpers("wsc").process_results({"span1_text": referent, "label": label}, [said])["accuracy"]
    found = text_to_text.metrics_of("wsc", [Example("", (referent,), label)], [said])
    assert found["accuracy"].value == wanted


# A model


def words_of(texts: list[str]) -> list[str]:
    return sorted({word for text in texts for word in text.split()})


def make_tokenizer(folder: Path, words: list[str]) -> Any:
    """A tokenizer of whole words: <pad> is 0, </s> is 1 and stands behind every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.save_pretrained(folder)
    return made


def train(folder: Path, tokenizer: Any, examples: list[Example], steps: int) -> Path:
    """A small T5 that has learned to answer some of the examples."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config).train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = tokenizer([e.prompt for e in examples], padding=True, return_tensors="pt")
    labels = tokenizer([e.answers[0] for e in examples], padding=True, return_tensors="pt").input_ids
    labels[labels == 0] = -100
    for _ in range(steps):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(folder)
    return folder


def alone(folder: Path, prompts: list[str]) -> list[str]:
    """Greedy answers, one prompt at a time, token by token without a cache."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        T5ForConditionalGeneration.from_pretrained(folder),
    )
    out = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=True, max_length=512, return_tensors="pt").input_ids
        said = [0]
        while len(said) < 63 and said[-1] != 1:
            with torch.inference_mode():
                logits = model.eval()(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits
            said.append(int(logits[0, -1].argmax()))
        out.append(tokenizer.decode(said, skip_special_tokens=True))
    return out


def files(folder: Path) -> tuple[Path, dict[str, list[Example]]]:
    """Eight rows of every task, of two or more classes."""
    folder.mkdir()
    out = {}
    for kind, (row, _, _) in ROWS.items():
        rows = []
        for i in range(8):
            label = {"label": i % max(2, len(TASKS[kind].labels))} if "label" in row else {}
            key = {
                "wsc": "span1_text",
                "record": "query",
                "copa": "premise",
                "multirc": "answer",
                "wic": "word",
            }
            changed = {key.get(kind, next(k for k, v in row.items() if isinstance(v, str))): f"thing{i}"}
            idx = (
                {"idx": {**row["idx"], "question": i // 2, "query": i}}
                if isinstance(row["idx"], dict)
                else {}
            )
            rows.append({**row, **changed, **label, **idx})
        if kind == "wsc":
            for i, made in enumerate(rows):
                made["text"] = f"thing{i} {row['text']}"
                made["span2_index"] = 21
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(made) + "\n" for made in rows))
        out[kind] = superglue.rows_to_examples(kind, rows, kind)
    return folder, out


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> tuple[Path, Path, dict[str, list[Example]]]:
    base = tmp_path_factory.mktemp("superglue")
    data, examples = files(base / "data")
    every = [e for several in examples.values() for e in several]
    words = words_of([e.prompt for e in every] + [a for e in every for a in e.answers])
    words += [w for task in TASKS.values() for w in task.labels if w not in words]
    folder = base / "t5"
    return train(folder, make_tokenizer(folder, words), every, steps=60), data, examples


def test_all_eight_tasks_are_scored_as_one_example_at_a_time(t5):
    folder, data, examples = t5
    found = {r["name"]: r for r in evaluate(folder, ToScore(superglue=data))["results"]}
    assert set(found) == {*TASKS, "superglue"}
    means = []
    for kind, several in examples.items():
        said = alone(folder, [e.prompt for e in several])
        wanted = {n: m.value for n, m in text_to_text.metrics_of(kind, several, said).items()}
        mine = {n: m["value"] for n, m in found[kind]["metrics"].items() if n != "rank_accuracy"}
        assert mine == pytest.approx(wanted)
        means.append(np.mean(list(wanted.values())))
    assert found["superglue"]["metrics"]["score"]["value"] == pytest.approx(np.mean(means))
    assert np.mean(means) > 0.4  # it has learned something


def test_ranks_are_by_the_likelihood_of_the_whole_answer(t5):
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    folder, data, examples = t5
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        T5ForConditionalGeneration.from_pretrained(folder),
    )
    found = {r["name"]: r["metrics"] for r in evaluate(folder, ToScore(superglue=data))["results"]}
    for kind in ("cb", "multirc"):
        right = []
        for example in examples[kind]:
            ids = tokenizer(example.prompt, return_tensors="pt").input_ids
            losses = []
            for label in TASKS[kind].labels:
                answer = tokenizer(label, return_tensors="pt").input_ids
                with torch.inference_mode():
                    losses.append(float(model(input_ids=ids, labels=answer).loss) * answer.numel())
            right.append(int(np.argmin(losses)) == example.label)
        assert found[kind]["rank_accuracy"]["value"] == pytest.approx(np.mean(right))
    assert "rank_accuracy" not in found["record"]


def test_a_prompt_is_cut_at_its_end_to_what_the_model_reads(t5, tmp_path, monkeypatch):
    """As T5 cuts it to 512 tokens: the name of the task and the EOS stay."""
    folder, _, examples = t5
    monkeypatch.setattr("upcycle.evaluation.text_to_text.TARGET", 4)
    bart = make(tmp_path / "bart", "BartForConditionalGeneration", vocab_size=300, max_position_embeddings=6)
    for path in folder.glob("tokenizer*"):
        shutil.copy(path, bart)
    tokenizer, model = AutoTokenizer.from_pretrained(bart), models.open(bart).eval()
    rows = (t5[1] / "cb.jsonl").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cb.jsonl").write_text(rows)
    right = []
    for example in examples["cb"]:
        whole = tokenizer(example.prompt).input_ids
        ids = torch.tensor([[*whole[:5], whole[-1]]])
        assert len(whole) > 6
        with torch.inference_mode():
            losses = [
                float(model(input_ids=ids, labels=answer).loss) * answer.numel()
                for label in TASKS["cb"].labels
                for answer in [tokenizer(label, return_tensors="pt").input_ids]
            ]
        right.append(int(np.argmin(losses)) == example.label)
    (found,) = evaluate(bart, ToScore(superglue=tmp_path / "data"))["results"]
    assert found["metrics"]["rank_accuracy"]["value"] == pytest.approx(np.mean(right))


def test_dense_and_upcycled_are_paired(t5, tmp_path):
    folder, data, _ = t5
    convert(folder, tmp_path / "moe", Recipe.of(moe={"target": "upcycled", "num_experts": 4}))
    rows = compare([score(f, ToScore(superglue=data)) for f in (folder, tmp_path / "moe")]).differences
    assert {row.name for row in rows} == set(TASKS)
    assert {(row.difference, row.standard_error) for row in rows} == {(0.0, 0.0)}
    assert {row.units for row in rows} == {"examples", "questions", "queries"}


@pytest.mark.slow
def test_real_boolq_and_copa(tmp_path):
    """The real rows, a T5 that learned some of them."""
    if not REAL.is_dir():
        pytest.skip(f"the files of the tasks are not at {REAL}")
    (tmp_path / "data").mkdir()
    examples = {}
    for kind in ("boolq", "copa"):
        lines = (REAL / f"{kind}.jsonl").read_text().splitlines()[:6]
        (tmp_path / "data" / f"{kind}.jsonl").write_text("\n".join(lines))
        from upcycle.evaluation import task_files

        rows = task_files.rows(tmp_path / "data" / f"{kind}.jsonl", kind)
        examples[kind] = superglue.rows_to_examples(kind, rows, kind)
    first = examples["copa"][0]
    assert first.prompt == (
        "copa choice1: The toilet filled with water. choice2: Water flowed from the spout. premise: The "
        "man turned on the faucet. question: effect"
    )
    assert first.answers == ("choice2",)
    assert examples["boolq"][0].prompt.startswith("boolq passage: All biomass goes through")
    assert examples["boolq"][0].prompt.endswith("question: does ethanol take more energy make that produces")
    every = [e for several in examples.values() for e in several]
    labels = [label for kind in examples for label in TASKS[kind].labels]
    words = sorted({*words_of([e.prompt for e in every]), *labels})
    folder = tmp_path / "t5"
    train(folder, make_tokenizer(folder, words), every, steps=40)
    found = {
        r["name"]: r["metrics"] for r in evaluate(folder, ToScore(superglue=tmp_path / "data"))["results"]
    }
    for kind, several in examples.items():
        said = alone(folder, [e.prompt for e in several])
        right = np.mean([text in e.answers for text, e in zip(said, several, strict=True)])
        assert found[kind]["accuracy"]["value"] == pytest.approx(right)
        assert right > 0.6  # it has learned them


def test_mistakes(t5, tmp_path):
    folder, data, _ = t5

    def refused(message: str, where: Path, model: Path = folder) -> None:
        with pytest.raises(UpcycleError, match=message):
            evaluate(model, ToScore(superglue=where))

    refused("no folder", tmp_path / "nowhere")
    refused("has no file of SuperGLUE; it should have some of boolq.jsonl", tmp_path)
    for row, message in (
        ({"premise": "a", "hypothesis": "b"}, "row 1 has no label"),
        ({"premise": "a", "hypothesis": "b", "label": -1}, "allowed: 0 to 1"),
        ({"premise": "a", "hypothesis": 3, "label": 0}, "is not a row as the hub's"),
    ):
        (tmp_path / "rte.jsonl").write_text(json.dumps(row))
        refused(message, tmp_path)
    from tiny import make_bytes_tokenizer, make_dense

    decoder = make_dense(tmp_path / "llama", "llama", vocab_size=300)
    make_bytes_tokenizer(decoder)
    refused("is no encoder-decoder", data, decoder)
