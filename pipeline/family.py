"""The interface of a family: all that the pipeline knows about one kind of network, and all that a family provides.

A family is one value, `FAMILY = Family(...)`, in the package `pipeline.families.<name>`; the package's name is the
family's name. There is no base class to inherit from and nothing to register. Letters: B images, K classes, H×W pixels,
n a family's own count (gates, exits, levels).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from types import ModuleType
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.errors import ConfigError, JsonValue
from pipeline.figures import Arrays, Figure
from pipeline.installation import module
from pipeline.weights import Loaded, load, unwrapped

Settings: TypeAlias = "Mapping[str, int | float | str | bool]"
Layers: TypeAlias = Sequence[Sequence[nn.Module]]  # the modules of each layer, by depth
Whole: TypeAlias = Callable[[nn.Module, Tensor], Tensor]  # a net in eval mode, images [B, 3, H, W] -> logits [B, K]
Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # logits [B, K], targets -> the mean over images, []
T = TypeVar("T")
ConfigT = TypeVar("ConfigT", bound="FamilyConfig")
OutputT = TypeVar("OutputT")
LATENCY_FORMAT = 1
THESE_IMAGES, HELD_OUT = "the evaluated images", "held-out training images"
REPORT_FORMAT = 2  # files of format 1 have no format number, kind or settings


class FamilyConfig(Config):
    """The keys under `family:`; each family extends it and declares `name` as a Literal."""

    name: str


class Output(Protocol):
    """What a net returns: a dataclass with named tensors, one of which is `logits` [B, K]."""

    @property
    def logits(self) -> Tensor: ...


class Net(Protocol):
    """What the pipeline requires of a family's nn.Module."""

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Output:
        """images [B, 3, H, W], normalised; noise as from `draw_noise(B)`.

        In training without `noise` the net draws its own from torch's default generator, which training seeds at each
        micro-step.
        """
        ...

    def draw_noise(self, num_images: int) -> Tensor | None:
        """A tensor whose first dimension is num_images; None if nothing in the net is random."""
        ...


