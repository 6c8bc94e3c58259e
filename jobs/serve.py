"""A registered net as a Ray Serve application (infra/ray/serve.yaml); `serve run` starts it, it is no verb.

POST {"images": [base64 …], "policy": … or "budget": "50%", "top_k": 5}; the answer is {"predictions": [...]}, as
MLflow's server gives it, or {"message": …} with status 400. Requests that come at once share their passes, those of
one policy each.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from pipeline import registry
from pipeline.errors import AdaptNetError, ConfigError, UndecodableError
from pipeline.registry import LoadedModel
from pipeline.training.loop import device_of


@dataclass(frozen=True)
class Asked:
    """One request, checked: its encoded images and the policy they are run under."""

    images: Sequence[bytes]
    policy: str
    top_k: int


Answer = list[dict[str, Any]] | AdaptNetError


def asked_of(model: LoadedModel, body: Any) -> Asked:
    """Raises ConfigError, in a sentence, for what cannot be answered."""
    if not isinstance(body, dict) or not isinstance(body.get("images"), list) or not body["images"]:
        raise ConfigError('send a JSON object with "images", a list of base64 texts')
    unknown = set(body) - {"images", "policy", "budget", "top_k"}
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: no such key; known: images, policy, budget, top_k")
    registry.check_rows(len(body["images"]))
    top_k = body.get("top_k", 5)
    if not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k (={top_k}) must be a whole number, 1 or more")
    images = [registry.encoded_of(value, position) for position, value in enumerate(body["images"])]
    texts = {key: str(body[key]) if body.get(key) else None for key in ("policy", "budget")}
    policy = registry.policy_for(model, **texts)
    if policy not in {each.name for each in model.policies}:
        raise ConfigError(f"policy {policy}: this net has: {', '.join(each.name for each in model.policies)}")
    return Asked(images, policy, top_k)


def answers(model: LoadedModel, together: Sequence[Asked], most: int) -> list[Answer]:
    """One for each request, those of a policy in common passes; what cannot be decoded spoils its own request alone."""
    found: list[Answer] = [[] for _ in together]
    for policy in {asked.policy for asked in together}:
        places = [place for place, asked in enumerate(together) if asked.policy == policy]
        for place, answer in zip(places, _of_policy(model, [together[place] for place in places], most), strict=True):
            found[place] = answer
    return found


def _of_policy(model: LoadedModel, together: Sequence[Asked], most: int) -> list[Answer]:
    images = [image for asked in together for image in asked.images]
    try:
        every = registry.predict(model, images, together[0].policy, batch_size=most)
    except UndecodableError as error:
        return [error] if len(together) == 1 else [_of_policy(model, [asked], most)[0] for asked in together]
    found: list[Answer] = []
    start = 0
    for asked in together:
        rows = slice(start, start + len(asked.images))
        mine = registry.Answers(every.probabilities[rows], every.macs[rows])
        found.append(registry.named(mine, model.classes, asked.policy, asked.top_k))
        start = rows.stop
    return found


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
        except (AdaptNetError, ValueError) as error:
            return JSONResponse({"message": str(error)}, status_code=400)
        answer = await self._together(asked)
        if isinstance(answer, AdaptNetError):
            return JSONResponse({"message": str(answer)}, status_code=400)
        return JSONResponse({"predictions": answer})


def app(arguments: Mapping[str, Any]) -> Any:
    """The application of infra/ray/serve.yaml; `args` there are Net's."""
    return Net.bind(**arguments)
