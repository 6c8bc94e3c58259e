"""The zoo: trained nets that are shipped with the code. `zoo:NAME` names one wherever a trained net is named.

A net of the zoo is a folder `nets/NAME` in the layout of `adaptnet models pull`: weights, recipe, card and reports. So
whatever loads a pulled folder loads a net of the zoo.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from pipeline.errors import ConfigError

SCHEME = "zoo:"
NETS = Path(__file__).parent / "nets"
CARD = "card.json"  # a folder with this file is a net


def names(nets: Path | None = None) -> list[str]:
    """The names of the nets in the folder `nets`, by default those that are shipped; none if it does not exist."""
    return sorted(path.parent.name for path in (nets or NETS).glob(f"*/{CARD}"))


def folder(name: str, nets: Path | None = None) -> Path:
    """The folder of a net; `zoo:NAME` is as good as NAME. Raises ConfigError naming the nets that exist."""
    plain, known = name.removeprefix(SCHEME), names(nets)
    if plain not in known:
        close = get_close_matches(plain, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"zoo:{plain}: no such net; the zoo has: {', '.join(known) or 'none yet'}{hint}",
            key="source",
            subject=f"{SCHEME}{plain}",
        )
    return (nets or NETS) / plain