@dataclass(frozen=True)
class Loss:
    """total [] with gradient; parts {name: []}, detached, for the log (`train/<name>`)."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Params:
    """Parameters with common settings: the learning rate is multiplied by lr_factor; decay applies weight decay.

    outside_ddp is for a few scalars that shape the net and have their own optimizer. They are not part of DDP: their
    update runs in fp32, computes only their gradients and averages these over the ranks as one vector.
    """

    parameters: Sequence[nn.Parameter]
    lr_factor: float = 1.0
    decay: bool = True
    outside_ddp: bool = False


@dataclass(frozen=True)
class Prediction:
    """logits [B, K] f32; macs [B] f64, the MACs that each image really took; facts {name: [B] or [B, n]}."""

    logits: Tensor
    macs: Tensor
    facts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """How long a policy takes for one batch: median and 95th percentile over repeated passes, in ms.

    waited_share is the share of the time, in 0..1, that the threads were ready but had to wait for a CPU core.
    precision is that of the arithmetic: fp32, TF32 or bf16; "" in older files.
    """

    batch: int
    median_ms: float
    p95_ms: float
    images_per_s: float
    device: str
    threads: int
    waited_share: float = 0.0
    precision: str = ""

    def to_json(self) -> dict[str, JsonValue]:
        """The record as JSON can hold it, with its format number."""
        return {"format": LATENCY_FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, JsonValue]) -> Self:
        """Reads what `to_json` wrote; a record without a format number is of format 1."""
        values: dict[str, Any] = {key: value for key, value in record.items() if key != "format"}
        return cls(**values)


@dataclass(frozen=True)
class Report:
    """The results of one policy on one split; a mean is over images, each counted once whatever the number of ranks.

    loss is the mean cross-entropy in nats, None in older files and if it is not finite;
    top1, top5, ece in 0..1 (top5 is None below 5 classes); a label that shares its logit with others counts by the
    chance of drawing it among them. macs are multiply-accumulates per image; relative_macs is macs_mean over the MACs
    of the net's own forward; kind and settings are the policy's; latency has one entry per batch size; facts {name:
    mean over images, [n]}; facts_by_class {name: [K][n]}; top1_by_class [K], None for a class without images;
    unreadable lists the images that could not be read; calibration is the policy's `state()` if it is `Fitted`, from
    which the policy is restored. precision is as in `Latency`. chosen_on names the images on which the checkpoint was
    chosen among others, e.g. THESE_IMAGES, "" if that is not known or there was no choice; last_top1 is then the top-1
    of the last checkpoint, if this policy was evaluated there.
    """

    policy: str
    num_images: int
    top1: float
    top5: float | None
    ece: float
    macs_mean: float
    macs_p95: float
    relative_macs: float
    kind: str = ""
    settings: Settings = field(default_factory=dict)
    latency: Sequence[Latency] = ()
    facts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts_by_class: Mapping[str, Sequence[Sequence[float] | None]] = field(default_factory=dict)
    top1_by_class: Sequence[float | None] = ()
    unreadable: Sequence[str] = ()
    calibration: Mapping[str, JsonValue] = field(default_factory=dict)
    precision: str = ""
    chosen_on: str = ""
    last_top1: float | None = None
    loss: float | None = None

    @property
    def choice(self) -> str:
        """How the checkpoint was chosen, for people; "" if that is not known."""
        if not self.chosen_on:
            return ""
        flattered = ", which flatters these figures" if self.chosen_on == THESE_IMAGES else ""
        last = "" if self.last_top1 is None else f"; the last checkpoint has top-1 {100 * self.last_top1:.2f} %"
        return f"the best one by {self.chosen_on}{flattered}{last}"

    def to_json(self) -> dict[str, JsonValue]:
        """The report as JSON can hold it; relative_macs is stored as `full_share`, its name in files of format 1."""
        values = asdict(self)
        full_share = values.pop("relative_macs")
        return {
            "format": REPORT_FORMAT,
            **values,
            "full_share": full_share,
            "latency": [each.to_json() for each in self.latency],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, JsonValue]) -> Self:
        """Reads what `to_json` wrote. One of format 1 has no kind: `evaluation.reports_v1.read` completes it."""
        values: dict[str, Any] = {key: value for key, value in record.items() if key != "format"}
        values["relative_macs"] = values.pop("full_share")
        values["latency"] = [Latency.from_json(each) for each in values.get("latency") or ()]
        return cls(**values)


Curves = Mapping[str, Sequence[tuple[int, float]]]  # key: its (step, value), steps rising


@dataclass(frozen=True)
class Evaluated:
    """A trained net with one stored evaluation, to be compared, chosen from and drawn.

    name is unique among the nets that are shown together. details(policy) returns the stored arrays by image (rows of
    the split, labels, predicted, rank_of_truth, confidence, macs, facts.<name>, each [N] or [N, n]), or None if only
    the reports are available. curves() returns what training logged; it is empty without the run's folder. attacked
    holds evaluations of the same net on the same images under attack, by the attack's name; swept holds those at lower
    resolutions, by the sweep's name, whose policies have kind "resized". superclasses {name: classes} groups the
    classes if the user gave a grouping. seeds: of the mean of several seeds (`seed_means.mean_of`), the nets whose mean
    this is, by rising seed; empty for a net.
    """

    name: str
    family: str
    config: FamilyConfig
    recipe: Mapping[str, JsonValue]  # RunConfig
    classes: tuple[str, ...]
    data: str  # identity of the evaluated split
    side_px: int  # side of the evaluated images
    step: int
    parameters: int
    reports: Sequence[Report]
    details: Callable[[str], Arrays | None] = lambda policy: None
    curves: Callable[[], Curves] = dict
    attacked: Mapping[str, Sequence[Report]] = field(default_factory=dict)
    swept: Mapping[str, Sequence[Report]] = field(default_factory=dict)
    superclasses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seeds: Sequence[Evaluated] = ()


@runtime_checkable
class Policy(Protocol):
    """One way to run a trained net, e.g. "gates-hard", "exit-3", "160px"."""

    @property
    def name(self) -> str:
        """Unique among the net's policies; for people. Code selects by `kind` and `settings`."""
        ...

    @property
    def kind(self) -> str:
        """What the policy chooses: "resolution", "exit", "budget", "gates", ..."""
        ...

    @property
    def settings(self) -> Settings:
        """What it is set to, e.g. {"side_px": 112, "full": True}; unique among the net's policies of this kind."""
        ...

    def calibrated(self, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Policy:
        """The policy fitted on held-out batches (images [B, 3, H, W], labels [B]); itself if there is nothing to fit.

        `batches` holds this rank's share and can be iterated again; each policy of a net gets the same object.
        Collective.
        """
        ...

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        """Runs a net that is in eval mode, without gradients, on images [B, 3, H, W], skipping unneeded work.

        The caller sets eval mode and no_grad or inference_mode, once for all batches.
        """
        ...


@runtime_checkable
class Fitted(Policy, Protocol):
    """A policy whose calibration is stored with the trained net, e.g. RANet's thresholds."""

    def check(self, net: nn.Module, images: Tensor) -> None:
        """Raises ConfigError if no calibration can make the policy work on images [1, 3, H, W] of this size."""
        ...

    def state(self) -> Mapping[str, JsonValue]:
        """The result of calibration as JSON values; {} before it."""
        ...

    def restored(self, state: Mapping[str, JsonValue]) -> Policy:
        """The calibrated policy with a state that `state` returned."""
        ...


@dataclass(frozen=True)
class MeasuresOnce:
    """A base class of policies that measure something once, e.g. the MACs for images of one shape."""

    _measured: dict[Hashable, object] = field(default_factory=dict, init=False, compare=False, repr=False)

    def once(self, key: Hashable, measure: Callable[[], T]) -> T:
        """What `measure` returned at the first call with this key."""
        if key not in self._measured:
            self._measured[key] = measure()
        return cast(T, self._measured[key])


@dataclass(frozen=True)
class FixedPolicy(MeasuresOnce):
    """A base class of policies that have nothing to fit."""

    def calibrated(self, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """Returns the policy itself."""
        return self


@dataclass(frozen=True)
class Profile:
    """Numbers along a net, layer by layer: measure(net, side_px) -> [n] for images of that side.

    A sweep stores them as metrics `<name>/<place>` and draws them under the labels.
    """

    name: str
    x_label: str
    y_label: str
    measure: Callable[[nn.Module, int], Sequence[float]]


def map_sides(net: nn.Module, side_px: int) -> list[float]:
    """The longer side in pixels of each convolution's output, in the order in which they run. Sets eval mode."""
    sides: list[float] = []

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        sides.append(max(output.shape[-2:]))

    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, side_px, side_px))
    finally:
        for hook in hooks:
            hook.remove()
    return sides


