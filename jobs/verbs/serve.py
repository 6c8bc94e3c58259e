"""Serves a registered net with Ray Serve (infra/ray/serve.yaml). `serve run` starts it; it is not a verb.

POST {"images": [base64, ...], "policy": ... or "budget": "50%", "top_k": 5}. The response is {"predictions": [...]} in
the format of MLflow's server, or {"message": ...} with status 400. Concurrent requests for one policy are batched.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from pipeline.errors import AdaptNetError
from pipeline.registry.model import load_model
from pipeline.registry.requests import Answer, ServedRequest, answers, parse_request
from pipeline.registry.resolve import resolve
from pipeline.training.loop import device_of


@serve.deployment(name="Net")
class ServedNet:
    """A Ray Serve replica that batches concurrent requests.

    model: models:/NAME@ALIAS, a run's folder, or a folder made by `adaptnet models pull`.
    uri: tracking server of models:/; by default runs/mlflow.db.
    most: largest number of images in one pass.
    wait_ms: how long a request waits for others to share its pass.
    """

    def __init__(self, model: str, uri: str | None = None, most: int = 64, wait_ms: float = 5.0) -> None:
        self._model, self._most = load_model(resolve(model, uri), device_of("auto")), most
        self._together.set_max_batch_size(most)
        self._together.set_batch_wait_timeout_s(wait_ms / 1000)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005, max_concurrent_batches=2)  # type: ignore[untyped-decorator]
    async def _together(self, waiting: list[ServedRequest]) -> list[Answer]:
        """Of two batches at once, one is decoded while the net computes the other."""
        return await asyncio.to_thread(answers, self._model, waiting, self._most)

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            body = await request.body()
            asked = await asyncio.to_thread(lambda: parse_request(self._model, json.loads(body)))
        except (AdaptNetError, ValueError, RecursionError) as error:
            return JSONResponse({"message": str(error)}, status_code=400)
        answer = await self._together(asked)
        if isinstance(answer, AdaptNetError):
            return JSONResponse({"message": str(answer)}, status_code=400)
        return JSONResponse({"predictions": answer})


def app(arguments: Mapping[str, str | int | float | None]) -> serve.Application:
    """The application of infra/ray/serve.yaml; its `args` are the arguments of `ServedNet`."""
    return ServedNet.bind(**arguments)  # type: ignore[attr-defined]
