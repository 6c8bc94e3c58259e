"""Files that ship with the package in a folder of their own, such as sweeps and claims, found by name."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from pipeline.errors import ConfigError


def names(folder: Path) -> list[str]:
    """The names of the files in `folder`, without .yaml, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def path_of(kind: str, source: str, folder: Path) -> Path:
    """The file of that name in `folder`, or the path itself if it ends in .yaml. kind: what it is, e.g. "sweep".

    Raises ConfigError with the nearest name.
    """
    if source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise ConfigError(f"{kind} {source}: no such file", key=kind, subject=source)
        return Path(source)
    known = names(folder)
    if source not in known:
        close = get_close_matches(source, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"{kind} {source}: no such {kind}; {hint}known: {', '.join(known)}; or a path to a .yaml",
            key=kind,
            subject=source,
        )
    return folder / f"{source}.yaml"
