"""`adaptnet data`: make, pack, check and describe image sets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.data.index import ImageIndex
    from pipeline.data.pack import PackReport

LINE_EVERY_S = 5.0
SHOWN = 20  # bad images that are printed; --all prints the rest

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="""Sets of images: class folders (train/<class>/*.jpg with val/<class>/*.jpg, or <class>/*.jpg alone), or tar
shards (train-*.tar with val-*.tar of KEY.jpg and KEY.cls, beside classes.txt).

Examples:

  adaptnet data toy toy-data

  adaptnet data pack /data/imagenet packed/imagenet --side 256

  adaptnet data check /data/imagenet

  adaptnet data info packed/imagenet
""",
)


@app.command(
    short_help="Draw a small set of JPEGs from a seed.",
    help="""Draws a small set of JPEGs from a seed: ten shapes, some plain to see, some small, pale and cluttered.

Examples:

  adaptnet data toy toy-data

  adaptnet data toy toy-data-large --classes 30 --train 6000 --val 1500 --side 96
""",
)
def toy(
    out: Annotated[Path, typer.Argument(help="folder to make; train/<class>/ and val/<class>/ go into it")],
    classes: Annotated[int, typer.Option(min=2, max=60, help="above ten, a class is a shape and a hue")] = 10,
    train: Annotated[int, typer.Option(min=2, help="training images in all")] = 1500,
    val: Annotated[int, typer.Option(min=2, help="validation images in all")] = 500,
    side: Annotated[int, typer.Option(min=16, help="shorter side in pixels")] = 48,
    seed: Annotated[int, typer.Option(help="same seed, same bytes")] = 0,
) -> None:
    from pipeline.data.toy import make

    folder = make(out, num_classes=classes, train=train, val=val, side_px=side, seed=seed)
    typer.echo(f"{folder}: {train} train and {val} val images of {classes} classes")
    typer.echo(f"Next: adaptnet data info {out}, or adaptnet train RECIPE data.root={out}")


@app.command(
    short_help="Verify every image and pack the good ones into tar shards.",
    help="""Packs SOURCE into tar shards with an index in DESTINATION; decodes every image and sets bad ones aside in
DESTINATION/report.json. Interrupted, the same command goes on where it was.

SOURCE holds class folders, tar shards (.tar or .tar.gz), or is a tar of class folders.

Examples:

  adaptnet data pack /data/imagenet packed/imagenet

  adaptnet data pack /data/imagenet packed/imagenet-256 --side 256 --workers 16

  adaptnet data pack photos.tar packed/photos
""",
)
def pack(
    source: Annotated[Path, typer.Argument(help="class folders, tar shards, or a tar of class folders")],
    destination: Annotated[Path, typer.Argument(help="a new folder, or one of an interrupted pack")],
    side: Annotated[
        int | None, typer.Option(min=1, help="shrink to this shorter side in pixels; default: bytes as they are")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="of JPEGs that --side makes anew")] = 92,
    shard_mb: Annotated[int | None, typer.Option(min=1, help="size of a shard; default: about 64 shards")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: the CPUs here")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="print every image that was set aside")] = False,
) -> None:
    from pipeline.data.pack import pack as run

    with _progress() as progress:
        report = run(
            source,
            destination,
            side=side,
            quality=quality,
            shard_bytes=None if shard_mb is None else shard_mb << 20,
            workers=workers,
            progress=progress,
        )
    _print_pack(report, destination, show_all)


def _print_pack(report: PackReport, destination: Path, show_all: bool) -> None:
    from jobs import tables

    kept = f", {report.kept_shards} of them kept from before" if report.kept_shards else ""
    facts = {
        "packed": str(report.destination),
        "images": ", ".join(f"{count:,} {split}" for split, count in report.images.items()),
        "classes": f"{report.num_classes:,}",
        "shards": f"{report.shards} ({_bytes(report.bytes)}){kept}",
        "set aside": f"{len(report.set_aside):,}",
        "time": f"{report.seconds:.1f} s",
    }
    typer.echo(tables.of_pairs(facts))
    _print_bad(report.set_aside, show_all)
    _print_ignored(report.ignored)
    typer.echo(f"Next: adaptnet train RECIPE data.root={destination}")


@app.command(
    "import",
    short_help="Pack a known set from its publisher's own files.",
    help="""Packs a known set from the files that its publisher gives out, under their own names: cifar10, cifar100,
svhn, stl10, tiny-imagenet, aircraft, flowers102, cars, cub or imagenet. What the publisher tests on becomes val.
Checksums are compared where they are known. Interrupted, the same command goes on where it was.

ImageNet: ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz; or a FOLDER with train/<wnid>/
and a flat val/, beside the development kit or LOC_val_solution.csv.

Examples:

  adaptnet data import cifar10 cifar-10-python.tar.gz --out packed/cifar10

  adaptnet data import svhn train_32x32.mat test_32x32.mat --out packed/svhn

  adaptnet data import imagenet /data/imagenet ILSVRC2012_devkit_t12.tar.gz --out packed/imagenet --side 256
""",
)
def import_set(
    name: Annotated[str, typer.Argument(help="the set, e.g. cifar10")],
    files: Annotated[list[Path], typer.Argument(help="its publisher's files")],
    out: Annotated[Path, typer.Option(help="a new folder, or one of an interrupted import")],
    checksum: Annotated[bool, typer.Option(help="compare with the publisher's md5 where it is known")] = True,
    side: Annotated[
        int | None, typer.Option(min=1, help="shrink to this shorter side in pixels; default: bytes as they are")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="of JPEGs that --side makes anew")] = 92,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: the CPUs here")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="print every image that was set aside")] = False,
) -> None:
    from pipeline.data.publishers import import_set as run

    with _progress() as progress:
        report = run(
            name, files, out, checksums=checksum, side=side, quality=quality, workers=workers, progress=progress
        )
    _print_pack(report, out, show_all)


@app.command(
    short_help="Decode every image and list the bad ones.",
    help="""Decodes every image under ROOT where it lies and lists the bad ones: empty, truncated, no image, of absurd
size, with a wrong label or a key that another has. In a packed set the bytes must be those that were packed.
Exits with 1 if there are any.

Examples:

  adaptnet data check /data/imagenet

  adaptnet data check packed/imagenet --workers 16 --all
""",
)
def check(
    root: Annotated[Path, typer.Argument(help="class folders or tar shards")],
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: the CPUs here")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="print every bad image")] = False,
) -> None:
    from pipeline.data.check import check as run

    with _progress() as progress:
        report = run(root, workers=workers, progress=progress)
    how = "decoded, and bytes compared with those packed" if report.checksums else "decoded"
    typer.echo(f"{root}: {report.images:,} images {how} in {report.seconds:.1f} s; {len(report.bad):,} bad")
    _print_bad(report.bad, show_all)
    _print_ignored(report.ignored)
    if report.bad:
        typer.echo("Training replaces them by rule; `adaptnet data pack` leaves them out for good.")
        raise typer.Exit(1)


@app.command(
    short_help="Splits, classes, sizes and bytes of a set.",
    help="""Splits, classes, sizes and bytes of a set, where its index lies, and how to shuffle it.

Examples:

  adaptnet data info packed/imagenet

  adaptnet data info /data/photos --validation-share 0.2 --seed 1
""",
)
def info(
    root: Annotated[Path, typer.Argument(help="class folders or tar shards")],
    index: Annotated[Path | None, typer.Option(help="where the index lies, as data.index")] = None,
    validation_share: Annotated[float, typer.Option(help="of a set without a val split, as in a recipe")] = 0.1,
    seed: Annotated[int, typer.Option(help="that draws it, as in a recipe")] = 0,
) -> None:
    from jobs import tables
    from pipeline.config import validate
    from pipeline.data.config import DataConfig
    from pipeline.data.index import open_splits

    given = {"root": str(root), "index": index and str(index), "validation_share": validation_share}
    with _progress() as progress:
        splits = open_splits(validate(DataConfig, given, "data"), seed, progress)
    whole = splits.train.whole
    drawn = "" if whole.meta.has_splits else f" (val drawn by seed {seed})"
    facts = {
        "root": str(whole.root),
        "index": str(whole.folder),
        "identity": whole.identity,
        "images": f"{len(splits.train):,} train, {len(splits.val):,} val{drawn}",
        "classes": _classes(splits.train),
        "bytes": _bytes(int(whole.length.sum())) + _storage(whole),
        "median size": _median_size(whole),
        "set aside": f"{len(whole.meta.set_aside):,} with a wrong label or key",
        "unreadable": f"{int((whole.height == 0).sum()):,} headers; adaptnet data check {root} decodes them all",
        "shuffle": _advice(whole, root),
    }
    typer.echo(tables.of_pairs(facts))
    typer.echo("\nshorter side, pixels")
    typer.echo(_histogram(whole))
    _print_bad(whole.meta.set_aside, show_all=False)
    _print_ignored(whole.meta.ignored)


def _classes(index: ImageIndex) -> str:
    import numpy as np

    counts = np.bincount(index.label, minlength=len(index.classes))
    names = ", ".join(index.classes[:5]) + (", …" if len(index.classes) > 5 else "")
    return f"{len(index.classes):,}, each of {counts.min():,} to {counts.max():,} training images: {names}"


def _storage(index: ImageIndex) -> str:
    return " in loose files" if index.shards is None else f" in {len(index.shards):,} shards"


def _median_size(index: ImageIndex) -> str:
    import numpy as np

    return f"{np.median(index.width):.0f} x {np.median(index.height):.0f} px, {_bytes(int(np.median(index.length)))}"


def _advice(index: ImageIndex, root: Path) -> str:
    if index.shards is None:
        return f"full; block needs shards: adaptnet data pack {root} DESTINATION"
    return "full where the set fits in memory or lies on a local disk; block (data.shuffle=block) where it does not"


def _histogram(index: ImageIndex) -> str:
    import numpy as np

    sides = np.minimum(index.height, index.width)
    bounds = [0, 1, 32, 64, 128, 256, 384, 512, 1024, 1 << 31]
    counts = np.histogram(sides, bounds)[0]
    lines = []
    for start, stop, count in zip(bounds[:-1], bounds[1:], counts, strict=True):
        if count:
            name = "unread" if stop == 1 else f"{start}-{stop - 1}" if stop < 1 << 31 else f"{start} and more"
            lines.append(f"{name:>13} {count:>10,} {'#' * max(1, round(40 * count / counts.max()))}")
    return "\n".join(lines)


def _print_bad(bad: Sequence[tuple[str, str]], show_all: bool) -> None:
    for name, reason in bad if show_all else bad[:SHOWN]:
        typer.echo(f"  {name}: {reason}")
    if len(bad) > SHOWN and not show_all:
        typer.echo(f"  and {len(bad) - SHOWN:,} more (--all prints them)")


def _print_ignored(ignored: int) -> None:
    if ignored:
        typer.echo(f"{ignored:,} files were passed over: no images by extension, or in no class folder")


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, now and then a line elsewhere; a total of 0 is a message."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr, soft_wrap=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield _lines(console.print)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if total == 0:
                bar.console.print(what)
                return
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)  # type: ignore[arg-type]

        yield show


def _lines(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if total == 0 or time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            say(what if total == 0 else f"{what}: {done:,} of {total:,}")

    return show
