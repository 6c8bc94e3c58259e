"""What every kind of teacher has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config import Config


class TeacherConfig(Config):
    """A net whose answers the student learns, beside the targets: `pipeline.training.distillation`.

    A subclass fixes `kind` with a Literal and adds its own keys. The loss is (1 - weight) times `training.loss` plus
    weight times the divergence from the teacher at `temperature`.
    """

    kind: str
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5  # 1: the answers alone
    temperature: Annotated[float, Field(gt=0, le=1000)] = 3.0  # of both nets' answers
