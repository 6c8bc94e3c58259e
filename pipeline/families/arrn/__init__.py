"""ARRN: adaptive-resolution residual networks, whose first residuals low-resolution images skip (arXiv 2412.06195)."""

from __future__ import annotations

from pipeline.families.arrn.config import ArrnConfig
from pipeline.families.arrn.figures import figures
from pipeline.families.arrn.growing import load_pretrained
from pipeline.families.arrn.inference import describe, policies
from pipeline.families.arrn.model import build
from pipeline.families.arrn.objective import groups, loss, updates, varying, warnings, whole
from pipeline.families.arrn.static import static
from pipeline.family import Family

FAMILY = Family(
    config=ArrnConfig,
    build=build,
    loss=loss,
    groups=groups,
    updates=updates,
    varying=varying,
    whole=whole,
    policies=policies,
    describe=describe,
    load_pretrained=load_pretrained,
    warnings=warnings,
    figures=figures,
    static=static,
)
