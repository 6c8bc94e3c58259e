"""Evaluations of trained nets: made on any images, stored, and read again for comparisons, reports and choices.

An evaluation is a folder with reports.json, arrays by image in `<policy>.npz`, and about.json (`records.About`). Those
of a run are in RUN/evaluations, in `final` the one after training; those of a registry version are in
runs/evaluations/NAME-VERSION.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline import config as configs
from pipeline import family as families
from pipeline import run_config, zoo
from pipeline.data.config import DataConfig
from pipeline.data.index import ImageIndex, Splits, open_splits
from pipeline.data.store import Progress
from pipeline.errors import CheckpointError, ConfigError, DataError, JsonValue
from pipeline.evaluation import from_weights, reports_v1
from pipeline.evaluation.evaluate import load_reports
from pipeline.evaluation.from_weights import FINAL
from pipeline.evaluation.robustness import Attack, ResolutionSweep
from pipeline.execution.launch import absolute, check_device
from pipeline.family import Curves, Evaluated, Report
from pipeline.registry import catalogue
from pipeline.registry.catalogue import RUNS
from pipeline.registry.model import CARD, Trained, describe
from pipeline.registry.resolve import resolve, run_folder
from pipeline.run_config import RunConfig
from pipeline.runs import files, journal, records
from pipeline.runs.files import DamagedFile, read_json, remark
from pipeline.runs.records import ABOUT, About
from pipeline.training import checkpoint

EVALUATIONS = "evaluations"
NAMED = ("models:", zoo.SCHEME)  # how a source begins that is not a path
Array: TypeAlias = NDArray[np.generic]
HARMLESS = (  # keys that change where an evaluation runs, not its result
    *("data.root", "data.index", "data.decode", "data.io_threads", "data.read_ahead", "compute."),
    *("evaluation.latency", "evaluation.batch_size"),
)


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`, and where it is stored.

    what: the source as the user named it. clean: of an attack, the stored reports of the same net on the same images
    without it.
    """

    what: str
    root: Path
    step: int
    classes: tuple[str, ...]
    reports: Sequence[Report]
    folder: Path
    family: str
    clean: Sequence[Report] = ()


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
    progress: Progress | None = None,
) -> Evaluation:
    """Runs the trained net `source` on the val split with its policies, in this process, and stores the reports.

    source is the folder of a run or of a checkpoint, `models:/NAME@ALIAS` or `zoo:NAME`; overrides change its recipe,
    e.g. data.root: of another set without a val split all images are used. With an attack the images are perturbed
    first, with a sweep each policy runs at each of its sides; both are stored separately. `progress` gets the account
    of the images. Raises ConfigError if the images have other classes than the net, an override has no effect here, or
    the folder `out` holds an evaluation of another kind.
    """
    for override in overrides:
        _check_used(override)
    model = describe(resolve(source, uri))
    config = _config(model, source, overrides, data_home)
    check_device(config.compute)
    splits = open_splits(config.data, config.seed, progress, trained_on=_trained_on(model, config, overrides))
    _check_images(config.data.root, splits, model)
    if policies is None and any(override.startswith("evaluation.policies") for override in overrides):
        policies = config.evaluation.policies
    about = About(
        source=source,
        step=model.step,
        sha256=files.sha256(model.weights),
        data=splits.val.identity,
        root=str(config.data.root),
        policies=tuple(policies) if policies else None,
        attack=attack.name if attack else None,
        sides=sweep.name if sweep else None,
        overrides=tuple(each for each in overrides if not each.startswith((*HARMLESS, "evaluation.policies"))),
    )
    home = out or _home(_settled(source, uri), _name(about, config.data.root.name), model.step)
    _check_kind(home, about, ("attack", "sides", "overrides", *(("step", "sha256", "data", "policies") if out else ())))
    chosen, last_top1 = _choice(model, config, source)
    reports = from_weights.evaluate_checkpoint(
        config,
        model.weights,
        splits,
        policies,
        home,
        model.stored_reports,
        attack=attack,
        sweep=sweep,
        chosen=chosen,
        last_top1=None if attack or sweep else last_top1,
    )
    records.write_about(home, about)
    clean = _clean(source, uri, splits.val.identity) if attack and not sweep else ()
    return Evaluation(source, config.data.root, model.step, model.classes, reports, home, config.family.name, clean)


