"""The cost of serving: MLflow's model against the bare net in one process, and servers under load by many clients.

Each client keeps one connection open and sends its next request when the last one has been answered.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import torch

from pipeline import config as configs
from pipeline.bench.rows import BenchRow, compare, interleave, on_threads
from pipeline.data import pixels
from pipeline.errors import ConfigError, ResourceError, without_secrets
from pipeline.execution import sockets
from pipeline.installation import CODE, HOME
from pipeline.registry import catalogue
from pipeline.registry.model import LoadedModel, load_model
from pipeline.registry.resolve import resolve

RAY = HOME / "infra" / "ray" / "serve.yaml"
START_S = 180.0


@dataclass(frozen=True)
class LoadResult:
    """A server's throughput and latencies with `clients` at once; `refused` counts answers other than 200."""

    server: str
    clients: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    refused: int


def in_process(model: str, images: Sequence[bytes], uri: str | None = None, *, rounds: int = 9) -> list[BenchRow]:
    """Images/s of MLflow's pyfunc model and of the bare net under the same policy, on one batch, decoding included."""
    folder = resolve(model, uri)
    bare = load_model(folder)
    with tempfile.TemporaryDirectory(prefix="adaptnet-bench-") as scratch, on_threads(None):
        served = _pyfunc(folder, Path(scratch) / "mlflow")
        texts = [b64encode(image).decode() for image in images]

        def by_mlflow() -> float:
            start = time.perf_counter()
            served.predict(texts)
            return len(images) / (time.perf_counter() - start)

        def by_net() -> float:
            start = time.perf_counter()
            _run(bare, images)
            return len(images) / (time.perf_counter() - start)

        runs = {"net": by_net, "pyfunc": by_mlflow}
        interleave(runs, 2)  # warms up
        return compare(interleave(runs, rounds), "pyfunc")


class _PyFunc(Protocol):
    def predict(self, data: Sequence[str]) -> object: ...


def _pyfunc(folder: Path, destination: Path) -> _PyFunc:
    """The model as MLflow loads it."""
    import mlflow.pyfunc

    from pipeline.registry.publishing import save_mlflow_model

    if not (folder / "card.json").is_file():
        raise ConfigError(
            f"{folder}: name a registered version, or a folder made by `models pull`", key="model", subject=folder
        )
    save_mlflow_model(folder, destination)
    loaded: _PyFunc = mlflow.pyfunc.load_model(str(destination))
    return loaded


def _run(model: LoadedModel, images: Sequence[bytes]) -> None:
    with model.decoding(len(images)) as decode:
        raw = decode(images)
    with torch.inference_mode():
        batch = pixels.normalise(raw, model.data_config.mean, model.data_config.std)
        model.policies[0].predict(model.net, batch).logits.softmax(1).cpu()


def servers(
    model: str, image: bytes, uri: str | None, *, clients: Sequence[int], seconds: float, names: Sequence[str]
) -> Iterator[LoadResult]:
    """Loads the servers `names` ("mlflow", "ray") one after the other, with requests of one image each."""
    place = catalogue.address(uri)
    for name in names:
        with _mlflow(model, place) if name == "mlflow" else _ray(model, place) as address:
            text = b64encode(image).decode()
            body = json.dumps({"inputs": [text]} if name == "mlflow" else {"images": [text]})
            load(name, address, body, 1, 2.0)  # warms up
            for count in clients:
                yield load(name, address, body, count, seconds)


def load(name: str, address: str, body: str, clients: int, seconds: float) -> LoadResult:
    """Sends `body` from `clients` threads for `seconds`. Raises ResourceError if no request is answered."""
    answers: list[list[tuple[float, int]]] = [[] for _ in range(clients)]
    deadline = time.perf_counter() + seconds
    threads = [threading.Thread(target=_ask, args=(address, body, deadline, each)) for each in answers]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - start
    times = np.array([seconds_taken for each in answers for seconds_taken, status in each if status == 200])
    refused = sum(status != 200 for each in answers for _, status in each)
    if not len(times):
        raise ResourceError(
            f"{name} at {address}: none of {refused} requests was answered", key="--server", subject=name
        )
    median, slow = np.percentile(times, [50, 99]) * 1e3
    return LoadResult(name, clients, len(times) / taken, float(median), float(slow), refused)


def _ask(address: str, body: str, deadline: float, answers: list[tuple[float, int]]) -> None:
    """Appends (seconds, HTTP status) of each request to `answers`; status 0 where the connection fails."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        while time.perf_counter() < deadline:
            start = time.perf_counter()
            connection.request("POST", parts.path or "/", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            answers.append((time.perf_counter() - start, answer.status))
    except OSError:
        answers.append((0.0, 0))
    finally:
        connection.close()


def _mlflow(model: str, uri: str) -> AbstractContextManager[str]:
    port = sockets.free_port()
    command = ["-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local", "--port", str(port)]
    return _started(command, {"MLFLOW_TRACKING_URI": uri}, f"http://127.0.0.1:{port}", "/ping", "/invocations")


def check_servers(names: Sequence[str]) -> None:
    """Raises ConfigError if a package of one of these servers is not installed."""
    if "ray" not in names:
        return
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        reason = str(error).partition(". ")[0]
        raise ConfigError(
            f"--server ray: Ray Serve is not installed ({reason}): pip install '.[serve]', or measure --server mlflow "
            "alone",
            key="--server",
            subject="ray",
        ) from None


@contextmanager
def _ray(model: str, uri: str) -> Iterator[str]:
    port = sockets.free_port()
    settings: dict[str, Any] = configs.read_mapping(RAY)
    settings["http_options"] |= {"host": "127.0.0.1", "port": port}
    settings["applications"][0]["args"] |= {"model": model, "uri": uri}
    with tempfile.TemporaryDirectory(prefix="adaptnet-serve-") as folder:  # readable for this user only
        path = Path(folder) / "serve.yaml"
        path.write_text(configs.dump_yaml(settings), encoding="utf-8")
        command = ["-m", "ray.serve.scripts", "run", str(path)]
        with _started(command, {"RAY_ADDRESS": "local"}, f"http://127.0.0.1:{port}", "/-/healthz", "/") as address:
            yield address


@contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str], address: str, health: str, path: str
) -> Iterator[str]:
    """Runs `python COMMAND` as a server in a process group of its own; yields the URL of `path` when it is ready."""
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(CODE), **environment}
    env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', '')}"  # mlflow starts uvicorn by its name
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + START_S
            while not _healthy(address, health):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    output = without_secrets(log.read())[-1500:]
                    raise ResourceError(
                        f"{' '.join(command[:3])} does not start: {output}", key="--server", subject=command[1]
                    )
                time.sleep(0.3)
            yield f"{address}{path}"
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process group, if it has not ended yet."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _healthy(address: str, path: str) -> bool:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
