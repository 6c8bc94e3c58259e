"""AdaptNet from Python: load a trained net, classify images within a budget, train, evaluate and search recipes.

>>> import adaptnet
>>> model = adaptnet.load("runs/toy")
>>> answer = model.predict("picture.jpg", budget="100%")
>>> answer.label in model.classes and answer.macs > 0
True

Nothing is imported before it is used, so `import adaptnet` takes no time. Everything raises `AdaptNetError` for what
the caller must change; its `key` names what, its `subject` the value. In a checkout this package is `pipeline/api`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.api import datasets as datasets
    from pipeline.api.models import Classification as Classification
    from pipeline.api.models import FrontierPoint as FrontierPoint
    from pipeline.api.models import Model as Model
    from pipeline.api.models import load as load
    from pipeline.api.runs import evaluate as evaluate
    from pipeline.api.runs import families as families
    from pipeline.api.runs import sweep as sweep
    from pipeline.api.runs import train as train
    from pipeline.errors import AdaptNetError as AdaptNetError

    __version__: str

_PLACES = {  # public names: the modules that define them; a module is public as a whole where both are equal
    "AdaptNetError": "pipeline.errors",
    "Classification": "pipeline.api.models",
    "FrontierPoint": "pipeline.api.models",
    "Model": "pipeline.api.models",
    "datasets": "pipeline.api.datasets",
    "evaluate": "pipeline.api.runs",
    "families": "pipeline.api.runs",
    "load": "pipeline.api.models",
    "sweep": "pipeline.api.runs",
    "train": "pipeline.api.runs",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("adaptnet")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(sorted(_PLACES))}")
    from pipeline.installation import module

    found = import_module(module(_PLACES[name]))
    return found if _PLACES[name].endswith(f".{name}") else getattr(found, name)


def __dir__() -> list[str]:
    return sorted((*_PLACES, "__version__"))
