"""What every kind of loss has in common."""

from __future__ import annotations

from torch import Tensor

from pipeline.config import Config


class LossConfig(Config):
    """How logits are compared with targets; each family calls it as the `criterion` of its own loss.

    A subclass fixes `kind` with a Literal, adds its own keys and defines `criterion`.
    """

    kind: str

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the images, [] in fp32: logits [B, K], targets [B] classes or [B, K] probabilities.

        The targets are mixed and smoothed already.
        """
        raise NotImplementedError
