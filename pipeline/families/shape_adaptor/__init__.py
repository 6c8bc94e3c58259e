"""Shape Adaptor: networks that learn where and by how much to shrink their feature maps (arXiv 2008.00892)."""

from __future__ import annotations

from pipeline.families.shape_adaptor.figures import figures
from pipeline.families.shape_adaptor.inference import describe, policies
from pipeline.families.shape_adaptor.model import ShapeConfig, build
from pipeline.families.shape_adaptor.objective import groups, loss, optimizers, updates, varying
from pipeline.families.shape_adaptor.static import static
from pipeline.families.shape_adaptor.weights import load_pretrained
from pipeline.family import Family

FAMILY = Family(
    config=ShapeConfig,
    build=build,
    loss=loss,
    groups=groups,
    updates=updates,
    varying=varying,
    optimizers=optimizers,
    policies=policies,
    describe=describe,
    load_pretrained=load_pretrained,
    figures=figures,
    static=static,
)
