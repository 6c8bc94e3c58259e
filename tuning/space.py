"""The space of a sweep: what its keys may be, and the draws that are made of it.

A space is one case or several, which are drawn one after another. A case maps keys of the recipe to what they may be:

  family.depth: 14                                        fixed
  family.target_rate: {grid: [0.4, 0.6]}                  each of these values with each of every other grid
  training.optimizer.lr: {loguniform: [1e-3, 1e-1]}       drawn; uniform, integer (both ends included), choice likewise
  family.limit_px: {choice: [8, 16], when: {family.mode: sa}}     where an earlier key has that value
  family.target_rate: {list: [$early, {value: $late, times: 3}]}   put together of other keys and values

A key that begins with $ is a name inside the sweep and no key of the recipe. Ray Tune's domains draw; each draw has a
generator of its own, seeded by (seed, number of the sample, case, place in the grid), so that more samples do not
change the first ones, and another key in one case changes no other case.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pipeline.errors import ConfigError

RANDOM = ("choice", "uniform", "loguniform", "integer")
KINDS = ("grid", *RANDOM, "list")
PLACES = ("name", "compute", "tracking", "checkpoint", "logging")  # of a recipe; nothing in them is learned from
DIGITS = 6  # of a drawn float
Values = dict[str, Any]


@dataclass(frozen=True)
class Dimension:
    """One key of a case: what it may be (`of`: values, or the two bounds), and when it is there at all."""

    key: str
    kind: str  # one of KINDS, or "fixed"
    of: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]]

    def applies(self, values: Mapping[str, Any]) -> bool:
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())


Case = tuple[Dimension, ...]


@dataclass(frozen=True)
class Sample:
    """What one trial is to be: every key that applies, names inside the sweep included."""

    number: int  # from 0
    case: int
    values: Mapping[str, Any]

    @property
    def overrides(self) -> Values:
        """The keys of the recipe among them."""
        return {key: value for key, value in self.values.items() if not key.startswith("$")}

    @property
    def shown(self) -> Values:
        """What tells it from the others: without lists that are put together of names that are shown."""
        named = any(key.startswith("$") for key in self.values)
        return {key: value for key, value in self.values.items() if not (named and isinstance(value, list))}

    @property
    def text(self) -> str:
        return ", ".join(f"{key}={written(value)}" for key, value in self.shown.items())

    @property
    def name(self) -> str:
        """Of the trial and its folder; the same whenever this draw is made."""
        parts = [f"{key.rpartition('.')[2].lstrip('$')}-{written(value)}" for key, value in self.shown.items()]
        words = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(parts)).strip("_.-")
        return f"{self.number:03d}-{words[:60].rstrip('_.-')}" if words else f"{self.number:03d}"


def written(value: Any) -> str:
    """A drawn value for people."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(written(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- reading


def parse(space: Any) -> list[Case]:
    """The cases of a `space:` section. Raises ConfigError naming the key and the rule."""
    sections = space if isinstance(space, list) else [space]
    if not sections or not all(isinstance(section, dict) and section for section in sections):
        raise ConfigError("space: a mapping of keys to what they may be, or a list of such mappings")
    return [_case(section) for section in sections]


def flattened(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"family": {"depth": X}} as {"family.depth": X}; a mapping that says what a key may be stays whole."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and value and not set(value) & {*KINDS, "when"}
        found |= flattened(value, f"{name}.") if nested else {name: value}
    return found


def _case(section: Mapping[str, Any]) -> Case:
    entries: list[Dimension] = []
    for key, value in flattened(section).items():
        entry = _entry(str(key), value)
        _check_conditions(entry, {earlier.key: earlier for earlier in entries})
        entries.append(entry)
    _check_grids(entries)
    return tuple(entries)


