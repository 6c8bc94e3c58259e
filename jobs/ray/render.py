"""Renders a site as the YAML of Ray's cluster launcher, or as KubeRay's manifests.

Every text is checked before it is written: the launcher's against Ray's own schema, KubeRay's by `jobs.ray.kuberay`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from jobs.ray import kuberay
from jobs.ray.site import Aws, Gcp, Kubernetes, Launched, Machine, Machines, OnPremise, Pod, Site, Size
from pipeline import config as configs
from pipeline.errors import ConfigError
from pipeline.installation import HOME, INSTALLED

CONSTRAINTS = HOME / "constraints.txt"
COPIED = ("pipeline", "jobs", "tuning", "infra", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
PORT = 6379  # port of a head that is alone on its machine or in its pod
DASHBOARD_PORT = 8265
TOKEN = "~/.ray/auth_token"  # Ray's default place
USER_ID = 1000  # user of the image in infra/docker
ENVIRONMENT = {  # environment of every node, as in pipeline.execution.allocation
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONUNBUFFERED": "1",
}
RETRIES = 3  # retries of a RayJob: each starts a new cluster, on which the training resumes


@cache
def pins() -> dict[str, str]:
    """The version of each package in constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def render(site: Site, job: Sequence[str] = ()) -> dict[str, str]:
    """The site's files as {name: text}; with `job`, a verb of `adaptnet` and its arguments, a RayJob that runs it.

    Raises ConfigError if Ray or KubeRay would reject the result.
    """
    if not isinstance(site, Kubernetes):
        if job:
            raise ConfigError(
                f"--job: RayJobs need a site of kind kubernetes; {site.name} is {site.kind}, use `adaptnet submit`",
                key="--job",
                subject=site.kind,
            )
        return {"cluster.yaml": _text(site, launcher(site))}
    if job:
        return {"rayjob.yaml": _text(site, ray_job(site, job))}
    return {"raycluster.yaml": _text(site, ray_cluster(site))}


def _text(site: Site, made: Mapping[str, object]) -> str:
    head = f"# {site.name}: written by `adaptnet cluster render`; edit the site's file instead of this one.\n"
    return head + yaml.dump(json.loads(json.dumps(made)), Dumper=_QuotingDumper, sort_keys=False, width=10**6)


class _QuotingDumper(yaml.SafeDumper):
    """Quotes text that another YAML reader may read as a number, such as 3e4."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _is_number(text) else None)


_QuotingDumper.add_representer(str, _QuotingDumper.represent_str)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- Ray's cluster launcher


def launcher(site: Launched) -> dict[str, object]:
    """The configuration for `ray up`. Raises ConfigError if it does not fit Ray's schema."""
    made = {
        "cluster_name": site.name,
        "auth": {"ssh_user": site.ssh.user, **({"ssh_private_key": site.ssh.key} if site.ssh.key else {})},
        **_machines(site),
        **({"docker": _docker(site)} if site.image else {}),
        "file_mounts": {TOKEN: TOKEN, **({} if site.image or site.prefix else _copied())},
        "rsync_exclude": ["__pycache__"],
        "initialization_commands": [*site.setup, _shared(site)],
        "setup_commands": [] if site.image else _installing(site),
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": ["ray stop", _start(site, head=True)],
        "worker_start_ray_commands": ["ray stop", _start(site, head=False)],
    }
    check_launcher(site, made)
    return made


def _machines(site: Launched) -> dict[str, object]:
    """The provider and its node types."""
    if isinstance(site, OnPremise):
        provider = {"type": "local", "head_ip": site.head, "worker_ips": list(site.workers)}
        return {"provider": provider, "max_workers": len(site.workers)}
    groups = {"head": site.head, "workers": site.workers}
    return {
        "provider": _provider(site),
        "max_workers": site.workers.max,
        "idle_timeout_minutes": site.idle_minutes,
        "head_node_type": "head",
        "available_node_types": {name: _node_type(site, machine) for name, machine in groups.items()},
    }


def _provider(site: Aws | Gcp) -> dict[str, object]:
    if isinstance(site, Aws):
        zones = {"availability_zone": ",".join(site.zones)} if site.zones else {}
        return {"type": "aws", "region": site.region, **zones, "cache_stopped_nodes": False}
    return {"type": "gcp", "region": site.region, "availability_zone": site.zone, "project_id": site.project}


def _node_type(site: Aws | Gcp, machine: Machine) -> dict[str, object]:
    """A node type; the head's has no workers."""
    fewest, most = (machine.min, machine.max) if isinstance(machine, Machines) else (0, 0)
    config = _aws(site, machine) if isinstance(site, Aws) else _gcp(machine)
    return {
        "min_workers": fewest,
        "max_workers": most,
        "resources": _resources(machine),
        "node_config": configs.merge(config, machine.extra),
    }


