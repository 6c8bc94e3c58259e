"""Concurrent requests to a served net: each is answered as if it were the only one, and fails alone."""

from __future__ import annotations

import base64
import io
import json
import math
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image
from raised import fails
from test_promoting import make_run
from test_served import CHEAP, COSTLY, IMAGES, SECTION, TEXTS, bomb

from jobs.cli import main
from pipeline.bench import serving
from pipeline.data import toy
from pipeline.errors import ConfigError, ResourceError, UndecodableError
from pipeline.family import Report
from pipeline.registry.model import LoadedModel, load_model, predict, write_model_folder
from pipeline.registry.requests import answers, parse_request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    home = tmp_path_factory.mktemp("requests")
    root = toy.make(home / "images", num_classes=3, train=12, val=12, side_px=32, seed=3)
    make_run(home / "run", root, 1, section=SECTION)
    reports = [Report(COSTLY, 10, 0.6, None, 0.0, 2e6, 2e6, 1.0), Report(CHEAP, 10, 0.5, None, 0.0, 1e6, 1e6, 0.5)]
    checkpoint = next((home / "run" / "checkpoints").iterdir())
    return write_model_folder(checkpoint, reports, home / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


def test_concurrent_requests_are_answered_like_single_ones(model: LoadedModel) -> None:
    bodies: list[Any] = [
        {"images": TEXTS[:2]},
        {"images": TEXTS, "budget": "50%", "top_k": 1},
        {"images": TEXTS[2:], "policy": COSTLY},
        {"images": TEXTS[:1], "policy": CHEAP},
    ]
    requests = [parse_request(model, body) for body in bodies]
    assert [request.policy for request in requests] == [COSTLY, CHEAP, COSTLY, CHEAP]
    found = answers(model, requests, most=4)
    for body, answer in zip(bodies, found, strict=True):
        (alone,) = answers(model, [parse_request(model, body)], most=64)
        assert isinstance(answer, list) and isinstance(alone, list) and len(answer) == len(body["images"])
        for mine, other in zip(answer, alone, strict=True):
            assert {**mine, "probability": 0, "probabilities": 0} == {**other, "probability": 0, "probabilities": 0}
            assert np.allclose(mine["probabilities"], other["probabilities"], atol=1e-6)
    assert len(found[1][0]["labels"]) == 1  # type: ignore[index]


def test_a_bad_image_fails_only_its_own_request(model: LoadedModel) -> None:
    broken = base64.b64encode(IMAGES[0][:300]).decode()
    bodies = [{"images": TEXTS[:1]}, {"images": [TEXTS[1], broken]}, {"images": TEXTS[2:]}]
    good, bad, other = answers(model, [parse_request(model, body) for body in bodies], most=64)
    assert isinstance(good, list) and isinstance(other, list)
    assert isinstance(bad, UndecodableError) and set(bad.reasons) == {1}


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ([], "images"),
        ({"images": []}, "images"),
        ({"images": ["%"]}, "image"),
        ({"images": ["/etc/a.png"]}, "image"),
        ({"images": ["AA=="] * 1025}, "images"),
        ({"images": ["AA=="], "polcy": "x"}, "polcy"),
        ({"images": ["AA=="], "top_k": "3"}, "top_k"),
        ({"images": ["AA=="], "policy": "warp"}, "policy"),
        ({"images": ["AA=="], "budget": "5ms"}, "params.budget"),
        *(({"images": ["AA=="], "policy": odd}, "policy") for odd in (0, False, 1.5, math.nan, "", " ", [COSTLY], {})),
        *(({"images": ["AA=="], "budget": odd}, "budget") for odd in (0, False, True, 5e8, math.nan, "", ["50%"], {})),
        *(
            ({"images": ["AA=="], "budget": odd}, "budget")
            for odd in ("0", "-5%", "nan", "inf", "0.8", "1e9G", "５０％")
        ),
        *(({"images": ["AA=="], "top_k": odd}, "top_k") for odd in (0, -1, True, 2.0, math.nan, "5", [5], {}, 10**30)),
        ({"images": "AA=="}, "images"),
        ({"images": {"a": "AA=="}}, "images"),
        ({"images": [math.nan]}, "image"),
        ({"images": [False]}, "image"),
        ({"images": [{"b64": "AA=="}]}, "image"),
        ({"images": [[1, 2, 3]]}, "image"),
        ({"images": [[[[10**30, 0, 0]]]]}, "image"),
        ({"images": [[[[math.nan, 0, 0]]]]}, "image"),
        ({"images": ["AA=="], "policy": COSTLY, "budget": "50%"}, "params.budget"),
        ({"images": ["AA=="], "Policy": COSTLY}, "Policy"),
        ({"images": ["AA=="], "params": {"policy": COSTLY}}, "params"),
        (math.nan, "images"),
        ("images", "images"),
        (None, "images"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_by_its_key(model: LoadedModel, body: Any, key: str) -> None:
    with fails(ConfigError, key):
        parse_request(model, body)


def test_null_parameters_are_as_good_as_absent(model: LoadedModel) -> None:
    request = parse_request(model, {"images": ["AA=="], "policy": None, "budget": None, "top_k": None})
    assert (request.policy, request.top_k) == (COSTLY, 5)


def png(width: int, height: int) -> bytes:
    """A black picture; a large one is small as a file."""
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_a_request_with_too_many_pixels_in_all_is_refused_unread(model: LoadedModel) -> None:
    each = base64.b64encode(png(4000, 4000)).decode()
    assert len(parse_request(model, {"images": [each] * 16}).images) == 16
    with fails(ConfigError, "images", subject=17 * 4000 * 4000):
        parse_request(model, {"images": [each] * 17})


def test_small_requests_are_answered_while_another_one_decodes(model: LoadedModel) -> None:
    small, large = [base64.b64decode(TEXTS[0])], [png(12000, 12000)]
    wanted = predict(model, small)
    thread = threading.Thread(target=predict, args=(model, large))
    thread.start()
    answered = 0
    while thread.is_alive():
        found = predict(model, small)
        answered += thread.is_alive()
        assert np.array_equal(found.probabilities, wanted.probabilities)
    assert answered > 1


def test_concurrent_threads_get_the_answers_of_one(model: LoadedModel) -> None:
    wanted = [predict(model, [image]).probabilities for image in IMAGES]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda turn: predict(model, [IMAGES[turn % 3]]).probabilities, range(48)))
    assert all(np.allclose(each, wanted[turn % 3], atol=1e-6) for turn, each in enumerate(found))


