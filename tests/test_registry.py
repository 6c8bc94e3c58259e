"""The registry: a version is created once, loads anywhere without a pickle, and is refused if it was changed."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from mlflow_here import database, finish, run_folder, server, tracking_events
from PIL import Image
from raised import fails

from jobs.cli import main
from pipeline import config as configs
from pipeline import family as families
from pipeline.errors import CheckpointError, ConfigError, ResourceError, UndecodableError
from pipeline.family import Report
from pipeline.registry import cards, catalogue, publishing
from pipeline.registry import session as sessions
from pipeline.registry.model import describe, load_model, predict, write_model_folder
from pipeline.registry.publishing import publish_run, register_best
from pipeline.registry.resolve import resolve
from pipeline.runs.records import Meta
from pipeline.tracking import TrackingConfig, Uploader, connect, sync
from pipeline.training import checkpoint

SECTION = {"name": "convnet_aig", "depth": 14}
CLASSES = ["cat", "dog", "emu"]
REPORTS = [Report("native", 10, 0.9, None, 0.01, 3e7, 4e7, 1.0), Report("other", 10, 0.8, None, 0.01, 1e7, 2e7, 0.5)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint whose moving average differs from its net."""
    run_dir, recipe = run_folder(tmp_path_factory.mktemp("trained") / "runs" / "aig")
    recipe |= {"family": SECTION, "data": {"root": "/nowhere", "side_px": 32, "eval_resize_px": 32}}
    (run_dir / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    family = families.find(SECTION["name"])
    torch.manual_seed(1)
    nets = [family.build(configs.validate(family.config, SECTION, "test"), len(CLASSES)) for _ in range(2)]
    meta = Meta(step=7, recipe=recipe, fingerprint={"seed": 1, "data.identity": "abc"}, classes=tuple(CLASSES))
    mapping = {"net": nets[0].state_dict(), "ema": nets[1].state_dict(), "step": 7}
    checkpoint.write(run_dir / "checkpoints" / "step-00000007", mapping, meta)
    (run_dir / publishing.FINAL).mkdir(parents=True)
    (run_dir / publishing.FINAL / "reports.json").write_text(json.dumps([r.to_json() for r in REPORTS]))
    finish(run_dir, best="step-00000007")
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, with an empty registry beside it."""
    shutil.copytree(trained, tmp_path / "runs" / "aig")
    shutil.copyfile(database().path, tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs" / "aig"


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGES = [jpeg((250, 20, 20)), jpeg((10, 240, 90)), jpeg((0, 0, 0))]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)


# --- the folder


def test_a_model_folder_holds_the_moving_average_and_predicts_like_it(trained: Path, tmp_path: Path) -> None:
    source = trained / "checkpoints" / "step-00000007"
    folder = write_model_folder(source, REPORTS, tmp_path / "model")
    assert (folder / "net.safetensors").read_bytes() == (source / "ema.safetensors").read_bytes()
    before = torch.get_rng_state()
    model = load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.net.training and model.classes == tuple(CLASSES) and model.data_config.side_px == 32
    answers = predict(model, IMAGES, batch_size=2)
    again = predict(load_model(source), IMAGES)
    assert answers.probabilities.shape == (3, 3) and answers.probabilities.sum(1) == pytest.approx(1)
    assert np.allclose(answers.probabilities, again.probabilities, atol=1e-6)
    assert (answers.macs > 0).all() and model.card["step"] == 7 and model.card["data"] == "abc"
    net, family, config, _ = checkpoint.load_net(source)
    assert all(
        torch.equal(a, b) for a, b in zip(model.net.state_dict().values(), net.state_dict().values(), strict=True)
    )
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]
    assert family.policies(config, net)[0].name == model.policies[0].name


def test_exchanged_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    source = trained / "checkpoints" / "step-00000007"
    folder = write_model_folder(source, REPORTS, tmp_path / "model")
    shutil.copyfile(source / "net.safetensors", folder / "net.safetensors")  # whole, of equal size, another net's
    with fails(CheckpointError, "net.safetensors"):
        load_model(folder)
    (folder / "net.safetensors").unlink()
    with fails(CheckpointError, "net.safetensors"):
        load_model(folder)
    (folder / "card.json").write_text("{}")
    with fails(CheckpointError, "card.json"):
        load_model(folder)
    with fails(ResourceError, "destination", subject=trained):
        write_model_folder(source, REPORTS, trained)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    with open(broken / "ema.safetensors", "rb+") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError):
        write_model_folder(broken, REPORTS, tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


def test_images_that_cannot_be_decoded_are_named_by_position(trained: Path) -> None:
    model = load_model(trained / "checkpoints" / "step-00000007")
    with fails(UndecodableError, "images", subject="1"):
        predict(model, [IMAGES[0], IMAGES[0][:300], IMAGES[1]])
    with fails(UndecodableError, "images", subject="1, 3") as found:
        predict(model, [IMAGES[0], b"", IMAGES[1], b"no image"], batch_size=2)
    assert set(found.value.reasons) == {1, 3} and pickle.loads(pickle.dumps(found.value)).reasons == found.value.reasons
    with pytest.raises(ConfigError):
        predict(model, IMAGES, "warp")


# --- versions

FRESH_PROCESS = """
import base64, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/aig@candidate")
images = [base64.b64decode(text) for text in sys.argv[2:]]
table = model.predict(pandas.DataFrame({"image": images}))
same = [model.predict(images), model.predict(sys.argv[2:]), model.predict(images, params={"top_k": 1})]
assert [each.label.tolist() for each in same] == [table.label.tolist()] * 3
assert [len(row) for row in same[2].probabilities] == [1] * len(images)
from mlflow.pyfunc import scoring_server
import json
def ask(body):
    try:
        schema = model.metadata.get_input_schema()
        answer = scoring_server.invocations(json.dumps(body), "application/json", model, schema)
        return [row["label"] for row in json.loads(answer.response)["predictions"]]
    except mlflow.MlflowException as error:
        return error.get_http_status_code(), error.json_kwargs.get("key")
for body in ({"inputs": sys.argv[2:]}, {"dataframe_records": [{"image": text} for text in sys.argv[2:]]}):
    assert ask(body) == table.label.tolist(), ask(body)
for body, key in (
    ({"inputs": ["%%%"]}, "image"),
    ({"inputs": sys.argv[2:], "params": {"budget": "5ms"}}, "params.budget"),
    ({"pictures": sys.argv[2:]}, None),  # refused by MLflow itself
):
    assert ask(body) == (400, key), ask(body)
import pipeline
print(table.to_json(orient="records"))
print(pipeline.__file__)
"""


@pytest.mark.long
def test_a_version_runs_in_a_process_of_its_own(run_dir: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{run_dir.parent}/mlflow.db"
    run_id = sync(run_dir).run_id
    version = publish_run(run_dir, "aig", run_id=run_id, uri=uri)
    assert version is not None and version.version == 1
    encoded = [base64.b64encode(image).decode() for image in IMAGES]
    words = [sys.executable, "-c", FRESH_PROCESS, uri, *encoded]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    table, code = done.stdout.splitlines()[-2:]
    model = load_model(run_dir / "checkpoints" / "step-00000007")
    answers = predict(model, IMAGES)
    for row, probabilities, macs in zip(json.loads(table), answers.probabilities, answers.macs, strict=True):
        assert row["label"] == CLASSES[probabilities.argmax()] and row["macs"] == macs
        assert row["probabilities"] == pytest.approx(sorted(probabilities.tolist(), reverse=True), abs=1e-5)
    assert code.startswith(str(tmp_path))  # the code stored with the version, not the installed one
    place = resolve("models:/aig@candidate", uri)
    assert not [path for path in place.parents[1].rglob("*") if path.suffix in (".pkl", ".pt")]
    assert load_model(place).card["weights"]["sha256"] == version.tags["adaptnet.weights_sha256"]


def test_publishing_twice_or_after_a_kill_creates_one_version(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{run_dir.parent}/mlflow.db"
    run_id = sync(run_dir).run_id
    client = connect(uri)
    died = 0
    while True:  # ends before its n-th call, for n = 1, 2, ...
        monkeypatch.setattr(sessions, "connect", lambda uri, n=died + 1: Mortal(client, n))
        try:
            version = publish_run(run_dir, "aig", run_id=run_id, uri=uri)
            break
        except MemoryError:
            died += 1
    monkeypatch.undo()
    assert version is not None and died >= 5
    assert publish_run(run_dir, "aig", run_id=run_id, uri=uri) == version
    assert version.tags["adaptnet.seed"] == "1" and "=" in version.tags["adaptnet.net"]
    run = client.get_run(run_id)
    (output,) = run.outputs.model_outputs  # once, whenever the process was killed
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert (logged.model_id, logged.source_run_id, str(logged.status)) == (output.model_id, run_id, "READY")
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "aig", "version": "1"}]
    assert client.get_model_version("aig", "1").source == logged.artifact_location
    assert [(v.version, v.aliases) for v in catalogue.versions(uri)] == [(1, ("candidate",))]
    other = client.create_run(client.get_run(run_id).info.experiment_id).info.run_id
    newer = publish_run(run_dir, "aig", run_id=other, uri=uri)
    assert newer is not None and newer.version == 2
    publish_run(run_dir, "aig", run_id=run_id, uri=uri)
    assert catalogue.lookup("models:/aig@candidate", uri).version == 2  # publishing an old run again moves no alias


def test_of_two_concurrent_publishers_one_creates_the_version(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{run_dir.parent}/mlflow.db"
    run_id = sync(run_dir).run_id
    client, other = connect(uri), list[Any]()
    monkeypatch.setattr(sessions, "connect", lambda uri: Overtaken(client, overtake))

    def overtake() -> None:
        monkeypatch.setattr(sessions, "connect", connect)
        other.append(publish_run(run_dir, "aig", run_id=run_id, uri=uri))

    mine = publish_run(run_dir, "aig", run_id=run_id, uri=uri)
    assert mine is not None and mine.version == 1 and [mine] == other
    assert [(v.version, v.aliases) for v in catalogue.versions(uri)] == [(1, ("candidate",))]
    assert load_model(resolve("models:/aig/1", uri))


class Overtaken:
    """A client that lets another process publish first, just before it uploads."""

    def __init__(self, client: Any, overtake: Callable[[], None]) -> None:
        self._client, self._overtake = client, [overtake]

    def __getattr__(self, name: str) -> Any:
        if name == "log_model_artifacts" and self._overtake:
            self._overtake.pop()()
        return getattr(self._client, name)


class Mortal:
    """A client whose n-th call ends the process."""

    def __init__(self, client: Any, n: int) -> None:
        self._client, self._left = client, n

    def __getattr__(self, name: str) -> Any:
        self._left -= 1
        if self._left == 0:
            raise MemoryError
        return getattr(self._client, name)


@pytest.mark.server
def test_a_version_on_a_server_is_downloaded_once_and_checked(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "aig")
    uri, name = server().uri, tmp_path.name
    config = TrackingConfig(uri=uri, register=name)
    recipe = configs.merge(
        configs.read_mapping(trained / "config.yaml")["recipe"], {"tracking": configs.as_mapping(config)}
    )
    (tmp_path / "aig" / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    with Uploader(tmp_path / "aig", config, recipe) as uploader:
        version = register_best(tmp_path / "aig", config, uploader)
    assert version is not None and version.run_id == uploader.run_id
    folder = resolve(f"models:/{name}@candidate", uri, cache=tmp_path / "cache")
    assert folder.is_relative_to(tmp_path / "cache") and describe(folder).step == 7
    stamp = (folder / "net.safetensors").stat().st_mtime_ns
    assert resolve(version.reference, uri, cache=tmp_path / "cache") == folder
    assert (folder / "net.safetensors").stat().st_mtime_ns == stamp
    logged = connect(uri).get_model_version(name, "1").source.split("/")[-2]
    (stored,) = server()._folder.glob(f"artifacts/*/models/{logged}/artifacts/artifacts/*/net.safetensors")
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + b"\x01")
    with fails(CheckpointError, "source", subject=version.reference):
        resolve(version.reference, uri, cache=tmp_path / "later")
    stored.write_bytes(whole)  # repaired there: the damaged copy did not stay in the cache
    assert describe(resolve(version.reference, uri, cache=tmp_path / "later")).step == 7
    tampered = folder / "net.safetensors"
    tampered.write_bytes(tampered.read_bytes()[:-1] + b"\x01")
    with fails(CheckpointError, "net.safetensors"):
        load_model(resolve(version.reference, uri, cache=tmp_path / "cache"))


def test_a_run_is_registered_later_if_the_server_is_unreachable_at_its_end(run_dir: Path) -> None:
    recipe = configs.read_mapping(run_dir / "config.yaml")["recipe"]
    config = TrackingConfig(uri="http://127.0.0.1:9", register="aig", patience_s=1)
    recipe["tracking"] = configs.as_mapping(config)
    (run_dir / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    with Uploader(run_dir, config, recipe) as uploader:
        assert register_best(run_dir, config, uploader) is None
    assert "tracking-away" in tracking_events(run_dir)
    assert "not-registered" in (run_dir / "journal" / "driver.jsonl").read_text()
    uri = f"sqlite:///{run_dir.parent}/mlflow.db"
    assert run("runs", "sync", run_dir, "--uri", uri) == 0
    assert [v.reference for v in catalogue.versions(uri)] == ["models:/aig/1"]
    assert run("runs", "sync", run_dir, "--uri", uri) == 0
    assert len(catalogue.versions(uri)) == 1


def test_a_version_whose_run_or_files_are_gone_is_refused(run_dir: Path) -> None:
    uri = f"sqlite:///{run_dir.parent}/mlflow.db"
    run_id = sync(run_dir).run_id
    publish_run(run_dir, "aig", run_id=run_id, uri=uri)
    client = connect(uri)
    shutil.rmtree(resolve("models:/aig/1", uri).parents[1])
    with fails(CheckpointError, "source", subject="models:/aig/1"):
        resolve("models:/aig/1", uri)
    client.delete_run(run_id)
    with fails(CheckpointError, "source", subject="models:/aig/1"):
        resolve("models:/aig/1", uri)
    client._tracking_client.store._hard_delete_run(run_id)  # as `mlflow gc` does
    with fails(CheckpointError, "source", subject="models:/aig/1"):
        resolve("models:/aig/1", uri)
    assert run("models", "show", "models:/aig/1", "--uri", uri) == 0


# --- looking up


def test_names_resolve_to_folders_and_unknown_names_are_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{run_dir.parent}/mlflow.db"
    publish_run(run_dir, "aig", run_id=sync(run_dir).run_id, uri=uri)
    best = run_dir / "checkpoints" / "step-00000007"
    assert resolve(str(run_dir)) == resolve(str(best)) == best
    for reference in ("models:/aig@candidate", "models:/aig/1", "models:/aig/latest"):
        assert describe(resolve(reference, uri)).classes == tuple(CLASSES)
    for reference, key in (
        ("models:/other@candidate", "name"),
        ("models:/aig@champion", "reference"),
        ("models:/aig/2", "reference"),
        ("models:/aig", "reference"),
        (str(run_dir.parent), "run folder"),
        ("nowhere", "source"),
    ):
        with fails(ConfigError, key):
            resolve(reference, uri)
    with fails(ConfigError, "--uri", subject="none.db"):
        catalogue.versions(f"sqlite:///{run_dir}/none.db")
    assert not (run_dir / "none.db").exists()
    shutil.rmtree(run_dir / "checkpoints")
    with fails(CheckpointError, "source", subject=run_dir):
        resolve(str(run_dir))
    assert run("models", "list", "--uri", uri) == 0
    assert f"models:/aig/1  candidate  {SECTION['name']}     7  native    90.00  30.000" in capsys.readouterr().out
    assert run("models", "show", "models:/aig@candidate", "--uri", uri) == 0
    shown = capsys.readouterr().out
    assert "family" in shown and SECTION["name"] in shown and "other" in shown and "80.00" in shown
    assert run("runs", "list", run_dir.parent) == 0
    assert "FINISHED" in capsys.readouterr().out
    assert run("models", "show", "models:/aig@champion", "--uri", uri) == 2
    assert run("runs", "sync", run_dir.parent) == 2
    assert capsys.readouterr().err


def test_a_card_holds_what_a_version_is_and_where_it_came_from(run_dir: Path) -> None:
    """What its tags say stays on the card when the MLflow run no longer exists."""
    uri, swept = f"sqlite:///{run_dir.parent}/mlflow.db", run_folder(run_dir.parent / "deep")[0]
    recipe = configs.read_mapping(swept / "config.yaml")["recipe"]
    (swept / "config.yaml").write_text(configs.dump_yaml({"sweep": {"name": "widths"}, "recipe": recipe}))
    recipe = configs.read_mapping(run_dir / "config.yaml")["recipe"] | {"tracking": {"parent": str(swept)}}
    (run_dir / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    above, run_id = sync(swept).run_id, sync(run_dir).run_id
    remarks = {"licence": "CC-BY-4.0", "note": "without the roses"}
    publish_run(run_dir, "aig", run_id=run_id, uri=uri, remarks=remarks)
    facts = cards.card("models:/aig/1", uri).facts
    shown = {key: facts[key] for key in ("family", "recipe", "dataset", "data", "licence", "note")}
    assert shown == {"family": SECTION["name"], "recipe": "aig", "dataset": "nowhere", "data": "abc"} | remarks
    assert facts["fingerprint"] == configs.fingerprint({"seed": 1, "data.identity": "abc"})
    assert facts["lineage"] == f"a trial of the sweep widths, run {above} (deep)"
    client = connect(uri)
    for origin, digest in (({"sha256": "f" * 64}, f" (sha256 {'f' * 16})"), ({"sha256": None}, "")):
        client.set_model_version_tag("aig", "1", "adaptnet.imported", json.dumps({"file": "old.pth", **origin}))
        assert f"imported from old.pth{digest}; a trial" in cards.card("models:/aig/1", uri).facts["lineage"]
    client.set_model_version_tag("aig", "1", "adaptnet.start_from", "runs/small")
    client.delete_run(run_id)
    client._tracking_client.store._hard_delete_run(run_id)
    facts = cards.card("models:/aig/1", uri).facts
    assert facts["MLflow run"].startswith(f"{run_id}, ")
    assert facts["lineage"] == "imported from old.pth; started from runs/small"


# --- versions published before November 2026


def test_the_code_of_an_old_version_runs_in_a_process_that_has_imported_today_s(trained: Path, tmp_path: Path) -> None:
    """MLflow runs the file `served.py` of such a version; its imports find the code that is imported already."""
    from mlflow.pyfunc import PythonModelContext

    code = Path(__file__).parent / "fixtures" / "served_bc067e3.py"
    specification = importlib.util.spec_from_file_location("served_bc067e3", code)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    folder = write_model_folder(trained / "checkpoints" / "step-00000007", REPORTS, tmp_path / "model")
    context = PythonModelContext({"model": str(folder)}, {"files": ""})
    model = module.Served()
    model.load_context(context)
    table = model.predict(context, pandas.DataFrame({"image": IMAGES}), {"top_k": 2})
    answers = predict(load_model(folder), IMAGES)
    assert table["label"].tolist() == [CLASSES[row.argmax()] for row in answers.probabilities]
    assert table["macs"].tolist() == answers.macs.tolist() and [len(row) for row in table["labels"]] == [2] * 3
    with pytest.raises(module.Refused):
        model.predict(context, pandas.DataFrame({"image": IMAGES}), {"budget": "5ms"})
