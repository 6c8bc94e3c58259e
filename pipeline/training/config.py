"""The keys under `training:`, `checkpoint:`, `evaluation:` and `logging:`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config import (
    BelowOne,
    Config,
    Count,
    Duration,
    FilePath,
    Positive,
    Span,
    each_once,
    fault,
    is_stored,
    meant,
    section,
)
from pipeline.errors import JsonValue
from pipeline.training.losses import AnyLoss
from pipeline.training.losses.cross_entropy import CrossEntropyConfig
from pipeline.training.optimizers import AnyOptimizer
from pipeline.training.optimizers.sgd import SgdConfig
from pipeline.training.schedules import AnySchedule
from pipeline.training.schedules.cosine import CosineConfig
from pipeline.training.schedules.steps import StepsConfig
from pipeline.training.schedules.wsd import WsdConfig
from pipeline.training.teachers import AnyTeacher
from pipeline.training.teachers.none import NoTeacherConfig

EmaWarmup = Literal["ramp", "power", "none"]
ScaleLr = Literal["none", "linear", "sqrt"]
LR_SCALES: Mapping[ScaleLr, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "linear": lambda ratio: ratio,
    "sqrt": math.sqrt,
}


class TrainingConfig(Config):
    """What determines the optimisation.

    All keys are in the fingerprint but compile, cuda_graphs, channels_last, new_head and start_from's folder.
    """

    batch_size: Count = 256  # global: over all workers and accumulation steps
    epochs: Positive = 90.0
    optimizer: AnyOptimizer = SgdConfig()
    other_optimizers: dict[str, AnyOptimizer] = Field(default_factory=dict)  # the other optimizers of a family, by name
    schedule: AnySchedule = CosineConfig()
    # how the rates of all optimizers follow batch_size / reference_batch: see `TrainingConfig.lr_scale`
    scale_lr: ScaleLr = "none"
    reference_batch: Count | None = None  # the batch size that the optimizers' rates are for
    loss: AnyLoss = CrossEntropyConfig()
    teacher: AnyTeacher = NoTeacherConfig()
    decay_norms_and_biases: bool = False  # weight decay for them too, as in the papers of the four families
    label_smoothing: BelowOne = 0.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_warmup: EmaWarmup = "ramp"  # how the decay grows to ema_decay from the first step: see `state.update_ema`
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # each layer's learning rate over that of the next one, for fine-tuning; null: all have the same
    )
    clip_norm: Positive | None = None
    # auto: bf16 autocast on a GPU that has it, and on a CPU that has it and is faster with it; else fp32
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True  # memory format of images and weights; faster on CPU too
    start_from: FilePath | None = None  # initial weights: a checkpoint's or model's folder, .safetensors or .pt
    new_head: bool = False  # start_from's head is for other classes: leave it out and train a new one
    # torch.compile; auto: in a long run, if it is faster here. Without a C++ compiler a run trains uncompiled
    compile: Literal["auto"] | bool = "auto"
    cuda_graphs: bool = False  # records the net as CUDA graphs, for steps of fixed shapes; GPU only
    sync_batchnorm: bool = False  # BatchNorm over all ranks; GPU only

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason."""
        inert = {"new_head": "start_from is null"} if values["start_from"] is None else {}
        if section(values, "loss").get("target_threshold") is not None:
            inert["label_smoothing"] = "loss.target_threshold makes every target 0 or 1"
        if values["scale_lr"] == "none":
            inert["reference_batch"] = "scale_lr is none"
        if values["ema_decay"] is None:
            inert["ema_warmup"] = "ema_decay is null"
        teacher = section(values, "teacher")
        if teacher.get("weight") == 1 and teacher.get("kind", "none") != "none":
            inert |= dict.fromkeys(("loss", "label_smoothing"), "teacher.weight is 1: the answers alone are learned")
        return inert

    @model_validator(mode="after")
    def _has_a_reference(self) -> TrainingConfig:
        if self.scale_lr != "none" and self.reference_batch is None:
            raise fault("reference_batch", f"scale_lr is {self.scale_lr}: give the batch size that the rates are for")
        return self

    @property
    def lr_scale(self) -> float:
        """What the rates of all optimizers are multiplied by for this batch size.

        linear: the ratio to the reference batch, for SGD (Goyal et al., 2017, arXiv 1706.02677, with a warm-up of 5
        epochs). sqrt: its square root, for Adam and its kin (Malladi et al., NeurIPS 2022, arXiv 2205.10287; You et
        al., ICLR 2020, for LAMB). Momentum, betas and weight decay stay.
        """
        return LR_SCALES[self.scale_lr](self.batch_size / (self.reference_batch or self.batch_size))

    def above(self, num_images: int) -> str | None:
        """A warning if a step has more images than the training split; None if it does not."""
        if self.batch_size <= num_images:
            return None
        return (
            f"training.batch_size (={self.batch_size:,}) is above the {num_images:,} training images: each step shows "
            f"images more than once, and an epoch is less than a step; set it to {max(1, num_images // 8):,} or less"
        )

    @property
    def scaling(self) -> str | None:
        """What `scale_lr` did, as a sentence for people; None if it is none."""
        if self.scale_lr == "none":
            return None
        return (
            f"scale_lr {self.scale_lr}: batch size {self.batch_size}, reference {self.reference_batch}, so all "
            f"learning rates are multiplied by {self.lr_scale:.6g}; {self.optimizer.lr:g} becomes "
            f"{self.optimizer.lr * self.lr_scale:.6g}"
        )

    @model_validator(mode="after")
    def _within_the_epochs(self, info: ValidationInfo) -> TrainingConfig:
        """What a schedule does after the last epoch is never done; a stored recipe may say it."""
        schedule, epochs = self.schedule, self.epochs
        if is_stored(info):
            return self
        if schedule.warmup_epochs > epochs:
            raise fault(
                "schedule.warmup_epochs", f"the training has {epochs:g} epochs, so the warm-up never ends; set it lower"
            )
        if isinstance(schedule, WsdConfig) and schedule.warmup_epochs + schedule.decay_epochs > epochs:
            raise fault("schedule.decay_epochs", f"with the warm-up it is longer than the training's {epochs:g} epochs")
        late = [each for each in schedule.milestones if each >= epochs] if isinstance(schedule, StepsConfig) else []
        if late:
            raise fault(
                "schedule.milestones",
                f"{', '.join(f'{each:g}' for each in late)} never comes: the training has {epochs:g} epochs, and "
                "milestones are in epochs",
            )
        return self

    def why_not_extended(self, epoch: float | None, before: float) -> str | None:
        """Why a run of `before` epochs cannot go on with these epochs; None if it can.

        epoch: how far it has come; None if that is not known.
        """
        if self.epochs < before:
            return "a run may be given more epochs, not fewer"
        return self.schedule.why_fixed(before if epoch is None else epoch, before)

    @field_validator("channels_last", mode="before")
    @classmethod
    def _of_older_recipes(cls, value: object) -> object:
        return True if value == "auto" else value


