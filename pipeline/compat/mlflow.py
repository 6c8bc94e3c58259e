"""The parts of MLflow that are not public: the revisions of its tables, its mark of a server, errors as it sends them.

Tried with MLflow 3.17.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow.environment_variables
import mlflow.exceptions
import mlflow.pyfunc
import mlflow.store.db.utils
import numpy as np
import pandas  # type: ignore[import-untyped]
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.types.schema import AnyType

from pipeline.compat import require

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory
    from mlflow.types import ParamSchema, Schema

TRIED = "3.17"
MIGRATIONS = Path(mlflow.__file__).parent / "store" / "db_migrations"

require("mlflow", mlflow.environment_variables, ["_MLFLOW_IS_IN_SERVING_ENVIRONMENT.get"], tried=TRIED)
require("mlflow", mlflow.store.db.utils, ["_get_latest_schema_revision"], tried=TRIED)
require("mlflow", mlflow.pyfunc, ["_enforce_params_schema", "_enforce_schema"], tried=TRIED)
require("mlflow", mlflow.exceptions, ["MlflowException.serialize_as_json"], tried=TRIED)


def is_serving() -> bool:
    """Whether this process is one of MLflow's scoring servers."""
    return bool(mlflow.environment_variables._MLFLOW_IS_IN_SERVING_ENVIRONMENT.get())


_enforce_params_schema: Callable[[object, ParamSchema | None], object] = mlflow.pyfunc._enforce_params_schema
_checks: dict[frozenset[str], Callable[[Mapping[str, object]], None]] = {}


def check_params(names: Collection[str], check: Callable[[Mapping[str, object]], None]) -> None:
    """Calls `check` with the parameters of a request to a model whose parameters are `names`, as they came.

    Without it MLflow ignores unknown parameters, with a warning in the server's log.
    """
    _checks[frozenset(names)] = check
    mlflow.pyfunc._enforce_params_schema = _checked


def _checked(params: object, schema: ParamSchema | None) -> object:
    check = _checks.get(frozenset(each.name for each in schema.params)) if schema is not None else None
    if check is not None and isinstance(params, dict):
        check(params)
    return _enforce_params_schema(params, schema)


_enforce_schema: Callable[..., object] = mlflow.pyfunc._enforce_schema


def take_arrays(column: str) -> None:
    """Lets models whose input is one column of any type take arrays as they are, as a table with this column.

    An array [N, H, W, C] is N images, another array of numbers is one image, and a list may hold several. Without it
    MLflow makes a table of an array's rows, and its error prints the whole array. A server's requests stay as they are.
    """

    def enforce(data: object, schema: Schema, flavor: str | None = None) -> object:
        ours = not is_serving() and [type(each.type) for each in schema.inputs] == [AnyType]
        images = _arrays_in(data) if ours else None
        if images is not None:
            data = pandas.DataFrame({column: pandas.Series(images, dtype=object)})
        return _enforce_schema(data, schema, flavor)

    mlflow.pyfunc._enforce_schema = enforce


def _arrays_in(data: object) -> list[object] | None:
    """The images of an array of numbers, or of a list of such arrays; None for anything else."""
    if isinstance(data, np.ndarray) and data.dtype.kind in "uifb" and data.ndim > 1:
        return list(data) if data.ndim == 4 else [data]
    of_arrays = isinstance(data, list) and data and all(isinstance(each, np.ndarray) for each in data)
    return list(data) if of_arrays and isinstance(data, list) else None


class RequestRefused(mlflow.exceptions.MlflowException):  # type: ignore[misc]
    """Becomes a 400 of MLflow's scoring server with this message.

    The server puts the whole request in front of an error's message, by assignment; this class keeps the first message.
    """

    def __init__(self, message: str, **fields: str) -> None:
        """fields: more keys of the JSON object that the server answers."""
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE, **fields)

    @property
    def message(self) -> str:
        return self._message

    @message.setter
    def message(self, text: str) -> None:
        self._message: str = getattr(self, "_message", text)


# ---- revisions of the tables


def head_revision() -> str:
    """The revision of the tables that the installed MLflow works with."""
    return str(mlflow.store.db.utils._get_latest_schema_revision())


@cache
def earlier_revisions() -> frozenset[str]:
    """The revisions that the installed MLflow would upgrade; one of a later MLflow is unknown to it."""
    revisions = {script.revision for script in _migrations().walk_revisions()}
    return frozenset(revisions - {head_revision()})


def _migrations() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(MIGRATIONS))


def revision_of(uri: str) -> str | None:
    """The revision of a database's tables; None if it has none of MLflow's."""
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.pool import NullPool

    with create_engine(uri, poolclass=NullPool).connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        row = connection.execute(text("SELECT version_num FROM alembic_version")).first()
    return str(row[0]) if row else None
