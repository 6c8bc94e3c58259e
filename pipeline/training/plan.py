"""The constants of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.compat.torch import uncompiled
from pipeline.config import Duration
from pipeline.family import AnyFamily, FamilyConfig
from pipeline.training.casts import WeightCasts
from pipeline.training.config import TrainingConfig
from pipeline.training.distillation import Teacher
from pipeline.training.graphs import Graphed
from pipeline.training.norms import BatchNorm, with_counter

NEVER = Duration(value=1e9, unit="steps")


@dataclass(frozen=True)
class TrainingPlan:
    """The family, the settings, the sizes and the intervals of a training; equal on every rank but for the device.

    forward: the net, compiled and wrapped in DDP if the recipe asks for it.
    batch_size: images of all ranks in a step. epochs_per_step: batch_size over the images of an epoch.
    class_weights: the weight of each class in the loss, [K] on the device; None without. teacher: the net whose answers
    are learned too; None without. macs: multiply-accumulates of one image's forward pass, by its side in pixels; empty
    if unknown. peak_macs_per_s: what the devices of all ranks reach in matrix products; None if unknown.
    """

    family: AnyFamily
    config: FamilyConfig
    training: TrainingConfig
    seed: int
    num_classes: int
    device: torch.device
    forward: Callable[..., object]
    batch_size: int
    epochs_per_step: float
    total_steps: int = 0
    log_every: Duration = NEVER
    save_every: Duration = NEVER
    evaluate_every: Duration = NEVER
    class_weights: Tensor | None = None
    teacher: Teacher | None = None
    macs: Mapping[int, int] = field(default_factory=dict)
    peak_macs_per_s: float | None = None

    @cached_property
    def batchnorms(self) -> tuple[BatchNorm, ...]:
        """The BatchNorms of the net whose batches are counted together; none in a compiled or recorded net."""
        return () if self._eager is None else with_counter(self._eager)

    @cached_property
    def casts(self) -> WeightCasts | None:
        """The weights that are cast together: on a GPU under autocast, where each kernel takes the host's time."""
        if self._eager is None or not self.autocast or self.device.type != "cuda":
            return None
        return WeightCasts(self._eager, torch.bfloat16, in_groups=isinstance(self._eager, DistributedDataParallel))

    @property
    def _eager(self) -> nn.Module | None:
        """`forward` if it runs kernel by kernel; None if it is compiled or recorded."""
        forward = self.forward
        if not isinstance(forward, nn.Module) or uncompiled(forward) is not forward:
            return None
        return None if any(isinstance(module, Graphed) for module in forward.modules()) else forward

    @cached_property
    def autocast(self) -> bool:
        """Whether the forward runs under bf16 autocast."""
        return use_bf16(self.training.precision, self.device)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether `training.precision` means bf16 autocast on this device."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def precision_of(device: torch.device, *, autocast: bool) -> str:
    """The precision of a net's arithmetic on this device, for people: "bf16", "TF32" or "fp32".

    On a GPU that has it, torch computes convolutions in TF32 unless told otherwise.
    """
    if autocast:
        return "bf16"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "fp32"
    return "TF32" if torch.backends.cudnn.allow_tf32 else "fp32"
