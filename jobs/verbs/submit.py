"""`adaptnet submit`: runs a verb as a job."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli import data_home
from jobs.slurm import site as sites
from pipeline.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from jobs.slurm.job import Job, Needs, Resources, Submission
    from pipeline.run_config import ComputeConfig, RunConfig
    from tuning.config import Sweep

VERBS = ("train", "sweep", "evaluate", "report")

EXAMPLES = """Runs VERB (train, sweep, evaluate, report) with its own arguments as a job on SLURM: one task a node, Ray
over all of them. Before its time is over, or where it is preempted, a training saves, is requeued and goes on in the
same run. A site's particulars come from infra/slurm/sites/NAME.yaml (--site).

Examples:

  adaptnet submit train baseline/imagenet_resnet50 data.root=/data/imagenet --nodes 2 --gpus-per-node 8 --time 24h

  adaptnet submit train convnet_aig/toy --nodes 1 --time 30m --dry-run

  adaptnet submit train convnet_aig/toy --array seed=1,2,3 --nodes 1 --time 30m --site example

  adaptnet submit evaluate runs/convnet_aig-toy --where local

  adaptnet submit train convnet_aig/toy --run-dir /shared/runs/toy --where ray --address http://10.0.0.1:8265
"""

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
Option = typer.Option


@app.command(help=EXAMPLES, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
def submit(
    verb: Annotated[str, typer.Argument(help="train, sweep, evaluate or report")],
    arguments: Annotated[list[str] | None, typer.Argument(help="the verb's own arguments and options")] = None,
    nodes: Annotated[str, Option(help="how many, or FEWEST-MOST for a run that goes on with fewer")] = "1",
    gpus_per_node: Annotated[int | None, Option(min=0)] = None,
    cpus_per_task: Annotated[int | None, Option(min=1, help="CPUs of each node")] = None,
    memory_gb: Annotated[float | None, Option(min=0.1, help="GB of each node")] = None,
    time_limit: Annotated[str | None, Option("--time", help="90m, 24h, 2d, 1-12:00:00")] = None,
    partition: Annotated[str | None, Option()] = None,
    account: Annotated[str | None, Option()] = None,
    qos: Annotated[str | None, Option()] = None,
    constraint: Annotated[str | None, Option()] = None,
    array: Annotated[str | None, Option(help="KEY=V,V,... : one job for each value, in a run of its own")] = None,
    dependency: Annotated[str | None, Option(help="as sbatch takes it, e.g. afterok:123")] = None,
    after: Annotated[str | None, Option(help="job id or run: starts when that has ended well")] = None,
    name: Annotated[str | None, Option(help="of the job; default: the run's")] = None,
    site: Annotated[str | None, Option(help="profile in infra/slurm/sites, or a path ending in .yaml")] = None,
    signal_delay: Annotated[
        int | None, Option(min=10, help="seconds before its end that a job is told to save")
    ] = None,
    max_requeues: Annotated[int | None, Option(min=0, help="how often a job may be started again")] = None,
    where: Annotated[str, Option(help="slurm; ray; local: a process here; debug: this process")] = "slurm",
    address: Annotated[str | None, Option(help="of --where ray: http://HOST:8265, a head's dashboard")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="print the batch script and the config; submit nothing")] = False,
) -> None:
    if verb not in VERBS:
        raise ConfigError(f"submit {verb}: no such verb; known: {', '.join(VERBS)}")
    if where not in ("slurm", "ray", "local", "debug"):
        raise ConfigError(f"--where (={where}): slurm, ray, local or debug")
    if (where == "ray") != (address is not None):
        raise ConfigError(f"--address (={address}) is for --where ray, which needs it: http://HOST:8265")
    from jobs.ray import jobs as ray_jobs
    from jobs.slurm import job as slurm
    from jobs.slurm import queue
    from pipeline.config import as_mapping, dump_yaml
    from pipeline.runs.files import write_text

    given: dict[str, Any] = {
        "partition": partition,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "time": time_limit,
        "gpus_per_node": gpus_per_node,
        "cpus_per_task": cpus_per_task,
        "memory_gb": memory_gb,
        "signal_delay_s": signal_delay,
        "max_requeues": max_requeues,
    }
    profile = sites.load(site).model_copy(update={key: value for key, value in given.items() if value is not None})
    resources = _resources(profile, nodes)
    slurm.check_time(resources.minutes, profile.signal_delay_s)
    if after is not None and where != "slurm":
        raise ConfigError(f"--after (={after}): only SLURM waits for another job; leave it out with --where {where}")
    made = _train if verb == "train" else _other
    jobs, configs = made(verb, arguments or [], array, resources, profile)
    submission = slurm.Submission(
        job=_shared(jobs),
        name=name or Path(jobs[0].home).name,
        resources=resources,
        site=profile,
        array=tuple(jobs) if len(jobs) > 1 else (),
        dependency=_dependency(dependency, after),
    )
    if dry_run:
        _show(submission, configs, where)
        return
    for job in jobs:
        _refuse_second(Path(job.home))
    for job, config in zip(jobs, configs, strict=False):
        path = Path(job.arguments[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump_yaml(as_mapping(config)))
    on_ray = where == "ray"
    ids = ray_jobs.submit(submission, address) if on_ray else slurm.submit(submission, where)  # type: ignore[arg-type]
    for job, made_id in zip(jobs, ids, strict=True):
        queue.know(Path(job.home))
        typer.echo(f"job {made_id}: adaptnet {job.verb} in {job.home}; adaptnet jobs show {made_id} says how it goes")


def _resources(profile: sites.Site, nodes: str) -> Resources:
    from jobs.slurm.job import Resources, minutes_of

    fewest, _, most = nodes.partition("-")
    if not (fewest.isdigit() and (not most or most.isdigit())) or not 1 <= int(fewest) <= int(most or fewest):
        raise ConfigError(f"--nodes (={nodes}): a number, or FEWEST-MOST, e.g. 2-8")
    return Resources(
        nodes=(int(fewest), int(most or fewest)),
        gpus_per_node=profile.gpus_per_node,
        cpus_per_task=profile.cpus_per_task,
        minutes=minutes_of(profile.time),
        memory_gb=profile.memory_gb,
    )


def _train(
    verb: str, words: Sequence[str], array: str | None, resources: Resources, profile: sites.Site
) -> tuple[list[Job], list[RunConfig]]:
    """A job for each run: its config is settled now and lies in its folder."""
    from jobs.slurm.job import Job
    from pipeline import run_config
    from pipeline.execution import launch

    asked = _parsed(verb, words)
    overrides = [*_placement(resources), *(asked["overrides"] or ())]
    jobs, configs = [], []
    for override in _values(array):
        config = run_config.load(asked["recipe"], [*overrides, *override], data_home=data_home())
        suffix = "".join(f"-{each.replace('=', '').replace('/', '-')}" for each in override)
        config = launch.absolute(config.model_copy(update={"name": f"{config.name}{suffix}"}))
        run_dir = Path(f"{asked['run_dir']}{suffix}" if asked["run_dir"] else Path("runs") / config.name).absolute()
        recipe = run_dir / "slurm" / "recipe.yaml"
        allowed = [word for key in asked["allow_changed"] or () for word in ("--allow-changed", key)]
        job = Job(
            verb=verb,
            arguments=(str(recipe), "--run-dir", str(run_dir), *allowed),
            home=str(run_dir),
            run_dir=str(run_dir),
            patience_s=profile.patience_s,
            max_requeues=profile.max_requeues,
            fewest_nodes=resources.nodes[0],
            saves_within_s=float(profile.signal_delay_s),
            needs=_needs(config.compute, resources),
        )
        jobs.append(job)
        configs.append(config)
    return jobs, configs


def _placement(resources: Resources) -> list[str]:
    """A worker for each GPU, or one a node without; its node's CPUs in equal parts."""
    each = max(1, resources.gpus_per_node)
    fewest, most = (count * each for count in resources.nodes)
    cpus = max(1, resources.cpus_per_task // each)
    workers = f"[{fewest}, {most}]" if fewest < most else f"{most}"
    device = "cuda" if resources.gpus_per_node else "cpu"
    return [f"compute.workers={workers}", f"compute.cpus_per_worker={cpus}", f"compute.device={device}"]


def _values(array: str | None) -> list[list[str]]:
    """The overrides of each run: KEY=A,B gives two."""
    if array is None:
        return [[]]
    key, equals, values = array.partition("=")
    found = [value for value in values.split(",") if value]
    if not equals or not key or not found:
        raise ConfigError(f"--array (={array}): write KEY=VALUE,VALUE,... e.g. seed=1,2,3")
    if len(set(found)) < len(found):
        raise ConfigError(f"--array (={array}): each value once; each is a run with a folder of its own")
    return [[f"{key}={value}"] for value in found]


def _other(
    verb: str, words: Sequence[str], array: str | None, resources: Resources, profile: sites.Site
) -> tuple[list[Job], list[RunConfig]]:
    """A sweep's job lies in the sweep's folder and goes on there; another's in one of its own below runs/jobs."""
    from jobs.slurm.job import Job

    if array is not None:
        raise ConfigError(f"--array (={array}) is for train; {verb} takes one set of arguments")
    if verb != "sweep" and resources.nodes[1] > 1:
        raise ConfigError(f"--nodes (={resources.nodes[1]}): {verb} runs on one node")
    asked = _parsed(verb, words)
    sweep = _sweep(asked) if verb == "sweep" else None
    home = _sweep_folder(asked, sweep) if sweep else _folder_for(verb, words)
    given = ["--run-dir", str(home)] if verb == "sweep" and not asked["run_dir"] else []
    job = Job(
        verb=verb,
        arguments=(*words, *given),
        home=str(home),
        run_dir=str(home) if verb == "sweep" else None,
        patience_s=profile.patience_s,
        max_requeues=profile.max_requeues,
        fewest_nodes=resources.nodes[0],
        uses_ray=verb == "sweep",
        saves_within_s=float(profile.signal_delay_s),
        needs=_needs(sweep.base.compute, resources) if sweep else None,
    )
    return [job], []


def _needs(compute: ComputeConfig, resources: Resources) -> Needs | None:
    """What the fewest workers that a run goes on with take of a Ray cluster over these nodes."""
    from jobs.slurm.job import Needs
    from pipeline.execution import cluster

    if compute.fewest_workers == 0:
        return None
    gpu = compute.device == "cuda" or (compute.device == "auto" and resources.gpus_per_node > 0)
    one = cluster.demand(compute, 1, gpu=gpu)
    return Needs(compute.fewest_workers, one["CPU"], one.get("GPU", 0.0))


def _sweep(asked: Mapping[str, Any]) -> Sweep:
    """Raises ConfigError for one that could not begin."""
    from tuning import config

    return config.load(asked["source"], asked["overrides"] or (), data_home=data_home())


def _sweep_folder(asked: Mapping[str, Any], sweep: Sweep) -> Path:
    return Path(asked["run_dir"] or Path("runs") / sweep.config.name).absolute()


def _folder_for(verb: str, words: Sequence[str]) -> Path:
    source = next((word for word in words if not word.startswith("-")), "").replace("models:/", "").strip("/.")
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(source).stem) or "job"
    return (Path("runs") / "jobs" / f"{verb}-{plain}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def _parsed(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """What the verb's own command line says."""
    import importlib

    from typer.main import get_command

    command = get_command(importlib.import_module(f"jobs.verbs.{verb}").app)
    return dict(command.make_context(verb, list(words)).params)


def _shared(jobs: Sequence[Job]) -> Job:
    """The job whose folder holds what all of an array share."""
    if len(jobs) == 1:
        return jobs[0]
    first = Path(jobs[0].home)
    return replace(jobs[0], home=str(first.parent / "jobs" / f"{first.name}-array-{time.strftime('%Y%m%d-%H%M%S')}"))


def _dependency(dependency: str | None, after: str | None) -> str | None:
    if after is None:
        return dependency
    from jobs.slurm import queue

    found = f"afterok:{queue.find(after)['id']}"
    return f"{dependency},{found}" if dependency else found


def _refuse_second(home: Path) -> None:
    """Raises ResourceError where a job of this run still lives."""
    from jobs.slurm import job as slurm
    from jobs.slurm import queue

    for entry in slurm.recorded(home)[-1:]:
        state = queue.state_of(entry)
        if state.lives:
            raise ResourceError(
                f"{home}: job {entry['id']} of this run is {state.name.lower()}; cancel it with `adaptnet jobs cancel "
                f"{entry['id']}`, or give this run another name (name=NAME)"
            )


def _show(submission: Submission, configs: Sequence[RunConfig], where: str) -> None:
    from jobs.ray import jobs as ray_jobs
    from pipeline import config

    jobs = submission.array or (submission.job,)
    typer.echo("\n".join(ray_jobs.entrypoint(job, "ID") for job in jobs) if where == "ray" else submission.script())
    for each in configs:
        typer.echo(f"# {each.name}")
        typer.echo(config.dump_yaml(config.as_mapping(each)), nl=False)
