"""What a verdict needs of a finished run, in a small folder that outlives the run's own: a claim may take many days.

FOLDER/ARM-s1 of `--keep FOLDER` has kept.json (`KeptRun`), written last, and the claim's evaluations of the run: each
with its reports and, of the policies that a statement names, the arrays by image that it needs. It holds no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic_core import to_jsonable_python

from pipeline.deploy.evaluations import EVALUATIONS, Array
from pipeline.errors import CheckpointError, ConfigError, JsonValue
from pipeline.evaluation.evaluate import load_reports
from pipeline.evaluation.from_weights import FINAL
from pipeline.runs import files, journal, provenance, records, seed_runs
from pipeline.runs.records import Record
from tuning.reproduce.claim import ClaimConfig, LoadedClaim, Quantity

KEPT = "kept.json"
OF_CLAIM = "claim-"  # begins the folders of a claim's evaluations
OF_FIGURE: Mapping[str, tuple[str, ...]] = {  # the arrays by image that a figure is made of
    "top1": ("rows", "tied", "rank_of_truth"),
    "macs": ("rows", "macs"),
    "class_sd": ("rows", "labels"),
}


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
    """kept.json: the run, under what rules and on which images it was made, and the SHA-256 of each file beside it."""

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
    sums: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def _from_fields(cls, content: Mapping[str, JsonValue]) -> Self:
        texts = {key: content[key] for key in ("claim", "sha256", "images", "arm", "commit", "machine")}
        overrides, sums, seed, seconds = (content[key] for key in ("overrides", "sums", "seed", "seconds"))
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("a text is expected")
        if not (isinstance(overrides, list) and isinstance(sums, dict)):
            raise TypeError("overrides are a list, sums a mapping")
        if type(seed) is not int or not isinstance(seconds, int | float):
            raise TypeError("seed and seconds are numbers")
        return cls(
            **{key: str(text) for key, text in texts.items()},
            overrides=tuple(map(str, overrides)),
            seed=seed,
            seconds=float(seconds),
            sums={name: str(total) for name, total in sums.items()},
        )

    @property
    def origin(self) -> Origin:
        """Where its figures are from."""
        return Origin(self.seconds, self.commit, self.machine)


@dataclass
class KeptRuns:
    """The kept runs of a claim in a folder; none without a folder.

    Raises CheckpointError if one is damaged, or was made under other rules, overrides or images than the others and the
    claim: what it measured is not comparable. A folder in the way that is no kept run is not looked into.
    """

    claim: LoadedClaim
    folder: Path | None
    _found: dict[tuple[str, int], KeptRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in sorted(self.folder.glob(f"*/{KEPT}")) if self.folder else ():
            found = _read(path)
            self._check(path, found)
            self._found[found.arm, found.seed] = found

    @property
    def images(self) -> str | None:
        """The identity of the images that the kept runs were evaluated on; None without one."""
        return next((each.images for each in self._found.values()), None)

    def check_images(self, images: str) -> None:
        """Raises CheckpointError if the kept runs were evaluated on others."""
        if self.images not in (None, images):
            raise _other(self.folder or Path(), "images", "they were evaluated on other images", images, self.images)

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

        Raises ConfigError if the folder cannot be written.
        """
        if self.folder is None or (arm, seed) in self._found:
            return
        place, origin = self.place(arm, seed), Origin.of_run(run)
        try:
            with files.whole_folder(place) as aside:
                for name, needed in _needed(self.claim.config, arm).items():
                    _copy(evaluation_of(run, name), evaluation_of(aside, name), needed)
                sums = {str(path.relative_to(aside)): files.sha256(path) for path in _files(aside)}
                kept = KeptRun(
                    claim=self.claim.name,
                    sha256=self.claim.sha256,
                    overrides=self.claim.learned,
                    images=images,
                    arm=arm,
                    seed=seed,
                    sums=sums,
                    **asdict(origin),
                )
                files.write_json(aside / KEPT, to_jsonable_python(kept.to_json()))
        except OSError as error:
            raise ConfigError(
                f"--keep (={self.folder}): {place.name} cannot be kept there ({error}); name another folder, or remove "
                "what is in the way",
                key="--keep",
                subject=place,
            ) from None
        self._found[arm, seed] = kept

    def _check(self, path: Path, found: KeptRun) -> None:
        for name, total in found.sums.items():
            file = path.parent / name
            if not file.is_file() or files.sha256(file) != total:
                raise CheckpointError(
                    f"{file}: missing or damaged; restore it, or remove the folder {path.parent.name} to train the run "
                    "again",
                    key=KEPT,
                    subject=file,
                )
        learned = self.claim.learned
        if found.claim != self.claim.name:
            raise _other(path, "claim", "it is a run of another claim", self.claim.name, found.claim)
        if found.sha256 != self.claim.sha256:
            raise _other(path, "sha256", "the claim's file has another SHA-256", self.claim.sha256, found.sha256)
        if found.overrides != learned:
            raise _other(path, "overrides", "other overrides were given", list(learned), list(found.overrides))
        if self.images not in (None, found.images):
            raise _other(path, "images", "it was evaluated on other images", self.images, found.images)


def _read(path: Path) -> KeptRun:
    try:
        return KeptRun.from_json(files.read_json(path), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); restore it, or remove its folder to train the run again",
            key=KEPT,
            subject=path,
        ) from None


def _other(path: Path, key: str, what: str, mine: object, found: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what} than now ({found}, now {mine}), so it cannot be counted with this claim's runs; restore them, "
        "or keep runs in another folder with --keep",
        key=f"claim.{key}",
        subject=path,
    )


# ---- what is copied


def _needed(config: ClaimConfig, arm: str) -> dict[str, dict[str, set[str]]]:
    """{evaluation: {policy: arrays}} of an arm, for all statements."""
    needed: dict[str, dict[str, set[str]]] = {name: {} for name in (FINAL, *config.evaluations_of(arm))}
    for quantity in config.quantities():
        if arm in quantity.arms:
            for policy in filter(None, (*quantity.policies, quantity.policy)):
                needed[quantity.evaluation].setdefault(policy, set()).update(_arrays(quantity))
    return needed


def _arrays(quantity: Quantity) -> Iterator[str]:
    yield from OF_FIGURE[quantity.figure]
    if quantity.figure == "class_sd":
        yield f"facts.{quantity.fact}"


def _copy(source: Path, target: Path, needed: Mapping[str, set[str]]) -> None:
    """Copies an evaluation's reports and the needed arrays; of about.json what does not name a place."""
    target.mkdir(parents=True)
    for policy, names in needed.items():
        with np.load(source / f"{policy}.npz", allow_pickle=False) as stored:
            arrays: dict[str, Array] = {name: _small(stored[name]) for name in sorted(names) if name in stored}
        np.savez_compressed(target / f"{policy}.npz", **arrays)  # type: ignore[arg-type]
    files.write_json(target / "reports.json", files.read_json(source / "reports.json"))
    about = records.read_about(source)
    slim = records.About(step=about.step, data=about.data, sides=about.sides, overrides=about.overrides)
    records.write_about(target, slim)


def _small(values: Array) -> Array:
    """Whole numbers in the smallest type that holds them."""
    if values.dtype.kind not in "iu" or values.size == 0:
        return values
    return values.astype(np.promote_types(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))


def _files(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
