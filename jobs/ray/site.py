"""Sites of Ray clusters outside SLURM, infra/ray/sites/<name>.yaml: machines, their number and their environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from pipeline import config as configs
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.installation import HOME

SITES = HOME / "infra" / "ray" / "sites"
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,36}[a-z0-9])?$")]  # KubeRay's rule, the strictest
Folder = Annotated[str, Field(pattern=r"^/[^\s:]+$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Count = Annotated[int, Field(ge=0)]


class Ssh(Config):
    """The ssh login by which `ray up` reaches the machines. Without a key Ray creates one on AWS and GCP."""

    user: Text = "ubuntu"
    key: Text | None = None


class SharedStorage(Config):
    """The folder of runs and images, which every node has at the same path."""

    path: Folder = "/shared"
    source: Text | None = None  # mount's source, e.g. fs-1.efs.eu-west-1.amazonaws.com:/; None: already mounted
    type: Text = "nfs4"


class Size(Config):
    """A node's resources for Ray; None: those that Ray detects."""

    cpus: Annotated[int, Field(ge=1)] | None = None
    gpus: Count | None = None
    memory_gb: Annotated[float, Field(gt=0)] | None = None


class Machine(Size):
    """A machine type of a cloud."""

    type: Text  # e.g. g5.2xlarge, g2-standard-12
    image: Text | None = None  # disk image: an AMI, or a source image of GCP
    disk_gb: Annotated[int, Field(ge=20)] = 150
    spot: bool = False
    extra: Mapping[str, JsonValue] = Field(default_factory=dict)  # merged into the rendered node_config


class Range(Config):
    """The range of workers of one kind; the cluster scales between `min` and `max`."""

    min: Count = 0
    max: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min (={self.min}) is above max (={self.max})")
        return self


class Machines(Range, Machine):
    """The range of workers of one machine type."""


class Pod(Config):
    """A pod's resources, both its requests and its limits."""

    cpus: Annotated[int, Field(ge=1)]
    memory_gb: Annotated[float, Field(gt=0)]
    gpus: Count = 0
    node_selector: Mapping[str, str] = Field(default_factory=dict)


class Pods(Range, Pod):
    """The range of equal worker pods."""


class _Site(Config):
    """The keys of every kind of site."""

    name: Name
    environment: Mapping[Variable, str] = Field(default_factory=dict)
    dashboard: bool = False  # Ray's dashboard and, with it, the job server of `adaptnet submit --where ray`


class _Launched(_Site):
    """A site whose cluster Ray's own launcher brings up, over ssh."""

    ssh: Ssh = Ssh()
    image: Text | None = None  # image built from infra/docker, run by Docker on every node
    prefix: Folder | None = None  # or an installed environment, e.g. /shared/venv, which holds bin/ray
    python: Text = "python3"  # or else, 3.11 or newer: installs a copy of this checkout on every node
    shared: SharedStorage = SharedStorage()
    setup: tuple[Text, ...] = ()  # shell lines that run first on every node

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.image and self.prefix:
            raise ValueError("image and prefix exclude each other: set one of them")
        return self


class OnPremise(_Launched):
    """Hosts of one's own, used by this cluster only: Ray's launcher stops any other Ray of this user on them."""

    kind: Literal["on-premise"]
    head: Text
    workers: tuple[Text, ...] = ()
    node: Size = Size()

    @model_validator(mode="after")
    def _hosts_once(self) -> Self:
        twice = {host for host in (self.head, *self.workers) if (self.head, *self.workers).count(host) > 1}
        if twice:
            raise ValueError(f"each host may be named once: {', '.join(sorted(twice))}")
        return self


class Aws(_Launched):
    """Machines on Amazon EC2."""

    kind: Literal["aws"]
    region: Text
    zones: tuple[Text, ...] = ()
    head: Machine
    workers: Machines
    idle_minutes: Annotated[float, Field(gt=0)] = 10


class Gcp(_Launched):
    """Machines on Google Compute Engine."""

    kind: Literal["gcp"]
    project: Text
    region: Text
    zone: Text
    head: Machine
    workers: Machines
    idle_minutes: Annotated[float, Field(gt=0)] = 10


class Kubernetes(_Site):
    """A cluster under Kubernetes with KubeRay's operator, 1.6 or newer."""

    kind: Literal["kubernetes"]
    image: Text
    namespace: Name = "default"
    head: Pod
    workers: Pods
    claim: Text | None = None  # PersistentVolumeClaim (ReadWriteMany) mounted at `path`
    path: Folder = "/shared"
    pull_secret: Text | None = None
    context: Text | None = None  # context of kubectl; None: its current one
    idle_minutes: Annotated[float, Field(gt=0)] = 10


Launched = OnPremise | Aws | Gcp
Site = Launched | Kubernetes


KINDS: Mapping[str, type[Site]] = {
    "on-premise": OnPremise,
    "aws": Aws,
    "gcp": Gcp,
    "kubernetes": Kubernetes,
}


def load(name: str) -> Site:
    """Reads the site `name` or the .yaml file at that path. Raises ConfigError for an unknown site or invalid keys."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SITES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in SITES.glob("*.yaml"))) or "none"
        raise ConfigError(
            f"site (={name}): no such file; known: {known}; or a path ending in .yaml", key="site", subject=name
        )
    keys = configs.read_mapping(path)
    kind = str(keys.get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"site {path}:\n  kind (={kind}): one of {', '.join(KINDS)}", key="kind", subject=kind)
    return configs.validate(KINDS[kind], keys, f"site {path}")
