"""The teacher of a run: found and pinned by the driver, loaded once on each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import config as configs
from pipeline import cost, run_config
from pipeline import family as families
from pipeline.data.config import DataConfig
from pipeline.errors import AdaptNetError, ConfigError
from pipeline.registry.model import Trained, describe, load_model
from pipeline.registry.resolve import resolve
from pipeline.run_config import RunConfig
from pipeline.runs import files
from pipeline.tracking import resolve_uri
from pipeline.training.distillation import Teacher, TrainedTeacher, WholeNetTeacher
from pipeline.training.teachers.trained import TrainedTeacherConfig

SOURCE = "training.teacher.source"


@dataclass(frozen=True)
class PinnedTeacher:
    """A trained teacher on disk, checked against its checksums; sha256: that of its weights."""

    trained: Trained
    sha256: str


def locate(config: RunConfig, run_dir: Path) -> Path | None:
    """The folder of the recipe's trained teacher, on this machine; None if the recipe has none.

    A version is looked up in the registry that the run is tracked to. Raises ConfigError if nothing has this name,
    CheckpointError if its files are missing or damaged.
    """
    teacher = config.training.teacher
    if not isinstance(teacher, TrainedTeacherConfig):
        return None
    return resolve(teacher.source, resolve_uri(config.tracking.uri, run_dir)).absolute()


def pin(folder: Path, classes: Sequence[str] | int) -> PinnedTeacher:
    """The teacher in `folder`, for these classes or, where their names are not known, for so many.

    Raises ConfigError if it has others, CheckpointError if it is damaged.
    """
    trained = describe(folder)
    theirs = len(trained.classes) if isinstance(classes, int) else trained.classes
    if theirs != (classes if isinstance(classes, int) else tuple(classes)):
        raise ConfigError(f"{SOURCE}: {_other_classes(trained, classes)}", key=SOURCE, subject=folder)
    return PinnedTeacher(trained, files.sha256(trained.weights))


def _other_classes(trained: Trained, classes: Sequence[str] | int) -> str:
    count, names = (classes, ()) if isinstance(classes, int) else (len(classes), classes)
    ours, theirs = set(names), set(trained.classes)
    only = {"the teacher": theirs - ours, "the data": ours - theirs} if ours else {}
    reasons = [f"only {who} has {', '.join(sorted(some)[:3])}" for who, some in only.items() if some]
    differ = f"; {' and '.join(reasons) or 'their order differs'}" if ours else ""
    numbers = f"the teacher {trained.folder} has {len(trained.classes)} classes, the data {count}"
    return f"{numbers}{differ}. A teacher answers for the student's own classes"


def identified(config: RunConfig, teacher: PinnedTeacher | None) -> RunConfig:
    """The recipe as in the fingerprint: its teacher is named by the weights, wherever they are."""
    return config if teacher is None else run_config.with_teacher(config, f"sha256:{teacher.sha256}")


def open_teacher(
    config: RunConfig, pinned: PinnedTeacher | None, student: nn.Module, device: torch.device
) -> tuple[Teacher | None, Mapping[str, object]]:
    """The teacher in eval mode on the device, and what is logged of it once; (None, {}) without a teacher.

    Raises ConfigError if it cannot see images of the student's sides.
    """
    how = config.training.teacher
    if pinned is not None and isinstance(how, TrainedTeacherConfig):
        teacher = _trained(config, how, pinned, device)
        net, described = teacher.net, {"source": how.source, "sha256": pinned.sha256[:16]}
        check_sides(config, teacher, device)
        return teacher, {
            "teacher": how.kind,
            **described,
            **_costs(net, how.side_px or config.data.largest_side_px, device),
        }
    whole = families.find(config.family.name).whole(config.family)
    if how.kind == "none" or isinstance(whole, str):
        return None, {}
    return WholeNetTeacher(whole), {"teacher": how.kind, **_costs(student, config.data.largest_side_px, device)}


def _trained(
    config: RunConfig, how: TrainedTeacherConfig, pinned: PinnedTeacher, device: torch.device
) -> TrainedTeacher:
    net = load_model(pinned.trained.folder, device).net.requires_grad_(False)
    if not config.training.channels_last:
        net = net.to(memory_format=torch.contiguous_format)
    theirs = configs.validate_stored(DataConfig, pinned.trained.section("data"), f"{pinned.trained.folder}: data")
    if (theirs.mean, theirs.std) == (config.data.mean, config.data.std):
        return TrainedTeacher(net, side_px=how.side_px)
    mean, std, our_mean, our_std = (
        _per_channel(each, device) for each in (theirs.mean, theirs.std, config.data.mean, config.data.std)
    )
    return TrainedTeacher(net, our_std / std, (our_mean - mean) / std, how.side_px)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).view(1, 3, 1, 1)


def _costs(net: nn.Module, side_px: int, device: torch.device) -> dict[str, object]:
    macs = cost.measure(net, torch.zeros(1, 3, side_px, side_px, device=device)).macs
    return {"side_px": side_px, "mmacs_per_image": round(macs / 1e6, 2)}


def check_sides(config: RunConfig, teacher: TrainedTeacher, device: torch.device) -> None:
    """Raises ConfigError if the teacher cannot see images of a side that the student is trained on."""
    data = config.data
    for side in sorted({*data.side_choices, data.side_px, *(side for _, side in data.side_schedule)}):
        try:
            with torch.no_grad():
                teacher(teacher.net, torch.zeros(1, 3, side, side, device=device))
        except (AdaptNetError, RuntimeError) as error:
            raise ConfigError(
                f"{SOURCE}: the teacher cannot see the student's images of {side} px ({_first_line(error)}); give it "
                "images of its own size with training.teacher.side_px",
                key=SOURCE,
                subject=side,
            ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
