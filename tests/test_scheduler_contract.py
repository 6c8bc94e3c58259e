"""What every scheduler must do: SLURM over scripts, processes of this machine, Ray Jobs over HTTP, a third party's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import fake_schedulers
import pytest
from raised import fails

import jobs
from jobs import schedulers
from jobs.schedulers import Scheduler, records
from jobs.schedulers.attempts import Attempts
from jobs.schedulers.profile import SiteProfile
from jobs.schedulers.records import JobRecord
from jobs.schedulers.submission import Job, Resources, Submission
from pipeline.errors import AdaptNetError, ConfigError, ResourceError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A scheduler in an environment in which it works."""

    name: str
    home: Path
    address: str | None = None
    refuses: tuple[str, ...] = ()  # options of a submission
    in_job: dict[str, str] = field(default_factory=dict)  # a task's environment; JOB is replaced by the job's id

    @property
    def scheduler(self) -> Scheduler:
        return schedulers.get(self.name)

    def submission(self, count: int = 1) -> Submission:
        """Of `adaptnet jobs list`, a verb that needs nothing and ends at once."""
        made = [Job(self.name, "jobs", ("list",), str(self.home / f"run{n}"), None, 1.0, 1) for n in range(count)]
        shared = made[0] if count == 1 else replace(made[0], home=str(self.home / "jobs" / "shared"))
        array = tuple(made) if count > 1 else ()
        return Submission(shared, "x", Resources((1, 1), 0, 1, 10), SiteProfile(), array, address=self.address)

    def state(self, record: JobRecord) -> schedulers.JobState:
        return self.scheduler.states([record])[record.id]


