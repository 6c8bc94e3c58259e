"""Ray clusters outside SLURM: Ray and KubeRay accept what is rendered, and `down` ends all that `up` started."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml
from raised import fails
from safetensors.torch import load_file
from test_readme import parse

from jobs.cli import main
from jobs.ray import kuberay
from jobs.ray import launch as ray_launch
from jobs.ray import render as ray_render
from jobs.ray import scheduler as ray_jobs
from jobs.ray import site as ray_site
from jobs.ray.local import Local, gpus_here
from jobs.verbs.submit import SubmitOptions
from jobs.verbs.submit import run as submit
from pipeline import config as configs
from pipeline.data import toy
from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import sockets

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in ray_site.SITES.glob("*.yaml"))
LAUNCHED = [name for name in SHIPPED if name != "kubernetes"]
README = (ROOT / "infra" / "ray" / "README.md").read_text(encoding="utf-8")
HOSTS = {"kind": "on-premise", "name": "lab", "head": "10.0.0.1"}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def site_of(tmp_path: Path, **keys: object) -> ray_site.Site:
    path = tmp_path / "site.yaml"
    path.write_text(json.dumps(keys))
    return ray_site.load(str(path))


def rendered(name: str, *job: str) -> dict[str, object]:
    (text,) = ray_render.render(ray_site.load(name), job).values()
    loaded: dict[str, object] = yaml.safe_load(text)
    return loaded


# --- rendered


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_own_launcher_accepts_each_shipped_site(name: str) -> None:
    """Ray's own code fills in its defaults and checks the result; it would then query the cloud, which we do not do."""
    from ray.autoscaler._private import util

    made = util.prepare_config(rendered(name))
    util.validate_config(made)
    assert made["max_workers"] == {"hosts": 3, "aws": 4, "gcp": 2}[name]
    kinds = made["available_node_types"]
    assert all(kind["min_workers"] <= kind["max_workers"] for kind in kinds.values())


@pytest.mark.parametrize("name", LAUNCHED)
def test_launched_nodes_require_a_token_and_run_no_dashboard(name: str) -> None:
    made = rendered(name)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert made[key][0] == "ray stop" and "export RAY_AUTH_MODE=token" in made[key][1]
    assert made["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--include-dashboard=false" in made["head_start_ray_commands"][1]


@pytest.mark.parametrize("name", LAUNCHED)
def test_commands_of_launched_nodes_are_valid_shell(name: str) -> None:
    made = rendered(name)
    lines = [line for key, commands in made.items() if key.endswith("_commands") for line in commands]
    assert lines
    for line in lines:
        done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"


def test_without_an_image_nodes_install_the_constraints_by_the_script_of_make_venv() -> None:
    made = rendered("hosts")
    assert made["setup_commands"][0] == "EXTRAS=cluster PYTHON=python3 ~/adaptnet/infra/venv.sh"
    assert all(Path(local).exists() for remote, local in made["file_mounts"].items() if "adaptnet" in remote)
    assert {"constraints.txt", "pyproject.toml", "infra"} <= {Path(each).name for each in made["file_mounts"]}
    assert "EXTRAS=cluster,gcp" in rendered("gcp")["setup_commands"][0]


def test_a_node_without_the_shared_folder_or_the_environment_fails_its_set_up(tmp_path: Path) -> None:
    site = site_of(tmp_path, **HOSTS, shared={"path": f"{tmp_path}/none"}, prefix=f"{tmp_path}/nothing")
    made = ray_render.launcher(site)
    for line, word in ((made["initialization_commands"][-1], "shared.path"), (made["setup_commands"][0], "prefix")):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 1 and word in done.stderr


def test_the_line_that_puts_ray_on_the_path_adds_it_once(tmp_path: Path) -> None:
    line = ray_render.launcher(site_of(tmp_path, **HOSTS, prefix="/shared/venv"))["setup_commands"][-1]
    for _ in range(2):
        subprocess.run(["bash", "-c", line], env={**os.environ, "HOME": str(tmp_path)}, check=True)
    assert (tmp_path / ".bashrc").read_text() == "export PATH=/shared/venv/bin:$PATH\n"


def test_kuberays_manifest_has_the_pinned_ray_a_token_and_no_dashboard() -> None:
    spec = rendered("kubernetes")["spec"]
    assert spec["rayVersion"] == ray_render.pins()["ray"] and spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["include-dashboard"] == "false"
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 8) and spec["enableInTreeAutoscaling"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "65536Mi", "nvidia.com/gpu": "1"}


