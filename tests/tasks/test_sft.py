"""Fine-tuning on chats: which tokens have a loss, a run from start to export, and its score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import upcycle
from chats import ALPHABET, CHATML, FORGETFUL, MARKED, byte_tokenizer, turns, write
from upcycle import UpcycleError, tasks
from upcycle.data.chats import chat_of
from upcycle.data.corruption import IGNORED
from upcycle.data.feeding import Feeding
from upcycle.dense.subject import Subject
from upcycle.evaluation.scores import ToScore, evaluate
from upcycle.hf.chat_templates import Template
from upcycle.tasks._chat_tokens import tokens_of
from upcycle.training import saving
from upcycle.training.export import export
from upcycle.training.exports import _endings
from upcycle.training.loop import train
from upcycle.training.metrics import read
from upcycle.training.run import Run

TODAY = date(2024, 7, 26)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CHATS: list[dict[str, Any]] = [
    {"messages": turns("Hi?", "Yes.", "  And \n", "Näh, 🙂!\n", system="Be brief.")},
    {"messages": turns("assistant\nYes.", "Yes.")},
    {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    },
]


def told(rows: list[dict[str, Any]]) -> Iterator[Any]:
    return (chat_of(row, f"row {i}") for i, row in enumerate(rows))


def test_marks_are_those_of_transformers(tmp_path):
    tokenizer = byte_tokenizer(tmp_path, MARKED)
    for row, found in zip(CHATS, tokens_of(told(CHATS), tokenizer, TODAY), strict=True):
        wanted = tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        assert found.ids.tolist() == wanted["input_ids"]
        assert found.answers.tolist() == [bool(x) for x in wanted["assistant_masks"]]
        assert 0 < found.answers.sum() < len(found)


def test_marks_in_real_questions(stories):
    """The tokens of a trained model's tokenizer cross words and blanks; two questions and answers a chat."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = MARKED
    with (stories.parent / "tasks" / "arc_easy.jsonl").open() as file:
        asked = [json.loads(line) for line in islice(file, 60)]
    said = [(row["query"], row["choices"][row["gold"]]) for row in asked]
    rows = [{"messages": turns(*one, *two)} for one, two in zip(said[::2], said[1::2], strict=True)]
    for row, found in zip(rows, tokens_of(told(rows), tokenizer, TODAY), strict=True):
        wanted = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert found.ids.tolist() == wanted["input_ids"]
        assert found.answers.tolist() == [bool(x) for x in wanted["assistant_masks"]]


def test_without_marks_an_answer_is_what_it_adds_after_the_prompt(tmp_path):
    tokenizer = byte_tokenizer(tmp_path, CHATML)
    (found,) = tokens_of(told(CHATS[:1]), tokenizer, TODAY)
    parts = [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n", 0),
        ("<|im_start|>assistant\n", 0),
        ("Yes.<|im_end|>\n", 1),
        ("<|im_start|>user\n  And \n<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Näh, 🙂!\n<|im_end|>\n", 1),
    ]  # fmt: skip
    pieces = [(tokenizer(text, add_special_tokens=False).input_ids, bool(of)) for text, of in parts]
    assert found.ids.tolist() == [i for ids, _ in pieces for i in ids]
    assert found.answers.tolist() == [of for ids, of in pieces for _ in ids]


