"""What DALI reports only in its messages: which of its errors are about the data that an operator was given.

DALI raises RuntimeError for everything. Its message names the operator, and after "encountered:" what went wrong. The
methods that are checked here are public; the order in which `Decoder` calls them is that of DALI's own iterators.
"""

from __future__ import annotations

import re

import nvidia.dali as dali

from pipeline.compat import require

require(
    "nvidia-dali-cuda130",
    dali,
    (
        "fn.decoders.image_slice",
        "Pipeline.feed_input",
        "Pipeline.schedule_run",
        "Pipeline.share_outputs",
        "Pipeline.release_outputs",
    ),
    tried="2.4",
)
_OPERATOR = re.compile(r"Error in \w+ operator `")
_UNSPECIFIC = "Failed to decode sample"  # no reason


def operator_failure(error: RuntimeError) -> str | None:
    """What an operator reports of its data, "" if nothing in particular; None if the error is of another origin."""
    message = str(error)
    if not _OPERATOR.search(message):
        return None
    lines = message.rpartition("encountered:")[2].strip().splitlines()
    return lines[0] if lines and not lines[0].startswith(_UNSPECIFIC) else ""
