"""Tasks of lm-evaluation-harness on local files: its prompts, its numbers, on our model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import SHARED
from marks import quick
from tiny import make, make_bytes_tokenizer, make_dense
from upcycle import Recipe, UpcycleError, convert
from upcycle.cli import main
from upcycle.data import corpus
from upcycle.data.feeding import Feeding
from upcycle.dense.subject import Subject
from upcycle.evaluation import task_files
from upcycle.evaluation.comparison import compare
from upcycle.evaluation.language_model import LanguageModel, Pair
from upcycle.evaluation.no_numbers import NoNumbersError
from upcycle.evaluation.scores import ToScore, evaluate, score
from upcycle.hf import models
from upcycle.tasks.span_corruption import SpanCorruption

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upcycle[eval]'")

REAL = SHARED / "real" / "tasks"

# Rows as the hub's data sets have them, and the same in the form of query, choices and gold.
HUB: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"question": f"Which is number {i}?", "choices": {"text": ["one", "two", "three"][: 2 + i % 2],
         "label": ["A", "B", "C"][: 2 + i % 2]}, "answerKey": "AB"[i % 2]}
        for i in range(6)
    ],
    "piqa": [
        {"goal": f"To open a door {i} ", "sol1": "Push it.", "sol2": "Pull the handle down.", "label": i % 2}
        for i in range(6)
    ],
    "copa": [
        {"premise": f"The man {i} fell.", "question": ("cause", "effect")[i % 2], "choice1": "I pushed him.",
         "choice2": "He got up.", "label": i // 3}
        for i in range(6)
    ],
    "boolq": [
        {"passage": f"Tea {i} is hot.\nQuestion: none.", "question": "is tea hot", "label": i % 2}
        for i in range(6)
    ],
    "lambada_openai": [{"text": f"He had {i} of them and\nshe had none of\nthem"} for i in range(6)],
    "blimp_wh_island": [
        {"sentence_good": f"Who sees {i}?", "sentence_bad": f"Sees who {i}?", "UID": "wh_island"}
        for i in range(6)
    ],
}  # fmt: skip


def common(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A hub's row as preparers of evaluation data write it."""
    if task == "arc_easy":
        gold = row["choices"]["label"].index(row["answerKey"])
        return {"query": f"Question: {row['question']}", "choices": row["choices"]["text"], "gold": gold}
    if task == "piqa":
        return {
            "query": f"Question: {row['goal']}\n",
            "choices": [row["sol1"], row["sol2"]],
            "gold": row["label"],
        }
    if task == "copa":
        end = {"cause": ", because", "effect": ", therefore"}[row["question"]]
        choices = [c[0].lower() + c[1:] for c in (row["choice1"], row["choice2"])]
        return {"query": row["premise"][:-1] + end, "choices": choices, "gold": row["label"]}
    if task == "boolq":
        query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
        return {"query": query, "choices": ["no", "yes"], "gold": row["label"]}
    if task == "lambada_openai":
        context, _, last = row["text"].rpartition(" ")
        return {"context": context, "continuation": last}
    return row


def write(folder: Path, *, as_hub: bool) -> Path:
    (folder / "blimp").mkdir(parents=True)
    for task, rows in HUB.items():
        made = rows if as_hub else [common(task, row) for row in rows]
        path = folder / f"{task}.jsonl"
        if task.startswith("blimp_"):
            path = folder / "blimp" / f"{task.removeprefix('blimp_')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    second = [{**row, "sentence_good": row["sentence_bad"], "sentence_bad": row["sentence_good"]} for row in
              HUB["blimp_wh_island"][:3]]  # fmt: skip
    (folder / "blimp" / "passive_1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in second))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The tasks' files in both forms."""
    base = tmp_path_factory.mktemp("tasks")
    return write(base / "hub", as_hub=True), write(base / "common", as_hub=False)


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory) -> Path:
    folder = make_dense(
        tmp_path_factory.mktemp("model") / "dense", "llama", vocab_size=300, max_position_embeddings=400
    )
    make_bytes_tokenizer(folder)
    return folder


