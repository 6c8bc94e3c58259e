"""What a verdict needs of a finished run, in a small folder that outlives the run's own: a claim may take many days.

FOLDER/ARM-s1 of `--keep FOLDER` has kept.json (`KeptRun`), written last, and the claim's evaluations of the run: each
with its reports and, of the policies that a statement names, the arrays by image that it needs. It holds no weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import JsonValue, TypeAdapter
from pydantic_core import to_jsonable_python

from pipeline import config as configs
from pipeline import run_config
from pipeline.deploy.evaluations import EVALUATIONS, Array, Stored
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.evaluate import load_reports
from pipeline.evaluation.from_weights import FINAL
from pipeline.figures import Arrays
from pipeline.run_config import RunConfig
from pipeline.runs import files, journal, provenance, records, seed_runs
from pipeline.runs.records import Record
from pipeline.training import checkpoint
from tuning.reproduce.claim import ClaimConfig, LoadedClaim, Quantity

KEPT = "kept.json"
OF_CLAIM = "claim-"  # begins the folders of a claim's evaluations
OF_EVALUATION = ("data.eval_side_px", "data.eval_resize_px", "evaluation.policies")  # keys that change only figures


def evaluation_of(run: Path, name: str) -> Path:
    """The folder of an evaluation of a run, by its name in the claim."""
    return run / EVALUATIONS / (name if name == FINAL else f"{OF_CLAIM}{name}")


@dataclass(frozen=True)
class Origin:
    """Where a run's figures are from: seconds of computing, the commit and the machine."""

    seconds: float
    commit: str
    machine: str

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """Of the run in this folder, finished or not."""
        return cls(_seconds(run), _commit(run), _machine(run))


@dataclass(frozen=True)
class KeptRun(Record):
    """kept.json: the run, the rules, the recipe and the images that it was made with, and its files' SHA-256.

    overrides: those of the user that change what is learned or measured. images: identity of the evaluated ones.
    recipe: as of `recipe_of`. sums: {file beside it: SHA-256}. checksum: of all other fields.
    """

    FILE: ClassVar[str] = KEPT
    claim: str
    sha256: str
    overrides: tuple[str, ...]
    images: str
    arm: str
    seed: int
    seconds: float
    commit: str
    machine: str
    recipe: Mapping[str, JsonValue]
    sums: Mapping[str, str]
    checksum: str = ""

    @classmethod
    def _from_fields(cls, content: Mapping[str, JsonValue]) -> Self:
        found = TypeAdapter(cls).validate_python({each.name: content[each.name] for each in fields(cls)})
        if found.checksum != found.sealed().checksum:
            raise ValueError("its checksum is another one")
        return found

    def sealed(self) -> Self:
        """The record with its checksum."""
        plain = to_jsonable_python(asdict(replace(self, checksum="")))
        return replace(self, checksum=hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest())

    @property
    def origin(self) -> Origin:
        """Where its figures are from."""
        return Origin(self.seconds, self.commit, self.machine)


def recipe_of(config: RunConfig, seed: int) -> dict[str, JsonValue]:
    """What determines the figures of an arm's run, by dotted key: its fingerprint but for the images, and how it is
    evaluated."""
    config = run_config.with_teacher(config.model_copy(update={"seed": seed}), run_config.TEACHER_BY_RUNS)
    flat = configs.flat(configs.as_mapping(config))
    return {**run_config.fingerprint(config, ""), **{key: flat.get(key) for key in OF_EVALUATION}}


