"""Sets of labelled images from Python, split and read as a training reads them."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import validate
from pipeline.data.config import DataConfig
from pipeline.data.index import ImageIndex, open_splits
from pipeline.data.verdict import DecodeError, read_image
from pipeline.errors import DataError


@dataclass(frozen=True)
class LabelledImage:
    """An image of a set: its name there, the bytes of its file, and its class."""

    name: str
    content: builtins.bytes = field(repr=False)
    label: str


@dataclass(frozen=True)
class ImageSplit:
    """Some images of a set, in a fixed order; read from disk when they are asked for."""

    _index: ImageIndex = field(repr=False)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> LabelledImage:
        """The image at a row; -1 is the last. Raises DataError if its file cannot be read."""
        row = range(len(self))[row]
        name, label = self._index.file(row), self._index.classes[int(self._index.label[row])]
        try:
            return LabelledImage(name, read_image(*self._index.location(row)), label)
        except DecodeError as error:
            raise DataError(f"{self._index.root}/{name}: {error}", key="data.root", subject=name) from None

    def __iter__(self) -> Iterator[LabelledImage]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class ImageSet:
    """A set of images: its classes, in the order of a net's logits, and its splits."""

    root: Path
    classes: tuple[str, ...]
    train: ImageSplit
    held_out: ImageSplit
    val: ImageSplit


def open(root: str | Path, *, seed: int = 1, **settings: object) -> ImageSet:
    """The images under a folder: class folders with train/ and val/, class folders alone, tar shards, or a packed set.

    seed: of the val split that is drawn where the folder has none, by default as in a recipe. settings: further keys
    of a recipe's section `data`, e.g. validation_share=0.2. The index is built once and stored. Raises DataError if
    there are no images or too many are bad, ConfigError for an unknown key.

    >>> images = adaptnet.datasets.open("images")
    >>> images.val[0].label in images.classes
    True
    """
    given = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    config = validate(DataConfig, {**given, "root": str(root)}, "data")
    splits = open_splits(config, seed)
    parts = (ImageSplit(part) for part in (splits.train, splits.held_out, splits.val))
    return ImageSet(config.root, tuple(splits.train.classes), *parts)