def language(folder: Path, **options: Any) -> LanguageModel:
    config = json.loads((folder / "config.json").read_text())
    subject = Subject(folder=folder, config=config)
    return LanguageModel.of(models.open(folder), corpus.read_tokenizer(folder), subject, **options)


def theirs(folder: Path, **options: Any) -> Any:
    """The harness's own model of transformers."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=models.open(folder), tokenizer=tokenizer, batch_size=2, **options)


def loaded(task: str, folder: Path) -> Any:
    from upcycle.evaluation import harness

    made = harness._local(task_files.find(folder, (task,)))
    return made[task]


# Prompts


def requests(task: Any) -> list[tuple[Any, ...]]:
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(rank=0, world_size=1)
    return [(request.doc_id, request.idx, *request.args) for request in task.instances]


@pytest.mark.parametrize("name", sorted(HUB))
def test_prompts_are_the_harness_own(name, folders):
    """Its templates over the hub's rows, rendered here; both forms of a file give the same requests."""
    import jinja2

    hub, other = (requests(loaded(name, folder)) for folder in folders)
    assert hub == other
    config = loaded(name, folders[0]).config
    wanted = []
    for number, row in enumerate(HUB[name]):
        if name == "copa":
            word = {"cause": "because", "effect": "therefore"}[row["question"]]
            prompt = f"{row['premise'][:-1]} {word}"
            choices = [" " + c[0].lower() + c[1:] for c in (row["choice1"], row["choice2"])]
            choices = [f" {choice}" for choice in choices]  # its blank and the delimiter of every task
        elif name == "lambada_openai":
            prompt, _, last = row["text"].rpartition(" ")
            choices = [f" {last}"]
        elif name.startswith("blimp"):
            prompt, choices = "", [f" {row[key]}" for key in ("sentence_good", "sentence_bad")]
        else:
            prompt = jinja2.Template(config.doc_to_text, keep_trailing_newline=True).render(**row)
            choices = {
                "arc_easy": lambda row=row: row["choices"]["text"],
                "piqa": lambda row=row: [row["sol1"], row["sol2"]],
                "boolq": lambda: ["no", "yes"],
            }[name]()
            choices = [f" {choice}" for choice in choices]
        wanted += [(number, place, prompt, choice) for place, choice in enumerate(choices)]
    assert hub == wanted


