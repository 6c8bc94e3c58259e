"""A trained net of any family."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.training.teachers.base import TeacherConfig


class TrainedTeacherConfig(TeacherConfig):
    """The whole net of a version, a run or a checkpoint, as its own forward runs it in evaluation.

    It must have the student's classes. Its weights are in the fingerprint, the place where they are is not.
    """

    kind: Literal["trained"] = "trained"
    source: Annotated[
        str, Field(min_length=1, max_length=4096)
    ]  # models:/NAME@ALIAS, or a run's or checkpoint's folder
    # side of the images that it gets, resized from the student's; null: the student's own
    side_px: Annotated[int, Field(ge=2, le=8192)] | None = None
