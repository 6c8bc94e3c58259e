"""Jobs on SLURM: the only user of submitit.

A job is one task per node. The first node's task runs the verb as on a workstation; the others lend their node to Ray.
Correctness rests on checkpoints and on starting = resuming: SLURM starts a requeued job's script anew, that loads the
same `Job`, and training goes on from its newest checkpoint. submitit's own handler would requeue at once, count each
preemption of a short job as a time-out, and leave Ray's main thread in mid-step; it is replaced here.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jobs.slurm import munge
from jobs.slurm.site import Site
from pipeline.errors import AdaptNetError, ConfigError, ResourceError
from pipeline.execution import allocation, cluster
from pipeline.execution.allocation import JoinedNode, Node
from pipeline.runs import provenance
from pipeline.runs.files import whole_folder, write_text
from pipeline.training import memory

Where = Literal["slurm", "local", "debug"]
FOLDER, RECORD, STARTS = "slurm", "jobs.json", "starts.json"
START_UP_S = 60  # imports, Ray, workers: before these are over nothing is saved
SIGNALLED_EARLY_S = 60  # SLURM's warning may come so much before its time
FRUITLESS = 3  # starts in a row that saved no step, after which a job ends
LATE_AFTER = 0.75  # of the time from SLURM's warning to the end, after which a verb that has not stopped is left
INSIST_S = 1.0  # how often a verb is told to stop: it may not have listened yet
PACKAGES = ("pipeline", "jobs", "tuning")
REQUEUE = "requeue"  # begins the names of files by which a task asks the batch script for it
# Of an elastic job: one task on each node that it got, in a step that outlives the loss of a node.
ELASTIC = ("--ntasks-per-node=1", "--no-kill", "--wait=0", "--kill-on-bad-exit=0")
LOST_LOOKS = 35  # in a row, one a second, that find head or nodes lost: then a verb is left that would end it soon
ANSWER_S = 10.0  # within which SLURM says a job's state, while its time runs out


@dataclass(frozen=True)
class Resources:
    """What a job asks for; nodes (fewest, most)."""

    nodes: tuple[int, int]
    gpus_per_node: int
    cpus_per_task: int
    minutes: int
    memory_gb: float | None = None

    @property
    def elastic(self) -> bool:
        return self.nodes[0] < self.nodes[1]


# ---- what runs on the nodes


class Needs(NamedTuple):
    """The least that a run goes on with: so many workers, each of which takes so many CPUs and GPUs."""

    workers: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Job:
    """A verb of `adaptnet` and its arguments, to be run over a job's nodes; home is seen by all of them.

    run_dir is the folder of a training or a sweep, whose steps count as progress; None for a verb that is done again
    from its start. saves_within_s is how long before its end SLURM warns. needs is None for what runs without workers.
    """

    verb: str
    arguments: tuple[str, ...]
    home: str
    run_dir: str | None
    patience_s: float
    max_requeues: int
    fewest_nodes: int = 1
    uses_ray: bool = True
    saves_within_s: float = 90.0
    needs: Needs | None = None

    def __call__(self) -> str:
        """Runs this node's part. What it gives back is for people: "finished", or why it is not.

        A user's error is printed without a traceback and ends the task with exit code 2.
        """
        try:
            node = node_here(Path(self.home), self.patience_s)
            return self._follow(node) if node is not None and not node.is_head else self._lead(node)
        except AdaptNetError as error:
            print(f"adaptnet: {error}", flush=True)
            raise SystemExit(2) from None

    def _follow(self, node: Node) -> str:
        """Lends this node to Ray; a warning is the head's to take.

        Where SLURM ends the job, it ends Ray here at the same moment as this task: that is no failure of this node's.
        """
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if not self.uses_ray:
            return "nothing to do on this node"
        told: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
        try:
            with allocation.joined(node) as member:
                member.serve()
        except ResourceError:
            if not told:
                raise
        return "SLURM has ended the job" if told else "the head has ended"

    def _lead(self, node: Node | None) -> str:
        starts = Starts(Path(self.home))
        if self.run_dir is not None:
            (Path(self.run_dir) / "stop").unlink(missing_ok=True)  # a former start's
        warned = Warned(self)  # from now on: a job may be told to save while Ray comes up
        try:
            if node is None or not self.uses_ray:
                starts.begin(self.steps(), self.max_requeues)
                return self._drive(None, starts, warned)
            with allocation.joined(node) as member:
                starts.begin(self.steps(), self.max_requeues)  # imports much; meanwhile the others join
                alive = member.await_nodes(self.fewest_nodes)
                print(f"Ray at {member.address}: {alive} of {len(node.names)} nodes", flush=True)
                return self._drive(member, starts, warned)
        finally:
            warned.over = True
            if in_slurm():
                signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # while Python ends it would be fatal

    def checkpoint(self) -> Any:
        """submitit's polite path, for a warning that comes before `__call__`: the same job again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _drive(self, member: JoinedNode | None, starts: Starts, warned: Warned) -> str:
        words = [*self.arguments, *([f"compute.address={member.address}"] if member else [])]
        lost: ResourceError | None = None
        finished = False
        if member is not None and self.needs is not None:
            for look in (head_is_there(member), room_is_there(self.needs)):  # one may wait for Ray
                threading.Thread(target=self._watch, args=(look, warned), name="watch", daemon=True).start()
        try:
            self._await_lease(warned)
            if not warned.came and not warned.terminated:
                finished = run_verb(self.verb, words)
        except ResourceError as error:  # a dead head or node: worth another start
            lost = error
        except Ended:
            if not warned.came:
                raise
        finally:
            warned.over = True
            starts.end(self.steps())
        if finished:
            return "finished"
        if warned.came:
            self.put_back("asked to save before its end")
        if self.stopping:  # SLURM cancels or requeues by itself, and may have ended workers before they had saved
            return "stopped"
        if lost and not (in_slurm() and starts.progressed):
            raise lost
        if lost:
            self.put_back(str(lost))
        return "stopped"

    def _watch(self, lost: Callable[[], str], warned: Warned) -> None:
        """Leaves a verb that waits for what does not come back, and has the job started anew.

        A call into Ray whose head is gone may not return before Ray, or a sweep's guard, ends this very process. And
        SLURM gives a job no node for one that it has lost: workers that have no room left would wait to its end.
        """
        looks = 0
        while not warned.over:
            why = lost()
            looks = looks + 1 if why else 0
            if looks >= LOST_LOOKS:
                try:
                    self.leave(why, warned, needs_progress=True)
                finally:
                    if not warned.over:
                        os._exit(2)
            time.sleep(INSIST_S)

    def put_back(self, why: str) -> None:
        """Requeues this job where another start is worth it, and ends this task without a result."""
        Starts(Path(self.home)).check(why, self.max_requeues)
        requeue(why)
        raise SystemExit(0)

    def leave(self, why: str, warned: Warned, *, needs_progress: bool = False) -> None:
        """As `put_back`, from a thread of a process whose verb does not end; returns, saying why, if not requeued."""
        starts = Starts(Path(self.home))
        starts.end(self.steps())
        if warned.over:  # it has ended meanwhile
            return
        try:
            if needs_progress:
                starts.check_progress(why)
            self.put_back(why)
        except AdaptNetError as error:
            print(f"adaptnet: {error}", flush=True)
        except SystemExit:
            os._exit(0)

    def _await_lease(self, warned: Warned) -> None:
        """After a lost node: the former driver's lease is taken over once it has been silent; SLURM has ended it."""
        from pipeline.runs import lease

        if self.run_dir is None or int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
            return
        folder, deadline = Path(self.run_dir), time.monotonic() + lease.SILENT_S + 2 * lease.BEAT_S
        held = [folder / "lease.json", *folder.glob("trials/*/lease.json")]
        if any(map(lease.refuses, held)):
            print("waiting until the lease of this run's former driver has run out", flush=True)
        while any(map(lease.refuses, held)) and not warned.came and time.monotonic() < deadline:
            time.sleep(1)

    @property
    def stopping(self) -> bool:
        """Whether the verb was told to stop, and has heard it."""
        return self.run_dir is not None and (Path(self.run_dir) / "stop").exists()

    def steps(self) -> int:
        """Steps that are saved: the newest checkpoint's, of a sweep the sum over its trials."""
        if self.run_dir is None:
            return 0
        from pipeline.registry.resolve import newest_step

        folder = Path(self.run_dir)
        return sum(newest_step(each) for each in (folder, *folder.glob("trials/*")))


