"""MSDNet: exits at the coarsest of several scales (arXiv 1703.09844), the net that RANet is compared with."""

from __future__ import annotations

from pipeline.exits.objective import groups, loss, updates, whole
from pipeline.exits.policies import describe
from pipeline.exits.static import static
from pipeline.families.msdnet.config import MsdnetConfig
from pipeline.families.msdnet.depth import layers
from pipeline.families.msdnet.inference import load_pretrained, policies
from pipeline.families.msdnet.model import build
from pipeline.family import Family

FAMILY = Family(
    config=MsdnetConfig,
    build=build,
    loss=loss,
    groups=groups,
    layers=layers,
    updates=updates,
    whole=whole,
    policies=policies,
    describe=describe,
    load_pretrained=load_pretrained,
    static=static,
)
