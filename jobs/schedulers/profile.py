"""A site's profile: what every job on a cluster needs, written once in infra/slurm/sites/<name>.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from jobs.schedulers import gpus
from jobs.schedulers.gpus import Value
from pipeline import config as configs
from pipeline.config import Config
from pipeline.errors import ConfigError, JsonValue, without_secrets
from pipeline.installation import HOME

SITES = HOME / "infra" / "slurm" / "sites"
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]  # goes into the script unquoted
ONE_LINE = r"^[^\x00-\x1f\x7f]+$"  # a line of the batch script would end at a newline
Text = Annotated[str, Field(pattern=ONE_LINE)]
Option = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]+$")]  # a long option of sbatch, without its dashes
MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY", re.IGNORECASE)
OURS = {  # options of sbatch that are set from elsewhere, and where
    **{name: f"the key {name}" for name in ("partition", "account", "qos", "constraint", "time", "exclude", "comment")},
    **{name: f"the key {name.replace('-', '_')}" for name in ("cpus-per-task", "mail-user", "mail-type")},
    "signal": "the key signal_delay_s",
    "nodes": "--nodes of `adaptnet submit`",
    "job-name": "--name of `adaptnet submit`",
    "array": "--array of `adaptnet submit`",
    "dependency": "--dependency of `adaptnet submit`",
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "AdaptNet: a job has one task on each node"),
    **dict.fromkeys(("output", "error", "open-mode"), "AdaptNet: logs are in the run's folder"),
    **dict.fromkeys(("requeue", "no-requeue"), "AdaptNet; max_requeues: 0 keeps a job from being started again"),
    **dict.fromkeys(("wrap", "test-only", "wait", "quiet", "parsable"), "AdaptNet, which reads sbatch's answer"),
    **dict.fromkeys(("clusters", "cluster"), "the machine: submit on a login node of that cluster"),
    "gpus-per-socket": "the key gpus_per_node",
}


class ContainerImage(Config):
    """The image that a job's Python runs in, by Apptainer."""

    image: Text  # .sif file that every node sees
    binds: tuple[Text, ...] = ()  # folders that are visible inside, as SRC or SRC:DST
    python: Text = "python"  # inside
    options: tuple[Text, ...] = ("--nv",)


