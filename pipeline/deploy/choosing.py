"""Which shipped recipes suit a folder of images and a limit of cost, and why; and the table of all recipes.

A recipe is suited by the size of its images, by whether it starts from trained weights where images are few, by the
policies of its net that are within the limit, and by the time that its training takes on this machine. That time is a
lower bound: the training's MACs at the peak of this machine's matrix products. Figures of accuracy are those of the
recipes' headers: nothing here predicts an accuracy on other images.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from math import log2
from pathlib import Path
from shlex import quote
from statistics import median

import numpy as np
import torch

from pipeline import family as families
from pipeline import recipes, run_config
from pipeline.data.index import Splits
from pipeline.deploy import net_costs
from pipeline.deploy.net_costs import FIXED, NOWHERE, RecipeCost
from pipeline.errors import ConfigError, ResourceError
from pipeline.evaluation.frontier import Budget, macs_text
from pipeline.run_config import RunConfig
from pipeline.training import speed
from pipeline.training.loop import device_of

POOREST = 1 / 8  # share of the net's MACs: a policy below it answers much worse than the net
FEW_IMAGES = 500  # of a class, below which a recipe that starts from trained weights comes first
MOST = 3  # recipes that are recommended
SOON_HOURS = 1.0  # recipes whose training takes at least this long here come after the others
ENLARGED = 2.0  # how much worse it is to enlarge images than to shrink them, in octaves of the side
TRIALS = ("toy", "_small")  # ends of the names of recipes that only try the software
LEARN_SHAPES = ("shape_adaptor",)  # families whose training changes the size of maps, and so the MACs
PASSES = 5  # timed passes of a policy over one image


@dataclass(frozen=True)
class ImageFolder:
    """What a folder of images holds: training images by class, and the median of the shorter sides in pixels."""

    root: Path
    class_counts: tuple[int, ...]
    side_px: float

    @classmethod
    def of(cls, splits: Splits) -> ImageFolder:
        """Counts the training images; sides are those of all images whose header can be read."""
        whole = splits.train.whole
        sides = np.minimum(whole.height, whole.width)
        known = sides[sides > 0]
        return cls(whole.root, splits.train.class_counts, float(np.median(known)) if len(known) else 0.0)

    @property
    def images(self) -> int:
        """The number of training images."""
        return sum(self.class_counts)

    @property
    def images_a_class(self) -> float:
        """The median over classes."""
        return median(self.class_counts) if self.class_counts else 0.0


@dataclass(frozen=True)
class Candidate:
    """A recipe and the cost of its net. within: its policies within the limit; ms: their time of an image, if timed.

    hours: its training takes at least this long on this machine.
    """

    recipe: str
    config: RunConfig
    cost: RecipeCost
    within: tuple[str, ...]
    hours: float = 0.0
    ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The name of the recipe's family."""
        return self.config.family.name

    @property
    def tuned(self) -> bool:
        """Whether it starts from trained weights."""
        return self.config.training.start_from is not None

    @cached_property
    def macs(self) -> float:
        """Those of its most expensive policy within the limit."""
        return max(self.cost.policies.get(name, self.cost.macs) for name in self.within)


@dataclass(frozen=True)
class Recommendation:
    """A recipe, why it is recommended, and the command that trains it."""

    candidate: Candidate
    reasons: tuple[str, ...]
    command: str


def recommend(
    folder: ImageFolder,
    *,
    max_macs: Budget | None = None,
    latency: Budget | None = None,
    max_hours: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Recommendation]:
    """At most MOST recipes, the one to try first at the front.

    max_macs in MACs an image; latency in ms for one image on this machine, which is then measured: `progress` gets a
    line for each net. max_hours leaves out a recipe whose training takes longer on this machine even at the peak of its
    matrix products. Raises ConfigError if no recipe's net is within the limits.
    """
    found = candidates(max_macs)
    if not found:
        assert max_macs is not None
        raise _too_tight("--max-macs", max_macs, min(map(_cheapest, _all())))
    found = _in_time(found, folder, max_hours)
    ranked = sorted(_fitting(found, folder), key=lambda each: _rank(each, folder))
    chosen = _distinct(_timed(ranked, latency, progress) if latency else iter(ranked))
    if not chosen:
        assert latency is not None
        raise ConfigError(
            f"--latency (={latency.text}): no net of a recipe answers one image within it on this machine; allow more",
            key="--latency",
            subject=latency.text,
        )
    lacking = _no_weights(folder, found)
    return [Recommendation(each, tuple(_reasons(each, folder, lacking)), _command(each, folder)) for each in chosen]


