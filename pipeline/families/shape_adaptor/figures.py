"""Shape Adaptor's own figures: the learned shape, how it changed over training, and its costs.

Layers are numbered from 0 as in `model.places`. Letters: N adaptors.
Source: Liu et al., ECCV 2020 (arXiv 2008.00892).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.families.shape_adaptor.body_costs import BodyCosts
from pipeline.families.shape_adaptor.model import ShapeConfig, layout_of
from pipeline.families.shape_adaptor.shape import Size
from pipeline.family import Evaluated
from pipeline.figures import Cell, Figure, Lines, Series, Table, for_each, numbered, over_training

LAYERS = {"vgg16": "convolution", "vgg16_bn": "convolution", "resnet50": "stem and blocks", "mobilenet_v2": "layer"}


def figures(mine: Sequence[Evaluated], others: Sequence[Evaluated]) -> list[Figure]:
    compared = _against_human(mine)
    return ([compared] if compared else []) + for_each(mine, _own)


def _own(net: Evaluated) -> Iterable[Figure | None]:
    yield _sides(net)
    yield _over_training(
        net,
        "alpha",
        "Alphas over training",
        "An adaptor's alpha: above 0 it shrinks the maps by less than a quarter, below by more, as long as no limit "
        "acts",
        "alpha",
    )
    yield _over_training(
        net,
        "side_px",
        "Sides over training",
        "The longer side in pixels that each adaptor gives",
        "side in pixels",
    )


def _config(net: Evaluated) -> ShapeConfig:
    assert isinstance(net.config, ShapeConfig)
    return net.config


def _human(config: ShapeConfig) -> ShapeConfig:
    """The same net in its human-designed shape."""
    changes = {"mode": "human", "adaptors": None, "rule": None, "pool": None, "keep_residual": False}
    return config.model_copy(update=changes)


def _learned(net: Evaluated) -> tuple[Size, ...] | None:
    """The sizes after the adaptors for the evaluated images, which are square: () for a human net, None if unknown."""
    if _config(net).mode == "human":
        return ()
    found = net.reports[0].facts.get("side_px")
    return tuple((round(side), round(side)) for side in found) if found else None


def _costs(net: Evaluated, config: ShapeConfig) -> BodyCosts:
    return BodyCosts(layout_of(config), len(net.classes))


# ---- one net


def _sides(net: Evaluated) -> Lines | None:
    config, sizes = _config(net), _learned(net)
    if not sizes:
        return None
    image = (net.side_px, net.side_px)
    shapes = {
        "learned": _costs(net, config).sides(image, sizes),
        "human design": _costs(net, _human(config)).sides(image, ()),
    }
    carry = ", ".join(str(place) for place in layout_of(config).places)
    return Lines(
        name="shape-adaptor-sides",
        title="Learned sides against the human design",
        caption=f"Side of the maps that each layer of {config.net} reads: as learned, with adaptors at layers {carry}, "
        f"and in the human design. The same for all {net.reports[0].num_images:,} images, of {net.side_px} px.",
        x_label=LAYERS[config.net],
        y_label="side in pixels",
        series=[
            Series(name, [float(number) for number in range(len(sides))], [float(side) for side in sides])
            for name, sides in shapes.items()
        ],
    )


def _over_training(net: Evaluated, key: str, title: str, what: str, y_label: str) -> Lines | None:
    curves = net.curves()
    keys = {found: f"adaptor {number}" for number, found in numbered(curves, f"train/{key}/").items()}
    picture = Lines(
        name=f"shape-adaptor-{key.replace('_', '-')}-over-training",
        title=title,
        caption=f"{what}; each point is a mean since the log's point before.",
        x_label="",
        y_label=y_label,
        series=(),
    )
    return over_training(picture, curves, keys)


# ---- several nets


def _against_human(mine: Sequence[Evaluated]) -> Table | None:
    """The given nets, each learned one followed by its human design unless that is among them."""
    rows: list[list[Cell]] = []
    given = {layout_of(_config(net)) for net in mine if _config(net).mode == "human"}
    for net in mine:
        sizes, human = _learned(net), _human(_config(net))
        if sizes is None:
            continue
        rows.append([net.name, _config(net).mode, *_cost_cells(net, _config(net), sizes), net.reports[0].top1])
        if layout_of(human) not in given:
            given.add(layout_of(human))
            rows.append([f"{net.name} as designed", "human", *_cost_cells(net, human, ()), None])
    if len(rows) < 2:
        return None
    return Table(
        name="shape-adaptor-against-human",
        title="Learned shapes against the human design",
        caption=f"Costs of each shape for an image of {mine[0].side_px} px, and its top-1 on "
        f"{mine[0].reports[0].num_images:,} images; empty for a human design that is not among the nets, of which only "
        "the costs are known. Activations are the output values of convolutions and adaptors, to which the memory of "
        "training is proportional.",
        columns=["net", "shape", "parameters", "million MACs", "million activations", "last side in pixels", "top-1"],
        rows=rows,
    )


def _cost_cells(net: Evaluated, config: ShapeConfig, sizes: tuple[Size, ...]) -> list[Cell]:
    """Parameters, million MACs, million activations and the last side, for an image of the evaluated size."""
    costs, image = _costs(net, config), (net.side_px, net.side_px)
    return [
        costs.parameters + len(sizes),
        costs.macs(image, sizes) / 1e6,
        costs.values(image, sizes) / 1e6,
        costs.sides(image, sizes)[-1],
    ]
