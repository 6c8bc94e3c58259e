"""Tests of infra/slurm/testcluster: a SLURM as on a site, quick to requeue, and removed without a trace."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_slurm import (
    TESTCLUSTER,
    RealSlurm,
    command,
    environment,
    open_files,
    processes,
    real_slurm,
    residue,
    spaces,
    until,
)

pytestmark = pytest.mark.slurm
REPOSITORY = TESTCLUSTER.parents[2]
CLIENT_OF_A_NODE = """
import os, socket, sys, time
if os.environ["SLURM_PROCID"] == "0":
    server = socket.create_server(("", 7077))
    held = server.accept()
    time.sleep(600)
for _ in range(50):
    try:
        client = socket.create_connection(("node1", 7077), 10)
        break
    except OSError:
        time.sleep(0.1)
output = open(sys.argv[1], "a", buffering=1)
print("connected", file=output)
client.settimeout(6)
try:
    print("closed" if not client.recv(1) else "data", file=output)
except TimeoutError:
    print("silence", file=output)
except OSError as error:
    print(error, file=output)
time.sleep(600)
"""


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path at which nothing exists, and nothing may be left."""
    path = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    path.rmdir()
    yield path
    left = residue(path)
    command("down", root=path)
    assert not left


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def config(cluster: RealSlurm) -> dict[str, str]:
    return dict(re.findall(r"^(\S+) *= (.*?) *$", cluster.run("scontrol", "show", "config"), re.MULTILINE))