def _choice(model: Trained, config: RunConfig, source: str) -> tuple[str, dict[str, float]]:
    """On which images the checkpoint was chosen, and the last one's top-1 by policy, as far as that is known.

    ("", {}) for images of another root.
    """
    if config.data.root.name != Path(str(model.section("data").get("root"))).name:
        return "", {}
    final = [report.to_json() for report in load_reports(Path(source) / "evaluations" / FINAL)]
    stored = [*final, *model.stored_reports]
    last = {str(each["policy"]): top1 for each in stored if isinstance(top1 := each.get("last_top1"), float)}
    return next((str(each["chosen_on"]) for each in stored if each.get("chosen_on")), ""), last


def _config(model: Trained, source: str, overrides: Sequence[str], data_home: str | None) -> RunConfig:
    """The recipe of the net with the overrides, paths made absolute."""
    return absolute(run_config.from_stored(model.recipe, f"recipe of {source}", overrides, data_home=data_home))


def _trained_on(model: Trained, config: RunConfig, overrides: Sequence[str]) -> str | None:
    """Identity of the net's training images if `overrides` name another root than its own, else None."""
    own = str(model.section("data").get("root"))
    named = any(override.startswith("data.root=") for override in overrides)
    return model.trained_on if named and config.data.root != Path(own).absolute() else None


def _check_images(root: Path, splits: Splits, model: Trained) -> None:
    if splits.val.classes != model.classes:
        raise ConfigError(
            f"data.root (={root}): its {len(splits.val.classes)} classes ({', '.join(splits.val.classes[:5])} ...) are "
            f"not the net's {len(model.classes)} ({', '.join(model.classes[:5])} ...)",
            key="data.root",
            subject=root,
        )
    if len(splits.val) == 0:
        raise DataError(f"data.root (={root}): it has no val split to evaluate on", key="data.root", subject=root)


def _name(about: About, data: str) -> str:
    """The folder of an evaluation; a part of the policies, or another kind, never replaces the whole."""
    part = f"-{'+'.join(about.policies)}" if about.policies else ""
    kinds = "".join(f"-{kind}" for kind in (about.attack, about.sides) if kind is not None)
    changed = f"-{configs.fingerprint({'overrides': list(about.overrides)})[:8]}" if about.overrides else ""
    return f"{data}-{about.data}{part}{kinds}{changed}"


def _check_kind(home: Path, mine: About, keys: Sequence[str]) -> None:
    """Raises ConfigError if the folder holds the result of another kind of evaluation, or of another net."""
    if not load_reports(home):
        return
    about = records.read_about(home)
    about = replace(about, sha256=about.sha256 or mine.sha256)  # the evaluation after training has no sha256
    other = [key for key in keys if (getattr(about, key) or None) != (getattr(mine, key) or None)]
    if other:
        held = ", ".join(f"{key} {getattr(about, key) or 'none'}" for key in other)
        raise ConfigError(
            f"{home}: holds an evaluation of another kind ({held}); name another folder with --out",
            key="--out",
            subject=home,
        )


def _settled(source: str, uri: str | None) -> str:
    """The source with its version instead of an alias, which may move."""
    return catalogue.lookup(source, catalogue.address(uri)).reference if source.startswith("models:") else source


def _clean(source: str, uri: str | None, data: str) -> Sequence[Report]:
    """The stored reports on these images without an attack; empty if none are stored."""
    try:
        stored = find(source, uri).on(data)
    except ConfigError:
        return ()
    return stored.reports if stored else ()


def _check_used(override: str) -> None:
    key = override.partition("=")[0]
    used = ("family.", "data.", "evaluation.", "compute.", "training.precision", "training.channels_last", "seed")
    if not key.startswith(used):
        raise ConfigError(
            f"override {override!r}: an evaluation does not use {key}; it uses {', '.join(used)}",
            key=key,
            subject=override,
        )


def _home(source: str, name: str, step: int) -> Path:
    """Where an evaluation is stored: in the folder of the run or model, with a name of its own for a checkpoint of a
    run; for a version, beside the runs."""
    if any((Path(source) / file).is_file() for file in ("config.yaml", CARD)):
        return Path(source) / EVALUATIONS / name
    runs = [parent for parent in Path(source).absolute().parents if (parent / "config.yaml").is_file()]
    if Path(source).exists() and runs:
        return runs[0] / EVALUATIONS / f"{checkpoint.name_of(step)}-{name}"
    return _of_version(source) / name


