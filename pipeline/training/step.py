"""One training step: forward, loss, backward and update for each optimizer that is due.

Letters: B images of all ranks, K classes. The mean over the global batch does not depend on the number of ranks W or of
micro-batches: each micro-batch's loss is multiplied by rows·W/B, and DDP averages the ranks' gradients. A loss that is
not a mean over images is taken of all micro-batches at once, at the cost of a second forward pass: `_backward_at_once`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import ranks
from pipeline.compat.torch import ignore_in_ddp, uncompiled
from pipeline.data import augment, pixels
from pipeline.data.config import DataConfig
from pipeline.errors import ConfigError, ContractError
from pipeline.family import Criterion, cross_entropy, top1
from pipeline.training import optim
from pipeline.training.arithmetic import why_uncompiled
from pipeline.training.config import TrainingConfig
from pipeline.training.criteria import criterion_of_step, together
from pipeline.training.distillation import answers_of, divergence, taught
from pipeline.training.graphs import Graphed
from pipeline.training.norms import count_batches_together
from pipeline.training.plan import TrainingPlan, use_bf16
from pipeline.training.state import TrainState, seed_of, update_ema

WATCHED = 1000  # values that are watched before the host looks at them, also between log points


class LoaderBatch(Protocol):
    """A batch from the loader, on the device: images uint8 [b, S, S, 3], labels [b] i64, draws {name: [b, ...]}.

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
class MicroBatch:
    """The images of one forward pass: [b, 3, H, W] normalised, with targets [b] or [b, K] and labels [b].

    criterion: how its logits are compared with its targets. answers: a teacher's logits [b, K]. `train_step` sets both.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    criterion: Criterion = cross_entropy
    answers: Tensor | None = None


@dataclass
class Meter:
    """Weighted sums since the last log point, and watched values. All stay on the device until they are asked for.

    sums and weights: by the names of values that are added together, a vector [n] f64 and the sum of its weights.
    """

    sums: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    weights: dict[tuple[str, ...], float] = field(default_factory=dict)
    watched: list[tuple[int, Tensor]] = field(default_factory=list)  # (step, value []), not yet looked at
    first_bad: float = math.inf  # the first step with a value that is not finite, among those looked at

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Adds values [] to their means with `weight`, usually the number of images that they are a mean over."""
        names = tuple(values)
        amounts = torch.stack([value.detach() for value in values.values()]).double() * weight
        self.sums[names] = self.sums[names] + amounts if names in self.sums else amounts
        self.weights[names] = self.weights.get(names, 0.0) + weight

    def watch(self, value: Tensor, step: int) -> None:
        """Remembers a value [] of this step for `first_bad_step`."""
        self.watched.append((step, value.detach()))
        if len(self.watched) == WATCHED:
            self.first_bad_step()

    def first_bad_step(self) -> float:
        """The first watched step whose value is not finite; inf if there is none. Waits for the device."""
        if self.watched:
            finite = torch.stack([value for _, value in self.watched]).isfinite().tolist()
            bad = [step for (step, _), fine in zip(self.watched, finite, strict=True) if not fine]
            self.first_bad, self.watched = min([self.first_bad, *bad]), []
        return self.first_bad

    def flush(self) -> dict[str, float]:
        """Weighted means over all ranks since the last flush; empties the meter. Collective."""
        groups = sorted(self.sums)
        if not groups:
            return {}
        names = [name for group in groups for name in group]
        weights = torch.tensor([self.weights[group] for group in groups for _ in group], dtype=torch.float64)
        sums = torch.cat([self.sums[group] for group in groups])
        totals = ranks.rank_sum(torch.stack([sums, weights.to(sums.device, non_blocking=True)])).tolist()
        self.sums, self.weights = {}, {}
        whole: dict[str, list[float]] = {}
        for name, total, count in zip(names, *totals, strict=True):
            before = whole.get(name, [0.0, 0.0])
            whole[name] = [before[0] + total, before[1] + count]
        return {name: total / count for name, (total, count) in sorted(whole.items())}


class StepFunction(Protocol):
    """`train_step`, or a function around it."""

    def __call__(self, plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch], meter: Meter, /) -> float:
        """Moves `state` by one step; returns the learning rate. Collective."""
        ...


