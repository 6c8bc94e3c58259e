"""Generates a small set of JPEGs from a seed: shapes on a background, some easy and some hard to recognise.

A class is a shape or, with more classes than shapes, a shape and a hue. The difficulty of an image is uniform in 0..1:
in an easy image the shape is large and has its class's hue; in a hard one it is small, pale and of any hue, among
fragments of other shapes and noise. So a net that spends more on some images can gain from it.
The same arguments give the same bytes (with one version of Pillow and numpy).
"""

from __future__ import annotations

import colorsys
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, DataError
from pipeline.runs.files import read_json, whole_folder

Field = NDArray[np.float64]  # [H, W]
Shape = Callable[[Field, Field], NDArray[np.bool_]]  # (x, y), the shape within -1..1 -> True inside
QUALITY = 90
HUES = 6

SHAPES: dict[str, Shape] = {
    "disc": lambda x, y: np.hypot(x, y) < 0.85,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) < 0.2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.75,
    "frame": lambda x, y: abs(np.maximum(abs(x), abs(y)) - 0.65) < 0.18,
    "triangle": lambda x, y: (y < 0.75) & (abs(x) < (y + 0.85) * 0.55),
    "plus": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 0.9),
    "times": lambda x, y: (abs(abs(x) - abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.8),
    "rows": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.85) & (np.sin(y * 11) > 0),
    "columns": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.85) & (np.sin(x * 11) > 0),
    "dots": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.95) & (np.sin(x * 8) * np.sin(y * 8) > 0.3),
}


def make(
    folder: Path, *, num_classes: int = 10, train: int = 1500, val: int = 500, side_px: int = 48, seed: int = 0
) -> Path:
    """Writes `train` images to train/<class>/*.jpg and `val` to val/<class>/*.jpg of `folder`; returns `folder`.

    Shorter sides are `side_px`, longer ones up to 4/3 of it. A folder with exactly this set is not written again.
    Raises ConfigError for numbers out of range, DataError if `folder` contains anything else.
    """
    made_from = {"num_classes": num_classes, "train": train, "val": val, "side_px": side_px, "seed": seed}
    _check(made_from)
    folder = folder.expanduser().absolute()
    if folder.exists() and any(folder.iterdir()):
        note = folder / "toy.json"
        if _made_from(note) == made_from:
            return folder
        raise DataError(
            f"{folder}: contains something other than this toy set; give a new folder or delete it",
            key="folder",
            subject=folder,
        )
    with whole_folder(folder) as aside:
        names = class_names(num_classes)
        for split, count, offset in (("train", train, 0), ("val", val, train)):
            for number in range(count):
                label = number % num_classes
                place = aside / split / names[label] / f"{names[label]}_{number:05d}.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(draw(label, num_classes, side_px, np.random.Philox(key=[seed, offset + number])))
        (aside / "toy.json").write_text(json.dumps(made_from), encoding="utf-8")
    return folder


def class_names(num_classes: int) -> list[str]:
    """Names of the classes by label; their sorted order is the order of the labels."""
    shapes = list(SHAPES)
    return [f"{label:02d}-{shapes[label % len(shapes)]}" for label in range(num_classes)]


def draw(label: int, num_classes: int, side_px: int, bits: np.random.Philox) -> bytes:
    """One JPEG of class `label`, a pure function of the arguments."""
    rng = np.random.Generator(bits)
    difficulty = rng.random()
    height, width = _frame(rng, side_px)
    picture = _background(rng, height, width, difficulty)
    for _ in range(round(5 * difficulty)):
        other = int(rng.integers(len(SHAPES)))
        _paint(picture, rng, other, rng.random(), size=rng.uniform(0.08, 0.16), opacity=0.6)
    shape, group = label % len(SHAPES), label // len(SHAPES)
    telling = num_classes > len(SHAPES)  # then classes differ by hue too
    hue = (group / HUES if telling else shape / len(SHAPES)) + rng.normal(0, 0.02)
    if not telling and rng.random() < difficulty:
        hue = rng.random()
    size = 0.42 - 0.2 * difficulty * rng.random()
    _paint(picture, rng, shape, hue, size=size, opacity=1 - 0.55 * difficulty)
    picture += rng.normal(0, 0.02 + 0.1 * difficulty, picture.shape)
    return _jpeg(picture)


def _made_from(note: Path) -> object:
    """The arguments that a set was made with; None if it does not say."""
    try:
        return read_json(note)
    except (OSError, ValueError):
        return None


def _check(made_from: dict[str, int]) -> None:
    most = len(SHAPES) * HUES
    if not 2 <= made_from["num_classes"] <= most:
        num_classes = made_from["num_classes"]
        raise ConfigError(f"num_classes (={num_classes}) must be in 2..{most}", key="num_classes", subject=num_classes)
    for split in ("train", "val"):
        if made_from[split] < made_from["num_classes"]:
            raise ConfigError(
                f"{split} (={made_from[split]}) must be num_classes (={made_from['num_classes']}) or more",
                key=split,
                subject=made_from[split],
            )
    if made_from["side_px"] < 16:
        raise ConfigError(
            f"side_px (={made_from['side_px']}) must be 16 or more, or shapes blur",
            key="side_px",
            subject=made_from["side_px"],
        )


def _frame(rng: np.random.Generator, side_px: int) -> tuple[int, int]:
    longer = int(rng.integers(side_px, side_px * 4 // 3 + 1))
    return (side_px, longer) if rng.random() < 0.5 else (longer, side_px)


def _background(rng: np.random.Generator, height: int, width: int, difficulty: float) -> Field:
    """A gradient of two colours, [H, W, 3] in 0..1, with waves that grow with the difficulty."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    angle, frequency, phase = rng.uniform(0, 2 * np.pi), rng.uniform(8, 30), rng.uniform(0, 2 * np.pi)
    blend = np.clip(x * np.cos(angle) + y * np.sin(angle), -1, 1) / 2 + 0.5
    waves = 0.25 * difficulty * np.sin(frequency * (x * np.sin(angle) + y * np.cos(angle)) + phase)
    one, other = rng.uniform(0.15, 0.55, 3), rng.uniform(0.25, 0.65, 3)
    return np.asarray(one + (other - one) * blend[..., None] + waves[..., None] * rng.uniform(0.4, 1, 3))


def _paint(picture: Field, rng: np.random.Generator, shape: int, hue: float, *, size: float, opacity: float) -> None:
    """Paints a slightly turned shape with smooth edges into `picture`; `size` is its radius in shorter sides."""
    height, width = picture.shape[:2]
    radius = size * min(height, width)
    centre_y, centre_x = (rng.uniform(radius, extent - radius) for extent in (height, width))
    turn = rng.normal(0, 0.12)
    y, x = (np.mgrid[0 : 2 * height, 0 : 2 * width] + 0.5) / 2  # 2 x 2 samples a pixel
    x, y = (x - centre_x) / radius, (y - centre_y) / radius
    inside = list(SHAPES.values())[shape](x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn))
    cover = inside.reshape(height, 2, width, 2).mean(axis=(1, 3))[..., None] * opacity
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 1), rng.uniform(0.75, 1)))
    picture += cover * (colour - picture)


def _jpeg(picture: Field) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
