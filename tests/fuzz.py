"""Random inputs from fixed seeds: overrides, recipe files, shards and requests, most of them wrong in some way."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

TOKENS = (
    *("0", "1", "-1", "7", "010", "0o10", "0b1", "1_000", "1:30", "1e3", "1e999", "-1e-999", ".nan", "-.inf", "0x1F"),
    *(
        "9" * 30,
        "9" * 5000,
        "0.5",
        "1.5",
        "100",
        "-0.0",
        "2147483648",
        "1" + "0" * 18,
        "true",
        "yes",
        "off",
        "null",
        "~",
    ),
    *(
        "''",
        "' '",
        "a",
        "auto",
        "none",
        "2020-01-01",
        "1 epochs",
        "0 steps",
        "1e9 steps",
        "5 hours",
        "[]",
        "{}",
        "[[]]",
    ),
    *(
        "[1]",
        "[1, 2]",
        "[2, 1]",
        "[0, 0]",
        "[1, 1, 1]",
        "[123, 116, 103]",
        "[0.5, a]",
        "{a: 1}",
        "{kind: x}",
        "{kind: sgd}",
    ),
    *(
        "&a [*a]",
        "*a",
        "!!int x",
        "!!python/object:os.x {}",
        "!!binary x",
        "[1",
        "'",
        '"\\ud800"',
        '"\\0"',
        "{a: 1, a: 2}",
    ),
    *(
        "é",
        "☃",
        "\u202e",
        "\x07",
        "/dev/null",
        "../..",
        "/" + "x" * 5000,
        "${data_home}",
        "${x}",
        "s3://a:b@c/d",
        "|",
        "?",
    ),
    *("<<: 1", "- a", "@", "%", "`", "#", "a: b", "[" * 200, "{" * 200, "x" * 10_000),
)


def override(draw: random.Random, keys: list[str]) -> str:
    """One override of a known key, or of one that is nearly known."""
    key = draw.choice(keys)
    if draw.random() < 0.1:
        place = draw.randrange(len(key))
        key = key[:place] + draw.choice(["", ".", "x", "=", "\n", " "]) + key[place + 1 :]
    return f"{key}={draw.choice(TOKENS)}" if draw.random() < 0.97 else draw.choice(TOKENS)


def mutated(draw: random.Random, content: bytes, most: int = 6) -> bytes:
    """The content with a few bytes changed, cut out, doubled or put in."""
    for _ in range(draw.randint(1, most)):
        at, length = draw.randrange(len(content) + 1), draw.choice([1, 1, 2, 8, 64])
        piece = content[at : at + length]
        change: Callable[[], bytes] = draw.choice(
            [
                lambda: draw.randbytes(length),  # noqa: B023
                lambda: b"",
                lambda: piece * 2,  # noqa: B023
                lambda: draw.choice(TOKENS).encode("utf-8", "replace"),
                lambda: bytes(each ^ 1 << draw.randrange(8) for each in piece),  # noqa: B023
            ]
        )
        content = content[:at] + change() + content[at + length :]
    return content


def shard(draw: random.Random, image: bytes, images: int = 4) -> bytes:
    """A tar of images with their labels, then mutated in most cases."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(images):
            for suffix, content in (("jpg", image), ("cls", str(draw.choice([0, 1, 1, -1, "x", 99])).encode())):
                member = tarfile.TarInfo(draw.choice([f"{number:04d}.{suffix}", f"a/{number}.{suffix}", f"0.{suffix}"]))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    return content if draw.random() < 0.1 else mutated(draw, content)


NAMES = ("a.jpg", "B.JPEG", "c.png", "d.gif", "e.webp", "f.tif", "g.bmp", "h.jp2", "i.avif", "j.ppm", "k.JPG.jpg", "l")
ODD_NAMES = ("x\ny.jpg", " z.png ", ".hidden.jpg", "é☃.jpg", "-r.jpg", "a b.jpg", "%s.png", "n.txt", "o.json", "p.xcf")
FOLDERS = ("cat", "dog", "CAT", "@eaDir", "__MACOSX", ".git", "lost+found", " blank ", "new\nline", "n01440764")
FORMS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")


def root(draw: random.Random, folder: Path, images: int = 10) -> None:
    """A folder of class folders, with and without splits, in which some files are odd, damaged or no files."""
    splits = draw.choice(
        [("",), ("train", "val"), ("train", "val"), ("Train", "validation"), ("train",), ("training",)]
    )
    for split in splits:
        for number in range(images):
            name = draw.choice(["cat", "cat", "dog", "dog", draw.choice(FOLDERS)])
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            _put(draw, place / f"{number}{draw.choice([*NAMES, *NAMES, *ODD_NAMES])}")
    if draw.random() < 0.3:
        _put(draw, folder / draw.choice([*NAMES, *ODD_NAMES]))


def _put(draw: random.Random, path: Path) -> None:
    kind = draw.random()
    if kind < 0.03:
        path.symlink_to(draw.choice(["nowhere", ".", "..", "/dev/null", "/dev/zero"]))
    elif kind < 0.05:
        os.mkfifo(path)
    elif kind < 0.07:
        path.mkdir()
    else:
        buffer = io.BytesIO()
        size = (draw.randint(1, 40), draw.randint(1, 40))
        image = Image.effect_noise(size, 60).convert(draw.choice(["RGB", "RGB", "L"]))
        form = draw.choice(FORMS) if draw.random() < 0.3 else "JPEG"
        image.save(buffer, form, **({"num_resolutions": 1} if form == "JPEG2000" else {}))
        content = buffer.getvalue()
        path.write_bytes(content if draw.random() < 0.6 else mutated(draw, content, 2))


def request(draw: random.Random, body: dict[str, object]) -> object:
    """A request's body with some of its values replaced."""
    values: list[object] = [None, True, False, 0, -1, 1, 1e308, "", "x", [], {}, [None], [[]], "9" * 5000, {"a": []}]
    made = dict(body)
    for _ in range(draw.randint(1, 3)):
        made[draw.choice([*body, "policy", "budget", "top_k", "other"])] = draw.choice([*values, *TOKENS[:20]])
    return draw.choice([made, made, made, draw.choice(values), json.dumps(made)])
