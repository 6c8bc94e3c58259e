"""The figures of a statement, image by image and seed by seed, from the stored evaluations of the arms' runs.

A kept run (`kept.KeptRuns`) counts instead of one in the claim's folder.

Letters: S seeds, N images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.deploy.evaluations import Array
from pipeline.errors import ConfigError
from pipeline.evaluation.comparing import Rows
from pipeline.evaluation.evaluate import load_reports
from pipeline.evaluation.from_weights import FINAL
from pipeline.family import Report
from pipeline.figures import Arrays, hits
from pipeline.runs import records, seed_runs
from tuning.reproduce.claim import ClaimStatement, LoadedClaim, Quantity
from tuning.reproduce.kept import KeptRuns, Origin, arrays_of, evaluation_of, not_there
from tuning.reproduce.verdict import MeasuredDifference, difference

SHUFFLES, SHUFFLE_SEED = 200, 0
PER_IMAGE = {"top1": 100.0, "macs": 1e-6}  # what turns an image's number into the unit of the figure
T = TypeVar("T")
PerImage = NDArray[np.float64]  # [N]


@dataclass(frozen=True)
class OfSeed:
    """A figure of one seed: values [N] of the images `rows` [N], or [1] without rows."""

    values: PerImage
    rows: Rows | None = None


@dataclass
class ClaimFigures:
    """What the finished runs in a claim's folder and the kept ones give; each stored evaluation is read once."""

    claim: LoadedClaim
    folder: Path
    kept: KeptRuns
    _reports: dict[Path, Mapping[str, Report]] = field(default_factory=dict)
    _arrays: dict[tuple[Path, str], Arrays] = field(default_factory=dict)

    def run_of(self, arm: str, seed: int) -> Path:
        """The folder of a run."""
        return seed_runs.folder_of(seed_runs.group_of(self.folder / arm), seed)

    def place_of(self, arm: str, seed: int) -> Path:
        """The folder that has the evaluations of a run: where it is kept, or its own."""
        return self.kept.place(arm, seed) if self.kept.find(arm, seed) else self.run_of(arm, seed)

    def origin(self, arm: str, seed: int) -> Origin:
        """How long a run took, at which commit and on what."""
        kept = self.kept.find(arm, seed)
        return kept.origin if kept else Origin.of_run(self.run_of(arm, seed))

    def is_done(self, arm: str, seed: int) -> bool:
        """Whether a run is kept, or finished in the claim's folder with all evaluations of the claim."""
        return self.kept.find(arm, seed) is not None or self.is_here(arm, seed)

    def is_here(self, arm: str, seed: int) -> bool:
        """Whether a run is finished in the claim's folder, with all evaluations of the claim."""
        run = self.run_of(arm, seed)
        done = records.read_status(run).finished
        return done and all((evaluation_of(run, name) / records.ABOUT).is_file() for name in self._names(arm))

    def _names(self, arm: str) -> Sequence[str]:
        return [FINAL, *self.claim.config.evaluations_of(arm)]

    def seeds_of(self, *arms: str) -> tuple[int, ...]:
        """The seeds of which all these arms are done, rising."""
        found = [{*seed_runs.seeds_in(seed_runs.group_of(self.folder / arm)), *self.kept.seeds_of(arm)} for arm in arms]
        common = set.intersection(*found) if found else set()
        return tuple(sorted(seed for seed in common if all(self.is_done(arm, seed) for arm in arms)))

    def difference(self, statement: ClaimStatement) -> MeasuredDifference | None:
        """a - b of a statement, over the seeds of which all that it needs is there; None without such a seed.

        Raises ConfigError if a policy was not evaluated, or the runs were evaluated on different images.
        """
        seeds = self.seeds_of(*_arms(statement))
        if not seeds:
            return None
        sides = [[self.of_seed(side, seed) for seed in seeds] for side in (statement.a, statement.b)]
        tables = _aligned(*sides)
        return None if tables is None else difference(seeds, *tables)

    def of_seed(self, quantity: Quantity, seed: int) -> OfSeed:
        """A figure of one seed, the mean over the quantity's arms."""
        if quantity.value is not None:
            return OfSeed(np.array([quantity.value]))
        found = [self._of_arm(quantity, arm, seed) for arm in quantity.arms]
        return OfSeed(np.mean([each.values for each in found], axis=0), found[0].rows)

    def _of_arm(self, quantity: Quantity, arm: str, seed: int) -> OfSeed:
        if quantity.policy is not None and quantity.figure == "class_sd":
            arrays = self.arrays(arm, seed, quantity.evaluation, quantity.policy)
            return OfSeed(np.array([_class_sd(arrays, str(quantity.fact), shuffled=quantity.shuffled_labels)]))
        names = [quantity.policy] if quantity.policy else list(quantity.policies)
        found = [self.arrays(arm, seed, quantity.evaluation, name) for name in names]
        weights = self._shares(quantity, arm, seed)
        values = sum(
            weight * _per_image(arrays, quantity.figure) for weight, arrays in zip(weights, found, strict=True)
        )
        return OfSeed(PER_IMAGE[quantity.figure] * np.asarray(values), found[0]["rows"])

    def _shares(self, quantity: Quantity, arm: str, seed: int) -> list[float]:
        """The share of the images that each of the quantity's policies gets, at random; NaN where none is possible."""
        if quantity.policy is not None:
            return [1.0]
        if quantity.shares_of is not None:
            report = self.report(arm, seed, quantity.evaluation, quantity.shares_of)
            return list(_known(report.facts, str(quantity.fact), "facts")[str(quantity.fact)])
        assert quantity.at_macs_of is not None
        target = self.report(quantity.at_macs_of.arm, seed, FINAL, quantity.at_macs_of.policy).macs_mean
        macs = [self.report(arm, seed, quantity.evaluation, name).macs_mean for name in quantity.policies]
        return mixture(macs, target)

    def arrays(self, arm: str, seed: int, evaluation: str, policy: str) -> Arrays:
        """The stored arrays by image of a policy. Raises ConfigError if there are none."""
        place = evaluation_of(self.place_of(arm, seed), evaluation)
        if (place, policy) not in self._arrays:
            self._arrays[place, policy] = arrays_of(place, policy)
        return self._arrays[place, policy]

    def report(self, arm: str, seed: int, evaluation: str, policy: str) -> Report:
        """The report of a policy. Raises ConfigError if it was not evaluated."""
        place = evaluation_of(self.place_of(arm, seed), evaluation)
        if place not in self._reports:
            self._reports[place] = {report.policy: report for report in load_reports(place)}
        by_name = self._reports[place]
        if policy not in by_name:
            raise not_there(place, policy, f"it was not evaluated; evaluated were: {', '.join(by_name)}")
        return by_name[policy]