def _check_conditions(entry: Dimension, earlier: Mapping[str, Dimension]) -> None:
    """Every key asked stands before it, and each value asked for is one that the key may have."""
    for asked, values in entry.when.items():
        if asked not in earlier:
            raise ConfigError(f"space: {entry.key}: when: {asked} must stand before it in the same case")
        of = earlier[asked]
        never = [value for value in values if value not in of.of]
        if of.kind in ("grid", "choice", "fixed") and never and not any(map(_is_name, of.of)):
            there = ", ".join(map(written, of.of))
            raise ConfigError(f"space: {entry.key}: when: {asked} is never {written(never[0])}; it may be {there}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("$")


def _check_grids(entries: Sequence[Dimension]) -> None:
    """How many trials there are must not hang on what is drawn."""
    drawn = {e.key for e in entries if e.kind in (*RANDOM, "list") or (e.kind == "fixed" and _is_name(e.of[0]))}
    for entry in entries:
        if entry.kind == "grid" and drawn & set(entry.when):
            raise ConfigError(
                f"space: {entry.key}: a grid may depend on grids and fixed values, not on what is drawn "
                f"({', '.join(sorted(drawn & set(entry.when)))}); write it as a choice"
            )


def _entry(key: str, value: Any) -> Dimension:
    place = key.partition(".")[0]
    if place in PLACES:
        raise ConfigError(
            f"space: {key}: nothing under {place} changes what is learned; give it as an override, {key}=VALUE"
        )
    if not isinstance(value, dict):
        return Dimension(key, "fixed", (value,), {})
    kinds = [kind for kind in value if kind != "when"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise ConfigError(f"space: {key} (={value}): say one of {', '.join(KINDS)}, and `when` if it is conditional")
    conditions = value.get("when", {})
    if not isinstance(conditions, dict):
        raise ConfigError(f"space: {key}: when (={conditions!r}): write {{other.key: value}}, or a list of values")
    when = {asked: tuple(v) if isinstance(v, list) else (v,) for asked, v in conditions.items()}
    (kind,) = kinds
    return Dimension(key, kind, _bounds(key, kind, value[kind]), when)


def _bounds(key: str, kind: str, given: Any) -> tuple[Any, ...]:
    if not isinstance(given, list) or not given:
        raise ConfigError(f"space: {key}: {kind} (={given!r}): give a list with a value at least")
    if kind in ("uniform", "loguniform", "integer"):
        _check_bounds(key, kind, given)
    return tuple(given)


def _check_bounds(key: str, kind: str, given: list[Any]) -> None:
    whole = kind == "integer"
    numbers = all(isinstance(n, int if whole else int | float) and not isinstance(n, bool) for n in given)
    if len(given) != 2 or not numbers:
        wanted = "two whole numbers" if whole else "two numbers"
        raise ConfigError(f"space: {key}: {kind} (={given}): give {wanted}, [LOWEST, HIGHEST]")
    low, high = given
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"space: {key}: {kind} (={given}): both bounds are finite numbers")
    if low >= high:
        raise ConfigError(f"space: {key}: {kind} (={given}): the lower bound comes first, and they differ")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"space: {key}: loguniform (={given}): both bounds are above 0")


# --- drawing


def is_random(case: Case) -> bool:
    return any(entry.kind in RANDOM for entry in case)


def draw_samples(cases: Sequence[Case], *, samples: int, seed: int) -> list[Sample]:
    """Every draw, sample by sample; what has nothing random in it is drawn once. The same for the same arguments."""
    found: list[Sample] = []
    for sample in range(samples):
        for number, case in enumerate(cases):
            if sample == 0 or is_random(case):
                for place, picked in enumerate(_grid(case)):
                    random = np.random.default_rng([seed, sample, number, place])
                    found.append(Sample(len(found), number, _drawn(case, picked, random)))
    return found


def _grid(case: Case) -> Iterator[Values]:
    """Each combination of the grids' values, the first grid the slowest; grids that do not apply are left out."""

    def walk(position: int, values: Values, picked: Values) -> Iterator[Values]:
        if position == len(case):
            yield picked
            return
        entry = case[position]
        if not entry.applies(values) or entry.kind not in ("grid", "fixed"):
            yield from walk(position + 1, values, picked)
            return
        for value in entry.of:
            chosen = picked | {entry.key: value} if entry.kind == "grid" else picked
            yield from walk(position + 1, values | {entry.key: value}, chosen)

    return walk(0, {}, {})


def _drawn(case: Case, picked: Values, random: np.random.Generator) -> Values:
    return assemble(case, lambda entry: picked[entry.key] if entry.kind == "grid" else draw_value(entry, random))


def assemble(case: Case, pick: Callable[[Dimension], Any]) -> Values:
    """The values of a case, key by key: `pick` is asked for those that are not fixed and apply."""
    values: Values = {}
    for entry in case:
        if entry.applies(values):
            if entry.kind == "fixed":
                values[entry.key] = _filled(entry, entry.of[0], values)
            elif entry.kind == "list":
                values[entry.key] = _listed(entry, values)
            else:
                values[entry.key] = pick(entry)
    return values


def _listed(entry: Dimension, values: Values) -> list[Any]:
    found: list[Any] = []
    for item in entry.of:
        times = 1
        if isinstance(item, dict):
            if set(item) != {"value", "times"} or not isinstance(item["times"], int) or item["times"] < 1:
                raise ConfigError(f"space: {entry.key}: list: {item}: write {{value: VALUE, times: NUMBER}}")
            item, times = item["value"], item["times"]
        found += [_filled(entry, item, values)] * times
    return found


def _filled(entry: Dimension, value: Any, values: Values) -> Any:
    """`$name` as what it was drawn to be."""
    if not _is_name(value):
        return value
    if value not in values:
        raise ConfigError(f"space: {entry.key}: {value} is drawn nowhere before it in this case")
    return values[value]


def draw_value(entry: Dimension, random: np.random.Generator) -> Any:
    """A value of a random entry, by Ray Tune's domain of its kind."""
    value = _domain(entry).sample(random_state=random)
    return shortened(value, entry) if entry.kind in ("uniform", "loguniform") else value


def shortened(value: float, entry: Dimension) -> float:
    """A drawn float in DIGITS digits, so that names and tables are as exact as the run; still within its bounds."""
    return min(max(float(f"{value:.{DIGITS}g}"), float(entry.of[0])), float(entry.of[1]))


def _domain(entry: Dimension) -> Any:
    tune = _tune()
    if entry.kind == "choice":
        return tune.choice(list(entry.of))
    low, high = entry.of
    if entry.kind == "integer":
        return tune.randint(low, high + 1)
    return (tune.uniform if entry.kind == "uniform" else tune.loguniform)(low, high)


@cache
def _tune() -> Any:
    from ray.tune.search import sample as tune

    return tune
