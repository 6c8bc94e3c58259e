"""The code of a published MLflow model. MLflow runs this file when the model is loaded; nothing is pickled.

Input: one column `image` (or no name) of encoded images as bytes or base64 text, paths of image files, or uint8 arrays
[H, W, 3], in JSON as nested lists under `dataframe_records` or `dataframe_split`. Output, one row an image: `label` and
its `probability`, the `macs` it took, the `policy` it was run under, and the `top_k` likeliest `labels` with their
`probabilities`. Parameters: `policy`; or `budget`, e.g. "0.8G" MACs or "50%" of the full net, for the most accurate
policy within it; `top_k`.

A server reads no files, unless it is started with the model configuration {"files": FOLDER}, and then of that folder.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from pipeline import registry
from pipeline.data.encoded import EXTENSIONS, MAX_PIXELS
from pipeline.errors import AdaptNetError, ConfigError
from pipeline.family import Report
from pipeline.frontier import best_within, parse_budget
from pipeline.training.loop import device_of

MAX_ROWS = 1024  # images of a request
COLUMNS = ("image", 0, "0", "inputs")  # what the one column may be called


class Served(PythonModel):  # type: ignore[misc]
    def load_context(self, context: PythonModelContext) -> None:
        self._model = registry.load_model(Path(context.artifacts["model"]), device_of("auto"))
        self._files = (context.model_config or {}).get("files") or None
        self._lock = Lock()  # MLflow's server answers in threads

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        asked = params or {}
        try:
            images = [self._bytes(value, position) for position, value in enumerate(_column(model_input))]
            policy = self._policy(asked)
            with self._lock:
                answers = registry.predict(self._model, images, policy)
        except AdaptNetError as error:
            raise Refused(str(error)) from None
        return self._table(answers, policy, int(asked.get("top_k", 5)))

    def _policy(self, asked: Mapping[str, Any]) -> str:
        policy, budget = asked.get("policy") or None, asked.get("budget") or None
        if policy and budget:
            raise ConfigError(f"params.policy (={policy}) and params.budget (={budget}) both choose: give one of them")
        if not budget:
            return str(policy or self._model.policies[0].name)
        wanted = parse_budget(str(budget))
        if wanted.unit == "ms":
            raise ConfigError(f"params.budget (={budget}): a served net takes MACs, as 0.8G, or a share, as 50%")
        reports = [Report(**report) for report in self._model.card.get("reports", ())]
        if not reports:
            raise ConfigError(
                f"params.budget (={budget}): this net was registered without an evaluation; give a policy"
            )
        return reports[best_within(reports, [wanted.cost_of(report) for report in reports], wanted)].policy

    def _table(self, answers: registry.Answers, policy: str, top_k: int) -> pandas.DataFrame:
        if top_k < 1:
            raise Refused(f"params.top_k (={top_k}) must be 1 or more")
        order = (-answers.probabilities).argsort(axis=1, kind="stable")[:, :top_k]
        labels = [[self._model.classes[index] for index in row] for row in order]
        probabilities = [answers.probabilities[i, row].tolist() for i, row in enumerate(order)]
        return pandas.DataFrame(
            {
                "label": [row[0] for row in labels],
                "probability": [row[0] for row in probabilities],
                "macs": answers.macs,
                "policy": policy,
                "labels": labels,
                "probabilities": probabilities,
            }
        )

    def _bytes(self, value: Any, position: int) -> bytes:
        """An image's encoded bytes. Text that ends as image files do is a path, other text is base64."""
        if isinstance(value, bytes | bytearray | memoryview):
            raw = bytes(value)
            return raw if raw[:1] >= b"\x80" else _decoded(raw) or raw  # JPEG and PNG begin above ASCII
        if isinstance(value, np.ndarray | list):
            return _encoded(value, position)
        if not isinstance(value, str):
            raise ConfigError(
                f"image {position}: encoded bytes, base64 text, a path or a uint8 array [H, W, 3] is expected, found "
                f"{type(value).__name__}"
            )
        if Path(value[-16:]).suffix.lower() in EXTENSIONS:
            return self._read(value, position)
        decoded = _decoded(value.encode())
        if decoded is None:
            raise ConfigError(f"image {position}: this text is neither base64 nor the path of an image file")
        return decoded

    def _read(self, text: str, position: int) -> bytes:
        path, below = Path(text), self._files
        if below is None and _MLFLOW_IS_IN_SERVING_ENVIRONMENT.get():
            raise ConfigError(f"image {position}: this server reads no files; send the image itself, as base64")
        path = path if below is None else Path(below) / path
        if below is not None and not path.resolve().is_relative_to(Path(below).resolve()):
            raise ConfigError(f"image {position}: this server reads files of one folder alone; give a path within it")
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"image {position}: {text} cannot be read ({error.strerror})") from None


class Refused(MlflowException):  # type: ignore[misc]
    """A 400 of MLflow's scoring server that says what is wrong, without the request: MLflow would put it in front."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return self._message

    @message.setter
    def message(self, text: str) -> None:
        self._message = re.sub(r"^Failed to predict data .*\nError: ", "", str(text), flags=re.DOTALL)


def _column(table: pandas.DataFrame) -> list[Any]:
    if len(table.columns) != 1 or table.columns[0] not in COLUMNS:
        raise Refused(f"one column `image` is expected, found: {', '.join(map(str, table.columns[:5])) or 'none'}")
    if len(table) > MAX_ROWS:
        raise Refused(f"a request holds at most {MAX_ROWS:,} images, this one {len(table):,}: send them in several")
    return list(table.iloc[:, 0])


def _decoded(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _encoded(value: Any, position: int) -> bytes:
    """A PNG of an array, so that it is resized and cropped as every other image."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)  # rows of unequal length
    whole = array.dtype == np.uint8 or (array.dtype.kind in "iu" and bool(((array >= 0) & (array <= 255)).all()))
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape or not whole:
        raise ConfigError(
            f"image {position}: an array [H, W, 3] of whole numbers from 0 to 255 is expected, found "
            f"{list(array.shape)} of {array.dtype}; in JSON it goes under dataframe_records or dataframe_split, for "
            "MLflow spreads what stands under inputs over columns"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ConfigError(f"image {position}: {array.shape[:2]} is above the limit of {MAX_PIXELS:,} pixels")
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


set_model(Served())
