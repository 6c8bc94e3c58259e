"""No teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipeline.errors import JsonValue
from pipeline.training.teachers.base import TeacherConfig


class NoTeacherConfig(TeacherConfig):
    """The targets alone are learned."""

    kind: Literal["none"] = "none"

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        return dict.fromkeys(("weight", "temperature"), "there is no teacher: kind is none")
