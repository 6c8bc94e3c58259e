"""One training step: for each optimizer due, forward, loss, backward, step, clear. B images of all ranks, K classes.

The mean over the global batch is kept whatever the number of ranks W and micro-batches: each micro-batch's loss is
multiplied by rows·W/B, and DDP averages the ranks' gradients.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import ranks
from pipeline.data import augment, pixels
from pipeline.data.config import DataConfig
from pipeline.errors import ConfigError, ContractError
from pipeline.family import AnyFamily, FamilyConfig
from pipeline.training import optim
from pipeline.training.config import TrainingConfig
from pipeline.training.state import TrainState, seed_of, update_ema


class LoaderBatch(Protocol):
    """What the loader gives, on the device: images uint8 [b, S, S, 3], labels [b] i64, draws {name: [b, ...]}.

    draws holds, by operation of `data.augment`, what that operation has to do to each image.
    """

    @property
    def step(self) -> int: ...

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def draws(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Micro:
    """What goes through the net at once: images [b, 3, H, W] normalised, targets [b] or [b, K], labels [b]."""

    images: Tensor
    targets: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """What stays the same while a net is trained: the family, the settings and the wrapped forward."""

    family: AnyFamily
    config: FamilyConfig
    training: TrainingConfig
    seed: int
    num_classes: int
    device: torch.device
    epochs_per_step: float  # B / images of an epoch
    forward: Callable[..., object]  # the net, compiled and wrapped in DDP as asked
    remarks: tuple[str, ...] = ()  # what was asked for and could not be had, in words
    autocast: bool = False
    channels_last: bool = False


@dataclass
class Meter:
    """Weighted sums since the last log point, on the device: no synchronisation until `flush`."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    first_bad: Tensor | None = None  # step of the first non-finite value, [] f64; inf while there is none

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Values [] enter their means with `weight`, usually the number of images that they are a mean over."""
        for name, value in values.items():
            amount = value.detach().double() * weight
            self.sums[name] = self.sums[name] + amount if name in self.sums else amount
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def watch(self, value: Tensor, step: int) -> None:
        bad = torch.where(torch.isfinite(value.detach()), torch.inf, float(step)).double()
        self.first_bad = bad if self.first_bad is None else torch.minimum(self.first_bad, bad)

    def flush(self) -> dict[str, float]:
        """Weighted means over all ranks since the last flush; empties the meter. Collective."""
        names = sorted(self.sums)
        if not names:
            return {}
        weights = torch.tensor([self.weights[name] for name in names], dtype=torch.float64)
        sums = torch.stack([self.sums[name] for name in names])
        totals, counts = ranks.rank_sum(torch.stack([sums, weights.to(sums.device)])).tolist()
        self.sums, self.weights = {}, {}
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True)}


def train_step(task: Task, state: TrainState, micros: Sequence[Micro], batch_size: int, meter: Meter) -> float:
    """Moves `state` by one step over this rank's share of the batch, given as micro-batches; returns the rate.

    batch_size counts the images of all ranks. Collective.
    """
    epoch = state.step * task.epochs_per_step
    lr = optim.set_lr(state.optimizers, task.training.schedule.lr_factor(epoch, task.training.epochs))
    for name in task.family.updates(task.config, state.step):
        apart = optim.is_outside_ddp(state.optimizers[name])
        (_gradients_apart if apart else _gradients)(task, state, name, micros, batch_size, meter)
        _clip(task, state, name, meter)
        state.optimizers[name].step()
        state.net.zero_grad(set_to_none=True)
        if apart:
            _assert_equal(name, optim.parameters_of(state.optimizers[name]))
    if state.ema is not None and task.training.ema_decay is not None:
        update_ema(state.ema, state.net, task.training.ema_decay, state.step)
    state.step += 1
    state.images_seen += batch_size
    return lr


def _gradients(
    task: Task, state: TrainState, name: str, micros: Sequence[Micro], batch_size: int, meter: Meter
) -> None:
    """Leaves in `.grad` of all parameters but those apart the gradient of the global batch."""
    with _constant(optim.parameters_outside_ddp(state.optimizers)):
        for number, micro in enumerate(micros):
            with _synchronised(task, last=number == len(micros) - 1):
                loss = _forward(task, state, micro, number, meter)
                torch.autograd.backward(loss * _share(micro, batch_size))


def _gradients_apart(
    task: Task, state: TrainState, name: str, micros: Sequence[Micro], batch_size: int, meter: Meter
) -> None:
    """Leaves in `.grad` of the optimizer's own parameters the gradient of the global batch: bare net, fp32."""
    parameters = optim.parameters_of(state.optimizers[name])
    total = torch.zeros(sum(p.numel() for p in parameters), device=task.device)
    for number, micro in enumerate(micros):
        torch.manual_seed(seed_of(task.seed, "noise", state.step, number, ranks.rank()))
        output: Any = state.net(micro.images)
        loss = task.family.loss(task.config, output, micro.targets, task.training.loss.criterion).total
        meter.watch(loss, state.step)
        found = torch.autograd.grad(loss * _share(micro, batch_size), parameters)
        total += torch.cat([gradient.float().flatten() for gradient in found])
    mean = ranks.rank_sum(total) / ranks.world()
    parts = torch.split(mean, [p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, parts, strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)


def _share(micro: Micro, batch_size: int) -> float:
    return len(micro.labels) * ranks.world() / batch_size


@contextmanager
def _constant(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _assert_equal(name: str, parameters: Sequence[nn.Parameter]) -> None:
    """Parameters outside DDP must not drift apart: DDP would not notice. Collective."""
    mine = [parameter.detach().cpu().numpy().tobytes() for parameter in parameters]  # bits: NaN equals itself
    if any(theirs != mine for theirs in ranks.gather(mine)):
        raise ContractError(f"optimizer {name}: its parameters differ between ranks")


def _forward(task: Task, state: TrainState, micro: Micro, number: int, meter: Meter) -> Tensor:
    torch.manual_seed(seed_of(task.seed, "noise", state.step, number, ranks.rank()))
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.autocast):
        output = task.forward(micro.images)
    loss = task.family.loss(task.config, output, micro.targets, task.training.loss.criterion)
    hits = output.logits.detach().argmax(1).eq(micro.labels)  # type: ignore[attr-defined]
    meter.add({"loss": loss.total, "top1": hits.float().mean(), **loss.parts}, len(micro.labels))
    meter.watch(loss.total, state.step)
    return loss.total


def _clip(task: Task, state: TrainState, name: str, meter: Meter) -> None:
    if task.training.clip_norm is not None:
        norm = nn.utils.clip_grad_norm_(optim.parameters_of(state.optimizers[name]), task.training.clip_norm)
        meter.add({"grad_norm": norm}, 1)
        meter.watch(norm, state.step)


def _synchronised(task: Task, *, last: bool) -> AbstractContextManager[object]:
    """DDP reduces the gradients in the backward pass of the last micro-batch alone."""
    if last or not isinstance(task.forward, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[object] = task.forward.no_sync()
    return context


def prepare(task: Task, data: DataConfig, batch: LoaderBatch, parts: int) -> list[Micro]:
    """This rank's share of a batch as micro-batches on the device: normalised, flipped, filtered, mixed, smoothed."""
    return [_micro(task, data, batch, rows, number) for number, rows in enumerate(split(len(batch.labels), parts))]


def _micro(task: Task, data: DataConfig, batch: LoaderBatch, rows: slice, number: int) -> Micro:
    labels = batch.labels[rows]
    draws = {name: drawn[rows] for name, drawn in batch.draws.items()}
    images = augment.apply_to_uint8(data.augment, batch.images[rows], draws)
    images = pixels.normalise(images, data.mean, data.std)
    if not task.channels_last:
        images = images.contiguous()
    images = augment.apply_to_normalised(data.augment, images, draws)
    images, targets = augment.mix(
        data.augment, images, labels, task.num_classes, seed=task.seed, step=batch.step, micro=number
    )
    return Micro(images, smooth(targets, task.num_classes, task.training.label_smoothing), labels)


def smooth(targets: Tensor, num_classes: int, amount: float) -> Tensor:
    """Classes [B] or probabilities [B, K] with `amount` of the mass spread evenly over the classes: [B, K] f32."""
    if amount == 0:
        return targets
    soft = targets if targets.dim() == 2 else F.one_hot(targets, num_classes).float()
    return soft * (1 - amount) + amount / num_classes


def num_micros(rows: tuple[int, int], world: int, cap: int | None) -> int:
    """Micro-batches per step, equal on all ranks, so that none holds more than `cap` images.

    rows: the fewest and the most that a rank gets in a step. Raises ConfigError where a rank would have to run an empty
    micro-batch.
    """
    fewest, most = rows
    if cap is None:
        return 1
    micros = -(-most // cap)
    if micros > fewest:
        raise ConfigError(
            f"compute.max_batch_per_worker (={cap}) asks for {micros} micro-batches; of a batch over {world} workers "
            f"one gets {fewest} images at times; raise it, or take a training.batch_size that the workers divide"
        )
    return micros


def split(length: int, parts: int) -> Iterator[slice]:
    """`parts` contiguous slices of `length` rows, equal to within one row."""
    for part in range(parts):
        yield ranks.shard(length, part, parts)


def wrap(
    net: nn.Module, training: TrainingConfig, device: torch.device, apart: Sequence[nn.Parameter] = ()
) -> tuple[nn.Module, tuple[str, ...]]:
    """The net compiled and under DDP as asked, with a remark for each thing that could not be had. Collective.

    Parameters in `apart` stay out of DDP.
    """
    remarks: list[str] = []
    wrapped: nn.Module = net
    if training.compile:
        why = _why_uncompiled(device)
        if why is None:
            wrapped = torch.compile(wrapped)  # type: ignore[assignment]
        else:
            remarks.append(f"training.compile: {why}, so the net runs uncompiled")
    if ranks.world() > 1:
        ids = [device.index] if device.type == "cuda" else None
        left_out = {id(parameter) for parameter in apart}
        names = [name for name, parameter in wrapped.named_parameters() if id(parameter) in left_out]
        names += [f".{name}" for name in names]  # DDP's own spelling of a parameter of the net itself
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, names)  # type: ignore[no-untyped-call]
        wrapped = DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True)
    return wrapped, tuple(remarks)


def _why_uncompiled(device: torch.device) -> str | None:
    """What keeps torch.compile from working here, found by compiling a sum; None where it works."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return "no C++ compiler (g++ or clang++) here"
    try:
        torch.compile(_probe)(torch.ones(4, device=device))
    except Exception as error:  # torch's back ends raise what they like
        return f"it does not work here ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
    return None


def _probe(x: Tensor) -> Tensor:
    return (x * 2 + 1).sin()


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether `training.precision` means bf16 autocast on this device."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"
