"""Evaluated nets for tests of what is drawn: figures from a seed, and families that give figures of every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tiny
from numpy.typing import NDArray

from pipeline.evaluation.reports_v1 import identity
from pipeline.family import AnyFamily, Evaluated, FamilyConfig, Latency, Report
from pipeline.figures import Bars, Figure, Gallery, HeatMap, Lines, Series, Table

HOSTILE = ('<b>ant & "bee"</b>', "$x_1$", "=SUM(A1)", "bee, 'wasp'\nline", "_under", "naïve 猫", "bad \udcff\x01 name")


def report(policy: str, seed: int, num_classes: int, num_images: int = 10_000) -> Report:
    draw = np.random.default_rng(seed)
    top1 = draw.uniform(0.3, 0.9)
    waited = float(draw.uniform(0, 0.2))
    ms = draw.uniform(0.5, 40.0, 2)
    kind, settings = identity(policy)
    return Report(
        policy=policy,
        kind=kind,
        settings=settings,
        num_images=num_images,
        top1=float(top1),
        top5=float(top1 + 0.09),
        ece=float(draw.uniform(0.001, 0.1)),
        macs_mean=float(draw.uniform(1e6, 4e8)),
        macs_p95=float(draw.uniform(4e8, 5e8)),
        relative_macs=float(draw.uniform(0.2, 1.0)),
        latency=[
            Latency(size, float(m), float(1.3 * m), float(1e3 * size / m), "Some <CPU> & more", 2, waited)
            for size, m in zip((1, 32), ms, strict=True)
        ],
        top1_by_class=[None if k == 1 else float(draw.uniform()) for k in range(num_classes)],
    )


def net(
    name: str,
    seed: int = 0,
    *,
    family: str = "tiny",
    policies: Sequence[str] = ("low", "mid", "full"),
    classes: Sequence[str] = HOSTILE,
    details: Callable[[str], Mapping[str, NDArray[Any]] | None] = lambda policy: None,
) -> Evaluated:
    return Evaluated(
        name=name,
        family=family,
        config=tiny.TinyConfig() if family == "tiny" else FamilyConfig(name=family),
        recipe={},
        classes=tuple(classes),
        data="0123456789abcdef",
        side_px=32,
        step=1000,
        parameters=123_456,
        reports=[report(policy, 100 * seed + n, len(classes)) for n, policy in enumerate(policies)],
        details=details,
    )


def figures(mine: Sequence[Evaluated], others: Sequence[Evaluated]) -> Sequence[Figure]:
    """One of each kind, with gaps and with names that would break a page."""
    first = mine[0]
    count = len(first.classes)
    return [
        Lines(
            "training",
            "Loss <over> training",
            "Of & from the journal.",
            "step",
            "loss",
            [Series(each.name, [1, 2, 3], [1.5, None, 0.25]) for each in mine],
        ),
        Bars(
            "answered",
            "Answered",
            "By exit.",
            ["exit 1", "exit 2"],
            "images",
            {"all <b>": [7000, 3000], "few": [None, 5]},
        ),
        HeatMap(
            "rates",
            "Rates",
            "By class and layer.",
            list(first.classes),
            ["layer 1", "layer 2"],
            [[k / count, None if k == 0 else 0.5] for k in range(count)],
            "rate",
            groups={"animals": count - 1, "other <things>": 1},
        ),
        Gallery(
            "easy",
            "Easy images",
            "The cheapest.",
            {"<i>easy</i>": [(0, "1 layer"), (2, "<2> layers")], "hard": [(1, "9")]},
        ),
        Table(
            "shapes", "Shapes", "Sides.", ["net", "side <px>", "alpha"], [["a & b", 16, 0.123456], ["c", None, 1e-7]]
        ),
    ]


FAMILIES: Mapping[str, AnyFamily] = {
    "tiny": replace(tiny.FAMILY, figures=figures),
    "baseline": replace(tiny.FAMILY, adaptive=False),
    "other": tiny.FAMILY,
}


def three() -> list[Evaluated]:
    """Two families and a baseline."""
    return [
        net("first-net", 1),
        net("second <net> & co", 2, family="other", policies=("a", "b", "same", "also <x>")),
        net("plain", 3, family="baseline", policies=("native", "native-16px")),
    ]