def train_step(plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch], meter: Meter) -> float:
    """Moves `state` by one step over this rank's share of the batch, given as micro-batches; returns the learning rate.

    Collective.
    """
    epoch = state.step * plan.epochs_per_step
    factor = plan.training.schedule.lr_factor(epoch, plan.training.epochs) * plan.training.lr_scale
    lr = optim.set_lr(state.optimizers, factor)
    micros = _with_answers(plan, state, _with_criteria(plan, micros), meter)
    for name in plan.family.updates(plan.config, state.step):
        outside_ddp = optim.is_outside_ddp(state.optimizers[name])
        (_gradients_outside_ddp if outside_ddp else _gradients)(plan, state, name, micros, meter)
        _clip(plan, state, name, meter)
        state.optimizers[name].step()
        state.net.zero_grad(set_to_none=True)
        if outside_ddp:
            _assert_equal(name, optim.parameters_of(state.optimizers[name]))
    if state.ema is not None and plan.training.ema_decay is not None:
        update_ema(state.ema, state.net, plan.training.ema_decay, state.step, plan.training.ema_warmup)
    state.step += 1
    state.images_seen += plan.batch_size
    return lr


def _with_criteria(plan: TrainingPlan, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches with this step's criterion. Collective."""
    criterion = criterion_of_step(plan, [micro.targets for micro in micros])
    return [replace(micro, criterion=criterion) for micro in micros]


def _with_answers(
    plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch], meter: Meter
) -> Sequence[MicroBatch]:
    """The micro-batches with the teacher's answers, which their criteria compare with too. Collective."""
    if plan.teacher is None:
        return micros
    with _autocast(plan):
        answers = answers_of(plan.teacher, state.net, [micro.images for micro in micros])
    how = plan.training.teacher
    for micro, each in zip(micros, answers, strict=True):
        meter.add({"teacher_top1": top1(each, micro.labels).mean()}, len(micro.labels))
    return [
        replace(
            micro, criterion=taught(micro.criterion, each, weight=how.weight, temperature=how.temperature), answers=each
        )
        for micro, each in zip(micros, answers, strict=True)
    ]


def _gradients(plan: TrainingPlan, state: TrainState, name: str, micros: Sequence[MicroBatch], meter: Meter) -> None:
    """Puts the gradient of the global batch into `.grad` of all parameters but those outside DDP."""
    with _constant(optim.parameters_outside_ddp(state.optimizers)):
        at_once = len(micros) > 1 and not plan.family.mean_over_images(plan.config)
        (_backward_at_once if at_once else _backward)(plan, state, micros, meter)


def _backward(plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch], meter: Meter) -> None:
    for number, micro in enumerate(micros):
        with _synchronised(plan, last=number == len(micros) - 1):
            output = _output(plan, state, micro, number, plan.forward)
            loss = _loss(plan, state, output, micro, meter)
            torch.autograd.backward(loss, torch.full_like(loss, _share(plan, len(micro.labels))))


def _backward_at_once(plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch], meter: Meter) -> None:
    """`_backward` for a loss that is not a mean over images, of several micro-batches.

    A first pass without gradients gives the outputs of all of them. The loss of these together gives its gradient by
    each output, with which the second pass goes backward, one micro-batch at a time. Both passes draw the same noise,
    and the first leaves the buffers as they were. It costs one forward pass more, and the memory of the outputs; a step
    of one micro-batch costs nothing more.
    """
    whole = _detached_outputs(plan, state, micros)
    leaves = [getattr(whole, field.name).requires_grad_() for field in fields(whole)]
    rows = [len(micro.labels) for micro in micros]
    loss = _loss(plan, state, whole, _as_one(micros), meter)
    by_output = torch.autograd.grad(loss, leaves, torch.full_like(loss, _share(plan, sum(rows))))
    shares = zip(*(torch.split(each, rows) for each in by_output), strict=True)
    for number, (micro, share) in enumerate(zip(micros, shares, strict=True)):
        with _synchronised(plan, last=number == len(micros) - 1):
            output = _output(plan, state, micro, number, plan.forward)
            torch.autograd.backward([getattr(output, field.name) for field in fields(output)], share)


def _as_one(micros: Sequence[MicroBatch]) -> MicroBatch:
    """All micro-batches as one, without their images."""
    labels, targets = (torch.cat([getattr(micro, name) for micro in micros]) for name in ("labels", "targets"))
    criterion = together([micro.criterion for micro in micros], [len(micro.labels) for micro in micros])
    answers = [micro.answers for micro in micros if micro.answers is not None]
    return MicroBatch(labels.new_empty(0), targets, labels, criterion, torch.cat(answers) if answers else None)