@pytest.mark.parametrize(
    ("name", "prompt", "target"),
    [
        ("arc_easy", "Question: {question}\nAnswer:", "answerKey"),
        ("piqa", "Question: {goal}\nAnswer:", "label"),
        ("boolq", "{passage}\nQuestion: {question}?\nAnswer:", "label"),
        ("copa", None, None),
        ("lambada_openai", "{text.split(' ')[:-1]|join(' ')}", "text"),
        ("blimp_wh_island", "", 0),
    ],
)
def test_configs_are_those_of_the_installed_package(name, prompt, target, folders):
    """Nothing of a task is ours but where its rows come from."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from upcycle.evaluation import harness

    manager: TaskManager = harness._manager([name])
    stored = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
    used = loaded(name, folders[0]).config
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "output_type", "num_fewshot"):
        if key in stored and not callable(stored[key]):
            assert getattr(used, key) == stored[key]
        elif key in stored:
            assert getattr(used, key).__name__ == stored[key].__name__
    assert [m["metric"] for m in used.metric_list] == [m["metric"] for m in stored["metric_list"]]
    if prompt is not None:
        assert stored["doc_to_text"].replace("{{", "{").replace("}}", "}") == prompt
    if target is not None:
        assert str(target) in str(stored["doc_to_target"])


def test_an_exam_that_is_asked_again_is_the_same(dense_model, folders):
    """The examples before its questions are drawn anew at each score, from one seed."""
    from upcycle.evaluation import harness

    names = ("arc_easy", "lambada_openai")
    asked, fresh = (harness.exam(names, folders[0], shots=2, limit=4) for _ in range(2))
    model = language(dense_model)
    first, second, other = (
        [each.as_json() for each in harness.score(model, exam)] for exam in (asked, asked, fresh)
    )
    assert first == second == other


def test_few_shot_examples_are_others_of_the_file(folders):
    task = loaded("arc_easy", folders[1])
    task.set_config(key="num_fewshot", value=2)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(rank=0, world_size=1)
    for request in task.instances:
        questions = [line for line in request.args[0].split("\n") if line.startswith("Question: ")]
        assert len(questions) == len(set(questions)) == 3
        assert request.args[0].endswith(f"Question: Which is number {request.doc_id}?\nAnswer:")


# Numbers


def test_numbers_are_those_of_the_harness_own_model(dense_model, folders):
    """Values and standard errors of every task, from its model of transformers in batches of two."""
    from upcycle.evaluation import harness

    found = {
        r.name: r
        for r in harness.score(language(dense_model), harness.exam((), folders[1], shots=1, limit=0))
    }
    tasks = harness._local(task_files.find(folders[1], ()))
    for task in tasks.values():
        harness._set_shots(task, 1)
    wanted = lm_eval.evaluate(theirs(dense_model), {"tasks": tasks}, bootstrap_iters=2)
    assert set(found) == {*wanted["results"], "blimp"}
    for name, metrics in wanted["results"].items():
        mine = found[name].metrics
        assert {f"{metric},none" for metric in mine} <= set(metrics)
        for metric, value in mine.items():
            assert value.value == pytest.approx(metrics[f"{metric},none"], rel=1e-5)
            assert value.higher_is_better == (metric != "perplexity")
            if metric != "perplexity":  # theirs is drawn
                assert value.standard_error == pytest.approx(metrics[f"{metric}_stderr,none"])
        assert found[name].data["num_fewshot"] == wanted["n-shot"][name] == (not name.startswith("blimp"))
    logs = [s["perplexity"] for s in wanted["samples"]["lambada_openai"]]
    perplexity = found["lambada_openai"].metrics["perplexity"]
    assert perplexity.standard_error == pytest.approx(np.exp(-np.mean(logs)) * stats.sem(logs), rel=1e-4)


def test_blimp_is_the_mean_of_its_paradigms(dense_model, folders):
    """The harness's group does not weigh paradigms by size either."""
    found = evaluate(dense_model, ToScore(tasks=("blimp",), task_files=folders[1]))["results"]
    parts = {r["name"]: r["metrics"]["acc"] for r in found}
    whole = parts.pop("blimp")
    assert set(parts) == {"blimp_passive_1", "blimp_wh_island"}
    assert whole["value"] == pytest.approx(np.mean([p["value"] for p in parts.values()]))
    errors = [p["standard_error"] for p in parts.values()]
    assert whole["standard_error"] == pytest.approx(np.hypot(*errors) / 2)
    values = [r["part_of"] for r in found[:-1]]
    assert values == ["blimp", "blimp"]


