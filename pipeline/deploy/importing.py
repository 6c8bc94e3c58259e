"""Turns weights that were trained elsewhere into a run: evaluated, tracked and registered like any other."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline import config as configs
from pipeline import family as families
from pipeline import run_config
from pipeline.data import expectation
from pipeline.data.index import Splits, open_splits
from pipeline.errors import ConfigError, JsonValue
from pipeline.evaluation import from_weights
from pipeline.evaluation.from_weights import FINAL
from pipeline.execution import launch
from pipeline.execution.launch import Result
from pipeline.family import Fitted
from pipeline.run_config import RunConfig
from pipeline.runs import files, records
from pipeline.runs.journal import Journal
from pipeline.runs.lease import Lease
from pipeline.runs.records import About, Meta, Status
from pipeline.tracking import Uploader
from pipeline.training import checkpoint, state, torchvision_weights, weights_file
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.state import TrainState
from pipeline.training.weights_file import WeightsFile
from pipeline.weights import Loaded


@dataclass(frozen=True)
class Imported:
    """A run made from external weights. file: what was in it; loaded: what became of it; remark: see `expectation`."""

    result: Result
    file: WeightsFile
    loaded: Loaded
    remark: str | None = None

    @property
    def num_tensors(self) -> int:
        """How many of the file's tensors are in the net."""
        return len(self.file.tensors) - len(self.loaded.left_out)


def import_weights(
    config: RunConfig, file: Path, run_dir: Path, *, classes: Sequence[str] | None = None, new_head: bool = False
) -> Imported:
    """Makes a finished run of step 0 from external weights: the released code's, torchvision's or ours, by name.

    The net is evaluated on the recipe's val split, and registered if `tracking.register` names it. If the
    data are not available here, `classes` gives the names by label, and nothing is evaluated. new_head: the file's head
    is for other classes and is left out. Raises ConfigError if a tensor fits nowhere or the folder holds a run,
    CheckpointError if the file cannot be read (it is loaded with weights_only).
    """
    config, new, run_dir = launch.absolute(config), not run_dir.exists(), launch.make_folder(run_dir)
    if (run_dir / "config.yaml").exists():
        raise ConfigError(
            f"{run_dir}: holds a run already; give another folder with --run-dir", key="--run-dir", subject=run_dir
        )
    lease = Lease(run_dir).acquire()
    try:
        return _import(config, file, run_dir, lease.fence, classes, new_head)
    finally:
        if new and not (run_dir / "config.yaml").exists():
            lease.withdraw()
        else:
            lease.release()


def _import(
    config: RunConfig, file: Path, run_dir: Path, fence: int, classes: Sequence[str] | None, new_head: bool
) -> Imported:
    found = weights_file.read(file)
    splits = None if classes else open_splits(config.data, config.seed)
    names = splits.train.classes if splits else tuple(classes or ())
    current, loaded = _with_weights(config, found.tensors, len(names), new_head)
    fingerprint = run_config.fingerprint(config, splits.train.identity if splits else "none")
    launch.write_config(run_dir, config, fingerprint, ())
    recipe = configs.as_mapping(config)
    with Uploader(run_dir, config.tracking, recipe, command=sys.argv, fence=fence) as uploader:
        source = weights_file.locate(file)
        digest = files.sha256(source) if source.is_file() else None
        origin: dict[str, JsonValue] = {
            "file": str(file) if torchvision_weights.are_named(file) else file.name,
            "kept": list(loaded.initial),
            "left_out": list(loaded.left_out),
            "sha256": digest,
        }
        meta = Meta(
            step=0,
            epoch=0.0,
            best_key="top1",
            fence=fence,
            fingerprint=fingerprint,
            recipe=recipe,
            classes=names,
            imported=origin,
        )
        checkpoint.claim_storage(checkpoint.open_storage(config.checkpoint, run_dir), run_dir)
        folder = _save(config, current, meta, run_dir)
        with closing(Journal(run_dir / "journal", attempt=1, fence=fence)) as journal:
            journal.event("imported", step=0, **origin)
            if splits is not None and len(splits.val):
                journal.metrics(0, _evaluate(config, folder, splits, run_dir))
        name = checkpoint.name_of(0)
        records.write_status(run_dir, Status(finished=True, fingerprint=fingerprint, best=name, last=name))
        remark = expectation.remark(found.expected or loaded.expected, config.data, sides=True)
        return Imported(launch.conclude(config, run_dir, uploader), found, loaded, remark)


def _with_weights(
    config: RunConfig, tensors: Mapping[str, torch.Tensor], num_classes: int, new_head: bool
) -> tuple[TrainState, Loaded]:
    """The state at step 0 with these weights, and what became of them."""
    family = families.find(config.family.name)
    training = config.training.model_copy(update={"ema_decay": None})
    cpu = torch.device("cpu")
    current = state.fresh(family, config.family, training, num_classes=num_classes, seed=config.seed, device=cpu)
    return current, families.load_pretrained(family, config.family, current.net, tensors, new_head=new_head)


def _save(config: RunConfig, current: TrainState, meta: Meta, run_dir: Path) -> Path:
    """Writes the checkpoint. Returns its folder on this machine."""
    storage = checkpoint.open_storage(config.checkpoint, run_dir)
    staging = storage.root if isinstance(storage, checkpoint.LocalStorage) else run_dir / "staging"
    Checkpointer(storage, staging, config.checkpoint).save(current, meta, {"bad": {}}, wait=True)
    return storage.fetch(checkpoint.name_of(0))


def _evaluate(config: RunConfig, folder: Path, splits: Splits, run_dir: Path) -> dict[str, float]:
    """The metrics of the final evaluation; policies that must be fitted take part only if there are held-out images."""
    net, family, section, _ = checkpoint.load_net(folder)
    wanted = config.evaluation.policies
    if wanted is None and not len(splits.held_out):
        wanted = tuple(policy.name for policy in family.policies(section, net) if not isinstance(policy, Fitted))
    store = run_dir / "evaluations" / FINAL
    reports = from_weights.evaluate_checkpoint(config, folder / "net.safetensors", splits, wanted, store)
    about = About(checkpoint=str(folder), step=0, data=splits.val.identity, root=str(config.data.root))
    records.write_about(store, about)
    return {key.replace("eval/", "final/", 1): value for key, value in from_weights.metrics_of(reports).items()}