def _detached_outputs(plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch]) -> Any:
    """The output of all micro-batches as one; the net's buffers, as BatchNorm's, keep their values."""
    ddp = uncompiled(plan.forward)
    forward = ddp.module if isinstance(ddp, DistributedDataParallel) else plan.forward
    kept = [(buffer, buffer.clone()) for buffer in state.net.buffers()]
    with torch.set_grad_enabled(plan.training.cuda_graphs):  # a recorded net runs with gradients only
        outputs = [_output(plan, state, micro, number, forward) for number, micro in enumerate(micros)]
    for buffer, value in kept:
        buffer.copy_(value)
    names = [field.name for field in fields(outputs[0])]
    whole = {name: torch.cat([getattr(each, name).detach() for each in outputs]) for name in names}
    return replace(outputs[0], **whole)


def _gradients_outside_ddp(
    plan: TrainingPlan, state: TrainState, name: str, micros: Sequence[MicroBatch], meter: Meter
) -> None:
    """Puts the gradient of the global batch into `.grad` of this optimizer's parameters: bare net, fp32 or more."""
    parameters = optim.parameters_of(state.optimizers[name])
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    total = torch.zeros(sum(p.numel() for p in parameters), device=plan.device, dtype=dtype)
    for number, micro in enumerate(micros):
        torch.manual_seed(seed_of(plan.seed, "noise", state.step, number, ranks.rank()))
        with count_batches_together(plan.batchnorms):
            output: Any = state.net(micro.images)
        loss = plan.family.loss(plan.config, output, micro.targets, micro.criterion).total
        meter.watch(loss, state.step)
        gradients = torch.autograd.grad(loss, parameters, torch.full_like(loss, _share(plan, len(micro.labels))))
        total += torch.cat([gradient.to(dtype).flatten() for gradient in gradients])
    mean = ranks.rank_sum(total) / ranks.world()
    parts = torch.split(mean, [p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, parts, strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)


def _share(plan: TrainingPlan, rows: int) -> float:
    """The factor of the loss of some rows that makes DDP's average the mean over the global batch."""
    return rows * ranks.world() / plan.batch_size


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
    """Raises ContractError if parameters outside DDP differ between ranks; DDP would not notice. Collective."""
    mine = [parameter.detach().cpu().numpy().tobytes() for parameter in parameters]  # bits: NaN equals itself
    if any(theirs != mine for theirs in ranks.gather(mine)):
        raise ContractError(f"optimizer {name}: its parameters differ between ranks", key="groups", subject=name)


def _output(
    plan: TrainingPlan, state: TrainState, micro: MicroBatch, number: int, forward: Callable[..., object]
) -> Any:
    """The output of micro-batch `number`, with the noise of that step, micro-batch and rank."""
    torch.manual_seed(seed_of(plan.seed, "noise", state.step, number, ranks.rank()))
    casts = nullcontext() if plan.casts is None else plan.casts.used()
    with _autocast(plan), casts, count_batches_together(plan.batchnorms):
        return forward(micro.images)


def _autocast(plan: TrainingPlan) -> torch.autocast:
    return torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.autocast)


def _loss(plan: TrainingPlan, state: TrainState, output: Any, micro: MicroBatch, meter: Meter) -> Tensor:
    """The loss of an output, [], which is metered."""
    loss = plan.family.loss(plan.config, output, micro.targets, micro.criterion)
    hits = top1(output.logits.detach(), micro.labels)
    values = {"loss": loss.total, "top1": hits.mean(), **loss.parts}
    if micro.answers is not None:
        logits = output.logits.detach()
        values["teacher_divergence"] = divergence(logits, micro.answers, plan.training.teacher.temperature)
    meter.add(values, len(micro.labels))
    meter.watch(loss.total, state.step)
    return loss.total


def _clip(plan: TrainingPlan, state: TrainState, name: str, meter: Meter) -> None:
    if plan.training.clip_norm is not None:
        norm = nn.utils.clip_grad_norm_(optim.parameters_of(state.optimizers[name]), plan.training.clip_norm)
        meter.add({"grad_norm": norm}, 1)
        meter.watch(norm, state.step)