@pytest.mark.parametrize(
    "name",
    quick(
        ["arc_easy", "piqa", "copa", "boolq", "lambada_openai", "blimp_wh_island"],
        "copa", "lambada_openai", "blimp_wh_island",
    ),
)  # fmt: skip
def test_real_numbers_are_those_of_the_harness_own_model(name, stories):
    from upcycle.evaluation import harness

    if not REAL.is_dir():
        pytest.skip(f"the files of the tasks are not at {REAL}")
    limit = 3 if name == "boolq" else 12
    (found,) = harness.score(language(stories), harness.exam((name,), REAL, shots=None, limit=limit))
    task = loaded(name, REAL)
    harness._set_shots(task, None)
    wanted = lm_eval.evaluate(theirs(stories), {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    metrics = wanted["results"][name]
    for metric, value in found.metrics.items():
        assert value.value == pytest.approx(metrics[f"{metric},none"], rel=1e-4)


def test_likelihoods_and_texts_are_those_of_the_harness_own_model(dense_model):
    from lm_eval.api.instance import Instance

    from upcycle.evaluation.harness_model import HarnessModel

    ours, other = HarnessModel(language(dense_model)), theirs(dense_model)
    asked = [
        ("Once upon", " a time"),
        ("", "no context"),
        ("ends in a blank ", "and goes on"),
        ("x" * 420, "yz"),
    ]
    pairs = [Instance("loglikelihood", {}, (a, b), 0) for a, b in asked]
    for (mine, greedy), (wanted, same) in zip(
        ours.loglikelihood(pairs), other.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert (mine, greedy) == (pytest.approx(wanted, rel=1e-5), same)
    rolling = [Instance("loglikelihood_rolling", {}, (s,), 0) for s in ("short", "a long one, " * 60)]
    # Theirs would score the BOS that the tokenizer puts before a text.
    plain = theirs(dense_model, add_bos_token=False)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        plain.loglikelihood_rolling(rolling), rel=1e-5
    )
    how = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = [Instance("generate_until", {}, (s, how), 0) for s in ("Once upon a time", "x", "a b c d e f")]
    assert ours.generate_until(prompts) == other.generate_until(prompts, disable_tqdm=True)
    sampled = [Instance("generate_until", {}, ("x", {"do_sample": True, "temperature": 0.7}), 0)]
    with pytest.raises(UpcycleError, match="sampled text"):
        ours.generate_until(sampled)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("T5ForConditionalGeneration", {}), ("BartForConditionalGeneration", {"max_position_embeddings": 32})],
)
def test_an_encoder_decoder_is_scored_as_the_harness_own_model_scores_it(architecture, sizes, tmp_path):
    from lm_eval.api.instance import Instance

    from upcycle.evaluation.harness_model import HarnessModel

    folder = make(tmp_path / "model", architecture, vocab_size=300, eos_token_id=2, **sizes)
    make_bytes_tokenizer(folder)
    asked = ("Once upon", "a time"), ("a longer context" * 3, "b")
    pairs = [Instance("loglikelihood", {}, each, 0) for each in asked]
    ours, other = HarnessModel(language(folder)), theirs(folder, backend="seq2seq")
    for (mine, greedy), (wanted, same) in zip(
        ours.loglikelihood(pairs), other.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert (mine, greedy) == (pytest.approx(wanted, rel=1e-5), same)


def test_an_encoder_decoder_reads_the_ends_of_what_is_too_long(tmp_path):
    """The end of a prompt, and that of a continuation without anything between it and its context."""
    folder = make(
        tmp_path / "bart", "BartForConditionalGeneration", vocab_size=300, max_position_embeddings=32
    )
    make_bytes_tokenizer(folder)
    model = language(folder)
    long = [3 + i % 200 for i in range(50)]
    ids = model.model.generate(torch.tensor([long[-32:]]), max_new_tokens=32, do_sample=False, num_beams=1)
    wanted = model.tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    assert wanted
    assert model.generate([long, long[:5]], most=32)[0] == wanted
    with pytest.raises(UpcycleError, match="33 tokens are to be generated and the model has 32 positions"):
        model.generate([long], most=33)
    (found,) = model.likelihoods([Pair(long[:5], long)])
    with torch.inference_mode():
        loss = model.model(input_ids=torch.tensor([long[:5]]), labels=torch.tensor([long[-32:]])).loss
    assert found.nats.mean() == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_a_model_that_gives_nan_has_no_likelihood_and_no_text(architecture, tmp_path):
    folder = make(tmp_path / "model", architecture, vocab_size=300)
    make_bytes_tokenizer(folder)
    broken = language(folder)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[7, 0] = math.nan
    with pytest.raises(NoNumbersError, match="model gives NaN where a score needs numbers"):
        broken.likelihoods([Pair([3, 4], [5])])
    with pytest.raises(NoNumbersError, match="model gives NaN where a score needs numbers"):
        broken.generate([[3, 4]], most=2)


# Dense and Mixture of Experts


def test_a_copy_differs_by_nothing(stories, tmp_path):
    if not REAL.is_dir():
        pytest.skip(f"the files of the tasks are not at {REAL}")
    convert(stories, tmp_path / "moe", Recipe.of())
    asked = ToScore(tasks=("arc_easy", "blimp_wh_island"), task_files=REAL, limit=10)
    rows = compare([score(folder, asked) for folder in (stories, tmp_path / "moe")]).differences
    assert {(row.name, row.metric) for row in rows} == {
        ("arc_easy", "acc"), ("arc_easy", "acc_norm"), ("blimp_wh_island", "acc"),
    }  # fmt: skip
    assert {(row.difference, row.standard_error, row.count) for row in rows} == {(0.0, 0.0, 10)}


def test_an_upcycled_model_is_asked_like_any_other(dense_model, folders, tmp_path):
    """Routers read no padding, so that batches of any size say the same."""
    moe = {"target": "upcycled", "num_experts": 4}
    convert(dense_model, tmp_path / "moe", Recipe.of(moe=moe, init={"name": "drop", "ratio": 0.5}))
    asked = {"tasks": ("arc_easy", "blimp"), "task_files": folders[1]}
    scored = [score(dense_model, ToScore(**asked)), score(tmp_path / "moe", ToScore(**asked))]
    for row in compare(scored).differences:
        one, two = (next(r for r in s.results if r.name == row.name).metrics[row.metric] for s in scored)
        assert row.difference == pytest.approx(two.value - one.value)
    pairs = [Pair([1, 5, 6], [7, 8]), Pair([1, 9], [10, 11, 12, 13]), Pair([1], [14])]
    together = language(tmp_path / "moe").likelihoods(pairs)
    alone = language(tmp_path / "moe", batch_size=1).likelihoods(pairs)
    for one, two in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.nats, two.nats, rtol=1e-4)


