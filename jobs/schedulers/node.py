"""What runs on each node of a job.

The first node's task runs the verb as on a workstation; the others lend their nodes to Ray. Correctness rests on
checkpoints, and on starting being the same as resuming: a scheduler that requeues a job starts the same `Job` again,
and training resumes from its newest checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.schedulers.attempts import Attempts
from jobs.schedulers.preemption import Preemption
from pipeline.errors import AdaptNetError, ResourceError
from pipeline.execution import allocation, cluster
from pipeline.execution.allocation import JoinedNode, Node
from pipeline.training import memory

if TYPE_CHECKING:
    from jobs.schedulers import NodeEnv, Scheduler
    from jobs.schedulers.submission import Job, WorkerNeeds

POLL_S = 1.0  # interval between checks of Ray's head and nodes
LOST_POLLS = 35  # consecutive failed checks after which the verb is abandoned


class JobEnded(AdaptNetError):
    """A verb ended by itself, and would end in the same way again."""


class NodeTask:
    """One node's part of a job.

    exit_process ends this process at once, poll_s and lost_polls are those of `watch`: parameters for tests.
    """

    def __init__(
        self,
        job: Job,
        scheduler: Scheduler,
        *,
        exit_process: Callable[[int], object] = os._exit,
        poll_s: float = POLL_S,
        lost_polls: int = LOST_POLLS,
    ) -> None:
        self.job, self.scheduler = job, scheduler
        self.attempts = Attempts(Path(job.home))
        self._env: NodeEnv | None = None
        self._exit, self._poll_s, self._lost_polls = exit_process, poll_s, lost_polls

    def run(self) -> str:
        """Returns, for people to read, "finished" or why the verb is not.

        A user's error is printed without a traceback and ends the task with exit code 2.
        """
        try:
            self._env = self.scheduler.node()
            node = self._node()
            return self._lead(node) if node is None or node.is_head else self._follow(node)
        except AdaptNetError as error:
            print(f"adaptnet: {error}", flush=True)
            raise SystemExit(2) from None

    def _node(self) -> Node | None:
        """The node to bring up Ray on; None if the verb starts Ray by itself."""
        env = self._env
        if env is None or env.share is None:
            return None
        share = env.share
        return Node(
            rank=env.rank,
            names=env.hosts,
            ip=share.ip,
            key=share.key,
            folder=self.job.folder,
            cpus=share.cpus,
            gpus=share.gpus,
            memory_bytes=share.memory_bytes,
            patience_s=self.job.patience_s,
        )

    def _follow(self, node: Node) -> str:
        """Lends this node to Ray and ignores warnings, which are the head's to handle.

        A scheduler that ends the job ends Ray on this node at the same moment as this task; the node has not failed.
        """
        self.scheduler.on_preemption(None)
        if not self.job.uses_ray:
            return "nothing to do on this node"
        signals: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
        try:
            with allocation.joined(node) as member:
                member.serve()
        except ResourceError:
            if not signals:
                raise
        return "the scheduler has ended the job" if signals else "the head has ended"

    def _lead(self, node: Node | None) -> str:
        job = self.job
        if job.run_dir is not None:
            (Path(job.run_dir) / "stop").unlink(missing_ok=True)  # left by a former start
        preemption = Preemption(job, self.scheduler, self.give_up)  # the warning may come while Ray starts
        try:
            if node is None or not job.uses_ray:
                self._begin()
                return self._drive(None, preemption)
            with allocation.joined(node) as member:
                self._begin()  # its imports take long; meanwhile the other nodes join
                alive = member.await_nodes(job.fewest_nodes)
                print(f"Ray at {member.address}: {alive} of {len(node.names)} nodes", flush=True)
                return self._drive(member, preemption)
        finally:
            preemption.over = True
            self.scheduler.on_preemption(None)  # a warning while Python exits would kill it

    def _begin(self) -> None:
        env = self._env
        job, restart = (env.job, env.restart) if env else (None, 0)
        self.attempts.begin(self.job.saved_steps(), self.job.max_requeues, job=job, restart=restart)

    def _drive(self, member: JoinedNode | None, preemption: Preemption) -> str:
        lost: ResourceError | None = None
        finished = False
        self._start_watching(member, preemption)
        try:
            self._await_lease(preemption)
            if not preemption.warned and not preemption.terminated:
                joins = [f"compute.address={member.address}"] if member else []
                finished = run_verb(self.job.verb, [*self.job.arguments, *joins])
        except ResourceError as error:  # a dead head or node is worth another start
            lost = error
        except JobEnded:
            if not preemption.warned:
                raise
        finally:
            preemption.over = True
            self.attempts.end(self.job.saved_steps())
        return "finished" if finished else self._after_stop(lost, preemption)

    def _after_stop(self, lost: ResourceError | None, preemption: Preemption) -> str:
        """The verb has not finished: requeues the job where another start is worth it, and else returns or raises."""
        if preemption.warned:
            self.requeue("the scheduler warned that its time ends")
        if self.job.stopping:  # the scheduler itself cancels or requeues; workers may have ended before they saved
            return "stopped"
        if lost and not (self._env and self.scheduler.can_requeue and self.attempts.progressed):
            raise lost
        if lost:
            self.requeue(str(lost))
        return "stopped"

    def _start_watching(self, member: JoinedNode | None, preemption: Preemption) -> None:
        """Watches Ray's head and the room for workers, each in a thread of its own: a look may wait for Ray."""
        if member is None or self.job.needs is None:
            return
        for lost in (head_lost(member), room_lost(self.job.needs)):
            threading.Thread(target=self.watch, args=(lost, preemption), name="watch", daemon=True).start()

    def watch(self, lost: Callable[[], str], preemption: Preemption) -> None:
        """Gives the verb up if what it waits for does not come back, and has the job started again.

        A call into Ray whose head has died may not return before Ray, or a sweep's guard, ends this very process. And
        no scheduler replaces a node that a running job has lost: workers without room would wait until the job's end.
        lost returns what is lost, "" if nothing is.
        """
        polls = 0
        while not preemption.over:
            reason = lost()
            polls = polls + 1 if reason else 0
            if polls >= self._lost_polls:
                try:
                    self.give_up(reason, preemption, needs_progress=True)
                finally:
                    if not preemption.over:
                        self._exit(2)
            time.sleep(self._poll_s)

    def requeue(self, reason: str) -> None:
        """Requeues this job and ends this task without a result.

        Raises ResourceError if another start is not worth it or not allowed.
        """
        self.attempts.check(reason, self.job.max_requeues)
        self.scheduler.requeue_this_job(reason)
        raise SystemExit(0)

    def give_up(self, reason: str, preemption: Preemption, *, needs_progress: bool = False) -> None:
        """Like `requeue`, from a thread of a process whose verb does not end. Prints why if it fails."""
        self.attempts.end(self.job.saved_steps())
        if preemption.over:  # the verb has ended meanwhile
            return
        try:
            if needs_progress:
                self.attempts.check_progress(reason)
            self.requeue(reason)
        except AdaptNetError as error:
            print(f"adaptnet: {error}", flush=True)
        except SystemExit:
            self._exit(0)

    def _await_lease(self, preemption: Preemption) -> None:
        """After a lost node, waits for the leases of the former driver and its trials to expire, and ends them."""
        from pipeline.runs import lease

        if self.job.run_dir is None or self._env is None or self._env.restart == 0:
            return
        folder, deadline = Path(self.job.run_dir), time.monotonic() + lease.SILENT_S + 2 * lease.BEAT_S
        held = [lease.Watch(path) for path in (folder / lease.FILE, *folder.glob(f"trials/*/{lease.FILE}"))]
        held = [watch for watch in held if not watch.expire()]
        if held:
            print("waiting until the lease of this run's former driver expires", flush=True)
        while held and not preemption.warned and time.monotonic() < deadline:
            time.sleep(1)
            held = [watch for watch in held if not watch.expire()]


