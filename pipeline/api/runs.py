"""Trainings, evaluations and sweeps from Python: what the verbs `train`, `evaluate` and `sweep` do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jobs import environment
from jobs.cli import data_home
from pipeline import config as configs
from pipeline import family, recipes, run_config
from pipeline.deploy import evaluations
from pipeline.deploy.evaluations import Evaluation
from pipeline.errors import ConfigError
from pipeline.execution import launch
from pipeline.execution.launch import Result
from tuning import config as sweep_configs
from tuning import sweep as sweeps
from tuning.outcome import Outcome

ESCAPED = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")  # YAML forbids these, or ends a line


def train(
    recipe: str | Path,
    *,
    run_dir: str | Path | None = None,
    allow_changed: Sequence[str] = (),
    notify: Callable[[str], None] | None = None,
    **overrides: object,
) -> Result:
    """Trains a recipe, or resumes the run in its folder, as `adaptnet train` does; blocks until it ends.

    recipe: "family/recipe", "family/recipe:variant" or the path of a YAML file. run_dir: the run's folder, by default
    runs/NAME. overrides: sections of the recipe as mappings, or dotted keys. allow_changed: keys that may differ from
    those of the run's checkpoints. notify is called, from other threads, with what a person must know at once. The
    result has the run's folder, its best checkpoint and the report of each policy; a file `stop` in the folder ends
    the training at its next step, and the same call resumes it. Raises ConfigError for a wrong key or value,
    ResourceError if another process trains in the folder, and what the training raises.

    >>> adaptnet.train("convnet_aig/toy", training={"epochs": 2, "batch_sizes": 8})
    Traceback (most recent call last):
    pipeline.errors.ConfigError: recipe convnet_aig/toy:
      training.batch_sizes: no such key; known: ...; did you mean training.batch_size?
    """
    environment.spare_loopback()
    layer, given = environment.recipe_layer(), as_overrides(overrides)
    config = run_config.load(str(recipe), given, data_home=data_home(), environment=layer)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / config.name
    return launch.train(config, folder, allow_changed=tuple(allow_changed), notify=notify)


def evaluate(
    source: str | Path,
    *,
    policies: Sequence[str] | None = None,
    out: str | Path | None = None,
    uri: str | None = None,
    **overrides: object,
) -> Evaluation:
    """Evaluates a trained net on the val split, as `adaptnet evaluate` does, and stores the reports.

    source: as of `load`. policies: only these. overrides: keys of the recipe, e.g. data={"root": FOLDER} for other
    images. The evaluation has a report of each policy: top-1 in 0..1, mean MACs of an image, latency here. Raises
    ConfigError if the images have other classes than the net, DataError if there are none.

    >>> evaluation = adaptnet.evaluate("runs/toy", policies=["gates-hard"])
    >>> [report.policy for report in evaluation.reports]
    ['gates-hard']
    """
    environment.spare_loopback()
    return evaluations.evaluate(
        str(source),
        as_overrides(overrides),
        data_home=data_home(),
        policies=None if policies is None else list(policies),
        out=None if out is None else Path(out),
        uri=uri or environment.tracking_uri(),
    )


def sweep(
    source: str | Path, *, run_dir: str | Path | None = None, retry_failed: bool = False, **overrides: object
) -> Outcome:
    """Trains every sample of a search space, or resumes the sweep in its folder, as `adaptnet sweep` does.

    source: the name of a shipped sweep, or the path of a YAML file. overrides: of the sweep (search={"samples": 4}) and
    of each trial's recipe (training={"epochs": 3}). The outcome names the best trial and those that no other one beats.
    Raises ConfigError for a wrong key or value, ResourceError if not one trial fits the cluster.

    >>> adaptnet.sweep("toi")
    Traceback (most recent call last):
    pipeline.errors.ConfigError: sweep toi: ...
    """
    environment.spare_loopback()
    layer, given = environment.recipe_layer(), as_overrides(overrides)
    loaded = sweep_configs.load(str(source), given, data_home=data_home(), environment=layer)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / loaded.config.name
    return sweeps.run(loaded, folder, retry_failed=retry_failed)


def families() -> dict[str, list[str]]:
    """The families of nets, each with the names of its shipped recipes.

    >>> "ranet/toy" in adaptnet.families()["ranet"]
    True
    """
    known = recipes.names()
    return {name: [each for each in known if each.startswith(f"{name}/")] for name in family.names()}


def as_overrides(values: Mapping[str, object]) -> list[str]:
    """Keyword arguments as overrides of a command: {"training": {"epochs": 3}} is ["training.epochs=3"].

    Raises ConfigError for a value that no recipe can hold.
    """
    return [f"{key}={_written(key, value)}" for key, value in configs.flat(values).items()]


def _written(key: str, value: object) -> str:
    try:
        text = json.dumps(value, default=_plain, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise ConfigError(
            f"{key} (={value!r:.60}): a recipe holds numbers, texts, paths, lists and mappings, not this {kind}",
            key=key,
            subject=repr(value)[:60],
        ) from None
    return ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError
