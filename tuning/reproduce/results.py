"""result.json of a claim, its table, and its section in a file of results such as tuning/claims/RESULTS.md.

A section is a function of result.json alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic_core import to_jsonable_python

from pipeline import config as configs
from pipeline.config import section
from pipeline.errors import ConfigError, JsonValue
from pipeline.evaluation.evaluate import load_reports
from pipeline.evaluation.from_weights import FINAL
from pipeline.evaluation.over_seeds import Spread
from pipeline.execution import seeds
from pipeline.figures import Table
from pipeline.report import report
from pipeline.runs.files import read_json, write_json, write_text
from tuning.reproduce.claim import PUBLISHED, UNITS, ClaimStatement
from tuning.reproduce.kept import evaluation_of
from tuning.reproduce.measuring import ClaimFigures
from tuning.reproduce.verdict import MeasuredDifference, judge, overall

RESULT, FORMAT = "result.json", 1
REPORT = "report"  # the page, within the claim's folder
HEAD = "# Claims tried by `adaptnet reproduce`\n"
PREFACE = (
    "Each section is made by the command that it names, from the claim's result.json. Intervals are of 95 %, over "
    "seeds and images. A claim is confirmed if all of its statements are, refuted if one of them is.\n"
)
OF_FILE = ("title", "source", "claimed", "published")  # keys of the claim's file that the result repeats
COLUMNS = ("statement", "published", "a", "b", "a - b", "claimed", "n", "verdict")
Json = Mapping[str, JsonValue]


def write(measured: ClaimFigures, planned: int) -> Json:
    """Writes result.json from the finished runs, and returns its content. planned: seeds in all."""
    result = conclude(measured, planned)
    write_json(measured.folder / RESULT, result)
    return result


def read(folder: Path) -> Json:
    """The content of result.json. Raises ConfigError if there is none."""
    try:
        found = read_json(folder / RESULT)
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{folder}: no {RESULT} of a claim that could be read", key=RESULT, subject=folder)
    return found


def conclude(measured: ClaimFigures, planned: int) -> dict[str, JsonValue]:
    """The content of result.json: the same for the same runs, but for hours, commits and machine."""
    claim, config = measured.claim, measured.claim.config
    judged = [(each, measured.difference(each)) for each in config.statements]
    verdicts = [judge(found, more_than=each.more_than, less_than=each.less_than) for each, found in judged]
    statements = [_statement(*pair, verdict) for pair, verdict in zip(judged, verdicts, strict=True)]
    done = {arm: list(measured.seeds_of(arm)) for arm in claim.arms}
    origins = [measured.origin(arm, seed) for arm in claim.arms for seed in done[arm]]
    return {
        "format": FORMAT,
        "claim": claim.name,
        **{key: value for key, value in configs.as_mapping(config).items() if key in OF_FILE},
        "sha256": claim.sha256,
        "overrides": list(claim.learned),
        "seeds": {arm: _json(of_arm) for arm, of_arm in done.items()},
        "planned_seeds": max(planned, *map(len, done.values())),
        "verdict": overall(verdicts),
        "statements": _json(statements),
        "policies": _json([row for arm in claim.arms for row in _policies(measured, arm)]),
        "hours": round(sum(each.seconds for each in origins) / 3600, 3),
        "commits": _json(sorted({each.commit for each in origins} - {""})),
        "machines": _json(sorted({each.machine for each in origins})),
    }


def _statement(statement: ClaimStatement, found: MeasuredDifference | None, verdict: str) -> dict[str, JsonValue]:
    """One statement with what was found, in its unit."""
    return {
        "says": statement.says,
        "published": statement.published,
        "control": statement.control,
        "a": statement.a.what,
        "b": statement.b.what,
        "figure": statement.figure,
        "claimed": statement.rule,
        "found": None if found is None else _json(asdict(found)),
        "verdict": verdict,
    }


def _policies(measured: ClaimFigures, arm: str) -> list[dict[str, JsonValue]]:
    """Top-1 and MACs of each policy of an arm, over its seeds, from the evaluation after training."""
    reports = {
        seed: load_reports(evaluation_of(measured.place_of(arm, seed), FINAL)) for seed in measured.seeds_of(arm)
    }
    return [
        {"arm": arm, "policy": each.policy, "top1": _spread(each.top1), "macs": _spread(each.macs)}
        for each in seeds.spreads(reports)
    ]


def _spread(found: Spread) -> JsonValue:
    return _json(asdict(found))


def _json(value: object) -> JsonValue:
    plain: JsonValue = to_jsonable_python(value)
    return plain


# ---- tables


def rows(result: Json) -> list[list[str]]:
    """A row of cells for each statement, after the heading."""
    return [list(COLUMNS), *(_row(each) for each in _list(result, "statements"))]


def _row(statement: Json) -> list[str]:
    found, unit = section(statement, "found"), UNITS[str(statement["figure"])]
    control = "control: " if statement["control"] else ""
    first = [f"{control}{statement['says']}", str(statement["published"]) or "-"]
    last = [f"{statement['claimed']} {unit}", str(len(_list_of_texts(found, "seeds"))), str(statement["verdict"])]
    if not found:
        return [*first, "-", "-", "-", *last]
    return [*first, *(_side(statement, found, side) for side in ("a", "b")), _interval(found), *last]


def _side(statement: Json, found: Json, side: str) -> str:
    """E.g. "aig gates-hard 89.12 ± 0.20"."""
    figure = section(found, side)
    return f"{statement[side]} " + (
        _with_sd(figure) if statement[side] != PUBLISHED else f"{_number(figure['mean']):g}"
    )


def _with_sd(of_spread: Json, factor: float = 1.0) -> str:
    """A mean and its standard deviation over seeds, which one seed does not have."""
    sd = of_spread.get("sd")
    mean = f"{factor * _number(of_spread['mean']):.2f}"
    return mean if sd is None else f"{mean} ± {factor * _number(sd):.2f}"


def _interval(found: Json) -> str:
    """E.g. "+1.20 (+0.81 to +1.59)"."""
    text = f"{_number(found['difference']):+.2f}"
    if found["low"] is None:
        return f"{text} (no interval)"
    return f"{text} ({_number(found['low']):+.2f} to {_number(found['high']):+.2f})"


def table(result: Json) -> Table:
    """The statements as a table of the report's page."""
    caption = f"{result['claimed']} ({result['source']}). Verdict: {result['verdict']}. a and b with the standard "
    caption += "deviation over seeds; a - b with its 95 % interval over seeds and images."
    return Table("claim-statements", str(result["title"]), caption, COLUMNS, rows(result)[1:])


