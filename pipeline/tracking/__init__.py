"""Carries a run's journals, recipe, origin, checkpoints and plots from its folder to MLflow.

What is sent is a function of the run folder alone, and every call to MLflow may be repeated: metrics send the
journal's time and MLflow's key (key, time, step, run, value) refuses doubles, files are overwritten by equal ones, the
run is found again by a tag that was on disk before it was made. So the driver may die anywhere, and the server may be
away for as long as it likes: what is missing goes later, by the next driver or by `sync`.
"""

from pipeline.tracking.address import RegisteredName, TrackingConfig, connect, resolve_uri, unusable
from pipeline.tracking.folders import send_folder
from pipeline.tracking.summary import RunSummary, summaries
from pipeline.tracking.uploader import Sync, Uploader, recipe_of, sync

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
    "summaries",
    "sync",
    "unusable",
]
