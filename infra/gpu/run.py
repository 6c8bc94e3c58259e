"""What a part of the acceptance run gets: where it computes, and where its rows go.

A part is a function of a `Run`. It calls `run.case(name, work)` for each thing that it tries. Rows go to a file line by
line, so that those before a crash are kept; a part that died is started again without the cases that were begun.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from infra.gpu import expected
from infra.gpu.parts import BROKEN_GPU


@dataclass
class Run:
    """One process of a part. small: sizes of a rehearsal on the CPU; begun: cases that are not tried again."""

    part: str
    rows: Path
    work: Path
    data: Path
    small: bool = False
    begun: list[str] = field(default_factory=list)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.small else torch.device("cuda", 0)

    def case(self, name: str, work: Callable[[], None]) -> None:
        """Runs `work` once over all processes of the part. An error of it becomes a row."""
        if name in self.begun:
            return
        self._write({"begin": name})
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            text = (str(error).strip().splitlines() or [""])[0]
            self._write({"what": name, "value": f"{type(error).__name__}: {text[:300]}", "verdict": "failed"})
            if "CUDA" in str(error) and "out of memory" not in str(error):
                sys.exit(BROKEN_GPU)
        self._write({"end": name})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def row(self, what: str, value: float | str, unit: str = "", detail: str = "") -> None:
        """A row of the table; a number is compared with what is expected."""
        wanted = expected.EXPECTED.get(f"{self.part}: {what}")
        verdict = "measured" if wanted is None or isinstance(value, str) else "ok" if wanted.holds(value) else "differs"
        shown = value if isinstance(value, str) or math.isfinite(value) else str(value)  # JSON has no NaN
        words = {"what": what, "value": shown, "unit": unit, "detail": detail, "verdict": verdict}
        self._write({**words, "expected": "" if wanted is None else str(wanted)})

    def _write(self, line: Mapping[str, object]) -> None:
        with open(self.rows, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main(given: str) -> None:
    """Runs a part in this process: {"function": "module:name", and the fields of Run}."""
    fields = json.loads(given)
    module, _, name = str(fields.pop("function")).partition(":")
    run = Run(**{**fields, **{key: Path(fields[key]) for key in ("rows", "work", "data")}})
    torch.manual_seed(0)
    getattr(importlib.import_module(module), name)(run)


if __name__ == "__main__":
    main(sys.argv[1])