def _resources(size: Size) -> dict[str, int]:
    memory = int(size.memory_gb * 1e9) if size.memory_gb else None
    amounts = {"CPU": size.cpus, "GPU": size.gpus, "memory": memory}
    return {name: amount for name, amount in amounts.items() if amount is not None}


def _aws(site: Aws, machine: Machine) -> dict[str, object]:
    return {
        "InstanceType": machine.type,
        **({"ImageId": machine.image} if machine.image else {}),
        **({"KeyName": Path(site.ssh.key).stem} if site.ssh.key else {}),
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": machine.disk_gb}}],
        **({"InstanceMarketOptions": {"MarketType": "spot"}} if machine.spot else {}),
    }


def _gcp(machine: Machine) -> dict[str, object]:
    """The node_config on GCP; machines with GPUs and preemptible ones cannot migrate while they run."""
    disk = {"diskSizeGb": machine.disk_gb, **({"sourceImage": machine.image} if machine.image else {})}
    scheduling: dict[str, object] = {"onHostMaintenance": "TERMINATE"} if machine.gpus or machine.spot else {}
    scheduling |= {"preemptible": True} if machine.spot else {}
    return {
        "machineType": machine.type,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        **({"scheduling": [scheduling]} if scheduling else {}),
    }


def _docker(site: Launched) -> dict[str, object]:
    """Docker's options; the launcher needs a shell in place of the image's entry point, `adaptnet`."""
    options = ["--entrypoint=", f"--volume={site.shared.path}:{site.shared.path}", "--ulimit=nofile=65536:65536"]
    return {"image": site.image, "container_name": "adaptnet", "pull_before_run": False, "run_options": options}


def _copied() -> dict[str, str]:
    if INSTALLED:
        raise ConfigError(
            "this site has neither an image nor a prefix, so its machines install a copy of the checkout, and this "
            "adaptnet was installed from a wheel: set image or prefix, or use the command of a checkout",
            key="image",
        )
    return {f"~/adaptnet/{name}": str(HOME / name) for name in COPIED}


def _shared(site: Launched) -> str:
    """A shell line that mounts the shared folder, or fails if it is missing."""
    path, source = site.shared.path, site.shared.source
    if source is None:
        return f"test -d {path} || {{ echo 'adaptnet: {path} (shared.path) is not on this node' >&2; exit 1; }}"
    mount = f"sudo mkdir -p {path} && sudo mount -t {shlex.quote(site.shared.type)} {shlex.quote(source)} {path}"
    return f"mountpoint -q {path} || {{ {mount}; }}"


def _installing(site: Launched) -> list[str]:
    """Shell lines that put `ray` and `adaptnet` on every node's PATH; Ray's launcher calls `ray` by that name."""
    if site.prefix:
        missing = f"adaptnet: no {site.prefix}/bin/ray (prefix) on this node"
        return [f"test -x {site.prefix}/bin/ray || {{ echo '{missing}' >&2; exit 1; }}", _on_path(f"{site.prefix}/bin")]
    extras = ",".join(["cluster", *([site.kind] if site.kind in ("aws", "gcp") else [])])
    return [
        f"EXTRAS={extras} PYTHON={shlex.quote(site.python)} ~/adaptnet/infra/venv.sh",
        _on_path("$HOME/adaptnet/.venv/bin"),
    ]


def _on_path(folder: str) -> str:
    line = f"export PATH={folder}:$PATH"
    return f"grep -qxF '{line}' ~/.bashrc || echo '{line}' >> ~/.bashrc"


def _start(site: Launched, *, head: bool) -> str:
    """The shell line of `ray start` in the environment that all nodes share."""
    variables = {**ENVIRONMENT, **site.environment}
    exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
    command = ["ray", "start", "--disable-usage-stats"]
    if head:
        dashboard = str(site.dashboard).lower()
        command += ["--head", f"--port={PORT}", "--autoscaling-config=~/ray_bootstrap_config.yaml"]
        command += [f"--include-dashboard={dashboard}"]
    else:
        command += [f"--address=$RAY_HEAD_IP:{PORT}"]
    if isinstance(site, OnPremise):
        sizes = {"cpus": site.node.cpus, "gpus": site.node.gpus}
        command += [f"--num-{name}={amount}" for name, amount in sizes.items() if amount is not None]
        command += [f"--memory={int(site.node.memory_gb * 1e9)}"] if site.node.memory_gb else []
    return f"ulimit -n 65536; export {exports}; {' '.join(command)}"


