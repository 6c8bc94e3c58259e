"""The registered net behind `mlflow models serve`: inputs, outputs, and no request that ends the process."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import fuzz
import numpy as np
import pandas
import pytest
from mlflow_here import database
from PIL import Image
from test_promoting import make_run

from pipeline.data import toy
from pipeline.registry.model import load_model, predict
from pipeline.registry.publishing import publish_run
from pipeline.registry.resolve import resolve
from pipeline.tracking import sync

pytestmark = [pytest.mark.server, pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")]


SECTION = {  # of a net that does less work at a lower resolution, whatever the image
    "name": "arrn",
    "ladder_px": [32, 16],
    "widths": [12, 24],
    "inner": ["F2x1"],
    "final": "M2x1",
    "head_width": 32,
    "level_weights": [1, 1],
    "resolutions_px": [16],
}
COSTLY, CHEAP = "32px", "16px"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry whose models:/gated@champion has two policies of different cost."""
    home = tmp_path_factory.mktemp("served")
    root = toy.make(home / "images", num_classes=3, train=12, val=12, side_px=32, seed=3)
    make_run(home / "runs" / "mine", root, 1, section=SECTION)
    shutil.copyfile(database().path, home / "runs" / "mlflow.db")
    run_dir, uri = home / "runs" / "mine", f"sqlite:///{home}/runs/mlflow.db"
    path = run_dir / "evaluations" / "final" / "reports.json"
    found = json.loads(path.read_text())
    found[0] |= {"policy": CHEAP, "top1": 0.5, "macs_mean": 1e6, "full_share": 0.5}
    found[1] |= {"policy": COSTLY, "top1": 0.6, "macs_mean": 2e6, "full_share": 1.0}
    path.write_text(json.dumps(found))
    publish_run(run_dir, "gated", run_id=sync(run_dir).run_id, uri=uri, alias="champion")
    return uri


