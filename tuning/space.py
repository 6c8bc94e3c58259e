"""The search space of a sweep: the values that each key may take, and the samples drawn from it.

A space is one case or several, which are sampled one after another. A case maps keys of the recipe to allowed values:

  family.depth: 14                                        fixed
  family.target_rate: {grid: [0.4, 0.6]}                  every combination with the other grids
  training.optimizer.lr: {loguniform: [1e-3, 1e-1]}       random; so are uniform, integer (ends included) and choice
  family.limit_px: {choice: [8, 16], when: {family.mode: sa}}     only if an earlier key has this value
  family.target_rate: {list: [$early, {value: $late, times: 3}]}   a list built from other keys and values

A key that begins with $ is a variable of the sweep and no key of the recipe. Ray Tune's distributions draw the values.
Each sample has its own generator, seeded by (seed, round, case, grid point): more samples do not change the first ones,
and another key in one case changes no other case.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pipeline.errors import ConfigError, JsonValue

RANDOM = ("choice", "uniform", "loguniform", "integer")
KINDS = ("grid", *RANDOM, "list")
NOT_LEARNED_FROM = ("name", "compute", "tracking", "checkpoint", "logging")  # sections that do not change training
MOST_SAMPLES = 2000  # each is checked before the first is trained
MOST_ITEMS = 10_000  # of a drawn list
DIGITS = 6  # significant digits of a drawn float
NAME_CHARS = 60  # most characters of a sample's values in its name
Values = dict[str, JsonValue]


@dataclass(frozen=True)
class Dimension:
    """One key of a case.

    kind: one of KINDS, or "fixed". allowed: the values, or the two bounds of an interval. when {earlier key: values}:
    the key applies only if each of these keys has one of these values.
    """

    key: str
    kind: str
    allowed: tuple[JsonValue, ...]
    when: Mapping[str, tuple[JsonValue, ...]]

    def applies(self, values: Mapping[str, JsonValue]) -> bool:
        """Whether `values`, those of the earlier keys, meet every condition."""
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval of a uniform, loguniform or integer key."""
        low, high = self.allowed
        assert isinstance(low, int | float) and isinstance(high, int | float)
        return low, high


Case = tuple[Dimension, ...]


@dataclass(frozen=True)
class Sample:
    """The values of one trial: every key that applies, the sweep's variables included. `number` counts from 0."""

    number: int
    case: int
    values: Mapping[str, JsonValue]

    @property
    def overrides(self) -> Values:
        """The values without the sweep's variables: keys of the recipe."""
        return {key: value for key, value in self.values.items() if not key.startswith("$")}

    @property
    def shown(self) -> Values:
        """The values that distinguish the sample: without lists if there are variables, from which they are built."""
        has_variables = any(key.startswith("$") for key in self.values)
        return {key: value for key, value in self.values.items() if not (has_variables and isinstance(value, list))}

    @property
    def text(self) -> str:
        """The sample as text, e.g. "family.depth=14, training.optimizer.lr=0.05"."""
        return ", ".join(f"{key}={written(value)}" for key, value in self.shown.items())

    @property
    def name(self) -> str:
        """The name of the trial and its folder; a function of the sample alone."""
        parts = [f"{key.rpartition('.')[2].lstrip('$')}-{written(value)}" for key, value in self.shown.items()]
        text = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(parts)).strip("_.-")
        return f"{self.number:03d}-{text[:NAME_CHARS].rstrip('_.-')}" if text else f"{self.number:03d}"


