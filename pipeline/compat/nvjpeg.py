"""Which nvJPEG DALI decodes with: the wheel `nvidia-nvjpeg` that it requires, and not torchvision's.

torchvision's wheels carry an older nvJPEG under the same soname. nvImageCodec asks for that name, and gets the one that
was loaded first. With the older one it refuses windows with fancy upsampling, and the CPU decodes them instead.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

LIBRARY = Path("nvidia", "cu13", "lib", "libnvjpeg.so.13")


def load_first() -> None:
    """Loads the wheel's nvJPEG, if it is installed. It needs no GPU. Must come before the import of torchvision."""
    found = next((path for folder in sys.path if (path := Path(folder) / LIBRARY).is_file()), None)
    if found is not None:
        with suppress(OSError):
            ctypes.CDLL(str(found))
