"""torchvision's published weights, `torchvision:NAME/WEIGHTS`: as a checked file, and the images that they expect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch.hub

from pipeline.errors import CheckpointError, ConfigError
from pipeline.runs import files
from pipeline.weights import ImagesExpected

if TYPE_CHECKING:  # importing torchvision takes about as long as torch
    from torchvision.models import WeightsEnum

PREFIX = "torchvision:"
HALVED = ("googlenet", "inception_v3")  # torchvision's loader adds a layer to them, which turns other images into these
HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # the beginning of the file's SHA-256, in its name


def are_named(source: Path) -> bool:
    """Whether the source of weights is `torchvision:NAME/WEIGHTS` and not a path."""
    return str(source).startswith(PREFIX)


def locate(source: str) -> Path:
    """The file of these weights in torch's cache, downloaded if it is not there, with the hash that its name states.

    Raises ConfigError if torchvision publishes no such weights, CheckpointError if they cannot be downloaded or have
    another hash.
    """
    return fetched(_found(source).url, Path(torch.hub.get_dir()) / "checkpoints")


def _found(source: str) -> WeightsEnum:
    import torchvision

    name, _, weights = source.removeprefix(PREFIX).partition("/")
    names = torchvision.models.list_models(module=torchvision.models)
    known = [each.name for each in torchvision.models.get_model_weights(name)] if name in names else []
    if weights not in known:
        hint = f"known: {', '.join(f'{PREFIX}{name}/{each}' for each in known)}" if known else "no such net"
        raise ConfigError(
            f"training.start_from (={source}): torchvision publishes no such weights; {hint}",
            key="training.start_from",
            subject=source,
        )
    return torchvision.models.get_model_weights(name)[weights]


def fetched(url: str, folder: Path) -> Path:
    """The file at `url` in `folder`, downloaded if it is missing; its name states how its SHA-256 begins.

    Processes that download at once do not disturb one another. Raises CheckpointError as `locate` does.
    """
    file, stated = folder / url.rpartition("/")[2], HASH.search(url)
    if stated is None:
        raise _fault(url, "the name of the file states no hash, so what is downloaded cannot be checked", file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            torch.hub.download_url_to_file(url, str(file), hash_prefix=stated[1], progress=False)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash
        raise _fault(url, f"cannot be downloaded ({error})", file) from None
    if not files.sha256(file).startswith(stated[1]):
        raise _fault(url, f"{file} has another hash than its name states: delete it", file)
    return file


def _fault(url: str, what: str, file: Path) -> CheckpointError:
    return CheckpointError(
        f"{url}: {what}. Download the file where the network allows it, put it to {file}, or name it in "
        "training.start_from",
        key="weights",
        subject=url,
    )


def expected(file: Path) -> ImagesExpected | None:
    """The images that torchvision states for the weights with this file's name; None if the name is not one of its."""
    return next((_stated(weights, name) for name, weights in _all() if weights.url.endswith(f"/{file.name}")), None)


@cache
def _all() -> tuple[tuple[str, WeightsEnum], ...]:
    return tuple(_each())


def _each() -> Iterator[tuple[str, WeightsEnum]]:
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        yield from ((name, weights) for weights in torchvision.models.get_model_weights(name))


def _stated(weights: WeightsEnum, name: str) -> ImagesExpected:
    preset, half = weights.transforms(), (0.5, 0.5, 0.5)
    return ImagesExpected(
        source=f"{PREFIX}{name}/{weights.name}",
        mean=half if name in HALVED else tuple(preset.mean),
        std=half if name in HALVED else tuple(preset.std),
        side_px=preset.crop_size[0],
        resize_px=preset.resize_size[0],
        interpolation=preset.interpolation.value,
    )