def candidates(max_macs: Budget | None) -> list[Candidate]:
    """The recipes with a policy within the limit; not those that only try the software, and of variants only those
    that start from trained weights: the others are controls of their recipe."""
    most = max_macs.amount if max_macs else float("inf")
    within = [(name, config, cost, tuple(cost.within(most))) for name, config, cost in _all()]
    return [Candidate(*each) for each in within if each[3]]


def _in_time(found: Sequence[Candidate], folder: ImageFolder, most: float | None) -> list[Candidate]:
    """Those whose training may take at most `most` hours here, each with its time."""
    peak = machine_peak()
    timed = [replace(each, hours=training_hours(each, folder, peak)) for each in found]
    kept = [each for each in timed if most is None or each.hours <= most]
    if not kept:
        least = min(timed, key=lambda each: each.hours)
        raise ConfigError(
            f"--max-hours (={most:g}): the training of every recipe within the other limits takes longer on this "
            f"machine; the shortest, {least.recipe}, at least {hours_text(least.hours)}. Allow more, train fewer "
            "epochs (training.epochs) or on a faster machine",
            key="--max-hours",
            subject=most,
        )
    return kept


def training_hours(each: Candidate, folder: ImageFolder, peak: float) -> float:
    """The hours that the recipe's training on the folder takes at `peak` MACs a second.

    A backward pass counts as two forward passes. Evaluations and the reading of images are not counted.
    """
    seen = each.config.training.epochs * folder.images
    at = each.config.data.side_px / each.cost.side_px  # costs are those at the side of evaluation
    return speed.PASSES * each.cost.macs * at**2 * seen / peak / 3600


@cache
def machine_peak() -> float:
    """MACs a second of matrix products on this machine: all its GPUs, or its CPU in the faster precision."""
    device = device_of("auto")
    if device.type == "cuda":
        return torch.cuda.device_count() * speed.matrix_peak(device, autocast=True)
    return max(speed.matrix_peak(device, autocast=autocast) for autocast in (False, True))


def hours_text(hours: float) -> str:
    """For people, e.g. "40 s", "12 min", "3.1 hours", "12 days"."""
    for most, unit, in_hours in ((1 / 60, "s", 1 / 3600), (1, "min", 1 / 60), (48, "hours", 1)):
        if hours < most:
            return f"{max(1, hours / in_hours):.{1 if unit == 'hours' else 0}f} {unit}"
    return f"{hours / 24:,.0f} days"


def _no_weights(folder: ImageFolder, found: Sequence[Candidate]) -> str:
    """Why no recipe that starts from trained weights is among those found, where images are few; else nothing."""
    if folder.images_a_class >= FEW_IMAGES or any(each.tuned for each in found):
        return ""
    tuned = [each for each in _all() if each[1].training.start_from is not None]
    name, _config, cost = min(tuned, key=_cheapest)
    why = f"takes {macs_text(cost.macs)} an image"
    return f"; no recipe that starts from trained weights is within the limits: the cheapest, {name}, {why}"


@cache
def _all() -> tuple[tuple[str, RunConfig, RecipeCost], ...]:
    return tuple(_recipes())


def _recipes() -> Iterator[tuple[str, RunConfig, RecipeCost]]:
    for name in recipes.names():
        if name.endswith(TRIALS):
            continue
        config = run_config.load(name, data_home=NOWHERE)
        control = ":" in name and (config.training.start_from is None or families.find(config.family.name).adaptive)
        cost = None if control else net_costs.of(name)
        if cost is not None:
            yield name, config, cost