@dataclass
class KeptRuns:
    """The kept runs of a claim in a folder; none without a folder.

    Raises CheckpointError if one is damaged, or was made by another recipe, under other rules or overrides or on other
    images than now; ConfigError if the folder cannot be read or holds other folders than those of the claim's runs.
    """

    claim: LoadedClaim
    folder: Path | None
    _found: dict[tuple[str, int], KeptRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self._names():
            arm, _, number = name.rpartition("-s")
            if arm not in self.claim.arms or not re.fullmatch("0|[1-9][0-9]{0,17}", number):
                why = f"holds {name}, which is no run of the claim {self.claim.name}"
                raise self._unusable(why, "name a folder for this claim alone")
            self._found[arm, int(number)] = self._read(arm, int(number))

    def _names(self) -> list[str]:
        """The folders in the folder; hidden ones are not finished."""
        if self.folder is None or not os.path.lexists(self.folder):
            return []
        try:
            with os.scandir(self.folder) as entries:
                return sorted(each.name for each in entries if not (each.name.startswith(".") or each.is_file()))
        except OSError as error:
            raise self._unusable(f"cannot be read ({error.strerror})", "name a folder") from None

    def __len__(self) -> int:
        return len(self._found)

    @property
    def images(self) -> str | None:
        """The identity of the images that the kept runs were evaluated on; None without one."""
        return next((each.images for each in self._found.values()), None)

    def prepare(self, images: str) -> None:
        """Makes the folder. images: the identity of those that runs will be evaluated on.

        Raises ConfigError if it cannot be written, CheckpointError if the kept runs were evaluated on other images.
        """
        if self.folder is None:
            return
        if self.images not in (None, images):
            raise _other(self.folder, "images", "they were evaluated on other images", self.images, images)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._unusable(f"cannot be written ({error.strerror})", "name another folder") from None

    def find(self, arm: str, seed: int) -> KeptRun | None:
        """The kept run of this arm and seed, if there is one."""
        return self._found.get((arm, seed))

    def seeds_of(self, arm: str) -> set[int]:
        """The seeds of an arm that are kept."""
        return {seed for of, seed in self._found if of == arm}

    def place(self, arm: str, seed: int) -> Path:
        """The folder of a kept run."""
        assert self.folder is not None
        return seed_runs.folder_of(seed_runs.group_of(self.folder / arm), seed)

    def add(self, arm: str, seed: int, run: Path, images: str) -> None:
        """Keeps the finished run in the folder `run`, unless it is kept already or there is no folder to keep it in.

        Raises ConfigError if an evaluation of the run is incomplete, or the folder cannot be written.
        """
        if self.folder is None or (arm, seed) in self._found:
            return
        place, needed = self.place(arm, seed), _needed(self.claim.config, arm)
        slim = {name: _slim(evaluation_of(run, name), policies) for name, policies in needed.items()}
        kept = KeptRun(
            claim=self.claim.name,
            sha256=self.claim.sha256,
            overrides=self.claim.learned,
            images=images,
            arm=arm,
            seed=seed,
            recipe=recipe_of(self.claim.arms[arm], seed),
            sums={},
            **asdict(Origin.of_run(run)),
        )
        try:
            with files.whole_folder(place) as aside:
                for name, arrays in slim.items():
                    _write(evaluation_of(run, name), evaluation_of(aside, name), arrays)
                sums = {name: files.sha256(aside / name) for name in _files(aside)}
                files.write_json(aside / KEPT, to_jsonable_python(replace(kept, sums=sums).sealed().to_json()))
        except FileExistsError:  # of another command
            pass
        except OSError as error:
            raise self._unusable(f"{place.name} cannot be written ({error.strerror})", "name another folder") from None
        self._found[arm, seed] = self._read(arm, seed)

    def _read(self, arm: str, seed: int) -> KeptRun:
        """The kept run in its folder, whole and comparable."""
        place = self.place(arm, seed)
        try:
            found = KeptRun.from_json(files.read_json(place / KEPT), str(place / KEPT))
            sums = {name: files.sha256(place / name) for name in _files(place)}
        except (OSError, ValueError, CheckpointError) as error:
            raise _damaged(place, str(error)) from None
        needed = {str(Path(EVALUATIONS, name)) for name in _file_names(self.claim.config, arm)}
        if wrong := sorted(dict(sums.items() ^ found.sums.items()) or needed - set(sums)):
            raise _damaged(place, f"{wrong[0]} is missing or another file")
        if (found.arm, found.seed) != (arm, seed):
            raise _damaged(place, f"it is {found.arm}-s{found.seed} by its {KEPT}")
        self._check(place, found)
        return found

    def _check(self, place: Path, found: KeptRun) -> None:
        claim = self.claim
        if found.claim != claim.name:
            raise _other(place, "claim", "it is a run of another claim", found.claim, claim.name)
        if found.sha256 != claim.sha256:
            raise _other(place, "sha256", "the claim's file had another SHA-256", found.sha256, claim.sha256)
        if found.overrides != claim.learned:
            raise _other(place, "overrides", "other overrides were given", list(found.overrides), list(claim.learned))
        if self.images not in (None, found.images):
            raise _other(place, "images", "it was evaluated on other images", found.images, self.images)
        of_evaluation = {key: found.recipe.get(key) for key in OF_EVALUATION}
        trained = {key: value for key, value in found.recipe.items() if key not in OF_EVALUATION}
        then, now = {**run_config.translated(trained), **of_evaluation}, recipe_of(claim.arms[found.arm], found.seed)
        if changed := checkpoint.differences(then, now):
            lines = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items())
            raise CheckpointError(
                f"{place}: was trained or evaluated by another recipe than arm {found.arm} has now ({lines}); restore "
                "the recipe, or remove that folder to train the run again",
                keys=tuple(changed),
                subject=place,
            )

    def _unusable(self, why: str, way_out: str) -> ConfigError:
        return ConfigError(f"--keep (={self.folder}): {why}; {way_out}", key="--keep", subject=self.folder)


def _damaged(place: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{place}: holds no whole kept run ({why}); restore it, or remove that folder to train the run again",
        key=KEPT,
        subject=place,
    )


