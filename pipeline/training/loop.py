"""The training loop; only this module decides when to log, evaluate, save and stop.

Events are due by `Duration`s. Those in steps and epochs are functions of the step, so a resumed run has the same ones.
Rank 0 decides on those in minutes and on requests to stop, and broadcasts its decisions about every two seconds.
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
from pipeline.runs.beats import COMPILING, LONG, Beats
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import TrainingPlan
from pipeline.training.speed import Speed
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, StepFunction, train_step

DATA, STEP = b"waiting for data", b"a step"  # phases, for a report of a hang
SYNC_EVERY_S = 2.0  # how often rank 0 decides on stopping and on events in minutes


class TrainingEvents(Protocol):
    """The callbacks of the loop. All are collective except `wants_to_stop`, which only rank 0 calls."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records metrics of the steps since the last call."""
        ...

    def evaluate(self, state: TrainState) -> None:
        """Evaluates the net as it is now."""
        ...

    def save(self, state: TrainState, *, wait: bool) -> None:
        """Saves a checkpoint; `wait` until it is on disk."""
        ...

    def last_good(self) -> str | None:
        """Where the newest complete checkpoint is; None if there is none."""
        ...

    def wants_to_stop(self) -> bool:
        """Whether to save the training and stop at this step."""
        ...


@dataclass
class Clock:
    """Measures where the time since the last log point went, in seconds."""

    spent: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def timed(self, kind: str, work: Callable[[], None]) -> None:
        """Runs `work` and adds its seconds to `kind`."""
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
    plan: TrainingPlan,
    state: TrainState,
    batches: Iterable[Sequence[MicroBatch]],
    events: TrainingEvents,
    *,
    sync_every_s: float = SYNC_EVERY_S,
    beats: Beats | None = None,
    take_step: StepFunction = train_step,
) -> bool:
    """Trains `state` until `plan.total_steps`, or until rank 0 wants to stop; True if it reached the end.

    batches[i] is this rank's share of the batch of step `state.step + i`. The state is on disk when the function
    returns. Each evaluation is followed by a save, so that the best state is among the checkpoints. `beats` gets a sign
    of progress at each batch and each step. `take_step` is `train_step`, or what observes it. Collective.
    Raises DivergedError at a loss or gradient norm that is not finite; nothing is saved after that step.
    """
    if plan.device.type == "cpu":
        keep_freed_memory()
    meter, clock, sync, beats = Meter(), Clock(), RankSync(plan, state.step, sync_every_s), beats or Beats()
    speed = Speed(plan)
    logged_at = state.step
    if state.step >= plan.total_steps:
        return True
    beats.step, patience = state.step, LONG if plan.training.compile is True else 1.0  # other sides are compiled later
    beats.enter(DATA.decode(), COMPILING if plan.training.compile is True else LONG)
    for micros in _waiting(batches, clock, beats):
        before = state.step
        lr = take_step(plan, state, micros, meter)
        speed.count(micros)
        beats.step, beats.patience = state.step, patience
        ended = state.step >= plan.total_steps
        decided = sync.decide(state.step, events)
        if ended or decided.stop or decided.log or _due(plan.log_every, plan, before):
            _log(meter, clock, speed, plan, state, events, lr=lr, steps=state.step - logged_at)
            logged_at = state.step
        evaluated = ended or decided.evaluate or _due(plan.evaluate_every, plan, before)
        if evaluated:
            _check_finite(meter, lr, events)
            clock.timed("evaluate", lambda: events.evaluate(state))
        if evaluated or decided.stop or decided.save or _due(plan.save_every, plan, before):
            meter.watch(_finite(state), before)  # the loss of a step may be finite and its gradient not
            _check_finite(meter, lr, events)
            wait = ended or decided.stop
            clock.timed("checkpoint", lambda: events.save(state, wait=wait))  # noqa: B023
        if ended or decided.stop:
            return ended
    raise AssertionError("the stream of batches is endless")


def _waiting(batches: Iterable[Sequence[MicroBatch]], clock: Clock, beats: Beats) -> Iterator[Sequence[MicroBatch]]:
    """The batches; the time to wait for each is added to the clock."""
    source = iter(batches)
    while True:
        start = time.perf_counter()
        beats.phase = DATA
        batch = next(source, None)
        beats.phase = STEP
        clock.add("data", time.perf_counter() - start)
        if batch is None:
            return
        yield batch