def markdown(result: Json) -> str:
    """The section of a claim in a file of results."""
    lines = [f"## {result['claim']}: {result['title']}", "", f"Claimed: {result['claimed']} ({result['source']})"]
    lines += [f"Published: {result['published']}"] * bool(result["published"])
    lines += ["", _headline(result), "", *_markdown_table(rows(result))]
    policies = _list(result, "policies")
    if policies:
        cells = [[str(each["arm"]), str(each["policy"]), *_figures(each)] for each in policies]
        lines += ["", *_markdown_table([["arm", "policy", "top-1 %", "MMACs", "n"], *cells])]
    return "\n".join([*lines, "", origin(result)]) + "\n"


def _figures(policy: Json) -> list[str]:
    top1, macs = section(policy, "top1"), section(policy, "macs")
    return [_with_sd(top1, 100), _with_sd(macs, 1e-6), str(top1["n"])]


def _headline(result: Json) -> str:
    """The verdict, and how far the claim has come."""
    counts = {len(each) for each in section(result, "seeds").values() if isinstance(each, list)}
    planned = _number(result["planned_seeds"])
    complete = counts == {planned}
    seeds_done = f"{min(counts)} of {planned:g} seeds" if not complete else f"{planned:g} seeds"
    partial = "" if complete else " so far"
    return f"**{str(result['verdict']).capitalize()}**{partial}, {seeds_done} of each arm."


def origin(result: Json) -> str:
    """Hours, machine, commit, file and command."""
    overrides = "".join(f" {shlex.quote(text)}" for text in _list_of_texts(result, "overrides"))
    machines, commits = (", ".join(_list_of_texts(result, key)) or "unknown" for key in ("machines", "commits"))
    return (
        f"{_number(result['hours']):.2f} hours on {machines}; commit {commits}; claim's file SHA-256 "
        f"{str(result['sha256'])[:16]}; `adaptnet reproduce {result['claim']}{overrides} --seeds "
        f"{result['planned_seeds']}`"
    )


def _markdown_table(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    for number, row in enumerate(cells):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
        if number == 0:
            yield "|" + "---|" * len(row)


def page(measured: ClaimFigures, result: Json) -> Path | None:
    """Writes the report's page about one seed of each arm, the statements first; None without a finished run.

    A kept run whose own folder is gone is in the statements alone. Raises what `pipeline.report.report` raises.
    """
    runs = []
    for arm in measured.claim.arms:
        here = [measured.run_of(arm, seed) for seed in measured.seeds_of(arm) if measured.is_here(arm, seed)]
        runs += [str(run) for run in here[:1]]
    return report(runs, measured.folder / REPORT, track=False, first=[table(result)]).page if runs else None


def update(path: Path, result: Json) -> None:
    """Writes the claim's section into a file of results; the other sections stay. Sections are sorted by claim.

    Raises ConfigError if the file cannot be read or written.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.startswith(HEAD):
            raise ConfigError(
                f"--results (={path}): holds other text, which would be lost; name another file",
                key="--results",
                subject=path,
            )
        sections = {match[1]: match[0] for match in re.finditer(r"^## ([^:\n]+):.*?(?=^## |\Z)", text, re.M | re.S)}
        sections[str(result["claim"])] = markdown(result)
        parts = [HEAD, PREFACE, *(sections[name].rstrip("\n") + "\n" for name in sorted(sections))]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(parts))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--results (={path}): cannot be written ({error}); name another file", key="--results", subject=path
        ) from None


def _list(mapping: Json, key: str) -> list[Json]:
    """A list of mappings."""
    found = mapping.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _list_of_texts(mapping: Json, key: str) -> list[str]:
    found = mapping.get(key)
    return [str(each) for each in found] if isinstance(found, list) else []


def _number(value: JsonValue) -> float:
    assert isinstance(value, int | float)
    return float(value)