class Ended(AdaptNetError):
    """A verb has come to an end of its own, and would come to it again."""


class Warned:
    """What SLURM has told this task. Its warning is passed on as SIGTERM, by which a verb saves and stops.

    It is passed on until the verb has left its mark, a file `stop`, since it may still be starting. Where the verb has
    not stopped shortly before SLURM's time is over, as in a long evaluation, the job is requeued from its newest
    checkpoint all the same.
    """

    def __init__(self, job: Job) -> None:
        self.came = self.terminated = self.over = False
        self._job = job
        if in_slurm():
            signal.signal(signal.SIGUSR2, self._take)
            signal.signal(signal.SIGTERM, self._note)
            threading.Thread(target=self._pass_on, name="warning", daemon=True).start()

    def _take(self, number: int, frame: Any) -> None:
        self.came = True

    def _note(self, number: int, frame: Any) -> None:
        self.terminated = True

    def _pass_on(self) -> None:
        while not self.came:
            time.sleep(INSIST_S / 5)
        if self._job.run_dir is None:
            print("SLURM's warning: this job nears its end", flush=True)
            return
        print("SLURM's warning: saving, then the job is requeued", flush=True)
        deadline = time.monotonic() + LATE_AFTER * self._job.saves_within_s
        while not self.over and time.monotonic() < deadline:
            if not self._job.stopping:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(INSIST_S)
        if not self.over:  # the verb does not listen
            self._job.leave(f"not stopped {LATE_AFTER * self._job.saves_within_s:g} s after SLURM's warning", self)