def test_blanks_at_the_end_of_a_mark_are_not_the_rest_of_the_chat(tmp_path):
    """transformers marks a row to its end if offsets are trimmed and a mark ends with a blank."""
    from tokenizers import processors

    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }} \n"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(tmp_path, template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (found,) = tokens_of(told([{"messages": turns("a", "b", "c", "d")}]), tokenizer, TODAY)
    words = tokenizer.convert_ids_to_tokens(found.ids.tolist())
    assert "".join(words) == "aĊĠbĠĊcĊĠdĠĊ"
    assert [bool(x) for x in found.answers] == [False] * 2 + [True] * 4 + [False] * 2 + [True] * 4


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (FORGETFUL, turns("a", "b", "c", "d"), "does not mark the assistant's messages, and writes earlier"),
        ("{{ raise_exception('No system here') }}", turns("a", "b"), "refuses the chat: No system here"),
        ("{{ 1 + }}", turns("a", "b"), "the chat template refuses the chat: "),
        ("{{ messages[0].content }}", turns("a", "b"), "shows nothing of the assistant's messages"),
        ("{% generation %}{% endgeneration %}a", turns("a", "b"), "shows nothing of the assistant's"),
        ("{{ messages[0]['role'] }}: {{ messages[-1].content }}", turns("a", "b")[1:], "row 0 begins with"),
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), turns("a", "b"), "one, which ends in .*k>"),
        (CHATML.replace("\n{{", ": {{"), turns("a", "b")[1:], "begins this answer otherwise than its"),
        ({"a": CHATML, "b": CHATML}, turns("a", "b"), "no chat template for these chats"),
    ],
)  # fmt: skip
def test_templates_that_do_not_do(template, messages, message, tmp_path):
    tokenizer = byte_tokenizer(tmp_path, None)
    tokenizer.chat_template = template
    with pytest.raises(UpcycleError, match=message):
        tokens_of(told([{"messages": messages}]), tokenizer, TODAY)


# ChatML with generation marks and a place before the messages, and for what follows an answer.
PARTS = (
    "%s{%% for m in messages %%}{{ m.role }}: {%% if m.role == 'assistant' %%}{%% generation %%}"
    "{{ m.content }}%s</s>{%% endgeneration %%}{%% else %%}{{ m.content }}{%% endif %%}\n{%% endfor %%}"
)
TOLD = "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
CALLED = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
INSTEAD = "{% if not m.content %}" + CALLED + "{% endif %}"
NEEDED = "{% if not m.content and not m.tool_calls %}{{ raise_exception('empty') }}{% endif %}"


@pytest.mark.parametrize(
    ("parts", "left_out"),
    [
        ((TOLD, CALLED), None),
        ((TOLD, CALLED + NEEDED), None),
        (("", ""), "row 1: the chat template leaves out what message 2 calls .tool_calls"),
        ((TOLD, ""), "row 1: the chat template leaves out what message 2 calls .tool_calls"),
        (("", CALLED), "row 1: the chat template leaves out the tools of the chat"),
        ((TOLD, INSTEAD), "row 2: the chat template leaves out what message 2 calls .tool_calls"),
    ],
)
def test_tools_and_calls_that_a_template_leaves_out(parts, left_out, tmp_path):
    """The calls of the last chat stand beside content. The name is in each text, whether called or not."""
    asked = {"role": "user", "content": "Please sum up 1 and 1!"}
    _, call, *rest = CHATS[2]["messages"]
    rows = [
        {"messages": turns("add", "b")},
        {**CHATS[2], "messages": [asked, call, *rest]},
        {**CHATS[2], "messages": [asked, {**call, "content": "sum"}, *rest]},
    ]
    tokenizer = byte_tokenizer(tmp_path, PARTS % parts)
    if left_out is None:
        plain, call, both = tokens_of(told(rows), tokenizer, TODAY)
        assert tokenizer.decode(call.ids[call.answers]) == "add</s>2</s>"
        assert tokenizer.decode(both.ids[both.answers]) == "sumadd</s>2</s>"
        assert tokenizer.decode(plain.ids).startswith("user: add")
        return
    with pytest.raises(UpcycleError, match=left_out):
        tokens_of(told(rows), tokenizer, TODAY)


def test_tools_and_calls_that_stand_in_the_text_are_shown(tmp_path):
    """As in Hermes' chats, whose system message lists the tools, beside a column of them."""
    _, call, *rest = CHATS[2]["messages"]
    told_ = {"role": "system", "content": "<tools>add</tools>"}
    asked = {"role": "user", "content": "1 and 1?"}
    messages = [told_, asked, {**call, "content": "<tool_call>add</tool_call>"}, *rest]
    tokenizer = byte_tokenizer(tmp_path, PARTS % ("", ""))
    (found,) = tokens_of(told([{**CHATS[2], "messages": messages}]), tokenizer, TODAY)
    assert "<tool_call>add</tool_call>" in tokenizer.decode(found.ids[found.answers])


