"""Sends a run's record (journals, recipe, origin, checkpoints, plots) from its folder to MLflow and other trackers.

What is sent is a function of the run folder alone, and every call to a tracker may be repeated. So the driver may be
killed at any time, and a server may be unreachable for as long as it likes: what is missing is sent later, by the next
driver or by `sync`.

`tracker.py` says what a tracker is; `mlflow.py` and `tensorboard.py` are the two that exist. `replay.py` feeds them
from the journals, `uploader.py` decides when.
"""

from pipeline.tracking.address import RegisteredName, TrackingConfig, resolve_uri, unusable
from pipeline.tracking.client import connect
from pipeline.tracking.folders import send_folder
from pipeline.tracking.summary import RunSummary, summaries
from pipeline.tracking.uploader import Sync, Uploader, recipe_of, send_once, sync, tracking_config

__all__ = [
    "RegisteredName",
    "RunSummary",
    "Sync",
    "TrackingConfig",
    "Uploader",
    "connect",
    "recipe_of",
    "resolve_uri",
    "send_folder",
    "send_once",
    "summaries",
    "sync",
    "tracking_config",
    "unusable",
]
