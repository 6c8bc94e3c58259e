"""Private parts of libraries: a part that is missing is an error that names it, when the module is imported."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

from raised import fails

from pipeline.compat import require
from pipeline.errors import ResourceError


def test_a_missing_part_is_an_error_about_its_library() -> None:
    owner = SimpleNamespace(there=SimpleNamespace(too=1))
    require("ray", owner, ("there", "there.too"), tried="1.0")
    with fails(ResourceError, "ray"):
        require("ray", owner, ("there.gone",), tried="1.0")


REMOVED = """
from importlib import import_module
raylet = import_module("ray._raylet")
del raylet.AuthenticationTokenLoader
try:
    import pipeline.compat.ray
except Exception as error:
    print(type(error).__name__, error.key)
"""


def test_rays_private_parts_are_checked_at_import() -> None:
    done = subprocess.run([sys.executable, "-c", REMOVED], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["ResourceError", "ray"], done.stderr