def _of_version(source: str) -> Path:
    """Where the evaluations of a registry version or of a net of the zoo are."""
    return RUNS / EVALUATIONS / source.replace("models:/", "").replace(zoo.SCHEME, "zoo-").replace("/", "-")


# ---- stored evaluations


@dataclass(frozen=True)
class Stored:
    """An evaluation on disk: its reports, its folder (None for the reports of a version's card), and its about.json."""

    reports: Sequence[Report]
    folder: Path | None
    about: About

    @property
    def data(self) -> str:
        """Identity of the images."""
        return str(self.about.data)

    @property
    def attack(self) -> str | None:
        """Name of the attack on the images; None without one."""
        return self.about.attack

    @property
    def swept(self) -> bool:
        """Whether its policies ran at several resolutions."""
        return self.about.sides is not None

    @property
    def plain(self) -> bool:
        """Whether the images were unchanged and the recipe the net's own."""
        return self.attack is None and not self.swept and not self.about.overrides

    def details(self, policy: str) -> Mapping[str, Array] | None:
        """The arrays by image of a policy (see `family.Evaluated`); None if they are not stored."""
        path = self.folder / f"{policy}.npz" if self.folder else None
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, LookupError, zlib.error, zipfile.BadZipFile):
            remark(path, "what was stored for each image is left out; evaluate again to have it")
            return None


@dataclass(frozen=True)
class EvaluatedNet:
    """A trained net that a user named, with its stored evaluations: complete ones first, then by age, the newest first.

    run_dir: where it was trained, if that is on this machine.
    """

    source: str
    model: Trained
    run_dir: Path | None
    evaluations: Sequence[Stored]

    @cached_property
    def config(self) -> families.FamilyConfig:
        """The validated section `family` of its recipe."""
        section = self.model.section("family")
        model: type[families.FamilyConfig] = families.find(str(section["name"])).config
        return configs.validate_stored(model, section, f"{self.source}: recipe.family")

    @cached_property
    def parameters(self) -> int:
        """Number of trainable values."""
        net = families.find(self.config.name).build(self.config, len(self.model.classes))
        return sum(parameter.numel() for parameter in net.parameters())

    @cached_property
    def sha256(self) -> str:
        """Checksum of the weights file."""
        return files.sha256(self.model.weights)

    @property
    def newest(self) -> Stored:
        """The newest evaluation of unchanged images, a complete one if there is any."""
        return next(each for each in self.evaluations if each.plain)

    def on(self, data: str) -> Stored | None:
        """The evaluation on these images, unchanged; None if there is none."""
        return next((each for each in self.evaluations if each.data == data and each.plain), None)

    @property
    def sets(self) -> list[str]:
        """Identities of the images that it was evaluated on unchanged, in the order of the evaluations."""
        return list(dict.fromkeys(each.data for each in self.evaluations if each.plain))


def find(source: str, uri: str | None = None, *, nets: Path | None = None) -> EvaluatedNet:
    """The trained net that `source` names (a folder, a version, a net of the zoo) and its stored evaluations.

    nets: the zoo's folder; default: the shipped one. Raises ConfigError if none is stored.
    """
    net = look_up(source, uri, nets=nets)
    if not net.sets:
        raise no_evaluation(source)
    return net


def no_evaluation(source: str) -> ConfigError:
    """The error for a net of which no evaluation is stored."""
    return ConfigError(
        f"{source}: no evaluation of it is stored; make one with `adaptnet evaluate {source}`",
        key="source",
        subject=source,
    )


def look_up(source: str, uri: str | None = None, *, nets: Path | None = None) -> EvaluatedNet:
    """Like `find`, of a net without a stored evaluation too."""
    folder = resolve(source, uri, nets=nets)
    model = describe(folder)
    run_dir = _run_of(source, uri)
    homes = [run_dir / EVALUATIONS] if run_dir else []
    homes += [_of_version(_settled(source, uri))] if source.startswith(NAMED) else []
    homes += [Path(source) / EVALUATIONS] if (Path(source) / CARD).is_file() else []
    accepted = (None, files.sha256(model.weights))  # the evaluation after training has no checksum
    of_step = [each for home in homes for each in _read_all(home) if each.about.step == model.step]
    evaluations = [each for each in of_step if each.about.sha256 in accepted]
    evaluations.sort(key=lambda stored: (bool(stored.about.policies), -_written(stored)))
    if inside := [reports_v1.read(report) for report in _reports_inside(folder)]:
        evaluations.append(Stored(inside, None, About(data=model.evaluated_on or "unknown", step=model.step)))
    return EvaluatedNet(source, model, run_dir, evaluations)


