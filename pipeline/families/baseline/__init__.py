"""Fixed networks to compare adaptive ones with: torchvision's, and the CIFAR ResNets of the papers."""

from __future__ import annotations

from pipeline.families.baseline.inference import describe, policies
from pipeline.families.baseline.model import BaselineConfig, build
from pipeline.families.baseline.objective import groups, loss, updates
from pipeline.families.baseline.released import load_pretrained
from pipeline.families.baseline.static import static
from pipeline.family import Family

FAMILY = Family(
    config=BaselineConfig,
    build=build,
    loss=loss,
    groups=groups,
    updates=updates,
    policies=policies,
    describe=describe,
    load_pretrained=load_pretrained,
    static=static,
    adaptive=False,
)
