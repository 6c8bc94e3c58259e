"""The base of all schedules, with a linear warm-up."""

from __future__ import annotations

from pipeline.config import Config, NotNegative

FIRST_FACTOR = 1e-3  # factor at the first step of a warm-up, which would otherwise be 0


class ScheduleConfig(Config):
    """The learning rate's factor as a closed form of the epoch, so that it needs no state.

    A subclass fixes `kind` with a Literal, adds its own keys and defines `factor`.
    """

    kind: str
    warmup_epochs: NotNegative = 0.0

    def lr_factor(self, epoch: float, epochs: float) -> float:
        """What the learning rate is multiplied by at `epoch` (a fraction counts) of `epochs`.

        The warm-up rises linearly from FIRST_FACTOR to 1; the kind's curve follows.
        """
        if epoch < self.warmup_epochs:
            return max(epoch / self.warmup_epochs, FIRST_FACTOR)
        return self.factor_at(epoch, epochs)

    def factor_at(self, epoch: float, epochs: float) -> float:
        """The factor after the warm-up."""
        raise NotImplementedError

    def why_fixed(self, epoch: float, epochs: float) -> str | None:
        """Why a training of `epochs` that has come to `epoch` cannot be given more epochs; None if it can.

        It can if the rates up to here are those of a training that had the greater number from its start.
        """
        return f"the curve of kind {self.kind} depends on the number of epochs, so all rates so far were of {epochs:g}"
