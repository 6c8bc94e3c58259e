"""RANet: easy images exit from low-resolution sub-networks, hard ones continue to finer ones (arXiv 2003.07326)."""

from __future__ import annotations

from pipeline.exits.objective import groups, loss, updates, whole
from pipeline.exits.policies import describe
from pipeline.exits.static import static
from pipeline.families.ranet.config import RanetConfig
from pipeline.families.ranet.depth import layers
from pipeline.families.ranet.figures import figures
from pipeline.families.ranet.inference import policies
from pipeline.families.ranet.model import build
from pipeline.families.ranet.released import load_pretrained
from pipeline.family import Family

FAMILY = Family(
    config=RanetConfig,
    build=build,
    loss=loss,
    groups=groups,
    layers=layers,
    updates=updates,
    whole=whole,
    policies=policies,
    describe=describe,
    load_pretrained=load_pretrained,
    figures=figures,
    static=static,
)
