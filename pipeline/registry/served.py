"""The code of a published MLflow model. MLflow runs this file when the model is loaded; nothing is pickled.

Input: one column of encoded images, as bytes or base64 text. Output, one row an image: `label` and its `probability`,
the `macs` it took, and the `top_k` likeliest `labels` with their `probabilities`. Parameters: `policy`, `top_k`.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline import registry
from pipeline.errors import AdaptNetError
from pipeline.training.loop import device_of


class Served(PythonModel):  # type: ignore[misc]
    def load_context(self, context: PythonModelContext) -> None:
        self._model = registry.load_model(Path(context.artifacts["model"]), device_of("auto"))

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        asked = params or {}
        images = [_bytes(value, position) for position, value in enumerate(_column(model_input))]
        try:
            answers = registry.predict(self._model, images, asked.get("policy"))
        except AdaptNetError as error:
            raise _refused(str(error)) from None
        return self._table(answers, int(asked.get("top_k", 5)))

    def _table(self, answers: registry.Answers, top_k: int) -> pandas.DataFrame:
        if top_k < 1:
            raise _refused(f"params.top_k (={top_k}) must be 1 or more")
        order = (-answers.probabilities).argsort(axis=1, kind="stable")[:, :top_k]
        labels = [[self._model.classes[index] for index in row] for row in order]
        probabilities = [answers.probabilities[i, row].tolist() for i, row in enumerate(order)]
        return pandas.DataFrame(
            {
                "label": [row[0] for row in labels],
                "probability": [row[0] for row in probabilities],
                "macs": answers.macs,
                "labels": labels,
                "probabilities": probabilities,
            }
        )


def _column(table: pandas.DataFrame) -> list[Any]:
    if len(table.columns) != 1:
        raise _refused(f"one column of images is expected, found {len(table.columns)}: {list(table.columns)[:5]}")
    return list(table.iloc[:, 0])


def _bytes(value: Any, position: int) -> bytes:
    """An image's bytes; text, and what MLflow's server makes of text under "inputs", is base64."""
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
        return raw if raw[:1] >= b"\x80" else _decoded(raw) or raw  # JPEG and PNG begin above ASCII
    if not isinstance(value, str):
        raise _refused(f"image {position}: encoded bytes or base64 text is expected, found {type(value).__name__}")
    decoded = _decoded(value.encode())
    if decoded is None:
        raise _refused(f"image {position}: this text is not base64")
    return decoded


def _decoded(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _refused(message: str) -> MlflowException:
    """Becomes a 400 of MLflow's scoring server."""
    return MlflowException.invalid_parameter_value(message)


set_model(Served())
