"""Trained nets as objects: `load` finds one by its name, `Model` classifies images under its policies.

Letters: B images, K classes, S the side of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from jobs import environment
from pipeline.deploy import evaluations, predicting
from pipeline.deploy.predicting import Classified, Predictor
from pipeline.errors import ConfigError, UndecodableError
from pipeline.evaluation.frontier import dominated, merit, parse_budget
from pipeline.registry import requests

if TYPE_CHECKING:
    Array: TypeAlias = NDArray[np.integer]

Picture: TypeAlias = "str | Path | bytes | Image.Image | Array"  # a file, its content, an image, or uint8 [H, W, 3]
Pictures: TypeAlias = "Sequence[Picture]"


@dataclass(frozen=True)
class Classification:
    """The answer for one image: its classes with their probabilities, the most probable first.

    macs: multiply-accumulates that this image took under `policy`.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    macs: float
    policy: str

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """The probability of the most probable class, in 0..1."""
        return self.probabilities[0]


@dataclass(frozen=True)
class FrontierPoint:
    """A policy that no other policy of the net beats.

    top1: accuracy in 0..1 on the images of the evaluation. macs: mean multiply-accumulates of an image. share: those
    as a share of the full net's.
    """

    policy: str
    top1: float
    macs: float
    share: float


