"""Whether this node's GPUs decode JPEGs: tried in a child process, since a decoder that crashes ends its process.

Some versions of nvImageCodec crash some GPUs where they decode windows. The answer is kept for each node, driver and
version of DALI, so one process of a node tries it once.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline.data.config import DataConfig
from pipeline.installation import module

DRIVER = Path("/proc/driver/nvidia/version")
TIMEOUT_S, IMAGES = 120.0, 32
CHILD = (sys.executable, "-m", module("pipeline.data.probe"))


def fault(config: DataConfig, device: torch.device) -> str:
    """How decoding on this GPU failed in a child process; "" if it did not, or the CPU decodes anyway."""
    if device.type != "cuda" or config.decoder == "cpu":
        return ""
    return tried((*CHILD, str(device.index or 0)), Path.home() / ".cache" / "adaptnet" / "decoders")


def tried(child: Sequence[str], folder: Path) -> str:
    """`fault` by this command, or as `folder` remembers it. Processes of a node wait for the first one's answer."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{socket.gethostname()}.json"
    with open(kept, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = _parsed(file.read())
        if known.get("of") != _versions():
            known = {"of": _versions(), "fault": _ended(child)}
            file.truncate(0)
            file.write(json.dumps(known))
    return known["fault"]


def _parsed(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("fault"), str) else {}


def _versions() -> str:
    """DALI, nvImageCodec and the driver of this node."""
    names = ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13")
    driver = DRIVER.read_text(encoding="utf-8").splitlines()[0] if DRIVER.exists() else "no driver"
    return "; ".join([*(f"{name} {version(name)}" for name in names), driver])


def _ended(child: Sequence[str]) -> str:
    """How a command failed; "" if it succeeded."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(child, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        return f"no answer in {TIMEOUT_S:g} s"
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else ""


def main(number: str) -> None:
    """Decodes windows of drawn JPEGs on this GPU, as training does."""
    from PIL import Image

    from pipeline.data.crop_geometry import for_evaluation
    from pipeline.data.dali import Decoder, DecoderConfig

    buffer, sizes = io.BytesIO(), torch.tensor([[375, 500]] * IMAGES, dtype=torch.int32).numpy()
    Image.linear_gradient("L").resize((500, 375)).convert("RGB").save(buffer, "JPEG")
    decoder = Decoder(DecoderConfig(torch.device("cuda", int(number)), gpu=True, threads=2, most=IMAGES))
    for _ in range(3):
        decoder.put([buffer.getvalue()] * IMAGES, for_evaluation(sizes, side_px=224, resize_px=256))
        decoder.take()
    torch.cuda.synchronize()
    decoder.close()


if __name__ == "__main__":
    main(sys.argv[1])
