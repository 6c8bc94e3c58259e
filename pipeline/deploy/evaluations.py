"""Evaluations of trained nets: made on any images, stored, and found again for whoever compares, draws or chooses.

An evaluation is a folder: reports.json, per-image arrays `<policy>.npz`, and about.json with source, step, data (the
split's identity), root, policies (null: all), attack (null: none), sides (null: the images' own). A run keeps its own
in RUN/evaluations, `final` the one after training; those of a registry version lie in runs/evaluations/NAME-VERSION.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config as configs
from pipeline import family as families
from pipeline import run_config
from pipeline.data.config import DataConfig
from pipeline.data.index import ImageIndex, open_splits
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import from_weights, reports_v1
from pipeline.evaluation.evaluate import load_reports
from pipeline.evaluation.robustness import Attack, ResolutionSweep
from pipeline.execution.launch import absolute, check_device
from pipeline.family import Curves, Evaluated, Report
from pipeline.registry import catalogue
from pipeline.registry.catalogue import RUNS
from pipeline.registry.model import CARD, Trained, describe
from pipeline.registry.resolve import resolve, run_folder
from pipeline.runs import journal, records
from pipeline.runs.records import ABOUT, About
from pipeline.training import checkpoint

EVALUATIONS = "evaluations"
HARMLESS = (  # keys that change where an evaluation runs, not what it finds
    *("data.root", "data.index", "data.decode", "data.io_threads", "data.read_ahead", "compute."),
    *("evaluation.latency", "evaluation.batch_size"),
)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found, and where it is stored."""

    what: str
    root: Path
    step: int
    classes: tuple[str, ...]
    reports: Sequence[Report]
    folder: Path
    clean: Sequence[Report] = ()  # of an attacked one: what is stored of the same net on the same images untouched


def evaluate(
    source: str,
    overrides: Sequence[str] = (),
    *,
    data_home: str | None = None,
    policies: Sequence[str] | None = None,
    out: Path | None = None,
    uri: str | None = None,
    attack: Attack | None = None,
    sweep: ResolutionSweep | None = None,
) -> Evaluation:
    """Runs the trained net `source` on the val split under its policies, in this process, and stores the reports.

    source is a run's folder, a checkpoint's, or `models:/NAME@ALIAS`; overrides change its recipe, e.g. data.root.
    With an attack the images are tampered with first, with a sweep each policy runs at each of its sides; both are
    stored apart. Raises ConfigError where the images' classes are not the net's, an override changes nothing here, or
    the folder `out` holds an evaluation of another kind.
    """
    for override in overrides:
        _check_evaluates(override)
    folder = resolve(source, uri)
    model = describe(folder)
    nested = reduce(configs.merge, map(configs.parse_override, overrides), dict(model.recipe))
    config = run_config.from_mapping(configs.interpolate(nested, {"data_home": data_home}), f"recipe of {source}")
    config = absolute(config)
    check_device(config.compute)
    splits = open_splits(config.data, config.seed)
    if splits.val.classes != model.classes:
        raise ConfigError(
            f"data.root (={config.data.root}): its {len(splits.val.classes)} classes "
            f"({', '.join(splits.val.classes[:5])} ...) are not the net's {len(model.classes)} "
            f"({', '.join(model.classes[:5])} ...)"
        )
    if len(splits.val) == 0:
        raise DataError(f"data.root (={config.data.root}): it has no val split to evaluate on")
    if policies is None and any(override.startswith("evaluation.policies") for override in overrides):
        policies = config.evaluation.policies
    changed = [each for each in overrides if not each.startswith((*HARMLESS, "evaluation.policies"))]
    part = f"-{'+'.join(policies)}" if policies else ""  # a part never replaces the whole
    kinds = "".join(f"-{kind.name}" for kind in (attack, sweep) if kind is not None)
    kinds += f"-{configs.fingerprint({'overrides': changed})[:8]}" if changed else ""
    about = About(
        source=source,
        step=model.step,
        sha256=checkpoint.sha256(model.weights),
        data=splits.val.identity,
        root=str(config.data.root),
        policies=tuple(policies) if policies else None,
        attack=attack.name if attack else None,
        sides=sweep.name if sweep else None,
        overrides=tuple(changed),
    )
    name = f"{config.data.root.name}-{splits.val.identity}{part}{kinds}"
    home = out or _home(_settled(source, uri), name, model.step)
    _check_kind(home, about, ("attack", "sides", "overrides", *(("step", "sha256", "data", "policies") if out else ())))
    known = model.card.get("reports", ())
    reports = from_weights.evaluate_checkpoint(
        config, model.weights, splits, policies, home, known, attack=attack, sweep=sweep
    )
    records.write_about(home, about)
    clean = _clean(source, uri, splits.val.identity) if attack and not sweep else ()
    return Evaluation(source, config.data.root, model.step, model.classes, reports, home, clean)