def _synchronised(plan: TrainingPlan, *, last: bool) -> AbstractContextManager[object]:
    """DDP reduces the gradients in the backward pass of the last micro-batch alone."""
    ddp = uncompiled(plan.forward)
    if last or not isinstance(ddp, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[object] = ddp.no_sync()
    return context


def micro_batches(plan: TrainingPlan, data: DataConfig, batch: LoaderBatch, parts: int) -> list[MicroBatch]:
    """This rank's share of a batch as micro-batches on the device: normalised, augmented, mixed, smoothed."""
    return [_micro(plan, data, batch, rows, number) for number, rows in enumerate(split(len(batch.labels), parts))]


def _micro(plan: TrainingPlan, data: DataConfig, batch: LoaderBatch, rows: slice, number: int) -> MicroBatch:
    labels = batch.labels[rows]
    draws = {name: drawn[rows] for name, drawn in batch.draws.items()}
    images = augment.apply_to_uint8(data.augment, batch.images[rows], draws)
    images = pixels.normalise(images, data.mean, data.std)
    if not plan.training.channels_last:
        images = images.contiguous()
    images = augment.apply_to_normalised(data.augment, images, draws)
    images, targets = augment.mix(
        data.augment, images, labels, plan.num_classes, seed=plan.seed, step=batch.step, micro=number
    )
    return MicroBatch(images, smooth(targets, plan.num_classes, plan.training.label_smoothing), labels)


def smooth(targets: Tensor, num_classes: int, amount: float) -> Tensor:
    """Label smoothing: classes [B] or probabilities [B, K] -> [B, K] f32, `amount` spread evenly over the classes."""
    if amount == 0:
        return targets
    soft = targets if targets.dim() == 2 else F.one_hot(targets, num_classes).float()
    return soft * (1 - amount) + amount / num_classes


def num_micros(rows: tuple[int, int], world: int, cap: int | None) -> int:
    """Micro-batches per step, equal on all ranks, so that none holds more than `cap` images.

    rows: the fewest and the most images that a rank has in a step. Raises ConfigError if a micro-batch would be empty
    on some rank.
    """
    fewest, most = rows
    if cap is None:
        return 1
    micros = -(-most // cap)
    if micros > fewest:
        raise ConfigError(
            f"compute.max_batch_per_worker (={cap}) asks for {micros} micro-batches; of {world} workers some have only "
            f"{fewest} images in a step; raise it, or choose a training.batch_size that {world} divides",
            key="compute.max_batch_per_worker",
            subject=cap,
        )
    return micros


def single_images(needs: Sequence[str], world: int, cap: int | None) -> ConfigError:
    """The error where a micro-batch may hold one image and each of `needs`, e.g. BatchNorm, works on several."""
    key = "training.batch_size" if cap is None else "compute.max_batch_per_worker"
    what = key if cap is None else f"{key} (={cap})"
    return ConfigError(
        f"{what}: on {world} workers some micro-batches would hold a single image, but {' and '.join(needs)} works on "
        "two or more at a time; raise it, or use fewer workers",
        key=key,
        subject=cap,
    )


def split(length: int, parts: int) -> Iterator[slice]:
    """`parts` contiguous slices of `length` rows, equal to within one row."""
    for part in range(parts):
        yield ranks.shard(length, part, parts)


def wrap(
    net: nn.Module, training: TrainingConfig, device: torch.device, outside_ddp: Sequence[nn.Parameter] = ()
) -> tuple[nn.Module, tuple[str, ...]]:
    """The net recorded, compiled and under DDP as the recipe asks, and a warning for what is not available. Collective.

    DDP ignores the parameters in `outside_ddp`. A graph is recorded within DDP, whose hooks then run when the backward
    graph has ended. The compiler works outside DDP: it splits the backward where DDP's buckets end, so that gradients
    are sent while earlier ones are computed; of a net compiled within DDP all arrive at the end.
    """
    warnings: list[str] = []
    wrapped: nn.Module = net
    if training.cuda_graphs and device.type == "cuda":
        wrapped = Graphed(wrapped, autocast=use_bf16(training.precision, device))
    elif training.cuda_graphs:
        warnings.append("training.cuda_graphs needs a GPU, so the net runs without")
    if ranks.world() > 1:
        ids = [device.index] if device.type == "cuda" else None
        ignore_in_ddp(wrapped, outside_ddp)
        wrapped = DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True)
    if training.compile is True and (why := why_uncompiled(device)) is None:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    elif training.compile is True:
        warnings.append(f"training.compile: {why}, so the net runs uncompiled")
    return wrapped, tuple(warnings)
