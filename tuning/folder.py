"""A sweep's folder: the sweep in it, its configuration file, its tracked run, and the recipes of its trials."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline import config as configs
from pipeline.data.index import Splits, open_splits
from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import launch
from pipeline.run_config import RunConfig
from pipeline.runs import lease
from pipeline.runs.files import write_text
from pipeline.tracking import Uploader
from pipeline.training import checkpoint
from tuning import cost, metrics
from tuning.config import Sweep, translated
from tuning.record import Trial

TRIALS = "trials"


@dataclass(frozen=True)
class SweepFolder:
    """A sweep in its folder, under the lease with number `fence`."""

    sweep: Sweep
    run_dir: Path
    fence: int

    @cached_property
    def splits(self) -> Splits:
        """The recipe's images. Raises ConfigError or DataError if there are none, or none to evaluate on."""
        base = launch.absolute(self.sweep.base)
        splits = open_splits(base.data, base.seed)
        if len(splits.val) == 0:
            raise ConfigError(
                f"data.root (={base.data.root}): no val split, so no trial would report anything",
                key="data.root",
                subject=base.data.root,
            )
        return splits

    @property
    def num_classes(self) -> int:
        return len(self.splits.train.classes)

    @property
    def is_stopping(self) -> bool:
        """Whether a file `stop` asks the sweep to save its trials and end."""
        return (self.run_dir / "stop").exists()

    def of(self, trial: Trial) -> Path:
        """The folder of a trial."""
        return self.run_dir / TRIALS / trial.name

    def recipe(self, trial: Trial, tracking_uri: str) -> RunConfig:
        """The recipe of a trial: tracked below the sweep's tracked run, stored in its own folder, not registered."""
        config = self.sweep.recipe(trial.sample)
        tracking = config.tracking.model_copy(update={"uri": tracking_uri, "register": None, "parent": self.run_dir})
        storage = config.checkpoint.storage
        if storage is not None:
            storage = f"{storage.rstrip('/')}/{self.run_dir.name}/{trial.name}"
        saving = config.checkpoint.model_copy(update={"storage": storage})
        return config.model_copy(update={"name": trial.name, "tracking": tracking, "checkpoint": saving})

    def max_epochs(self) -> float:
        """The epochs of the longest trial; those of the recipe if a study draws the samples."""
        if all(dimension.key != "training.epochs" for case in self.sweep.cases for dimension in case):
            return self.sweep.base.training.epochs
        return max([self.sweep.recipe(sample).training.epochs for sample in self.sweep.samples()], default=0.0)

    def first_evaluation(self) -> float:
        """The epoch of the first evaluation during training; 0 if it depends on the clock."""
        every = self.sweep.base.evaluation.every
        per_step = self.sweep.base.training.batch_size / len(self.splits.train)
        return {"epochs": every.value, "steps": every.value * per_step}.get(every.unit, 0.0)

    def check_objectives(self) -> None:
        """Raises ConfigError for an objective that no trial will report."""
        first = {sample.case: sample for sample in reversed(self.sweep.samples())}.values()  # first of each case
        recipes = [self.sweep.base, *map(self.sweep.recipe, first)]
        names = [recipe.evaluation.policies or cost.policies(recipe, self.num_classes) for recipe in recipes]
        policies = dict.fromkeys(name for group in names for name in group)
        metrics.check_objectives(self.sweep.config, list(policies), self.num_classes)

    def check_lease(self) -> None:
        """Raises ResourceError if another driver has taken the sweep over."""
        if not lease.is_current(self.run_dir, self.fence):
            raise ResourceError(
                f"{self.run_dir}: another driver has taken this sweep over; this one ends",
                key="lease.json",
                subject=self.run_dir,
            )

    def write_config(self) -> None:
        """Writes config.yaml: the sweep, the recipe without a sample, and the fingerprint of both.

        Raises ConfigError with the differences if the folder holds another sweep.
        """
        path, identity = self.run_dir / "config.yaml", self.sweep.identity(self.splits.train.identity)
        if path.exists():
            saved = translated(configs.section(configs.read_mapping(path), "fingerprint"))
            changed = checkpoint.differences(saved, identity)
            if changed:
                lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
                text = [f"{self.run_dir} holds another sweep:", *lines, "Use the old values, or another --run-dir"]
                raise ConfigError("\n".join(text), keys=tuple(changed), subject=self.run_dir)
        mapping = {"sweep": configs.as_mapping(self.sweep.config), "recipe": configs.as_mapping(self.sweep.base)}
        write_text(path, configs.dump_yaml(mapping | {"fingerprint": identity}))

    def uploader(self) -> Uploader:
        """Uploads the sweep's own tracked run, the parent of its trials' runs."""
        tracking = self.sweep.base.tracking.model_copy(update={"register": None, "upload_checkpoints": False})
        recipe = configs.as_mapping(self.sweep.base) | {"sweep": configs.as_mapping(self.sweep.config)}
        write_text(self.run_dir / "note.md", f"{self.sweep.config.question}\n")
        return Uploader(self.run_dir, tracking, recipe, command=sys.argv, fence=self.fence)


def check_place(run_dir: Path) -> None:
    """Raises ConfigError if the folder holds a run."""
    path = run_dir / "config.yaml"
    if path.exists() and "sweep" not in configs.read_mapping(path):
        raise ConfigError(
            f"{run_dir}: holds a run, not a sweep; give the sweep a folder of its own with --run-dir",
            key="--run-dir",
            subject=run_dir,
        )
