"""`adaptnet submit`: runs a verb as a job."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import data_home
from pipeline.errors import ConfigError, ResourceError, without_secrets
from pipeline.installation import module

if TYPE_CHECKING:
    from jobs.schedulers.profile import SiteProfile
    from jobs.schedulers.submission import Job, Resources, Submission, WorkerNeeds
    from pipeline.execution.seeds import SeedRun
    from pipeline.run_config import ComputeConfig, RunConfig

VERBS = ("train", "sweep", "evaluate", "report")
MOST_CHARS = 120  # of a run's name
TRAIN_PRINTS = {"show": "--show", "listed": "--list", "as_json": "--json"}  # options of `train` that train nothing
OF_PROFILE = (
    "partition",
    "account",
    "qos",
    "constraint",
    "gpus_per_node",
    "cpus_per_task",
    "memory_gb",
    "max_requeues",
)

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
Option = typer.Option


@dataclass(frozen=True)
class SubmitOptions:
    """The command line of `adaptnet submit`. Options that are None leave the profile's value."""

    verb: str
    arguments: Sequence[str] | None = None
    nodes: str = "1"
    gpus_per_node: str | None = None
    cpus_per_task: int | None = None
    memory_gb: float | None = None
    time_limit: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    array: str | None = None
    dependency: str | None = None
    after: str | None = None
    name: str | None = None
    site: str | None = None
    signal_delay: int | None = None
    max_requeues: int | None = None
    where: str = "slurm"
    address: str | None = None
    dry_run: bool = False

    def profile(self) -> SiteProfile:
        """The site's profile, with this command line's options in place of its own."""
        from jobs.schedulers import profile

        options = {name: getattr(self, name) for name in OF_PROFILE}
        options |= {"time": self.time_limit, "signal_delay_s": self.signal_delay}
        given = {name: value for name, value in options.items() if value is not None}
        if self.gpus_per_node is not None and self.gpus_per_node.isdecimal():
            given["gpus_per_node"] = int(self.gpus_per_node)
        return profile.load(self.site).with_options(given)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help="train, sweep, evaluate or report")],
    arguments: Annotated[list[str] | None, typer.Argument(help="the verb's own arguments and options")] = None,
    nodes: Annotated[str, Option(help="a number, or FEWEST-MOST for a run that can continue with fewer")] = "1",
    gpus_per_node: Annotated[str | None, Option(help="a number, or TYPE:NUMBER")] = None,
    cpus_per_task: Annotated[int | None, Option(min=1, help="CPUs of each node")] = None,
    memory_gb: Annotated[float | None, Option(min=0.1, help="GB of each node")] = None,
    time_limit: Annotated[str | None, Option("--time", help="time limit: 90m, 24h, 2d, 1-12:00:00")] = None,
    partition: Annotated[str | None, Option()] = None,
    account: Annotated[str | None, Option()] = None,
    qos: Annotated[str | None, Option()] = None,
    constraint: Annotated[str | None, Option()] = None,
    array: Annotated[
        str | None, Option(help="KEY=V,V,...[%N]: a job for each value, in a run of its own; at most N at once")
    ] = None,
    dependency: Annotated[str | None, Option(help="condition in sbatch's syntax, e.g. afterok:123")] = None,
    after: Annotated[str | None, Option(help="job id or run: starts when that has ended successfully")] = None,
    name: Annotated[str | None, Option(help="name of the job; default: the run's")] = None,
    site: Annotated[str | None, Option(help="profile in infra/slurm/sites, or a path ending in .yaml")] = None,
    signal_delay: Annotated[
        int | None, Option(min=10, help="how many seconds before its end a job is warned to save")
    ] = None,
    max_requeues: Annotated[int | None, Option(min=0, help="how often a job may be started again")] = None,
    where: Annotated[str, Option(help="slurm; ray; local: a process here; debug: this process")] = "slurm",
    address: Annotated[str | None, Option(help="job server for --where ray: http://HOST:8265")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="print the script and the config; submit nothing")] = False,
) -> None:
    """Runs VERB (train, sweep, evaluate, report) with its own arguments as a job on SLURM: one task per node, and Ray
    over all nodes. Before its time ends, or when it is preempted, a training saves, is requeued and resumes in the same
    run. A site's defaults come from infra/slurm/sites/NAME.yaml (--site).

    Examples:

      adaptnet submit train baseline/imagenet_resnet50 data.root=/data/imagenet --nodes 2 --gpus-per-node 8 --time 24h

      adaptnet submit train convnet_aig/toy --nodes 1 --time 30m --dry-run

      adaptnet submit train convnet_aig/toy --seeds 3 --nodes 1 --time 30m --site example

      adaptnet submit train convnet_aig/toy --array training.epochs=5,10 --nodes 1 --time 30m --site example

      adaptnet submit evaluate runs/convnet_aig-toy --where local

      adaptnet submit train convnet_aig/toy --run-dir /shared/runs/toy --where ray --address http://10.0.0.1:8265
    """
    run(SubmitOptions(**context.params))


