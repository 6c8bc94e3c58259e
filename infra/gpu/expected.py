"""What each row of the acceptance run should show, and where that number comes from. For one H200."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "published", "derived"]


@dataclass(frozen=True)
class Expected:
    """A range, ends included; None is no bound.

    source: "measured" on such a GPU or by counting launches and waits without one, "published", or "derived" from
    published numbers or from what the code promises.
    """

    low: float | None
    high: float | None
    source: Source

    def holds(self, value: float) -> bool:
        """Whether the value is in the range; NaN is not."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high) and value == value

    def __str__(self) -> str:
        low, high = ("" if end is None else f"{end:g}" for end in (self.low, self.high))
        if low == high:
            return f"{low} ({self.source})"
        words = f"{low}-{high}" if low and high else f">= {low}" if low else f"<= {high}"
        return f"{words} ({self.source})"


def _least(value: float, source: Source = "derived") -> Expected:
    return Expected(value, None, source)


def _most(value: float, source: Source = "derived") -> Expected:
    return Expected(None, value, source)


def _exactly(value: float, source: Source = "derived") -> Expected:
    return Expected(value, value, source)


NETS = ("ResNet-50", "baseline", "AIG", "ARRN", "RANet", "Shape Adaptor")
EXPECTED: Mapping[str, Expected] = {  # by "part: row"; rows that are not here are only measured
    "environment: matrix product bf16": Expected(650, 900, "measured"),
    "environment: matrix product TF32": Expected(250, 495, "derived"),
    "environment: matrix product fp32": Expected(35, 67, "published"),
    "environment: device copy": Expected(3.6, 4.8, "measured"),
    "roi: our loader, images": _least(10_000),
    "whole: ROI": _exactly(1),
    "whole: ROI, hardware 0": _exactly(1),
    "whole: ROI, hardware 0.9": _exactly(1),
    "whole: ROI, no fancy upsampling": _exactly(1),
    "whole: whole, then slice": _exactly(1),
    "whole: whole, then slice, hardware 0": _exactly(1),
    "whole: whole, then slice, hardware 0.9": _exactly(1),
    "whole: whole, then slice, no fancy upsampling": _exactly(1),
    **{f"nets: {net}, logits fp32 off by": _most(1e-3) for net in NETS},
    **{f"nets: {net}, logits bf16 off by": _most(0.1) for net in NETS},
    **{f"nets: {net}, first losses off from the CPU's": _most(0.02) for net in NETS if net != "AIG"},
    "nets: AIG, first losses off from the CPU's": _most(0.5),  # its gates' noise is drawn on the device
    **{f"nets: {net}, loss after 40 steps over first": _most(0.9) for net in NETS},
    **{f"nets: {net}, decisions as on the CPU": _least(0.99) for net in NETS},
    "speed: ours, batch 256": Expected(4200, 5200, "measured"),
    "speed: ours, batch 128": Expected(3900, 4900, "measured"),
    "speed: ours, batch 32": Expected(1000, 2600, "measured"),  # bound by launches: by the host's CPU
    "speed: ours over bare, batch 256": _least(0.98),
    "speed: ours over bare, batch 128": _least(0.98),
    "speed: ours over bare, batch 32": _least(0.95),
    "profile: ResNet-50, launches a step": Expected(1, 560, "measured"),
    "profile: AIG-50, launches a step": Expected(1, 900, "measured"),
    "profile: ARRN-T, launches a step": Expected(1, 1300, "measured"),
    "profile: RANet-32, launches a step": Expected(1, 4000, "measured"),
    "waits: a wait on purpose": _least(1),
    **{f"waits: {net}, a step": _exactly(0, "measured") for net in NETS if net != "Shape Adaptor"},
    "waits: Shape Adaptor, a step": Expected(0, 0.5, "measured"),  # two where the alphas move, which set sizes
    "feed: loader alone": _least(5000, "measured"),
    "feed: step with loader over step alone or loader alone": _least(0.9),
    "broken: CPU": _exactly(2),
    "broken: GPU": _exactly(2),
    "broken: GPU, evaluation": _exactly(2),
    "pixels: whole, fancy, mean difference": _most(0.5),
    "pixels: ROI, fancy, mean difference": _most(0.5),
    "pixels: evaluation, mean difference": _most(1),
    "resume: largest difference of the weights": _exactly(0),
    "nccl: largest difference of the weights": _most(1e-4),
    "compiled: over eager, batch 256": _least(1.0),
    "compiled: over eager, batch 32": _least(1.0),
}