@dataclass(frozen=True)
class Starts:
    """What each start of a job came to, in home/slurm/starts.json: [{"job", "restart", "host", "from", "to"}]."""

    home: Path

    @property
    def _path(self) -> Path:
        return self.home / FOLDER / STARTS

    def read(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        return found

    def begin(self, step: int, max_requeues: int) -> None:
        """A start that died without a word is closed by the step that the next one finds.

        Raises ResourceError where SLURM has started the job once more than is worth it, or allowed.
        """
        found = self.read()
        if found and found[-1]["to"] is None:
            found[-1]["to"] = step
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        entry = {"job": job_id(), "restart": restart, "host": socket.gethostname(), "time": time.time()}
        self._write(found)
        self._check_fruit("SLURM has started it again")
        if restart > max_requeues:
            raise ResourceError(self._spent(restart, max_requeues, "SLURM has started it again"))
        self._write([*found, {**entry, "from": step, "to": None}])

    def end(self, step: int) -> None:
        found = self.read()
        found[-1]["to"] = step
        self._write(found)

    @property
    def progressed(self) -> bool:
        """Whether this start has saved a step."""
        last = self.read()[-1]
        return bool(last["to"] > last["from"])

    def check_progress(self, why: str) -> None:
        """Raises ResourceError where this start has saved nothing: another would lose the same."""
        if not self.progressed:
            raise ResourceError(f"{self.home}: {why}, before this start had saved a step; see slurm/*-ray*.log there")

    def check(self, why: str, max_requeues: int) -> None:
        """Raises ResourceError where another start is not worth it, or not allowed."""
        self._check_fruit(why)
        restart = self.read()[-1]["restart"]
        if restart >= max_requeues:
            raise ResourceError(self._spent(restart, max_requeues, why))

    def _check_fruit(self, why: str) -> None:
        job = job_id()
        last = [each for each in self.read() if each["job"] == job and job is not None][-FRUITLESS:]
        if len(last) == FRUITLESS and all(each["to"] <= each["from"] for each in last):
            raise ResourceError(
                f"{self.home}: the last {FRUITLESS} starts of this job saved no new step, so it is not started again "
                f"({why}). Give it more --time, or save more often (checkpoint.every); `adaptnet jobs resubmit` goes on"
            )

    def _spent(self, restart: int, max_requeues: int, why: str) -> str:
        return (
            f"{self.home}: requeued {restart} times; --max-requeues (={max_requeues}) allows no more ({why}). "
            "`adaptnet jobs resubmit` goes on"
        )

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(entries, indent=1))


