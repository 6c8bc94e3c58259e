"""Policies of a net with exits: one exit for all images, all exits one after another, or a budget for their mean.

Letters: B images, n of them still running, E exits, S sub-networks. Facts of every policy: `exit` [B], from 1; `exits`
[B, E] and `subnetworks` [B, S], 1 where an image got its answer, so that their sums and means by class count images.
The released code computes every exit of every image and decides afterwards; here images really leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import cost, ranks
from pipeline.blocks import per_image
from pipeline.compat.torch import version_of
from pipeline.errors import ConfigError
from pipeline.families.ranet.budget import lowered, shares, solve, thresholds
from pipeline.families.ranet.config import RanetConfig, budget_name
from pipeline.families.ranet.model import Ranet, Walk
from pipeline.family import FixedPolicy, Prediction, Settings

STEPS = 4
Thresholds = Sequence[float | None]


@dataclass(frozen=True)
class ExitCosts:
    """MACs of one image between two exits: the blocks on the way to each, [E], and each classifier, [E]."""

    blocks: tuple[int, ...]
    classifiers: tuple[int, ...]

    def until(self, number: int) -> int:
        """What an image has cost that leaves at exit `number`, from 1, and met every classifier before."""
        return sum(self.blocks[:number]) + sum(self.classifiers[:number])

    @property
    def cumulative(self) -> list[int]:
        return [self.until(number) for number in range(1, len(self.blocks) + 1)]


def measure(net: Ranet, images: Tensor) -> ExitCosts:
    """The costs of an image of the size of `images` [B, 3, H, W]; the base maps belong to the first exit."""
    spent = cost.measure(net, images[:1]).by_module
    blocks, waiting = [], spent["base"]
    for s, plans in enumerate(net.config.plan):
        for number, plan in enumerate(plans):
            waiting += spent[f"subnetworks.{s}.{number}"]
            if not plan.fused:
                blocks.append(waiting)
                waiting = 0
    return ExitCosts(tuple(blocks), tuple(spent[f"classifiers.{k}"] for k in range(len(blocks))))


@dataclass
class Measurements:
    """What the policies of one net measure once: costs by image size, and the confidences of held-out images."""

    costs: dict[tuple[int, ...], ExitCosts] = field(default_factory=dict)
    walked: tuple[Any, ...] | None = None  # the net, its weights' versions and the batches
    held_out: HeldOut | None = None

    def cost(self, net: Ranet, images: Tensor) -> ExitCosts:
        shape = tuple(images.shape[1:])
        if shape not in self.costs:
            self.costs[shape] = measure(net, images)
        return self.costs[shape]

    def collect(self, net: Ranet, batches: Iterable[tuple[Tensor, Tensor]]) -> HeldOut:
        """Walks `batches` once, whatever the number of policies that ask. Collective.

        Raises ConfigError where no rank has an image.
        """
        if self.held_out is None or not self._same(net, batches):
            self.held_out = _collect(net, batches)
            self.walked = (net, _versions(net), batches)
        return self.held_out

    def _same(self, net: Ranet, batches: object) -> bool:
        assert self.walked is not None
        return self.walked[0] is net and self.walked[1] == _versions(net) and self.walked[2] is batches


@dataclass(frozen=True)
class HeldOut:
    """confidences [n, E] f32 on the CPU, of all ranks; sizes of the batches they came in; costs of one image."""

    confidences: Tensor
    sizes: tuple[int, ...]
    costs: ExitCosts

    def spent(self, until: Thresholds) -> float:
        """Mean MACs of these images in these batches under `early_exit`, images that are carried along included."""
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
    """All images leave at exit `number`, from 1; the classifiers before it do not run."""

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
        assert isinstance(net, Ranet)
        costs = self.shared.cost(net, images)
        walk = Walk(net, images)
        for _ in range(self.number):
            x = walk.to_next_exit()
        logits = net.classifiers[self.number - 1](x).float()
        macs = sum(costs.blocks[: self.number]) + costs.classifiers[self.number - 1]
        taken = torch.full((len(images),), self.number, device=images.device)
        return Prediction(logits, per_image(macs, images), _facts(net, taken))


@dataclass(frozen=True)
class Anytime(FixedPolicy):
    """Every exit answers on the way, as where the answer may be asked for at any moment; the last one counts.

    Facts by exit, [B, E]: `exit_macs` is the price of having its answer (the paper's axis, where exit-k has the top-1),
    `exit_confidence` its confidence, `exit_agrees` whether its answer is the last exit's.
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
        assert isinstance(net, Ranet)
        costs = torch.tensor(self.shared.cost(net, images).cumulative, dtype=torch.float64, device=images.device)
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
    """Images leave at the first exit that is confident enough, so that they cost `budget` MACs in the mean.

    budget above 1: MACs per image; else a share of all the net's. The thresholds are fitted on held-out images, in
    batches as large as they come in; the released code's budget counts none of the images that a batch carries along.
    """

    budget: float
    num_exits: int
    thresholds: tuple[float | None, ...] | None = None  # [E - 1]; None: not calibrated
    found: Mapping[str, Any] = field(default_factory=dict, compare=False)  # how they were found, for the record
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
        """Fitted to these images. Collective. Raises ConfigError for a budget that is out of reach."""
        assert isinstance(net, Ranet)
        held_out = self.shared.collect(net, batches)
        costs = held_out.costs.cumulative

        def fit(log_q: float) -> list[float | None]:
            return thresholds(held_out.confidences, shares(log_q, self.num_exits))

        macs = self._macs(costs)
        log_q = lowered(solve(macs, costs), macs, lambda log_q: held_out.spent(fit(log_q)))
        fitted = fit(log_q)
        found = {
            "q": exp(min(log_q, 700.0)),
            "expected_macs": held_out.spent(fitted),
            "num_images": len(held_out.confidences),
        }
        return replace(self, thresholds=tuple(fitted), found=found)

    def check(self, net: nn.Module, images: Tensor) -> None:
        """Raises ConfigError for a budget that is out of reach on images of this size."""
        assert isinstance(net, Ranet)
        costs = self.shared.cost(net, images).cumulative
        solve(self._macs(costs), costs)

    def _macs(self, costs: Sequence[int]) -> float:
        return self.budget if self.budget > 1 else self.budget * costs[-1]

    def state(self) -> Mapping[str, Any]:
        """thresholds [E - 1], null where none leaves; q, expected_macs per image, num_images they were fitted on."""
        return {} if self.thresholds is None else {"thresholds": list(self.thresholds), **self.found}

    def restored(self, state: Mapping[str, Any]) -> MacsBudget:
        """Raises ConfigError where the state is of a net with another number of exits."""
        kept = tuple(state.get("thresholds", ()))
        if len(kept) != self.num_exits - 1:
            raise ConfigError(
                f"policy {self.name}: stored thresholds (={len(kept)}) are those of another net; this one has "
                f"{self.num_exits} exits and needs {self.num_exits - 1}; evaluate it again with data.held_out set"
            )
        return replace(self, thresholds=kept, found={key: state[key] for key in state if key != "thresholds"})

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, Ranet)
        if self.thresholds is None:
            raise ConfigError(
                f"policy {self.name} has no thresholds: they are fitted on held-out training images; set "
                "data.held_out, e.g. 0.1, before training, or choose another policy"
            )
        return early_exit(net, images, (*self.thresholds, 0.0), self.shared.cost(net, images))