MAP_SIDES = Profile("side_px", "convolution", "side, px", map_sides)


@dataclass(frozen=True)
class Family(Generic[ConfigT, OutputT]):
    """One kind of network, as callables over its own config.

    build(config, num_classes)    -> net on CPU, weights set from torch's default generator
    loss(config, output, targets, criterion)
                                  -> Loss; gets the output, never the net; targets [B] i64, or [B, K] f32 if mixed;
                                     criterion compares logits with targets, as `training.loss` says
    mean_over_images(config)      -> False if the loss is not a mean over images of a term of each, as after a square of
                                     a batch's rate. A step of several micro-batches then takes the loss of all of them
                                     at once: the output must consist of tensors [B, ...], and no parameter may be
                                     outside DDP
    groups(config, net)           -> optimizer name -> its Params; together they partition the trainable parameters
    optimizers(config)            -> the names that groups will have; "main" alone by default
    updates(config, step)         -> names of the optimizers that move at this step, in order
    layers(config, net)           -> the net's modules by depth, the one that sees the images first, the head or heads
                                     last; by default they are in the order in which they are registered
    varying(config)               -> why a training step's maps have other sizes than the last one's; None if they have
                                     the same as long as the images have
    whole(config)                 -> how the net answers with nothing left out of what training leaves out at random, so
                                     that it can teach itself; a sentence on why there is no such net
    policies(config, net)         -> the ways to run the trained net; the first one is the default
    describe(kind, settings)      -> what a policy of this kind with these settings does, in a few words for people; by
                                     default its kind; KeyError for one that its policies do not have
    load_pretrained(config, net, tensors, new_head)
                                  -> fills a fresh net from weights by name (the released code's, torchvision's, a
                                     smaller net's), as `pipeline.weights.load` does: every tensor is used, but for a
                                     head that new_head replaces, or an error lists those that do not fit; by default
                                     only our own weights, all of them
    warnings(config, side_px)     -> sentences on what is never used in training on images of at most side_px
    figures(mine, others)         -> the family's own figures of its trained nets `mine`; `others` are nets of other
                                     families that are shown beside them for comparison
    static(config, net, reports)  -> {name: images -> module} of the ways to run the net that compute the same for every
                                     image: the module maps images of the given size [B, 3, H, W] to logits [B, K], and
                                     torch.export can trace it; reports are the stored ones
    profile                       -> the numbers along a net that a sweep with `profiles: true` draws
    summary_facts                 -> names of the facts of a Prediction that a sweep's table shows beside accuracy
    adaptive                      -> False if a net computes the same for every image: others are compared with it
    """

    config: type[ConfigT]
    build: Callable[[ConfigT, int], nn.Module]
    loss: Callable[[ConfigT, OutputT, Tensor, Criterion], Loss]
    groups: Callable[[ConfigT, nn.Module], Mapping[str, Sequence[Params]]]
    updates: Callable[[ConfigT, int], Sequence[str]]
    policies: Callable[[ConfigT, nn.Module], Sequence[Policy]]
    load_pretrained: Callable[[ConfigT, nn.Module, Mapping[str, Tensor], bool], Loaded] = (
        lambda _, net, tensors, new_head: load(net, tensors)
    )
    describe: Callable[[str, Settings], str] = lambda kind, _: kind
    mean_over_images: Callable[[ConfigT], bool] = lambda _: True
    layers: Callable[[ConfigT, nn.Module], Layers] | None = None
    varying: Callable[[ConfigT], str | None] = lambda _: None
    optimizers: Callable[[ConfigT], Sequence[str]] = lambda _: ("main",)
    whole: Callable[[ConfigT], Whole | str] = lambda _: (
        "nets of this family have no cheaper way to run, which the whole net could teach"
    )
    warnings: Callable[[ConfigT, int], Sequence[str]] = lambda _, side_px: ()
    figures: Callable[[Sequence[Evaluated], Sequence[Evaluated]], Sequence[Figure]] = lambda mine, others: ()
    static: Callable[[ConfigT, nn.Module, Sequence[Report]], Mapping[str, Callable[[Tensor], nn.Module]]] = (
        lambda _, net, reports: {}
    )
    profile: Profile = MAP_SIDES
    summary_facts: Sequence[str] = ()
    adaptive: bool = True


