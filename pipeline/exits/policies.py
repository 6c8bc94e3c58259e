"""Policies of a net with exits: one exit for all images, every exit in turn, or a budget of MACs on average.

Letters: B images, n of them still running, E exits. Facts of every policy: `exit` [B], counted from 1; `exits` [B, E],
1 where an image was answered, so that means are shares of images; and those of the net.
The released code computes every exit of every image and decides afterwards; here no further block runs for an image
that has exited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import cost, ranks
from pipeline.blocks import constant, per_image
from pipeline.compat.torch import version_of
from pipeline.errors import ConfigError, JsonValue
from pipeline.exits.budget import budget_name, lowered, shares, solve, thresholds
from pipeline.exits.net import ExitNet
from pipeline.family import FixedPolicy, Prediction, Settings

STEPS = 4
Thresholds = Sequence[float | None]


@dataclass(frozen=True)
class ExitCosts:
    """MACs of one image between two exits: the blocks on the way to each, [E], and each classifier, [E]."""

    blocks: tuple[int, ...]
    classifiers: tuple[int, ...]

    def until(self, number: int) -> int:
        """MACs of an image that exits at exit `number`, counted from 1, after running every classifier before it."""
        return sum(self.blocks[:number]) + sum(self.classifiers[:number])

    @property
    def cumulative(self) -> list[int]:
        """MACs of an image that exits at each exit, [E]."""
        return [self.until(number) for number in range(1, len(self.blocks) + 1)]


def measure(net: ExitNet, images: Tensor) -> ExitCosts:
    """The costs of an image with the size of `images` [B, 3, H, W]."""
    spent = cost.measure(net, images[:1]).by_module
    blocks = [sum(spent[name] for name in names) for names in net.ways()]
    return ExitCosts(tuple(blocks), tuple(spent[f"classifiers.{k}"] for k in range(len(blocks))))


@dataclass
class Measurements:
    """Measurements shared by the policies of one net: costs by image size, and the confidences of held-out images."""

    costs: dict[tuple[int, ...], ExitCosts] = field(default_factory=dict)
    walked: tuple[nn.Module, int, object] | None = None  # the net, the versions of its weights, the batches
    held_out: HeldOut | None = None

    def cost(self, net: ExitNet, images: Tensor) -> ExitCosts:
        """The costs of an image with the size of `images` [B, 3, H, W]."""
        shape = tuple(images.shape[1:])
        if shape not in self.costs:
            self.costs[shape] = measure(net, images)
        return self.costs[shape]

    def collect(self, net: ExitNet, batches: Iterable[tuple[Tensor, Tensor]]) -> HeldOut:
        """Runs the net on `batches` once, whatever the number of policies. Collective.

        Raises ConfigError if no rank has an image.
        """
        if self.held_out is None or not self._same(net, batches):
            self.held_out = _collect(net, batches)
            self.walked = (net, _versions(net), batches)
        return self.held_out

    def _same(self, net: ExitNet, batches: object) -> bool:
        assert self.walked is not None
        return self.walked[0] is net and self.walked[1] == _versions(net) and self.walked[2] is batches


@dataclass(frozen=True)
class HeldOut:
    """confidences [n, E] f32 of all ranks' images, on the CPU; sizes of their batches; costs of one image."""

    confidences: Tensor
    sizes: tuple[int, ...]
    costs: ExitCosts

    def spent(self, until: Thresholds) -> float:
        """Mean MACs of these images in these batches with `early_exit`, including images that are carried along."""
        floors = torch.tensor([inf if threshold is None else threshold for threshold in (*until, 0.0)])
        taken = (self.confidences >= floors).int().argmax(1)  # [n], from 0
        total = 0
        for batch in torch.split(taken, list(self.sizes)):
            rows, staying = len(batch), len(batch)
            leaving = batch.bincount(minlength=len(floors)).tolist()
            for number, floor in enumerate(floors.tolist()):
                total += rows * self.costs.blocks[number]
                if floor == inf:
                    continue
                total += rows * self.costs.classifiers[number]
                staying -= leaving[number]
                if staying == 0:
                    break
                rows = min(rows, batch_of(staying))
        return total / len(taken)


@dataclass(frozen=True)
class Exit(FixedPolicy):
    """All images exit at exit `number`, counted from 1; the classifiers before it do not run."""

    number: int
    shared: Measurements = field(default_factory=Measurements, compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"exit-{self.number}"

    @property
    def kind(self) -> str:
        return "exit"

    @property
    def settings(self) -> Settings:
        return {"exit": self.number}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, ExitNet)
        costs = self.shared.cost(net, images)
        walk = net.walk(images)
        for _ in range(self.number):
            x = walk.to_next_exit()
        logits = net.classifiers[self.number - 1](x).float()
        macs = sum(costs.blocks[: self.number]) + costs.classifiers[self.number - 1]
        taken = torch.full((len(images),), self.number, device=images.device)
        return Prediction(logits, per_image(macs, images), _facts(net, taken))


