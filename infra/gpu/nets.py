"""Each family on the GPU: logits near the CPU's, losses that fall, the CPU's decisions, no waits."""

from __future__ import annotations

import copy
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infra.gpu.run import Run
from infra.gpu.speed import setup_of
from pipeline import family as families
from pipeline.bench.step import LoopSetup, batches, fresh, micros, plan_of
from pipeline.evaluation.evaluate import Evaluator, calibrate, restored
from pipeline.family import Fitted, Policy, Prediction
from pipeline.training.step import Meter, train_step

RECIPES = {
    "ResNet-50": "baseline/imagenet_resnet50",
    "baseline": "baseline/cifar10_small",
    "AIG": "convnet_aig/cifar10_small",
    "ARRN": "arrn/cifar10_small",
    "RANet": "ranet/cifar10_small",
    "Shape Adaptor": "shape_adaptor/cifar10_small",
}
CLASSES, IMAGES, STEPS, ALIKE = 10, 64, 40, 4
NEAR = 1e-3  # of a threshold or of the largest logit: closer than that, rounding may decide
CONSTANT = "training.schedule.warmup_epochs=0"  # else the rate is almost 0 in the first steps
CPU = torch.device("cpu")


def _setup(run: Run, name: str, *keys: str) -> LoopSetup:
    """The recipe without compilation; with SGD at a rate at which a few images of noise are learned."""
    every = ("training.compile=false", CONSTANT, *keys)
    made = partial(setup_of, run, RECIPES[name], 4 if run.small else 32, run.small, *every)
    setup = made(classes=CLASSES)
    slow = setup.config.training.optimizer.kind == "sgd"
    return made("training.optimizer.lr=0.01", classes=CLASSES) if slow else setup


