"""`adaptnet data`: make, pack, check and describe image sets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.data.account import LeftOut
    from pipeline.data.index import ImageIndex, Splits
    from pipeline.data.pack import PackReport

LINE_EVERY_S = 5.0
SHOWN = 20  # bad images, and classes, that are printed without --all
IMBALANCE = 5  # ratio of the largest class to the smallest above which `info` warns
LARGEST_ERROR = 3.0  # points of standard error of top-1 above which `info` calls a val split small

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="""Makes, packs, checks and describes image sets. A set is a folder of class folders (train/<class>/*.jpg with
val/<class>/*.jpg, or <class>/*.jpg alone) or of tar shards (train-*.tar and val-*.tar, which hold KEY.jpg and KEY.cls,
beside classes.txt).

Examples:

  adaptnet data toy toy-data

  adaptnet data pack /data/imagenet packed/imagenet --side 256

  adaptnet data check /data/imagenet

  adaptnet data info packed/imagenet
""",
)


@app.command(short_help="Draw a small set of JPEGs from a seed.")
def toy(
    out: Annotated[Path, typer.Argument(help="folder to create, with train/<class>/ and val/<class>/")],
    classes: Annotated[
        int, typer.Option(min=2, max=60, help="number of classes; above ten, a class is a shape and a hue")
    ] = 10,
    train: Annotated[int, typer.Option(min=2, help="number of training images")] = 1500,
    val: Annotated[int, typer.Option(min=2, help="number of validation images")] = 500,
    side: Annotated[int, typer.Option(min=16, help="shorter side in pixels")] = 48,
    seed: Annotated[int, typer.Option(help="random seed; the same seed gives the same bytes")] = 0,
) -> None:
    """Draws a small set of JPEGs from a seed: ten shapes, some easy to see, some small, pale and cluttered.

    Examples:

      adaptnet data toy toy-data

      adaptnet data toy toy-data-large --classes 30 --train 6000 --val 1500 --side 96
    """
    from pipeline.data.toy import make

    folder = make(out, num_classes=classes, train=train, val=val, side_px=side, seed=seed)
    typer.echo(f"{folder}: {train} train and {val} val images of {classes} classes")
    typer.echo(f"Next: adaptnet data info {out}, or adaptnet train RECIPE data.root={out}")


@app.command(short_help="Verify every image and pack the good ones into tar shards.")
def pack(
    source: Annotated[Path, typer.Argument(help="class folders, tar shards, or a tar of class folders")],
    destination: Annotated[Path, typer.Argument(help="a new folder, or that of an interrupted pack")],
    side: Annotated[
        int | None, typer.Option(min=1, help="shrink to this shorter side in pixels; default: keep the original bytes")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="quality of the JPEGs that --side encodes")] = 92,
    shard_mb: Annotated[int | None, typer.Option(min=1, help="size of a shard in MB; default: about 64 shards")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="number of processes; default: one per CPU")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="list every image that was left out")] = False,
) -> None:
    """Packs SOURCE into tar shards with an index in DESTINATION. Every image is decoded; bad ones are left out and
    listed in DESTINATION/report.json. After an interruption the same command resumes.

    SOURCE is a folder of class folders, a folder of tar shards (.tar or .tar.gz), or a tar of class folders.

    Examples:

      adaptnet data pack /data/imagenet packed/imagenet

      adaptnet data pack /data/imagenet packed/imagenet-256 --side 256 --workers 16

      adaptnet data pack photos.tar packed/photos
    """
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

    reused = f", {report.kept_shards} of them from the interrupted pack" if report.kept_shards else ""
    facts = {
        "packed": str(report.destination),
        "images": ", ".join(f"{count:,} {split}" for split, count in report.images.items()),
        "classes": f"{report.num_classes:,}",
        "shards": f"{report.shards} ({tables.byte_size(report.bytes)}){reused}",
        "left out": f"{len(report.set_aside) + _unnamed(report.left_out):,}",
        "time": f"{report.seconds:.1f} s",
    }
    typer.echo(tables.of_pairs(facts))
    _print_bad(report.set_aside, show_all)
    _print_left_out(report.left_out)
    typer.echo(f"Next: adaptnet train RECIPE data.root={destination}")


@app.command("import", short_help="Pack a known set from its publisher's files.")
def import_set(
    name: Annotated[str, typer.Argument(help="name of the set, e.g. cifar10")],
    files: Annotated[list[Path], typer.Argument(help="the publisher's files")],
    out: Annotated[Path, typer.Option(help="a new folder, or that of an interrupted import")],
    checksum: Annotated[bool, typer.Option(help="compare with the publisher's MD5 checksum where it is known")] = True,
    side: Annotated[
        int | None, typer.Option(min=1, help="shrink to this shorter side in pixels; default: keep the original bytes")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="quality of the JPEGs that --side encodes")] = 92,
    workers: Annotated[int | None, typer.Option(min=1, help="number of processes; default: one per CPU")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="list every image that was left out")] = False,
) -> None:
    """Packs a known set from its publisher's files, under their original names: cifar10, cifar100, svhn, stl10,
    tiny-imagenet, aircraft, flowers102, cars, cub or imagenet. The publisher's test split becomes val. Checksums are
    compared where they are known. After an interruption the same command resumes.

    For ImageNet give ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or a folder
    with train/<wnid>/ and a flat val/ and, besides it, the development kit or LOC_val_solution.csv.

    Examples:

      adaptnet data import cifar10 cifar-10-python.tar.gz --out packed/cifar10

      adaptnet data import svhn train_32x32.mat test_32x32.mat --out packed/svhn

      adaptnet data import imagenet /data/imagenet ILSVRC2012_devkit_t12.tar.gz --out packed/imagenet --side 256
    """
    from pipeline.data.publishers import import_set as run

    with _progress() as progress:
        report = run(
            name, files, out, checksums=checksum, side=side, quality=quality, workers=workers, progress=progress
        )
    _print_pack(report, out, show_all)


@app.command(short_help="Decode every image and list the bad ones.")
def check(
    root: Annotated[Path, typer.Argument(help="class folders or tar shards")],
    workers: Annotated[int | None, typer.Option(min=1, help="number of processes; default: one per CPU")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="list every bad image")] = False,
) -> None:
    """Decodes every image under ROOT in place and lists the bad ones: empty or truncated files, files that are no image
    or of absurd size, wrong labels, duplicate keys. In a packed set the bytes are also compared with those that were
    packed. The exit status is 1 if any image is bad or left out.

    Examples:

      adaptnet data check /data/imagenet

      adaptnet data check packed/imagenet --workers 16 --all
    """
    from pipeline.data.check import check as run
    from pipeline.data.config import DataConfig

    with _progress() as progress:
        report = run(root, workers=workers, progress=progress)
    checked = "decoded and compared with the packed bytes" if report.checksums else "decoded"
    unused = _unnamed(report.left_out)
    left = f", {unused:,} left out" if unused else ""
    typer.echo(f"{root}: {report.images:,} images {checked} in {report.seconds:.1f} s; {len(report.bad):,} bad{left}")
    _print_bad(report.bad, show_all)
    _print_left_out(report.left_out)
    allowed: float = DataConfig.model_fields["max_bad_share"].default
    if report.bad_share > allowed:
        typer.echo(
            f"Training refuses this set: {report.bad_share:.2%} of the images are bad or left out, and "
            f"data.max_bad_share allows {allowed:.2%}. Repair or remove them, or raise data.max_bad_share, or pack the "
            f"set: `adaptnet data pack {quote(str(root))} FOLDER` leaves them out."
        )
    elif report.bad:
        typer.echo(
            "Training replaces bad images by good ones, and evaluation leaves them out; `adaptnet data pack` leaves "
            "them out of the packed set."
        )
    if report.bad or unused:
        raise typer.Exit(1)


@app.command(short_help="Show the splits, classes, sizes and bytes of a set.")
def info(
    root: Annotated[Path, typer.Argument(help="class folders or tar shards")],
    index: Annotated[Path | None, typer.Option(help="folder of the index, like data.index in a recipe")] = None,
    validation_share: Annotated[
        float, typer.Option(help="for a set without a val split, like data.validation_share")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="seed of the drawn val split, like seed in a recipe")] = 1,
    show_all: Annotated[bool, typer.Option("--all", help="list every class")] = False,
) -> None:
    """Shows the splits, classes, sizes and bytes of a set, where its index is, and how to shuffle it. Warns of classes
    of very unequal size and of a small val split.

    Examples:

      adaptnet data info packed/imagenet

      adaptnet data info /data/photos --validation-share 0.2 --seed 2
    """
    from jobs import tables
    from pipeline.config import validate
    from pipeline.data.config import DataConfig
    from pipeline.data.index import account_of, open_index, open_splits

    given = {"root": str(root), "index": index and str(index), "validation_share": validation_share, "max_bad_share": 1}
    config = validate(DataConfig, given, "data")
    with _progress() as progress:
        open_index(config.root, config.index, progress)
        splits = open_splits(config, seed)
    whole = splits.train.whole
    drawn = "" if whole.meta.has_splits else f" (val drawn with seed {seed})"
    facts = {
        "root": str(whole.root),
        "index": str(whole.folder),
        "identity": whole.identity,
        "images": f"{len(splits.train):,} train, {len(splits.val):,} val{drawn}",
        "classes": _classes(splits.train),
        "bytes": tables.byte_size(int(whole.length.sum())) + _storage(whole),
        "median size": _median_size(whole),
        "unreadable": f"{int((whole.height == 0).sum()):,} headers; `adaptnet data check {root}` decodes every image",
        "shuffle": _shuffle_advice(whole, root),
    }
    typer.echo(tables.of_pairs(facts))
    typer.echo()
    for line in account_of(splits, config, seed).lines():
        typer.echo(line)
    typer.echo(f"\n{_class_table(splits, show_all)}")
    for line in _doubts(splits):
        typer.echo(f"warning: {line}")
    typer.echo("\nshorter side, pixels")
    typer.echo(_histogram(whole))
    _print_bad(whole.meta.set_aside, show_all=False)


def _classes(index: ImageIndex) -> str:
    import numpy as np

    counts = np.bincount(index.label, minlength=len(index.classes))
    names = ", ".join(index.classes[:5]) + (", …" if len(index.classes) > 5 else "")
    return f"{len(index.classes):,}, each of {counts.min():,} to {counts.max():,} training images: {names}"


def _class_table(splits: Splits, show_all: bool) -> str:
    from jobs import tables
    from pipeline.data.naming import shown

    counts = list(zip(splits.train.classes, splits.train.class_counts, splits.val.class_counts, strict=True))
    listed = counts if show_all else counts[:SHOWN]
    rows = [["class", "train", "val"], *([shown(name), f"{train:,}", f"{val:,}"] for name, train, val in listed)]
    more = f"\n  and {len(counts) - len(listed):,} more (--all prints them)" if len(listed) < len(counts) else ""
    return tables.align(rows) + more


def _doubts(splits: Splits) -> Iterator[str]:
    """What makes a training on these images, or its evaluation, doubtful."""
    classes, counts = splits.train.classes, splits.train.class_counts
    least, most = min(counts, default=0), max(counts, default=0)
    if most > IMBALANCE * least:
        few, many = classes[counts.index(least)], classes[counts.index(most)]
        yield (
            f"classes of unequal size: {many} has {most:,} training images, {few} {least:,}; "
            "training.loss.class_weights=inverse-frequency or data.sampling=balanced makes up for it"
        )
    error = 50 / max(1, len(splits.val)) ** 0.5  # of a share of 50 %, the largest
    if error > LARGEST_ERROR:
        yield (
            f"a small val split: on {len(splits.val):,} images top-1 has a standard error of up to {error:.1f} points, "
            "so that smaller differences say nothing; add images, or raise data.validation_share if val is drawn"
        )


def _storage(index: ImageIndex) -> str:
    return " in loose files" if index.shards is None else f" in {len(index.shards):,} shards"


def _median_size(index: ImageIndex) -> str:
    import numpy as np

    from jobs.tables import byte_size

    return f"{np.median(index.width):.0f} x {np.median(index.height):.0f} px, {byte_size(np.median(index.length))}"


def _shuffle_advice(index: ImageIndex, root: Path) -> str:
    if index.shards is None:
        return f"full; data.shuffle=block needs shards: adaptnet data pack {root} DESTINATION"
    return "full if the set fits in memory or is on a local disk, otherwise block (data.shuffle=block)"


def _histogram(index: ImageIndex) -> str:
    import numpy as np

    sides = np.minimum(index.height, index.width)
    bounds = [0, 1, 32, 64, 128, 256, 384, 512, 1024, 1 << 31]
    counts = np.histogram(sides, bounds)[0]
    lines = []
    for start, stop, count in zip(bounds[:-1], bounds[1:], counts, strict=True):
        if count:
            name = "unreadable" if stop == 1 else f"{start}-{stop - 1}" if stop < 1 << 31 else f"{start} and more"
            lines.append(f"{name:>13} {count:>10,} {'#' * max(1, round(40 * count / counts.max()))}")
    return "\n".join(lines)


def _print_bad(bad: Sequence[tuple[str, str]], show_all: bool) -> None:
    from pipeline.data.naming import shown

    for name, reason in bad if show_all else bad[:SHOWN]:
        typer.echo(f"  {shown(name)}: {reason}")
    if len(bad) > SHOWN and not show_all:
        typer.echo(f"  and {len(bad) - SHOWN:,} more (--all prints them)")


def _unnamed(left_out: Sequence[LeftOut]) -> int:
    """How many files that may be images are not used, without those that are named one by one."""
    from pipeline.data.account import NAMED_EACH

    return sum(each.count for each in left_out if each.lost and each.reason not in NAMED_EACH)


def _print_left_out(left_out: Sequence[LeftOut]) -> None:
    for each in left_out:
        typer.echo(f"  {'left out' if each.lost else 'not used'}{f' of {each.split}' if each.split else ''}: {each}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields show(what, done, total): a bar on a terminal, otherwise a line every few seconds; total 0 is a message."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr, soft_wrap=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield line_printer(console.print)
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


def line_printer(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """show(what, done, total) for a place without a bar: a line every few seconds; total 0 is a message."""
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if total == 0 or time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            say(what if total == 0 else f"{what}: {done:,} of {total:,}")

    return show
