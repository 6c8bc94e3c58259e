"""Runs, a sweep, a registry and jobs that commit bc067e3 wrote, read by today's code; fixtures/make.sh made them.

Interrupted runs are resumed and must end with the weights that bc067e3's own code reached: bit for bit on the same CPU
and torch, and to within rounding elsewhere.
"""

from __future__ import annotations

import csv
import fcntl
import json
import sqlite3
import tarfile
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs import cli
from pipeline import config as configs
from pipeline import run_config
from pipeline.evaluation.evaluate import device_name
from pipeline.runs import lease

ARCHIVE = Path(__file__).parent / "fixtures" / "bc067e3.tar.xz"
THERE = "/tmp/adaptnet-old"  # where make.sh worked
TEXTS = (".yaml", ".json", ".jsonl", ".csv", ".txt")
INSTRUCTIONS = "AVX512"  # of the processor that wrote the files, by torch's name
REORDERED = ("killed-ranet",)  # RANet's layers run together since: its sums are in another order
ROUNDING = 2e-3  # of sums and norms on processors of the same name and instructions
OTHER_ROUNDING = 2e-2  # on others
RUNS = ("stopped-convnet_aig", "killed-ranet", "stopped-arrn", "killed-shape_adaptor")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files, with paths of this machine; the working directory of commands.

    Checkpoints and model folders keep their old paths, since checksums protect them; a link leads from these to here.
    """
    folder = tmp_path_factory.mktemp("old").resolve()
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for path in (folder / "runs").rglob("*"):
        if path.suffix in TEXTS and "checkpoints" not in path.parts and "mlartifacts" not in path.parts:
            path.write_text(path.read_text().replace(THERE, str(folder)))
    _relocate(folder / "runs" / "mlflow.db", str(folder))
    there = Path(THERE)
    if there.is_dir() and not there.is_symlink():  # where make.sh has just worked
        yield folder
        return
    with open(f"{THERE}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until another process has finished these tests
        there.unlink(missing_ok=True)
        there.symlink_to(folder)
        yield folder
        there.unlink(missing_ok=True)


def _relocate(database: Path, here: str) -> None:
    """Replaces THERE in every text of an MLflow database."""
    with sqlite3.connect(database) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                if "CHAR" in kind.upper() or "TEXT" in kind.upper():
                    connection.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE "{column}" LIKE ?',
                        (THERE, here, f"%{THERE}%"),
                    )
    connection.close()


@pytest.fixture(autouse=True)
def leases_expire_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of bc067e3 do not say on which boot of which kernel their holders ran, so these are watched."""
    monkeypatch.setattr(lease, "SILENT_S", 0.2)


@pytest.fixture(scope="module")
def expected(home: Path) -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = json.loads((home / "expected.json").read_text())
    return loaded