def test_a_budget_below_every_policy_is_refused(model: LoadedModel) -> None:
    with pytest.raises(ConfigError):
        parse_request(model, {"images": ["AA=="], "budget": "1k"})


class Slow(BaseHTTPRequestHandler):
    """Answers after 20 ms; every tenth request with 503."""

    protocol_version = "HTTP/1.1"
    counted = threading.Lock()
    count = 0

    def do_POST(self) -> None:
        with self.counted:
            type(self).count += 1
            number = type(self).count
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.02)
        self.send_response(503 if number % 10 == 0 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


def test_load_counts_answers_and_their_times() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = serving.load("slow", f"http://127.0.0.1:{server.server_port}/", json.dumps({}), 4, 1.0)
    finally:
        server.shutdown()
    assert found.clients == 4 and 20 <= found.p50_ms <= found.p99_ms
    assert found.refused == Slow.count // 10 and 0 < found.requests_per_s <= 4 * 0.9 / 0.02
    with pytest.raises(ResourceError):
        serving.load("away", "http://127.0.0.1:9/", "{}", 2, 0.2)


def test_the_error_of_a_server_that_does_not_start_holds_no_password() -> None:
    words = ["-c", "import os, sys; sys.exit(os.environ['PLACE'])"]
    with (
        pytest.raises(ResourceError) as found,
        serving._started(words, {"PLACE": "http://me:hush@host/x"}, "http://127.0.0.1:9", "/", "/"),
    ):
        pass
    assert "http://host/x" in str(found.value) and "hush" not in str(found.value)


def test_a_missing_ray_serve_is_refused_before_anything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    (tmp_path / "one.jpg").write_bytes(IMAGES[0])
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", str(folder), str(tmp_path / "one.jpg")])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == "" and printed.err
    serving.check_servers(["mlflow"])


def test_the_net_and_its_pyfunc_model_are_measured_alternately(folder: Path) -> None:
    net, pyfunc = serving.in_process(str(folder), IMAGES, rounds=1)
    assert (net.name, pyfunc.name, pyfunc.peer) == ("net", "pyfunc", "net")
    assert pyfunc.ratio is not None and pyfunc.ratio == pytest.approx(pyfunc.rate / net.rate)


def test_ray_serve_answers_and_refuses(folder: Path) -> None:
    """Ray Serve itself, as infra/ray/serve.yaml starts it; only if the extra `serve` is installed."""
    pytest.importorskip("ray.serve", exc_type=ImportError, reason="needs ray[serve]: pip install '.[serve]'")
    with serving._ray(str(folder), "sqlite:////nowhere.db") as address:
        many = serving.load("ray", address, json.dumps({"images": TEXTS[:1], "budget": "50%"}), 8, 2.0)
        assert many.refused == 0
        for body in (
            '{"images": ["%"]}',
            json.dumps({"images": [TEXTS[0], TEXTS[1][:400]]}),
            json.dumps({"images": ["AA=="] * 1_000_000}),
            json.dumps({"images": bomb()["inputs"]}),
            '{"images": ' + "[" * 100_000,
            "{",
        ):
            code, answer = post(address, body)
            assert code == 400 and answer["message"], (code, answer)
        code, answer = post(address, json.dumps({"images": TEXTS, "budget": "50%"}))
        assert code == 200 and [row["policy"] for row in answer["predictions"]] == [CHEAP] * 3


def post(address: str, body: str) -> tuple[int, Any]:
    """Status and answer."""
    try:
        with urllib.request.urlopen(address, body.encode(), timeout=300) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)
