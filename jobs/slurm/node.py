"""The SLURM job that this process is a task of, read from SLURM's environment variables."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Mapping

from jobs.schedulers import NodeEnv, NodeShare
from jobs.slurm.ask import ask

NO_GPU = ("", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES without a GPU


def in_slurm() -> bool:
    """Whether this process is a task of a job that we submitted to SLURM."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def job_id(variables: Mapping[str, str]) -> str:
    """The job's id as `submit` returned it: ARRAY_TASK for one of an array."""
    if "SLURM_ARRAY_TASK_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return variables["SLURM_JOB_ID"]


def node_env() -> NodeEnv | None:
    """This task's place in its job; None outside SLURM."""
    if not in_slurm():
        return None
    from pipeline.compat.submitit import slurm_task

    variables, task = os.environ, slurm_task()
    restart = variables.get("SLURM_RESTART_COUNT", "0")
    ends_at = variables.get("SLURM_JOB_END_TIME")
    return NodeEnv(
        job=job_id(variables),
        rank=task.node,
        hosts=task.hosts,
        restart=int(restart),
        ends_at=float(ends_at) if ends_at else None,
        share=NodeShare(
            key=f"{task.raw_job}-{restart}",
            ip=_address(variables.get("SLURMD_NODENAME") or task.hosts[task.node]),
            cpus=int(variables.get("SLURM_CPUS_PER_TASK") or variables.get("SLURM_CPUS_ON_NODE") or "1"),
            gpus=len([gpu for gpu in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu not in NO_GPU]),
            memory_bytes=memory_bytes(variables),
        ),
    )


def memory_bytes(variables: Mapping[str, str]) -> int | None:
    """The job's memory on this node, which SLURM gives per node or per CPU; None if SLURM does not limit it."""
    megabytes = int(variables.get("SLURM_MEM_PER_NODE") or 0)
    megabytes = megabytes or int(variables.get("SLURM_MEM_PER_CPU") or 0) * int(
        variables.get("SLURM_CPUS_ON_NODE") or 1
    )
    return megabytes << 20 if megabytes else None


def _address(name: str) -> str:
    """A node's IP address as SLURM knows it. If that is a name for loopback here, the address of the route out."""
    match = None
    if shutil.which("scontrol") is not None:
        shown = ask("scontrol", "show", "node", "-o", name)
        match = re.search(r"NodeAddr=(\S+)", shown.stdout)
    address = socket.gethostbyname(match[1] if match else name)
    if address == "127.0.1.1" or (address.startswith("127.") and match and match[1] == name):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # no packet is sent
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
    return address