def _cheapest(each: tuple[str, RunConfig, RecipeCost]) -> float:
    return min([*each[2].policies.values(), each[2].macs])


def _too_tight(key: str, budget: Budget, least: float) -> ConfigError:
    return ConfigError(
        f"{key} (={budget.text}): the net of every recipe costs more; the cheapest takes {macs_text(least)}. Allow "
        "more, or train at a smaller side (data.side_px)",
        key=key,
        subject=budget.text,
    )


def _fitting(found: Sequence[Candidate], folder: ImageFolder) -> list[Candidate]:
    """Those whose side fits the images about as well as any, and where images are few all that have trained weights.

    Not those of which only the poorest policies are within the limit, if there are others.
    """
    found = [each for each in found if each.macs >= POOREST * each.cost.macs] or found
    best = min(_misfit(each, folder) for each in found)
    few = folder.images_a_class < FEW_IMAGES
    return [each for each in found if _misfit(each, folder) <= best + 1 or (few and each.tuned)]


def _rank(each: Candidate, folder: ImageFolder) -> tuple[bool, float, bool, bool, float]:
    """Smaller is better: weights for few images, then the side, then a training that ends soon on this machine, then
    what can be had at once, then more MACs."""
    few, late = folder.images_a_class < FEW_IMAGES, each.hours > SOON_HOURS
    macs = -min(each.macs, each.cost.macs)
    return (few and not each.tuned, _misfit(each, folder), late, not _downloads(each), macs)


def _misfit(each: Candidate, folder: ImageFolder) -> int:
    """How far the recipe's side is from that of the images, in octaves."""
    octaves = log2(each.cost.side_px / max(1.0, folder.side_px))
    return round(ENLARGED * octaves if octaves > 0 else -octaves)


def _downloads(each: Candidate) -> bool:
    """Whether it needs no file of weights that the user must bring."""
    return not each.tuned or str(each.config.training.start_from).startswith("torchvision:")


def _distinct(ranked: Iterator[Candidate]) -> list[Candidate]:
    """The first MOST of different kinds: one that starts from trained weights, and one of each family."""
    chosen: dict[object, Candidate] = {}
    for each in ranked:
        chosen.setdefault("tuned" if each.tuned else each.family, each)
        if len(chosen) == MOST:
            break
    return list(chosen.values())


def _timed(ranked: Sequence[Candidate], latency: Budget, progress: Callable[[str], None] | None) -> Iterator[Candidate]:
    """Those with a policy that answers one image within the limit, measured on this machine one after the other."""
    for each in ranked:
        try:
            times = measured_ms(each)
        except ResourceError as error:  # a package that the net needs is not installed
            if progress:
                progress(f"{each.recipe} is left out: {error}")
            continue
        if progress:
            progress(f"{each.recipe}: {', '.join(f'{name} {ms:.3g} ms' for name, ms in times.items())}")
        within = tuple(name for name, ms in times.items() if ms <= latency.amount)
        if within:
            yield replace(each, within=within, ms=times)


def measured_ms(each: Candidate) -> dict[str, float]:
    """Median time of one image under each policy within the limit that does the same for every image, in ms."""
    family = families.find(each.family)
    with torch.random.fork_rng(devices=[]):
        net = family.build(each.config.family, each.cost.classes).eval()
    image = torch.zeros(1, 3, each.cost.side_px, each.cost.side_px)
    times = {}
    for policy in family.policies(each.config.family, net):
        if policy.kind in FIXED and policy.name in each.within:
            times[policy.name] = _median_ms(partial(policy.predict, net, image))
    return times or dict.fromkeys(each.within, _median_ms(partial(net, image)))


def _median_ms(run: Callable[[], object]) -> float:
    passed = []
    with torch.inference_mode():
        for _ in range(PASSES + 1):
            start = time.perf_counter()
            run()
            passed.append(1e3 * (time.perf_counter() - start))
    return median(passed[1:])  # the first warms up