def run(options: SubmitOptions) -> None:
    """Submits, and prints the jobs' ids. Raises ConfigError for wrong options, ResourceError if it is refused."""
    from jobs import schedulers
    from jobs.schedulers.records import remember_home

    if options.verb not in VERBS:
        raise ConfigError(
            f"submit {options.verb}: no such verb; known: {', '.join(VERBS)}", key="verb", subject=options.verb
        )
    scheduler = schedulers.get(options.where)
    submission, configs = plan(options)
    script = scheduler.preview(submission)
    if options.dry_run:
        _show(script, configs)
        typer.echo("\n" + _summary(submission, configs))
        return
    for job in submission.jobs:
        _refuse_second(Path(job.home))
    _create_group(options, submission.jobs, configs)
    _write_recipes(submission.jobs, configs)
    for line in _summary(submission, configs).splitlines():
        if "WARNING" in line:
            typer.echo(line.removeprefix("# "), err=True)
    for record in scheduler.submit(submission):
        remember_home(Path(record.home))
        typer.echo(
            f"job {record.id}: adaptnet {record.verb} in {record.home}; adaptnet jobs show {record.id} reports on it"
        )


def plan(options: SubmitOptions) -> tuple[Submission, list[RunConfig]]:
    """What is submitted, and the config of each training. Raises ConfigError for options that do not fit together."""
    from jobs.schedulers.submission import Submission, check_time

    _check_words(options)
    profile = options.profile()
    resources = _resources(profile, options.nodes)
    check_time(resources.minutes, profile.signal_delay_s)
    make = _train if options.verb == "train" else _other
    jobs, configs = make(options, resources, profile)
    submission = Submission(
        job=_shared(jobs),
        name=options.name or Path(jobs[0].home).name,
        resources=resources,
        profile=profile,
        array=tuple(jobs) if len(jobs) > 1 else (),
        dependency=options.dependency,
        after=_id_of(options.after),
        address=options.address,
        throttle=_parsed_array(options.array)[2] if options.array else None,
    )
    return submission, configs


def _refuse_password(uri: str | None, where: str, variables: Mapping[str, str]) -> None:
    """Raises ConfigError for a password that the job would not have: it is not written into the job's recipe."""
    if uri is None or without_secrets(uri) == uri or (where != "ray" and uri == variables.get("MLFLOW_TRACKING_URI")):
        return
    raise ConfigError(
        "tracking.uri: has a password, which is not written into the files of a job. Leave it out, and let the job "
        "find it in its environment: the whole URI as MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_PASSWORD, or ~/.pgpass",
        key="tracking.uri",
    )


def _check_words(options: SubmitOptions) -> None:
    """Raises ConfigError for an option that would end its line in the batch script, or holds a password."""
    words = {f"--{name.replace('_', '-')}": value for name, value in vars(options).items() if isinstance(value, str)}
    words |= {"arguments": "".join(options.arguments or ()), "folder": str(Path.cwd())}
    for word in options.arguments or ():
        if without_secrets(word) != word:
            raise ConfigError(
                f"{word}: has a password, and the arguments of a job are written into files; put the whole URI into "
                "the environment as MLFLOW_TRACKING_URI",
                key=word.partition("=")[0],
            )
    for name, value in words.items():
        if re.search(r"[\x00-\x1f\x7f]", value):
            raise ConfigError(f"{name} (={value!r}): has a newline or another control character", key=name)


