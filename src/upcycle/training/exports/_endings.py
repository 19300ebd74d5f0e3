"""The tokens at which an exported model stops: those that end what it has learnt to write.

`generate` of transformers stops at the `eos_token_id` of generation_config.json alone. That of a base model
ends a document, and an answer in a chat ends with what the chat template writes after it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from upcycle.conversion.generation_settings import FILE
from upcycle.conversion.tokenizer import opened
from upcycle.hf import generation
from upcycle.system import whole_file
from upcycle.training.exports import Trained

_KINDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(trained: Trained, folder: Path) -> dict[str, str]:
    """Name the ends in the generation_config.json of `folder`; return the file and the reason if it changed.

    `folder` has the files of the tokenizer and its chat template. The ends that the file names stay, unless
    the run has another tokenizer than the source (`data.tokenizer`): its tokens have other numbers. A token
    that it does not have becomes null.
    """
    task, another = trained.run.task, trained.beside.named is not None
    if not trained.model.can_generate() or not (another or (task is not None and task.reads == "chats")):
        return {}
    tokenizer, held = opened(AutoTokenizer, folder), _held(folder / FILE, trained.model)
    if tokenizer is None or held is None:
        return {}
    theirs = {kind: getattr(tokenizer, kind) for kind in _KINDS} if another else {}
    kept = theirs.get("eos_token_id") if another else held.get("eos_token_id")
    ends = [None if task is None else task.end(tokenizer), *(kept if isinstance(kept, list) else [kept])]
    wanted = held | {kind: id for kind, id in theirs.items() if id != held.get(kind)}
    if found := [id for id in dict.fromkeys(ends) if id is not None]:
        wanted["eos_token_id"] = found if len(found) > 1 else found[0]
    if wanted == held:
        return {}
    whole_file.write_json(folder / FILE, wanted)
    return {FILE: "the model stops where the texts end that it was trained on"}


def _held(file: Path, model: PreTrainedModel) -> dict[str, Any] | None:
    """Return the settings of a file; if it is not there, those that transformers takes from config.json.

    None: the file is damaged, and is left as it is.
    """
    if not file.is_file():
        return generation.settings(model)
    with suppress(ValueError):
        return dict(json.loads(file.read_text()))
    return None