def test_chats_with_tools_are_rendered_once_but_for_the_first(tmp_path, monkeypatch):
    """The first of its kind is rendered without its call, and without its tools."""
    render, calls = Template.render, []
    monkeypatch.setattr(Template, "render", lambda *a, **k: (calls.append(a), render(*a, **k))[1])
    tokenizer = byte_tokenizer(tmp_path, MARKED)
    for rows, wanted in ((CHATS[:2] * 9, 18), (CHATS[2:] * 9, 9 + 2)):
        calls.clear()
        tokens_of(told(rows), tokenizer, TODAY)
        assert len(calls) == wanted


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": None}])
@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_an_answer_that_is_marked_is_not_learnt(mark, template, tmp_path):
    """The text stays as it is, and the marks do not reach the template."""
    tokenizer = byte_tokenizer(tmp_path, template)
    plain = turns("a", "one", "b", "two", "c", "three")
    marked = [
        {**message, **({1: mark, 3: {"weight": 1}, 2: {"train": False}}.get(place, {}))}
        for place, message in enumerate(plain)
    ]
    whole, found = tokens_of(told([{"messages": plain}, {"messages": marked}]), tokenizer, TODAY)
    assert found.ids.tolist() == whole.ids.tolist()
    assert tokenizer.decode(whole.ids[whole.answers]).split("<|im_end|>")[0] == "one"
    lost = tokenizer.decode(whole.ids[whole.answers & ~found.answers])
    assert lost.strip() == "one<|im_end|>"
    assert not (found.answers & ~whole.answers).any()


def test_marks_that_a_template_moves_are_not_guessed(tmp_path):
    """This template marks two parts of the last answer and one of those before it."""
    moving = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last %}{% generation %}<think>"
        "{% endgeneration %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = turns("a", "one", "b", "two")
    messages[1]["weight"] = 0
    with pytest.raises(UpcycleError, match="nobody knows which text has weight = 0 or train = false"):
        tokens_of(told([{"messages": messages}]), byte_tokenizer(tmp_path, moving), TODAY)


def test_a_template_that_forgets_does_for_one_answer(tmp_path):
    """Its last answer is written as it was, so that the prefix property holds."""
    (found,) = tokens_of(told([{"messages": turns("a", "b")}]), byte_tokenizer(tmp_path, FORGETFUL), TODAY)
    assert found.answers.sum() == len("<think></think>b") + 2


def test_a_template_that_writes_todays_day_writes_that_of_the_task(dense, tmp_path):
    """So a run can be resumed tomorrow, and all seeds hold out the same."""
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') }}" + MARKED)
    for written, keys in (("26 Jul 2024", {}), ("01 Feb 2030", {"today": "2030-02-01"})):
        row = feed_of(dense, chat_template=str(dated), **keys).next(1)["ids"][0]
        assert AutoTokenizer.from_pretrained(dense).decode(row).startswith(written)
    with pytest.raises(UpcycleError, match=r"task\.today = '26 July'; it must be a day, such as"):
        tasks.find("sft")(today="26 July")


def test_a_run_is_not_resumed_with_another_set_to_score_on(dense, tmp_path):
    rows = (dense / "chats.jsonl").read_text().splitlines()
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(rows[:4]))
    run = table(dense, tmp_path / "run", data={"held_out": 0.0}, train={"steps": 3})
    run["task"]["test"] = str(test)
    train(run)
    test.write_text("\n".join(rows[4:8]))
    run["train"]["steps"] = 4
    with pytest.raises(UpcycleError, match=r"test\.jsonl has other rows of chats than it had"):
        train(run, resume=True)


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """A llama with a chat template, and chats whose answers can be learned."""
    folder = tmp_path_factory.mktemp("sft") / "dense"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(ALPHABET), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(folder, MARKED)
    rng = np.random.default_rng(0)
    rows = [{"messages": turns("".join(rng.choice([*"abcdef"], 6)), "yes, yes")} for _ in range(40)]
    write(folder / "chats.jsonl", [*rows, {"messages": turns("too long " * 20, "yes")}])
    return folder


