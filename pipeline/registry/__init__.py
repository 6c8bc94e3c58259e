"""The registry: trained nets as folders that work without MLflow, and as versions that people look up by name.

A model's folder holds net.safetensors (the moving average of the weights if training kept one), recipe.yaml (the whole
RunConfig), card.json (what the net is, with the checksum of its weights and the figures of each policy) and
reports/reports.json. A version is that folder inside an MLflow model made from code: nothing is pickled, and the code
that runs the net is stored with it.

This package imports nothing: looking up a version needs neither torch nor MLflow's client.
"""

from importlib import import_module

# The code inside versions published up to commit bc067e3 reads these names from this package. It finds this package,
# and not its own copy, where a process that has imported it loads such a version.
PUBLISHED_CODE_USES = {
    "ANSWER_KEYS": "requests",
    "Answers": "model",
    "load_model": "model",
    "named": "requests",
    "predict": "model",
}


def __getattr__(name: str) -> object:
    if name not in PUBLISHED_CODE_USES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLISHED_CODE_USES[name]}"), name)
