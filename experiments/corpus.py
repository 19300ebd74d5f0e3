"""A corpus that every machine with our pinned requirements has: the Python sources of installed packages.

Each file is taken once (by the SHA-256 of its bytes). Whole packages are held out, so that no model here has
seen a line of them. `write` puts three things into a folder, which is never committed: `code.jsonl` (one
document per line, held-out packages last), `tokenizer/` (byte-level BPE of the training part), and
`about.json` (the packages with versions, counts and hashes, and the share for `data.held_out`).

`code/corpus.json` is the `about.json` of the recorded runs. Packages that it does not name are left out: our
requirements have grown since, and the corpus has not.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT = ("anyio", "attrs", "click", "hypothesis", "networkx", "pydantic", "requests", "rich", "tqdm")
RECORDED = Path(__file__).parent / "code" / "corpus.json"
LEFT_OUT = ("chardet", "upcycle")  # chardet is tables of numbers; upcycle is this package
SEQUENCE_LENGTH = 256
VOCABULARY = 1024
LARGEST = 200_000  # bytes of a file; larger files are generated tables
LONGEST = 200  # mean characters of a line; longer means generated tables too
FOR_TOKENIZER = 50  # the tokenizer is trained on one file in so many


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package, and its files in the corpus."""

    name: str
    version: str
    files: int
    bytes: int
    sha256: str  # hash of the hashes of its files, in order
    held_out: bool


def packages() -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, version and texts of each installed package once: training packages first, by name.

    These are the packages of `RECORDED`, or all but `LEFT_OUT` if there is no such file.
    """
    seen: set[bytes] = set()
    found = {normalised(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    taken = recorded() or found.keys() - LEFT_OUT
    for name in sorted(found, key=lambda name: (name in HELD_OUT, name)):
        if name in taken:
            texts = list(_texts(found[name], seen))
            if texts:
                yield name, found[name].version, texts


def recorded() -> dict[str, Package]:
    """Return the packages of `RECORDED` by name; none if there is no such file."""
    if not RECORDED.exists():
        return {}
    return {each["name"]: Package(**each) for each in json.loads(RECORDED.read_text())["packages"]}


def others(taken: Sequence[Package]) -> list[str]:
    """Return the names of packages that are missing, or not those of `RECORDED`."""
    known = {package.name: package.sha256 for package in taken}
    return [name for name, package in recorded().items() if known.get(name) != package.sha256]


def hash_of(texts: Sequence[str]) -> str:
    """Return the hash of the hashes of texts, in order."""
    return hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()


def normalised(name: str) -> str:
    """Normalise the name of a package as the package index does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _texts(distribution: importlib.metadata.Distribution, seen: set[bytes]) -> Iterator[str]:
    for file in sorted(distribution.files or (), key=str):
        path = Path(str(file.locate()))
        if file.suffix != ".py" or not path.is_file():
            continue
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if not data or len(data) > LARGEST or digest in seen:
            continue
        seen.add(digest)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        if len(text) <= LONGEST * (text.count("\n") + 1):
            yield text


def write(folder: Path) -> dict[str, Any]:
    """Write the corpus to `folder` if it is not there, and return the contents of `about.json`."""
    about = folder / "about.json"
    if about.exists():
        known: dict[str, Any] = json.loads(about.read_text())
        return known
    folder.mkdir(parents=True, exist_ok=True)
    taken, sample = [], []
    with (folder / "code.jsonl").open("w") as file:
        for name, version, texts in packages():
            for number, text in enumerate(texts):
                file.write(json.dumps({"text": text}) + "\n")
                if number % FOR_TOKENIZER == 0 and name not in HELD_OUT:
                    sample.append(text)
            size = sum(len(text.encode()) for text in texts)
            taken.append(
                Package(
                    name=name, version=version, files=len(texts), bytes=size,
                    sha256=hash_of(texts), held_out=name in HELD_OUT,
                )
            )  # fmt: skip
    if changed := others(taken):
        print(f"this is another corpus than that of {RECORDED.name}: {', '.join(changed)}", file=sys.stderr)
    tokenizer_of("".join(sample)).save_pretrained(folder / "tokenizer")
    out = {
        "packages": [asdict(p) for p in taken],
        **_shares(folder, sum(p.files for p in taken if not p.held_out)),
    }
    about.write_text(json.dumps(out, indent=1) + "\n")
    return out


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def _shares(folder: Path, trained_on: int) -> dict[str, Any]:
    """Return the token counts and the share of rows to hold out.

    The counts are those of the first `trained_on` documents and of all documents. With that share of rows
    held out, the boundary is between the two parts. Every document ends with one more token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    counts: list[int] = []
    with (folder / "code.jsonl").open() as file:
        batch: list[str] = []
        for line in file:
            batch.append(json.loads(line)["text"])
            if len(batch) == 256:
                counts += [len(ids) + 1 for ids in tokenizer(batch, return_attention_mask=False).input_ids]
                batch = []
        if batch:
            counts += [len(ids) + 1 for ids in tokenizer(batch, return_attention_mask=False).input_ids]
    seen, total = sum(counts[:trained_on]), sum(counts)
    rows, kept = (total - 1) // SEQUENCE_LENGTH, (seen - 1) // SEQUENCE_LENGTH
    return {"tokens": total, "training_tokens": seen, "held_out": 1 - kept / rows}


def main() -> None:
    """Write the corpus and print its contents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    about = write(parser.parse_args().folder)
    for key in ("tokens", "training_tokens", "held_out"):
        print(f"{key}: {about[key]}")


if __name__ == "__main__":
    main()
