"""The account of a root: how many of its images are used, by split, and what is left out, why and how often."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.data.naming import shown
from pipeline.errors import DataError, JsonValue

EXAMPLES = 3  # names that are kept of each reason
NOT_READ = "header without a size"
NAMED_EACH = ("wrong label", "duplicate key")  # reasons of images that are also listed one by one, as set aside


@dataclass(frozen=True)
class LeftOut:
    """Files that are not used for one reason. `lost`: they may be images, and count in `data.max_bad_share`."""

    reason: str
    split: str | None  # None: of no split, or not known
    count: int
    lost: bool
    examples: tuple[str, ...]

    def to_json(self) -> JsonValue:
        """The fields in their order."""
        return [self.reason, self.split, self.count, self.lost, list(self.examples)]

    @classmethod
    def from_json(cls, stored: Sequence[object]) -> LeftOut:
        """What `to_json` gave. Raises ValueError or TypeError for anything else."""
        reason, split, count, lost, examples = stored
        if not isinstance(count, int) or not isinstance(examples, list):
            raise TypeError(f"not a kind of files that are left out: {stored!r}")
        named = tuple(str(name) for name in examples)
        return cls(str(reason), None if split is None else str(split), count, bool(lost), named)

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.examples) else ""
        named = f" ({', '.join(map(shown, self.examples))}{more})" if self.examples else ""
        return f"{self.count:,} {self.reason}{named}"


class Tally:
    """Counts what is left out while a root is listed."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str | None, bool], LeftOut] = {}

    def add(self, reason: str, name: str, *, split: str | None = None, lost: bool = True) -> None:
        """Counts one file."""
        self.merge([LeftOut(reason, split, 1, lost, (name,))])

    def merge(self, others: Iterable[LeftOut]) -> None:
        """Adds what another tally has counted."""
        for other in others:
            kind = (other.reason, other.split, other.lost)
            known = self._kinds.get(kind)
            examples = (*(known.examples if known else ()), *other.examples)[:EXAMPLES]
            count = other.count + (known.count if known else 0)
            self._kinds[kind] = replace(other, count=count, examples=examples)

    def left_out(self) -> tuple[LeftOut, ...]:
        """One entry for each reason and split: what may be images first, then by count."""
        return tuple(sorted(self._kinds.values(), key=lambda each: (not each.lost, -each.count, each.reason)))


@dataclass(frozen=True)
class SplitCount:
    """The images of a split: those in its index, and of these the ones whose header cannot be read."""

    name: str  # "train", "held-out" or "val"
    listed: int
    unread: int = 0
    first_unread: str = ""

    def lost(self, left_out: Iterable[LeftOut]) -> int:
        """Images of the split that are not used."""
        return self.unread + sum(each.count for each in left_out if each.lost and each.split == self.name)

    def found(self, left_out: Sequence[LeftOut]) -> int:
        """All images of the split."""
        return self.listed - self.unread + self.lost(left_out)


@dataclass(frozen=True)
class Account:
    """What a root holds. notes: facts about its splits and classes, each a sentence."""

    root: str
    splits: tuple[SplitCount, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> tuple[LeftOut, ...]:
        """`left_out` with the images that have no readable header."""
        unread = [
            LeftOut(NOT_READ, each.name, each.unread, True, (each.first_unread,)) for each in self.splits if each.unread
        ]
        return (*unread, *self.left_out)

    def lines(self) -> Iterator[str]:
        """The account for people: the images by split, then one line for each thing that is left out."""
        counts = (
            f"{each.found(self.left_out) - each.lost(self.left_out):,} of {each.found(self.left_out):,} {each.name}"
            for each in self.splits
        )
        yield f"{shown(self.root)}: {', '.join(counts)} images used"
        for each in self.whole:
            place = f" of {each.split}" if each.split else ""
            yield f"  left out{place}: {each}" if each.lost else f"  not used{place}: {each}"
        yield from (f"  {note}" for note in self.notes)

    def check(self, max_share: float) -> None:
        """Raises DataError if more than `max_share` of the images of a split, or of the root, are left out."""
        lost = sum(each.count for each in self.whole if each.lost)
        found = lost + sum(each.listed - each.unread for each in self.splits)
        parts = [(each.name, each.lost(self.left_out), each.found(self.left_out)) for each in self.splits]
        for part, count, total in (*parts, ("all", lost, found)):
            if count > max_share * total:
                raise self._too_many(part, count, total, max_share)

    def _too_many(self, part: str, count: int, total: int, max_share: float) -> DataError:
        named = [each for each in self.whole if each.lost and (part == "all" or each.split == part)]
        listed = "\n".join(f"  {each}" for each in named[:10])
        return DataError(
            f"{self.root}: {count:,} of {total:,} images{'' if part == 'all' else f' of {part}'} ({count / total:.2%}) "
            f"are not used; data.max_bad_share allows {max_share:.2%}. Not used:\n{listed}\nMend them, move what is "
            "not meant for training out of the root, or raise data.max_bad_share. `adaptnet data pack` makes a set "
            "without them.",
            key="data.max_bad_share",
            subject=max_share,
        )