def table(dense: Path, out: Path, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "source": str(dense), "out": str(out), "task": {"name": "sft"},
        "moe": {"num_experts": 4, "target": "upcycled"},
        "data": {"sources": [{"path": str(dense / "chats.jsonl")}], "held_out": 0.25},
        "train": {"steps": 6, "batch_size": 4, "sequence_length": 99, "eval_every": 6},
        "schedule": {"name": "constant", "peak": 3e-3},
        "checkpoint": {"every": 3, "keep": 2},
    }  # fmt: skip
    return {key: {**made.get(key, {}), **changes.get(key, {})} if isinstance(value, dict) else value
            for key, value in made.items()}  # fmt: skip


def feed_of(dense: Path, length: int = 99, **keys: Any) -> Any:
    feeding = Feeding.of_file(dense / "chats.jsonl", length=length, cache=dense)
    return tasks.find("sft")(**keys).feed(feeding, Subject.of(dense))


def test_a_run_learns_what_the_assistant_says(dense, tmp_path):
    """It is resumed to the bit, keeps its template, and `eval` scores the assistant's tokens, by chat."""
    whole = train(table(dense, tmp_path / "whole"))
    lines = read(tmp_path / "whole")
    (begun,) = [line.held_out_start for line in lines if line.held_out_start is not None]
    assert lines[-1].held_out_loss < begun - 1
    assert lines[-1].held_out_accuracy > 0.8
    train(table(dense, tmp_path / "parts"))
    for step, path in saving.checkpoints(tmp_path / "parts"):
        if step > 3:
            shutil.rmtree(path)
    again = train(table(dense, tmp_path / "parts"), resume=True)
    assert (again.loss, again.held_out_loss) == (whole.loss, whole.held_out_loss)

    out = export(tmp_path / "whole", tmp_path / "out").out
    assert AutoTokenizer.from_pretrained(out).chat_template == MARKED
    found = evaluate(out, ToScore(chats=dense / "chats.jsonl", length=99))["chats"]
    model, batch = upcycle.open(out).eval(), feed_of(dense, pack=False).at(np.arange(40))
    assert found["targets"] == 40 * (len("yes, yes") + 1)
    losses, count = 0.0, 0
    for ids, labels, mask in zip(batch["ids"], batch["labels"], batch["mask"], strict=True):
        real = int(mask.sum())  # each row without its padding
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(ids[None, :real])).logits[0]
        said = labels[:real] != IGNORED
        wanted = torch.tensor(labels[:real][said])
        losses += float(torch.nn.functional.cross_entropy(logits[said], wanted, reduction="sum"))
        count += len(wanted)
    assert found["loss"] == pytest.approx(losses / count, rel=1e-5)


def test_chats_kept_apart_in_a_row_are_those_in_rows_of_their_own(dense, tmp_path):
    """The first score of two runs; with `data.isolate` a chat does not see those before it."""
    found, test = [], shutil.copy(dense / "chats.jsonl", tmp_path)
    for pack, isolate in ((True, True), (False, False), (True, False)):
        out = tmp_path / f"{pack}{isolate}"
        changes: dict[str, Any] = {
            "task": {"pack": pack, "test": str(test)},
            "data": {"isolate": isolate, "held_out": 0.0},
            "train": {"steps": 1, "eval_every": 1},
        }
        train(table(dense, out, **changes))
        found.append(read(out)[0].held_out_start)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[2] != pytest.approx(found[1], rel=1e-4)


@pytest.fixture(scope="session")
def splits(dense, tmp_path_factory) -> Path:
    """A data set with two splits, whose chats in `test` have longer answers."""
    datasets = pytest.importorskip("datasets")
    said = {"train": "yes, yes", "test": "yes, yes, yes"}
    made = {
        name: datasets.Dataset.from_list([{"messages": turns(each, answer)} for each in "abcdefgh"])
        for name, answer in said.items()
    }
    folder = tmp_path_factory.mktemp("splits") / "set"
    datasets.DatasetDict(made).save_to_disk(folder)
    return folder


