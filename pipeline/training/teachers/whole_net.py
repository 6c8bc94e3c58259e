"""The student itself, with nothing left out."""

from __future__ import annotations

from typing import Literal

from pipeline.training.teachers.base import TeacherConfig


class WholeNetTeacherConfig(TeacherConfig):
    """The student's own weights, in evaluation, as `Family.whole` runs them: e.g. with all gates open.

    The whole net learns as well, through the images for which little is left out.
    Source: Yu & Huang, ICCV 2019 (arXiv 1903.05134), in-place distillation, whose widest net learns from the targets.
    Here one forward draws what is left out, and the whole net only answers.
    """

    kind: Literal["whole_net"] = "whole_net"
