"""The kinds of teachers, one module each: to add one, add a module with a subclass of `TeacherConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import kinds_in, one_of
from pipeline.training.teachers.base import TeacherConfig

if TYPE_CHECKING:
    AnyTeacher = TeacherConfig
else:
    AnyTeacher = one_of(kinds_in(__name__, TeacherConfig), default="none")
