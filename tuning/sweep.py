"""`run(sweep, run_dir)`: trains every sample of a search space, each as a run of its own. To start is to resume from
nothing.

RUN/trials/<name>/ is the run folder of a trial, which `launch.train` starts or resumes. So a trial has workers under
Ray Train, restarts, checkpoints and a journal like any run, and a finished one is recognised by its status.json. The
sweep's own decisions are in RUN/journal/sweep.jsonl (`record`), and its process may die at any line.

Ray Tune provides distributions (`space`), ASHA and the Optuna searcher (`schedulers`). Its Tuner is not used: it puts
each trial's driver into an actor that occupies a slot beside the workers; it hears of results only through Ray Train's
reports, a barrier over all ranks that we call at checkpoints only; and after a kill it restores neither a scheduler's
rungs nor the inputs of a searcher in order. The loop in `controller` replays all decisions of Tune from the record.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.execution import launch
from pipeline.runs.lease import Lease
from tuning.config import Sweep
from tuning.controller import controller
from tuning.folder import check_place
from tuning.outcome import Outcome
from tuning.watcher import SilentWatcher, Watcher


def run(sweep: Sweep, run_dir: Path, *, retry_failed: bool = False, watcher: Watcher | None = None) -> Outcome:
    """Trains what is left of `sweep` in `run_dir`, tracks it as a parent run, and writes tables and pictures.

    A file `stop` in the folder ends it at the next checkpoint of each running trial; the same call resumes it. Raises
    ConfigError for what no trial could report or train and if the folder holds another sweep, ResourceError if another
    driver works on it or not one trial fits the cluster.
    """
    check_place(run_dir)
    new = not run_dir.exists()
    run_dir = launch.make_folder(run_dir)
    watcher = watcher or SilentWatcher()
    lease = Lease(run_dir).acquire(waiting=watcher.say)
    try:
        (run_dir / "stop").unlink(missing_ok=True)
        with controller(sweep, run_dir, lease.fence, watcher) as driver:
            return driver.run(retry_failed=retry_failed)
    finally:
        if new and not (run_dir / "config.yaml").exists():
            lease.withdraw()
        else:
            lease.release()
