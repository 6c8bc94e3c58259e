"""What `adaptnet plan` has measured on this machine, remembered in the user's cache for the next plan."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch

from pipeline import config as configs
from pipeline.bench.plan import MachineProfile, here
from pipeline.errors import JsonValue
from pipeline.run_config import RunConfig
from pipeline.runs.files import read_json, write_json

NOT_OF_A_STEP = ("batch_size", "epochs", "schedule", "scale_lr", "reference_batch")  # keys of training


@dataclass(frozen=True)
class Measured:
    """A measurement and when it was made, in seconds since 1970."""

    profile: MachineProfile
    at: float


class MeasuredProfiles:
    """The measurements of one recipe on this machine, by what they depend on. folder: None: in the user's cache."""

    def __init__(self, config: RunConfig, what: Mapping[str, JsonValue], folder: Path | None = None) -> None:
        folder = folder or Path.home() / ".cache" / "adaptnet" / "plans"
        self._path = folder / f"{_digest(config, what)}.json"

    def find(self) -> Measured | None:
        """The measurement, if there is a readable one."""
        try:
            found = read_json(self._path)
        except (OSError, ValueError):
            return None
        content, at = (found.get("profile"), found.get("at")) if isinstance(found, dict) else (None, None)
        names = {field.name for field in fields(MachineProfile)}
        if not isinstance(content, dict) or set(content) != names or not isinstance(at, float):
            return None
        return Measured(MachineProfile(**cast("dict[str, Any]", content)), at)

    def put(self, profile: MachineProfile) -> None:
        """Remembers a measurement; a read-only cache is left as it is."""
        with suppress(OSError):
            write_json(self._path, {"profile": asdict(profile), "at": time.time()})


def _digest(config: RunConfig, what: Mapping[str, JsonValue]) -> str:
    """A name for what a measurement depends on."""
    mapping, device = configs.as_mapping(config), here(config)
    data = {key: each for key, each in configs.section(mapping, "data").items() if key != "root"}
    training = {k: each for k, each in configs.section(mapping, "training").items() if k not in NOT_OF_A_STEP}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.get_num_threads()}"
    parts = {"family": mapping["family"], "data": data, "training": training, **what}
    parts |= {"device": name, "torch": torch.__version__}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
