"""The private parts of libraries that this code uses: one module for each library, checked when it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from pipeline.errors import ResourceError


def require(library: str, owner: object, paths: Sequence[str], *, tried: str) -> None:
    """Checks that `owner`, a part of the distribution `library`, has an attribute at each of the dotted `paths`.

    Raises ResourceError naming the library, its version, what is missing and the versions that were `tried`.
    """
    missing = [path for path in paths if not _has(owner, path)]
    if missing:
        place = getattr(owner, "__name__", type(owner).__name__)
        raise ResourceError(
            f"{library} {version(library)} has no {', '.join(f'{place}.{path}' for path in missing)}, which AdaptNet "
            f"uses. It was tried with {library} {tried}; install one of these versions",
            key=library,
            subject=version(library),
        )


def _has(owner: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True