def _reasons(each: Candidate, folder: ImageFolder, lacking: str = "") -> Iterator[str]:
    cost = each.cost
    few = folder.images_a_class < FEW_IMAGES
    if each.tuned:
        why = f", and {folder.images_a_class:g} images a class are few" if few else ""
        yield f"starts from trained weights{why}"
        if not _downloads(each):
            name = Path(str(each.config.training.start_from)).name
            yield f"FILE is the file of these weights, such as {name}: infra/docs/finetune.md says where to get it"
    elif few:
        few_images = f"{folder.images_a_class:g} images a class are few"
        yield f"trained from scratch, for which {few_images}: expect less accuracy{lacking}"
    yield f"reads images at {cost.side_px} px; yours have a median of {folder.side_px:.0f} px"
    if families.find(each.family).adaptive:
        known = len(cost.policies) + len(cost.deciding)
        yield f"adaptive: {len(each.within)} of its {known} policies are within the limit: {_some(each.within)}"
    when = " at the start of the training" if each.family in LEARN_SHAPES else ""
    yield f"at most {macs_text(each.macs)} an image{when}, {cost.parameters / 1e6:.3g} M parameters"
    if each.hours:
        epochs, least = each.config.training.epochs, hours_text(each.hours)
        yield f"{epochs:g} epochs take {least} or more on this machine: their MACs at the speed of its matrix products"
    if each.ms:
        yield f"{min(each.ms[name] for name in each.within):.3g} to {max(each.ms.values()):.3g} ms an image here"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _command(each: Candidate, folder: ImageFolder) -> str:
    """Trains the recipe on the folder, under a name of its own, on this machine if the recipe is for a cluster."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.root.name).lstrip("-._") or "mine"
    words = ["adaptnet", "train", each.recipe, f"data.root={quote(str(folder.root))}", f"name={name}"]
    words.append(f"tracking.register={name}")
    if each.tuned and not _downloads(each):
        words.append("training.start_from=FILE")
    compute = each.config.compute
    here = float(os.cpu_count() or 1)
    cpus = min(compute.cpus or here, here)
    if compute.device == "cuda":
        words += ["compute.workers=1", f"compute.cpus_per_worker={cpus:g}", "compute.device=auto"]
    elif compute.cpus is not None and cpus < compute.cpus:
        words.append(f"compute.cpus_per_worker={cpus:g}")
    if each.config.training.batch_size > max(1, folder.images // 4):
        words.append(f"--batch-size {max(2, 1 << max(0, folder.images // 16).bit_length())} training.scale_lr=linear")
    return " ".join(words)


# ---- the table of all recipes


def markdown() -> str:
    """A Markdown table of every shipped recipe but those that only try the software, and of no control of one."""
    rows = ["| recipe | side | parameters | MMACs | fewest | published | ours |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*rows, *(_row(name) for name in recipes.names() if ":" not in name and not name.endswith("toy"))])


def _row(name: str) -> str:
    config, cost, header = run_config.load(name, data_home=NOWHERE), net_costs.of(name), recipes.header(name)
    figures = ["-"] * 3
    if cost is not None:
        fewest = min([*cost.policies.values(), cost.macs])
        figures = [f"{cost.parameters / 1e6:.2f} M", f"{cost.macs / 1e6:,.1f}", f"{fewest / 1e6:,.1f}"]
    published = _sentence(header.get("Published", ""))
    known = published if any(character.isdigit() for character in published) and "none" not in published else ""
    source = f" ({_sentence(header.get('Source', ''))})" if known else ""
    cells = [f"`{name}`", f"{config.data.side_for_eval}", *figures, known + source, _sentence(header.get("Ours", ""))]
    return f"| {' | '.join(cell.replace('|', '/') or '-' for cell in cells)} |"


def _sentence(text: str) -> str:
    return re.split(r"(?<!Fig)\.(?= |$)", text, maxsplit=1)[0]
