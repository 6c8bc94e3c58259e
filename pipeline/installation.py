"""Where this code is, and what its modules are called there.

In a checkout the packages `pipeline`, `tuning` and `jobs` are on the top level; in an installed wheel all of them are
within the package `adaptnet`, so that no other distribution's names are taken. `infra/wheel` builds the wheel.
"""

from __future__ import annotations

from pathlib import Path

TOP = __name__.split(".")[0]  # the top-level package that holds this module
INSTALLED = __name__.count(".") > 1  # from a wheel, rather than imported from a checkout
PACKAGES = (TOP,) if INSTALLED else (TOP, "jobs", "tuning")  # all of our top-level packages
HOME = Path(__file__).parents[1]  # the folder of `pipeline`, `tuning`, `jobs` and `infra`
CODE = Path(__file__).parents[__name__.count(".")]  # the folder from which Python imports PACKAGES


def module(name: str) -> str:
    """The name by which Python imports a module that a checkout calls `name`, e.g. "jobs.cli"."""
    return f"{TOP}.{name}" if INSTALLED else name