@dataclass(frozen=True)
class Model:
    """A trained net, ready to classify. `load` makes it.

    >>> model = adaptnet.load("runs/toy")
    >>> [answer.policy for answer in model.predict(["picture.jpg", "picture.jpg"], policy=model.policies[0])]
    ['gates-hard', 'gates-hard']
    """

    source: str
    _predictor: Predictor = field(repr=False)

    @property
    def module(self) -> nn.Module:
        """The net itself, in eval mode on its device, to be fine-tuned or looked into.

        It takes images [B, 3, S, S] f32, normalised as by `tensor`, and returns a dataclass with `logits` [B, K].
        Training it changes what `predict` answers; stored evaluations are then those of another net.

        >>> output = model.module(model.tensor(["picture.jpg"]))
        >>> output.logits.shape[1] == len(model.classes)
        True
        """
        return self._predictor.model.net

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the K classes, in the order of the logits."""
        return self._predictor.model.classes

    @property
    def policies(self) -> tuple[str, ...]:
        """The names of the net's policies, the default first.

        >>> model.policies
        ('gates-hard', 'gates-sampled', 'gates-0.3', 'gates-0.7')
        """
        return tuple(self._predictor.policies)

    def frontier(self) -> list[FrontierPoint]:
        """The policies that no other one beats, by their stored evaluation; the cheapest first.

        Raises ConfigError if no evaluation is stored.

        >>> points = model.frontier()
        >>> [point.macs for point in points] == sorted(point.macs for point in points)
        True
        """
        reports = self._predictor.reports
        if not reports:
            raise evaluations.no_evaluation(self.source)
        beaten = dominated([each.macs_mean for each in reports], [merit(each.kind, each.top1) for each in reports])
        best = [each for each, worse in zip(reports, beaten, strict=True) if not worse]
        points = (FrontierPoint(each.policy, each.top1, each.macs_mean, each.relative_macs) for each in best)
        return sorted(points, key=lambda point: point.macs)

    @overload
    def predict(  # type: ignore[overload-overlap]  # a text is a sequence of texts
        self,
        images: Picture,
        *,
        policy: str | None = None,
        budget: str | float | None = None,
        top: int = 5,
        batch_size: int = 64,
    ) -> Classification: ...

    @overload
    def predict(
        self,
        images: Pictures,
        *,
        policy: str | None = None,
        budget: str | float | None = None,
        top: int = 5,
        batch_size: int = 64,
    ) -> list[Classification]: ...

    def predict(
        self,
        images: Picture | Pictures,
        *,
        policy: str | None = None,
        budget: str | float | None = None,
        top: int = 5,
        batch_size: int = 64,
    ) -> Classification | list[Classification]:
        """Classifies one image, or each of a list, as `adaptnet predict` does.

        An image is the path of a file, the bytes of one, a PIL image, or an array [H, W, 3] of whole numbers in 0..255.
        policy: the name of one of `policies`. budget: the most accurate policy within it answers; MACs per image as
        0.8e9 or "0.8G", a time here as "5ms", or a share of the whole net's MACs as "50%". Without either the default
        policy answers. top: the number of classes in an answer. Raises ConfigError for an argument that has no meaning
        or a budget that no policy meets, UndecodableError naming the positions of images that cannot be read.

        >>> model.predict(["picture.jpg"], budget="0.001%")
        Traceback (most recent call last):
        pipeline.errors.ConfigError: budget (=0.001%): every policy costs more; the cheapest is ...
        """
        _check_limits(policy, budget, top, batch_size)
        given, single = _listed(images)
        encoded = _all_encoded(given)
        within = None if budget is None else parse_budget(str(budget))
        chosen = self._predictor.choose(within, policy, encoded).policy
        answers = list(self._predictor.answers(encoded, chosen, top=top, batch_size=batch_size))
        good = [each for each in answers if isinstance(each, Classified)]
        if len(good) < len(answers):
            reasons = {at: each.reason for at, each in enumerate(answers) if not isinstance(each, Classified)}
            raise UndecodableError(len(answers), reasons)
        named = [Classification(each.labels, each.probabilities, each.macs, chosen) for each in good]
        return named[0] if single else named

    def tensor(self, images: Pictures) -> Tensor:
        """The images as the net takes them in an evaluation: [B, 3, S, S] f32, resized, cropped and normalised.

        Raises UndecodableError naming the positions of images that cannot be read.
        """
        given, _ = _listed(images)
        return self._predictor.prepared(_all_encoded(given))


def load(source: str | Path, *, uri: str | None = None, device: str = "auto", zoo: str | Path | None = None) -> Model:
    """The trained net that `source` names.

    source: the folder of a run (its best checkpoint), of a checkpoint, or of `adaptnet models pull`;
    "models:/NAME@ALIAS" or "models:/NAME/VERSION" of the registry; or "zoo:NAME". uri: the registry; default:
    MLFLOW_TRACKING_URI, else runs/mlflow.db. device: auto, cpu or cuda. zoo: the folder of the zoo's nets; default:
    those that are shipped. Raises ConfigError if nothing has this name, CheckpointError if its files are damaged.

    >>> adaptnet.load("runs/toi")
    Traceback (most recent call last):
    pipeline.errors.ConfigError: runs/toi: no such folder; give the folder of a run or of a checkpoint, ...
    """
    if not isinstance(source, str | Path):
        message = f"source (={source!r:.60}): a text or a path is expected, not a {type(source).__name__}"
        raise ConfigError(message, key="source", subject=repr(source)[:60])
    environment.spare_loopback()
    nets = None if zoo is None else Path(zoo)
    where = uri or environment.tracking_uri()
    return Model(str(source), predicting.load(str(source), where, device=device, nets=nets, evaluated=False))


def _check_limits(policy: str | None, budget: str | float | None, top: int, batch_size: int) -> None:
    if policy is not None and budget is not None:
        raise ConfigError(
            f"budget (={budget}) and policy (={policy}) both choose a policy; give only one of them",
            keys=("budget", "policy"),
            subject=budget,
        )
    for key, value in (("top", top), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{key} (={value!r:.40}): a whole number of 1 or more is expected", key=key, subject=value
            )


def _listed(images: Picture | Pictures) -> tuple[list[Picture], bool]:
    """The images as a list, and whether a single one was given."""
    if isinstance(images, str | Path | bytes | Image.Image | np.ndarray):
        return [images], True
    if isinstance(images, list | tuple):
        return list(images), False
    raise ConfigError(
        f"images: a path, bytes, a PIL image, an array [H, W, 3], or a list of these is expected, not a "
        f"{type(images).__name__}",
        key="images",
        subject=type(images).__name__,
    )


def _all_encoded(images: Sequence[Picture]) -> list[Path | bytes]:
    """The images as files or as the content of some. Raises UndecodableError for images that Pillow cannot read."""
    encoded: list[Path | bytes] = []
    reasons: dict[int, str] = {}
    for position, each in enumerate(images):
        try:
            encoded.append(_encoded(each, position))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's for a truncated, a closed and a broken image
            reasons[position] = f"Pillow cannot read it ({error})"
    if reasons:
        raise UndecodableError(len(images), reasons)
    return encoded


def _encoded(image: Picture, position: int) -> Path | bytes:
    """The image as a file or as the content of one."""
    if isinstance(image, str | Path):
        return Path(image)
    if isinstance(image, Image.Image):
        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return image if isinstance(image, bytes) else requests.encoded_of(image, position)