def check_launcher(site: Launched, made: Mapping[str, object]) -> None:
    """Raises ConfigError with the errors of Ray's own schema."""
    from jsonschema import Draft7Validator

    spec = find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json"
    faults = [
        f"  {'.'.join(map(str, fault.absolute_path)) or '(top level)'}: {fault.message}"
        for fault in Draft7Validator(json.loads(path.read_text(encoding="utf-8"))).iter_errors(made)
    ]
    if faults:
        raise ConfigError(
            "\n".join([f"{site.name}: Ray's launcher rejects this configuration:", *faults]),
            key="cluster.yaml",
            subject=site.name,
        )


# ---- KubeRay


def ray_cluster(site: Kubernetes) -> dict[str, object]:
    """The manifest of a RayCluster."""
    made: dict[str, object] = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": site.name, "namespace": site.namespace},
        "spec": _spec(site, dashboard=site.dashboard),
    }
    return _checked(kuberay.RayCluster, made, site)


def ray_job(site: Kubernetes, arguments: Sequence[str]) -> dict[str, object]:
    """The manifest of a RayJob that runs `adaptnet ARGUMENTS` on a cluster of its own, which ends with it.

    KubeRay submits it through the dashboard, which is therefore on. Raises ConfigError for a training whose run folder
    is not on the shared path.
    """
    name, address = f"{site.name}-{arguments[0]}", []
    if arguments[0] == "train":
        address = ["compute.address=auto"]
        if not any(word.startswith(f"{site.path}/") for word in arguments):
            raise ConfigError(
                f"--job: every pod must see the run's folder; add --run-dir {site.path}/runs/NAME",
                key="--run-dir",
                subject=site.path,
            )
    made: dict[str, object] = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": site.namespace},
        "spec": {
            "entrypoint": shlex.join(["adaptnet", *arguments, *address]),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "backoffLimit": RETRIES,
            "rayClusterSpec": _spec(site, dashboard=True),
        },
    }
    return _checked(kuberay.RayJob, made, site)


def _checked(model: type[configs.Config], made: dict[str, object], site: Kubernetes) -> dict[str, object]:
    configs.validate(model, made, f"{site.name}: KubeRay rejects this manifest")
    return made


def _spec(site: Kubernetes, *, dashboard: bool) -> dict[str, object]:
    workers = site.workers
    grows = workers.min < workers.max
    idle = {"idleTimeoutSeconds": round(site.idle_minutes * 60), "version": "v2"}
    head_options = {"num-cpus": "0", "include-dashboard": str(dashboard).lower()}  # no training on the head
    return {
        "rayVersion": pins()["ray"],
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": grows,
        **({"autoscalerOptions": idle} if grows else {}),
        "headGroupSpec": {"rayStartParams": head_options, "template": _template(site, site.head, dashboard)},
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": workers.min,
                "minReplicas": workers.min,
                "maxReplicas": workers.max,
                "rayStartParams": {},
                "template": _template(site, workers, None),
            }
        ],
    }


def _template(site: Kubernetes, pod: Pod, dashboard: bool | None) -> dict[str, object]:
    """A pod template that runs as the image's own user; of a worker if `dashboard` is None, else of the head."""
    amounts = {"cpu": str(pod.cpus), "memory": f"{round(pod.memory_gb * 1024)}Mi"}
    amounts |= {"nvidia.com/gpu": str(pod.gpus)} if pod.gpus else {}
    variables = {key: value for key, value in {**ENVIRONMENT, **site.environment}.items() if key != "RAY_AUTH_MODE"}
    container = {
        "name": "ray",
        "image": site.image,
        "resources": {"limits": amounts, "requests": amounts},
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        **({} if dashboard is None else {"ports": _ports(dashboard)}),
        **({"volumeMounts": [{"name": "shared", "mountPath": site.path}]} if site.claim else {}),
        **_probes(is_head=dashboard is not None),
    }
    spec = {
        "containers": [container],
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER_ID, "fsGroup": USER_ID},
        **({"nodeSelector": dict(pod.node_selector)} if pod.node_selector else {}),
        **({"imagePullSecrets": [{"name": site.pull_secret}]} if site.pull_secret else {}),
    }
    if site.claim:
        spec["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": site.claim}}]
    return {"spec": spec}


def _ports(dashboard: bool) -> list[dict[str, object]]:
    shown = [{"containerPort": DASHBOARD_PORT, "name": "dashboard"}] if dashboard else []
    return [{"containerPort": PORT, "name": "gcs"}, *shown]


def _probes(*, is_head: bool) -> dict[str, object]:
    """Probes that work without the dashboard, unlike KubeRay's own."""
    way: dict[str, object] = {"exec": {"command": ["sh", "-c", "pidof raylet"]}}
    if is_head:
        way = {"tcpSocket": {"port": PORT}}
    patience = {"initialDelaySeconds": 10, "periodSeconds": 5, "timeoutSeconds": 5}
    return {
        "readinessProbe": {**way, **patience, "failureThreshold": 12},
        "livenessProbe": {**way, **patience, "failureThreshold": 120},
    }