def mixture(macs: Sequence[float], target: float) -> list[float]:
    """The shares of the policies with these MACs whose mean is `target`, of the two nearest ones; they sum to 1.

    Above the most expensive policy it is that one alone. NaN below the cheapest one, which cannot cost less.
    """
    shares = [0.0] * len(macs)
    order = sorted(range(len(macs)), key=lambda number: macs[number])
    below = [number for number in order if macs[number] <= target]
    above = [number for number in order if macs[number] > target]
    if not below:
        return [float("nan")] * len(macs)
    if not above:
        shares[below[-1]] = 1.0
        return shares
    share = (target - macs[below[-1]]) / (macs[above[0]] - macs[below[-1]])
    shares[below[-1]], shares[above[0]] = 1 - share, share
    return shares


def _known(found: Mapping[str, T], name: str, what: str) -> Mapping[str, T]:
    """What was found. Raises ConfigError if it has no such fact."""
    if name not in found:
        known = ", ".join(each for each in found if each.startswith("facts.") or what == "facts")
        raise ConfigError(f"fact {name}: the policy has none of that name; known: {known}", key="fact", subject=name)
    return found


def _arms(statement: ClaimStatement) -> list[str]:
    """The arms that a statement needs, each once."""
    named = [*statement.a.arms, *statement.b.arms]
    named += [each.at_macs_of.arm for each in (statement.a, statement.b) if each.at_macs_of]
    return list(dict.fromkeys(named))


def _per_image(arrays: Arrays, figure: str) -> PerImage:
    return hits(arrays) if figure == "top1" else arrays["macs"].astype(np.float64)


def _class_sd(arrays: Arrays, fact: str, *, shuffled: bool) -> float:
    """The standard deviation over classes of a fact's mean; shuffled: the mean of that over SHUFFLES permutations."""
    key = f"facts.{fact}"
    values, labels = _known(arrays, key, key)[key].astype(np.float64), arrays["labels"]
    if not shuffled:
        return _sd_of_means(values, labels)
    generator = np.random.default_rng(SHUFFLE_SEED)
    return float(np.mean([_sd_of_means(values, generator.permutation(labels)) for _ in range(SHUFFLES)]))


def _sd_of_means(values: PerImage, labels: Array) -> float:
    counts = np.bincount(labels)
    means = np.bincount(labels, weights=values)[counts > 0] / counts[counts > 0]
    return float(means.std(ddof=1))


def _aligned(a: Sequence[OfSeed], b: Sequence[OfSeed]) -> tuple[PerImage, PerImage] | None:
    """Both sides as [S, N] on the images that all have; a side without rows as it is, for each image.

    None where a value is not a number.
    """
    with_rows = [each.rows for each in (*a, *b) if each.rows is not None]
    common = reduce(np.intersect1d, with_rows) if with_rows else np.zeros(1, np.int64)
    if len(common) == 0:
        raise ConfigError("the runs were evaluated on different images", key="evaluations")
    tables = [np.stack([_on(each, common) for each in side]) for side in (a, b)]
    return None if any(np.isnan(table).any() for table in tables) else (tables[0], tables[1])


def _on(found: OfSeed, common: Rows) -> PerImage:
    if found.rows is None:
        return np.full(len(common), found.values[0])
    return found.values[np.searchsorted(found.rows, common)]
