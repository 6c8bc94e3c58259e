"""A registered net as a Ray Serve application (infra/ray/serve.yaml); `serve run` starts it, it is no verb.

POST {"images": [base64 …], "policy": … or "budget": "50%", "top_k": 5}; the answer is {"predictions": [...]}, as
MLflow's server gives it, or {"message": …} with status 400. Requests that come at once share their passes, those of
one policy each.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from pipeline import registry
from pipeline.errors import AdaptNetError
from pipeline.registry.requests import Answer, Asked, answers, asked_of
from pipeline.training.loop import device_of


@serve.deployment
class Net:
    def __init__(self, model: str, uri: str | None = None, most: int = 64, wait_ms: float = 5.0) -> None:
        self._model, self._most = registry.load_model(registry.resolve(model, uri), device_of("auto")), most
        self._together.set_max_batch_size(most)
        self._together.set_batch_wait_timeout_s(wait_ms / 1000)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def _together(self, waiting: list[Asked]) -> list[Answer]:
        return await asyncio.to_thread(answers, self._model, waiting, self._most)

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            asked = asked_of(self._model, json.loads(await request.body()))
        except (AdaptNetError, ValueError, RecursionError) as error:
            return JSONResponse({"message": str(error)}, status_code=400)
        answer = await self._together(asked)
        if isinstance(answer, AdaptNetError):
            return JSONResponse({"message": str(answer)}, status_code=400)
        return JSONResponse({"predictions": answer})


def app(arguments: Mapping[str, Any]) -> Any:
    """The application of infra/ray/serve.yaml; `args` there are Net's."""
    return Net.bind(**arguments)
