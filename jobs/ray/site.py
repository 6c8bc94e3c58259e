"""A Ray cluster outside SLURM, said once in infra/ray/sites/<name>.yaml: which machines, how many, what is on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline import config as configs
from pipeline.config import Config
from pipeline.errors import ConfigError

SITES = Path(__file__).parents[2] / "infra" / "ray" / "sites"
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,36}[a-z0-9])?$")]  # KubeRay's rule, the strictest
Folder = Annotated[str, Field(pattern=r"^/[^\s:]+$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Count = Annotated[int, Field(ge=0)]


class Ssh(Config):
    """How `ray up` reaches the machines. Without a key Ray makes one on AWS and GCP; on hosts of your own ssh asks."""

    user: Text = "ubuntu"
    key: Text | None = None


class SharedStorage(Config):
    """The folder in which runs and images lie, seen by every node at the same path."""

    path: Folder = "/shared"
    source: Text | None = None  # what mount takes, e.g. fs-1.efs.eu-west-1.amazonaws.com:/; None: it is there already
    type: Text = "nfs4"


class Size(Config):
    """What a node gives to Ray; None: what Ray finds there."""

    cpus: Annotated[int, Field(ge=1)] | None = None
    gpus: Count | None = None
    memory_gb: Annotated[float, Field(gt=0)] | None = None


class Machine(Size):
    """A kind of machine in a cloud."""

    type: Text  # e.g. g5.2xlarge, g2-standard-12
    image: Text | None = None  # of the disk: an AMI, or a source image of GCP
    disk_gb: Annotated[int, Field(ge=20)] = 150
    spot: bool = False
    extra: Mapping[str, Any] = Field(default_factory=dict)  # laid over the node_config that is rendered


class Machines(Machine):
    """From `min` to `max` workers of one kind; between them the cluster grows as it is used."""

    min: Count = 0
    max: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order(self.min, self.max)
        return self


class Pod(Config):
    """What a pod asks for and is held to."""

    cpus: Annotated[int, Field(ge=1)]
    memory_gb: Annotated[float, Field(gt=0)]
    gpus: Count = 0
    node_selector: Mapping[str, str] = Field(default_factory=dict)


class Pods(Pod):
    """From `min` to `max` equal workers."""

    min: Count = 0
    max: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order(self.min, self.max)
        return self


def _check_order(fewest: int, most: int) -> None:
    if fewest > most:
        raise ValueError(f"min (={fewest}) is above max (={most})")


class _Site(Config):
    """What every kind has."""

    name: Name
    environment: Mapping[Variable, str] = Field(default_factory=dict)
    dashboard: bool = False  # Ray's dashboard and, with it, the job server that `adaptnet submit --where ray` talks to


class _Launched(_Site):
    """What Ray's own launcher brings up, over ssh."""

    ssh: Ssh = Ssh()
    image: Text | None = None  # of infra/docker, run by Docker on every node
    prefix: Folder | None = None  # or an environment that is there already, e.g. /shared/venv: bin/ray lies in it
    python: Text = "python3"  # or else, 3.11 or newer: this checkout is copied to every node and installed by it
    shared: SharedStorage = SharedStorage()
    setup: tuple[Text, ...] = ()  # shell lines on every node, before all else

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.image and self.prefix:
            raise ValueError("image and prefix are two ways to the same: give one")
        return self


class OnPremise(_Launched):
    """Hosts of one's own, for this cluster alone: Ray's launcher ends any other Ray of this user there."""

    kind: Literal["on-premise"]
    head: Text
    workers: tuple[Text, ...] = ()
    node: Size = Size()

    @model_validator(mode="after")
    def _hosts_once(self) -> Self:
        twice = {host for host in (self.head, *self.workers) if (self.head, *self.workers).count(host) > 1}
        if twice:
            raise ValueError(f"a host is named twice: {', '.join(sorted(twice))}")
        return self


class Aws(_Launched):
    kind: Literal["aws"]
    region: Text
    zones: tuple[Text, ...] = ()
    head: Machine
    workers: Machines
    idle_minutes: Annotated[float, Field(gt=0)] = 10


class Gcp(_Launched):
    kind: Literal["gcp"]
    project: Text
    region: Text
    zone: Text
    head: Machine
    workers: Machines
    idle_minutes: Annotated[float, Field(gt=0)] = 10


class Kubernetes(_Site):
    """A cluster of KubeRay's operator, 1.6 or newer."""

    kind: Literal["kubernetes"]
    image: Text
    namespace: Name = "default"
    head: Pod
    workers: Pods
    claim: Text | None = None  # PersistentVolumeClaim (ReadWriteMany) mounted at `path`
    path: Folder = "/shared"
    pull_secret: Text | None = None
    context: Text | None = None  # of kubectl; None: its current one
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
    """The site called `name`, or at that path. Raises ConfigError listing the sites there are, or each fault."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SITES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in SITES.glob("*.yaml"))) or "none"
        raise ConfigError(f"site (={name}): no such file; known: {known}; or a path ending in .yaml")
    found = configs.read_mapping(path)
    kind = str(found.get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"site {path}:\n  kind (={kind}): one of {', '.join(KINDS)}")
    return configs.validate(KINDS[kind], found, f"site {path}")
