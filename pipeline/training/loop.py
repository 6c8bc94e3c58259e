"""The training loop: when to log, evaluate, save and stop is decided here and nowhere else.

Events are due by `Duration`s. Those in steps and epochs are functions of the step, so a resumed run meets the same
ones; those in minutes, and the wish to stop, are rank 0's word, agreed every two seconds or so in one broadcast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.config import Duration
from pipeline.errors import DivergedError
from pipeline.training.memory import keep_freed_memory
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, Micro, Task, train_step

PULSE_S = 2.0  # how often the ranks agree on stopping and on events in minutes


@dataclass(frozen=True)
class Plan:
    """How long to train and how often what happens; every rank holds the same one."""

    total_steps: int
    epochs_per_step: float
    batch_size: int
    log_every: Duration
    save_every: Duration
    evaluate_every: Duration


class Events(Protocol):
    """What the loop calls. All are collective but `wants_to_stop`, which rank 0 alone is asked."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def evaluate(self, state: TrainState) -> None: ...

    def save(self, state: TrainState, *, wait: bool) -> None: ...

    def last_good(self) -> str | None: ...

    def wants_to_stop(self) -> bool: ...


@dataclass
class Clock:
    """Seconds since the last log point, by what they went into."""

    spent: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def timed(self, kind: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        self.add(kind, time.perf_counter() - start)

    def add(self, kind: str, seconds: float) -> None:
        self.spent[kind] = self.spent.get(kind, 0.0) + seconds

    def flush(self) -> dict[str, float]:
        """Shares of the time since the last flush: data wait, checkpoint, evaluation; compute is the rest."""
        now = time.perf_counter()
        whole = max(now - self.started, 1e-9)
        kinds = ("data", "checkpoint", "evaluate")
        shares = {f"{kind}_share": self.spent.get(kind, 0.0) / whole for kind in kinds}
        shares["compute_share"] = max(0.0, 1 - sum(shares.values()))
        self.spent, self.started = {}, now
        return {"interval_s": whole, **shares}


def train(
    task: Task,
    state: TrainState,
    batches: Iterable[Sequence[Micro]],
    plan: Plan,
    on: Events,
) -> bool:
    """Trains `state` until `plan.total_steps`, or until rank 0 wants to stop; True if it reached the end.

    batches[i] is this rank's share of the batch of step `state.step + i`. The state is saved, and waited for, before
    it returns; each evaluation is followed by a save, so that the best of them is there. Collective.
    Raises DivergedError at a loss or gradient norm that is not finite; nothing is saved after that step.
    """
    if task.device.type == "cpu":
        keep_freed_memory()
    meter, clock, pulse = Meter(), Clock(), Pulse(plan, state.step)
    logged_at = state.step
    if state.step >= plan.total_steps:
        return True
    for micros in _waiting(batches, clock):
        before = state.step
        lr = train_step(task, state, micros, plan.batch_size, meter)
        ended = state.step >= plan.total_steps
        agreed = pulse.agree(state.step, on)
        if ended or agreed.stop or agreed.log or _due(plan.log_every, plan, before):
            _log(meter, clock, plan, state, on, lr=lr, steps=state.step - logged_at)
            logged_at = state.step
        evaluated = ended or agreed.evaluate or _due(plan.evaluate_every, plan, before)
        if evaluated:
            _check_finite(meter, lr, on)
            clock.timed("evaluate", lambda: on.evaluate(state))
        if evaluated or agreed.stop or agreed.save or _due(plan.save_every, plan, before):
            meter.watch(_finite(state), before)  # a gradient that is not finite leaves the loss of its step finite
            _check_finite(meter, lr, on)
            wait = ended or agreed.stop
            clock.timed("checkpoint", lambda: on.save(state, wait=wait))  # noqa: B023
        if ended or agreed.stop:
            return ended
    raise AssertionError("the stream of batches is endless")


def _waiting(batches: Iterable[Sequence[Micro]], clock: Clock) -> Iterator[Sequence[Micro]]:
    """The batches, with the time that each was waited for."""
    source = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(source, None)
        clock.add("data", time.perf_counter() - start)
        if batch is None:
            return
        yield batch


def _due(every: Duration, plan: Plan, before: int) -> bool:
    """Whether an event due every so many steps or epochs falls between step `before` and the next.

    An epoch's event falls on the first step at or past its border.
    """
    if every.unit == "minutes":
        return False
    per_step = 1.0 if every.unit == "steps" else plan.epochs_per_step
    return _periods(before + 1, per_step, every.value) > _periods(before, per_step, every.value)


def _periods(step: int, per_step: float, every: float) -> int:
    return math.floor(step * per_step / every + 1e-9)


@dataclass(frozen=True)
class Agreed:
    """What rank 0 asked for and all ranks do at this same step."""

    stop: bool = False
    log: bool = False
    save: bool = False
    evaluate: bool = False


class Pulse:
    """Every PULSE_S or so, at a step that all ranks know beforehand, rank 0's wishes become everybody's."""

    def __init__(self, plan: Plan, step: int) -> None:
        self._plan = plan
        self._step, self._next = step, step + 1  # of the last pulse and of the next
        self._time = self._logged = self._saved = self._evaluated = time.monotonic()

    def agree(self, step: int, on: Events) -> Agreed:
        """Collective at the agreed steps; at others nobody communicates."""
        if step < self._next:
            return Agreed()
        agreed, self._next = ranks.agree(self._wishes(step, on) if ranks.rank() == 0 else (Agreed(), 0))
        return agreed

    def _wishes(self, step: int, on: Events) -> tuple[Agreed, int]:
        now = time.monotonic()
        log = self._over(self._plan.log_every, now - self._logged)
        save = self._over(self._plan.save_every, now - self._saved)
        evaluate = self._over(self._plan.evaluate_every, now - self._evaluated)
        self._logged = now if log else self._logged
        self._saved = now if save else self._saved
        self._evaluated = now if evaluate else self._evaluated
        per_step = (now - self._time) / (step - self._step)
        self._step, self._time = step, now
        stride = max(1, min(1000, int(PULSE_S / max(per_step, 1e-6))))
        return Agreed(on.wants_to_stop(), log, save, evaluate), step + stride

    @staticmethod
    def _over(every: Duration, seconds: float) -> bool:
        return every.unit == "minutes" and seconds >= every.value * 60


def _log(meter: Meter, clock: Clock, plan: Plan, state: TrainState, on: Events, *, lr: float, steps: int) -> None:
    _check_finite(meter, lr, on)
    means, times = meter.flush(), clock.flush()
    values = {f"train/{name}": value for name, value in means.items()}
    values |= {f"time/{name}": value for name, value in times.items()}
    values["time/interval_steps"] = float(steps)
    values["time/images_per_s"] = steps * plan.batch_size / times["interval_s"]
    values["train/lr"] = lr
    values["train/epoch"] = state.step * plan.epochs_per_step
    on.log(state.step, values)


def _finite(state: TrainState) -> Tensor:
    """0 where every weight and statistic of the net is finite, NaN where one is not: []."""
    floats = [value for value in state.net.state_dict().values() if value.is_floating_point()]
    whole = torch.stack([value.isfinite().all() for value in floats]).all()
    return torch.where(whole, 0.0, math.nan)


def _check_finite(meter: Meter, lr: float, on: Events) -> None:
    """Raises DivergedError, on every rank, if a watched value of any rank was not finite. Collective."""
    first = math.inf if meter.first_bad is None else float(meter.first_bad)
    everyone = ranks.gather(first)
    step = min(everyone)
    if math.isinf(step):
        return
    rank, good = everyone.index(step), on.last_good()
    raise DivergedError(
        f"step {int(step)}, rank {rank}: the loss or gradient is not finite (learning rate {lr:.4g}); last good "
        f"checkpoint: {good or 'none'}. Lower training.optimizer.lr, lengthen the warm-up or set training.clip_norm, "
        "and train into a new run folder",
        step=int(step),
        checkpoint=good,
    )


def device_of(name: str) -> torch.device:
    """ "auto" is the GPU if torch sees one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