def written(value: object) -> str:
    """A drawn value as text for people."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(written(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- reading a space


def parse(space: object) -> list[Case]:
    """The cases of a `space:` section. Raises ConfigError naming the key and the rule."""
    return [_case(section) for section in sections(space)]


def sections(space: object) -> list[Values]:
    """The mapping of each case. Raises ConfigError if `space` is neither a mapping nor a list of mappings."""
    given = space if isinstance(space, list) else [space]
    parts: list[Values] = [part for part in given if isinstance(part, dict) and part]
    if not parts or len(parts) < len(given):
        raise ConfigError("space: a mapping of keys to allowed values, or a list of such mappings", key="space")
    return parts


def flattened(section: Mapping[str, JsonValue], prefix: str = "") -> Values:
    """{"family": {"depth": X}} as {"family.depth": X}; a mapping that describes allowed values is not flattened."""
    flat: Values = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and not set(value) & {*KINDS, "when"}:
            flat |= flattened(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _case(section: Mapping[str, JsonValue]) -> Case:
    dimensions: list[Dimension] = []
    for key, value in flattened(section).items():
        dimension = _dimension(str(key), value)
        _check_conditions(dimension, {earlier.key: earlier for earlier in dimensions})
        dimensions.append(dimension)
    _check_grids(dimensions)
    if sum(1 for _ in islice(_grid(tuple(dimensions)), MOST_SAMPLES + 1)) > MOST_SAMPLES:
        grids = ", ".join(each.key for each in dimensions if each.kind == "grid")
        raise _error(grids, f"more than {MOST_SAMPLES:,} combinations; give fewer values, or draw some of the keys")
    return tuple(dimensions)


def _error(key: str, message: str, subject: object = None) -> ConfigError:
    return ConfigError(f"space: {key}: {message}", key=f"space.{key}", subject=subject)


def _check_conditions(dimension: Dimension, earlier: Mapping[str, Dimension]) -> None:
    """Checks that each key of `when` comes earlier and can have the required values."""
    for key, values in dimension.when.items():
        if key not in earlier:
            raise _error(dimension.key, f"when: {key} must come before it in the same case", key)
        required = earlier[key]
        never = [value for value in values if value not in required.allowed]
        if required.kind in ("grid", "choice", "fixed") and never and not any(map(_is_variable, required.allowed)):
            allowed = ", ".join(map(written, required.allowed))
            raise _error(
                dimension.key, f"when: {key} is never {written(never[0])}; it may be {allowed}", written(never[0])
            )


def _is_variable(value: object) -> bool:
    return isinstance(value, str) and value.startswith("$")


def _check_grids(dimensions: Sequence[Dimension]) -> None:
    """Checks that the number of trials does not depend on random values."""
    random = {
        each.key
        for each in dimensions
        if each.kind in (*RANDOM, "list") or (each.kind == "fixed" and _is_variable(each.allowed[0]))
    }
    for dimension in dimensions:
        wrong = ", ".join(sorted(random & set(dimension.when)))
        if dimension.kind == "grid" and wrong:
            message = f"a grid may depend on grids and fixed values, not on random ones ({wrong}); write it as a choice"
            raise _error(dimension.key, message, wrong)


def _dimension(key: str, value: JsonValue) -> Dimension:
    section = key.partition(".")[0]
    if section in NOT_LEARNED_FROM:
        raise _error(key, f"no key of {section} changes what is learned; give it as an override, {key}=VALUE")
    if not isinstance(value, dict):
        return Dimension(key, "fixed", (value,), {})
    kinds = [kind for kind in value if kind != "when"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise ConfigError(
            f"space: {key} (={value}): give one of {', '.join(KINDS)}, and `when` for a condition",
            key=f"space.{key}",
            subject=value,
        )
    conditions = value.get("when", {})
    if not isinstance(conditions, dict):
        raise _error(key, f"when (={conditions!r}): write {{other.key: value}}, or a list of values", conditions)
    when = {other: tuple(v) if isinstance(v, list) else (v,) for other, v in conditions.items()}
    (kind,) = kinds
    return Dimension(key, kind, _allowed(key, kind, value[kind]), when)


def _allowed(key: str, kind: str, given: JsonValue) -> tuple[JsonValue, ...]:
    if not isinstance(given, list) or not given:
        raise _error(key, f"{kind} (={given!r}): give a list of at least one value", given)
    if kind in ("uniform", "loguniform", "integer"):
        _check_bounds(key, kind, given)
    return tuple(given)


def _check_bounds(key: str, kind: str, given: list[JsonValue]) -> None:
    numbers = [n for n in given if isinstance(n, int if kind == "integer" else int | float) and not isinstance(n, bool)]
    if len(given) != 2 or len(numbers) != 2:
        wanted = "two whole numbers" if kind == "integer" else "two numbers"
        raise _error(key, f"{kind} (={given}): give {wanted}, [LOWEST, HIGHEST]", given)
    low, high = numbers
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _error(key, f"{kind} (={given}): both bounds must be finite numbers", given)
    if low >= high:
        raise _error(key, f"{kind} (={given}): the lower bound must be below the upper one", given)
    if kind == "loguniform" and low <= 0:
        raise _error(key, f"loguniform (={given}): both bounds must be above 0", given)


# --- drawing samples


def is_random(case: Case) -> bool:
    """Whether two samples of this case can differ."""
    return any(dimension.kind in RANDOM for dimension in case)


def draw_samples(cases: Sequence[Case], *, rounds: int, seed: int) -> list[Sample]:
    """All samples, round by round, with every grid point of each case in a round; a case without randomness only once.

    The same arguments give the same samples, and more rounds leave the first ones as they are.
    """
    drawn: list[Sample] = []
    for number in range(rounds):
        for case_number, case in enumerate(cases):
            if number == 0 or is_random(case):
                for place, point in enumerate(_grid(case)):
                    random = np.random.default_rng([seed, number, case_number, place])
                    drawn.append(Sample(len(drawn), case_number, _draw(case, point, random)))
    return drawn


def _grid(case: Case) -> Iterator[Values]:
    """Each combination of the grids' values, the first grid the slowest; without grids that do not apply."""

    def walk(position: int, values: Values, point: Values) -> Iterator[Values]:
        if position == len(case):
            yield point
            return
        dimension = case[position]
        if not dimension.applies(values) or dimension.kind not in ("grid", "fixed"):
            yield from walk(position + 1, values, point)
            return
        for value in dimension.allowed:
            chosen = point | {dimension.key: value} if dimension.kind == "grid" else point
            yield from walk(position + 1, values | {dimension.key: value}, chosen)

    return walk(0, {}, {})


