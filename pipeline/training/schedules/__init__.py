"""The kinds of learning-rate schedule, one module each: to add one, add a module with a `ScheduleConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import kinds_in, one_of
from pipeline.training.schedules.base import ScheduleConfig

if TYPE_CHECKING:
    AnySchedule = ScheduleConfig
else:
    AnySchedule = one_of(kinds_in(__name__, ScheduleConfig), default="cosine")