def early_exit(net: Ranet, images: Tensor, until: Thresholds, costs: ExitCosts) -> Prediction:
    """Runs each image to the first exit where its confidence reaches the threshold, until [E]; all leave at the last.

    An exit that no image can leave by (None) has no need of its classifier. Images that have left are taken out of the
    batch where `worth_it` says so; else they are carried along, at their price, with the answer that they have.
    """
    taken = torch.zeros(len(images), dtype=torch.long, device=images.device)
    macs = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    logits = torch.zeros(len(images), net.classifiers[-1].fc.out_features, device=images.device)  # type: ignore
    walk, waiting = Walk(net, images), None  # of the images under way, those without an answer, [n]; None: all
    for number, threshold in enumerate(until, 1):
        x = walk.to_next_exit()
        macs = _added(macs, walk.rows, costs.blocks[number - 1])
        if threshold is None:
            continue
        found = net.classifiers[number - 1](x).float()
        macs = _added(macs, walk.rows, costs.classifiers[number - 1])
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
    return Prediction(logits, macs, _facts(net, taken))


def batch_of(left: int) -> int:
    """The smallest batch to go on with that holds `left` images."""
    step = max(1, 2 ** (left - 1).bit_length() // 2 // STEPS) if left > 1 else 1
    return -(-left // step) * step


def confidence(logits: Tensor) -> Tensor:
    """The largest probability, always in fp32: logits [..., K] -> [...]."""
    with torch.autocast(logits.device.type, enabled=False):
        return logits.float().softmax(-1).amax(-1)


def policies(config: RanetConfig, net: nn.Module) -> Sequence[Exit | Anytime | MacsBudget]:
    """The last exit first, then the others, `anytime`, and the budgets."""
    shared, last = Measurements(), config.num_exits
    exits = [Exit(number, shared) for number in (last, *range(1, last))]
    return [*exits, Anytime(shared=shared), *(MacsBudget(budget, last, shared=shared) for budget in config.budgets)]


def _added(macs: Tensor, rows: Tensor | None, cost: int) -> Tensor:
    return macs + cost if rows is None else macs.index_add(0, rows, macs.new_full((len(rows),), cost))


def _facts(net: Ranet, taken: Tensor) -> dict[str, Tensor]:
    """taken [B], exits from 1."""
    owner = torch.tensor(net.config.subnetwork_of_exit, device=taken.device)
    exits = F.one_hot(taken - 1, len(owner))
    return {"exit": taken, "exits": exits, "subnetworks": F.one_hot(owner[taken - 1], len(net.subnetworks))}


def _collect(net: Ranet, batches: Iterable[tuple[Tensor, Tensor]]) -> HeldOut:
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
        raise ConfigError("there is no held-out image to fit thresholds on; set data.held_out, e.g. 0.1")
    weight = next(net.parameters())
    example = torch.zeros((1, *gathered[0][2]), device=weight.device, dtype=weight.dtype)
    confidences = torch.cat([torch.from_numpy(share[0]) for share in gathered])
    return HeldOut(confidences, tuple(size for share in gathered for size in share[1]), measure(net, example))


def _versions(net: nn.Module) -> int:
    """A number that grows when weights or statistics are written."""
    tensors = (*net.parameters(), *net.buffers())
    return sum(version_of(tensor) or 0 for tensor in tensors)