def _run_of(source: str, uri: str | None) -> Path | None:
    """The folder of the run that trained a net, if it is on this machine."""
    if source.startswith(zoo.SCHEME):
        return None
    if source.startswith("models:"):
        return run_folder(catalogue.lookup(source, catalogue.address(uri)), catalogue.address(uri))
    folder = Path(source).absolute()
    return next((place for place in (folder, *folder.parents) if (place / "config.yaml").is_file()), None)


def _read_all(home: Path) -> Iterator[Stored]:
    for path in sorted(home.glob(f"*/{ABOUT}")):
        try:
            reports, about = load_reports(path.parent), records.read_about(path.parent)
        except CheckpointError as error:
            warnings.warn(f"{error}; this evaluation is left out", DamagedFile, stacklevel=2)
            continue
        if reports:
            yield Stored(reports, path.parent, about)


def _written(stored: Stored) -> float:
    return (stored.folder / ABOUT).stat().st_mtime if stored.folder else 0.0


def _reports_inside(folder: Path) -> list[dict[str, JsonValue]]:
    """The reports in a model folder; empty for a checkpoint."""
    path = folder / "reports" / "reports.json"
    try:
        content = read_json(path) if path.is_file() else []
    except (OSError, ValueError):
        content = None
    if not isinstance(content, list):
        remark(path, "the reports in the model's folder are left out")
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def together(nets: Sequence[EvaluatedNet]) -> list[Evaluated]:
    """The nets' evaluations on the same images: the newest of the first net on which all were evaluated.

    Raises ConfigError if there are no such images, or the classes differ.
    """
    first = nets[0]
    for net in nets[1:]:
        if net.model.classes != first.model.classes:
            raise ConfigError(
                f"{net.source} has {len(net.model.classes)} classes ({', '.join(net.model.classes[:3])} ...), "
                f"{first.source} has {len(first.model.classes)} ({', '.join(first.model.classes[:3])} ...): they "
                "cannot be compared; give nets of the same classes",
                key="source",
                subject=net.source,
            )
    shared = [data for data in first.sets if all(data in net.sets for net in nets)]
    if not shared:
        sets = "; ".join(f"{net.source} on {', '.join(net.sets)}" for net in nets)
        raise ConfigError(
            f"there are no images on which all of these nets were evaluated: {sets}. Evaluate them on the same images, "
            f"e.g. `adaptnet evaluate {nets[-1].source} data.root=FOLDER`",
            key="data.root",
            subject=nets[-1].source,
        )
    names = _unique([net.source for net in nets])
    return [_evaluated(net, name, shared[0]) for net, name in zip(nets, names, strict=True)]


def images(nets: Sequence[EvaluatedNet], data: str) -> ImageIndex | None:
    """The split with the identity `data`, from the data set of any of these evaluations; None if it is not here."""
    for net in nets:
        stored = net.on(data)
        root = stored.about.root if stored else None
        if root is None or not Path(root).is_dir():
            continue
        section = {**net.model.section("data"), "root": root, "max_bad_share": 1.0}
        config = configs.validate_stored(DataConfig, section, f"{net.source}: recipe.data")
        with suppress(DataError, OSError):
            split = open_splits(config, int(str(net.model.recipe.get("seed", 0)))).val
            for part in (split, split.whole):  # of another set than the net's own all images were evaluated
                if part.identity == data:
                    return part
    return None


def _evaluated(net: EvaluatedNet, name: str, data: str) -> Evaluated:
    stored = net.on(data)
    assert stored is not None
    section = configs.validate_stored(DataConfig, net.model.section("data"), f"{net.source}: recipe.data")
    mine = [each for each in net.evaluations if each.data == data and not each.about.overrides]
    others = mine[::-1]  # later ones win below: complete over partial, new over old
    attacks = {each.attack: each.reports for each in others if each.attack and not each.swept}
    swept = {each.about.sides: each.reports for each in others if each.about.sides and not each.attack}
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
    """Short names: the last part of a path, or NAME/VERSION; the whole source if two are equal."""
    short = [source.removeprefix("models:/").rstrip("/") for source in sources]
    short = [
        name if source.startswith(NAMED) else Path(source).resolve().name
        for name, source in zip(short, sources, strict=True)
    ]
    return [source if short.count(name) > 1 else name for name, source in zip(short, sources, strict=True)]
