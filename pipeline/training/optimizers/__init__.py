"""The kinds of optimizer, one module each: to add one, add a module with a subclass of `OptimizerConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import kinds_in, one_of
from pipeline.training.optimizers.base import OptimizerConfig

if TYPE_CHECKING:
    AnyOptimizer = OptimizerConfig
else:
    AnyOptimizer = one_of(kinds_in(__name__, OptimizerConfig), default="sgd")
