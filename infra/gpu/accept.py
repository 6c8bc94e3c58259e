"""Conducts the acceptance run on a GPU: starts each part in a process of its own, and prints and stores its rows."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from infra.gpu.parts import BROKEN_GPU, PARTS, Part
from infra.gpu.photographs import jpegs_in

Row = dict[str, object]
WIDTHS = {"part": 12, "what": 52, "value": 30, "expected": 24, "verdict": 12}
LEAST_S = 12.0  # a part that has less than this is left out
PER_PART_RESTARTS = 12
AGAIN = "again"  # the error is a row already


@dataclass
class ResultTable:
    """The rows so far; each is printed and stored as soon as it is known."""

    path: Path | None
    about: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    parts: list[Row] = field(default_factory=list)

    def add(self, part: str, row: Mapping[str, object]) -> None:
        whole = {"part": part, "unit": "", "detail": "", "expected": "", **row}
        self.rows.append(whole)
        print(line(whole), flush=True)
        self.store()

    def store(self) -> None:
        if self.path is not None:
            aside = self.path.with_name(f".{self.path.name}.writing")
            aside.write_text(json.dumps({**self.about, "parts": self.parts, "rows": self.rows}, indent=1))
            os.replace(aside, self.path)

    def show(self) -> None:
        print("\n" + "=" * 40 + " all rows " + "=" * 40)
        for row in self.rows:
            print(line(row))
        verdicts = [str(row["verdict"]) for row in self.rows]
        print(", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts)), flush=True)


def line(row: Mapping[str, object]) -> str:
    """A row as text."""
    value = row.get("value", "")
    number = f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e5 else f"{value}"
    cells = {**row, "value": f"{number} {row.get('unit', '')}".strip()}
    text = "  ".join(f"{cells.get(name, '')!s:{width}}" for name, width in WIDTHS.items())
    return f"{text}  {row.get('detail', '')}".rstrip()


@dataclass
class Conductor:
    """Runs parts until the time is over. facts: what the part `environment` found, e.g. {"gpu": True, "dali": False}"""

    table: ResultTable
    work: Path
    data: Path
    ends: float
    small: bool
    patience: float = 1.0  # factor of all time limits
    facts: dict[str, object] = field(default_factory=dict)

    def run(self, part: Part) -> None:
        """Runs one part, or says why not."""
        started, left = time.monotonic(), self.ends - time.monotonic()
        why = self._refused(part, left)
        if why:
            self.table.add(part.name, {"what": part.about, "value": "", "verdict": why})
        else:
            self._tries(part, min(part.limit_s * self.patience, left - 2))
        seconds = round(time.monotonic() - started, 1)
        self.table.parts.append({"name": part.name, "state": why or "run", "seconds": seconds})
        self.table.store()
        print(f"-- {part.name}: {seconds} s", flush=True)

    def _refused(self, part: Part, left: float) -> str:
        if "gpu" in part.needs and not self.small and self.facts.get("gpu") is False:
            return "needs a GPU"
        if "dali" in part.needs and self.facts.get("dali") is False:
            return "needs DALI"
        return "left out: no time" if left < LEAST_S else ""

    def _tries(self, part: Part, seconds: float) -> None:
        ends, begun = time.monotonic() + seconds, list[str]()
        for _ in range(PER_PART_RESTARTS):
            attempt = PartRun(self, part, begun)
            died = attempt.watch(ends)
            if not died:
                return
            if died != AGAIN:
                self.table.add(part.name, {"what": attempt.case or part.about, "value": died, "verdict": "failed"})
            print(attempt.last_words(), flush=True)
            if attempt.case is None or time.monotonic() > ends - LEAST_S:
                return


class PartRun:
    """One process of a part. case: the case that it is in, None before the first and between two."""

    def __init__(self, conductor: Conductor, part: Part, begun: list[str]) -> None:
        self._conductor, self._part, self._begun = conductor, part, begun
        self.case: str | None = None
        number = len(list(conductor.work.glob(f"{part.name}-*.rows")))
        self._rows = conductor.work / f"{part.name}-{number}.rows"
        self._log = self._rows.with_suffix(".log")
        self._rows.touch()
        self._read = 0
        fields = {"part": part.name, "rows": self._rows, "work": conductor.work, "data": conductor.data}
        given = {"function": part.function, **fields, "small": conductor.small, "begun": begun}
        with open(self._log, "wb") as log:
            command = [
                sys.executable,
                "-u",
                "-X",
                "faulthandler",
                "-m",
                "infra.gpu.run",
                json.dumps(given, default=str),
            ]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def watch(self, ends: float) -> str:
        """Passes rows on until the process ends; "" if it ended well, else how it died."""
        try:
            while self._process.poll() is None and time.monotonic() < ends:
                self._pass_on()
                time.sleep(0.1)
            late = self._process.poll() is None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
            self._pass_on()
        return "out of time" if late else death(code, self.case)

    def _pass_on(self) -> None:
        for row in self._new_lines():
            if "begin" in row:
                self.case = str(row["begin"])
                self._begun.append(self.case)
            elif "end" in row:
                self.case = None
            elif "facts" in row:
                facts = row["facts"]
                assert isinstance(facts, dict)
                self._conductor.facts |= facts
                self._conductor.table.about["facts"] = self._conductor.facts
            else:
                self._conductor.table.add(self._part.name, row)

    def _new_lines(self) -> Iterator[Row]:
        with open(self._rows, encoding="utf-8") as file:
            file.seek(self._read)
            text = file.read()
        whole, newline, _ = text.rpartition("\n")
        self._read += len((whole + newline).encode())
        for each in whole.splitlines():
            with suppress(ValueError):
                yield json.loads(each)

    def last_words(self, lines: int = 25) -> str:
        """The end of what the process printed."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(f"    | {each}" for each in text.splitlines()[-lines:])