@pytest.fixture(scope="module")
def address(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow models serve`; its processes are the same ones at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/gated@champion"]
    words += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # mlflow starts uvicorn by name
    folder = tmp_path_factory.mktemp("serving")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while subprocess.run(["curl", "-sf", f"http://127.0.0.1:{port}/ping"], capture_output=True).returncode:
            assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.3)
        workers = worker_ids(process.pid)
        yield f"http://127.0.0.1:{port}"
        assert worker_ids(process.pid) == workers and process.poll() is None, (folder / "log").read_text()
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def worker_ids(group: int) -> set[int]:
    """The processes of a group."""
    lines = subprocess.run(["ps", "-eo", "pid,pgid"], capture_output=True, text=True, check=True).stdout.split("\n")[1:]
    return {int(line.split()[0]) for line in lines if line.split()[1:] == [str(group)]}


def ask(address: str, body: Any, folder: Path) -> tuple[int, Any]:
    """Status and answer of a plain curl; of a refused request the whole object."""
    (folder / "body.json").write_text(body if isinstance(body, str) else json.dumps(body))
    words = ["curl", "-s", "-w", "\n%{http_code}", "-H", "Content-Type: application/json", "--data-binary"]
    words += [f"@{folder / 'body.json'}", f"{address}/invocations"]
    text, _, code = subprocess.run(words, capture_output=True, text=True, timeout=600).stdout.rpartition("\n")
    answer = json.loads(text)
    return int(code), answer.get("predictions", answer)


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (48, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGES = [jpeg((250, 20, 20)), jpeg((10, 240, 90)), jpeg((0, 0, 0))]
TEXTS = [base64.b64encode(image).decode() for image in IMAGES]


def large() -> str:
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000)).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


LARGE = large()


def bomb() -> dict[str, list[str]]:
    """A complete PNG of 3.6 gigapixels in half a megabyte."""
    side, rows_at_once = 60_000, 100

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer, blank = zlib.compressobj(1), bytes(rows_at_once * (1 + side // 8))
    packed = b"".join(packer.compress(blank) for _ in range(side // rows_at_once)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    encoded = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    assert len(encoded) < 3_000_000
    return {"inputs": [base64.b64encode(encoded).decode()]}


def many() -> dict[str, list[str]]:
    return {"inputs": ["AA=="] * 1_000_000}


def test_a_plain_curl_is_answered_with_the_policy_or_budget_it_names(uri: str, address: str, tmp_path: Path) -> None:
    model = load_model(resolve("models:/gated@champion", uri))
    for params, policy in (
        ({}, COSTLY),
        ({"policy": CHEAP}, CHEAP),
        ({"budget": "100%"}, COSTLY),
        ({"budget": "1.5M"}, CHEAP),
    ):
        code, rows = ask(address, {"inputs": TEXTS, "params": params}, tmp_path)
        assert code == 200, rows
        wanted = predict(model, IMAGES, policy)
        assert [row["policy"] for row in rows] == [policy] * 3
        assert [row["macs"] for row in rows] == pytest.approx(wanted.macs)
        assert [row["probability"] for row in rows] == pytest.approx(wanted.probabilities.max(1), abs=1e-5)
    costly, cheap = (predict(model, IMAGES, name).macs.mean() for name in (COSTLY, CHEAP))
    assert cheap < 0.6 * costly  # the policies do differ in what they compute


def test_arrays_and_records_are_accepted_as_images(uri: str, address: str, tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    bodies = [
        {"inputs": [text]},
        {"instances": [text]},
        {"dataframe_records": [{"image": array.tolist()}]},
        {"dataframe_split": {"columns": ["image"], "data": [[text]]}},
    ]
    answers = [ask(address, body, tmp_path) for body in bodies]
    assert [code for code, _ in answers] == [200] * 4, answers
    assert [rows for _, rows in answers] == [answers[0][1]] * 4
    code, refused = ask(address, {"inputs": [array.tolist()]}, tmp_path)
    assert code == 400 and refused["key"] == "image"


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"inputs": ["%%%"]}, "image"),
        ({"inputs": [TEXTS[0], TEXTS[1][:400]]}, "images"),
        ({"inputs": [base64.b64encode(b"GIF89a").decode()]}, "images"),
        (bomb, "images"),
        (many, "images"),
        ({"inputs": []}, None),
        ({"inputs": [7]}, "image"),
        ({"inputs": [None]}, "image"),
        ({"dataframe_records": [{"image": [[[1, 2, 300]]]}]}, "image"),
        ({"dataframe_records": [{"image": [[[1, 2]]]}]}, "image"),
        ({"inputs": TEXTS, "params": {"policy": "warp"}}, ANY),
        ({"inputs": TEXTS, "params": {"budget": "1k"}}, ANY),
        ({"inputs": TEXTS, "params": {"budget": "much"}}, ANY),
        ({"inputs": TEXTS, "params": {"budget": "5ms"}}, "params.budget"),
        ({"inputs": TEXTS, "params": {"policy": COSTLY, "budget": "1G"}}, "params.budget"),
        ({"inputs": TEXTS, "params": {"top_k": 0}}, "params.top_k"),
        *(
            ({"inputs": TEXTS, "params": {"policy": odd}}, "params.policy")
            for odd in (0, False, 5, math.nan, [COSTLY], {})
        ),
        *(({"inputs": TEXTS, "params": {"budget": odd}}, "params.budget") for odd in (0, False, 1e6, math.nan, ["1G"])),
        *(
            ({"inputs": TEXTS, "params": {"top_k": odd}}, "params.top_k")
            for odd in (True, 2.5, "5", math.nan, [5], 10**30)
        ),
        ({"inputs": TEXTS, "params": {"polcy": COSTLY}}, "params.polcy"),
        ({"inputs": TEXTS, "params": {"Budget": "1G"}}, "params.Budget"),
        ({"inputs": TEXTS, "params": [COSTLY]}, None),
        ({"inputs": [LARGE] * 17}, "images"),
        ({"inputs": ["/etc/passwd.png"]}, "image"),
        ({"dataframe_records": [{"x": TEXTS[0], "y": 1}]}, "image"),
        ({"pictures": TEXTS}, None),
        ("{", None),
    ],
    ids=lambda each: each[:40] if isinstance(each, str) else "body",
)
def test_wrong_input_is_a_400_that_names_the_key(address: str, tmp_path: Path, body: Any, key: object) -> None:
    """None: MLflow refuses it before our code runs."""
    code, refused = ask(address, body() if callable(body) else body, tmp_path)
    assert code == 400 and refused.get("key") == key, (code, str(refused)[:500])
    assert "Traceback" not in refused["message"] and 0 < len(refused["message"]) < 5_000
    assert ask(address, {"inputs": TEXTS[:1]}, tmp_path)[0] == 200


def test_paths_and_arrays_are_accepted_in_process(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    place = resolve("models:/gated@champion", uri).parents[1]
    model = mlflow.pyfunc.load_model(str(place))
    (tmp_path / "one.jpg").write_bytes(IMAGES[0])
    wanted = model.predict(pandas.DataFrame({"image": [IMAGES[0]]}))
    assert model.predict([str(tmp_path / "one.jpg")]).equals(wanted)
    array = np.zeros((40, 48, 3), np.uint8)
    assert model.predict(pandas.DataFrame({"image": [array, array]})).label.nunique() == 1
    pixels = np.random.default_rng(2).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    rows = model.predict(pandas.DataFrame({"image": list(pixels)}))
    assert model.predict(pixels).equals(rows) and model.predict(list(pixels)).equals(rows)
    assert model.predict(pixels[0]).equals(rows[:1])
    for wrong in (pixels[0, :, :, 0], pixels[..., :2], pixels / 255.0, [pixels[0], pixels[0, 0]]):
        with pytest.raises(mlflow.MlflowException) as refused:
            model.predict(wrong)
        assert refused.value.json_kwargs["key"] == "image" and len(str(refused.value)) < 500
    assert model.metadata.signature.inputs is not None and model.input_example is not None
    with pytest.raises(mlflow.MlflowException) as refused:
        model.predict([str(tmp_path / "nothing.jpg")])
    assert refused.value.json_kwargs["key"] == "image"
    below = mlflow.pyfunc.load_model(str(place), model_config={"files": str(tmp_path)})
    assert below.predict(["one.jpg"]).equals(wanted)
    with pytest.raises(mlflow.MlflowException) as refused:
        below.predict(["../one.jpg"])
    assert refused.value.json_kwargs["key"] == "image"


@pytest.mark.faults
def test_a_random_body_is_answered_or_a_400_that_names_a_key_and_ends_nothing(address: str) -> None:
    """500 bodies, half of them damaged bytes; the fixture compares the server's processes."""
    whole = {"inputs": TEXTS[:2], "params": {"policy": CHEAP}}
    for seed in range(500):
        draw = random.Random(seed)
        body = json.dumps(fuzz.request(draw, whole)).encode("utf-8", "replace")
        body = fuzz.mutated(draw, body) if draw.random() < 0.5 else body
        kind = draw.choice(["application/json", "application/json", "application/json; charset=utf-8", "text/csv", "x"])
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                code, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            code, text = error.code, error.read()
        assert code in (200, 400, 415), f"seed {seed}: {code} {body[:300]!r} {text[-500:]!r}"
        ours = b"pipeline/" in text or (b"Traceback" in text and "json" in kind)
        assert not ours or code == 200, f"seed {seed}: {text[-1000:]!r}"  # MLflow adds its own trace to refused CSV
