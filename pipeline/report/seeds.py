"""What several seeds of each recipe say: every figure with its spread, and which recipe is better, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations

from pipeline.evaluation import over_seeds as tests
from pipeline.evaluation.comparing import LEVEL
from pipeline.evaluation.over_seeds import Estimate, GroupAtCost, GroupTest, SeedGroup
from pipeline.evaluation.seed_means import over_seeds
from pipeline.family import Evaluated, Report
from pipeline.figures import Cell, Number, Table, marks
from pipeline.report.general import TOP1, batches, timed, titled

INTERVAL = f"{100 * LEVEL:.0f} %"
FIGURES: dict[str, Callable[[Report], Number]] = {  # as on the page, in the page's units
    TOP1: lambda report: 100 * report.top1,
    "top-5 (%)": lambda report: None if report.top5 is None else 100 * report.top5,
    "ECE": lambda report: report.ece,
    "MMACs mean": lambda report: report.macs_mean / 1e6,
    "MMACs p95": lambda report: report.macs_p95 / 1e6,
    "% of full": lambda report: 100 * report.relative_macs,
}


@dataclass(frozen=True)
class GroupComparison:
    """Two groups under their first policies, and at the same mean MACs; the verdict on the former as a sentence."""

    a: SeedGroup
    b: SeedGroup
    test: GroupTest
    at_equal_cost: Sequence[GroupAtCost]

    def words(self, found: Estimate) -> str:
        """The verdict on a difference of these groups."""
        return tests.in_words(self.a, self.b, found, self.test.num_images)

    @property
    def verdict(self) -> str:
        """The verdict on the first policies of both groups, with the names of the groups and policies."""
        names = f"{self.a.name} ({self.test.a.policy}) and {self.b.name} ({self.test.b.policy})"
        return f"{names}: {self.words(self.test.over_both)}"


def comparisons(nets: Sequence[Evaluated]) -> list[GroupComparison]:
    """Every two of the nets that are means of at least two seeds, compared.

    Raises ConfigError if the evaluation of a seed has no answers by image.
    """
    groups = [SeedGroup(net.name, net.seeds) for net in nets if len(net.seeds) > 1]
    return [GroupComparison(a, b, tests.policies(a, b), tests.at_equal_cost(a, b)) for a, b in combinations(groups, 2)]


def tables(nets: Sequence[Evaluated], compared: Sequence[GroupComparison]) -> list[Table]:
    """The tests, then every figure of every policy of each group; empty without groups."""
    groups = [net for net in nets if net.seeds]
    names = marks([net.name for net in groups])
    return [
        *([_tests(compared)] if compared else []),
        *(_spreads(net, name) for net, name in zip(groups, names, strict=True)),
    ]


def to_json(nets: Sequence[Evaluated], compared: Sequence[GroupComparison]) -> dict[str, object]:
    """`over_seeds` of data.json: spreads {net: {policy: {figure: Spread}}} in the page's units, and the tests."""
    found = {net.name: {r.policy: dict(_figures(net, r)) for r in net.reports} for net in nets if net.seeds}
    tested = [
        {"verdict": c.verdict, **asdict(c.test), "at_equal_cost": [asdict(each) for each in c.at_equal_cost]}
        for c in compared
    ]
    return {"spreads": found, "comparisons": tested}


def _figures(net: Evaluated, report: Report) -> Iterator[tuple[str, dict[str, Number]]]:
    """The spread of each figure that every seed has."""
    for name, figure in {**FIGURES, **_times(net)}.items():
        found = over_seeds(net, report.policy, figure)
        if found is not None:
            yield name, asdict(found)


def _times(net: Evaluated) -> dict[str, Callable[[Report], Number]]:
    return {f"ms @{size} median": partial(_median_ms, size) for size in batches([net])}


def _median_ms(size: int, report: Report) -> Number:
    return next((entry.median_ms for entry in timed(report, size)), None)


def _spreads(net: Evaluated, name: str) -> Table:
    seeds = ", ".join(str(tests.seed_of(seed)) for seed in net.seeds)
    rows: list[list[Cell]] = [
        [report.policy, figure, *(values[key] for key in ("mean", "sd", "low", "high", "n"))]
        for report in net.reports
        for figure, values in _figures(net, report)
    ]
    caption = (
        f"Seeds {seeds}. sd is the standard deviation over seeds (over n - 1), from and to bound the {INTERVAL} "
        "interval of the mean by Student's t; one seed has neither. MACs of a policy that computes the same for every "
        "image do not depend on the seed."
    )
    columns = ["policy", "figure", "mean", "sd", f"{INTERVAL} from", "to", "n"]
    return Table(f"seeds-{name}", titled(net), caption, columns, rows)


def _tests(compared: Sequence[GroupComparison]) -> Table:
    rows = [row for each in compared for row in _rows(each)]
    caption = (
        f"Differences are in points of top-1 with the {INTERVAL} interval over seeds and images: what new seeds and "
        "new images could give. Groups of the same seeds are compared in pairs. At equal MACs each net is mixed from "
        "the policies of its own frontier. Each test is on its own: of twenty tests of equal recipes one finds a "
        "difference."
    )
    columns = ["A", "B", "policies", "A (%)", "B (%)", "A - B", f"{INTERVAL} from", "to", "p", "verdict"]
    return Table("seed-tests", "Which is better?", caption, columns, rows)


def _rows(compared: GroupComparison) -> Iterator[list[Cell]]:
    test = compared.test
    yield _row(compared, f"{test.a.policy}, {test.b.policy}", test.a.top1.mean, test.b.top1.mean, test.over_both)
    for each in compared.at_equal_cost:
        yield _row(compared, f"at {each.macs / 1e6:.4g} MMACs", each.top1_a, each.top1_b, each.over_both)


def _row(compared: GroupComparison, policies: str, top1_a: float, top1_b: float, found: Estimate) -> list[Cell]:
    points = [100 * value for value in (top1_a, top1_b, found.difference, found.low, found.high)]
    return [compared.a.name, compared.b.name, policies, *points, found.p_value, compared.words(found)]