IN_SLURM = {"SLURM_JOB_ID": "JOB", "SUBMITIT_EXECUTOR": "slurm", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost"}
IN_LSF = {"LSB_JOBID": "JOB", "LSB_HOSTS": "localhost", "LSF_PM_TASKID": "1"}


@pytest.fixture(params=["slurm", "local", "debug", "ray", "lsf"])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    tools, name, home = fake_schedulers.hide_slurm(tmp_path, monkeypatch), request.param, tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setattr(jobs, "__path__", [*jobs.__path__, str(HERE / "third_party")])
    if name == "slurm":
        fake_schedulers.fake_slurm(tools, tmp_path / "state")
        yield Case(name, home, refuses=("address",), in_job=IN_SLURM)
    elif name == "lsf":
        fake_schedulers.fake_lsf(tools, tmp_path / "state")
        yield Case(name, home, refuses=("address", "after"), in_job=IN_LSF)
    elif name == "ray":
        with fake_schedulers.job_server() as server:
            yield Case(name, home, server.address, refuses=("after", "dependency"))
    else:
        variable = f"SUBMITIT_{name.upper()}_JOB_ID"
        yield Case(name, home, refuses=("after", "dependency", "address"), in_job={variable: "JOB"})


def test_a_preview_changes_nothing(case: Case) -> None:
    assert case.scheduler.preview(case.submission())
    assert not list(case.home.iterdir())


def test_an_option_that_the_scheduler_cannot_honour_is_refused(case: Case) -> None:
    for option in case.refuses:
        submission = replace(case.submission(), **{option: "http://host:1"})
        for call in (case.scheduler.preview, case.scheduler.submit):
            with fails(ConfigError, f"--{option}", subject="http://host:1"):
                call(submission)
    assert not list(case.home.iterdir())


def test_each_submitted_job_is_recorded_in_its_home(case: Case) -> None:
    submission = case.submission(2)
    made = case.scheduler.submit(submission)
    assert len({record.id for record in made}) == 2
    for job, record in zip(submission.jobs, made, strict=True):
        assert records.of_home(Path(job.home)) == [record] == [JobRecord.from_json(record.to_json(), Path(job.home))]
        assert (record.scheduler, record.verb, record.argv) == (case.name, job.verb, job.arguments)
        assert Path(record.log).is_absolute() and case.scheduler.logs(record)[-1] == Path(record.log)
        assert replace(record.again(), name="") == replace(case.submission(), name="", job=record.again().job)
    assert set(case.scheduler.states(made)) == {record.id for record in made}
    assert [state.name for state in schedulers.states(made)] != ["UNKNOWN"] * 2
    _end(case, made)


def test_a_cancelled_job_is_no_longer_alive(case: Case) -> None:
    if case.name in ("local", "debug"):
        with _sleeping(case) as record:
            assert case.state(record).alive
            case.scheduler.cancel(record)
            _until(lambda: not case.state(record).alive)
            with fails(ResourceError, "job", subject=record.id):
                case.scheduler.cancel(record)
        return
    (record,) = case.scheduler.submit(case.submission())
    assert case.state(record).alive
    case.scheduler.cancel(record)
    assert not case.state(record).alive


def test_a_job_is_requeued_or_the_request_is_refused(case: Case) -> None:
    (record,) = case.scheduler.submit(case.submission())
    if case.scheduler.can_requeue:
        case.scheduler.requeue(record)
        assert case.state(record).name == "PENDING" and case.state(record).alive
    else:
        with fails(ResourceError, "job", subject=record.id):
            case.scheduler.requeue(record)
    _end(case, [record])


def test_outside_a_job_there_is_no_node_and_no_warning(case: Case) -> None:
    handler = signal.getsignal(signal.SIGUSR2)
    assert case.scheduler.node() is None and not case.scheduler.on_preemption(lambda: None)
    assert signal.getsignal(signal.SIGUSR2) is handler


def test_within_a_job_its_id_and_hosts_are_known(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if not case.in_job:
        pytest.skip("the verb runs by itself")
    _enter(case, "7", monkeypatch)
    node = case.scheduler.node()
    assert node is not None and (node.job, node.rank, len(node.hosts), node.restart) == ("7", 0, 1, 0)
    assert node.time_left_s is None


def test_a_warning_calls_the_callback_and_none_ignores_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _enter(case, "7", monkeypatch)
    calls: list[str] = []
    handler = signal.getsignal(signal.SIGUSR2)
    try:
        if not case.scheduler.on_preemption(lambda: calls.append("warned")):
            assert signal.getsignal(signal.SIGUSR2) is handler
            return
        os.kill(os.getpid(), signal.SIGUSR2)
        _until(lambda: calls == ["warned"])
        case.scheduler.on_preemption(None)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert calls == ["warned"]
    finally:
        signal.signal(signal.SIGUSR2, handler)


def test_a_job_requeues_itself_or_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if not case.scheduler.can_requeue:
        with pytest.raises(AdaptNetError):
            case.scheduler.requeue_this_job("for a test")
        return
    (record,) = case.scheduler.submit(case.submission())
    _enter(case, record.id, monkeypatch)
    case.scheduler.requeue_this_job("for a test")
    assert case.state(record).name == "PENDING"


def test_a_job_that_runs_here_records_its_start_under_its_id(case: Case) -> None:
    if case.name not in ("local", "debug"):
        pytest.skip("its jobs run elsewhere")
    (record,) = case.scheduler.submit(case.submission())
    _end(case, [record])
    (attempt,) = Attempts(Path(record.home)).of(record.id)
    assert attempt.job == record.id and attempt.last_step == 0


def test_every_scheduler_is_found_by_its_name_and_others_are_refused(case: Case) -> None:
    assert set(schedulers.registry()) == {"slurm", "ray", "local", "debug", "lsf"}
    assert case.scheduler.name == case.name
    with fails(ConfigError, "--where", subject="moon"):
        schedulers.get("moon")


def _enter(case: Case, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process look like a task of that job."""
    for key, value in case.in_job.items():
        monkeypatch.setenv(key, value.replace("JOB", job))


def _sleeping(case: Case) -> _Sleeper:
    return _Sleeper(case)


class _Sleeper:
    """A job of this machine whose process sleeps."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def __enter__(self) -> JobRecord:
        submission, pid = self._case.submission(), self._process.pid
        log = self._case.home / "log.out"
        return records.record_of(submission, submission.job, id=str(pid), log=log, pid=pid)

    def __exit__(self, *raised: object) -> None:
        self._process.kill()
        self._process.wait()


def _end(case: Case, made: list[JobRecord]) -> None:
    """Waits for jobs that run on this machine."""
    if case.name in ("local", "debug"):
        _until(lambda: all(Attempts(Path(record.home)).read() for record in made))
        _until(lambda: case.name == "debug" or not any(case.state(record).alive for record in made))


def _until(holds: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
