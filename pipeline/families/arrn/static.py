"""Each resolution as a module that computes the same for every image: all images enter the chain at one level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from pipeline.families.arrn.config import ArrnConfig
from pipeline.families.arrn.inference import ArrnResolution, policies
from pipeline.families.arrn.model import Affine, Arrn, Residual, affine, scaled
from pipeline.family import Report


class StaticArrn(nn.Module):
    """The net under a policy: the same logits as `Arrn.forward`, without its bookkeeping of images by level."""

    def __init__(self, policy: ArrnResolution, net: Arrn) -> None:
        super().__init__()
        self.policy, self.net = policy, net

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        net = self.net
        images = self.policy.sized(net, images)
        first = net.level(images)
        x = net.at_side(images, net.ladder[first])
        entry, residuals = affine(net.stem), list(net.residuals)
        for residual in residuals[:first]:
            assert isinstance(residual, Residual)
            entry = entry.then(residual.project)
        if first == len(residuals):
            return net.answer(entry(x))
        r = self._entering(first, x, entry)
        for number in range(first + 1, len(residuals)):
            r = self._step(number, r)
        return net.answer(r)

    def _entering(self, number: int, x: Tensor, entry: Affine) -> Tensor:
        """Runs the first residual, whose filters act on the 3 channels of x."""
        residual = self.net.residuals[number]
        assert isinstance(residual, Residual)
        smaller = residual.pair.resize(x, scaled(x, self.net.ladder[number + 1]))
        rest = entry.linear(x - residual.pair.resize(smaller, (x.shape[-2], x.shape[-1])))
        return residual.joined(entry(smaller), residual.inner(rest, x.shape[0]))

    def _step(self, number: int, r: Tensor) -> Tensor:
        residual = self.net.residuals[number]
        assert isinstance(residual, Residual)
        low = residual.pair.resize(r, scaled(r, self.net.ladder[number + 1]))
        rest = r - residual.pair.resize(low, (r.shape[-2], r.shape[-1]))
        return residual.joined(low, residual.inner(rest, r.shape[0]))


def static(
    config: ArrnConfig, net: nn.Module, reports: Sequence[Report]
) -> Mapping[str, Callable[[Tensor], nn.Module]]:
    """All policies: `32px`, `16px`, `full-16px` and so on."""
    assert isinstance(net, Arrn)
    return {policy.name: partial(_at, policy, net) for policy in policies(config, net)}


def _at(policy: ArrnResolution, net: Arrn, images: Tensor) -> nn.Module:
    return StaticArrn(policy, net)