def test_a_ray_job_runs_a_verb_on_a_cluster_of_its_own_and_needs_the_dashboard() -> None:
    words = ("train", "convnet_aig/toy", "--run-dir", "/shared/runs/my toy")
    spec = rendered("kubernetes", *words)["spec"]
    assert shlex.split(spec["entrypoint"]) == ["adaptnet", *words, "compute.address=auto"]
    parse(spec["entrypoint"])
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["include-dashboard"] == "true"
    with fails(ConfigError, "--run-dir", "/shared"):
        rendered("kubernetes", "train", "convnet_aig/toy")
    with fails(ConfigError, "--job", "on-premise"):
        rendered("hosts", *words)


@pytest.mark.parametrize("job", [(), ("report", "/shared/runs")])
def test_a_manifest_that_kuberay_would_reject_is_not_written(job: tuple[str, ...]) -> None:
    """The model is strict: an unknown key is an error at every place."""
    made = rendered("kubernetes", *job)
    model = kuberay.RayJob if job else kuberay.RayCluster
    configs.validate(model, made, "unchanged")
    paths = list(_mappings(made))
    assert len(paths) > 30
    for path in paths:
        if path and path[-1] in ("limits", "requests", "rayStartParams"):
            continue
        broken = json.loads(json.dumps(made))
        place = broken
        for key in path:
            place = place[key]
        place["surplus"] = "1"
        with fails(ConfigError, ".".join([*map(str, path), "surplus"])):
            configs.validate(model, broken, "broken")


