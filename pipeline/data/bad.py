"""Images that cannot be decoded: which are known, what stands in for each, and when there are too many to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.image_headers import looks_whole
from pipeline.data.index import ImageIndex
from pipeline.errors import DataError

__all__ = ["BadImages", "looks_whole"]


class BadImages:
    """The known bad rows of an index, each with its reason; grows as loaders find more.

    A bad image is replaced by the next good one of its class in index order, the first following the last. So the
    replacement depends on which images are bad and not on when, or by which rank, each was found.
    Images whose header gave no size when the index was built are known from the start.
    """

    def __init__(self, index: ImageIndex, max_share: float) -> None:
        """Raises DataError if more than `max_share` of the index is unreadable already."""
        self.index = index
        self.max_share = max_share
        self._reasons: dict[int, str] = {}
        self._rows_by_label: dict[int, NDArray[np.int64]] = {}
        unread = np.flatnonzero(index.height == 0)
        self.merge({"rows": [[int(row), "its header gives no size, or an absurd one"] for row in unread]})

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, row: object) -> bool:
        return row in self._reasons

    def add(self, row: int, reason: str) -> bool:
        """Notes a bad row; True if it was not known. Raises DataError above `max_share`."""
        return self.merge({"rows": [[int(row), reason]]}) > 0

    def reason(self, row: int) -> str:
        return self._reasons[int(row)]

    def replacement(self, row: int) -> int:
        """`row` itself if it is not known as bad, else the good row that stands in for it.

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
            f"no image of class {self.index.classes[label]!r} can be decoded ({len(rows)} tried); the last: "
            f"{self.index.file(row)} ({self._reasons[int(row)]}). Mend the class or leave it out."
        )

    def state(self) -> dict[str, Any]:
        """All that is known, as plain values; rows count in this index."""
        return {"rows": [[row, reason] for row, reason in sorted(self._reasons.items())]}

    def merge(self, state: Mapping[str, Any]) -> int:
        """Adds what another rank or a checkpoint knows; how many were new. Raises DataError above `max_share`."""
        before = len(self._reasons)
        for row, reason in state["rows"]:
            if not 0 <= row < len(self.index):
                raise DataError(f"bad image {row}: the index holds {len(self.index)} images; it is of another set")
            self._reasons.setdefault(int(row), str(reason))
        if len(self._reasons) > before:
            self._check_share()
        return len(self._reasons) - before

    def report(self) -> list[dict[str, str]]:
        """File and reason of each, for people."""
        return [{"file": self.index.file(row), "reason": self._reasons[row]} for row in sorted(self._reasons)]

    def _check_share(self) -> None:
        share = len(self._reasons) / len(self.index)
        if share <= self.max_share:
            return
        named = [f"  {each['file']}: {each['reason']}" for each in self.report()[:5]]
        raise DataError(
            f"{len(self._reasons)} of {len(self.index)} images ({share:.2%}) cannot be decoded; data.max_bad_share "
            f"allows {self.max_share:.2%}. The first:\n" + "\n".join(named) + f"\n`adaptnet data check "
            f"{self.index.root}` lists them all, `adaptnet data pack` leaves them out; or raise data.max_bad_share."
        )