def head_is_there(member: JoinedNode) -> Callable[[], str]:
    """Looks whether the head listens; what is lost, empty where nothing is."""
    return lambda: "" if member.head_listens() else f"Ray's head at {member.address} is gone"


def room_is_there(needs: Needs) -> Callable[[], str]:
    """Looks whether the living nodes have room for the workers, once they have had it; what is lost, or empty."""
    had = False

    def lost() -> str:
        nonlocal had
        room = cluster.room({"CPU": needs.cpus, "GPU": needs.gpus})
        had = had or (room is not None and room >= needs.workers)
        if room is None or room >= needs.workers or not had:
            return ""
        return f"nodes are lost: those that are left have room for {room} of the {needs.workers} workers that it needs"

    return lost


def run_verb(verb: str, words: Sequence[str]) -> bool:
    """Runs a verb in this process; whether it came to its end.

    Raises Ended where it gave up with an exit code, or had no memory left.
    """
    from jobs import cli

    try:
        cli.app(args=[verb, *words], prog_name="adaptnet")
    except SystemExit as left:
        if left.code in (None, 0):
            return True
        if left.code == cli.STOPPED:
            return False
        raise Ended(f"adaptnet {verb} ended with exit code {left.code}") from None
    except (MemoryError, RuntimeError) as error:
        spent = memory.words_if_spent(error)
        if spent is None:
            raise
        raise Ended(f"adaptnet {verb}: memory is spent ({spent}). Take smaller batches") from error
    return True


def requeue(why: str) -> None:
    """Puts this job back into the queue; SLURM then ends its tasks. One that is cancelled meanwhile stays away.

    In a container, which has no SLURM, the batch script does it when this task has ended.
    """
    job = str(job_id())
    if _is_ending(job):
        print(f"job {job} is not requeued: SLURM ends it already", flush=True)
        return
    print(f"requeueing job {job}: {why}", flush=True)
    if shutil.which("scontrol") is None:
        (Path(os.environ["SUBMITIT_FOLDER"]) / f"{REQUEUE}-{os.environ['SLURM_JOB_ID']}").touch()
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"job {job} cannot be requeued: {error}") from None
    if done.returncode != 0:
        raise ResourceError(f"job {job} cannot be requeued: {' '.join(done.stderr.split())}")


def _is_ending(job: str) -> bool:
    """Whether SLURM ends the job by its own decision or a user's: `scontrol requeue` would undo a cancellation."""
    try:
        done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.SubprocessError):  # no SLURM in a container; or too busy to say
        return False
    return done.stdout.strip() == "COMPLETING"


def job_id() -> str | None:
    """SLURM's id of this job, ARRAY_TASK for one of an array: as it was told at submission. None outside SLURM."""
    given = os.environ
    if "SLURM_ARRAY_TASK_ID" in given:
        return f"{given['SLURM_ARRAY_JOB_ID']}_{given['SLURM_ARRAY_TASK_ID']}"
    return given.get("SLURM_JOB_ID")


def in_slurm() -> bool:
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def node_here(home: Path, patience_s: float) -> Node | None:
    """This task's node as SLURM's variables say; None outside SLURM."""
    if not in_slurm():
        return None
    from submitit.slurm.slurm import SlurmJobEnvironment

    given = os.environ
    job = SlurmJobEnvironment()
    cpus = given.get("SLURM_CPUS_PER_TASK") or given.get("SLURM_CPUS_ON_NODE") or "1"
    return Node(
        rank=job.node,
        names=tuple(job.hostnames),
        ip=_address(given.get("SLURMD_NODENAME") or job.hostnames[job.node]),
        key=f"{job.raw_job_id}-{given.get('SLURM_RESTART_COUNT', '0')}",
        folder=home / FOLDER,
        cpus=int(cpus),
        gpus=len([gpu for gpu in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu and gpu != "NoDevFiles"]),
        memory_bytes=_memory_bytes(given),
        patience_s=patience_s,
    )


def _memory_bytes(given: Mapping[str, str]) -> int | None:
    """What SLURM gives this job on this node, by the node or by the CPU; None where it counts no memory."""
    megabytes = int(given.get("SLURM_MEM_PER_NODE") or 0)
    megabytes = megabytes or int(given.get("SLURM_MEM_PER_CPU") or 0) * int(given.get("SLURM_CPUS_ON_NODE") or 1)
    return megabytes << 20 if megabytes else None


def _address(name: str) -> str:
    """A node's address: SLURM's own, by the resolver. Where it is a name that means loopback here, the route out."""
    match = None
    if shutil.which("scontrol") is not None:
        shown = subprocess.run(["scontrol", "show", "node", "-o", name], capture_output=True, text=True, timeout=60)
        match = re.search(r"NodeAddr=(\S+)", shown.stdout)
    found = socket.gethostbyname(match[1] if match else name)
    if found == "127.0.1.1" or (found.startswith("127.") and match and match[1] == name):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # no packet is sent
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
    return found


# ---- submission


@dataclass(frozen=True)
class Submission:
    """A job as it was, or would be, handed to SLURM."""

    job: Job
    name: str
    resources: Resources
    site: Site
    array: tuple[Job, ...] = ()
    dependency: str | None = None

    @property
    def folder(self) -> Path:
        """submitit's: pickles and logs."""
        return Path(self.job.home) / FOLDER

    def parameters(self, snapshot: Path) -> dict[str, Any]:
        """sbatch's options, as submitit names them."""
        asked, site = self.resources, self.site
        given = {
            "job_name": self.name,
            "partition": site.partition,
            "account": site.account,
            "qos": site.qos,
            "constraint": site.constraint,
            "exclude": site.exclude,
            "comment": site.comment,
            "mail_user": site.mail_user,
            "mail_type": site.mail_type if site.mail_user else None,
            "time": asked.minutes,
            "nodes": asked.nodes[0],
            # with a number of tasks SLURM gives an elastic job the fewest nodes, however many are free
            "ntasks_per_node": None if asked.elastic else 1,
            "cpus_per_task": asked.cpus_per_task,
            "gpus_per_node": asked.gpus_per_node or None,
            "mem": f"{math.ceil(asked.memory_gb * 1024)}MB" if asked.memory_gb else None,
            "signal_delay_s": site.signal_delay_s,
            "dependency": self.dependency,
            "stderr_to_stdout": True,
            "setup": self._setup(snapshot),
            "teardown": self._teardown() if site.container else None,
            "srun_args": [f"--cpus-per-task={asked.cpus_per_task}", *(ELASTIC if asked.elastic else ())],
            "additional_parameters": self._additional(),
        }
        return {key: value for key, value in given.items() if value is not None}

    def _additional(self) -> dict[str, Any]:
        found: dict[str, Any] = {"requeue": True, **self.site.extra}
        if self.resources.elastic:
            found |= {"nodes": "{}-{}".format(*self.resources.nodes), "no-kill": True}
        return found

    def _setup(self, snapshot: Path) -> list[str]:
        site = self.site
        lines = [f"module load {' '.join(map(shlex.quote, site.modules))}"] if site.modules else []
        lines += [f"export {key}={shlex.quote(value)}" for key, value in site.environment.items()]
        lines += [f"export TMPDIR={shlex.quote(site.scratch)}"] if site.scratch else []
        lines += [f'export PYTHONPATH={shlex.quote(str(snapshot))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
        return [*lines, *site.setup]

    def _teardown(self) -> list[str]:
        """Requeues the job where its task has asked for it and could not do so itself."""
        mark = f'{shlex.quote(str(self.folder / REQUEUE))}-"$SLURM_JOB_ID"'
        return ["code=$?", f'if [ -e {mark} ]; then rm {mark}; scontrol requeue "$SLURM_JOB_ID"; fi', "exit $code"]

    @property
    def python(self) -> str:
        """What starts Python on a node: deaf to a warning until it listens, and to the folder that it is started in.

        SLURM's warning would end it while it imports. The checkout that a job is submitted from would else go before
        the code that was kept for the job.
        """
        box = self.site.container
        deaf = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"]
        if box is None:
            return shlex.join([*deaf, sys.executable, "-P"])
        binds = [word for bind in box.binds for word in ("--bind", bind)]
        return shlex.join(["apptainer", "exec", *box.options, *binds, box.image, *deaf, *box.python.split(), "-P"])

    def script(self) -> str:
        """The batch script, text for text as it is submitted."""
        from submitit.slurm.slurm import _make_sbatch_string

        count = {"map_count": len(self.array)} if self.array else {}
        command = f"{self.python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        return str(_make_sbatch_string(command=command, folder=self.folder, **self.parameters(self.snapshot), **count))

    @property
    def snapshot(self) -> Path:
        """Where this code is kept for the job: by its content, so that equal code is kept once."""
        return Path(self.job.home) / FOLDER / f"code-{_digest(_sources())[:12]}"


def submit(submission: Submission, where: Where) -> list[str]:
    """Submits; the jobs' ids, one for each array task. Raises ResourceError with SLURM's words where it is refused."""
    submission.folder.mkdir(parents=True, exist_ok=True)
    _snapshot(submission.snapshot)
    jobs = submission.array or (submission.job,)
    executor = _executor(submission, where)
    from submitit.helpers import clean_env

    which = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}  # clean_env hides that too
    with clean_env():
        os.environ.update(which)
        if where == "local":
            before = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = os.pathsep.join([str(submission.snapshot), *([before] if before else [])])
        try:
            if len(jobs) == 1:
                made = [executor.submit(jobs[0])]
            else:
                with executor.batch():
                    made = [executor.submit(job) for job in jobs]
        except Exception as error:
            raise _refused(error) from None
    for job, one in zip(jobs, made, strict=True):
        remember(Path(job.home), _entry(submission, job, one, where))
    if where == "debug":
        for one in made:
            one.result()
    return [str(one.job_id) for one in made]


