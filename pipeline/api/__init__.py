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

_MODULES = ("datasets",)  # public as a whole; they define nothing themselves
_PLACES = {  # public names: the modules that define them
    "AdaptNetError": "pipeline.errors",
    "Classification": "pipeline.api.models",
    "FrontierPoint": "pipeline.api.models",
    "Model": "pipeline.api.models",
    "evaluate": "pipeline.api.runs",
    "families": "pipeline.api.runs",
    "load": "pipeline.api.models",
    "sweep": "pipeline.api.runs",
    "train": "pipeline.api.runs",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("adaptnet")
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__dir__())}")
    from pipeline.installation import module

    return getattr(import_module(module(_PLACES[name])), name)


def __dir__() -> list[str]:
    return sorted((*_MODULES, *_PLACES, "__version__"))