@dataclass(frozen=True)
class Anytime(FixedPolicy):
    """Every exit gives an answer, as if an answer could be requested at any moment; the last one is the prediction.

    Facts by exit, [B, E]: `exit_macs`, the MACs until its answer (the paper's axis; exit-k reports the top-1);
    `exit_confidence`; `exit_agrees`, whether its answer equals the last exit's.
    """

    name: str = "anytime"
    shared: Measurements = field(default_factory=Measurements, compare=False, repr=False)

    @property
    def kind(self) -> str:
        return "anytime"

    @property
    def settings(self) -> Settings:
        return {}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, ExitNet)
        costs = constant(tuple(self.shared.cost(net, images).cumulative), torch.float64, images.device)
        exits = net(images).exits.float()  # [B, E, K]
        answers = exits.argmax(2)
        taken = torch.full((len(images),), exits.shape[1], device=images.device)
        facts = {
            **_facts(net, taken),
            "exit_macs": costs.expand(len(images), -1),
            "exit_confidence": confidence(exits),
            "exit_agrees": answers == answers[:, -1:],
        }
        return Prediction(exits[:, -1], costs[-1:].expand(len(images)), facts)


@dataclass(frozen=True)
class MacsBudget:
    """Images exit at the first exit that is confident enough, so that an image takes `budget` MACs on average.

    budget: MACs per image if above 1, else a share of the whole net's. The thresholds are fitted on held-out images in
    the batches in which they arrive; the released code's budget ignores images that a batch carries along.
    """

    budget: float
    num_exits: int
    thresholds: tuple[float | None, ...] | None = None  # [E - 1]; None: not calibrated
    fit: Mapping[str, JsonValue] = field(default_factory=dict, compare=False)  # how they were fitted
    shared: Measurements = field(default_factory=Measurements, compare=False, repr=False)

    @property
    def name(self) -> str:
        return budget_name(self.budget)

    @property
    def kind(self) -> str:
        return "budget"

    @property
    def settings(self) -> Settings:
        return {"budget": self.budget}

    def calibrated(self, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> MacsBudget:
        """The policy fitted to these images. Collective. Raises ConfigError for a budget that the net cannot meet."""
        assert isinstance(net, ExitNet)
        held_out = self.shared.collect(net, batches)
        costs = held_out.costs.cumulative

        def fitted_at(log_q: float) -> list[float | None]:
            return thresholds(held_out.confidences, shares(log_q, self.num_exits))

        macs = self._macs(costs)
        log_q = lowered(solve(macs, costs), macs, lambda log_q: held_out.spent(fitted_at(log_q)))
        fitted = fitted_at(log_q)
        fit = {
            "q": exp(min(log_q, 700.0)),
            "expected_macs": held_out.spent(fitted),
            "num_images": len(held_out.confidences),
        }
        return replace(self, thresholds=tuple(fitted), fit=fit)

    def check(self, net: nn.Module, images: Tensor) -> None:
        """Raises ConfigError for a budget that the net cannot meet on images [1, 3, H, W] of this size."""
        assert isinstance(net, ExitNet)
        costs = self.shared.cost(net, images).cumulative
        solve(self._macs(costs), costs)

    def _macs(self, costs: Sequence[int]) -> float:
        return self.budget if self.budget > 1 else self.budget * costs[-1]

    def state(self) -> Mapping[str, JsonValue]:
        """thresholds [E - 1], null where no image exits; q, expected_macs per image, num_images; {} before the fit."""
        return {} if self.thresholds is None else {"thresholds": list(self.thresholds), **self.fit}

    def restored(self, state: Mapping[str, JsonValue]) -> MacsBudget:
        """The policy with stored thresholds. Raises ConfigError if they are of a net with another number of exits."""
        stored = tuple(cast(list[float | None], state.get("thresholds", [])))
        if len(stored) != self.num_exits - 1:
            raise ConfigError(
                f"policy {self.name}: the {len(stored)} stored thresholds are those of another net; this one has "
                f"{self.num_exits} exits and needs {self.num_exits - 1}; evaluate it again with data.held_out set",
                key="calibration",
                subject=self.name,
            )
        return replace(self, thresholds=stored, fit={key: state[key] for key in state if key != "thresholds"})

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, ExitNet)
        if self.thresholds is None:
            raise ConfigError(
                f"policy {self.name} has no thresholds, which are fitted on held-out training images; set "
                "data.held_out, e.g. 0.1, before training, or choose another policy",
                key="data.held_out",
                subject=self.name,
            )
        return early_exit(net, images, (*self.thresholds, 0.0), self.shared.cost(net, images))


