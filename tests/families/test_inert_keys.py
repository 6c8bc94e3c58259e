"""Keys of families that another key makes inert: refused if given, dropped from what older versions stored."""

from __future__ import annotations

from typing import Any

import pytest
from raised import fails

from pipeline import config as configs
from pipeline import family as families
from pipeline.errors import ConfigError

OWN_LADDER = {"ladder_px": [32, 16], "widths": [6, 8], "inner": ["F2x1"], "final": "M2x1"}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # family, live keys, inert keys
    ("arrn", OWN_LADDER, {"size": "T"}),
    ("arrn", {"finest_px": 4}, {"residual_gain": 0.2, "drop": 0.0, "level_weights": [1]}),
    ("baseline", {"net": "resnet50"}, {"depth": 20, "stochastic_depth": 0.5}),
    ("baseline", {"net": "cifar_resnet"}, {"stem": "imagenet"}),
    ("baseline", {"net": "vgg16"}, {"batchnorm_momentum": 0.1}),
    ("convnet_aig", {"rate_weight": 0}, {"rate_reduction": "sum"}),
    (
        "convnet_aig",
        {"target_rate": 1},
        {"rate_weight": 1.0, "rate_reduction": "sum", "gate_batchnorm": False, "gate_lr_factor": 2.0},
    ),
    ("convnet_aig", {"depth": 20, "target_rate": [1, 1, 1]}, {"rate_weight": 1.0}),
    ("ranet", {"scales": [1], "width_factors": [1]}, {"more_blocks": 1, "from_below": 0.5, "reduction": 0.25}),
    ("shape_adaptor", {"net": "vgg16"}, {"doubled": False, "keep_residual": True}),
    ("shape_adaptor", {"factors": [0.7] * 6}, {"target_px": 4}),
    ("shape_adaptor", {"mode": "autosc"}, {"target_px": 8, "pool": "floor"}),
    ("shape_adaptor", {"mode": "autotl", "side_px": 32}, {"target_px": 8, "adaptors": 4, "pool": "floor"}),
    (
        "shape_adaptor",
        {"mode": "human", "net": "mobilenet_v2"},
        {"factors": [], "rule": "local", "limit_px": 8, "alpha_every": 3, "keep_residual": True, "pool": "ceil"},
    ),
]


@pytest.mark.parametrize(("name", "live", "inert"), CASES)
def test_an_inert_key_is_refused(name: str, live: dict[str, Any], inert: dict[str, Any]) -> None:
    family = families.find(name).config
    configs.validate(family, {"name": name, **live}, "family")
    for key, value in inert.items():
        with fails(ConfigError, key):
            configs.validate(family, {"name": name, **live, key: value}, "family")


@pytest.mark.parametrize(("name", "live", "inert"), CASES)
def test_an_inert_key_is_dropped_from_a_stored_section(name: str, live: dict[str, Any], inert: dict[str, Any]) -> None:
    family = families.find(name).config
    stored = configs.validate_stored(family, {"name": name, **live, **inert}, "family")
    assert stored == configs.validate(family, {"name": name, **live}, "family")
    assert not set(inert) & set(configs.as_mapping(stored))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("arrn", {"finest_px": 8, "residual_gain": 0.2, "drop": 0.1}),
        ("baseline", {"net": "cifar_preresnet", "depth": 20, "stochastic_depth": 0.5}),
        ("convnet_aig", {"depth": 50, "schedule": "published", "target_rate": 1, "rate_weight": 1.0}),
        ("ranet", {"scales": [1, 2], "width_factors": [2, 1], "more_blocks": 1, "reduction": 0.25}),
        ("shape_adaptor", {"mode": "autotl", "pool": "ceil", "rule": "global", "doubled": False}),
        ("shape_adaptor", {"mode": "human", "net": "vgg16", "pool": "ceil", "max_gmacs": 20.0}),
    ],
)
def test_a_key_that_has_an_effect_is_accepted(name: str, keys: dict[str, Any]) -> None:
    configs.validate(families.find(name).config, {"name": name, **keys}, "family")
