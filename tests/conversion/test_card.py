"""The code of a model card, run as it stands there, in a process that has imported nothing of ours."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import transformers

import tiny
import tiny_wrappers
from marks import quick
from upcycle import Recipe, convert

RUN = """
import os, sys, traceback, torch, transformers
for folder in sys.argv[1:]:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    try:
        seen = {}
        exec(open(f"{folder}/card.py").read(), seen)
        logits = seen["model"].float().eval()(**torch.load(f"{folder}/inputs.pt")).logits
        torch.save((type(seen["processor"]).__name__, logits.detach()), f"{folder}/answer.pt")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
"""
# Wrappers, and the parts and targets of their conversions, one after the other.
CASES = {
    "one of each": [
        ("llava", [("text", "native")]),
        ("gemma3", [("text", "upcycled")]),
        ("mistral3", [("text+vision", "native")]),
        ("mistral3", [("vision", "native"), ("text", "native")]),
    ],
    "others": [
        ("qwen3_vl", [("text", "native")]),
        ("qwen3_5", [("text", "native")]),
        ("llava", [("text", "upcycled")]),
        ("qwen3_vl", [("text", "upcycled")]),
        ("qwen3_5", [("text", "upcycled")]),
        ("llava", [("vision", "native")]),
        ("gemma3", [("text+vision", "upcycled")]),
        ("gemma3", [("text", "upcycled"), ("vision", "native")]),
        ("llava", [("text", "native"), ("vision", "native")]),
    ],
}


def with_processor(folder):
    """Add a processor to a folder, of one class for all, because some classes need further packages."""
    tiny.make_bytes_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.CLIPImageProcessor()
    transformers.LlavaProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def with_card(source, folder, parts):
    """Convert the parts one after the other; return the folder of the last, with the code of its card."""
    made = source
    for number, (part, target) in enumerate(parts):
        out = folder.with_name(f"{folder.name} {number}")
        moe = {"num_experts": 2, "part": part, "target": target}
        convert(made, out, Recipe.of(moe=moe, router={"std": 0.5}))
        made = out
    (code,) = re.findall(r"```python\n(.*?)```", (made / "README.md").read_text(), re.DOTALL)
    (made / "card.py").write_text(code.replace("path/to/this/folder", str(made)))
    return made


@pytest.mark.parametrize("group", quick(CASES, "one of each"))
def test_the_code_of_a_card_opens_a_multimodal_model(group, tmp_path):
    folders, wanted = [], {}
    for number, (kind, parts) in enumerate(CASES[group]):
        source = tmp_path / kind
        if kind not in wanted:
            tiny_wrappers.make(source, kind)
            model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
            wanted[kind] = tiny_wrappers.logits(model, kind)
            with_processor(source)
        folders.append(with_card(source, tmp_path / f"moe {number}", parts))
        torch.save(tiny_wrappers.KINDS[kind].inputs(), folders[-1] / "inputs.pt")
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, folders)], capture_output=True, text=True)
    for (kind, parts), folder in zip(CASES[group], folders, strict=True):
        assert (folder / "answer.pt").exists(), (kind, parts, done.stderr[-2000:])
        processor, found = torch.load(folder / "answer.pt")
        assert processor == "LlavaProcessor"
        assert float((found - wanted[kind]).abs().max() / wanted[kind].abs().max()) < 1e-5
