"""Files of ours that are damaged in every way of damage.py: each command goes on with what is whole, or names the file.

No error but ours is raised, a damaged run hides no other, and nothing is computed from what a checksum refutes.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from damage import WAYS, copied

from jobs import cli
from jobs.schedulers import records as job_records
from jobs.schedulers.attempts import Attempts
from jobs.schedulers.submission import FOLDER
from pipeline import run_config, tracking
from pipeline.data import toy
from pipeline.data.index import ImageIndex, open_index
from pipeline.data.pack import pack
from pipeline.deploy import evaluations
from pipeline.errors import AdaptNetError, DataError
from pipeline.execution import launch
from pipeline.registry import cache
from pipeline.registry.model_store import RegisteredModel
from pipeline.run_config import RunConfig
from pipeline.runs import journal, lease, records
from pipeline.runs.files import DamagedFile
from pipeline.training import checkpoint
from tuning.record import SweepRecord
from tuning.space import Sample

OF_RUNS = (
    *(
        "attempt.json",
        "id",
        "lease.json",
        "status.json",
        "tracking.json",
        "progress.json",
        "config.yaml",
        "arithmetic.json",
    ),
    *("environment.json", "checkpoints/OWNER", "journal/rank0.jsonl", "journal/driver.jsonl", "journal/node0.jsonl"),
    *(f"checkpoints/step-00000004/{name}" for name in ("COMPLETE.json", "meta.json", "state.pt", "net.safetensors")),
    *("evaluations/final/about.json", "evaluations/final/reports.json", "evaluations/final/native.npz"),
)


@pytest.fixture(autouse=True)
def quietly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remarks are not shown, and a lease whose holder is unknown expires soon."""
    monkeypatch.setattr(lease, "SILENT_S", 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedFile)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "set", num_classes=2, train=32, val=16, side_px=16, seed=1)