def sft_on(splits: Path, dense: Path, out: Path, **task: Any) -> dict[str, Any]:
    data = {"sources": [{"path": str(splits)}], "held_out": 0.0}
    short = {"steps": 1, "eval_every": 1}
    return table(dense, out, data=data, task={"test": str(splits), **task}, train=short)


def held_out_targets(run: dict[str, Any]) -> int:
    made = Run.of(run)
    rows = made.task.feed(made.feeding(made.task), Subject.of(Path(made.source))).held_out()
    return int((rows["labels"] != IGNORED).sum())


def test_a_data_set_with_splits_is_scored_on_its_test_split(splits, dense, tmp_path):
    longer = len("yes, yes, yes") + 1
    assert held_out_targets(sft_on(splits, dense, tmp_path / "run")) == 8 * longer
    assert held_out_targets(sft_on(splits, dense, tmp_path / "run", test_split="train")) == 8 * (longer - 5)
    found = evaluate(dense, ToScore(chats=splits, length=99))
    assert found["chats"]["targets"] == 8 * longer
    assert found["results"][0]["name"] == "set"
    with pytest.raises(UpcycleError, match=r"no split 'validation'; it has test, train: name one"):
        train(sft_on(splits, dense, tmp_path / "run", test_split="validation"))
    with pytest.raises(UpcycleError, match=r"test_split = test is a split of task.test, which is not set"):
        train(table(dense, tmp_path / "run", task={"test_split": "test"}))
    with pytest.raises(UpcycleError, match=r"chats.jsonl has no splits to choose test from"):
        train(table(dense, tmp_path / "run", task={"test": str(dense / "chats.jsonl"), "test_split": "test"}))


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("{splits}", {"test": "{splits}", "test_split": "train"}),
        ("{splits}", {"test": "{splits}/train"}),
        ("{dense}/chats.jsonl", {"test": "{dense}/../{dense.name}/chats.jsonl"}),
        ("{dense}", {"test": "{dense}/chats.jsonl"}),
        ("{linked}", {"test": "{dense}/chats.jsonl"}),
    ],
)
def test_a_set_to_score_on_is_not_trained_on(source, task, splits, dense, tmp_path):
    places = {"splits": splits, "dense": dense, "linked": tmp_path / "linked"}
    places["linked"].mkdir()
    (places["linked"] / "mine.jsonl").symlink_to(dense / "chats.jsonl")
    task = {key: value.format(**places) for key, value in task.items()}
    data = {"sources": [{"path": source.format(**places)}], "held_out": 0.0}
    with pytest.raises(
        UpcycleError, match=r"is trained on, too, because data.sources names it; give another"
    ):
        train(table(dense, tmp_path / "run", task=task, data=data))


def test_an_earlier_run_goes_on_being_scored_on_what_it_was(splits, dense, tmp_path, caplog):
    """Versions without `test_split` scored on the split train."""
    out = tmp_path / "run"
    run = sft_on(splits, dense, out, test_split="train")
    run["train"] |= {"steps": 2, "eval_every": 2}
    run["checkpoint"] = {"every": 1, "keep": 2}
    sft = tasks.find("sft")
    recorded = sft.as_table
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(sft, "objection", lambda *_: None)
        earlier.setattr(
            sft, "as_table", lambda task: {k: v for k, v in recorded(task).items() if k != "test_split"}
        )
        whole = train(run)
    assert "test_split" not in json.loads((out / "run.json").read_text())["run"]["task"]
    shutil.rmtree(dict(saving.checkpoints(out))[2])
    del run["task"]["test_split"]
    assert train(run, resume=True).held_out_loss == whole.held_out_loss
    assert "set/train is trained on, too" in caplog.text


