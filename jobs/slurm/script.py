"""The batch script of a submission: what its profile and resources become in sbatch's options and in the shell."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

from jobs.schedulers import gpus
from jobs.schedulers.submission import Submission

REQUEUE = "requeue"  # begins the names of files by which a task has the batch script requeue the job
MODULE_ERRORS = ("Lmod has detected the following error", "Unable to locate a modulefile", "ModuleCmd_Load.c")
# An elastic job has one task on each node that it gets, in a step that survives the loss of a node.
ELASTIC = ("--ntasks-per-node=1", "--no-kill", "--wait=0", "--kill-on-bad-exit=0")


def script(submission: Submission) -> str:
    """The batch script, exactly as it is submitted."""
    from pipeline.compat.submitit import run_command, sbatch_script

    command = run_command(python(submission), submission.folder)
    return sbatch_script(command, submission.folder, parameters(submission), len(submission.jobs))


def parameters(submission: Submission) -> dict[str, object]:
    """sbatch's options, as submitit names them."""
    resources, profile = submission.resources, submission.profile
    options = {
        "job_name": submission.name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "comment": profile.comment,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type if profile.mail_user else None,
        "time": resources.minutes,
        "nodes": resources.nodes[0],
        # given a number of tasks, SLURM gives an elastic job the fewest nodes, however many are free
        "ntasks_per_node": None if resources.elastic else 1,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": _gpus(submission),
        "mem": f"{math.ceil(resources.memory_gb * 1024)}MB" if resources.memory_gb else None,
        "signal_delay_s": profile.signal_delay_s,
        "dependency": _dependency(submission),
        "stderr_to_stdout": True,
        "setup": _setup(submission),
        "teardown": _teardown(submission.folder) if profile.container else None,
        "srun_args": ["--export=ALL", f"--cpus-per-task={resources.cpus_per_task}", *(ELASTIC * resources.elastic)],
        "array_parallelism": submission.throttle or len(submission.jobs),
        "additional_parameters": _additional(submission),
    }
    given = {key: value for key, value in options.items() if value is not None}
    return given | {"wckey": None}  # submitit's default is its own name, which sites that check such keys refuse


def python(submission: Submission) -> str:
    """The Python command on a node: ignores USR2 until a handler is set, and keeps the working directory off sys.path.

    SLURM's warning would otherwise kill it while it imports, and the checkout that a job is submitted from would be
    imported instead of the snapshot.
    """
    box = submission.profile.container
    ignoring = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"]
    if box is None:
        return shlex.join([*ignoring, sys.executable, "-P"])
    binds = [word for bind in box.binds for word in ("--bind", bind)]
    return shlex.join(["apptainer", "exec", *box.options, *binds, box.image, *ignoring, *box.python.split(), "-P"])


def requeue_mark(folder: Path, raw_job: str) -> Path:
    """The file by which a task without scontrol, in a container, has the batch script requeue the job."""
    return folder / f"{REQUEUE}-{raw_job}"


def _dependency(submission: Submission) -> str | None:
    conditions = [submission.dependency, submission.after and f"afterok:{submission.after}"]
    return ",".join(filter(None, conditions)) or None


def _gpus(submission: Submission) -> int | str | None:
    """The value of --gpus-per-node; None if the profile requests GPUs by another option, or none."""
    profile, resources = submission.profile, submission.resources
    if gpus.requested(profile.extra, resources.nodes[0]) is not None:
        return None
    typed = isinstance(profile.gpus_per_node, str) and gpus.number(profile.gpus_per_node) == resources.gpus_per_node
    return (profile.gpus_per_node if typed else resources.gpus_per_node) or None


def _additional(submission: Submission) -> dict[str, object]:
    """Options that submitit has no name for; an option that is False is left out, one that is None has no value."""
    extra = {name: value for name, value in submission.profile.extra.items() if value is not False}
    options: dict[str, object] = {"requeue": True, **{k: True if v is None else v for k, v in extra.items()}}
    if submission.resources.elastic:
        options |= {"nodes": "{}-{}".format(*submission.resources.nodes), "no-kill": True}
    return options


def _setup(submission: Submission) -> list[str]:
    profile = submission.profile
    lines = [_load(module) for module in profile.modules]
    variables = {**profile.nccl.variables, **profile.environment}
    lines += [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    lines += [f"export TMPDIR={shlex.quote(profile.scratch)}"] if profile.scratch else []
    lines += [f'export PYTHONPATH={shlex.quote(str(submission.snapshot))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    return [*lines, *profile.setup]


def _load(module: str) -> str:
    """Loads a module, or ends the job with its message, from a second try in a subshell: the first changes this shell.

    A job would else go on in the wrong environment. A site's wrapper may hide the exit code; then the words of Lmod and
    of Environment Modules tell.
    """
    load = f"module load {shlex.quote(module)}"
    why = f'"$({load} 2>&1 | tail -n 5 | tr "\\n" " ")"'
    says = f'case "$({load} 2>&1)" in {"|".join(f"*{shlex.quote(words)}*" for words in MODULE_ERRORS)}) false;; esac'
    return f"{load} && {says} || {{ echo {shlex.quote(f'adaptnet: {load}: ')}{why}; exit 2; }}"


def _teardown(folder: Path) -> list[str]:
    """Requeues the job if its task has left `requeue_mark`, and keeps its exit code."""
    mark = f'{shlex.quote(str(folder / REQUEUE))}-"$SLURM_JOB_ID"'
    return ["code=$?", f'if [ -e {mark} ]; then rm {mark}; scontrol requeue "$SLURM_JOB_ID"; fi', "exit $code"]