def _mappings(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from _mappings(item, (*path, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _mappings(item, (*path, position))


@pytest.mark.parametrize(("key", "value"), [("surplus", 1), ("max_workers", "three"), ("provider", {"region": "eu"})])
def test_a_configuration_that_rays_schema_rejects_is_not_written(key: str, value: object) -> None:
    site = ray_site.load("hosts")
    assert isinstance(site, ray_site.OnPremise)
    with fails(ConfigError, "cluster.yaml", site.name):
        ray_render.check_launcher(site, {**ray_render.launcher(site), key: value})


def test_values_of_the_environment_stay_text_for_every_reader_of_yaml(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    keys = configs.read_mapping(ray_site.SITES / "kubernetes.yaml")
    path.write_text(json.dumps({**keys, "environment": {"A": "3e4", "B": "1", "C": "no", "D": "x: y"}}))
    (text,) = ray_render.render(ray_site.load(str(path))).values()
    assert "value: '3e4'" in text and "value: '1'" in text and "value: 'no'" in text and "value: 'x: y'" in text


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kind": "cloud"}, "kind"),
        ({"haed": "10.0.0.9"}, "haed"),
        ({"name": "My Lab"}, "name"),
        ({"workers": ["10.0.0.1"]}, ""),  # a host is named twice
        ({"image": "a", "prefix": "/b"}, "prefix"),  # they exclude each other
        ({"shared": {"path": "here"}}, "shared.path"),
        ({"environment": {"A B": "c"}}, "environment.A B"),
        ({"kind": "aws", "region": "eu"}, "workers"),
    ],
)
def test_an_error_in_a_site_names_its_key(change: dict[str, object], key: str, tmp_path: Path) -> None:
    with fails(ConfigError, key):
        site_of(tmp_path, **{**HOSTS, **change})


def test_the_minimum_of_workers_is_not_above_the_maximum(tmp_path: Path) -> None:
    keys = configs.read_mapping(ray_site.SITES / "kubernetes.yaml")
    keys["workers"]["min"] = 9
    with fails(ConfigError, "workers"):
        site_of(tmp_path, **keys)


# --- missing tools


def test_missing_tools_and_keys_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fails(ConfigError, "site", "mars"):
        ray_site.load("mars")
    hosts, kubernetes = ray_site.load("hosts"), ray_site.load("kubernetes")
    assert not isinstance(hosts, ray_site.Kubernetes)
    monkeypatch.setenv("HOME", str(tmp_path))
    with fails(ConfigError, "ssh.key"):
        ray_launch.check(hosts)
    monkeypatch.setenv("PATH", str(tmp_path))
    with fails(ResourceError, "kubectl", "vision"):
        ray_launch.up(kubernetes, tmp_path)
    with fails(ResourceError, "ssh"):
        ray_launch.check(hosts)


def test_up_needs_a_site_or_a_number_of_nodes(say: Callable[..., tuple[int, str]]) -> None:
    assert say("cluster", "up")[0] == 2


@pytest.mark.parametrize("kind", ["aws", "gcp"])
def test_a_clouds_extra_is_named_if_it_is_not_installed(kind: str) -> None:
    site = ray_site.load(kind)
    assert not isinstance(site, ray_site.Kubernetes)
    with fails(ResourceError, kind, site.name):
        ray_launch.check(site, which=lambda name: name, find_module=lambda name: None)


RECORDER = """#!/bin/sh
echo "$@" >>"$RECORDED"
case "$*" in *raycluster.yaml*) cat "${6:-$5}" >/dev/null ;; esac
if [ -n "$REFUSED" ]; then echo "$REFUSED" >&2; exit 1; fi
echo "vision   2   ready"
"""


def test_kubectl_gets_the_manifest_the_namespace_and_the_context(
    say: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in kubectl's place records its arguments, since there is no Kubernetes on this machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "kubectl"
    tool.write_text(RECORDER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORDED", str(tmp_path / "recorded"))
    keys = configs.read_mapping(ray_site.SITES / "kubernetes.yaml")
    (tmp_path / "mine.yaml").write_text(json.dumps({**keys, "context": "here"}))
    for verb in ("up", "status", "down"):
        code, text = say("cluster", verb, "mine.yaml")
        assert code == 0, text
    own = "--context here --namespace training"
    file = "--filename runs/clusters/vision/raycluster.yaml"
    assert (tmp_path / "recorded").read_text().splitlines() == [
        f"{own} apply {file}",
        f"{own} get rayclusters vision --output wide",
        f"{own} delete --ignore-not-found {file}",
    ]
    monkeypatch.setenv("REFUSED", 'no matches for kind "RayCluster" in version "ray.io/v1"')
    assert say("cluster", "up", "mine.yaml")[0] == 2


# --- Ray's launcher, for real, on this machine

SSH = """#!/bin/bash
# Stands in for another host: runs the commands of Ray's launcher here, in a shell of its own.
while [ $# -gt 0 ]; do
    case $1 in
        -o | -i | -l | -p) shift 2 ;;
        -*) shift ;;
        *) shift && break ;;
    esac
done
exec bash -c "$*"
"""
ALONE = ["unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
ON_A_HOST = """
set -e
mount -t tmpfs none /tmp/ray 2>/dev/null || { mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray; }
python=$1
$python -m jobs.cli cluster up site.yaml
$python -m jobs.cli cluster status site.yaml
$python -m jobs.cli cluster down site.yaml
echo "left: $(ps -eo args | grep -E '[g]cs_server|[r]aylet' | wc -l)"
"""


@pytest.mark.ray
@pytest.mark.faults
def test_rays_launcher_brings_a_host_up_shows_it_and_takes_it_down(tmp_path: Path) -> None:
    """Ray's launcher calls `ray stop`, which ends every Ray of its user, so it gets a process namespace of its own."""
    can = subprocess.run([*ALONE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    if can.returncode != 0:
        pytest.skip("needs process and mount namespaces, which this user may not create (unshare)")
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "ssh").write_text(SSH)
    (home / "bin" / "ssh").chmod(0o755)
    (home / ".profile").write_text(". ~/.bashrc\n")  # as a new user's
    site = {**HOSTS, "head": "127.0.0.1", "prefix": sys.prefix, "node": {"cpus": 3}, "shared": {"path": str(tmp_path)}}
    (tmp_path / "site.yaml").write_text(json.dumps(site))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env = {**kept, "HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    line = [*ALONE, "bash", "-c", ON_A_HOST, "bash", sys.executable]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lab is up; to train on it" in done.stdout and "lab is taken down" in done.stdout
    assert "/3.0 CPU" in done.stdout, "ray status shows the CPUs of the site"
    assert "left: 0" in done.stdout
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0


# --- on this machine


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "set", num_classes=4, train=320, val=40, side_px=32, seed=5)


def command(home: Path, *words: str, **more: str) -> list[str]:
    """Runs `adaptnet` in a process of its own; returns the lines that it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    line = [sys.executable, "-m", "jobs.cli", *words]
    done = subprocess.run(line, cwd=home, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.splitlines()


def ours(local: Local) -> list[psutil.Process]:
    """All processes of that cluster: its keepers, Ray and Ray's workers."""
    token = f"RAY_AUTH_TOKEN_PATH={local.token}"
    processes = []
    for process in psutil.process_iter():
        try:
            line, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if local.key in " ".join(line) or token == f"RAY_AUTH_TOKEN_PATH={variables.get('RAY_AUTH_TOKEN_PATH')}":
            processes.append(process)
    return processes


@pytest.mark.ray
@pytest.mark.faults
def test_two_trainings_share_a_cluster_of_this_machine_and_down_leaves_no_process(tmp_path: Path, images: Path) -> None:
    home, local = tmp_path, Local(tmp_path / "runs" / "clusters" / "local")
    try:
        printed = command(home, "cluster", "up", "--local", "2", "--cpus", "2")
        (token,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", "\n".join(printed))
        (address,) = re.findall(r"compute\.address=(\S+)", "\n".join(printed))
        assert Path(token).stat().st_mode & 0o077 == 0
        status = "\n".join(command(home, "cluster", "status"))
        assert f"compute.address={address}" in status and status.count("alive") == 2
        assert "127.0.0.2 " in status and "127.0.0.3 " in status
        own = ["family.depth=8", "training.batch_size=32", "training.epochs=2", "tracking.register=null"]
        own += [f"data.root={images}", f"compute.address={address}", "evaluation.latency_repeats=0"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN_PATH": token}
        line = [sys.executable, "-m", "jobs.cli", "train", "convnet_aig/toy", "compute.workers=2", *own]
        with open(home / "drivers.log", "w") as log:
            drivers = [
                subprocess.Popen([*line, f"name={name}"], cwd=home, env=env, stdout=log, stderr=log)
                for name in ("first", "second")
            ]
        for driver in drivers:
            driver.wait(timeout=600)
        said = (home / "drivers.log").read_text()[-3000:]
        assert [driver.returncode for driver in drivers] == [0, 0], said
        first, second = (load_file(_weights(home / "runs" / name)) for name in ("first", "second"))
        assert all((first[key] == second[key]).all() for key in first), "the same recipe, on the same cluster"
    finally:
        ended = command(home, "cluster", "down")
    assert ended == ["stopped 2 nodes"]
    assert not ours(local) and not local.folder.exists()
    assert not list(Path("/tmp").glob(f"adaptnet-*-{local.key}-*"))
    assert "no cluster runs here" in "\n".join(command(home, "cluster", "down"))


def _weights(run: Path) -> Path:
    return sorted(run.glob("checkpoints/*/*.safetensors"))[-1]


@pytest.mark.ray
@pytest.mark.faults
def test_a_driver_with_another_token_is_refused_and_down_ends_the_ray_of_killed_keepers(tmp_path: Path) -> None:
    local = Local(tmp_path / "runs" / "clusters" / "local")
    stranger = subprocess.Popen(["sleep", "300"])
    try:
        printed = command(tmp_path, "cluster", "up", "--local", "1")
        (address,) = re.findall(r"compute\.address=(\S+)", "\n".join(printed))
        with fails(ResourceError, "--name", address):
            local.up(1, cpus=1, gpus=[], patience_s=300)
        code = f"import ray; ray.init(address={address!r})"
        env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode != 0 and "uthentication" in done.stderr
        record = local.read()
        assert record is not None
        keeper = int(record["keepers"][0][0])
        for process in ours(local):  # a stopped process does not end by itself when its keeper is gone
            if process.pid != keeper:
                process.suspend()
        os.kill(keeper, signal.SIGKILL)
        assert {process.pid for process in ours(local)} - {keeper}, "Ray itself is still there"
        foreign = [stranger.pid, psutil.Process(stranger.pid).create_time() - 60]  # a process id that was reused
        (local.folder / "cluster.json").write_text(json.dumps({**record, "keepers": [*record["keepers"], foreign]}))
    finally:
        local.down()
    assert not ours(local) and not local.folder.exists()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_cluster_of_another_machine_is_not_touched(tmp_path: Path) -> None:
    local = Local(tmp_path)
    stranger = subprocess.Popen(["sleep", "300"])
    theirs = [stranger.pid, psutil.Process(stranger.pid).create_time()]
    (tmp_path / "cluster.json").write_text(json.dumps({"host": "elsewhere", "address": "a:1", "keepers": [theirs]}))
    assert not local.is_running
    for order in (local.down, lambda: local.up(1, cpus=1, gpus=[], patience_s=1)):
        with fails(ResourceError, "--name", "elsewhere"):
            order()
    assert (tmp_path / "cluster.json").is_file() and stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.ray
@pytest.mark.faults
def test_a_head_that_is_too_slow_is_an_error_that_leaves_only_foreign_files(tmp_path: Path) -> None:
    local = Local(tmp_path / "mine")
    local.folder.mkdir()
    (local.folder / "notes.txt").write_text("not ours")
    with fails(ResourceError, "--patience"):
        local.up(1, cpus=1, gpus=[], patience_s=0.2)
    assert [path.name for path in local.folder.iterdir()] == ["notes.txt"]
    assert not ours(local)


def test_each_node_needs_a_gpu_if_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-7,3")
    assert gpus_here(3) == ["0", "GPU-7", "3"]
    with fails(ResourceError, "--gpus", 3):
        gpus_here(4)


def test_a_cluster_has_at_least_one_node(tmp_path: Path) -> None:
    with fails(ConfigError, "--local", 0):
        Local(tmp_path / "mine").up(0, cpus=1, gpus=[], patience_s=1)
    assert not list(tmp_path.iterdir())


# --- Ray Jobs


def test_an_address_without_a_job_server_is_refused(tmp_path: Path) -> None:
    arguments = ("convnet_aig/toy", f"data.root={tmp_path}", "--run-dir", f"{tmp_path}/run")
    options = SubmitOptions("train", arguments, time_limit="30m", where="ray")
    for address in (None, "10.0.0.1:6379"):
        with fails(ConfigError, "--address", subject=address):
            submit(replace(options, address=address))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with fails(ResourceError, "--address", subject=silent):
            submit(replace(options, address=silent))
    with fails(ConfigError, "--address", subject="http://a:1"):
        submit(replace(options, where="local", address="http://a:1"))


def test_a_dry_run_shows_the_command_that_ray_would_run(say: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    words = ["submit", "train", "convnet_aig/toy", f"data.root={tmp_path}", "--run-dir", f"{tmp_path}/a b"]
    code, text = say(*words, "--where", "ray", "--address", "http://a:1", "--dry-run", "--nodes", "3")
    assert code == 0 and "workers: 3" in text
    shell, option, line = shlex.split(text.splitlines()[0])
    assert (shell, option) == ("bash", "-c")
    assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0
    assert shlex.split(line)[-1] == "compute.address=auto" and f"{tmp_path}/a b" in shlex.split(line)


@pytest.fixture
def job_server(tmp_path: Path) -> Iterator[str]:
    """The address of a head with a dashboard, on ports and in a folder of its own."""
    if any(find_spec(module) is None for module in ("aiohttp_cors", "opencensus", "prometheus_client", "smart_open")):
        pytest.skip(f"needs the extra `cluster`: {ray_jobs.EXTRA}")
    ports = [sockets.free_port() for _ in range(3)]
    token, scratch = tmp_path / "token", Path("/tmp") / f"adaptnet-jobs-{os.getpid()}"
    token.write_text("7" * 64)
    words = (
        f"start --head --block --port={ports[0]} --dashboard-port={ports[1]} --dashboard-agent-listen-port={ports[2]}"
    )
    words += f" --num-cpus=3 --node-ip-address=127.0.0.1 --temp-dir={scratch} --include-dashboard=true"
    words += " --disable-usage-stats --object-store-memory=100000000"
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env = {**kept, **ray_render.ENVIRONMENT, **given, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ray = [str(Path(sys.executable).parent / "ray"), *words.split()]
    with open(tmp_path / "head.log", "wb") as log:
        head = psutil.Popen(ray, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while not sockets.listens(f"127.0.0.1:{ports[1]}"):
            assert head.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()[-2000:]
            time.sleep(0.5)
        with pytest.MonkeyPatch.context() as patch:
            for key, value in given.items():
                patch.setenv(key, value)
            yield f"http://127.0.0.1:{ports[1]}"
    finally:
        below = head.children(recursive=True)
        head.terminate()
        psutil.wait_procs([head, *below], timeout=300)
        for process in [head, *below]:
            if process.is_running():
                process.kill()
        subprocess.run(["rm", "-rf", str(scratch)], check=True)


@pytest.mark.ray
@pytest.mark.faults
def test_a_submitted_training_is_shown_and_saves_its_steps_when_it_is_cancelled(
    job_server: str, tmp_path: Path, images: Path
) -> None:
    home = tmp_path / "desk"
    home.mkdir()
    own = [f"data.root={images}", "family.depth=8", "training.batch_size=32", "tracking.register=null", "name=mine"]
    own += ["evaluation.latency_repeats=0", "training.epochs=400", "checkpoint.every=100000 steps"]
    own += ["logging.every=10 steps"]
    words = ["submit", "train", "convnet_aig/toy", *own, "--where", "ray", "--address", job_server, "--time", "30m"]
    (line,) = command(home, *words)
    job = line.split(":")[0].removeprefix("job ")

    def show() -> str:
        return "\n".join(command(home, "jobs", "show", "mine"))

    run = home / "runs" / "mine"
    _until(lambda: '"train/' in "".join(path.read_text() for path in run.glob("journal/*")), 240)
    assert "RUNNING" in show() and job in "\n".join(command(home, "jobs", "list"))
    command(home, "jobs", "cancel", "mine")
    _until(lambda: "CANCELLED" in show(), 120)
    newest = max(path.parent.name for path in run.glob("checkpoints/*/COMPLETE.json"))
    log = "\n".join(command(home, "jobs", "logs", "mine"))
    (step,) = re.findall(r"stopped at step (\d+); ", log)
    assert "/py_modules_files/" in (run / "journal" / "driver.jsonl").read_text(), "the code that was submitted"
    assert newest == f"step-{int(step):08d}" and int(step) > 0


def _until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + max(seconds, 300)  # the machine may be busy
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(1)


# --- its README


def test_each_command_of_the_readme_parses() -> None:
    lines = [line.partition("  #")[0].strip() for line in README.splitlines() if line.startswith("adaptnet ")]
    assert len(lines) >= 8
    for line in lines:
        parse(line)


def test_each_render_command_of_the_readme_works(
    say: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above run up, status and down, on this machine and on a host."""
    monkeypatch.chdir(tmp_path)
    lines = [
        line.partition("  #")[0].strip() for line in README.splitlines() if line.startswith("adaptnet cluster render")
    ]
    assert lines
    for line in lines:
        code, text = say(*shlex.split(line)[1:])
        assert code == 0 and text, line