def _check_kind(home: Path, mine: About, keys: Sequence[str]) -> None:
    """What was found otherwise, or of another net, is never replaced."""
    if not load_reports(home):
        return
    about = records.read_about(home)
    about = replace(about, sha256=about.sha256 or mine.sha256)  # the evaluation after training has no sha256
    other = [key for key in keys if (getattr(about, key) or None) != (getattr(mine, key) or None)]
    if other:
        held = ", ".join(f"{key} {getattr(about, key) or 'none'}" for key in other)
        raise ConfigError(f"{home}: holds an evaluation of another kind ({held}); name another folder with --out")


def _settled(source: str, uri: str | None) -> str:
    """The source with its version instead of an alias, which may move."""
    return catalogue.lookup(source, catalogue.address(uri)).reference if source.startswith("models:") else source


def _clean(source: str, uri: str | None, data: str) -> Sequence[Report]:
    """The stored reports on these images untouched; none where there are none."""
    try:
        stored = find(source, uri).on(data)
    except ConfigError:
        return ()
    return stored.reports if stored else ()


def _check_evaluates(override: str) -> None:
    key = override.partition("=")[0]
    used = ("family.", "data.", "evaluation.", "compute.", "training.precision", "training.channels_last", "seed")
    if not key.startswith(used):
        raise ConfigError(f"override {override!r}: an evaluation does not use {key}; it uses {', '.join(used)}")


def _home(source: str, name: str, step: int) -> Path:
    """Where an evaluation is stored: in the run's or model's folder, a checkpoint's apart from the run's own; else
    beside runs."""
    if any((Path(source) / file).is_file() for file in ("config.yaml", CARD)):
        return Path(source) / EVALUATIONS / name
    runs = [parent for parent in Path(source).absolute().parents if (parent / "config.yaml").is_file()]
    if Path(source).exists() and runs:
        return runs[0] / EVALUATIONS / f"{checkpoint.name_of(step)}-{name}"
    return _outside(source) / name


def _outside(source: str) -> Path:
    """Where evaluations of a registry version lie."""
    return RUNS / EVALUATIONS / source.replace("models:/", "").replace("/", "-")


# ---- found again


@dataclass(frozen=True)
class Stored:
    """An evaluation on disk: its reports, its folder if there is one, and what about.json says of it."""

    reports: Sequence[Report]
    folder: Path | None
    about: About

    @property
    def data(self) -> str:
        return str(self.about.data)

    @property
    def attack(self) -> str | None:
        return self.about.attack

    @property
    def swept(self) -> bool:
        """Whether its policies ran at sides other than the images' own."""
        return self.about.sides is not None

    @property
    def plain(self) -> bool:
        """Whether it is of the images as they are, by the net's own recipe."""
        return self.attack is None and not self.swept and not self.about.overrides

    def details(self, policy: str) -> Mapping[str, NDArray[Any]] | None:
        path = self.folder / f"{policy}.npz" if self.folder else None
        if path is None or not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)


@dataclass(frozen=True)
class EvaluatedNet:
    """A trained net that a user named, with all its stored evaluations, newest first, whole ones before parts."""

    source: str
    model: Trained
    run_dir: Path | None  # where it was trained, if that is at hand
    evaluations: Sequence[Stored]

    @cached_property
    def config(self) -> families.FamilyConfig:
        section = self.model.recipe["family"]
        return configs.validate(families.find(section["name"]).config, section, f"{self.source}: recipe.family")

    @cached_property
    def parameters(self) -> int:
        """How many numbers training may change."""
        net = families.find(self.config.name).build(self.config, len(self.model.classes))
        return sum(parameter.numel() for parameter in net.parameters())

    @cached_property
    def sha256(self) -> str:
        """Of the weights' file."""
        return checkpoint.sha256(self.model.weights)

    @property
    def newest(self) -> Stored:
        """The newest evaluation of images as they are, whole if there is a whole one."""
        return next(found for found in self.evaluations if found.plain)

    def on(self, data: str) -> Stored | None:
        """The evaluation on these images as they are."""
        return next((found for found in self.evaluations if found.data == data and found.plain), None)

    @property
    def sets(self) -> list[str]:
        """The images it was evaluated on as they are: identities, that of the first evaluation first."""
        return list(dict.fromkeys(found.data for found in self.evaluations if found.plain))


