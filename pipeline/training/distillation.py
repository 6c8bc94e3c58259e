"""Learning from a teacher's answers. Letters: b images of a micro-batch, K classes, T temperature.

Source: Hinton, Vinyals & Dean, 2015 (arXiv 1503.02531). The teacher sees the same pixels as the student, after
augmentation and mixing (Beyer et al., CVPR 2022, arXiv 2106.05237), in eval mode and without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import ranks
from pipeline.family import Criterion

Teacher = Callable[[nn.Module, Tensor], Tensor]  # the student's net, images [b, 3, H, W] -> logits [b, K]


def divergence(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """T² · KL(answers || logits) at temperature T, the mean over images: [], in fp32 or more. Both are logits [b, K].

    T² keeps the size of the gradient. The answers get none.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    target = (answers.detach().to(dtype) / temperature).log_softmax(1)
    mine = (logits.to(dtype) / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(mine, target, reduction="batchmean", log_target=True)


def taught(criterion: Criterion, answers: Tensor, *, weight: float, temperature: float) -> Criterion:
    """(1 - weight) · criterion + weight · `divergence` from the answers [b, K], for the images of these answers."""

    def both(logits: Tensor, targets: Tensor) -> Tensor:
        learned = weight * divergence(logits, answers, temperature)
        return learned if weight == 1 else learned + (1 - weight) * criterion(logits, targets)

    return both


@dataclass(frozen=True)
class TrainedTeacher:
    """A trained net in eval mode on the student's device.

    gain, offset [1, 3, 1, 1]: from pixels that are normalised as the student's to those that the teacher was trained
    on; None if they are the same. side_px: the side to which images are resized; None for none.
    """

    net: nn.Module
    gain: Tensor | None = None
    offset: Tensor | None = None
    side_px: int | None = None

    def __call__(self, student: nn.Module, images: Tensor) -> Tensor:
        if self.gain is not None and self.offset is not None:
            images = images * self.gain.to(images.dtype) + self.offset.to(images.dtype)
        if self.side_px is not None and self.side_px != images.shape[-1]:
            size = (self.side_px, self.side_px)
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        logits: Tensor = self.net(images).logits
        return logits


@dataclass(frozen=True)
class WholeNetTeacher:
    """The student's own net; whole: as `Family.whole` gives it. Collective, for the statistics of BatchNorm."""

    whole: Teacher

    def __call__(self, student: nn.Module, images: Tensor) -> Tensor:
        ranks.take_from_rank_0(student.buffers())  # as DDP does in each forward; a resumed run has rank 0's
        with _evaluating(student):
            return self.whole(student, images)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module has the mode that it had."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def answers_of(teacher: Teacher, student: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """The teacher's logits [b, K] for each micro-batch, without gradients; the random numbers are left alone."""
    with torch.no_grad():
        return [teacher(student, each) for each in images]