def test_nobody_but_the_assistant_has_a_gradient(dense):
    """The gradient of the loss in the logits is zero at every place that does not precede an answer."""
    task, subject = tasks.find("sft")(), Subject.of(dense)
    batch = {name: torch.from_numpy(a) for name, a in feed_of(dense).next(4).items()}
    question = task.question(batch, subject, training=True)
    logits = upcycle.open(dense)(**question.inputs).logits
    logits.retain_grad()
    task.loss(logits, question.labels).backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, batch["labels"] != IGNORED)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert {*tokenizer.decode(batch["labels"][moved]).split("<|im_end|>")} == {"yes, yes", ""}


def test_what_is_said_about_the_rows(dense, caplog):
    caplog.set_level("INFO", logger="upcycle")
    feed_of(dense)
    assert "40 chats of 1320 tokens, of which 360 are the assistant's, in 14 rows; 4.8% of" in caplog.text
    assert "chats of more than 99 tokens, which are left out (task.too_long): 1" in caplog.text


def test_a_template_of_its_own_goes_with_the_model(dense, tmp_path):
    source = tmp_path / "bare"
    shutil.copytree(dense, source)
    byte_tokenizer(source, None)
    (source / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(
        UpcycleError, match=r"has no chat template; in a run, set task.chat_template to a file"
    ):
        train(table(source, tmp_path / "run"))
    (tmp_path / "own.jinja").write_text(CHATML)
    own = {"chat_template": str(tmp_path / "own.jinja")}
    train(table(source, tmp_path / "run", task=own, train={"steps": 1}))
    (tmp_path / "own.jinja").write_text(MARKED)  # changed since the run began
    out = export(tmp_path / "run", tmp_path / "out").out
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    told = json.loads((out / "upcycle.json").read_text())
    assert "chat_template.jinja" not in told["carried_files"]
    assert told["made_anew_files"]["chat_template.jinja"] == "the run was trained with it (task.name = sft)"
    shutil.rmtree(tmp_path / "run" / "beside")  # as a run of an earlier version
    out = export(tmp_path / "run", tmp_path / "earlier").out
    assert AutoTokenizer.from_pretrained(out).chat_template == MARKED
    for content, message in ((None, "cannot be read"), ("\n", "is empty")):
        (tmp_path / "own.jinja").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "own.jinja").write_text(content)
        with pytest.raises(UpcycleError, match=message):
            train(table(source, tmp_path / "other", task=own))


@pytest.mark.parametrize(
    ("named", "target", "expert"),
    [("folder", "upcycled", None), ("folder", "mixtral", 1), ("owner/name", "mixtral", None)],
)
def test_the_tokenizer_of_the_data_goes_with_the_model(named, target, expert, dense, tmp_path, monkeypatch):
    """It has other ids than the source's, and is gone when the model is exported."""
    other, read_from = tmp_path / "folder", AutoTokenizer.from_pretrained
    named = str(other) if named == "folder" else named
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained",
        lambda where, **keys: read_from(other if str(where) == "owner/name" else where, **keys),
    )  # fmt: skip
    words = byte_tokenizer(other, CHATML, alphabet=[*ALPHABET[:3], *reversed(ALPHABET[3:])])
    wanted = words.apply_chat_template(turns("Hi?", "Yes."), return_dict=False)
    assert wanted != AutoTokenizer.from_pretrained(dense).apply_chat_template(
        turns("Hi?", "Yes."), return_dict=False
    )
    data = {"tokenizer": named}
    run = table(dense, tmp_path / "run", data=data, train={"steps": 1}, moe={"target": target})
    train(run)
    shutil.rmtree(other)
    out = export(tmp_path / "run", tmp_path / "out", expert=expert).out
    found = AutoTokenizer.from_pretrained(out)
    assert found.chat_template == CHATML
    assert found.apply_chat_template(turns("Hi?", "Yes."), return_dict=False) == wanted
    told = json.loads((out / "upcycle.json").read_text())
    assert "data.tokenizer" in told["made_anew_files"]["tokenizer.json"]
    assert "tokenizer.json" not in told["carried_files"]
    stops = GenerationConfig.from_pretrained(out)
    assert (stops.eos_token_id, stops.pad_token_id) == (found.eos_token_id, found.pad_token_id)