@pytest.fixture
def adaptnet(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`adaptnet(words...)`: what the command prints in the folder of the files, if it exits with 0."""
    monkeypatch.chdir(home)

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    return run


def same_machine(expected: Mapping[str, Any]) -> bool:
    """Whether bits may be compared: processors of one name may differ in their instructions."""
    here = (device_name(torch.device("cpu")), torch.backends.cpu.get_cpu_capability(), torch.__version__)
    return here == (expected["cpu"], INSTRUCTIONS, expected["torch"])


def top1(run_dir: Path) -> dict[str, float]:
    reports = json.loads((run_dir / "evaluations" / "final" / "reports.json").read_text())
    return {report["policy"]: report["top1"] for report in reports}


def test_runs_list_shows_every_run(adaptnet: Any) -> None:
    printed = adaptnet("runs", "list", "runs")
    for name in ("finished-baseline", "finished-arrn", "finished-ranet", *RUNS):
        assert name in printed


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_resumes_to_the_weights_of_its_own_code(
    name: str, home: Path, expected: Mapping[str, Any], adaptnet: Any
) -> None:
    then = expected["runs"][name]
    adaptnet(*then["command"])
    run_dir = home / "runs" / name
    newest = max((run_dir / "checkpoints").glob("step-*"))
    assert newest.name == then["checkpoint"]
    weights = load_file(newest / "net.safetensors")
    rounding = ROUNDING if same_machine(expected) else OTHER_ROUNDING
    assert weights.keys() == then["tensors"].keys()
    for key, (total, norm) in then["tensors"].items():
        now = weights[key].double()
        assert [now.sum().item(), now.norm().item()] == pytest.approx([total, norm], rel=rounding, abs=rounding)
    accuracy = top1(run_dir)
    assert accuracy.keys() == then["top1"].keys()
    if same_machine(expected) and name not in REORDERED:
        assert sha256((newest / "net.safetensors").read_bytes()).hexdigest() == then["sha256"]
        assert accuracy == then["top1"]


@pytest.mark.parametrize("name", ("finished-baseline", "finished-arrn", *RUNS))
def test_a_stored_recipe_with_every_key_of_its_time_is_read(name: str, home: Path) -> None:
    stored = configs.read_mapping(home / "runs" / name / "config.yaml")
    config = run_config.from_stored(stored["recipe"], name)
    assert config.training.batch_size == 12
    again = run_config.from_mapping(configs.as_mapping(config), name)  # today's dump holds no key that is refused
    assert again == config


def test_evaluating_a_finished_run_again_finds_the_stored_accuracies(
    home: Path, expected: Mapping[str, Any], adaptnet: Any
) -> None:
    adaptnet("evaluate", "runs/finished-baseline", "--out", "again")
    (reports,) = (home / "again").rglob("reports.json")
    again = {report["policy"]: report["top1"] for report in json.loads(reports.read_text())}
    stored = top1(home / "runs" / "finished-baseline")
    assert again == pytest.approx(stored, abs=0 if same_machine(expected) else 0.05)


@pytest.mark.long
def test_a_report_of_stored_evaluations_has_the_same_numbers(home: Path, adaptnet: Any) -> None:
    adaptnet("report", "runs/finished-arrn", "runs/finished-ranet", "--out", "report-now")
    assert (home / "report-now" / "index.html").is_file()
    then, now = ((home / each / "policies.csv").read_text() for each in ("report", "report-now"))
    assert now == then


def test_a_run_a_pulled_folder_and_a_registered_version_predict_alike(home: Path, adaptnet: Any) -> None:
    sources = ("runs/finished-arrn", "pulled", "models:/old@champion", "models:/old/1")
    answers = []
    for source in sources:
        document = json.loads(adaptnet("predict", source, "images/val", "--json", "--device", "cpu"))
        answers.append(document["images"])
    assert len(answers[0]) == 24
    assert answers[1:] == answers[:1] * 3


def test_the_registry_knows_versions_aliases_and_who_was_promoted(adaptnet: Any) -> None:
    assert "old" in adaptnet("models", "list")
    assert "the first was better" in adaptnet("models", "show", "models:/old@champion")
    adaptnet("models", "promote", "old", "2", "--why", "again", "--force")
    adaptnet("models", "rollback", "old", "--why", "and back")
    assert "models:/old/1" in adaptnet("models", "show", "models:/old@champion")


@pytest.mark.long
def test_a_killed_sweep_resumes_to_the_table_of_its_own_code(
    home: Path, expected: Mapping[str, Any], adaptnet: Any
) -> None:
    adaptnet(*expected["sweep"]["command"])
    then = list(csv.DictReader(expected["sweep"]["results.csv"]))
    now = list(csv.DictReader((home / "runs" / "swept" / "results.csv").read_text().splitlines()))
    assert [row["trial"] for row in now] == [row["trial"] for row in then]
    assert now[0].keys() == then[0].keys()
    if same_machine(expected):
        timed = {key for key in then[0] if "ms" in key or "hours" in key or "seconds" in key}
        assert [{key: row[key] for key in row.keys() - timed} for row in now] == [
            {key: row[key] for key in row.keys() - timed} for row in then
        ]


def test_the_recipe_of_a_job_is_read(home: Path) -> None:
    """Older versions submitted a job with a complete dump, which `jobs resubmit` gives to `train` again."""
    assert run_config.load(str(home / "runs" / "job" / "slurm" / "recipe.yaml")).name == "job"


def test_jobs_of_a_run_are_listed_and_shown(adaptnet: Any) -> None:
    assert "job" in adaptnet("jobs", "list")
    assert "train" in adaptnet("jobs", "show", "job")


@pytest.mark.parametrize("root", ("images", "packed"))
def test_data_info_reads_the_index(root: str, adaptnet: Any) -> None:
    assert "60" in adaptnet("data", "info", root)
