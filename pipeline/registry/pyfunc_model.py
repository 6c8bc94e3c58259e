"""The code of a published MLflow model. MLflow runs this file when the model is loaded; nothing is pickled.

Input: one column `image` (or no name) of encoded images as bytes or base64 text, paths of image files, or uint8 arrays
[H, W, 3], in JSON as nested lists under `dataframe_records` or `dataframe_split`. Output, one row an image: `label` and
its `probability`, the `macs` it took, the `policy` it was run under, and the `top_k` likeliest `labels` with their
`probabilities`. Parameters: `policy`; or `budget`, e.g. "0.8G" MACs or "50%" of the full net, for the most accurate
policy within it; `top_k`.

A server reads no files, unless it is started with the model configuration {"files": FOLDER}, and then of that folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from threading import Lock
from typing import Any

import pandas  # type: ignore[import-untyped]
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.errors import AdaptNetError, ConfigError
from pipeline.registry.model import Answers, load_model, predict
from pipeline.registry.requests import ANSWER_KEYS, check_rows, encoded_of, named, policy_for
from pipeline.training.loop import device_of

COLUMNS = ("image", 0, "0", "inputs")  # what the one column may be called


class Served(PythonModel):  # type: ignore[misc]
    def load_context(self, context: PythonModelContext) -> None:
        self._model = load_model(Path(context.artifacts["model"]), device_of("auto"))
        files = (context.model_config or {}).get("files")
        self._files = Path(files) if files else None
        self._lock = Lock()  # MLflow's server answers in threads

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        asked = params or {}
        reads = self._files is not None or not _MLFLOW_IS_IN_SERVING_ENVIRONMENT.get()
        try:
            values = enumerate(_column(model_input))
            images = [encoded_of(value, n, files=self._files, reads_files=reads) for n, value in values]
            policy = policy_for(self._model, asked.get("policy"), asked.get("budget"))
            with self._lock:
                answers = predict(self._model, images, policy)
            return self._table(answers, policy, int(asked.get("top_k", 5)))
        except AdaptNetError as error:
            raise Refused(str(error)) from None

    def _table(self, answers: Answers, policy: str, top_k: int) -> pandas.DataFrame:
        found = named(answers, self._model.classes, policy, top_k)
        rows = [tuple(row.values()) for row in found]
        # of objects, and all at once: column by column it takes pandas three times as long
        return pandas.DataFrame(rows, columns=ANSWER_KEYS, dtype=object)


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
        found = ", ".join(map(str, table.columns[:5])) or "none"
        raise ConfigError(f"one column `image` is expected, found: {found}")
    check_rows(len(table))
    return list(table.iloc[:, 0].array)


set_model(Served())