def partition(cluster: RealSlurm, name: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", cluster.run("scontrol", "show", "partition", name)))


def test_smoke_a_job_on_two_nodes_runs_and_is_in_the_accounting(cluster: RealSlurm, tmp_path: Path) -> None:
    output = tmp_path / "output"
    job = cluster.sbatch("srun bash -c 'echo $SLURMD_NODENAME'", "--nodes", "2", "--output", str(output))
    cluster.wait(job, "COMPLETED")
    assert sorted(lines(output)) == cluster.nodes == ["node1", "node2"]
    until(lambda: cluster.sacct(job) == ["COMPLETED"], 10)
    assert cluster.testcluster("status").returncode == 0


# As on a site -------------------------------------------------------------------------------------------------------


def test_requeueing_and_preemption_are_configured(cluster: RealSlurm) -> None:
    settings = config(cluster)
    (expire,) = re.findall(r"cred_expire=(\d+)", settings["AuthInfo"])
    assert int(expire) <= 10
    assert "preempt_send_user_signal" in settings["SlurmctldParameters"]
    assert (settings["PreemptType"], settings["PreemptMode"]) == ("preempt/partition_prio", "REQUEUE")
    assert int(settings["KillWait"].split()[0]) >= 10
    assert (settings["ReturnToService"], settings["JobRequeue"]) == ("2", "1")
    assert os.access(settings["Epilog"], os.X_OK)
    written = Path(cluster.env["SLURM_CONF"]).read_text()
    assert f"AccountingStoragePass={cluster.root}/run/munge.sock" in written
    (first,) = re.findall(r"^FirstJobId=(\d+)$", written, re.MULTILINE)
    assert 0 <= 1000 + time.time() * 10 % 60_000_000 - int(first) < 864_000  # tenths of seconds: within a day
    assert int(first) <= int(cluster.sbatch("true")) < int(first) + 1000
    main, high = partition(cluster, "main"), partition(cluster, "high")
    assert (main["PriorityTier"], main["PreemptMode"], main["Default"]) == ("10", "REQUEUE", "YES")
    assert (high["PriorityTier"], high["PreemptMode"]) == ("20", "OFF")
    assert int(main["GraceTime"]) >= 30


def test_each_gpu_has_a_number_and_is_given_to_one_job(cluster: RealSlurm, tmp_path: Path) -> None:
    tell = "srun bash -c 'echo $CUDA_VISIBLE_DEVICES; sleep 2'"
    where = ("--nodelist", "node1", "--output")
    both = cluster.run("srun", "--gpus-per-node", "2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert both == "0,1\n"
    jobs = [cluster.sbatch(tell, "--gpus-per-node", "1", *where, str(tmp_path / name)) for name in "ab"]
    for job in jobs:
        cluster.wait(job, "COMPLETED")
    assert sorted([*lines(tmp_path / "a"), *lines(tmp_path / "b")]) == ["0", "1"]
    assert "CUDA_VISIBLE_DEVICES" not in cluster.run("srun", "env")


def test_slurm_refuses_unknown_partitions_accounts_qos_and_too_many_gpus(cluster: RealSlurm) -> None:
    for option, words in (
        ("--gpus-per-node=3", "node configuration is not available"),
        ("--partition=nowhere", "invalid partition"),
        ("--account=nobodys", "Invalid account"),
        ("--qos=golden", "Invalid qos"),
    ):
        refused = cluster.attempt("sbatch", option, "--wrap", "true")
        assert refused.returncode, f"{option} was accepted"
        assert words in refused.stderr


def test_sacct_shows_how_jobs_ended(cluster: RealSlurm) -> None:
    failed, cancelled = cluster.sbatch("exit 3"), cluster.sbatch("sleep 300")
    cluster.wait(cancelled, "RUNNING")
    cluster.run("scancel", cancelled)
    cluster.wait(failed, "FAILED")
    until(lambda: cluster.sacct(failed) == ["FAILED"], 10)
    until(lambda: cluster.sacct(cancelled) == [f"CANCELLED by {os.getuid()}"], 10)
    assert cluster.run("sacct", "-n", "-X", "-P", "-o", "ExitCode", "-j", failed) == "3:0\n"


def test_a_requeued_job_starts_again_before_slurms_default_of_120_seconds(cluster: RealSlurm, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    job = cluster.sbatch(f"echo ${{SLURM_RESTART_COUNT:-0}} >>{starts}; sleep 300")
    until(lambda: lines(starts) == ["0"], 10)
    began = time.monotonic()
    cluster.run("scontrol", "requeue", job)
    until(lambda: lines(starts) == ["0", "1"], 15)
    assert time.monotonic() - began < 100


def test_a_preempted_job_is_signalled_stopped_and_restarted(cluster: RealSlurm, tmp_path: Path) -> None:
    output = tmp_path / "output"
    trap = f'trap "echo signalled >>{output}; scontrol requeue $SLURM_JOB_ID" USR2'
    step = f"srun --ntasks 1 bash -c '{trap}; echo start >>{output}; while :; do sleep 0.1; done'"
    job = cluster.sbatch(step, "--nodes", "2", "--exclusive", "--signal", "USR2@60", "--time", "60")
    until(lambda: lines(output) == ["start"], 10)
    urgent = cluster.sbatch("sleep 1", "--partition", "high", "--nodes", "2", "--exclusive")
    cluster.wait(urgent, "COMPLETED")
    assert lines(output)[:2] == ["start", "signalled"]
    until(lambda: lines(output)[-1] == "start", 20)
    assert cluster.wait(job, "RUNNING") == "RUNNING"
    assert cluster.show(job)["Restarts"] == "1"


def test_processes_that_a_job_leaves_behind_are_killed(cluster: RealSlurm) -> None:
    job = cluster.sbatch("setsid sleep 2718.28 & exit 0")
    cluster.wait(job, "COMPLETED")
    until(lambda: not processes("2718.28"), 5)


# Nodes ---------------------------------------------------------------------------------------------------------------


def test_every_node_has_its_own_hostname_address_pids_and_memory(netns: RealSlurm) -> None:
    tell = "echo $(hostname) $(hostname -I) $(ls -d /proc/[0-9]* | wc -l) $(df --output=size /dev/shm | tail -1)"
    output = netns.run("srun", "--nodes", "2", "--label", "bash", "-c", tell).split("\n")
    names, addresses, pids, shared = zip(*(line.split()[1:] for line in sorted(output) if line), strict=True)
    assert names == ("node1", "node2")
    assert len(set(addresses)) == 2 and not any(address.startswith("127.") for address in addresses)
    assert max(map(int, pids)) < 20
    assert shared == (str(2**20),) * 2
    assert not Path("/tmp/ray/of-node1").exists()
    netns.run("srun", "--nodelist", "node1", "touch", "/tmp/ray/of-node1")
    assert netns.run("srun", "--nodelist", "node1", "ls", "/tmp/ray") == "of-node1\n"
    assert netns.run("srun", "--nodelist", "node2", "ls", "/tmp/ray") == ""
    assert not Path("/tmp/ray/of-node1").exists()


def test_nodes_reach_only_one_another_and_the_accounting(netns: RealSlurm) -> None:
    on_node = ("srun", "--nodelist", "node1")
    assert "testcluster" in netns.run(*on_node, "sacctmgr", "--noheader", "--parsable2", "show", "cluster")
    assert netns.run(*on_node, "getent", "hosts", "node2").split()[1] == "node2"
    assert "default" not in netns.run(*on_node, "ip", "route")


def test_a_job_of_a_killed_node_restarts_once_the_node_is_back(cluster: RealSlurm, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    job = cluster.sbatch(f"echo start >>{starts}; setsid sleep 3141.59", "--nodelist", "node1")
    until(lambda: lines(starts) == ["start"], 10)
    assert processes("3141.59")
    try:
        assert cluster.testcluster("node-kill", "1").returncode == 0
        assert not processes("3141.59")
        seen = cluster.testcluster("status")
        assert seen.returncode == 1 and "DEAD: node1" in seen.stdout
        cluster.run("scontrol", "update", "nodename=node1", "state=down", "reason=cut")
        cluster.wait(job, "PENDING")
        assert cluster.run("srun", "--nodes", "1", "bash", "-c", "echo $SLURMD_NODENAME") == "node2\n"
    finally:
        assert cluster.testcluster("node-start", "1").returncode == 0
    until(lambda: lines(starts) == ["start", "start"], 20)
    until(lambda: cluster.sacct(job) == ["NODE_FAIL", "RUNNING"], 10)


def test_after_a_power_cut_peers_get_no_answer_and_slurm_notices(netns: RealSlurm, tmp_path: Path) -> None:
    program, output = tmp_path / "talk.py", tmp_path / "output"
    program.write_text(CLIENT_OF_A_NODE)
    job = netns.sbatch(f"srun {sys.executable} {program} {output}", "--nodes", "2")
    until(lambda: "connected" in lines(output), 15)
    try:
        netns.testcluster("node-kill", "1")
        until(lambda: len(lines(output)) > 1, 15)
        assert lines(output)[:2] == ["connected", "silence"]
        until(lambda: "NODE_FAIL" in netns.sacct(job), 60)
    finally:
        assert netns.testcluster("node-start", "1").returncode == 0


def test_a_node_without_its_slurmd_can_be_started_again(netns: RealSlurm) -> None:
    (agent,) = [process for process in processes(f"{netns.root}/node2") if (process / "comm").read_text() == "slurmd\n"]
    os.kill(int(agent.name), signal.SIGKILL)
    until(lambda: not agent.exists(), 5)
    assert len(processes(f"{netns.root}/node2")) > 1  # the node itself is up
    assert "is running" not in netns.testcluster("node-start", "2").stderr
    assert netns.run("srun", "--nodelist", "node2", "hostname") == "node2\n"
    assert netns.testcluster("node-start", "2").returncode == 2
    started = [(process / "comm").read_text() for process in processes(f"{netns.root}/node2")]
    assert started.count("unshare\n") == 1


# Up and down --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lo", "netns"])
def test_down_removes_jobs_that_ignore_all_signals(mode: str) -> None:
    stubborn = 'trap "" TERM USR2 HUP; setsid sleep 1618.03 & while :; do sleep 0.1618; done'
    with real_slurm(mode, "--nodes", "1", "--no-accounting") as cluster:
        cluster.sbatch(stubborn)
        cluster.sbatch(f"srun bash -c '{stubborn}'")
        until(lambda: len(processes("1618.03")) >= 2, 10)
        logs = {process for process, opened in open_files() if opened == f"{cluster.root}/log/node1.log"}
        steps = [process for process in logs if (process / "comm").read_text() == "slurmstepd\n"]
        assert len(steps) >= 2
        for process in steps:  # so that none ends by itself because its job did
            os.kill(int(process.name), signal.SIGSTOP)
        began = time.monotonic()
        assert cluster.testcluster("down").returncode == 0
        assert time.monotonic() - began < 60
        assert not processes("1618.03")
        assert not residue(cluster.root, cluster.spaces)


@pytest.mark.parametrize("mode", ["lo", "netns"])
def test_two_clusters_do_not_see_each_other(mode: str) -> None:
    with real_slurm(mode, "--nodes", "1", "--no-accounting") as staying:
        with real_slurm(mode, "--nodes", "1", "--no-accounting") as going:
            mine, other = staying.sbatch("sleep 300"), going.sbatch("sleep 300")
            for cluster, job in ((staying, mine), (going, other)):
                cluster.wait(job, "RUNNING")
                assert cluster.squeue() == {job: "RUNNING"}
            assert mine != other
            assert not staying.spaces & going.spaces
        assert staying.squeue() == {mine: "RUNNING"}
        assert staying.run("srun", "echo", "here") == "here\n"


def test_two_clusters_can_be_started_at_once(root: Path) -> None:
    roots = [root, root.with_name(f"{root.name}x")]
    line = [sys.executable, str(TESTCLUSTER), "up", "--no-accounting", "--nodes", "1", "--root"]
    both = [subprocess.Popen([*line, str(path)], stderr=subprocess.PIPE, text=True) for path in roots]
    output = [process.communicate(timeout=300)[1] for process in both]
    if both[0].returncode == 2:
        pytest.skip(output[0].strip())
    try:
        assert [process.returncode for process in both] == [0, 0], output
        assert [command("status", root=path).returncode for path in roots] == [0, 0]
    finally:
        assert [command("down", root=path).returncode for path in roots] == [0, 0]
    assert not residue(roots[1])


def test_accounting_is_optional() -> None:
    with real_slurm("lo", "--nodes", "3", "--cpus", "2", "--gpus", "0", "--no-accounting") as cluster:
        assert cluster.nodes == ["node1", "node2", "node3"]
        assert cluster.run("sinfo", "-h", "-p", "main", "-o", "%c %G").strip() == "2 (null)"
        assert "disabled" in cluster.attempt("sacct").stderr
        assert not processes(f"--datadir={cluster.root}")


def test_status_reports_a_dead_controller_and_down_still_works(root: Path) -> None:
    skip_unless_up(command("up", "--no-accounting", root=root))
    assert "a cluster is up" in command("up", root=root).stderr
    (controller,) = [found for found in processes(f"{root}/") if (found / "comm").read_text() == "slurmctld\n"]
    os.kill(int(controller.name), signal.SIGKILL)
    until(lambda: command("status", root=root).returncode == 1, 5)
    assert "DEAD: slurmctld" in command("status", root=root).stdout
    assert command("down", root=root).returncode == 0


def test_up_works_after_all_processes_were_killed(root: Path) -> None:
    skip_unless_up(command("up", "--no-accounting", root=root))
    for process in processes(f"{root}/"):
        os.kill(int(process.name), signal.SIGKILL)
    until(lambda: not processes(f"{root}/"), 5)
    assert "died" in command("status", root=root).stderr
    assert command("up", "--no-accounting", root=root).returncode == 0
    assert command("down", root=root).returncode == 0


def test_a_daemon_that_fails_to_start_is_quoted_and_nothing_is_left(root: Path, tmp_path: Path) -> None:
    skip_unless_up(command("up", "--no-accounting", root=root))
    command("down", root=root)
    broken = tmp_path / "slurmctld"
    broken.write_text("#!/bin/sh\necho port is haunted\nexit 3\n")
    broken.chmod(0o755)
    failed = command("up", root=root, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert failed.returncode == 1
    assert "slurmctld ended with status 3" in failed.stderr and "port is haunted" in failed.stderr
    assert not residue(root)


def test_an_interrupted_start_leaves_nothing(root: Path) -> None:
    line = [sys.executable, str(TESTCLUSTER), "up", "--root", str(root)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    until(lambda: bool(processes(f"--datadir={root}")) or process.poll() is not None, 20)
    if process.poll() == 2:
        assert process.stderr
        pytest.skip(process.stderr.read().strip())
    process.terminate()
    assert process.wait(300) == 143
    assert not residue(root)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_mode_lo_needs_no_root(root: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    copied = shutil.copy(TESTCLUSTER, folder)
    as_nobody = {"user": 65534, "group": 65534, "extra_groups": [], "capture_output": True, "text": True}

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, timeout=300, env={**environment(root), "HOME": "/"}, cwd="/", **as_nobody)  # type: ignore[call-overload,no-any-return]

    try:
        folder.chmod(0o755)
        began = ask("/usr/bin/python3", copied, "up", "--root", str(root))
        skip_unless_up(began)
        assert ask("srun", "--nodes", "2", "id", "--user").stdout == "65534\n65534\n"
        assert ask("sacct", "-n", "-X", "-o", "State").returncode == 0
        assert "needs root" in ask("/usr/bin/python3", copied, "up", "--mode", "netns", "--root", f"{root}n").stderr
        ended = ask("/usr/bin/python3", copied, "down", "--root", str(root))
        assert ended.returncode == 0, ended.stderr
    finally:
        shutil.rmtree(folder)


def skip_unless_up(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


# Usage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("up --nodes 0", "--nodes (=0) must be 1 to 64"),
        ("up --gpus 65", "--gpus (=65) must be 0 to 64"),
        ("status", "no cluster at"),
        ("env", "no cluster at"),
        ("node-kill 1", "no cluster at"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(words: str, answer: str, root: Path) -> None:
    refused = command(*words.split(), root=root)
    assert refused.returncode == 2
    assert answer in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_missing_packages_are_named_with_the_line_that_installs_them(root: Path, tmp_path: Path) -> None:
    refused = command("up", "--mode", "netns", root=root, PATH=str(tmp_path))
    assert refused.returncode == 2
    line = "apt-get install -y --no-install-recommends slurm-wlm"
    assert line in refused.stderr and len(refused.stderr.splitlines()) == 1
    without = command("up", "--no-accounting", root=root, PATH=str(tmp_path)).stderr
    assert line in without and "mariadb" not in without


def test_a_folder_with_other_files_is_not_touched(lo: RealSlurm, tmp_path: Path) -> None:
    deep = command("up", root=tmp_path / ("x" * 61)).stderr
    assert "at most 60" in deep
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    (folder / "thesis.tex").touch()
    assert "is not empty" in command("up", root=folder).stderr
    assert "no cluster" in command("down", root=folder).stdout
    assert (folder / "thesis.tex").exists()
    shutil.rmtree(folder)
    assert "has nodes 1 to 2" in lo.testcluster("node-kill", "3").stderr


def test_without_rights_to_namespaces_mode_lo_is_suggested(lo: RealSlurm, root: Path, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("another user is refused before")
    (tmp_path / "unshare").write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    refused = command("up", "--mode", "netns", root=root, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert refused.returncode == 2
    assert "Operation not permitted" in refused.stderr and "--mode lo" in refused.stderr


def test_the_commands_in_its_docstring_work(root: Path) -> None:
    skip_unless_up(command("up", "--no-accounting", root=root))
    command("down", root=root)
    head = ast.get_docstring(ast.parse(TESTCLUSTER.read_text())) or ""
    install, *commands = [line.strip() for line in head.splitlines() if line.startswith("  ")]
    packages = install.partition("recommends ")[2].split()
    pipeline = (REPOSITORY / ".ci" / "run").read_text()
    assert packages and not [package for package in packages if package not in pipeline]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=REPOSITORY,
        env={**os.environ, "TESTCLUSTER_ROOT": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("node1 has GPUs 0,1", "node2 has GPUs 0,1", "COMPLETED", "down: "):
        assert words in done.stdout
    assert len(commands) == 12
    assert not spaces(root)
