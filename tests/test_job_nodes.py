"""What runs on a job's nodes: how often it is started, what it does on a warning, and what it gives up on."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_schedulers
import pytest
from raised import fails

from jobs import cli, schedulers
from jobs.local.scheduler import LocalProcess
from jobs.schedulers import NodeEnv
from jobs.schedulers.attempts import Attempts
from jobs.schedulers.node import JobEnded, NodeTask, head_lost, room_lost, run_verb
from jobs.schedulers.preemption import Preemption
from jobs.schedulers.submission import Job, WorkerNeeds
from pipeline.errors import ResourceError
from pipeline.execution import cluster
from pipeline.execution.allocation import JoinedNode


class Preempting(LocalProcess):
    """A scheduler that warns by USR2, and records the reasons for which jobs requeue themselves."""

    can_requeue = True

    def __init__(self) -> None:
        self.requeued: list[str] = []

    def node(self) -> NodeEnv | None:
        return NodeEnv("7", 0, ("here",))

    def on_preemption(self, callback: Callable[[], None] | None) -> bool:
        signal.signal(signal.SIGUSR2, (lambda number, frame: callback()) if callback else signal.SIG_IGN)
        return True

    def requeue_this_job(self, reason: str) -> None:
        self.requeued.append(reason)


@pytest.fixture(autouse=True)
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without SLURM; the folder takes fake commands."""
    monkeypatch.chdir(tmp_path)
    return fake_schedulers.hide_slurm(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Handlers are this process's own again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- starts


def started(home: Path, *steps: tuple[int, int]) -> Attempts:
    """Starts of job 7, each from and to such a step."""
    attempts = Attempts(home)
    for restart, (first, last) in enumerate(steps):
        attempts.begin(first, 100, job="7", restart=restart)
        attempts.end(last)
    return attempts


def test_three_starts_in_a_row_that_save_no_step_are_the_last(tmp_path: Path) -> None:
    attempts = started(tmp_path, (0, 10), (10, 10), (10, 10))
    attempts.check("why", 100)
    attempts.begin(10, 100, job="7", restart=3)  # the scheduler itself has requeued it
    with fails(ResourceError, "--time", subject=tmp_path):
        attempts.begin(10, 100, job="7", restart=4)
    assert attempts.read()[-1].last_step == 10
    with fails(ResourceError, "--time"):
        attempts.check("why", 100)
    attempts.begin(10, 100, job="8")  # another job of the same run


def test_a_job_is_requeued_no_more_often_than_is_allowed(tmp_path: Path) -> None:
    attempts = started(tmp_path, (0, 10), (10, 20))
    attempts.check("why", 2)
    with fails(ResourceError, "--max-requeues", subject=1):
        attempts.check("why", 1)
    with fails(ResourceError, "--max-requeues", subject=1):
        attempts.begin(20, 1, job="7", restart=2)


def test_a_start_that_could_not_record_its_end_is_closed_by_the_next(tmp_path: Path) -> None:
    attempts = started(tmp_path, (0, 10))
    attempts.begin(10, 100, job="7")
    attempts.begin(25, 100, job="7")
    steps = [(attempt.first_step, attempt.last_step) for attempt in attempts.read()]
    assert steps == [(0, 10), (10, 25), (25, None)]


def test_a_sweeps_progress_is_the_sum_over_its_trials(tmp_path: Path) -> None:
    for number, step in enumerate((20, 0, 35)):
        save(tmp_path / "trials" / f"{number}", step)
    assert job(tmp_path).saved_steps() == 55


def save(run_dir: Path, step: int) -> None:
    """A checkpoint, complete unless the step is 0."""
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("recipe: {}\n")
    if step:
        (checkpoint / "COMPLETE.json").write_text("{}")


def job(home: Path, saves_within_s: float = 90.0) -> Job:
    return Job("local", "sweep", (), str(home), str(home), 1.0, 100, saves_within_s=saves_within_s)


# --- requeueing


@pytest.mark.parametrize(("state", "orders"), [("RUNNING", "requeue 7\n"), ("COMPLETING", "")])
def test_a_job_that_is_cancelled_while_it_saves_is_not_requeued(
    tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, state: str, orders: str
) -> None:
    fake_schedulers.write_tool(tools, "squeue", f"echo {state}")
    fake_schedulers.write_tool(tools, "scontrol", f'echo "$@" >>{tmp_path}/orders')
    (tmp_path / "orders").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    schedulers.get("slurm").requeue_this_job("for a test")
    assert (tmp_path / "orders").read_text() == orders


def test_a_task_of_an_array_is_known_by_the_id_of_its_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SLURM_NODEID": "0"}
    variables |= {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_NODELIST": "localhost", "SLURM_RESTART_COUNT": "2"}
    for key, value in {**variables, "SLURM_JOB_END_TIME": str(time.time() + 100)}.items():
        monkeypatch.setenv(key, value)
    env = schedulers.get("slurm").node()
    assert env is not None and env.share is not None
    assert (env.job, env.restart, env.share.key) == ("5_1", 2, "9-2")
    assert env.time_left_s is not None and 90 < env.time_left_s <= 100


# --- warnings


@pytest.mark.faults
def test_a_warning_is_repeated_until_the_verb_reacts_and_a_late_verb_is_given_up(tmp_path: Path) -> None:
    """It may come while Ray starts or torch is imported, or to a verb that cannot stop in time."""
    scheduler, exits, terms = Preempting(), [], []  # type: tuple[Preempting, list[int], list[int]]
    task = NodeTask(job(tmp_path, saves_within_s=8.0), scheduler, exit_process=exits.append)
    started(tmp_path).begin(0, 100, job="7")
    preemption = Preemption(task.job, scheduler, task.give_up)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        until(lambda: preemption.warned and preemption.terminated)
        signal.signal(signal.SIGTERM, lambda number, frame: terms.append(number))
        until(lambda: bool(terms))
        assert not scheduler.requeued
        (tmp_path / "stop").touch()
        time.sleep(4)  # a repetition that had begun has ended
        terms.clear()
        time.sleep(1.5)
        assert not terms, "the verb has reacted"
        until(lambda: exits == [0])
        assert len(scheduler.requeued) == 1
        assert [(attempt.first_step, attempt.last_step) for attempt in task.attempts.read()] == [(0, 0)]
    finally:
        preemption.over = True


@pytest.mark.parametrize(("saved", "code"), [(0, 2), (40, 0)])
def test_a_verb_whose_head_is_gone_is_given_up_and_requeued_if_it_has_saved(
    tmp_path: Path, saved: int, code: int
) -> None:
    """Ray would end the process without a message."""
    scheduler, exits = Preempting(), []  # type: tuple[Preempting, list[int]]

    class Exited(BaseException): ...

    def leave(status: int) -> None:
        exits.append(status)
        preemption.over = True  # as the end of the process would
        raise Exited

    save(tmp_path, saved)
    started(tmp_path).begin(0, 100, job="7")
    task = NodeTask(job(tmp_path), scheduler, exit_process=leave, poll_s=0.1, lost_polls=2)
    preemption = Preemption(task.job, scheduler, task.give_up)
    with socket.create_server(("127.0.0.1", 0)) as head:
        member = JoinedNode(None, f"127.0.0.1:{head.getsockname()[1]}", None)  # type: ignore[arg-type]

        def look() -> None:
            with pytest.raises(Exited):
                task.watch(head_lost(member), preemption)

        watch = threading.Thread(target=look, daemon=True)
        watch.start()
        time.sleep(1)
        assert watch.is_alive() and not exits
    watch.join(300)
    assert exits == [code] and len(scheduler.requeued) == (code == 0)


def until(holds: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- room


def test_nodes_are_lost_if_the_workers_had_room_and_no_longer_do() -> None:
    """Not while the cluster comes up, and not if none is connected."""
    rooms: list[int | None] = [None, 1, 2, None, 4, 1, 2]
    lost = room_lost(WorkerNeeds(2, 1.5, 0.0), lambda each: rooms.pop(0))
    assert [bool(lost()) for _ in range(7)] == [False] * 5 + [True, False]


def test_room_is_counted_by_node() -> None:
    """Three nodes of 4 CPUs have 12 CPUs, and room for three workers of 2.5."""
    assert sum(cluster.fitting({"CPU": 4.0}, {"CPU": 2.5, "GPU": 0.0}) for _ in range(3)) == 3
    assert cluster.fitting({"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}) == 2
    assert cluster.room({"CPU": 1.0}) is None, "no cluster is connected"


# --- verbs


def ending(code: int) -> Callable[..., object]:
    def app(args: list[str], prog_name: str) -> None:
        raise SystemExit(code)

    return app


def test_a_verb_out_of_memory_ends_its_job() -> None:
    def app(args: list[str], prog_name: str) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with fails(JobEnded, "memory", subject="evaluate"):
        run_verb("evaluate", [], app)


def test_an_exit_code_is_final_unless_the_verb_was_stopped() -> None:
    """A sweep with a failed trial exits with 1: to start it again would change nothing."""
    assert run_verb("sweep", [], ending(0)) and not run_verb("sweep", [], ending(cli.STOPPED))
    with fails(JobEnded, "sweep", subject=1):
        run_verb("sweep", [], ending(1))