AnyFamily: TypeAlias = "Family[Any, Any]"  # a family with any config and output types


def load_pretrained(
    family: AnyFamily, config: FamilyConfig, net: nn.Module, tensors: Mapping[str, Tensor], *, new_head: bool
) -> Loaded:
    """`family.load_pretrained` of weights that may have been saved in a wrapper of the whole net."""
    return family.load_pretrained(config, net, unwrapped(net, tensors), new_head)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy [] of logits [B, K] against classes [B] or class probabilities [B, K].

    In fp32, for logits in fp64 in fp64.
    """
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each image's label has the highest logit, [B] f32; it counts 1/n where n classes share that logit.

    logits [B, K], labels [B]; of several answers to an image [B, n, K] and [B, n] -> [B, n]. A label whose logit is not
    a number does not count.
    """
    own = logits.gather(-1, labels[..., None])
    above, level = (logits > own).sum(-1), (logits == own).sum(-1)
    return ((above == 0) & (level > 0)) / level.clamp(min=1).float()


def names() -> list[str]:
    """The names of all families: the packages of `pipeline.families`."""
    return sorted(m.name for m in pkgutil.iter_modules(_families().__path__) if m.ispkg)


def summary(name: str) -> str:
    """What the nets of a family are, in one line: that of its package."""
    return (importlib.import_module(f"{_families().__name__}.{name}").__doc__ or name).partition("\n")[0]


def find(name: str) -> AnyFamily:
    """The family with this name. Raises ConfigError naming the known ones."""
    if name not in names():
        close = get_close_matches(name, names(), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"family.name (={name}): no such family; known: {', '.join(names())}{hint}", key="family.name", subject=name
        )
    family: AnyFamily = importlib.import_module(f"{_families().__name__}.{name}").FAMILY
    return family


def described(name: str, report: Report) -> str:
    """What the policy of a report of this family does, in a few words; of one that the family does not know, its kind.

    Raises ConfigError if there is no such family.
    """
    with suppress(KeyError):
        return find(name).describe(report.kind, report.settings)
    return report.kind


def _families() -> ModuleType:
    return importlib.import_module(module("pipeline.families"))