def _resources(profile: SiteProfile, nodes: str) -> Resources:
    from jobs.schedulers import gpus
    from jobs.schedulers.submission import Resources, minutes_of

    fewest, _, most = nodes.partition("-")
    if not (fewest.isdigit() and (not most or most.isdigit())) or not 1 <= int(fewest) <= int(most or fewest):
        raise ConfigError(f"--nodes (={nodes}): a number, or FEWEST-MOST, e.g. 2-8", key="--nodes", subject=nodes)
    return Resources(
        nodes=(int(fewest), int(most or fewest)),
        gpus_per_node=gpus.per_node(profile.gpus_per_node, profile.extra, (int(fewest), int(most or fewest))),
        cpus_per_task=profile.cpus_per_task,
        minutes=minutes_of(profile.time),
        memory_gb=profile.memory_gb,
    )


def _train(options: SubmitOptions, resources: Resources, profile: SiteProfile) -> tuple[list[Job], list[RunConfig]]:
    """A job for each run, whose config is resolved now and written to its folder."""
    from jobs import environment
    from pipeline import run_config
    from pipeline.execution import launch

    parsed = _parsed(options)
    _refuse_unused(parsed)
    variables = {**os.environ, **profile.environment}
    layer = environment.recipe_layer(variables)
    recipe, batch_size = str(parsed["recipe"]), parsed["batch_size"]
    overrides = [*_placement(resources), *_strings(parsed["overrides"])]
    if isinstance(batch_size, int):
        overrides = run_config.with_batch_size(recipe, overrides, batch_size)
    allowed = [word for key in _strings(parsed["allow_changed"]) for word in ("--allow-changed", key)]
    jobs, configs = [], []
    for override, suffix in _array_overrides(options.array):
        config = run_config.load(recipe, [*overrides, *override], data_home=data_home(), environment=layer)
        _refuse_password(config.tracking.uri, options.where, variables)
        _check_training(config, resources, on_slurm=options.where == "slurm")
        config = launch.absolute(config.model_copy(update={"name": _shortened(config.name + suffix)}))
        run_dir = Path("runs") / config.name
        if parsed["run_dir"]:
            given = Path(str(parsed["run_dir"]))
            run_dir = given.with_name(_shortened(given.name + suffix)) if suffix else given
        for run in _runs(config, run_dir.absolute(), options, parsed["seeds"]):
            stored = run.folder / "slurm" / "recipe.yaml"
            job = _job(options, resources, profile, home=run.folder, run_dir=run.folder, compute=run.config.compute)
            jobs.append(replace(job, arguments=(str(stored), "--run-dir", str(run.folder), *allowed)))
            configs.append(run.config)
    return jobs, configs


def _refuse_unused(parsed: Mapping[str, object]) -> None:
    """Raises ConfigError for an option of `train` that a job has no use for."""
    for name, option in TRAIN_PRINTS.items():
        if parsed[name]:
            raise ConfigError(
                f"submit train: {option} prints something and trains nothing; --dry-run shows what would be submitted",
                key=option,
            )
    if parsed["recipe"] is None:
        raise ConfigError("submit train: name a recipe; `adaptnet train --list` shows the shipped ones", key="recipe")


def _check_training(config: RunConfig, resources: Resources, *, on_slurm: bool) -> None:
    """Raises ConfigError for a training that could not start on these nodes, which its job would find out there."""
    from pipeline.tracking.address import resolve_uri

    resolve_uri(config.tracking.uri, Path("any"))
    batch, most = config.training.batch_size, config.compute.most_workers
    if batch < most:
        raise ConfigError(
            f"training.batch_size (={batch}): below the number of workers (={most}), each of which needs an image of "
            "every step; use fewer nodes, or a larger batch with its learning rate (--batch-size, training.scale_lr)",
            key="training.batch_size",
            subject=batch,
        )
    if on_slurm and config.compute.address is None:
        _check_room(config.compute, resources)