def death(code: int, case: str | None) -> str:
    """How a process ended: "" if well."""
    if code == BROKEN_GPU:
        return AGAIN
    if code < 0:
        return f"died: {signal.Signals(-code).name}"
    if code == 0:
        return ""
    return f"exit code {code}" if case is None else f"exit code {code} in {case}"


def chosen(only: Sequence[str] | None) -> list[Part]:
    """The parts in their order, or `environment` and those of --only in the order in which they are given."""
    parts = {part.name: part for part in PARTS}
    return [parts[name] for name in dict.fromkeys(["environment", *(only or parts)])]


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="infra/gpu/accept.sh", description="Tries the GPU paths; see accept.sh.")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts")
    parser.add_argument("--json", type=Path, help="file for all rows, complete after each")
    parser.add_argument(
        "--only", nargs="+", choices=[part.name for part in PARTS], help="only these parts, in this order"
    )
    parser.add_argument("--work", type=Path, help="folder for logs and temporary files")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of the parts' time limits")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small sizes")
    parser.add_argument("--list", action="store_true", help="list the parts and their time limits")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Runs the parts and prints the table. The exit code is 0 whatever the parts find."""
    arguments = parsed(given)
    if arguments.list:
        print("\n".join(f"{part.name:12} {part.limit_s:4g} s  {part.about}" for part in PARTS))
        return
    ends = time.monotonic() + arguments.minutes * 60
    table = ResultTable(arguments.json, {"started": time.strftime("%Y-%m-%dT%H:%M:%S"), "command": sys.argv[1:]})
    work = arguments.work or Path(tempfile.mkdtemp(prefix="adaptnet-accept-"))
    work.mkdir(parents=True, exist_ok=True)
    print(f"logs and temporary files: {work}", flush=True)
    conductor = Conductor(table, work, work / "data", ends, arguments.rehearse, arguments.patience)
    conductor.data = jpegs_in(os.environ.get("DATA", ""), work / "data", few=arguments.rehearse)
    try:
        for part in chosen(arguments.only):
            conductor.run(part)
    finally:
        table.about["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
        table.store()
        table.show()


if __name__ == "__main__":
    main()
