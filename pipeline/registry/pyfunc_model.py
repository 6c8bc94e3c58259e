"""The code of a published MLflow model. MLflow runs this file when the model is loaded; nothing is unpickled.

Input: an array uint8 [H, W, 3] or [N, H, W, 3], a list of arrays, or a table with one column `image` (or a column
without a name) of encoded images as bytes or base64 text, paths of image files, or such arrays, in JSON as nested lists
under `dataframe_records` or `dataframe_split`. Output, one row for each image: `label` and its `probability`, the
`macs` that it took, the `policy` that was used, and the `top_k` most probable `labels` with their `probabilities`.
Parameters: `policy`; or `budget`, e.g. "0.8G" MACs or "50%" of the full net, for the most accurate policy within it;
`top_k`.

A server reads no files unless it is started with the model configuration {"files": FOLDER}: then those of that folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.compat.mlflow import RequestRefused, check_params, is_serving, take_arrays
from pipeline.errors import AdaptNetError, ConfigError
from pipeline.registry.model import Answers, load_model, predict
from pipeline.registry.requests import (
    ANSWER_KEYS,
    PARAMETERS,
    Wanted,
    check_pixels,
    check_rows,
    encoded_of,
    named,
    policy_for,
    wanted,
)
from pipeline.training.loop import device_of

COLUMNS = ("image", 0, "0", "inputs")  # accepted names of the one column


class PyfuncModel(PythonModel):  # type: ignore[misc]
    """The interface through which MLflow calls the net."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the net; called once by MLflow."""
        self._model = load_model(Path(context.artifacts["model"]), device_of("auto"))
        files = (context.model_config or {}).get("files")
        self._files = Path(files) if files else None
        check_params(PARAMETERS, _checked)
        take_arrays(COLUMNS[0])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pandas.DataFrame,
        params: Mapping[str, object] | None = None,
    ) -> pandas.DataFrame:
        """Answers a table of images, one row each; threads may call it at once.

        Raises RequestRefused for input that cannot be answered.
        """
        reads = self._files is not None or not is_serving()
        try:
            values = enumerate(_column(model_input))
            images = [encoded_of(value, n, files=self._files, reads_files=reads) for n, value in values]
            check_pixels(images)
            asked = _asked(params or {})
            chosen = policy_for(self._model, asked.policy, asked.budget)
            return self._table(predict(self._model, images, chosen), chosen, asked.top_k)
        except AdaptNetError as error:
            raise _refused(error) from None

    def _table(self, answers: Answers, policy: str, top_k: int) -> pandas.DataFrame:
        rows = [tuple(row.values()) for row in named(answers, self._model.classes, policy, top_k)]
        # an object array, built at once: column by column, pandas takes three times as long
        return pandas.DataFrame(rows, columns=ANSWER_KEYS, dtype=object)


def _asked(params: Mapping[str, object]) -> Wanted:
    """The parameters; MLflow gives an empty text for one that a request does not name."""
    return wanted({key: value for key, value in params.items() if value != ""}, "params.")


def _checked(params: Mapping[str, object]) -> None:
    """Raises RequestRefused for parameters as they came, of which MLflow would drop some and convert others."""
    try:
        _asked(params)
    except AdaptNetError as error:
        raise _refused(error) from None


def _refused(error: AdaptNetError) -> RequestRefused:
    return RequestRefused(str(error), key=error.key, subject=error.subject)


def _column(table: pandas.DataFrame) -> list[object]:
    if len(table.columns) != 1 or table.columns[0] not in COLUMNS:
        columns = ", ".join(map(str, table.columns[:5])) or "none"
        raise ConfigError(f"one column `image` is expected, not: {columns}", key="image", subject=columns)
    check_rows(len(table))
    return list(table.iloc[:, 0].array)


set_model(PyfuncModel())