def _draw(case: Case, point: Values, random: np.random.Generator) -> Values:
    return assemble(case, lambda each: point[each.key] if each.kind == "grid" else draw_value(each, random))


def assemble(case: Case, pick: Callable[[Dimension], JsonValue]) -> Values:
    """The values of a case, key by key; `pick` is called for each key that applies and is a grid or random."""
    values: Values = {}
    for dimension in case:
        if dimension.applies(values):
            if dimension.kind == "fixed":
                values[dimension.key] = _resolved(dimension, dimension.allowed[0], values)
            elif dimension.kind == "list":
                values[dimension.key] = _list(dimension, values)
            else:
                values[dimension.key] = pick(dimension)
    return values


def _list(dimension: Dimension, values: Values) -> list[JsonValue]:
    items: list[JsonValue] = []
    for item in dimension.allowed:
        times = 1
        if isinstance(item, dict):
            repeats = item.get("times")
            if set(item) != {"value", "times"} or type(repeats) is not int or not 1 <= repeats <= MOST_ITEMS:
                message = f"list: {item}: write {{value: VALUE, times: NUMBER}}, with a number of 1 to {MOST_ITEMS:,}"
                raise _error(dimension.key, message, item)
            item, times = item["value"], repeats
        items += [_resolved(dimension, item, values)] * times
    return items


def _resolved(dimension: Dimension, value: JsonValue, values: Values) -> JsonValue:
    """The value of `$name` if `value` is a variable, else `value`."""
    if not isinstance(value, str) or not _is_variable(value):
        return value
    if value not in values:
        raise _error(dimension.key, f"{value} is not set by an earlier key of this case", value)
    return values[value]


def draw_value(dimension: Dimension, random: np.random.Generator) -> JsonValue:
    """A value of a random key, drawn by Ray Tune's distribution of its kind."""
    from ray import tune

    if dimension.kind == "choice":
        value: JsonValue = tune.choice(list(dimension.allowed)).sample(random_state=random)
        return value
    low, high = dimension.bounds
    if dimension.kind == "integer":
        return int(tune.randint(int(low), int(high) + 1).sample(random_state=random))
    distribution = tune.uniform(low, high) if dimension.kind == "uniform" else tune.loguniform(low, high)
    return shortened(float(distribution.sample(random_state=random)), dimension)


def shortened(value: float, dimension: Dimension) -> float:
    """The value rounded to DIGITS significant digits, so that its text is exact, and kept within the bounds."""
    low, high = dimension.bounds
    return min(max(float(f"{value:.{DIGITS}g}"), float(low)), float(high))
