"""Statistics over seeds: the interval covers the truth for new seeds and images, and agrees with Student's t."""

from __future__ import annotations

import numpy as np
import pytest
from raised import fails
from scipy import stats
from test_comparing import ANY, net

from pipeline.errors import ConfigError
from pipeline.evaluation import over_seeds
from pipeline.evaluation.over_seeds import SeedGroup
from pipeline.family import Evaluated


def seeded(name: str, seed: int, shift: int = 0) -> Evaluated:
    return Evaluated(**{**vars(net(f"{name}-s{seed}", ANY, seed=seed + shift)), "recipe": {"seed": seed}})


def group(name: str, *seeds: int, shift: int = 0) -> SeedGroup:
    return SeedGroup(name, [seeded(name, seed, shift) for seed in seeds])


def test_a_spread_is_that_of_student() -> None:
    values = [0.71, 0.74, 0.70, 0.73]
    found, low_high = over_seeds.spread(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.n, found.mean) == (4, pytest.approx(0.72)) and found.sd == pytest.approx(np.std(values, ddof=1))
    assert (found.low, found.high) == (pytest.approx(low_high.low), pytest.approx(low_high.high))
    assert over_seeds.spread([0.5]) == over_seeds.Spread(1, 0.5)


@pytest.mark.parametrize("paired", [True, False])
def test_over_seeds_it_is_students_or_welchs_test(paired: bool) -> None:
    generator = np.random.default_rng(1)
    a, b = generator.random((4, 30)), generator.random((4, 30))
    rows = a.mean(1), b.mean(1)
    known = stats.ttest_rel(*rows) if paired else stats.ttest_ind(*rows, equal_var=False)
    found = over_seeds.over_seeds(a, b, paired=paired)
    assert found.p_value == pytest.approx(known.pvalue) and found.difference == pytest.approx(a.mean() - b.mean())


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("of_seeds", "of_images"), [(0.1, 0.0), (0.0, 1.0), (0.05, 0.5)])
def test_the_interval_covers_the_truth_for_new_seeds_and_images(
    paired: bool, of_seeds: float, of_images: float
) -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        hard = of_images * generator.normal(size=200)
        a, b = (
            share * hard + of_seeds * generator.normal(size=(3, 1)) + 0.3 * generator.normal(size=(3, 200))
            for share in (1.0, 0.5)
        )
        found = over_seeds.over_both(a, b, paired=paired)
        covered += found.low <= 0 <= found.high
        assert found.resolved == (not found.low <= 0 <= found.high)
    assert covered / 200 >= 0.91


def test_a_group_does_not_differ_from_itself_and_swapping_flips_the_sign() -> None:
    same = over_seeds.policies(group("a", 1, 2, 3), group("b", 1, 2, 3))
    assert same.paired and same.over_both.difference == 0 and not same.over_both.resolved
    a, b = group("a", 1, 2, 3), group("b", 4, 5, shift=9)
    there, back = over_seeds.policies(a, b, "fast"), over_seeds.policies(b, a, None, "fast")
    assert not there.paired and there.a.seeds == (1, 2, 3) and (there.a.top1.n, there.b.top1.n) == (3, 2)
    assert there.over_both.difference == pytest.approx(-back.over_both.difference)
    assert there.over_both.p_value == pytest.approx(back.over_both.p_value)


def test_at_equal_cost_groups_have_the_means_of_their_seeds() -> None:
    a, b = group("a", 1, 2), group("b", 1, 2, shift=5)
    found = {each.macs: each for each in over_seeds.at_equal_cost(a, b)}
    assert sorted(found) == [1e6, 4e6]
    slow = [report.top1 for each in a.nets for report in each.reports if report.policy == "slow"]
    assert found[4e6].top1_a == pytest.approx(np.mean(slow))


def test_one_seed_has_no_spread_and_is_refused() -> None:
    with fails(ConfigError, "source", "b"):
        over_seeds.policies(group("a", 1, 2), group("b", 1))
