"""Lists the images of archives that only packing reads: compressed shards, and tars of class folders."""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from pipeline.data.class_names import read_classes
from pipeline.data.listing import TAR, Listing
from pipeline.data.sources import SourceLayout, check_not_imagenet_archive, count_beside_tars
from pipeline.data.store import Progress
from pipeline.data.tars import are_trees, from_shards, from_tree_tars, scan_shard
from pipeline.errors import DataError
from pipeline.runs.files import whole_file


def key_of_tars(layout: SourceLayout) -> str:
    """16 hex digits that change when an archive or the list of classes changes."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for _, path in layout.tars]
    return sha256(repr((stats, read_classes(layout.root))).encode()).hexdigest()[:16]


def listing_of_tars(layout: SourceLayout, scratch: Path, workers: int, progress: Progress | None) -> Listing:
    """The images in the tars of a source; compressed tars are unpacked into `scratch`.

    Raises DataError for a damaged archive, for ImageNet's own, and for several tars of which none is train or val by
    its name.
    """
    check_not_imagenet_archive(layout.tars)
    tars = _uncompressed(layout.tars, scratch, workers, progress)
    root = scratch if all(scratch in path.parents for _, path in tars) else layout.root
    if all(split is not None for split, _ in tars) and not are_trees([scan_shard(tars[0][1])]):
        return from_shards(root, tars, count_beside_tars(layout), classes_at=layout.root)
    if len(tars) > 1 and any(split is None for split, _ in tars):
        names = ", ".join(path.name for _, path in layout.tars[:3])
        raise DataError(
            f"{layout.root}: several tars ({names}), none of them named train or val; pack one at a time",
            key="source",
            subject=layout.root,
        )
    return from_tree_tars(root, tars, classes_at=layout.root)


def _uncompressed(
    tars: Sequence[tuple[str | None, Path]], scratch: Path, workers: int, progress: Progress | None
) -> tuple[tuple[str | None, Path], ...]:
    """The tars; compressed ones are unpacked into `scratch`, which exists until the pack is complete."""
    plain = [
        path if path.name.lower().endswith(".tar") else scratch / (split or "") / f"{TAR.sub('', path.name)}.tar"
        for split, path in tars
    ]
    due = [(path, to) for (_, path), to in zip(tars, plain, strict=True) if to != path and not to.exists()]
    with ThreadPoolExecutor(workers) as threads:
        for done, _ in enumerate(threads.map(lambda pair: unpack(*pair), due), 1):
            if progress:
                progress("unpacking archives", done, len(due))
    return tuple((split, to) for (split, _), to in zip(tars, plain, strict=True))


def unpack(compressed: Path, tar: Path) -> None:
    """Writes the tar inside a .tar.gz to `tar`. Raises DataError if the archive is damaged."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(tar) as aside, gzip.open(compressed) as source, open(aside, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{compressed}: not a complete gzip file ({error}); download it again", key="source", subject=compressed
        ) from None
