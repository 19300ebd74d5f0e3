"""The proof that a folder is what its recipe makes of a source: coverage, bytes, and both models in use.

The blueprint is computed again from the source, transformers itself says which parameters it builds, and both
folders are opened and used as a user does: through Auto classes, with tokenizer and processor, in forward
passes and in generation. Each file here makes one kind of check.
"""

from __future__ import annotations

from pathlib import Path

from upcycle.blueprints.making import blueprint
from upcycle.checkpoints.checkpoint import Checkpoint, TwoSetsError
from upcycle.checkpoints.hub import open_checkpoint
from upcycle.dense.twins import refuse_two_heads
from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe
from upcycle.records.provenance import Provenance
from upcycle.system.needed import said_if_missing
from upcycle.verification import coverage, generation, outputs, readers, side_by_side, stored
from upcycle.verification.outputs import Shown
from upcycle.verification.proof import Check as Check
from upcycle.verification.proof import Difference as Difference
from upcycle.verification.proof import Proof as Proof
from upcycle.verification.proof import skipped, unfit


@said_if_missing()
def verify(
    source: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    images: str | Path | None = None,
    logits: bool = True,
) -> Proof:
    """Check the folder `out` against the dense checkpoint `source` and the recipe recorded in `out`.

    Tokenizers and processors are compared, and so are both models: outputs on random input, padded rows, and
    greedy generation. `text` names a file and `images` a folder or a parquet file to compare outputs on as
    well. `logits=False` leaves out what runs the models. Raises `UpcycleError` if there is nothing to check;
    a check that fails is in the result.
    """
    out = Path(out)
    shown = Shown(text=None if text is None else Path(text), images=None if images is None else Path(images))
    with open_checkpoint(source, allow_nonfinite=True) as dense:
        try:
            moe = Checkpoint.open(out, allow_nonfinite=True)
        except TwoSetsError as error:
            return unfit(str(error))
        with moe:
            return _verify(dense, moe, out, shown if logits else None)


def _verify(dense: Checkpoint, moe: Checkpoint, out: Path, shown: Shown | None) -> Proof:
    record = Provenance.read(out)
    if record.training:
        steps = record.training[-1].step
        raise UpcycleError(
            f"{out} was trained for {steps} steps since it was built, so no recipe describes its bytes; "
            f"verify checks what `upcycle convert` wrote"
        )
    built = blueprint(dense, Recipe.of(record.recipe), allow_nonfinite=True)
    refuse_two_heads(built.dense)
    covered = [coverage.of_source(built), coverage.of_files(built, moe), coverage.of_transformers(built, moe)]
    settings = stored.config(built, moe)
    same = stored.tensors(built, moe) if covered[1].holds else skipped("bytes", "the names differ already")
    checks = [*covered, settings, same, stored.provenance(built, record), stored.files(built, moe, record)]
    checks += readers.checks(built.source.folder, out)
    found: dict[str, Difference] = {}
    if shown is not None and settings.holds and covered[1].holds and covered[2].holds:
        asked = outputs.outputs(built, shown)
        questions: list[side_by_side.Question] = [*asked, *outputs.padded(built)]
        questions += generation.generation(built)
        questions += generation.settings(built)
        checks += side_by_side.checks(built, out, questions)
        for question in asked:
            found |= question.found
    for opened in built.checkpoints[1:]:
        opened.close()
    return Proof(
        coverage=all(bool(c.holds) for c in covered),
        bit_identical=bool(same.holds),
        preserves_function=built.preserves_function,
        logits=found,
        checks=checks,
    )