def nets(run: Run) -> None:
    """Logits, losses and decisions of each net."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in RECIPES:
        run.case(f"{name}, logits", partial(_logits, run, name))
        run.case(f"{name}, training", partial(_trained, run, name))


def _logits(run: Run, name: str) -> None:
    setup = _setup(run, name)
    _, current = fresh(setup)
    _, on_cpu = fresh(_setup(run, name, "compute.device=cpu"))  # the seed alone sets the weights
    net, reference = current.net.eval(), on_cpu.net.eval()
    images = _images(setup, 4 if run.small else 8)
    with torch.inference_mode():
        expected = reference(images).logits
        found = net(images.to(run.device)).logits.cpu()
        with torch.autocast(run.device.type, torch.bfloat16):
            rough = net(images.to(run.device)).logits.float().cpu()
    run.row(f"{name}, logits fp32 off by", _off(found, expected), "", "largest difference over largest logit")
    run.row(f"{name}, logits bf16 off by", _off(rough, expected))


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())  # NaN if all are 0


def _images(setup: LoopSetup, count: int) -> Tensor:
    side = setup.config.data.side_px
    generator = torch.Generator().manual_seed(2)
    layout = torch.channels_last if setup.config.training.channels_last else torch.contiguous_format
    return torch.randn(count, 3, side, side, generator=generator).contiguous(memory_format=layout)


def _trained(run: Run, name: str) -> None:
    """Steps on one batch, then every policy on both devices with the weights that they gave."""
    exact, on_cpu = "training.precision=fp32", "compute.device=cpu"
    mine, _ = _losses(_setup(run, name, exact), ALIKE)
    theirs, _ = _losses(_setup(run, name, exact, on_cpu), ALIKE)
    off = max(abs(a - b) / theirs[0] for a, b in zip(mine, theirs, strict=True))
    run.row(f"{name}, first losses off from the CPU's", off, "", f"{_listed(mine)} against {_listed(theirs)}, fp32")
    setup = _setup(run, name)
    losses, net = _losses(setup, ALIKE if run.small else STEPS)
    last = mean(losses[-ALIKE:])
    words = f"{losses[0]:.3f} to {last:.3f}{'' if all(map(math.isfinite, losses)) else ', not all finite'}"
    run.row(f"{name}, loss after {STEPS} steps over first", last / losses[0], "", f"{words}, one batch, bf16")
    _decisions(run, name, setup, net.eval())


def _losses(setup: LoopSetup, steps: int) -> tuple[list[float], nn.Module]:
    """The loss of each of some steps on one batch, and the net after them."""
    device, current = fresh(setup)
    plan, losses = plan_of(setup, current, device), list[float]()
    batch = next(micros(batches(setup, device)))
    current.net.train()
    for _ in range(steps):
        meter = Meter()
        train_step(plan, current, batch, meter)
        losses.append(meter.flush()["loss"])
    return losses, current.net


def _listed(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.4f}" for loss in losses)


@dataclass(frozen=True)
class Held:
    """A split of random images that is in memory, as a loader gives it."""

    images: Tensor  # u8 [B, S, S, 3]
    labels: Tensor
    rows: NDArray[np.int64]
    unreadable: Sequence[str] = ()

    def __iter__(self) -> Iterator[Held]:
        yield self

    def to(self, device: torch.device) -> Held:
        """The same on another device."""
        return Held(self.images.to(device), self.labels.to(device), self.rows)


def held(setup: LoopSetup, count: int) -> Held:
    """Random images with labels."""
    generator, side = torch.Generator().manual_seed(3), setup.config.data.side_px
    images = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    return Held(images, torch.randint(CLASSES, (count,), generator=generator), np.arange(count))


def _decisions(run: Run, name: str, setup: LoopSetup, net: nn.Module) -> None:
    config = setup.config
    family = families.find(config.family.name)
    reference = copy.deepcopy(net).to(CPU)
    images = held(setup, 8 if run.small else IMAGES if "ResNet" not in name else 16)
    on_cpu, on_gpu = (Evaluator(config.data, device, CLASSES, channels_last=True) for device in (CPU, run.device))
    policies = calibrate(list(family.policies(config.family, reference)), reference, images, on_cpu)
    states = [{"policy": each.name, "calibration": dict(each.state())} for each in policies if isinstance(each, Fitted)]
    others = restored(list(family.policies(config.family, net)), states)  # type: ignore[arg-type]
    here, shares, close = images.to(run.device), dict[str, float](), 0
    for mine, other in zip(policies, others, strict=True):
        expected = on_cpu.predict(mine, reference, on_cpu.images(images))
        same = _same(on_gpu.predict(other, net, on_gpu.images(here)), expected)
        near = _near(mine, expected, lambda policy: on_cpu.predict(policy, reference, on_cpu.images(images)))
        close += int((near & ~same).sum())
        shares[mine.name] = float((same | near).double().mean())
    worst = min(shares, key=lambda each: shares[each])
    words = f"{len(shares)} policies; least for {worst}; {close} others are within {NEAR:g} of the threshold or a tie"
    run.row(f"{name}, decisions as on the CPU", shares[worst], "", words)


def _same(found: Prediction, expected: Prediction) -> Tensor:
    """Whether an image has the same class and the same MACs, [B]."""
    same = found.logits.argmax(1).cpu() == expected.logits.argmax(1)
    return same & torch.isclose(found.macs.cpu().double(), expected.macs.double(), rtol=1e-6)


def _near(policy: Policy, expected: Prediction, predict: Callable[[Policy], Prediction]) -> Tensor:
    """Whether the CPU itself decides otherwise with thresholds moved by NEAR, or two classes are that close, [B]."""
    first, second = expected.logits.topk(2, dim=1).values.unbind(1)
    near = first - second <= NEAR * expected.logits.abs().amax(1)
    if isinstance(policy, Fitted) and "thresholds" in policy.state():
        for by in (-NEAR, NEAR):
            near |= ~_same(predict(policy.restored(_moved(policy.state(), by))), expected)
    return near


def _moved(state: Mapping[str, Any], by: float) -> dict[str, Any]:
    return {**state, "thresholds": [each if each is None else each + by for each in state["thresholds"]]}


# --- waits -------------------------------------------------------------------------------------------------------


def waits(run: Run) -> None:
    """How often the host waits for the GPU in a step and in each policy, and in which lines."""
    run.case("a wait on purpose", lambda: _on_purpose(run))
    for name in RECIPES:
        run.case(f"{name}, a step", partial(_waits, run, name))


def _on_purpose(run: Run) -> None:
    one = torch.ones(1, device=run.device)
    with waiting(run) as lines:
        one.item()
    run.row("a wait on purpose", float(lines.total()), "waits", "so that 0 below means none")


def _waits(run: Run, name: str) -> None:
    setup = _setup(run, name)
    device, current = fresh(setup)
    plan, meter, batch = plan_of(setup, current, device), Meter(), next(micros(batches(setup, device)))
    current.net.train()
    for _ in range(3):
        train_step(plan, current, batch, meter)
    with waiting(run) as lines:
        for _ in range(4):
            train_step(plan, current, batch, meter)
    run.row(f"{name}, a step", lines.total() / 4, "waits", _places(lines))
    _waits_of_policies(run, name, setup, current.net.eval())


def _waits_of_policies(run: Run, name: str, setup: LoopSetup, net: nn.Module) -> None:
    config = setup.config
    family = families.find(config.family.name)
    images = held(setup, 4 if run.small else 32).to(run.device)
    evaluator = Evaluator(config.data, run.device, CLASSES, autocast=not run.small, channels_last=True)
    policies = calibrate(list(family.policies(config.family, net)), net, images, evaluator)
    counts, places = Counter[str](), Counter[str]()
    for policy in policies:
        with waiting(run) as lines:
            _evaluated(evaluator, policy, net, images)
        counts[policy.name], places = lines.total(), places + lines
    most = max(counts, key=lambda each: counts[each])
    run.row(f"{name}, a batch of the policy with most", float(counts[most]), "waits", f"{most}: {_places(places)}")


def _evaluated(evaluator: Evaluator, policy: Policy, net: nn.Module, images: Held) -> None:
    from pipeline.evaluation import evaluate

    prediction = evaluator.predict(policy, net, evaluator.images(images))
    per_image: Any = evaluate._per_image
    per_image({policy.name: prediction}, images)


def _places(lines: Counter[str]) -> str:
    return "; ".join(f"{count} x {place}" for place, count in lines.most_common(6))


@contextmanager
def waiting(run: Run) -> Iterator[Counter[str]]:
    """Counts torch's warnings of waits inside, by the innermost line of ours."""
    lines = Counter[str]()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "called a synchronizing" in str(message):  # and not that this mode is a prototype
            lines[_place()] += 1

    if run.small:
        yield lines
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/pipeline/" in frame.filename]
    if not frames:
        return "outside our code"
    return f"pipeline/{frames[-1].filename.rpartition('/pipeline/')[2]}:{frames[-1].lineno}"
