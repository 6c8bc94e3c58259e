"""The fields of KubeRay's RayCluster and RayJob (ray.io/v1) that we write, and their rules.

This model follows KubeRay's API reference and Kubernetes' core/v1 and uses their names. A manifest that violates it is
not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Config

Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[KMGT]i?)?$")]
Text = Annotated[str, Field(min_length=1)]
Replicas = Annotated[int, Field(ge=0)]


class Metadata(Config):
    """The object's name and namespace."""

    name: Label
    namespace: Label


class Variable(Config):
    """An environment variable of a container."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str


class Amounts(Config):
    """Resources of a container: requests and limits."""

    limits: Mapping[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]
    requests: Mapping[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]


class Port(Config):
    """A port that a container opens."""

    containerPort: Annotated[int, Field(ge=1, le=65535)]
    name: Label


class Tcp(Config):
    """A probe that connects to a port."""

    port: Annotated[int, Field(ge=1, le=65535)]


class Exec(Config):
    """A probe that runs a command in the container."""

    command: Annotated[tuple[Text, ...], Field(min_length=1)]


class Probe(Config):
    """A probe with exactly one of `tcpSocket` and `exec`."""

    tcpSocket: Tcp | None = None
    exec: Exec | None = None
    initialDelaySeconds: Replicas
    periodSeconds: Annotated[int, Field(ge=1)]
    timeoutSeconds: Annotated[int, Field(ge=1)]
    failureThreshold: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.tcpSocket is None) == (self.exec is None):
            raise ValueError("a probe has one of tcpSocket and exec")
        return self


class Mount(Config):
    """A volume in a container's file system."""

    name: Label
    mountPath: Annotated[str, Field(pattern=r"^/")]


class Container(Config):
    """The Ray container of a pod."""

    name: Label
    image: Text
    resources: Amounts
    env: tuple[Variable, ...] = ()
    ports: tuple[Port, ...] = ()
    volumeMounts: tuple[Mount, ...] = ()
    readinessProbe: Probe
    livenessProbe: Probe


class Claim(Config):
    """A volume's PersistentVolumeClaim."""

    claimName: Text


class Volume(Config):
    """A volume of a pod."""

    name: Label
    persistentVolumeClaim: Claim


class Reference(Config):
    """A reference to an object by name."""

    name: Text


class SecurityContext(Config):
    """The user of a pod's processes, never root."""

    runAsNonRoot: Literal[True]
    runAsUser: Annotated[int, Field(ge=1)]
    fsGroup: Annotated[int, Field(ge=1)]


class PodSpec(Config):
    """A pod: its containers, volumes and node selector."""

    containers: Annotated[tuple[Container, ...], Field(min_length=1)]
    securityContext: SecurityContext
    volumes: tuple[Volume, ...] = ()
    imagePullSecrets: tuple[Reference, ...] = ()
    nodeSelector: Mapping[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _mounted(self) -> Self:
        known = {volume.name for volume in self.volumes}
        lost = {mount.name for each in self.containers for mount in each.volumeMounts} - known
        if lost:
            raise ValueError(f"a container mounts {', '.join(sorted(lost))}, which volumes does not define")
        return self


class Template(Config):
    """A pod template."""

    spec: PodSpec


class HeadGroup(Config):
    """The head's pod, and its parameters of `ray start`."""

    rayStartParams: Mapping[str, str]
    template: Template


class WorkerGroup(Config):
    """Equal worker pods, from `minReplicas` to `maxReplicas`."""

    groupName: Label
    replicas: Replicas
    minReplicas: Replicas
    maxReplicas: Replicas
    rayStartParams: Mapping[str, str]
    template: Template

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("replicas must be between minReplicas and maxReplicas")
        return self


class Authentication(Config):
    """Whether the cluster requires a token."""

    mode: Literal["disabled", "token"]


class Autoscaler(Config):
    """KubeRay's autoscaler, which removes workers that are idle."""

    idleTimeoutSeconds: Replicas
    version: Literal["v1", "v2"]


class ClusterSpec(Config):
    """A Ray cluster: its version, head and workers."""

    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: Authentication
    enableInTreeAutoscaling: bool
    autoscalerOptions: Autoscaler | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: tuple[WorkerGroup, ...]


class JobSpec(Config):
    """A job and the cluster that it runs on."""

    entrypoint: Text
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Replicas
    backoffLimit: Replicas
    rayClusterSpec: ClusterSpec


class RayCluster(Config):
    """The manifest of a cluster."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJob(Config):
    """The manifest of a job with a cluster of its own."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec
