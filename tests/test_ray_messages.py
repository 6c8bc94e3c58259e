"""What code outside Python writes to standard error is kept apart; what we print still reaches the user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import os, sys
from pathlib import Path
from pipeline.execution.ray_messages import into_file
before = sys.stderr
with into_file(Path(sys.argv[1]) if sys.argv[1:] else None):
    os.write(2, b"of C++\\n")
    print("ours", file=sys.stderr)
assert sys.stderr is before
os.write(2, b"after\\n")
"""


def printed(*arguments: object) -> str:
    words = [sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stderr


def test_it_goes_into_the_file(tmp_path: Path) -> None:
    assert printed(tmp_path / "ray.log") == "ours\nafter\n"
    assert (tmp_path / "ray.log").read_text() == "of C++\n"
    printed(tmp_path / "ray.log")
    assert (tmp_path / "ray.log").read_text() == "of C++\n" * 2, "an earlier start's lines were lost"


def test_without_a_file_nothing_changes(tmp_path: Path) -> None:
    assert printed() == printed(tmp_path / "missing" / "ray.log") == "of C++\nours\nafter\n"


def test_an_empty_file_is_removed(tmp_path: Path) -> None:
    from pipeline.execution.ray_messages import into_file

    with into_file(tmp_path / "ray.log"):
        pass
    assert not list(tmp_path.iterdir())
