"""The dense models beside the source that experts are made from, compared with it before they are mixed.

What is averaged must mean the same in all models. If the backbone is the source's alone, a donor gives its
networks and nothing else: then its blocks must be those of the source, while its vocabulary, its head and the
reach of its attention may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.checkpoints import vocabularies
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import Opener
from upcycle.dense import places
from upcycle.dense.adapted import Adapted, adapted
from upcycle.dense.adapters import Adapter, open_adapter
from upcycle.dense.admission import admit
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, listed, shown
from upcycle.families._wrappers import config_key
from upcycle.init import Donor
from upcycle.recipe import Recipe

# Keys of config.json that say nothing about what the weights mean.
_SILENT = frozenset(
    "initializer_range initializer_factor use_cache attention_dropout embd_pdrop resid_pdrop "
    "hidden_dropout_prob attention_probs_dropout_prob dropout_rate residual_dropout".split()
)
# Keys of the config around a part that say nothing of it, besides those.
_SILENT_AROUND = _SILENT | frozenset(
    "architectures auto_map dtype torch_dtype transformers_version model_name ignore_index return_dict "
    "output_attentions output_hidden_states torchscript dropout activation_dropout hidden_dropout "
    "layerdrop".split()
)
# What the names of keys begin with that programs leave for themselves.
_NOTES = ("_", "unsloth_", "transformers.js")
# Keys that a donor may have otherwise, because the result has the source's; a plan says which.
_SAID = frozenset(
    "max_position_embeddings original_max_position_embeddings bos_token_id eos_token_id pad_token_id "
    "sep_token_id eod_token_id".split()
)
# Keys of the vocabulary, of the head and of the reach of attention, which are the backbone's.
_OF_BACKBONE = frozenset(
    "vocab_size tie_word_embeddings rope_parameters sliding_window use_sliding_window max_window_layers "
    "num_labels".split()
)
_ONE_MODEL = "what is averaged must mean the same in both, so give donors that were trained from one model"


@dataclass(frozen=True, kw_only=True)
class Donors:
    """The donors in the order of the initialisation, and what a person should know about them."""

    models: tuple[Dense, ...] = ()
    remarks: tuple[str, ...] = ()


def admit_donors(source: Dense, recipe: Recipe, *, allow_nonfinite: bool, opener: Opener) -> Donors:
    """Return the dense models that the recipe's initialisation names besides `source`.

    `opener` opens their checkpoints. Raises `UpcycleError`, with the reason, for a donor that cannot be mixed
    as the recipe asks.
    """
    named = recipe.init.donors
    opened = _open(named, opener, allow_nonfinite=allow_nonfinite)
    donors = [checkpoint for checkpoint in opened if checkpoint is not None]
    remarks = list(_same_files(source.checkpoint, donors, recipe.init.in_backbone))
    bare: dict[Checkpoint | None, Dense] = {None: source}
    for checkpoint in opened:
        if checkpoint not in bare:
            assert checkpoint is not None
            alone = recipe.moe.part_only == "text" and places.is_wrapper(checkpoint.config)
            bare[checkpoint] = admit(checkpoint, alone=alone, part=recipe.moe.part)
            remarks += _compared(source, bare[checkpoint], recipe)
    adapters = _open_adapters(named, opener, allow_nonfinite=allow_nonfinite)
    models = []
    for donor, checkpoint in zip(named, opened, strict=True):
        dense = bare[checkpoint]
        if donor.adapter:
            dense = adapted(dense, adapters[donor.adapter])
            remarks += _of_another_base(dense)
        models.append(dense)
    return Donors(models=tuple(models), remarks=tuple(dict.fromkeys(remarks)))


def _open(named: Sequence[Donor], opener: Opener, *, allow_nonfinite: bool) -> list[Checkpoint | None]:
    """Open the checkpoint of each donor; None stands for the source.

    Donors that differ in their adapters share a checkpoint. One that is named again is opened again.
    """
    found: dict[tuple[str, int], Checkpoint] = {}
    out: list[Checkpoint | None] = []
    for place, donor in enumerate(named):
        key = donor.source, named[:place].count(donor)
        if donor.source and key not in found:
            label = f"donor {len(found) + 1}"
            found[key] = opener(donor.source, allow_nonfinite=allow_nonfinite, label=label)
        out.append(found.get(key))
    return out


def _open_adapters(named: Sequence[Donor], opener: Opener, *, allow_nonfinite: bool) -> dict[str, Adapter]:
    """Open each adapter once, by its name in the recipe."""
    names = dict.fromkeys(donor.adapter for donor in named if donor.adapter)
    return {
        name: open_adapter(name, opener, label=f"adapter {number}", allow_nonfinite=allow_nonfinite)
        for number, name in enumerate(names, start=1)
    }


def _same_files(
    source: Checkpoint, donors: Sequence[Checkpoint], in_backbone: tuple[int, ...]
) -> Iterator[str]:
    """Yield a remark on each donor that is the source or an earlier one, by the files on disk.

    `in_backbone` are the numbers of the models that the backbone is mixed of; the source is 0.
    Raises `UpcycleError` if two paths lead to the same donor.
    """
    seen = {_files(source): source}
    for donor in dict.fromkeys(donors):
        first = seen.setdefault(_files(donor), donor)
        if first is donor:
            continue
        if first is not source and first.folder != donor.folder:
            raise UpcycleError(
                f"{first.folder} and {donor.folder} are one checkpoint, by two paths; name it by one of them"
            )
        what = "the source itself" if first is source else "named more than once"
        twice = len(in_backbone) > 1 and (first is not source or 0 in in_backbone)
        counts = ", and counts once more in an average" if twice else ""
        yield f"the donor {donor.folder} is {what}{counts}"


def _files(opened: Checkpoint) -> frozenset[object]:
    """Return device and inode of the files of a checkpoint, which are the same by any path.

    Files that are not on this machine are told apart by their names.
    """
    if opened.headers_only:
        return frozenset(opened.files)
    return frozenset(mark[:2] for file, mark in opened.stamps.items() if file in set(opened.files))


def _compared(source: Dense, donor: Dense, recipe: Recipe) -> Iterator[str]:
    """Yield what differs and does not matter. Raises `UpcycleError` for what matters."""
    mixed = recipe.init.in_backbone != (0,)
    here, there = source.checkpoint.folder, donor.checkpoint.folder
    if donor.family is not source.family:
        raise UpcycleError(
            f"{there} is not of the same shape as {here}: it is a {donor.family.model_type}, and that a "
            f"{source.family.model_type}; donors must share model_type and every tensor shape"
        )
    differing = _differing(source, donor)
    if mixed:
        _refuse_other_heads(source, donor, differing)
    _refuse_other_shapes(source, donor, differing, mixed=mixed)
    free = _SAID | (frozenset() if mixed else _OF_BACKBONE)
    around = _differing_around(source, donor, recipe.moe.part) if mixed and source.around else {}
    for key, values in {**differing, **around}.items():
        if key not in free:
            raise UpcycleError(f"{there} and {here} differ in {key}: {values}; {_ONE_MODEL}")
    if other := vocabularies.difference(here, there):
        raise UpcycleError(f"{there} and {here} {other}; {_ONE_MODEL}")
    _refuse_other_types(source, donor, recipe, mixed=mixed)
    if differing:
        found = [f"{key} ({values})" for key, values in differing.items()]
        yield f"{there} and {here} differ in {listed(found, 6)}; the result has what {here} has"
    if "vocab_size" in source.config and (source.checkpoint.headers_only or donor.checkpoint.headers_only):
        yield f"only headers were read, so `upcycle convert` will compare the tokens of {there} and {here}"
    yield from _tokens_that_differ(here, there)
    yield from _activations_that_differ(source, donor, mixed=mixed)


def _activations_that_differ(source: Dense, donor: Dense, *, mixed: bool) -> Iterator[str]:
    """Yield that experts do not have the numbers that their model learned for its activation.

    A donor that is the source itself has no others.
    """
    if _files(source.checkpoint) == _files(donor.checkpoint):
        return
    part = source.family.of_all_experts
    if learned := [name for name in source.tensors if part and part in name]:
        there = donor.checkpoint.folder
        whose = (
            "which is mixed like all that is no expert" if mixed else f"that of {source.checkpoint.folder}"
        )
        yield (
            f"{there} was trained with its own {listed(learned, 1)}; all experts of a layer share one "
            f"activation, {whose}"
        )


def _differing(source: Dense, donor: Dense) -> dict[str, str]:
    """Return the settings in which two models of a family differ, by their keys, with both values."""
    mine, theirs = (model.family.compared(model.config) for model in (source, donor))
    keys = {*source.family.defaults, *source.family.reads, "rope_parameters"} - _SILENT
    return {
        key: f"{shown(theirs.get(key))} and {shown(mine.get(key))}"
        for key in sorted(keys)
        if mine.get(key) != theirs.get(key)
    }


def _differing_around(source: Dense, donor: Dense, part: str) -> dict[str, str]:
    """Return the settings of the models around two parts that both give, and that differ, by their keys."""
    mine, theirs = (
        dict(_leaves({k: v for k, v in model.checkpoint.config.items() if k != config_key(part)}))
        for model in (source, donor)
    )
    return {
        key: f"{shown(theirs[key])} and {shown(value)}"
        for key, value in mine.items()
        if key in theirs and theirs[key] != value and not _is_silent(key)
    }


def _is_silent(path: str) -> bool:
    """Return whether the setting at the path of its keys says nothing of what the weights mean."""
    keys = path.split(".")
    return keys[-1] in _SILENT_AROUND or any(key.startswith(_NOTES) for key in (path, *keys))


def _leaves(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config and of those inside it, each by the path of its keys."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield before + key, value


def _refuse_other_heads(source: Dense, donor: Dense, differing: Mapping[str, str]) -> None:
    """Refuse vocabularies of two sizes, and a head that only one of two models has, if all is mixed."""
    here, there = source.checkpoint.folder, donor.checkpoint.folder
    alone = 'or take the backbone from the source alone (init experts, backbone = "base")'
    if "vocab_size" in differing and not _other_in_blocks(source, donor):
        more = vocabularies.more(here, there) or vocabularies.more(there, here)
        names = f", such as {listed([shown(token) for token in more])}" if more else ""
        raise UpcycleError(
            f"{there} and {here} have vocabularies of {differing['vocab_size']} tokens{names}; embeddings of "
            f"two sizes have no mean, so bring both to one size (resize_token_embeddings), {alone}"
        )
    if "tie_word_embeddings" in differing:
        raise UpcycleError(
            f"{there} and {here} differ in tie_word_embeddings: {differing['tie_word_embeddings']}; a head "
            f"that only one of them has cannot be averaged, so store both in one form, {alone}"
        )


def _other_in_blocks(source: Dense, donor: Dense) -> list[str]:
    """Return the tensors of blocks that have another shape, or that only one of two models has."""
    mine, theirs = ({n: t.shape for n, t in m.tensors.items() if _in_block(n)} for m in (source, donor))
    return sorted(n for n in {*mine, *theirs} if mine.get(n) != theirs.get(n))


def _in_block(name: str) -> bool:
    """Return whether a tensor belongs to a numbered block."""
    return any(part.isdigit() for part in name.split("."))


def _refuse_other_shapes(source: Dense, donor: Dense, differing: Mapping[str, str], *, mixed: bool) -> None:
    """Refuse a donor with other shapes: of all tensors if all is mixed, otherwise of those in blocks."""
    different = _other_in_blocks(source, donor)
    if mixed:
        mine, theirs = ({n: t.shape for n, t in (m.tensors | m.around).items()} for m in (source, donor))
        different = sorted(n for n in {*mine, *theirs} if mine.get(n) != theirs.get(n))
    if not different:
        return
    sizes = [f"{key}: {values}" for key, values in differing.items() if key not in _SAID | _OF_BACKBONE]
    raise UpcycleError(
        f"{donor.checkpoint.folder} is not of the same shape as {source.checkpoint.folder} "
        f"({'; '.join([listed(different), *sizes[:3]])}); donors must share model_type and every tensor shape"
    )


def _refuse_other_types(source: Dense, donor: Dense, recipe: Recipe, *, mixed: bool) -> None:
    """Refuse a donor whose tensors are stored in another type, unless the recipe says which to write."""
    wanted = (name for name in source.tensors if mixed or _in_block(name))
    narrow = [n for n in wanted if source.tensors[n].dtype != donor.tensors[n].dtype]
    if narrow and recipe.dtype == "source":
        raise UpcycleError(
            f"{donor.checkpoint.folder} stores {listed(narrow)} in another type than "
            f"{source.checkpoint.folder}; set dtype to the one to write"
        )


def _tokens_that_differ(here: Path, there: Path) -> Iterator[str]:
    """Yield what two tokenizers have otherwise that nothing of the weights depends on."""
    if more := vocabularies.more(here, there):
        names = listed([shown(token) for token in more])
        yield f"{there} knows tokens that {here} does not ({names}); the result has the tokenizer of {here}"
    if marks := vocabularies.other_marks(here, there):
        yield f"{there} and {here} differ in {listed(marks, 6)}; the result has the tokenizer of {here}"
    if vocabularies.template(here) != vocabularies.template(there):
        yield f"{there} and {here} have different chat templates; the result has that of {here}"


def _of_another_base(dense: Adapted) -> Iterator[str]:
    """Yield a remark if an adapter says that it belongs to a model of another name."""
    said = dense.adapter.base
    if said and Path(said).name.lower() != Path(dense.checkpoint.name).name.lower():
        yield (
            f"{dense.adapter.checkpoint.folder} says that it belongs to {shown(said)}, and it is merged into "
            f"{dense.checkpoint.name}; all its shapes fit"
        )
