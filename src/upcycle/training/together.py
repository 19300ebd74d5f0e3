"""Work after which all ranks go on, or all of them end with the same error.

If one rank alone raised an error, the others would wait for it in their next collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from upcycle.errors import UpcycleError, listed
from upcycle.training.parallel import Ranks

T = TypeVar("T")
Prints = Mapping[str, str]  # a digest of each thing, by its name for a user


def tried(work: Callable[[], T], world: int) -> tuple[T | None, str | None]:
    """Return what `work` returns, and the reason if it cannot be done, for all ranks to hear.

    Raises the error itself in a world of one, where there is nobody to tell.
    """
    try:
        return work(), None
    except UpcycleError as error:
        if world == 1:
            raise
        return None, str(error)
    except OSError as error:
        if world == 1:
            raise
        return None, f"{error.filename or 'input or output'}: {error.strerror or error}"


def of_first(find: Callable[[], T], ranks: Ranks) -> T:
    """Return what the first rank finds; raise the same `UpcycleError` on all if it finds nothing."""
    found, reason = ranks.share(tried(find, ranks.world) if ranks.first else None)
    if reason is not None:
        raise UpcycleError(reason)
    return cast(T, found)


def by_first(work: Callable[[], T], ranks: Ranks) -> T | None:
    """Do `work` on the first rank alone, and return there what it returns; None on the others.

    Raises the same `UpcycleError` on all ranks if the first one does.
    """
    made, reason = tried(work, ranks.world) if ranks.first else (None, None)
    if (said := ranks.share(reason)) is not None:
        raise UpcycleError(said)
    return made


def by_each(work: Callable[[], T], ranks: Ranks) -> T:
    """Do `work`, which has no collectives, on every rank; return what it returns here.

    Raises the same `UpcycleError` on all ranks if one of them does.
    """
    made, reason = tried(work, ranks.world)
    refuse_different(reason, (), ranks)
    return cast(T, made)


def first_alone(work: Callable[[], None], ranks: Ranks) -> None:
    """Do `work` on the first rank, and then on the others, which may find there what it has fetched.

    Raises the same `UpcycleError` on all ranks if one of them does.
    """
    of_first(work, ranks)
    reason = None if ranks.first else tried(work, ranks.world)[1]
    refuse_different(reason, (), ranks)


def refuse_different(reason: str | None, prints: Sequence[Prints], ranks: Ranks) -> None:
    """Raise the same `UpcycleError` on all ranks if one has a reason, or sees other things than the first.

    `prints` are in order: what is in a later one depends on the earlier ones, and is to blame only if these
    are alike.
    """
    told = ranks.gathered((reason, prints))
    for rank, (why, found) in enumerate(told):
        if why is not None:
            alike = all(other == why for other, _ in told)
            raise UpcycleError(why if alike else f"process {rank} of {ranks.world}: {why}")
        for mine, first in zip(found, told[0][1], strict=True):
            if different := sorted(n for n in {*mine, *first} if mine.get(n) != first.get(n)):
                raise UpcycleError(
                    f"process {rank} of {ranks.world} sees another {listed(different)} than process 0; give "
                    f"every node the same files, by a shared file system or by copies of one download"
                )