def held(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "generation_config.json").read_text())


def test_the_model_stops_where_its_answers_end(dense, tmp_path):
    """The source's end is that of a document, which no answer has."""
    source, own = tmp_path / "source", {"eos_token_id": 0, "do_sample": True, "temperature": 0.6}
    shutil.copytree(dense, source)
    (source / "generation_config.json").write_text(json.dumps(own))
    train(table(source, tmp_path / "run", train={"steps": 30}))
    out = export(tmp_path / "run", tmp_path / "out").out
    assert held(out) == own | {"eos_token_id": [2, 0]}
    assert "generation_config.json" in json.loads((out / "upcycle.json").read_text())["made_anew_files"]
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    asked = tokenizer.apply_chat_template(turns("abcdef"), add_generation_prompt=True, return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=40, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == "yes, yes<|im_end|>"
    (source / "generation_config.json").write_text("{damaged")
    assert (
        export(tmp_path / "run", tmp_path / "as it was").out / "generation_config.json"
    ).read_text() == "{damaged"
    (source / "generation_config.json").write_text(json.dumps(own))
    (source / "text.txt").write_text("yes, yes " * 200)
    texts = {"sources": [{"path": str(source / "text.txt")}]}
    train(table(source, tmp_path / "texts", data=texts, train={"steps": 1}) | {"task": {"name": "causal_lm"}})
    assert held(export(tmp_path / "texts", tmp_path / "plain").out) == own


def test_what_config_json_says_of_generation_stays(tmp_path):
    """A first generation_config.json takes the place of what transformers reads in config.json."""
    config = T5Config(
        vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    found = _endings._held(tmp_path / "generation_config.json", T5ForConditionalGeneration(config))
    names = ("decoder_start_token_id", "pad_token_id", "eos_token_id")
    assert [found[name] for name in names] == [0, 0, 1]


@pytest.mark.parametrize("in_file", [True, False])
def test_no_token_of_the_old_tokenizer_stays(in_file, tmp_path):
    """A token that the new one does not have is null, also if config.json alone names the old one."""
    tokenizer = byte_tokenizer(tmp_path, CHATML)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    old = {"eos_token_id": 0, "pad_token_id": 7}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, **old)
    )
    model.config.save_pretrained(tmp_path)
    if in_file:
        (tmp_path / "generation_config.json").write_text(json.dumps(old))
    run, named = SimpleNamespace(task=None), SimpleNamespace(named="other")
    assert _endings.write(SimpleNamespace(run=run, beside=named, model=model), tmp_path)
    assert held(tmp_path).items() >= {"eos_token_id": None, "pad_token_id": None}.items()
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id is None


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (CHATML.replace("<|im_end|>", "<|end|>"), "<|end|>"),
        (CHATML.replace("<|im_end|>", ""), None), ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}{{ m.content }}{{ '' if loop.last else eos_token }}{% endfor %}", None),
    ],
)  # fmt: skip
def test_the_end_of_an_answer_is_the_special_token_after_it(template, end, tmp_path):
    tokenizer = byte_tokenizer(tmp_path, template)
    assert tasks.find("sft")().end(tokenizer) == (None if end is None else ALPHABET.index(end))


def test_other_mistakes(dense, tmp_path):
    with pytest.raises(UpcycleError, match="sft takes one"):
        train(table(dense, tmp_path / "run", data={"sources": [{"path": "a"}, {"path": "b"}]}))
    with pytest.raises(UpcycleError, match=r"give either --text FILE or .*--chats FILE"):
        ToScore(chats=dense / "chats.jsonl", images=dense)
    with pytest.raises(
        UpcycleError, match=r"fits into length = 20 tokens .*lengthen the rows, or in a run, set"
    ):
        evaluate(dense, ToScore(chats=dense / "chats.jsonl", length=20))
    with pytest.raises(UpcycleError, match=r"length = 9999 and the model takes \d+ tokens"):
        evaluate(dense, ToScore(chats=dense / "chats.jsonl", length=9999))
