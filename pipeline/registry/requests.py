"""What a request to a served net may hold: images in several forms, and which policy they are run under."""

from __future__ import annotations

import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.image_headers import EXTENSIONS, MAX_PIXELS
from pipeline.errors import AdaptNetError, ConfigError, UndecodableError
from pipeline.evaluation import reports_v1
from pipeline.evaluation.frontier import best_within, parse_budget
from pipeline.registry.model import Answers, LoadedModel, predict

MAX_ROWS = 1024  # images of a request
SUFFIXES = tuple(EXTENSIONS)


def check_rows(count: int) -> None:
    """Raises ConfigError for more images than one request may hold."""
    if count > MAX_ROWS:
        raise ConfigError(f"a request holds at most {MAX_ROWS:,} images, this one {count:,}: send them in several")


def policy_for(model: LoadedModel, policy: str | None, budget: str | None) -> str:
    """The policy asked for, else the most accurate one within the budget, else the net's default.

    Raises ConfigError where both are given, or no policy is within the budget.
    """
    if policy and budget:
        raise ConfigError(f"params.policy (={policy}) and params.budget (={budget}) both choose: give one of them")
    if not budget:
        return policy or model.policies[0].name
    wanted = parse_budget(budget)
    if wanted.unit == "ms":
        raise ConfigError(f"params.budget (={budget}): a served net takes MACs, as 0.8G, or a share, as 50%")
    reports = [reports_v1.read(report) for report in model.card.get("reports", ())]
    if not reports:
        raise ConfigError(f"params.budget (={budget}): this net was registered without an evaluation; give a policy")
    return reports[best_within(reports, [wanted.cost_of(report) for report in reports], wanted)].policy


def encoded_of(value: Any, position: int, *, files: Path | None = None, reads_files: bool = False) -> bytes:
    """An image's encoded bytes: given as such, as base64 text, as an array [H, W, 3], or as a file's path.

    Text that ends as image files do is a path; it is read where `reads_files` is on, and only below `files` if that
    is given. Raises ConfigError, naming the image by its position, for anything else.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
        return raw if raw[:1] >= b"\x80" else _decoded(raw) or raw  # JPEG and PNG begin above ASCII
    if isinstance(value, np.ndarray | list):
        return _as_png(value, position)
    if not isinstance(value, str):
        raise ConfigError(
            f"image {position}: encoded bytes, base64 text, a path or a uint8 array [H, W, 3] is expected, found "
            f"{type(value).__name__}"
        )
    if value[-5:].lower().endswith(SUFFIXES):
        return _read(value, position, files, reads_files)
    decoded = _decoded(value.encode())
    if decoded is None:
        raise ConfigError(f"image {position}: this text is neither base64 nor the path of an image file")
    return decoded


def _read(text: str, position: int, below: Path | None, reads_files: bool) -> bytes:
    if not reads_files:
        raise ConfigError(f"image {position}: this server reads no files; send the image itself, as base64")
    path = Path(text) if below is None else below / text
    if below is not None and not path.resolve().is_relative_to(below.resolve()):
        raise ConfigError(f"image {position}: this server reads files of one folder alone; give a path within it")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"image {position}: {text} cannot be read ({error.strerror})") from None


ANSWER_KEYS = ("label", "probability", "macs", "policy", "labels", "probabilities")


def named(answers: Answers, classes: Sequence[str], policy: str, top_k: int) -> list[dict[str, Any]]:
    """An answer for each image, with ANSWER_KEYS: the likeliest label, and the top_k with their probabilities."""
    if top_k < 1:
        raise ConfigError(f"params.top_k (={top_k}) must be 1 or more")
    order = (-answers.probabilities).argsort(axis=1, kind="stable")[:, :top_k]
    found = []
    for row, macs, places in zip(answers.probabilities, answers.macs, order, strict=True):
        labels, probabilities = [classes[place] for place in places], row[places].tolist()
        values = (labels[0], probabilities[0], float(macs), policy, labels, probabilities)
        found.append(dict(zip(ANSWER_KEYS, values, strict=True)))
    return found


def _decoded(text: bytes) -> bytes | None:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None


def _as_png(value: Any, position: int) -> bytes:
    """A PNG of an array, so that it is resized and cropped as every other image."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)  # rows of unequal length
    whole = array.dtype == np.uint8 or (array.dtype.kind in "iu" and bool(((array >= 0) & (array <= 255)).all()))
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape or not whole:
        raise ConfigError(
            f"image {position}: an array [H, W, 3] of whole numbers from 0 to 255 is expected, found "
            f"{list(array.shape)} of {array.dtype}; in MLflow's JSON it goes under dataframe_records or "
            "dataframe_split, for what stands under inputs is spread over columns"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ConfigError(f"image {position}: {array.shape[:2]} is above the limit of {MAX_PIXELS:,} pixels")
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


# ---- many requests at once


@dataclass(frozen=True)
class ServedRequest:
    """One request, checked: its encoded images and the policy they are run under."""

    images: Sequence[bytes]
    policy: str
    top_k: int


Answer = list[dict[str, Any]] | AdaptNetError


def parse_request(model: LoadedModel, body: Any) -> ServedRequest:
    """Raises ConfigError, in a sentence, for what cannot be answered."""
    if not isinstance(body, dict) or not isinstance(body.get("images"), list) or not body["images"]:
        raise ConfigError('send a JSON object with "images", a list of base64 texts')
    unknown = set(body) - {"images", "policy", "budget", "top_k"}
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: no such key; known: images, policy, budget, top_k")
    check_rows(len(body["images"]))
    top_k = body.get("top_k", 5)
    if not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k (={top_k}) must be a whole number, 1 or more")
    images = [encoded_of(value, position) for position, value in enumerate(body["images"])]
    texts = {key: str(body[key]) if body.get(key) else None for key in ("policy", "budget")}
    policy = policy_for(model, **texts)
    if policy not in {each.name for each in model.policies}:
        raise ConfigError(f"policy {policy}: this net has: {', '.join(each.name for each in model.policies)}")
    return ServedRequest(images, policy, top_k)


def answers(model: LoadedModel, together: Sequence[ServedRequest], most: int) -> list[Answer]:
    """One for each request, those of a policy in common passes; what cannot be decoded spoils its own request alone."""
    found: list[Answer] = [[] for _ in together]
    for policy in {asked.policy for asked in together}:
        places = [place for place, asked in enumerate(together) if asked.policy == policy]
        for place, answer in zip(places, _of_policy(model, [together[place] for place in places], most), strict=True):
            found[place] = answer
    return found


def _of_policy(model: LoadedModel, together: Sequence[ServedRequest], most: int) -> list[Answer]:
    images = [image for asked in together for image in asked.images]
    try:
        every = predict(model, images, together[0].policy, batch_size=most)
    except UndecodableError as error:
        return [error] if len(together) == 1 else [_of_policy(model, [asked], most)[0] for asked in together]
    found: list[Answer] = []
    start = 0
    for asked in together:
        rows = slice(start, start + len(asked.images))
        mine = Answers(every.probabilities[rows], every.macs[rows])
        found.append(named(mine, model.classes, asked.policy, asked.top_k))
        start = rows.stop
    return found