def _check_room(compute: ComputeConfig, resources: Resources) -> None:
    """Raises ConfigError if the workers do not fit on the nodes."""
    from pipeline.execution import cluster

    needs = _needs(compute, resources)
    if needs is None:
        return
    one = {"CPU": needs.cpus, "GPU": needs.gpus}
    node = {"CPU": float(resources.cpus_per_task), "GPU": float(resources.gpus_per_node)}
    each = cluster.fitting(node, one)
    pairs = {compute.fewest_workers: resources.nodes[0], compute.most_workers: resources.nodes[1]}
    for workers, nodes in pairs.items():
        if workers > each * nodes:
            what = f"{needs.cpus:g} CPUs" + (f" and {needs.gpus:g} GPUs" if needs.gpus else "")
            key = "--cpus-per-task" if node["CPU"] < needs.cpus * max(1.0, node["GPU"]) else "compute.workers"
            raise ConfigError(
                f"compute.workers (={workers}): a worker needs {what}, and a node of this job has {node['CPU']:g} CPUs "
                f"(--cpus-per-task) and {node['GPU']:g} GPUs (--gpus-per-node), so {each * nodes} workers fit on "
                f"{nodes} nodes; request more CPUs, GPUs or nodes, or set compute.workers or compute.cpus_per_worker",
                key=key,
                subject=workers,
            )


def _runs(config: RunConfig, run_dir: Path, options: SubmitOptions, seeds: object) -> list[SeedRun]:
    """The run of this config, or one run for each seed."""
    from pipeline.execution import seeds as groups

    if seeds is None:
        return [groups.SeedRun(config, run_dir)]
    if options.array is not None:
        raise ConfigError(
            f"--array (={options.array}): --seeds makes an array of its own; give one of them",
            key="--array",
            subject=options.array,
        )
    return groups.plan(config, int(str(seeds)), run_dir)


def _create_group(options: SubmitOptions, jobs: Sequence[Job], configs: Sequence[RunConfig]) -> None:
    """Makes the folder of the group of seeds, if these are its jobs."""
    from pipeline.execution import seeds

    parsed = _parsed(options) if options.verb == "train" else {"seeds": None}
    if parsed["seeds"] is not None:
        runs = [seeds.SeedRun(config, Path(job.home)) for config, job in zip(configs, jobs, strict=True)]
        seeds.create(runs, _strings(parsed["allow_changed"]))


def _other(options: SubmitOptions, resources: Resources, profile: SiteProfile) -> tuple[list[Job], list[RunConfig]]:
    """A sweep's job is in the sweep's folder and resumes there; another verb's is in a new one below runs/jobs."""
    verb, arguments = options.verb, list(options.arguments or ())
    if options.array is not None:
        raise ConfigError(
            f"--array (={options.array}): only for train; {verb} takes one set of arguments",
            key="--array",
            subject=options.array,
        )
    if verb == "sweep":
        return [_sweep(options, resources, profile)], []
    if resources.nodes[1] > 1:
        raise ConfigError(
            f"--nodes (={resources.nodes[1]}): {verb} runs on one node", key="--nodes", subject=resources.nodes[1]
        )
    _parsed(options)
    job = _job(options, resources, profile, home=_new_folder(verb, arguments), run_dir=None, compute=None)
    return [replace(job, arguments=tuple(arguments), uses_ray=False)], []


def _sweep(options: SubmitOptions, resources: Resources, profile: SiteProfile) -> Job:
    """Raises ConfigError for a sweep that could not begin."""
    from jobs import environment
    from tuning import config

    parsed = _parsed(options)
    layer = environment.recipe_layer({**os.environ, **profile.environment})
    sweep = config.load(str(parsed["source"]), _strings(parsed["overrides"]), data_home=data_home(), environment=layer)
    home = Path(str(parsed["run_dir"] or Path("runs") / sweep.config.name)).absolute()
    folder = [] if parsed["run_dir"] else ["--run-dir", str(home)]
    job = _job(options, resources, profile, home=home, run_dir=home, compute=sweep.base.compute)
    return replace(job, arguments=(*(options.arguments or ()), *folder))


def _job(
    options: SubmitOptions,
    resources: Resources,
    profile: SiteProfile,
    *,
    home: Path,
    run_dir: Path | None,
    compute: ComputeConfig | None,
) -> Job:
    from jobs.schedulers.submission import Job

    return Job(
        scheduler=options.where,
        verb=options.verb,
        arguments=(),
        home=str(home),
        run_dir=None if run_dir is None else str(run_dir),
        patience_s=profile.patience_s,
        max_requeues=profile.max_requeues,
        fewest_nodes=resources.nodes[0],
        saves_within_s=float(profile.signal_delay_s),
        needs=_needs(compute, resources) if compute else None,
    )


