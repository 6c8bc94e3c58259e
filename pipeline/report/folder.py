"""The report's folder: index.html, data.json, policies.csv, classes.csv, and figures/ with a PNG and a CSV of each.

data.json is written first and lists all files. So an interrupted report can be recognised and completed, and a new
report can remove the files of an earlier one. Other files in the folder stay.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.errors import ConfigError, JsonValue, ResourceError
from pipeline.runs.files import write_bytes, write_text

PAGE, DATA, FIGURES = "index.html", "data.json", "figures"
FORMAT = "adaptnet report 1"


def check(out: Path) -> None:
    """Raises ConfigError if `out` holds anything but a report, ResourceError if it cannot be written."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out (={out}): is a file; name a folder", key="--out", subject=out)
    if out.is_dir() and any(out.iterdir()) and not earlier(out):
        raise ConfigError(
            f"--out (={out}): holds files that are no report and would be mixed with it; name a new or empty folder",
            key="--out",
            subject=out,
        )
    try:
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        probe = out / f".{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(out, error) from None


def earlier(out: Path) -> Mapping[str, JsonValue]:
    """data.json of the report in `out`; empty if there is none. An empty figures/ alone is an interrupted report."""
    try:
        data = json.loads((out / DATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        interrupted = [path.name for path in out.iterdir()] == [FIGURES] and not any((out / FIGURES).iterdir())
        return {"files": []} if interrupted else {}
    return data if isinstance(data, dict) and data.get("format") == FORMAT else {}


def write(out: Path, data: Mapping[str, object], contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes all files, the page last, and removes files of an earlier report that this one does not have.

    contents {path in `out`: content}. Raises ResourceError if the files cannot be written.
    """
    check(out)
    listed = earlier(out).get("files")
    before = [str(name) for name in listed] if isinstance(listed, list) else []
    names = [DATA, *contents]
    # lists the earlier files as well, until they are removed
    whole = {"format": FORMAT, "files": sorted({*names, *before}), **data}
    try:
        write_text(out / DATA, _json(whole))
        for name, content in contents.items():
            _put(out / name, content)
        for name in set(before) - set(names):
            _remove(out, name)
        write_text(out / DATA, _json({**whole, "files": sorted(names)}))
    except OSError as error:
        raise _unwritable(out, error) from None
    return [out / name for name in sorted(names)]


def _json(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=1, allow_nan=False, default=str)


def _put(path: Path, content: str | bytes) -> None:
    write_bytes(path, content.encode("utf-8") if isinstance(content, str) else content)


def _remove(out: Path, name: str) -> None:
    """Removes a file of an earlier report, if a report writes files of this name."""
    known = (PAGE, "policies.csv", "classes.csv")
    place = Path(name)
    if name in known or (place.parts[:1] == (FIGURES,) and len(place.parts) == 2 and place.suffix in (".png", ".csv")):
        with suppress(FileNotFoundError):
            (out / name).unlink()


def _unwritable(out: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"--out (={out}): cannot be written ({error.strerror}); name a writable folder with free space",
        key="--out",
        subject=error.strerror,
    )
