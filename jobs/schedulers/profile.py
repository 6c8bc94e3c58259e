"""A site's profile: what every job on a cluster needs, written once in infra/slurm/sites/<name>.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline import config as configs
from pipeline.config import Config
from pipeline.errors import ConfigError

SITES = Path(__file__).parents[2] / "infra" / "slurm" / "sites"
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]  # goes into the script unquoted
Text = Annotated[str, Field(min_length=1)]


class ContainerImage(Config):
    """The image that a job's Python runs in, by Apptainer."""

    image: Text  # .sif file that every node sees
    binds: tuple[Text, ...] = ()  # folders that are visible inside, as SRC or SRC:DST
    python: Text = "python"  # inside
    options: tuple[Text, ...] = ("--nv",)


class SiteProfile(Config):
    """Defaults of `adaptnet submit`; an option on the command line takes precedence."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    time: Text = "24h"
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 0
    cpus_per_task: Annotated[int, Field(ge=1, le=4096)] = 1
    memory_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None
    modules: tuple[Text, ...] = ()  # loaded by `module load`
    setup: tuple[Text, ...] = ()  # shell lines, after the modules
    environment: Mapping[VariableName, str] = Field(default_factory=dict)
    container: ContainerImage | None = None
    scratch: Text | None = None  # a fast local folder of each node; jobs get it as TMPDIR
    mail_user: Text | None = None
    mail_type: Text = "END,FAIL"
    exclude: Text | None = None
    comment: Text | None = None
    signal_delay_s: Annotated[int, Field(ge=10, le=65_535)] = 90  # how long before its end a job is warned to save
    patience_s: Annotated[float, Field(gt=0, le=1e6)] = 120.0  # how long to wait until Ray has started on all nodes
    max_requeues: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    extra: Mapping[str, str] = Field(default_factory=dict)  # any other option of sbatch: {"licenses": "foo"}


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