@pytest.fixture(scope="module")
def config(images: Path) -> RunConfig:
    small = ["training.epochs=1", "training.batch_size=8", "training.schedule.warmup_epochs=0", "family.depth=8"]
    small += ["data.side_px=16", "evaluation.latency_repeats=0", "checkpoint.every=2 steps", "compute.workers=0"]
    nowhere = ["tracking.uri=http://127.0.0.1:9", "tracking.patience_s=0", "tracking.register=null"]
    return run_config.load("baseline/toy", [f"data.root={images}", *small, *nowhere, "name=damaged"])


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, beside which another one stands."""
    run_dir = tmp_path_factory.mktemp("runs") / "damaged"
    assert launch.train(config, run_dir).finished
    return run_dir


def weights(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "step-00000004" / "net.safetensors").read_bytes()


@pytest.mark.parametrize("file", OF_RUNS)
def test_a_run_with_a_damaged_file_is_listed_and_found_and_hides_no_other(run: Path, tmp_path: Path, file: str) -> None:
    """What `runs list`, `evaluate` and `report` read; other runs are listed as before."""
    other = copied(run, tmp_path / "other")
    for number, damage in enumerate(WAYS.values()):
        mine = copied(run, tmp_path / f"mine{number}")
        damage(mine / file)
        listed = {each.run_dir: each for each in tracking.summaries(tmp_path)}
        assert listed[other].status == "FINISHED" and listed[other].step == 4
        assert (mine in listed) == (mine / "config.yaml").exists()
        try:
            found = evaluations.find(str(mine))
            assert [
                each.details(report.policy) is None or report.top1
                for each in found.evaluations
                for report in each.reports
            ]
        except AdaptNetError:
            pass
        assert records.attempts(mine) == 1, "it is counted in the journal" if "journal" not in file else ""
        shutil.rmtree(mine)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "deleted"])
def test_a_checkpoint_with_a_damaged_file_is_passed_over_for_the_one_before(
    run: Path, tmp_path: Path, way: str
) -> None:
    """`{}` is no verified checkpoint either."""
    for name in ("COMPLETE.json", "meta.json", "state.pt", "net.safetensors"):
        mine = copied(run / "checkpoints", tmp_path / name)
        WAYS[way](mine / "step-00000004" / name)
        skipped: list[str] = []
        storage = checkpoint.LocalStorage(mine)
        newest = checkpoint.newest_good(storage, lambda name, why, skipped=skipped: skipped.append(name))
        assert (newest, skipped) == ("step-00000002", ["step-00000004"])


@pytest.mark.parametrize("way", list(WAYS))
def test_the_id_of_a_run_is_written_anew_where_the_checkpoints_are_its_own(run: Path, tmp_path: Path, way: str) -> None:
    for name in ("id", "checkpoints/OWNER"):
        mine = copied(run, tmp_path / name.replace("/", "-"))
        WAYS[way](mine / name)
        storage = checkpoint.LocalStorage(mine / "checkpoints")
        try:
            checkpoint.claim_storage(storage, mine)
            assert (mine / "id").read_text() == storage.owner()
        except AdaptNetError as error:
            assert way in ("folder", "flipped byte"), error  # the latter may be another id
            assert error.key in ("id", "OWNER", "checkpoint.storage")


@pytest.mark.parametrize("way", list(WAYS))
def test_a_group_of_seeds_whose_recipe_is_damaged_hides_no_run(run: Path, tmp_path: Path, way: str) -> None:
    other, group = copied(run, tmp_path / "other"), copied(run, tmp_path / "mine-seeds")
    (group / "config.yaml").write_text("seeds: [1, 2]\n")
    WAYS[way](group / "config.yaml")
    assert other in {each.run_dir for each in tracking.summaries(tmp_path)}


@pytest.mark.faults
@pytest.mark.parametrize("file", OF_RUNS)
def test_a_run_with_a_damaged_file_resumes_to_the_same_weights_or_names_the_file(
    run: Path, config: RunConfig, tmp_path: Path, file: str
) -> None:
    for number, (way, damage) in enumerate(WAYS.items()):
        mine = copied(run, tmp_path / f"mine{number}")
        (mine / "status.json").unlink()  # so that it trains again
        if file == "status.json":
            shutil.copy(run / "status.json", mine)
        damage(mine / file)
        try:
            assert launch.train(config, mine).finished, way
            assert weights(mine) == weights(run), way
        except AdaptNetError as error:
            named = ("tracking.json",)  # the link to the run in MLflow: a person decides
            assert way in ("folder", "flipped byte") or file in named, f"{way}: {error}"
            assert mine.name in str(error), way
        shutil.rmtree(mine, ignore_errors=True)  # its uploader may still write


# ---- indexes


def columns(index: ImageIndex) -> dict[str, list[object]]:
    names = ("shard", "offset", "length", "label", "height", "width", "name_hash")
    found: dict[str, list[object]] = {name: getattr(index, name).tolist() for name in names}
    return found | {"names": [index.file(row) for row in range(len(index))], "classes": list(index.classes)}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_damaged_index_is_built_anew(images: Path, tmp_path: Path, way: str) -> None:
    whole = open_index(images, tmp_path / "index")
    expected = columns(whole)
    for name in sorted(path.name for path in whole.folder.iterdir()):
        if name == "folders.json" and way != "folder":  # for sets of many files only
            continue
        WAYS[way](whole.folder / name)
        index = open_index(images, tmp_path / "index")
        assert index.identity == whole.identity and columns(index) == expected, name


def test_an_index_without_checksums_is_read_and_its_shapes_are_checked(images: Path, tmp_path: Path) -> None:
    whole = open_index(images, tmp_path / "index")
    expected = columns(whole)
    (whole.folder / "checksums.json").unlink()  # as an older version wrote it
    assert columns(open_index(images, tmp_path / "index")) == expected
    assert not (whole.folder / "checksums.json").exists(), "it was not built anew"
    np.save(whole.folder / "height.npy", np.zeros(3, dtype=np.int32))
    assert columns(open_index(images, tmp_path / "index")) == expected


@pytest.mark.faults
@pytest.mark.parametrize("way", list(WAYS))
def test_a_damaged_index_of_a_packed_set_is_named(images: Path, tmp_path: Path, way: str) -> None:
    """No flipped bit of a column is trained on."""
    packed = tmp_path / "packed"
    pack(images, packed)
    whole = open_index(packed)
    files = [packed / "COMPLETE.json", *sorted(whole.folder.iterdir())]
    for number, path in enumerate(files):
        mine = copied(packed, tmp_path / f"mine{number}")
        WAYS[way](mine / path.relative_to(packed))
        try:
            assert columns(open_index(mine)) == columns(whole), path.name
        except DataError as error:
            assert error.key in ("data.root", "data.index"), error
        shutil.rmtree(mine)


# ---- sweeps, jobs, the cache of a registry


@pytest.mark.parametrize("way", list(WAYS))
def test_a_damaged_record_of_a_sweep_is_read_as_far_as_it_goes_or_named(tmp_path: Path, way: str) -> None:
    written = SweepRecord(tmp_path, 1)
    for number in range(4):
        written.add(Sample(number, 0, {"training.optimizer.lr": 0.1 * (number + 1)}))
    written.close()
    WAYS[way](tmp_path / "journal" / "sweep.jsonl")
    try:
        again = SweepRecord(tmp_path, 2)
        assert [trial.number for trial in again.trials] == list(range(len(again.trials)))
        again.close()
    except AdaptNetError as error:
        assert error.key in ("sweep.jsonl", "journal"), error


@pytest.mark.parametrize("way", list(WAYS))
def test_a_damaged_record_of_jobs_hides_no_other_job(tmp_path: Path, way: str) -> None:
    entry = {
        "format": 2, "id": "7", "scheduler": "slurm", "name": "a", "verb": "train", "argv": ["baseline/toy"],
        "run_dir": None, "log": str(tmp_path / "log"), "profile": {}, "submitted_at": 1.0, "host": "here",
        "resources": {"nodes": [1, 1], "gpus_per_node": 0, "cpus_per_task": 1, "minutes": 5, "memory_gb": None},
    }  # fmt: skip
    attempt = {"format": 1, "job": "7", "restart": 0, "host": "here", "time": 1.0, "from": 0, "to": None}
    for name in ("a", "b"):
        folder = tmp_path / name / FOLDER
        folder.mkdir(parents=True)
        (folder / "jobs.json").write_text(json.dumps([entry]))
        (folder / "starts.json").write_text(json.dumps([attempt]))
    for file in ("jobs.json", "starts.json"):
        WAYS[way](tmp_path / "a" / FOLDER / file)
    try:
        assert len(job_records.list_jobs(tmp_path)) >= 1
        assert len(Attempts(tmp_path / "a").read()) <= 1
    except AdaptNetError as error:
        assert "format" in str(error), error


@pytest.mark.parametrize("way", list(WAYS))
def test_a_damaged_cache_of_a_registry_is_asked_for_anew(tmp_path: Path, way: str) -> None:
    from pipeline.registry.model_store import VersionRow

    row = VersionRow(name="m", version=1, run_id=None, created=0.0, tags={})

    class Store:
        def rows(self, name: str | None = None) -> list[VersionRow]:
            return [row]

    models = [RegisteredModel(name="m", stamp="1", aliases={})]
    assert cache.rows("sqlite:///x", models, home=tmp_path, store=Store()) == [row]
    (path,) = tmp_path.iterdir()
    WAYS[way](path)
    assert cache.rows("sqlite:///x", models, home=tmp_path, store=Store()) == [row]


def test_lines_of_a_journal_that_are_no_records_are_counted(tmp_path: Path) -> None:
    written = journal.Journal(tmp_path)
    written.metrics(1, {"a": 1.0})
    for line in ("{}", '{"key": "a"}', '{"event": 3}', '{"key": "a", "step": "x", "value": 1}', "x", "[" * 5000):
        with open(written.path, "a") as file:
            file.write(line + "\n")
    written.metrics(2, {"a": 2.0})
    assert [record["value"] for record in journal.read_all(written.path)] == [1.0, 2.0]
    assert journal.unreadable(written.path) == 6


def test_runs_list_prints_a_sentence_about_a_damaged_run_and_lists_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("recipe: {}\n")
    (tmp_path / "a" / "tracking.json").write_text("{")
    (tmp_path / "a" / "status.json").write_text("[]")
    with pytest.raises(SystemExit) as ended:
        cli.main(["runs", "list", str(tmp_path)])
    printed = capsys.readouterr()
    assert not ended.value.code and printed.out.count("KILLED") == 2
    lines = printed.err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"adaptnet: {tmp_path}/a/") for line in lines)
