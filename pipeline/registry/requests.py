"""Requests to a served net: the forms in which images may be given, and the choice of the policy."""

from __future__ import annotations

import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

from pipeline.data.image_headers import EXTENSIONS, MAX_PIXELS, upright_size
from pipeline.errors import AdaptNetError, ConfigError, JsonValue, UndecodableError
from pipeline.evaluation import reports_v1
from pipeline.evaluation.frontier import best_within, parse_budget
from pipeline.registry.model import Answers, LoadedModel, predict

MAX_ROWS = 1024  # images in one request
MAX_REQUEST_PIXELS = 2**28  # of all images of one request; some seconds of decoding on one core
PARAMETERS = {
    "policy": "the name of a policy",
    "budget": 'a text such as "0.8G" MACs or "50%" of the full net',
    "top_k": "a whole number of labels, 1 or more",
}
SUFFIXES = tuple(EXTENSIONS)


def check_rows(count: int) -> None:
    """Raises ConfigError if one request holds too many images."""
    if count > MAX_ROWS:
        raise ConfigError(
            f"a request holds at most {MAX_ROWS:,} images, this one {count:,}: send them in several requests",
            key="images",
            subject=count,
        )


@dataclass(frozen=True)
class Wanted:
    """What a request asks for beside its images: a policy or a budget, and how many labels of each image."""

    policy: str | None = None
    budget: str | None = None
    top_k: int = 5


def wanted(given: Mapping[str, object], section: str = "") -> Wanted:
    """The checked parameters of a request; None is as good as absent. section: what precedes a key in an error.

    Raises ConfigError for an unknown key, and for a value that is not of its kind, as 0 or false for a policy.
    """
    unknown = [f"{section}{key}" for key in sorted(set(map(str, given)) - set(PARAMETERS))]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: no such parameter; known: {', '.join(PARAMETERS)}", keys=tuple(unknown)
        )
    present = {key: value for key, value in given.items() if value is not None}
    texts = {key: _text(section + key, present[key], PARAMETERS[key]) for key in ("policy", "budget") if key in present}
    top_k = present.get("top_k", Wanted.top_k)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k < 2**31:
        key = f"{section}top_k"
        raise ConfigError(f"{key} (={top_k!r:.40}): {PARAMETERS['top_k']} is expected", key=key, subject=top_k)
    return Wanted(**texts, top_k=top_k)