def _placement(resources: Resources) -> list[str]:
    """Overrides: a worker for each GPU, or one per node without GPUs; the node's CPUs are shared equally."""
    each = max(1, resources.gpus_per_node)
    fewest, most = (count * each for count in resources.nodes)
    cpus = max(1, resources.cpus_per_task // each)
    workers = f"[{fewest}, {most}]" if fewest < most else f"{most}"
    device = "cuda" if resources.gpus_per_node else "cpu"
    return [f"compute.workers={workers}", f"compute.cpus_per_worker={cpus}", f"compute.device={device}"]


def _array_overrides(array: str | None) -> list[tuple[list[str], str]]:
    """The overrides of each run, and what its name ends with: KEY=A,B gives two runs."""
    if array is None:
        return [([], "")]
    key, values, _ = _parsed_array(array)
    suffixes = [re.sub(r"[^A-Za-z0-9_.-]+", "-", f"-{key}{value}").rstrip("-") for value in values]
    return [
        ([f"{key}={value}"], suffix if suffixes.count(suffix) == 1 else f"{suffix}-{number}")
        for number, (value, suffix) in enumerate(zip(values, suffixes, strict=True))
    ]


def _parsed_array(array: str) -> tuple[str, list[str], int | None]:
    """KEY=V,V,...%N as the key, the values and how many jobs may run at once; a value may be a list or quoted.

    Raises ConfigError.
    """
    from pipeline import config as configs

    match = re.fullmatch(r"(?P<key>[^=]+)=(?P<values>.*?)(?:%(?P<most>\d+))?", array)
    try:
        values = configs.split_flow(match["values"], "--array") if match else []
    except ConfigError as error:
        raise ConfigError(str(error), key="--array", subject=array) from None
    if match is None or not values:
        raise ConfigError(
            f"--array (={array}): write KEY=VALUE,VALUE,... e.g. seed=1,2,3", key="--array", subject=array
        )
    if len(set(values)) < len(values):
        raise ConfigError(
            f"--array (={array}): a value is repeated; each value becomes a run with its own folder",
            key="--array",
            subject=array,
        )
    if match["most"] is not None and int(match["most"]) == 0:
        raise ConfigError(f"--array (={array}): %0 lets no job run", key="--array", subject=array)
    return match["key"], values, None if match["most"] is None else int(match["most"])


def _shortened(name: str) -> str:
    """`name`, or its beginning with a digest of the whole if it is longer than the name of a run may be."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= MOST_CHARS else f"{name[: MOST_CHARS - 9]}-{digest}"


def _needs(compute: ComputeConfig, resources: Resources) -> WorkerNeeds | None:
    """What the fewest workers that a run can continue with take of a Ray cluster over these nodes."""
    from jobs.schedulers.submission import WorkerNeeds
    from pipeline.execution import cluster

    if compute.fewest_workers == 0:
        return None
    gpu = compute.device == "cuda" or (compute.device == "auto" and resources.gpus_per_node > 0)
    if compute.cpus is None:
        node = {"CPU": float(resources.cpus_per_task), "GPU": float(resources.gpus_per_node)}
        share = cluster.cpu_share(compute, [node] * resources.nodes[0], gpu=gpu)
        compute = compute.model_copy(update={"cpus_per_worker": share})
    one = cluster.demand(compute, 1, gpu=gpu)
    return WorkerNeeds(compute.fewest_workers, one["CPU"], one.get("GPU", 0.0))


def _new_folder(verb: str, arguments: Sequence[str]) -> Path:
    source = next((word for word in arguments if not word.startswith("-")), "").replace("models:/", "").strip("/.")
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(source).stem) or "job"
    return (Path("runs") / "jobs" / f"{verb}-{plain}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def _parsed(options: SubmitOptions) -> dict[str, object]:
    """The parameters of the verb's own command line."""
    import importlib

    from typer.main import get_command

    command = get_command(importlib.import_module(module(f"jobs.verbs.{options.verb}")).app)
    try:
        return dict(command.make_context(f"adaptnet submit {options.verb}", list(options.arguments or ())).params)
    except Exception as error:  # typer has a copy of click, whose NoSuchOption is private
        unknown = getattr(error, "option_name", None)
        if not isinstance(unknown, str) or type(error).__name__ != "NoSuchOption":
            raise
        own = [name for each in (get_command(app), command) for param in each.params for name in param.opts]
        near = difflib.get_close_matches(unknown, [name for name in own if name.startswith("--")], 1)
        hint = f"did you mean {near[0]}?" if near else "other options of sbatch belong into the site profile's `extra`"
        raise ConfigError(
            f"submit {options.verb}: no option {unknown}; {hint} `adaptnet submit --help` and `adaptnet "
            f"{options.verb} --help` list them",
            key=unknown,
            subject=unknown,
        ) from None


def _strings(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, Sequence) else []


def _shared(jobs: Sequence[Job]) -> Job:
    """The job whose home holds the files that all of an array share."""
    if len(jobs) == 1:
        return jobs[0]
    first = Path(jobs[0].home)
    return replace(jobs[0], home=str(first.parent / "jobs" / f"{first.name}-array-{time.strftime('%Y%m%d-%H%M%S')}"))


def _id_of(after: str | None) -> str | None:
    from jobs.schedulers import records

    if after is None:
        return None
    try:
        return records.find(after).id
    except ConfigError as error:
        raise ConfigError(f"--after: {error}", key="--after", subject=after) from None


def _refuse_second(home: Path) -> None:
    """Raises ResourceError if a job of this run waits or runs."""
    from jobs import schedulers
    from jobs.schedulers import records

    for record in records.of_home(home)[-1:]:
        state = schedulers.state_of(record)
        if state.alive:
            raise ResourceError(
                f"{home}: job {record.id} of this run is {state.name.lower()}; cancel it with `adaptnet jobs cancel "
                f"{record.id}`, or give this run another name (name=NAME)",
                key="name",
                subject=home,
            )


def _write_recipes(jobs: Sequence[Job], configs: Sequence[RunConfig]) -> None:
    from pipeline.config import as_mapping, dump_yaml
    from pipeline.runs.files import write_text

    for job, config in zip(jobs, configs, strict=False):  # only trainings have a config of their own
        path = Path(job.arguments[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump_yaml(as_mapping(config)))


def _show(script: str, configs: Sequence[RunConfig]) -> None:
    from pipeline.config import as_mapping, dump_yaml

    typer.echo(script)
    for config in configs:
        typer.echo(f"# {config.name}")
        typer.echo(dump_yaml(as_mapping(config)), nl=False)


def _summary(submission: Submission, configs: Sequence[RunConfig]) -> str:
    """What a dry run would have submitted, as comment lines."""
    from jobs import tables

    first, resources = submission.jobs[0], submission.resources
    nodes = "-".join(map(str, dict.fromkeys(resources.nodes)))
    gpus = resources.gpus_per_node
    facts = {
        "jobs": f"{len(submission.jobs)}: {first.verb} in {', '.join(job.home for job in submission.jobs)}",
        "GPUs": f"{gpus} on each of {nodes} nodes"
        if gpus
        else f"none; {resources.cpus_per_task} CPUs of {nodes} nodes",
        "time limit": f"{resources.minutes:,} minutes ({resources.minutes / 60:.3g} hours)",
        **(_of_training(configs[0], gpus > 0) if configs else {}),
        "logs": str(submission.folder),
        "next": f"the same command without --dry-run, then adaptnet jobs show {first.home}",
    }
    return "\n".join(f"# {line}" for line in tables.of_pairs(facts).splitlines())


def _of_training(config: RunConfig, on_gpus: bool) -> dict[str, str]:
    from pipeline.data.sources import layout
    from pipeline.errors import DataError
    from pipeline.training.config import LR_SCALES

    training = config.training
    rate = training.optimizer.lr
    if training.scale_lr != "none" and training.reference_batch:
        rate *= LR_SCALES[training.scale_lr](training.batch_size / training.reference_batch)
    batch, workers = config.training.batch_size, config.compute.most_workers
    what = "images a GPU" if on_gpus else "images a worker"
    over = f"over {workers} workers" if workers else "in the job's own process"
    shares = f"{batch / max(1, workers):g} of a step of {batch:,}, {over}"
    try:
        layout(config.data.root)
        data = f"{config.data.root}, which is here"
    except DataError as error:
        data = f"WARNING: not readable on this machine; the job needs it on its nodes: {error}"
    return {what: shares, "learning rate": f"{rate:g}", "data": data}
