"""What sites and users do to SLURM: each job is found by its id, and runs the code that is kept for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from raised import fails
from real_slurm import RealSlurm, until

from jobs import schedulers
from jobs.schedulers import records
from jobs.schedulers.records import JobRecord
from jobs.verbs.submit import SubmitOptions
from jobs.verbs.submit import run as submit
from pipeline.errors import ResourceError

pytestmark = pytest.mark.slurm
SITE = "partition: main\ntime: 30m\nsignal_delay_s: 45\n"
CODE = f"{sys.executable} -P -c 'import jobs; print(\"CODE\", jobs.__file__)'"


@pytest.fixture
def here(lo: RealSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RealSlurm:
    monkeypatch.chdir(tmp_path)
    for name in set(os.environ) - set(lo.env):
        monkeypatch.delenv(name)
    for name, value in lo.env.items():
        monkeypatch.setenv(name, value)
    return lo


def train(site: str, *words: str, home: Path | None = None) -> JobRecord:
    """Submits a training of images that do not exist; its job ends at once, or before it starts."""
    Path("site.yaml").write_text(SITE + site)
    run_dir = ("--run-dir", str(home)) if home else ()
    submit(SubmitOptions("train", ("convnet_aig/toy", f"data.root={Path.cwd()}", *run_dir, *words), site="site.yaml"))
    return records.of_home(home or Path("runs/convnet_aig-toy").absolute())[-1]


def log_of(job: JobRecord) -> str:
    """The log of a job, when it has ended."""
    until(lambda: not schedulers.state_of(job).alive, 120)
    return Path(job.log).read_text()


@pytest.mark.parametrize("name", ["2026-11-29T15:10:00", "50%j %t", 'it\'s "mine"'])
def test_a_job_runs_its_own_code_whatever_its_folder_is_called(name: str, here: RealSlurm, tmp_path: Path) -> None:
    home = tmp_path / "runs" / name
    job = train(f"setup: {json.dumps([CODE, 'exit 7'])}\n", home=home)
    (code,) = re.findall(r"^CODE (.*)/jobs/__init__.py$", log_of(job), re.MULTILINE)
    assert Path(code).resolve().parent == home / "slurm"
    assert list((home / "slurm").glob(f"{job.id}_0_log.out"))
    assert schedulers.state_of(job).name == "FAILED"


def test_a_step_has_the_jobs_environment_on_sites_that_export_nothing(here: RealSlurm, tmp_path: Path) -> None:
    """And on whole nodes with all of their memory and GPUs by --gres."""
    site = "extra: {export: NONE, exclusive: true, mem: 0, gres: 'gpu:2'}\n"
    Path("site.yaml").write_text(f"{SITE}{site}environment: {{SLURM_CONF: {here.env['SLURM_CONF']}}}\n")
    submit(SubmitOptions("report", ("runs/none",), site="site.yaml"))
    (job,) = records.list_jobs()
    log = log_of(job)
    assert "adaptnet: runs/none" in log and "Traceback" not in log, log


def test_a_wrapped_sbatch_and_the_users_filters_lose_no_job(
    here: RealSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = tmp_path / "bin" / "sbatch"
    wrapped.parent.mkdir()
    real = shutil.which("sbatch")
    wrapped.write_text(f'#!/bin/sh\necho "--> job 7 of at most 40 of this user: OK"\nexec {real} --parsable "$@"\n')
    wrapped.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapped.parent}:{os.environ['PATH']}")
    job = train("extra: {begin: now+1hour}\n")
    assert job.id in here.squeue()
    for name in ("SQUEUE_PARTITION", "SQUEUE_QOS", "SQUEUE_ACCOUNT", "SLURM_CLUSTERS", "SACCT_FORMAT", "SQUEUE_STATES"):
        monkeypatch.setenv(name, "high")
    state = schedulers.state_of(job)
    assert state.alive and re.search(r"not before \d{4}-\d\d-\d\dT", state.reason)
    with fails(ResourceError, "name"):
        train("")
    schedulers.get("slurm").cancel(job)
    until(lambda: schedulers.state_of(job).name == "CANCELLED", 60)
