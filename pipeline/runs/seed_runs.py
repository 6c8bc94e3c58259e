"""Where the runs of one recipe with several seeds are: NAME-s1, NAME-s2, ... and the folder of their group, NAME-seeds.

The group's config.yaml lists the seeds. The group is the parent of its runs in the tracker.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline import config as configs
from pipeline.errors import ConfigError

GROUP = "-seeds"


def group_of(run_dir: Path) -> Path:
    """The folder of the group, for the folder that a run of one seed would have."""
    return run_dir.with_name(f"{run_dir.name}{GROUP}")


def folder_of(group: Path, seed: int) -> Path:
    """The folder of one seed's run."""
    return group.with_name(f"{group.name.removesuffix(GROUP)}-s{seed}")


def seeds_in(group: Path) -> tuple[int, ...]:
    """The seeds of a group's folder, rising; empty for any other folder, also if its config.yaml is damaged."""
    path = group / "config.yaml"
    if not group.name.endswith(GROUP) or not path.is_file():
        return ()
    try:
        seeds = configs.read_mapping(path).get("seeds")
    except ConfigError:
        return ()
    return tuple(sorted(seed for seed in seeds if type(seed) is int)) if isinstance(seeds, list) else ()


def stem_of(name: str) -> str | None:
    """NAME of a run NAME-s3; None for any other name."""
    match = re.fullmatch(r"(.+)-s\d+", name)
    return match[1] if match else None