def test_the_command(dense_model, folders, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(dense_model, tmp_path / "dense")
    main(
        [
            "eval",
            str(folder),
            "--tasks",
            "arc_easy,blimp",
            "--task-files",
            str(folders[1]),
            "--num-fewshot",
            "2",
        ]
    )
    shown = capsys.readouterr().out
    assert "arc_easy" in shown
    assert "wh_island" not in shown  # the mean of the paradigms is
    entries = {entry["name"]: entry for entry in json.loads((folder / "eval.json").read_text())["results"]}
    assert set(entries) == {"arc_easy", "blimp_wh_island", "blimp_passive_1", "blimp"}
    assert entries["arc_easy"]["data"]["num_fewshot"] == 2
    assert entries["arc_easy"]["versions"]["lm_eval"] == lm_eval.__version__
    assert set(entries["arc_easy"]["metrics"]["acc_norm"]) == {"value", "standard_error", "higher_is_better"}


# Mistakes


def test_missing_files_and_unknown_tasks(dense_model, folders, tmp_path):
    def refused(message: str, **asked: Any) -> None:
        with pytest.raises(UpcycleError, match=message):
            evaluate(dense_model, ToScore(**asked))

    refused(r"has no winogrande\.jsonl for the task winogrande", tasks=("winogrande",), task_files=folders[0])
    refused("no folder", tasks=("piqa",), task_files=tmp_path / "nowhere")
    refused("holds no task files", tasks=("piqa",), task_files=tmp_path)
    refused(r"has no task blimp_wh_iland; near it are blimp_wh_island", tasks=("blimp_wh_iland",))
    refused(
        r"data set of the task arc_easy cannot be fetched .*--task-files FOLDER, .* eval\.task_files",
        tasks=("arc_easy",),
    )
    for line, message in (
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is not a JSON object"),
        ('{"query": "What?", "choices": ["a", "b"], "gold": 0}', "should begin with 'Question: '"),
        ('{"query": "Question: x\\n", "choices": ["a"], "gold": 0}', "line 1 is not a row of piqa"),
        ("", "holds no rows"),
    ):
        (tmp_path / "piqa.jsonl").write_text(line)
        refused(message, tasks=("piqa",), task_files=tmp_path)


HUB_ROW = {task: rows[0] for task, rows in HUB.items() if not task.startswith("blimp")}


@pytest.mark.parametrize("task", HUB_ROW)
@pytest.mark.parametrize("odd", quick(["missing", None, [], 2**70, "common"], "missing", 2**70))
def test_a_row_with_a_field_missing_or_of_another_kind_is_a_sentence(task, odd, dense_model, tmp_path):
    """Of every field; with the task, and the line or example."""
    good = HUB_ROW[task] if odd != "common" else common(task, HUB_ROW[task])
    path = tmp_path / f"{task}.jsonl"
    for field in good:
        row = {k: v for k, v in good.items() if k != field}
        if odd not in ("missing", "common"):
            row[field] = odd
        path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(UpcycleError) as said:
            evaluate(dense_model, ToScore(tasks=(task,), task_files=tmp_path))
        assert "line 2" in str(said.value) or f"task {task}, example 2" in str(said.value)


@pytest.mark.slow
def test_rows_of_a_task_that_is_not_known_here(dense_model, tmp_path):
    """The harness's own templates fail on them in ways of their own."""
    (tmp_path / "winogrande.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(UpcycleError, match="winogrande"):
        evaluate(dense_model, ToScore(tasks=("winogrande",), task_files=tmp_path))
    (tmp_path / "piqa.jsonl").write_text(json.dumps({**HUB["piqa"][0], "label": 9}) + "\n")
    with pytest.raises(UpcycleError, match=r"line 1: 'label' is 9; in a row of piqa it is 0 to 1"):
        evaluate(dense_model, ToScore(tasks=("piqa",), task_files=tmp_path))


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"goal": ' + "[" * 100_000, "nested too deep|is not JSON"), ('{"goal": "\\ud800"}', "lone surrogate")],
    ids=["deep", "surrogate"],
)
def test_json_that_is_no_row(line, said, dense_model, tmp_path):
    (tmp_path / "piqa.jsonl").write_text(line)
    with pytest.raises(UpcycleError, match=f"line 1 .*({said})"):
        evaluate(dense_model, ToScore(tasks=("piqa",), task_files=tmp_path))


@pytest.mark.usefixtures("on_screen")
def test_a_continuation_longer_than_the_model_reads_loses_its_first_tokens(tmp_path, capsys):
    """It is scored by the rest of it, counted and named."""
    folder = make_dense(tmp_path / "dense", "llama", vocab_size=300, max_position_embeddings=24)
    make_bytes_tokenizer(folder)
    rows = [
        {"goal": "Go", "sol1": "Yes.", "sol2": "No.", "label": 0},
        {"goal": "Go", "sol1": "x" * 40, "sol2": "No.", "label": 1},
    ]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = evaluate(folder, ToScore(tasks=("piqa",), task_files=tmp_path))["results"]
    assert (result["examples"], result["continuations_shortened"]) == (2, 1)
    said = " ".join(capsys.readouterr().err.split())
    assert "piqa: in 1 of 2 examples a continuation is longer than the 24 tokens" in said
    model = language(folder)
    ids = list(range(10, 50))
    (cut,) = model.likelihoods([Pair([1, 5], ids)])
    (rest,) = model.likelihoods([Pair(ids[15:16], ids[16:])])
    assert len(cut.nats) == 24
    assert np.array_equal(cut.nats, rest.nats)
    (tmp_path / "piqa.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (result,) = evaluate(folder, ToScore(tasks=("piqa",), task_files=tmp_path))["results"]
    assert "continuations_shortened" not in result


def test_without_the_harness_a_sentence_says_how_to_get_it(dense_model, folders, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "upcycle.evaluation.harness", raising=False)
    monkeypatch.delattr("upcycle.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UpcycleError, match=r"pip install 'upcycle\[eval\]'"):
        evaluate(dense_model, ToScore(tasks=("piqa",), task_files=folders[0]))


def test_a_class_without_likelihoods(tmp_path, folders):
    folder = make(tmp_path / "bert", "BertForMaskedLM")
    with pytest.raises(UpcycleError, match="gives no text a likelihood"):
        evaluate(folder, ToScore(tasks=("piqa",), task_files=folders[0]))
    folder = make(tmp_path / "whisper", "WhisperForConditionalGeneration")
    for asked in (ToScore(tasks=("piqa",), task_files=folders[0]), ToScore(text=folders[0] / "piqa.jsonl")):
        with pytest.raises(UpcycleError, match="reads sound and no text"):
            evaluate(folder, asked)
    feeding = Feeding.of_file(folders[0] / "piqa.jsonl", length=16, cache=tmp_path)
    with pytest.raises(UpcycleError, match="reads sound and no text"):
        SpanCorruption().feed(feeding, Subject.of(folder))