def _other(path: Path, key: str, what: str, then: object, now: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what} ({then}; now {now}), so it cannot be counted with this claim's runs; restore what changed, or "
        "name another folder with --keep",
        key=f"claim.{key}",
        subject=path,
    )


# ---- what is kept


def not_there(place: Path, policy: str, why: str) -> ConfigError:
    """The error of a figure that an evaluation does not have."""
    return ConfigError(f"{place}: policy {policy}: {why}", key="policy", subject=policy)


def arrays_of(place: Path, policy: str) -> Arrays:
    """The stored arrays by image of a policy; rows that are not stored are those of all images in order.

    Raises ConfigError if there are none.
    """
    names = [report.policy for report in load_reports(place)]
    if policy not in names:
        raise not_there(place, policy, f"it was not evaluated; evaluated were: {', '.join(names)}")
    found = Stored((), place, records.About()).details(policy)
    if found is None:
        raise not_there(place, policy, "its answers by image are missing; remove the folder and resume")
    return found if "rows" in found else {**found, "rows": np.arange(len(next(iter(found.values()))))}


def _needed(config: ClaimConfig, arm: str) -> dict[str, dict[str, list[Quantity]]]:
    """{evaluation: {policy: figures}} of an arm, for all statements."""
    needed: dict[str, dict[str, list[Quantity]]] = {name: {} for name in (FINAL, *config.evaluations_of(arm))}
    for quantity in config.quantities():
        for policy in filter(None, (*quantity.policies, quantity.policy)) if arm in quantity.arms else ():
            needed[quantity.evaluation].setdefault(policy, []).append(quantity)
    return needed


def _file_names(config: ClaimConfig, arm: str) -> Iterator[str]:
    """The files that a kept run of an arm must have, within its folder of evaluations."""
    for name, policies in _needed(config, arm).items():
        folder = evaluation_of(Path(), name).name
        yield from (f"{folder}/{file}" for file in ("reports.json", records.ABOUT, *(f"{p}.npz" for p in policies)))


def _slim(place: Path, policies: Mapping[str, Sequence[Quantity]]) -> dict[str, Arrays]:
    """{policy: the arrays that its figures need}."""
    return {policy: _needed_of(place, policy, figures) for policy, figures in policies.items()}


def _needed_of(place: Path, policy: str, figures: Sequence[Quantity]) -> dict[str, Array]:
    stored = arrays_of(place, policy)
    names = {"rows"}
    for each in figures:
        if each.figure == "class_sd":
            names |= {"labels", f"facts.{each.fact}"}
        elif each.figure == "macs":
            names.add("macs")
        else:  # as of `pipeline.figures.hits`
            names |= {"tied", "rank_of_truth"} if "tied" in stored else {"predicted", "labels"}
    if absent := sorted(names - set(stored)):
        raise not_there(place, policy, f"{', '.join(absent)} of each image are missing; remove the folder and resume")
    if np.array_equal(stored["rows"], np.arange(len(stored["rows"]))):
        names.remove("rows")
    return {name: _small(stored[name]) for name in sorted(names)}


def _small(values: Array) -> Array:
    """Whole numbers in the smallest type that holds them."""
    if values.dtype.kind not in "iu" or values.size == 0:
        return values
    return values.astype(np.promote_types(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))


def _write(source: Path, target: Path, arrays: Mapping[str, Arrays]) -> None:
    """Writes an evaluation with these arrays, the reports of `source`, and of its about.json what names no place."""
    target.mkdir(parents=True)
    for policy, of_policy in arrays.items():
        np.savez_compressed(target / f"{policy}.npz", **of_policy)  # type: ignore[arg-type]
    files.write_json(target / "reports.json", [report.to_json() for report in load_reports(source)])
    about = records.read_about(source)
    slim = records.About(step=about.step, data=about.data, sides=about.sides, overrides=about.overrides)
    records.write_about(target, slim)


def _files(folder: Path) -> list[str]:
    """The files below a folder but kept.json, by their names within it."""
    found = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [name for name in found if name != KEPT]


# ---- a run's origin


def _seconds(run: Path) -> float:
    """How long a run computed: over its starts, from the first line of rank 0's journal to the last one."""
    times: dict[int, list[float]] = {}
    for record in journal.read_all(run / "journal" / "rank0.jsonl"):
        times.setdefault(record["attempt"], []).append(record["time"])
    return sum(max(each) - min(each) for each in times.values())


def _commit(run: Path) -> str:
    git = provenance.read(run).get("git")
    return "" if not git else git["commit"][:10] + " with changes" * git["dirty"]


def _machine(run: Path) -> str:
    """What the run's latencies were measured on, and the number of CPUs."""
    latencies = [entry for report in load_reports(evaluation_of(run, FINAL)) for entry in report.latency]
    cpus = provenance.read(run).get("cpus")
    return f"{latencies[0].device if latencies else 'unknown device'}, {cpus} CPUs"