class Nccl(Config):
    """How NCCL connects the GPUs of several nodes; null leaves a choice to NCCL."""

    interface: Text | None = None  # network interfaces of its TCP connections and of gloo's, e.g. eth0 or ^lo,docker0
    infiniband: bool | None = None  # false: never use it
    adapters: Text | None = None  # InfiniBand adapters, e.g. mlx5_0,mlx5_1
    # an adapter gives a message up after 4 us x 2^timeout, 7 times; larger for large clusters
    timeout: Annotated[int, Field(ge=1, le=22)] | None = None
    debug: Literal["WARN", "INFO"] | None = None

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment variables that say this."""
        off = None if self.infiniband is None else str(int(not self.infiniband))
        named = {
            "NCCL_SOCKET_IFNAME": self.interface,
            "GLOO_SOCKET_IFNAME": None if self.interface is None or self.interface[0] in "^=" else self.interface,
            "NCCL_IB_DISABLE": off,
            "NCCL_IB_HCA": self.adapters,
            "NCCL_IB_TIMEOUT": None if self.timeout is None else str(self.timeout),
            "NCCL_DEBUG": self.debug,
        }
        return {name: value for name, value in named.items() if value is not None}


class SiteProfile(Config):
    """Defaults of `adaptnet submit`; an option on the command line takes precedence."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    time: Text = "24h"
    # 4, or with a type: a100:4
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | Annotated[str, AfterValidator(gpus.typed)] = 0
    cpus_per_task: Annotated[int, Field(ge=1, le=4096)] = 1
    memory_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None
    modules: tuple[Text, ...] = ()  # loaded by `module load`
    setup: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # shell lines, after the modules
    environment: Mapping[VariableName, str] = Field(default_factory=dict)
    nccl: Nccl = Nccl()
    container: ContainerImage | None = None
    scratch: Text | None = None  # a fast local folder of each node; jobs get it as TMPDIR
    mail_user: Text | None = None
    mail_type: Text = "END,FAIL"
    exclude: Text | None = None
    comment: Text | None = None
    signal_delay_s: Annotated[int, Field(ge=10, le=65_535)] = 90  # how long before its end a job is warned to save
    patience_s: Annotated[float, Field(gt=0, le=1e6)] = 120.0  # how long to wait until Ray has started on all nodes
    max_requeues: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    # any other option of sbatch: {licenses: foo, exclusive: true, gres: "gpu:a100:4"}; true or null: without a value
    extra: Mapping[Option, Value] = Field(default_factory=dict)

    @field_validator("extra", mode="before")
    @classmethod
    def _as_sbatch_spells(cls, extra: object) -> object:
        if not isinstance(extra, Mapping):
            return extra
        return {str(name).lstrip("-").replace("_", "-"): value for name, value in extra.items()}

    @model_validator(mode="after")
    def _rules(self) -> SiteProfile:
        for name, place in OURS.items():
            if name in self.extra:
                raise ValueError(f"extra.{name}: is set by {place}")
        if self.memory_gb and any(name in self.extra for name in MEMORY):
            raise ValueError(f"memory_gb and one of extra.{', extra.'.join(MEMORY)} set the memory: give one of them")
        if faults := [name for name, value in self.extra.items() if "\n" in str(value)]:
            raise ValueError(f"extra.{faults[0]}: a value has one line")
        if twice := sorted(set(self.nccl.variables) & set(self.environment)):
            raise configs.fault(f"environment.{twice[0]}", "the section nccl sets it too: give one of them")
        for name, value in self.environment.items():
            if without_secrets(value) != value or SECRET_NAME.search(name):
                raise ValueError(f"environment.{name}: has a password, which every job's script would show; export it")
        gpus.check(self.gpus_per_node, self.extra)
        return self

    @classmethod
    def stored(cls, profile: Mapping[str, JsonValue]) -> SiteProfile:
        """A profile that this or an older version recorded; older ones may hold options that are now set elsewhere."""
        extra = configs.section(profile, "extra")
        dropped = (*OURS, *(MEMORY if profile.get("memory_gb") else ()))
        plain = {name: value for name, value in extra.items() if name.replace("_", "-") not in dropped}
        variables = configs.section(profile, "environment")
        shown = {name: without_secrets(str(value)) for name, value in variables.items()}
        return configs.validate(
            cls, {**profile, "extra": plain, "environment": shown}, "a recorded profile", stored=True
        )

    def with_options(self, given: Mapping[str, object]) -> SiteProfile:
        """The profile with options of the command line, which also replace what `extra` says of the same thing.

        Raises ConfigError for a value that a profile may not hold.
        """
        options, extra = dict(given), dict(self.extra)
        if "memory_gb" in given:
            extra = {name: value for name, value in extra.items() if name not in MEMORY}
        if "gpus_per_node" in given:
            options["gpus_per_node"], extra = gpus.replaced(options["gpus_per_node"], extra)
        mapping: dict[str, object] = {**self.model_dump(mode="json"), "extra": extra}
        return configs.validate(SiteProfile, configs.merge(mapping, options), "command line")


def load(name: str | None) -> SiteProfile:
    """The profile called `name`, or at that path; one of defaults only if None.

    Raises ConfigError listing the known profiles, or naming each fault.
    """
    if name is None:
        return SiteProfile()
    path = Path(name) if name.endswith((".yaml", ".yml")) else SITES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in SITES.glob("*.yaml"))) or "none"
        raise ConfigError(
            f"--site (={name}): no such profile; known: {known}; or a path ending in .yaml", key="--site", subject=name
        )
    return configs.validate(SiteProfile, configs.read_mapping(path), f"profile {path}")