def _entry(submission: Submission, job: Job, made: Any, where: Where) -> dict[str, Any]:
    return {
        "id": str(made.job_id),
        "where": where,
        "name": submission.name,
        "verb": job.verb,
        "arguments": list(job.arguments),
        "run_dir": job.run_dir,
        "folder": str(submission.folder),
        "log": str(made.paths.stdout),
        "resources": asdict(submission.resources),
        "site": submission.site.model_dump(mode="json"),
        "submitted": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid() if where == "debug" else None,
        "needs": job.needs,
        "script": submission.script() if where == "slurm" else None,
    }


def _executor(submission: Submission, where: Where) -> Any:
    import submitit

    if where == "debug":
        return submitit.DebugExecutor(submission.folder)
    if where == "local":
        executor = submitit.LocalExecutor(submission.folder, python=f"{shlex.quote(sys.executable)} -P")
        executor.update_parameters(timeout_min=submission.resources.minutes)
        return executor
    check_slurm()
    slurm = submitit.SlurmExecutor(submission.folder, max_num_timeout=10**6, python=submission.python)
    slurm.update_parameters(**submission.parameters(submission.snapshot))
    return slurm


def check_slurm() -> None:
    """Raises ResourceError where this machine has no SLURM, or cannot speak to it."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ResourceError(
            "sbatch: this machine has no SLURM. --dry-run shows the script, --where local runs the job here, and "
            "infra/slurm/testcluster brings up a SLURM to try"
        )
    if why := munge.absent():
        raise ResourceError(
            f"sbatch: {why}, and SLURM takes no job without it. Start it (systemctl start munge), or ask who runs "
            "SLURM here; --where local runs the job on this machine"
        )


def _refused(error: Exception) -> ResourceError:
    """SLURM's words, and what it knows instead."""
    words = " ".join(str(error).replace("subprocess-exited-with-error", "").split())[-600:]
    known = ""
    if "account" in words.lower():  # SLURM's words for it name the partition as well
        mine = ("where", f"user={getpass.getuser()}")
        known = f". Your accounts: {_ask('sacctmgr', '-nP', 'show', 'assoc', *mine, 'format=account')}"
    elif "partition" in words.lower():
        known = f". Known partitions: {_ask('sinfo', '-h', '-o', '%R')}"
    elif "qos" in words.lower():
        known = f". Known QOS: {_ask('sacctmgr', '-nP', 'show', 'qos', 'format=name')}"
    elif "time limit" in words.lower() or "node count" in words.lower():
        known = f". The partitions allow: {_ask('sinfo', '-h', '-o', '%R: %l on %D nodes')}"
    elif "configuration is not available" in words.lower():
        known = f". The nodes have: {_ask('sinfo', '-h', '-o', '%N: %c CPUs, %m MB, %G')}"
    elif "munge" in words.lower() or "authentication" in words.lower():
        known = ". Is munged running on this machine?"
    return ResourceError(f"SLURM refused the job: {words}{known}")


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return ", ".join(dict.fromkeys(done.stdout.split("\n")[:-1])) or "unknown"


