"""Parameters and MACs of the shipped recipes' nets, from the file net_costs.json, which `write` measures.

An entry is valid while the recipe's family section, side and number of classes are those that were measured. MACs of a
policy are here where they are the same for every image; of one that decides by image they follow from training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pipeline import config as configs
from pipeline import cost, recipes, run_config
from pipeline import family as families
from pipeline.errors import ResourceError
from pipeline.family import Policy
from pipeline.run_config import RunConfig
from pipeline.runs.files import read_json, write_json

FILE = Path(__file__).with_name("net_costs.json")
NOWHERE = "/nowhere"  # stands for the folder of the data sets, which are not read
FIXED = ("resolution", "exit", "shape", "views")  # kinds of policies that do the same for every image
CLASSES = {  # of the sets that recipes name by their folder; others are taken to have DEFAULT_CLASSES
    "imagenet": 1000, "cifar100": 100, "tiny-imagenet": 200, "aircraft": 100, "cars": 196, "cub": 200,
    "flowers102": 102, "sketches": 250, "wikiart": 195, "two-class": 2, "flowers": 5,
}  # fmt: skip
DEFAULT_CLASSES = 10


@dataclass(frozen=True)
class RecipeCost:
    """What the net of a recipe costs, for images of side_px and `classes` classes.

    macs: of the whole net, for one image. policies: MACs by policy, of those that do the same for every image, the
    default first. deciding: names of the policies that decide by image, whose MACs are at most the whole net's.
    """

    key: str
    side_px: int
    classes: int
    parameters: int
    macs: float
    policies: Mapping[str, float]
    deciding: tuple[str, ...]

    def within(self, most: float) -> list[str]:
        """The policies within `most` MACs: all that decide by image if the whole net is within it."""
        fixed = [name for name, macs in self.policies.items() if macs <= most]
        return [*fixed, *(self.deciding if self.macs <= most else ())]


def of(recipe: str) -> RecipeCost | None:
    """The cost of a shipped recipe's net; None where a package that it needs was missing when the file was written."""
    config = run_config.load(recipe, data_home=NOWHERE)
    entry = stored().get(key_of(config))
    return entry if entry is not None else _measured_or_none(config)


def key_of(config: RunConfig) -> str:
    """16 hex digits of what the cost depends on."""
    section = configs.as_mapping(config.family)
    return configs.fingerprint({"family": section, "side_px": config.data.side_for_eval, "classes": classes_of(config)})


def classes_of(config: RunConfig) -> int:
    """The classes of the set that a recipe names."""
    return CLASSES.get(config.data.root.name, DEFAULT_CLASSES)


def measure(config: RunConfig) -> RecipeCost:
    """Builds the net and runs it and its policies on one image. Raises ResourceError for a package that is missing."""
    family = families.find(config.family.name)
    side, classes = config.data.side_for_eval, classes_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = family.build(config.family, classes).eval()
    image = torch.zeros(1, 3, side, side)
    policies = family.policies(config.family, net)
    fixed = [each for each in policies if each.kind in FIXED]
    return RecipeCost(
        key_of(config),
        side,
        classes,
        sum(parameter.numel() for parameter in net.parameters()),
        float(cost.measure(net, image).macs),
        {each.name: _macs(each, net, image) for each in fixed},
        tuple(each.name for each in policies if each not in fixed),
    )


def _macs(policy: Policy, net: nn.Module, image: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(policy.predict(net, image).macs[0])


def _measured_or_none(config: RunConfig) -> RecipeCost | None:
    try:
        return measure(config)
    except ResourceError:
        return None


@cache
def stored() -> Mapping[str, RecipeCost]:
    """The file's entries by key."""
    content = cast("list[dict[str, Any]]", read_json(FILE))
    return {each["key"]: RecipeCost(**{**each, "deciding": tuple(each["deciding"])}) for each in content}


def write() -> None:
    """Measures what FILE lacks, drops what no recipe has any more, and writes FILE."""
    found: dict[str, RecipeCost] = {}
    known = stored() if FILE.is_file() else {}
    for name in recipes.names():
        config = run_config.load(name, data_home=NOWHERE)
        key = key_of(config)
        made = found.get(key) or known.get(key) or _measured_or_none(config)
        if made is not None:
            found[key] = made
    write_json(FILE, [asdict(each) for each in found.values()])
    stored.cache_clear()