LAST = "last"  # of `checkpoint.best`: no checkpoint is chosen


def _is_top(key: str) -> str | None:
    if key == LAST or (key.startswith("eval/") and key.endswith(("/top1", "/top5"))):
        return None
    return (
        "checkpoints are ranked by eval/POLICY/top1 or eval/POLICY/top5 of the evaluations during training, or not at "
        "all: last"
    )


def _some(names: tuple[str, ...]) -> str | None:
    return each_once(names) if names else "an evaluation runs at least one policy; null stands for all"


Batch = Annotated[int, Field(ge=1, le=65_536)]


class CheckpointConfig(Config):
    """How often checkpoints are saved, where, and which of them are retained."""

    every: Span = Duration(value=10, unit="minutes")
    storage: str | None = None  # folder or URI that all nodes can reach; null: the run folder
    keep_last: Count = 2
    keep_best: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    best: Annotated[str, meant(_is_top)] | None = (
        None  # metric that is best when highest; null: the first policy's top-1; last: the last checkpoint is taken
    )

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason."""
        return {"keep_best": "best is last"} if values["best"] == "last" else {}

    @field_validator("storage")
    @classmethod
    def _without_secrets(cls, storage: str | None) -> str | None:
        if storage and "://" in storage and ("@" in urlsplit(storage).netloc or "secret" in urlsplit(storage).query):
            raise ValueError(
                "credentials do not belong in a recipe, which is stored and tracked; put them into the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ...)"
            )
        return storage


class EvaluationConfig(Config):
    """Evaluation on the val split: of the first policy during training, of all policies after it."""

    every: Span = Duration(value=1, unit="epochs")
    batch_size: Count = 256  # over all workers
    policies: Annotated[tuple[str, ...], meant(_some)] | None = (
        None  # names of the policies to run at the end; null: all of them
    )
    latency_batches: Annotated[tuple[Batch, ...], meant(each_once)] = (
        1,
        32,
    )  # batch sizes whose latency is measured, on rank 0
    latency_repeats: Annotated[int, Field(ge=0, le=10_000)] = (
        5  # timed runs per batch size after one to warm up; 0: none
    )

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason."""
        if values["latency_repeats"] == 0:
            return {"latency_batches": "latency_repeats is 0"}
        return {} if values["latency_batches"] else {"latency_repeats": "latency_batches is empty"}


class LoggingConfig(Config):
    """How often training metrics are written."""

    every: Span = Duration(value=20, unit="steps")
    system_every_s: Annotated[float, Field(ge=0.1, le=86_400)] = 10.0  # system metrics of each node