def _text(key: str, value: object, what: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise ConfigError(f"{key} (={value!r:.40}): {what} is expected", key=key, subject=value)


def policy_for(model: LoadedModel, policy: str | None, budget: str | None) -> str:
    """The given policy, else the most accurate one within the budget, else the net's default.

    Registered versions call it with these arguments. Raises ConfigError if both are given, the policy is unknown, or
    none is within the budget.
    """
    if policy and budget:
        raise ConfigError(
            f"params.policy (={policy}) and params.budget (={budget}) both choose a policy: give one of them",
            key="params.budget",
            subject=budget,
        )
    known = [each.name for each in model.policies]
    if policy:
        if policy not in known:
            message = f"policy (={policy:.40}): this net has: {', '.join(known)}"
            raise ConfigError(message, keys=("params.policy", "policy"), subject=policy)
        return policy
    if not budget:
        return model.policies[0].name
    within = parse_budget(budget)
    if within.unit == "ms":
        raise _bad_budget(budget, "a served net accepts MACs, as in 0.8G, or a share, as in 50%")
    reports = [reports_v1.read(report) for report in model.stored_reports]
    if not reports:
        raise _bad_budget(budget, "this net was registered without an evaluation; give a policy")
    return reports[best_within(reports, [within.cost_of(report) for report in reports], within)].policy


def _bad_budget(budget: str, why: str) -> ConfigError:
    return ConfigError(f"params.budget (={budget}): {why}", key="params.budget", subject=budget)


def check_pixels(images: Sequence[bytes]) -> None:
    """Raises ConfigError if the images of one request have too many pixels in all, by their headers."""
    sizes = [upright_size(each) or (0, 0) for each in images]
    total = sum(height * width for height, width in sizes)
    if total > MAX_REQUEST_PIXELS:
        raise ConfigError(
            f"a request holds images of at most {MAX_REQUEST_PIXELS:,} pixels in all, this one {total:,}: send them in "
            "several requests, or smaller",
            key="images",
            subject=total,
        )


def encoded_of(value: object, position: int, *, files: Path | None = None, reads_files: bool = False) -> bytes:
    """The encoded bytes of an image given as bytes, as base64 text, as an array [H, W, 3], or as the path of a file.

    Text that ends with an image file's suffix is a path; it is read only if `reads_files` is on, and only below `files`
    if that is given. Raises ConfigError, naming the image by its position, for anything else.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
        return raw if raw[:1] >= b"\x80" else _decoded(raw) or raw  # JPEG and PNG begin above ASCII
    if isinstance(value, np.ndarray | list):
        return _as_png(value, position)
    if not isinstance(value, str):
        raise _bad_image(
            position,
            f"encoded bytes, base64 text, a path or a uint8 array [H, W, 3] is expected, not {type(value).__name__}",
        )
    if value[-5:].lower().endswith(SUFFIXES):
        return _read(value, position, files, reads_files)
    decoded = _decoded(value.encode())
    if decoded is None:
        raise _bad_image(position, "this text is neither base64 nor the path of an image file")
    return decoded


def _read(text: str, position: int, below: Path | None, reads_files: bool) -> bytes:
    if not reads_files:
        raise _bad_image(position, "this server reads no files; send the image itself, as base64")
    path = Path(text) if below is None else below / text
    if below is not None and not path.resolve().is_relative_to(below.resolve()):
        raise _bad_image(position, "this server reads only files of one folder; give a path within it")
    try:
        return path.read_bytes()
    except OSError as error:
        raise _bad_image(position, f"{text} cannot be read ({error.strerror})") from None


def _bad_image(position: int, why: str) -> ConfigError:
    return ConfigError(f"image {position}: {why}", key="image", subject=position)


class ImageAnswer(TypedDict):
    """The answer for one image: the most probable label, and the top_k labels with their probabilities."""

    label: str
    probability: float
    macs: float
    policy: str
    labels: list[str]
    probabilities: list[float]


ANSWER_KEYS = tuple(ImageAnswer.__annotations__)


def named(answers: Answers, classes: Sequence[str], policy: str, top_k: int) -> list[ImageAnswer]:
    """An answer for each image. Raises ConfigError if top_k is below 1."""
    if top_k < 1:
        raise ConfigError(f"params.top_k (={top_k}) must be 1 or more", key="params.top_k", subject=top_k)
    order = (-answers.probabilities).argsort(axis=1, kind="stable")[:, :top_k]
    return [
        _image_answer(row[places].tolist(), [classes[place] for place in places], float(macs), policy)
        for row, macs, places in zip(answers.probabilities, answers.macs, order, strict=True)
    ]


def _image_answer(probabilities: list[float], labels: list[str], macs: float, policy: str) -> ImageAnswer:
    return ImageAnswer(
        label=labels[0],
        probability=probabilities[0],
        macs=macs,
        policy=policy,
        labels=labels,
        probabilities=probabilities,
    )


def _decoded(text: bytes) -> bytes | None:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None


def _as_png(value: object, position: int) -> bytes:
    """The array as a PNG, so that it is resized and cropped like every other image."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)  # rows of unequal length
    whole = array.dtype == np.uint8 or (array.dtype.kind in "iu" and bool(((array >= 0) & (array <= 255)).all()))
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape or not whole:
        raise _bad_image(
            position,
            f"an array [H, W, 3] of whole numbers from 0 to 255 is expected, not "
            f"{list(array.shape)} of {array.dtype}; in MLflow's JSON an array goes under dataframe_records or "
            "dataframe_split, because an array under inputs is spread over columns",
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _bad_image(position, f"{array.shape[:2]} is above the limit of {MAX_PIXELS:,} pixels")
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


# ---- concurrent requests


@dataclass(frozen=True)
class ServedRequest:
    """One request after its check: encoded images, and the policy that answers them."""

    images: Sequence[bytes]
    policy: str
    top_k: int


Answer = list[ImageAnswer] | AdaptNetError  # the answer to one request


def parse_request(model: LoadedModel, body: JsonValue) -> ServedRequest:
    """The request in a decoded JSON body. Raises ConfigError if it cannot be answered."""
    values = body.get("images") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(values, list) or not values:
        raise ConfigError('send a JSON object with "images", a list of base64 texts', key="images")
    asked = wanted({key: value for key, value in body.items() if key != "images"})
    policy = policy_for(model, asked.policy, asked.budget)
    check_rows(len(values))
    images = [encoded_of(value, position) for position, value in enumerate(values)]
    check_pixels(images)
    return ServedRequest(images, policy, asked.top_k)


def answers(model: LoadedModel, requests: Sequence[ServedRequest], most: int) -> list[Answer]:
    """One answer for each request; requests of the same policy share passes of at most `most` images.

    An image that cannot be decoded fails its own request only.
    """
    every: list[Answer] = [[] for _ in requests]
    for policy in {request.policy for request in requests}:
        places = [place for place, request in enumerate(requests) if request.policy == policy]
        for place, answer in zip(places, _of_policy(model, [requests[place] for place in places], most), strict=True):
            every[place] = answer
    return every


def _of_policy(model: LoadedModel, requests: Sequence[ServedRequest], most: int) -> list[Answer]:
    images = [image for request in requests for image in request.images]
    try:
        every = predict(model, images, requests[0].policy, batch_size=most)
    except UndecodableError as error:
        return [error] if len(requests) == 1 else [_of_policy(model, [each], most)[0] for each in requests]
    split: list[Answer] = []
    start = 0
    for request in requests:
        rows = slice(start, start + len(request.images))
        mine = Answers(every.probabilities[rows], every.macs[rows])
        split.append(named(mine, model.classes, request.policy, request.top_k))
        start = rows.stop
    return split