def _sources() -> dict[str, Path]:
    """The code that runs: files of our packages by their path within the snapshot."""
    root = Path(__file__).parents[2]
    found = (path for package in PACKAGES for path in sorted((root / package).rglob("*")))
    return {str(p.relative_to(root)): p for p in found if p.suffix in (".py", ".yaml", ".html", ".css", ".js")}


def _digest(sources: Mapping[str, Path]) -> str:
    digest = sha256()
    for name, path in sources.items():
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _snapshot(folder: Path) -> None:
    """Copies the code, whole or not at all."""
    if folder.is_dir():
        return
    with suppress(FileExistsError):  # another submission was first
        with whole_folder(folder) as aside:
            for name, path in _sources().items():
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            write_text(aside / provenance.KEPT, json.dumps(provenance.git_state(Path(__file__).parents[2])))


def remember(home: Path, entry: Mapping[str, Any]) -> None:
    """Adds a job to home/slurm/jobs.json, the newest last."""
    path = home / FOLDER / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*recorded(home), entry], indent=1))


def recorded(home: Path) -> list[dict[str, Any]]:
    """The jobs of a run's folder, the newest last."""
    path = home / FOLDER / RECORD
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


# ---- times


def minutes_of(text: str) -> int:
    """ "24h", "90m", "2d", "1:30:00", "1-12:00:00" or a number of minutes. Raises ConfigError for anything else."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(m|min|h|d)?", text.strip()):
        factor = {"m": 1, "min": 1, "h": 60, "d": 1440, None: 1}[match[2]]
        minutes = math.ceil(float(match[1]) * factor)
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text.strip()):
        days, hours, minute, seconds = (int(part or 0) for part in match.groups())
        minutes = days * 1440 + hours * 60 + minute + math.ceil(seconds / 60)
    else:
        minutes = 0
    if minutes == 0:
        raise ConfigError(f"--time (={text}): write 90m, 24h, 2d, 1:30:00 or 1-12:00:00")
    return minutes


def check_time(minutes: int, signal_delay_s: int) -> None:
    """A job must come up, and its warning may come early. Raises ConfigError for a time that is too short."""
    least = signal_delay_s + START_UP_S + SIGNALLED_EARLY_S
    if minutes * 60 < least:
        raise ConfigError(
            f"--time (={minutes} min) is below {least} s: {signal_delay_s} s to save before the end (--signal-delay), "
            f"{START_UP_S} s to start, and SLURM's warning may come {SIGNALLED_EARLY_S} s early. Give more time or a "
            "shorter --signal-delay"
        )
