"""Whether a recipe prepares images as weights from elsewhere expect them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose

from pipeline.data.config import DataConfig
from pipeline.weights import ImagesExpected

CLOSE = 5e-4  # means and deviations are often rounded to three digits


def remark(expected: ImagesExpected | None, data: DataConfig, *, sides: bool) -> str | None:
    """What the recipe has otherwise than the weights expect, and the keys to set; None if there is nothing.

    sides: compare the sides of evaluated images too; training often takes others on purpose.
    """
    if expected is None:
        return None
    other = [*_of_channels(expected, data), *_of_resizing(expected, data, sides)]
    if not other:
        return None
    return f"{expected.source}: its weights are for other images than the recipe's; to get them, set {' '.join(other)}"


def _of_channels(expected: ImagesExpected, data: DataConfig) -> list[str]:
    pairs = (("mean", expected.mean, data.mean), ("std", expected.std, data.std))
    return [f"data.{key}=[{_listed(theirs)}]" for key, theirs, ours in pairs if not _alike(theirs, ours)]


def _of_resizing(expected: ImagesExpected, data: DataConfig, sides: bool) -> list[str]:
    ours, theirs = {"interpolation": str(data.interpolation)}, {"interpolation": expected.interpolation}
    if sides:
        ours |= {"eval_side_px": f"{data.side_for_eval}", "eval_resize_px": f"{data.resize_for_eval}"}
        known = {"eval_side_px": expected.side_px, "eval_resize_px": expected.resize_px}
        theirs |= {key: str(side) for key, side in known.items() if side is not None}
    return [f"data.{key}={value}" for key, value in theirs.items() if value is not None and value != ours[key]]


def _alike(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    return all(isclose(a, b, rel_tol=0, abs_tol=CLOSE) for a, b in zip(theirs, ours, strict=True))


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
