"""JPEGs for the acceptance run, as class folders: the user's, or drawn ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

DRAWN, FEW, CLASSES = 224, 24, 8


def jpegs_in(given: str, folder: Path, *, few: bool = False) -> Path:
    """A folder of class folders with train/: the JPEGs below `given` in equal parts, or drawn ones."""
    files = sorted(path for path in Path(given).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")) if given else []
    number = FEW if few else len(files) or DRAWN
    for at in range(min(number, len(files)) if files else number):
        place = folder / "train" / f"class-{at % CLASSES}" / f"{at:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        if files:
            shutil.copyfile(files[at], place)
        else:
            place.write_bytes(drawn(at))
    return folder


def drawn(seed: int) -> bytes:
    """A JPEG of 500 x 375: shapes and noise, quality 92."""
    import io

    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 12, (375, 500, 3))
    picture = Image.new("RGB", (500, 375), tuple(int(each) for each in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(40):
        x, y, width, height = (int(each) for each in rng.integers(0, [500, 375, 200, 150]))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + width + 1, y + height + 1), fill=tuple(int(each) for each in rng.integers(0, 256, 3)))
    noisy = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def encoded(folder: Path) -> list[bytes]:
    """The bytes of all JPEGs below the folder, in the order of their paths."""
    files = sorted(Path(at) / name for at, _, names in os.walk(folder) for name in names if name.endswith(".jpg"))
    return [file.read_bytes() for file in files]
