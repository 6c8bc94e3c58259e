"""Images that cannot be decoded: which are known, what replaces each, and how many are too many."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import ImageIndex
from pipeline.errors import DataError

NO_SIZE = "its header gives no size, or an absurd one"


class BadState(TypedDict):
    """The known bad images as plain values: `rows` is a list of [row, reason]."""

    rows: list[list[int | str]]


class BadImages:
    """The known bad rows of an index with their reasons; loaders add those that they find.

    A bad image is replaced by the next good one of its class in index order; the first follows the last. So the
    replacement depends on which images are bad, but not on when, or by which rank, each was found.
    Images whose header gave no size when the index was built are known from the start.
    """

    def __init__(self, index: ImageIndex, max_share: float) -> None:
        """Raises DataError if more than `max_share` of the index is unreadable already."""
        self.index = index
        self.max_share = max_share
        self._reasons: dict[int, str] = {}
        self._rows_by_label: dict[int, NDArray[np.int64]] = {}
        unread = np.flatnonzero(index.height == 0)
        self.merge({"rows": [[int(row), NO_SIZE] for row in unread]})

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, row: object) -> bool:
        return row in self._reasons

    def add(self, row: int, reason: str) -> bool:
        """Adds a bad row; returns whether it was new. Raises DataError above `max_share`."""
        return self.merge({"rows": [[int(row), reason]]}) > 0

    def reason(self, row: int) -> str:
        """Why a known bad row cannot be decoded."""
        return self._reasons[int(row)]

    def replacement(self, row: int) -> int:
        """`row` itself if it is not known as bad, else the good row that replaces it.

        Raises DataError if no image of its class is left.
        """
        if row not in self._reasons:
            return int(row)
        label = int(self.index.label[row])
        if label not in self._rows_by_label:
            self._rows_by_label[label] = np.flatnonzero(self.index.label == label)
        rows = self._rows_by_label[label]
        start = int(np.searchsorted(rows, row))
        for candidate in np.concatenate([rows[start + 1 :], rows[:start]]):
            if int(candidate) not in self._reasons:
                return int(candidate)
        raise DataError(
            f"no image of class {self.index.classes[label]!r} can be decoded ({len(rows)} tried); the last one: "
            f"{self.index.file(row)} ({self._reasons[int(row)]}). Repair the class or leave it out.",
            key="data.root",
            subject=self.index.classes[label],
        )

    def state(self) -> BadState:
        """The known rows, by their numbers in this index, as plain values for a checkpoint."""
        return {"rows": [[row, reason] for row, reason in sorted(self._reasons.items())]}

    def merge(self, state: BadState) -> int:
        """Adds the rows that another rank or a checkpoint knows; returns how many were new.

        Raises DataError above `max_share`, and for a state of another index.
        """
        before = len(self._reasons)
        for row, reason in ((int(row), str(reason)) for row, reason in state["rows"]):
            if not 0 <= row < len(self.index):
                raise DataError(
                    f"bad image {row}: the index has only {len(self.index)} images, so the list belongs to another set",
                    key="data.root",
                    subject=row,
                )
            self._reasons.setdefault(row, reason)
        if len(self._reasons) > before:
            self._check_share()
        return len(self._reasons) - before

    def report(self) -> list[dict[str, str]]:
        """File and reason of each bad image, to be read by people."""
        return [{"file": self.index.file(row), "reason": self._reasons[row]} for row in sorted(self._reasons)]

    def _check_share(self) -> None:
        share = len(self._reasons) / len(self.index)
        if share <= self.max_share:
            return
        named = [f"  {each['file']}: {each['reason']}" for each in self.report()[:5]]
        raise DataError(
            f"{len(self._reasons)} of {len(self.index)} images ({share:.2%}) cannot be decoded; data.max_bad_share "
            f"allows {self.max_share:.2%}. The first:\n" + "\n".join(named) + f"\n`adaptnet data check "
            f"{self.index.root}` lists them all, `adaptnet data pack` leaves them out; or raise data.max_bad_share.",
            key="data.max_bad_share",
            subject=self.max_share,
        )
