"""How fast the nets of a report were trained: medians of the log points of their training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from pipeline.family import Evaluated
from pipeline.figures import Number, Table

# columns: the metric and what its value is divided by; time waited for data is shown beside the rates
COLUMNS: Mapping[str, tuple[str, float]] = {
    "images/s": ("time/images_per_s", 1.0),
    "GMAC/s": ("time/macs_per_s", 1e9),
    "% of the device's peak": ("time/macs_share_of_peak", 0.01),
    "% waiting for data": ("time/data_share", 0.01),
    "GB of memory": ("memory/peak_bytes", 1e9),
}
CAPTION = (
    "Medians of the log points of a training, over all its workers. A step counts as three forward passes of its "
    "images. The peak is that of matrix products on the same device, measured when the training began. Memory is the "
    "most that one worker had: tensors on a GPU, the whole process on a CPU."
)


def speeds(nets: Sequence[Evaluated]) -> list[Table]:
    """A table of the nets whose training logged its speed; of several seeds, the first. Empty if none did."""
    rows = [(net.name, _row(net.seeds[0] if net.seeds else net)) for net in nets]
    known = [[name, *row] for name, row in rows if row[0] is not None]
    return [Table("training-speed", "Speed of training", CAPTION, ["net", *COLUMNS], known)] if known else []


def _row(net: Evaluated) -> list[Number]:
    curves = net.curves()
    found = {key: [value for _, value in curves.get(key, ())] for key, _ in COLUMNS.values()}
    return [median(found[key]) / unit if found[key] else None for key, unit in COLUMNS.values()]