def early_exit(net: ExitNet, images: Tensor, until: Thresholds, costs: ExitCosts) -> Prediction:
    """Runs each image up to the first exit where its confidence reaches the threshold; all exit at the last.

    until [E]: the thresholds; the classifier of an exit at which no image can exit (None) does not run. Images that
    have exited are removed from the batch if that makes it smaller in the sizes of `batch_of`; otherwise they are
    carried along, their MACs count, and they keep their answer.
    """
    taken = torch.zeros(len(images), dtype=torch.long, device=images.device)
    macs = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    logits = None
    walk, waiting = net.walk(images), None  # which running images have no answer yet, [n]; None: all
    for number, threshold in enumerate(until, 1):
        x = walk.to_next_exit()
        macs = _added(macs, walk.rows, costs.blocks[number - 1])
        if threshold is None:
            continue
        found = net.classifiers[number - 1](x).float()
        macs = _added(macs, walk.rows, costs.classifiers[number - 1])
        logits = found.new_zeros(len(images), found.shape[1]) if logits is None else logits
        last = number == len(until)
        leaves = torch.ones(len(x), dtype=torch.bool, device=x.device) if last else confidence(found) >= threshold
        waiting = torch.ones_like(leaves) if waiting is None else waiting
        places = (leaves & waiting).nonzero().flatten()
        if len(places):
            rows = places if walk.rows is None else walk.rows[places]
            logits[rows], taken[rows] = found[places], number
            waiting = waiting & ~leaves
            left = int(waiting.sum())
            if left == 0:
                break
            if (size := batch_of(left)) < len(x):
                kept = waiting.int().argsort(descending=True, stable=True)[:size].sort().values
                walk.keep(kept)
                waiting = waiting[kept]
    assert logits is not None  # all exit at the last
    return Prediction(logits, macs, _facts(net, taken))


def batch_of(left: int) -> int:
    """The smallest batch size to continue with that holds `left` images; sizes have STEPS steps per power of two."""
    step = max(1, 2 ** (left - 1).bit_length() // 2 // STEPS) if left > 1 else 1
    return -(-left // step) * step


def confidence(logits: Tensor) -> Tensor:
    """The largest probability, always in fp32: logits [..., K] -> [...]."""
    with torch.autocast(logits.device.type, enabled=False):
        return logits.float().softmax(-1).amax(-1)


def policies(num_exits: int, budgets: Sequence[float]) -> Sequence[Exit | Anytime | MacsBudget]:
    """The last exit first, then the others, `anytime`, and the budgets."""
    shared = Measurements()
    exits = [Exit(number, shared) for number in (num_exits, *range(1, num_exits))]
    return [*exits, Anytime(shared=shared), *(MacsBudget(budget, num_exits, shared=shared) for budget in budgets)]


def _added(macs: Tensor, rows: Tensor | None, cost: int) -> Tensor:
    return macs + cost if rows is None else macs.index_add(0, rows, macs.new_full((len(rows),), cost))


def _facts(net: ExitNet, taken: Tensor) -> dict[str, Tensor]:
    """The facts of every policy; taken [B]: the exit of each image, counted from 1."""
    return {"exit": taken, "exits": F.one_hot(taken - 1, len(net.classifiers)), **net.facts(taken)}


def _collect(net: ExitNet, batches: Iterable[tuple[Tensor, Tensor]]) -> HeldOut:
    found: list[Tensor] = []
    sizes: list[int] = []
    shape: tuple[int, ...] = ()
    with torch.no_grad():
        for images, _ in batches:
            found.append(confidence(net(images).exits).cpu())
            sizes.append(len(images))
            shape = tuple(images.shape[1:])
    mine = torch.cat(found).numpy() if found else None
    gathered = [share for share in ranks.gather((mine, sizes, shape)) if share[0] is not None]
    if not gathered:
        raise ConfigError(
            "there is no held-out image to fit thresholds on; set data.held_out, e.g. 0.1", key="data.held_out"
        )
    weight = next(net.parameters())
    example = torch.zeros((1, *gathered[0][2]), device=weight.device, dtype=weight.dtype)
    confidences = torch.cat([torch.from_numpy(share[0]) for share in gathered])
    return HeldOut(confidences, tuple(size for share in gathered for size in share[1]), measure(net, example))


def _versions(net: nn.Module) -> int:
    """A number that grows when weights or statistics are written."""
    tensors = (*net.parameters(), *net.buffers())
    return sum(version_of(tensor) or 0 for tensor in tensors)


def describe(kind: str, settings: Settings) -> str:
    """What a policy does, in a few words."""
    if kind == "exit":
        return f"every image takes the answer of exit {settings['exit']}"
    if kind == "anytime":
        return "every exit answers, and the last one counts"
    budget = float(settings["budget"])
    share = f"{budget:,.0f} MACs" if budget > 1 else f"{100 * budget:g} % of the MACs"
    return f"an image stops at the first exit that is sure enough: {share} on average"