def head_lost(member: JoinedNode) -> Callable[[], str]:
    """A function that returns what is lost if Ray's head does not listen, else ""."""
    return lambda: "" if member.head_listens() else f"Ray's head at {member.address} is gone"


def room_lost(needs: WorkerNeeds, room: Callable[[dict[str, float]], int | None] = cluster.room) -> Callable[[], str]:
    """A function that returns what is lost if the remaining nodes no longer have room for the workers, else "".

    room({"CPU", "GPU"}) is the number of such workers that the nodes hold, None if no cluster is connected. Nothing is
    lost before there was room once.
    """
    had_room = False

    def lost() -> str:
        nonlocal had_room
        free = room({"CPU": needs.cpus, "GPU": needs.gpus})
        had_room = had_room or (free is not None and free >= needs.workers)
        if free is None or free >= needs.workers or not had_room:
            return ""
        return f"nodes are lost: the remaining ones have room for {free} of the {needs.workers} workers that it needs"

    return lost


def run_verb(verb: str, arguments: Sequence[str], app: Callable[..., object] | None = None) -> bool:
    """Runs a verb in this process; returns whether it finished (False: it saved and stopped on request).

    Raises JobEnded if it gave up with an exit code, or ran out of memory. app is the command, by default `adaptnet`.
    """
    from jobs import cli

    try:
        (app or cli.app)(args=[verb, *arguments], prog_name="adaptnet")
    except SystemExit as left:
        if left.code in (None, 0):
            return True
        if left.code == cli.STOPPED:
            return False
        raise JobEnded(f"adaptnet {verb} ended with exit code {left.code}", key=verb, subject=left.code) from None
    except (MemoryError, RuntimeError) as error:
        message = memory.oom_message(error)
        if message is None:
            raise
        raise JobEnded(
            f"adaptnet {verb}: out of memory ({message}). Take smaller batches", key="memory", subject=verb
        ) from error
    return True