def _due(every: Duration, plan: TrainingPlan, before: int) -> bool:
    """Whether an event that is due every so many steps or epochs falls between step `before` and the next.

    An event in epochs falls on the first step at or past its border.
    """
    if every.unit == "minutes":
        return False
    per_step = 1.0 if every.unit == "steps" else plan.epochs_per_step
    return _periods(before + 1, per_step, every.value) > _periods(before, per_step, every.value)


def _periods(step: int, per_step: float, every: float) -> int:
    return math.floor(step * per_step / every + 1e-9)


@dataclass(frozen=True)
class StepDecisions:
    """Rank 0's decisions, which all ranks carry out at the same step."""

    stop: bool = False
    log: bool = False
    save: bool = False
    evaluate: bool = False


class RankSync:
    """About every `every_s` seconds, at a step that all ranks know beforehand, rank 0's decisions are broadcast."""

    def __init__(self, plan: TrainingPlan, step: int, every_s: float) -> None:
        self._plan, self._every_s = plan, every_s
        self._step, self._next = step, step + 1  # steps of the last and the next broadcast
        self._time = self._logged = self._saved = self._evaluated = time.monotonic()

    def decide(self, step: int, events: TrainingEvents) -> StepDecisions:
        """Collective at the steps of a broadcast; at others nothing is communicated."""
        if step < self._next:
            return StepDecisions()
        decisions, self._next = ranks.agree(self._decide(step, events) if ranks.rank() == 0 else (StepDecisions(), 0))
        return decisions

    def _decide(self, step: int, events: TrainingEvents) -> tuple[StepDecisions, int]:
        """Rank 0's decisions, and the step of the next broadcast."""
        now = time.monotonic()
        log = self._over(self._plan.log_every, now - self._logged)
        save = self._over(self._plan.save_every, now - self._saved)
        evaluate = self._over(self._plan.evaluate_every, now - self._evaluated)
        self._logged = now if log else self._logged
        self._saved = now if save else self._saved
        self._evaluated = now if evaluate else self._evaluated
        per_step = (now - self._time) / (step - self._step)
        self._step, self._time = step, now
        stride = max(1, min(1000, int(self._every_s / max(per_step, 1e-6))))
        return StepDecisions(events.wants_to_stop(), log, save, evaluate), step + stride

    @staticmethod
    def _over(every: Duration, seconds: float) -> bool:
        return every.unit == "minutes" and seconds >= every.value * 60


def _log(
    meter: Meter,
    clock: Clock,
    speed: Speed,
    plan: TrainingPlan,
    state: TrainState,
    events: TrainingEvents,
    *,
    lr: float,
    steps: int,
) -> None:
    _check_finite(meter, lr, events)
    means, times = meter.flush(), clock.flush()
    values = {f"train/{name}": value for name, value in means.items()}
    values |= {f"time/{name}": value for name, value in times.items()}
    values["time/interval_steps"] = float(steps)
    values["time/images_per_s"] = steps * plan.batch_size / times["interval_s"]
    values |= speed.flush(times["interval_s"])
    values["train/lr"] = lr
    values["train/epoch"] = state.step * plan.epochs_per_step
    events.log(state.step, values)


def _finite(state: TrainState) -> Tensor:
    """0 where every weight and statistic of the net is finite, NaN where one is not: []."""
    tensors = (value for value in state.net.state_dict().values() if value.is_floating_point() and value.numel())
    largest = torch._foreach_norm(list(tensors), math.inf)
    return (torch.stack(largest) * 0).sum()


def _check_finite(meter: Meter, lr: float, events: TrainingEvents) -> None:
    """Raises DivergedError, on every rank, if a watched value of any rank was not finite. Collective."""
    everyone = ranks.gather(meter.first_bad_step())
    step = min(everyone)
    if math.isinf(step):
        return
    rank, good = everyone.index(step), events.last_good()
    raise DivergedError(
        f"step {int(step)}, rank {rank}: the loss or gradient is not finite (learning rate {lr:.4g}); last good "
        f"checkpoint: {good or 'none'}. Lower training.optimizer.lr, lengthen the warm-up or set training.clip_norm, "
        "and train into a new run folder",
        step=int(step),
        checkpoint=good,
    )


def device_of(name: str) -> torch.device:
    """The torch device of `compute.device`; "auto" is the GPU if torch finds one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