def find(source: str, uri: str | None = None) -> EvaluatedNet:
    """The trained net that `source` names (a run's folder, a checkpoint's, a version) and its stored evaluations.

    Raises ConfigError where none is stored.
    """
    folder = resolve(source, uri)
    model = describe(folder)
    run_dir = _run_of(source, uri)
    homes = [run_dir / EVALUATIONS] if run_dir else []
    homes += [_outside(_settled(source, uri))] if source.startswith("models:") else []
    homes += [Path(source) / EVALUATIONS] if (Path(source) / CARD).is_file() else []
    mine = (None, checkpoint.sha256(model.weights))  # that after training says nothing of its weights
    stored = [each for home in homes for each in _read_all(home) if each.about.step == model.step]
    found = [each for each in stored if each.about.sha256 in mine]
    found.sort(key=lambda stored: (bool(stored.about.policies), -_written(stored)))
    card = [reports_v1.read(report) for report in _reports_inside(folder)]
    if card:
        found.append(Stored(card, None, About(data=model.card.get("evaluated_on") or "unknown", step=model.step)))
    net = EvaluatedNet(source, model, run_dir, found)
    if not net.sets:
        raise ConfigError(f"{source}: no evaluation of it is stored; make one with `adaptnet evaluate {source}`")
    return net


def _run_of(source: str, uri: str | None) -> Path | None:
    """The run's folder behind a net, if it is on this machine."""
    if source.startswith("models:"):
        return run_folder(catalogue.lookup(source, catalogue.address(uri)), catalogue.address(uri))
    folder = Path(source).absolute()
    return next((place for place in (folder, *folder.parents) if (place / "config.yaml").is_file()), None)


def _read_all(home: Path) -> Iterator[Stored]:
    for path in sorted(home.glob(f"*/{ABOUT}")):
        reports = load_reports(path.parent)
        if reports:
            yield Stored(reports, path.parent, records.read_about(path.parent))


def _written(stored: Stored) -> float:
    return (stored.folder / ABOUT).stat().st_mtime if stored.folder else 0.0


def _reports_inside(folder: Path) -> list[dict[str, Any]]:
    path = folder / "reports" / "reports.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def together(nets: Sequence[EvaluatedNet]) -> list[Evaluated]:
    """The nets' evaluations on images that all of them were evaluated on: the first net's newest such.

    Raises ConfigError where there are no such images, or the classes differ.
    """
    first = nets[0]
    for net in nets[1:]:
        if net.model.classes != first.model.classes:
            raise ConfigError(
                f"{net.source} knows {len(net.model.classes)} classes ({', '.join(net.model.classes[:3])} ...), "
                f"{first.source} {len(first.model.classes)} ({', '.join(first.model.classes[:3])} ...): they answer "
                "different questions; give nets of the same classes"
            )
    shared = [data for data in first.sets if all(data in net.sets for net in nets)]
    if not shared:
        sets = "; ".join(f"{net.source} on {', '.join(net.sets)}" for net in nets)
        raise ConfigError(
            f"no images that all of these nets were evaluated on: {sets}. Evaluate them on the same ones, e.g. "
            f"`adaptnet evaluate {nets[-1].source} data.root=FOLDER`"
        )
    names = _unique([net.source for net in nets])
    return [_evaluated(net, name, shared[0]) for net, name in zip(nets, names, strict=True)]


def images(nets: Sequence[EvaluatedNet], data: str) -> ImageIndex | None:
    """The split whose identity is `data`, from where any of these nets was evaluated on it; None if it is not here."""
    for net in nets:
        stored = net.on(data)
        root = stored.about.root if stored else None
        if root is None or not Path(root).is_dir():
            continue
        section = configs.validate(DataConfig, {**net.model.recipe["data"], "root": root}, f"{net.source}: recipe.data")
        with suppress(DataError, OSError):
            found = open_splits(section, int(net.model.recipe.get("seed", 0))).val
            if found.identity == data:
                return found
    return None


def _evaluated(net: EvaluatedNet, name: str, data: str) -> Evaluated:
    stored = net.on(data)
    assert stored is not None
    section = configs.validate(DataConfig, net.model.recipe["data"], f"{net.source}: recipe.data")
    mine = [found for found in net.evaluations if found.data == data and not found.about.overrides]
    others = mine[::-1]  # whole ones over parts
    attacks = {found.attack: found.reports for found in others if found.attack and not found.swept}
    swept = {found.about.sides: found.reports for found in others if found.about.sides and not found.attack}
    return Evaluated(
        name=name,
        family=net.config.name,
        config=net.config,
        recipe=net.model.recipe,
        classes=net.model.classes,
        data=data,
        side_px=section.side_for_eval,
        step=net.model.step,
        parameters=net.parameters,
        reports=stored.reports,
        details=stored.details,
        curves=_curves(net.run_dir),
        attacked=attacks,
        swept=swept,
    )


def _curves(run_dir: Path | None) -> Callable[[], Curves]:
    return (lambda: journal.curves(run_dir / "journal")) if run_dir else dict


def _unique(sources: Sequence[str]) -> list[str]:
    """Short names: the last part of a path or the version's, the whole source where these clash."""
    short = [source.removeprefix("models:/").rstrip("/") for source in sources]
    short = [
        name if source.startswith("models:") else Path(source).resolve().name
        for name, source in zip(short, sources, strict=True)
    ]
    return [source if short.count(name) > 1 else name for name, source in zip(short, sources, strict=True)]
