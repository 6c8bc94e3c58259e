"""ConvNet-AIG: residual networks in which a learned gate decides per image whether a block runs (arXiv 1711.11503)."""

from __future__ import annotations

from pipeline.families.convnet_aig.figures import figures
from pipeline.families.convnet_aig.inference import describe, policies
from pipeline.families.convnet_aig.model import AigConfig, build
from pipeline.families.convnet_aig.objective import groups, loss, mean_over_images, updates, whole
from pipeline.families.convnet_aig.released import load_pretrained
from pipeline.families.convnet_aig.static import static
from pipeline.family import Family

FAMILY = Family(
    config=AigConfig,
    build=build,
    loss=loss,
    mean_over_images=mean_over_images,
    groups=groups,
    updates=updates,
    whole=whole,
    policies=policies,
    describe=describe,
    load_pretrained=load_pretrained,
    figures=figures,
    static=static,
    summary_facts=("layers",),
)
