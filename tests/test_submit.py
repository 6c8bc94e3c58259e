"""Submitting: the script is what the site's profile says, and what cannot work is refused before it is queued."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_schedulers
import pytest
from raised import fails

from jobs import schedulers
from jobs.cli import main
from jobs.schedulers import gpus, profile, records, snapshot
from jobs.schedulers.profile import SiteProfile
from jobs.schedulers.submission import Job, Resources, Submission, WorkerNeeds, check_time, minutes_of
from jobs.slurm import script as scripts
from jobs.slurm.scheduler import refused
from jobs.verbs.submit import SubmitOptions, plan
from jobs.verbs.submit import run as submit
from pipeline import config as configs
from pipeline import run_config
from pipeline.config import as_mapping
from pipeline.errors import AdaptNetError, ConfigError, ResourceError
from pipeline.execution import seeds
from pipeline.runs import provenance, seed_runs
from tests import images

GOLDEN = Path(__file__).parent / "golden"
IMAGENET = ("baseline/imagenet_resnet50", "data.root=/data/imagenet")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)


def error_of(*arguments: object) -> AdaptNetError:
    """The error that ends a command."""
    from jobs import cli

    with pytest.raises(AdaptNetError) as caught:
        cli.app(args=[str(each) for each in arguments], standalone_mode=False)
    return caught.value


@pytest.fixture(autouse=True)
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without SLURM; the folder takes fake commands."""
    monkeypatch.chdir(tmp_path)
    return fake_schedulers.hide_slurm(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", sorted(path.stem for path in profile.SITES.glob("*.yaml")))
def test_the_batch_script_of_each_profile_is_the_golden_one(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To accept a change: write the printed text over the golden file."""
    assert run("submit", "train", *IMAGENET, "--site", name, "--nodes", "2", "--dry-run") == 0
    script, _, config = capsys.readouterr().out.partition("# baseline-imagenet_resnet50\n")
    plain = script.replace(str(tmp_path), "HERE").replace(sys.executable, "PYTHON")
    plain = re.sub(r"code-\w{12}", "code-SHA256", plain)
    assert plain == (GOLDEN / f"sbatch-{name}.sh").read_text(), plain
    Path("resolved.yaml").write_text(config)
    resolved = run_config.load("resolved.yaml")
    site = profile.load(name)
    workers = 2 * max(1, gpus.number(site.gpus_per_node))
    assert resolved.compute.workers == workers
    assert resolved.compute.cpus_per_worker == 2 * site.cpus_per_task / workers
    assert not list(tmp_path.glob("runs/*")), "a dry run leaves no files"


def test_a_site_says_how_nccl_connects_its_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = "nccl: {interface: ib0, infiniband: true, adapters: 'mlx5_0,mlx5_1', timeout: 22}"
    (tmp_path / "s.yaml").write_text(f"{keys}\nenvironment: {{NCCL_DEBUG: INFO}}")
    assert run("submit", "train", *IMAGENET, "--site", str(tmp_path / "s.yaml"), "--nodes", "2", "--dry-run") == 0
    exported = [line for line in capsys.readouterr().out.splitlines() if "NCCL" in line or "GLOO" in line]
    assert set(exported) == {
        "export NCCL_SOCKET_IFNAME=ib0",
        "export GLOO_SOCKET_IFNAME=ib0",
        "export NCCL_IB_DISABLE=0",
        "export NCCL_IB_HCA=mlx5_0,mlx5_1",
        "export NCCL_IB_TIMEOUT=22",
        "export NCCL_DEBUG=INFO",
    }
    assert not profile.SiteProfile().nccl.variables
    assert "GLOO_SOCKET_IFNAME" not in profile.Nccl(interface="^lo").variables  # gloo has no exclusions


def test_the_command_line_takes_precedence_over_profile_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--partition", "big", "--time", "1-00:30:00", "--nodes", "2-8", "--gpus-per-node", "2", "--qos", "high"]
    line = ["submit", "train", *IMAGENET, "compute.cpus_per_worker=3", "--site", "example", *options, "--dry-run"]
    assert run(*line) == 0
    printed = capsys.readouterr().out
    for option in ("--partition=big", "--time=1470", "--nodes=2-8", "--no-kill", "--gpus-per-node=2", "--qos=high"):
        assert f"#SBATCH {option}\n" in printed
    assert "#SBATCH --ntasks" not in printed, "SLURM would give the fewest nodes"
    assert " --ntasks-per-node=1 --no-kill " in printed, "an exclusive node would get a task for each CPU"
    assert "workers: [4, 16]" in printed and "cpus_per_worker: 3.0" in printed


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90m", 90), ("24h", 1440), ("2d", 2880), ("1:30:00", 90), ("0:00:30", 1), ("1-12:00:00", 2160), ("45", 45),
     ("1.5h", 90), ("2:05", 125)],
)  # fmt: skip
def test_times_are_read_as_people_write_them(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


PROFILES = {
    "odd": "partitoin: gpu",
    "lines": 'comment: "a\\nb"',
    "twice": "extra: {partition: gpu}",
    "memory": "memory_gb: 4\nextra: {mem: 0}",
    "gpus": 'gpus_per_node: 2\nextra: {gres: "gpu:4"}',
    "total": "extra: {gpus: 3}",
}


@pytest.mark.parametrize(
    ("options", "key", "subject"),
    [
        ({"time_limit": "soon"}, "--time", "soon"),
        ({"time_limit": "0h"}, "--time", "0h"),
        ({"time_limit": "3m"}, "--time", "3"),
        ({"time_limit": "30m", "nodes": "0"}, "--nodes", "0"),
        ({"time_limit": "30m", "nodes": "4-2"}, "--nodes", "4-2"),
        ({"site": "mars"}, "--site", "mars"),
        ({"site": "odd.yaml"}, "partitoin", None),
        ({"array": "seed"}, "--array", "seed"),
        ({"array": "seed=1,1"}, "--array", "seed=1,1"),
        ({"array": "family.resolutions_px=[16],[8"}, "--array", "[8"),
        ({"array": "seed=1,2%0"}, "--array", "%0"),
        ({"array": "seed=1,2%1", "where": "local"}, "--array", "1"),
        ({"array": "name=a b,c"}, "name", None),
        ({"array": "seed=1,2", "arguments": (*IMAGENET, "--seeds", "2")}, "--array", "seed=1,2"),
        ({"partition": "gpu\n#SBATCH --exclusive"}, "--partition", None),
        ({"name": "a\nb"}, "--name", None),
        ({"arguments": (*IMAGENET, "--run-dir", "runs/a\nb")}, "arguments", None),
        ({"site": "lines.yaml"}, "comment", None),
        ({"site": "twice.yaml"}, "extra.partition", None),
        ({"site": "memory.yaml"}, "memory_gb", None),
        ({"site": "gpus.yaml"}, "gpus_per_node", None),
        ({"site": "total.yaml", "nodes": "2"}, "extra.gpus", "3"),
        ({"gpus_per_node": "many"}, "gpus_per_node", "many"),
        ({"arguments": (*IMAGENET, "tracking.uri=postgresql://me:hush@host/db")}, "tracking.uri", None),
        ({"arguments": (*IMAGENET, "tracking.uri=postgresql://me:hu/sh@host/db")}, "tracking.uri", None),
        ({"after": "7"}, "--after", "7"),
        ({"after": "first", "where": "local"}, "--after", "1"),
        ({"dependency": "afterok:7", "where": "local"}, "--dependency", "afterok:7"),
        ({"address": "http://a:1"}, "--address", "http://a:1"),
        ({"where": "moon"}, "--where", "moon"),
        ({"arguments": (*IMAGENET, "training.epoch=3")}, "training.epoch", None),
        ({"verb": "dance"}, "verb", "dance"),
        ({"verb": "evaluate", "arguments": ("runs/x",), "nodes": "2"}, "--nodes", "2"),
        ({"verb": "report", "arguments": ("runs/x",), "array": "seed=1"}, "--array", "seed=1"),
    ],
)
def test_what_cannot_be_submitted_is_refused_before_anything_is_written(
    options: dict[str, object], key: str, subject: str | None, tmp_path: Path
) -> None:
    for name, text in PROFILES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    records.add(record(tmp_path / "runs" / "first", "1"))
    before = sorted(tmp_path.rglob("*"))
    with fails(ConfigError, key, subject):
        submit(SubmitOptions(**{"verb": "train", "arguments": IMAGENET, **options}))  # type: ignore[arg-type]
    assert sorted(tmp_path.rglob("*")) == before


def record(home: Path, job: str) -> records.JobRecord:
    one = Job("local", "train", (), str(home), None, 1.0, 1)
    submission = Submission(one, "x", Resources((1, 1), 0, 1, 10), SiteProfile())
    return records.record_of(submission, one, id=job, log=home / "log.out")


@pytest.mark.parametrize(
    ("text", "options", "wanted", "count"),
    [
        ('extra: {gres: "gpu:1"}', {}, {"gres": "gpu:1"}, 1),
        ('extra: {gres: "lustre:1,gpu:a100:4"}', {}, {"gres": "lustre:1,gpu:a100:4"}, 4),
        ("extra: {gres: gpu}", {}, {"gres": "gpu"}, 1),
        ('gpus_per_node: "a100:4"', {}, {"gpus-per-node": "a100:4"}, 4),
        ('gpus_per_node: 4\nextra: {gpus_per_node: "a100:4"}', {}, {"gpus-per-node": "a100:4"}, 4),
        ('extra: {gpus-per-task: "a100:2"}', {}, {"gpus-per-task": "a100:2"}, 2),
        ("extra: {gpus: 4}", {"nodes": "2"}, {"gpus": "4"}, 2),
        ('extra: {gres: "gpu:a100:4,lustre:1"}', {"gpus_per_node": "2"}, {"gres": "gpu:a100:2,lustre:1"}, 2),
        ('extra: {gres: "gpu:4"}', {"gpus_per_node": "h100:2"}, {"gres": "gpu:h100:2"}, 2),
        ('extra: {gres: "gpu:4"}', {"gpus_per_node": "0"}, {}, 0),
        ('gpus_per_node: "a100:4"', {"gpus_per_node": "1"}, {"gpus-per-node": "1"}, 1),
    ],
)
def test_gpus_are_requested_as_the_site_wants_it(
    text: str, options: dict[str, str], wanted: dict[str, str], count: int, tmp_path: Path
) -> None:
    """The run gets a worker for each of them, once; the command line keeps the site's way and its type."""
    (tmp_path / "s.yaml").write_text(text)
    given = SubmitOptions("train", IMAGENET, site="s.yaml", cpus_per_task=16, **options)  # type: ignore[arg-type]
    submission, (config,) = plan(given)
    found = re.findall(r"^#SBATCH --((?:gpus|gres)[\w-]*)=(\S+)$", scripts.script(submission), re.MULTILINE)
    assert found == list(wanted.items()) and submission.resources.gpus_per_node == count
    assert (config.compute.device, config.compute.workers) == (
        "cuda" if count else "cpu",
        max(1, count) * submission.resources.nodes[1],
    )


def test_other_options_of_sbatch_may_be_numbers_or_have_no_value(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "extra: {exclusive: true, contiguous: null, overcommit: false, mem: 0, nice: 5, licenses: 'a:1', export: NONE}"
    )
    text = scripts.script(plan(SubmitOptions("train", IMAGENET, site="s.yaml"))[0])
    for line in ("exclusive", "contiguous", "mem=0", "nice=5", "licenses=a:1", "export=NONE"):
        assert f"#SBATCH --{line}\n" in text
    assert "overcommit" not in text
    assert " --export=ALL " in text, "a step would inherit NONE, and run without the snapshot's path"
    wider = scripts.script(plan(SubmitOptions("train", IMAGENET, site="s.yaml", memory_gb=2))[0])
    assert "#SBATCH --mem=2048MB\n" in wider and "--mem=0" not in wider


@pytest.mark.parametrize("code", [0, 1])
def test_a_module_that_cannot_be_loaded_ends_the_job_with_its_message(tmp_path: Path, code: int) -> None:
    """Also where a wrapper of the site hides the exit code."""
    (tmp_path / "s.yaml").write_text('modules: [gcc, "no such/1.0"]\nsetup: [echo WENT-ON]')
    text = scripts.script(plan(SubmitOptions("train", IMAGENET, site="s.yaml"))[0])
    module = 'module() { echo "loaded $2"; [ "$2" = gcc ] || { echo "$ERROR $2" >&2; return CODE; }; }\n'
    module = module.replace("CODE", str(code))
    error = "Lmod has detected the following error: The following module is unknown:"
    done = subprocess.run(
        ["bash", "-c", module + text], capture_output=True, text=True, env={**os.environ, "ERROR": error}
    )
    assert done.returncode == 2 and "WENT-ON" not in done.stdout
    (tmp_path / "log").write_text(done.stdout)
    (line,) = records.last_lines([tmp_path / "log"])
    assert "no such/1.0" in line and "Lmod has detected" in line


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("Submitted batch job 7\n", "7"),
        ("7\n", "7"),
        ("7;cluster\n", "7"),
        ("--> Enforcing limit: job 9 of at most 40 of this user...OK\nSubmitted batch job 7\n", "7"),
        ("Welcome, you have 3 jobs\n12\n\nSubmitted batch job 7 on cluster a\nHave a nice day\n", "7"),
        ("job 9 is in your way\n7\n", "7"),
    ],
)
def test_the_jobs_id_is_found_in_what_a_site_makes_sbatch_print(answer: str, job: str) -> None:
    from pipeline.compat.submitit import id_in_answer

    assert id_in_answer(answer) == job


def test_an_answer_without_an_id_is_quoted_and_not_called_a_refusal(tmp_path: Path, tools: Path) -> None:
    """The job may be in the queue."""
    fake_schedulers.fake_slurm(tools, tmp_path / "state")
    fake_schedulers.write_tool(tools, "sbatch", "echo Your job 9 was accepted")
    with fails(ResourceError, "sbatch", "Your job 9 was accepted") as caught:
        submit(SubmitOptions("train", ("convnet_aig/toy", f"data.root={tmp_path}"), time_limit="30m"))
    assert "squeue --me" in str(caught.value)


@pytest.mark.parametrize("name", ["2026-11-29T15:10:00", "50%job", "a:b/c%A", "a b", "it's", 'say "x"'])
def test_a_run_folder_may_have_any_printable_name(name: str, tmp_path: Path, tools: Path) -> None:
    """PYTHONPATH is split at ":", and SLURM and submitit replace %j; the job must run the code that is kept for it."""
    fake_schedulers.fake_slurm(tools, tmp_path / "state")
    home = tmp_path / "runs" / name
    submit(
        SubmitOptions("train", ("convnet_aig/toy", f"data.root={tmp_path}", "--run-dir", str(home)), time_limit="30m")
    )
    (job,) = records.of_home(home)
    assert job.script is not None and Path(job.log).parent.resolve() == home / "slurm"
    (line,) = re.findall(r"^export PYTHONPATH=.*$", job.script, re.MULTILINE)
    shown = subprocess.run(["bash", "-c", f'{line}; echo "$PYTHONPATH"'], env={}, capture_output=True, text=True).stdout
    place = shown.strip().split(":")[0]
    assert Path(place, "jobs", "cli.py").is_file() and Path(place).resolve().parent == home / "slurm"
    (log,) = re.findall(r"^#SBATCH --output=(.*)/%j_0_log\.out", job.script, re.MULTILINE)
    assert "%" not in log


def test_an_array_has_readable_names_that_a_run_may_have(tmp_path: Path) -> None:
    long = "/".join(["x" * 100] * 3)
    for array, suffixes in {
        "seed=1,2": ["-seed1", "-seed2"],
        "checkpoint.every=1 epochs,2 epochs": ["-checkpoint.every1-epochs", "-checkpoint.every2-epochs"],
        "training.loss={kind: cross_entropy},{ kind: cross_entropy}": None,
        f"data.root=/{long}/a,/{long}/b": None,
    }.items():
        submission, configs = plan(SubmitOptions("train", ("convnet_aig/toy", f"data.root={tmp_path}"), array=array))
        names = [config.name for config in configs]
        assert len(set(names)) == 2 and all(len(name) <= 120 for name in names)
        assert [Path(job.home).name for job in submission.jobs] == names
        for config in configs:
            run_config.from_mapping(as_mapping(config), "dumped")
        if suffixes:
            assert names == [f"convnet_aig-toy{suffix}" for suffix in suffixes]


def test_an_array_may_hold_lists_and_be_throttled(tmp_path: Path) -> None:
    train = ("baseline/toy", f"data.root={tmp_path}", "--run-dir", "runs/r")
    submission, configs = plan(SubmitOptions("train", train, array="family.resolutions_px=[16],[8],[16,8]%2"))
    assert [config.family.resolutions_px for config in configs] == [(16,), (8,), (16, 8)]  # type: ignore[attr-defined]
    assert "#SBATCH --array=0-2%2\n" in scripts.script(submission)
    assert Path(submission.jobs[0].home).name == "r-family.resolutions_px-16"
    many, _ = plan(SubmitOptions("train", train[:2], array="seed=1,2,3"))
    assert "#SBATCH --array=0-2%3\n" in scripts.script(many)


def test_seeds_are_an_array_of_one_task_each_below_one_parent(tmp_path: Path) -> None:
    train = ("baseline/toy", f"data.root={tmp_path}", "--run-dir", "runs/r", "--seeds", "3", "seed=5")
    submission, configs = plan(SubmitOptions("train", train))
    assert "#SBATCH --array=0-2%3\n" in scripts.script(submission)
    assert [(Path(job.home).name, config.seed) for job, config in zip(submission.jobs, configs, strict=True)] == [
        ("r-s5", 5), ("r-s6", 6), ("r-s7", 7)
    ]  # fmt: skip
    assert {config.tracking.parent for config in configs} == {tmp_path / "runs" / "r-seeds"}
    single, _ = plan(SubmitOptions("train", (*train[:5], "1")))
    assert "#SBATCH --array" not in scripts.script(single)


@pytest.mark.parametrize("where", ["slurm", "ray"])
def test_submitting_seeds_forms_the_group_that_training_them_here_forms(
    where: str, tmp_path: Path, tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_schedulers.fake_slurm(tools, tmp_path / "state")
    line = [
        "train",
        "baseline/toy",
        f"data.root={tmp_path}",
        "name=net",
        "--seeds",
        "2",
        "--where",
        where,
        "--time",
        "1h",
    ]
    with fake_schedulers.job_server() as server:
        options = ["--address", server.address] if where == "ray" else []
        assert run("submit", *line, *options, "--dry-run") == 0
        assert not list(tmp_path.glob("runs/*")), "a dry run leaves no files"
        assert run("submit", *line, *options) == 0
    group = tmp_path / "runs" / "net-seeds"
    assert seed_runs.seeds_in(group) == (1, 2)
    here = tmp_path / "here" / "net"
    config = run_config.load("baseline/toy", [f"data.root={tmp_path}", "name=net"])
    trained = seeds.create(seeds.plan(config, 2, here))
    saved = [configs.read_mapping(folder / "config.yaml")["fingerprint"] for folder in (group, trained)]
    assert saved[0] == saved[1]
    for seed in (1, 2):
        folder = seed_runs.folder_of(group, seed)
        submitted = run_config.load(str(folder / "slurm" / "recipe.yaml"))
        assert seeds.is_member(submitted) and (submitted.seed, submitted.tracking.parent) == (seed, group)
        assert len(records.of_home(folder)) == 1
    assert capsys.readouterr().out.count("adaptnet train in") == 2


def test_a_profile_with_options_that_are_now_set_elsewhere_is_read_from_an_old_record(tmp_path: Path) -> None:
    entry = record(tmp_path, "7").to_json()
    old = {**SiteProfile().model_dump(mode="json"), "memory_gb": 4, "extra": {"mem": "1G", "nodes": "2", "nice": "5"}}
    assert records.JobRecord.from_json({**entry, "profile": old}, tmp_path).profile.extra == {"nice": "5"}


def test_a_jobs_tracking_is_that_of_the_environment_in_which_it_was_submitted_or_of_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("convnet_aig/toy", f"data.root={tmp_path}")
    (tmp_path / "s.yaml").write_text('environment: {MLFLOW_TRACKING_URI: "http://site:5000"}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hush@host/db")
    _, (config,) = plan(SubmitOptions("train", train))
    assert config.tracking.uri == "postgresql://me:hush@host/db"
    assert "hush" not in str(as_mapping(config)), "the job finds it in its environment"
    assert plan(SubmitOptions("train", train, site="s.yaml"))[1][0].tracking.uri == "http://site:5000"
    with fails(ConfigError, "tracking.uri"):
        plan(SubmitOptions("train", train, where="ray", address="http://a:1"))
    (tmp_path / "s.yaml").write_text('environment: {MLFLOW_TRACKING_URI: "http://me:hush@site:5000"}')
    with fails(ConfigError, "environment.MLFLOW_TRACKING_URI") as caught:
        plan(SubmitOptions("train", train, site="s.yaml"))
    assert "hush" not in f"{caught.value} {caught.value.subject}"


def test_without_slurm_a_submission_is_refused() -> None:
    with fails(ResourceError, "sbatch"):
        submit(SubmitOptions("train", IMAGENET))


@pytest.mark.parametrize("what", ["--slurm", "--warning"])
def test_a_measurement_of_jobs_needs_slurm_and_is_one_of_four(what: str, tmp_path: Path) -> None:
    before = list(tmp_path.iterdir())
    error = error_of("bench", "scaling", what, "--site", "testcluster")
    assert type(error) is ResourceError and error.key == "sbatch" and list(tmp_path.iterdir()) == before
    assert type(error_of("bench", "scaling", what, "--sweep")) is ConfigError


def test_the_shortest_time_covers_start_up_saving_and_an_early_warning() -> None:
    check_time(3, 45)
    with fails(ConfigError, "--time", subject=3):
        check_time(3, 61)


def test_edits_after_submission_do_not_change_the_job(tmp_path: Path) -> None:
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    for package in snapshot.PACKAGES:
        (checkout / package).mkdir(parents=True)
        (checkout / package / "one.py").write_text(f"# {package}\n")
    before = snapshot.name(checkout)
    snapshot.save(copy, checkout)
    (checkout / "pipeline" / "one.py").write_text("# edited\n")
    assert snapshot.name(checkout) != before
    snapshot.save(copy, checkout)
    assert (copy / "pipeline" / "one.py").read_text() == "# pipeline\n"


def test_snapshots_share_the_weights_of_the_zoo_and_nothing_else(tmp_path: Path) -> None:
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    for package in snapshot.PACKAGES:
        (checkout / package).mkdir(parents=True)
    files = [checkout / "pipeline" / name for name in ("model.safetensors", "module.py")]
    for file in files:
        file.write_text("x")
    snapshot.save(copy, checkout)
    (checkout / "pipeline" / "linked.safetensors").symlink_to("model.safetensors")
    snapshot.save(copy / "again", checkout)
    assert not (copy / "again" / "pipeline" / "linked.safetensors").is_symlink()
    shared = [os.path.samefile(file, copy / file.relative_to(checkout)) for file in files]
    assert shared == [True, False] and (copy / "pipeline" / "module.py").read_text() == "x"


def test_a_snapshot_holds_recipes_and_the_state_of_git(tmp_path: Path) -> None:
    snapshot.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "pipeline" / "families" / "ranet" / "recipes" / "toy.yaml").is_file()
    provenance.record(tmp_path, ["adaptnet", "train"])
    assert json.loads((tmp_path / "copy" / "git.json").read_text()) == provenance.read(tmp_path)["git"]


@pytest.mark.parametrize(
    ("message", "offer"),
    [
        ("sbatch: error: invalid partition specified: nope", "Known partitions: main, high"),
        ("Batch job submission failed: Invalid account or account/partition combination", "Your accounts: main, high"),
        ("Invalid qos specification", "Known QOS: main, high"),
        ("Requested time limit is invalid", "The partitions allow: main, high"),
        ("Requested node configuration is not available", "The nodes have: main, high"),
        ("Munge encode failed: Failed to access", "Is munged running on this machine?"),
    ],
)
def test_a_refusal_by_slurm_names_what_the_site_offers(message: str, offer: str, tools: Path) -> None:
    for name in ("sinfo", "sacctmgr"):
        fake_schedulers.write_tool(tools, name, "echo main; echo high; echo main")
    error = refused(RuntimeError(message))
    assert (error.key, error.subject) == ("sbatch", message) and str(error).endswith(f". {offer}")


def test_a_submitit_without_the_private_parts_that_we_use_is_refused_at_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from submitit.slurm import slurm

    from pipeline.compat import submitit as compat

    with monkeypatch.context() as patch:
        patch.delattr(slurm, "_make_sbatch_string")
        with fails(ResourceError, "submitit"):
            importlib.reload(compat)
        patch.setattr(slurm, "_make_sbatch_string", lambda command, folder: "", raising=False)
        with fails(ResourceError, "submitit"):
            importlib.reload(compat)
    importlib.reload(compat)


def test_a_runs_needs_are_recorded_and_serve_a_resubmission(tmp_path: Path, tools: Path) -> None:
    fake_schedulers.fake_slurm(tools, tmp_path / "state")
    train = ("convnet_aig/toy", f"data.root={tmp_path}")
    submit(SubmitOptions("train", train, nodes="2-4", gpus_per_node="2", cpus_per_task=6, time_limit="30m"))
    (tmp_path / "state" / "101").write_text("FAILED\n")
    assert run("jobs", "resubmit", "convnet_aig-toy") == 0
    first, second = records.of_home(tmp_path / "runs" / "convnet_aig-toy")
    assert (first.id, second.id) == ("101", "102")
    assert first.needs == second.needs == WorkerNeeds(4, 3.0, 1.0)
    assert first.again().job == second.again().job and first.script == second.script


def test_needs_follow_the_device_and_the_number_of_workers(tmp_path: Path) -> None:
    sweep = SubmitOptions("sweep", ("toy", f"data.root={tmp_path}"), time_limit="30m", gpus_per_node="2")
    assert plan(sweep)[0].job.needs == WorkerNeeds(2, 1.0, 1.0), "the device is auto, and the nodes have GPUs"
    train = ("convnet_aig/toy", f"data.root={tmp_path}", "compute.workers=0")
    assert plan(SubmitOptions("train", train, time_limit="30m"))[0].job.needs is None
    shared = ("convnet_aig/toy", f"data.root={tmp_path}", "compute.workers=8", "compute.cpus_per_worker=auto")
    options = SubmitOptions("train", shared, time_limit="30m", nodes="2", cpus_per_task=16)
    assert plan(options)[0].job.needs == WorkerNeeds(8, 4.0, 0.0), "four workers on each node of 16 CPUs"


def test_a_sweeps_job_is_in_the_sweeps_folder(tmp_path: Path) -> None:
    submission, _ = plan(SubmitOptions("sweep", ("toy", f"data.root={tmp_path}"), nodes="2"))
    assert submission.folder == tmp_path / "runs" / "toy" / "slurm"
    with pytest.raises(ConfigError):
        plan(SubmitOptions("sweep", ("tyo",)))


def test_a_dependency_and_another_job_are_joined(tmp_path: Path) -> None:
    records.add(record(tmp_path / "runs" / "first", "41"))
    options = SubmitOptions("train", IMAGENET, after="first", dependency="singleton")
    assert scripts.parameters(plan(options)[0])["dependency"] == "singleton,afterok:41"


@pytest.mark.long
def test_a_job_runs_the_snapshot_even_if_it_is_submitted_from_a_checkout(tmp_path: Path) -> None:
    """What is edited there after submission would otherwise be imported first."""
    for package in snapshot.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('edited')\n")
    submit(SubmitOptions("report", ("runs/none",), time_limit="20m", where="local"))
    (job,) = records.list_jobs()
    _await_end(job)
    log = Path(job.log).read_text() + Path(job.log).with_suffix(".err").read_text()
    assert "adaptnet: runs/none" in log and "edited" not in log, log


@pytest.mark.long
def test_a_training_in_a_process_here_is_listed_and_shown(
    finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images = finished["ranet"].parents[1] / "images5"
    small = [f"data.root={images}", "name=here", "family.depth=8", "training.epochs=1", "tracking.register=null"]
    words = ["submit", "train", "convnet_aig/toy", *small, "evaluation.latency_repeats=0", "compute.workers=0"]
    assert run(*words, "--time", "20m", "--where", "local") == 0
    job = records.find("here")
    assert run("jobs", "list") == 0
    assert re.search(r"here\s+\d+\s+(RUNNING|COMPLETED)", capsys.readouterr().out)
    _await_end(job)
    assert run("jobs", "show", "here") == 0
    shown = capsys.readouterr().out
    assert "COMPLETED" in shown and "MLflow run" in shown and "step 0 to 2" in shown, shown
    assert run("jobs", "logs", job.id) == 0
    assert "finished at step 2" in capsys.readouterr().out
    error = error_of("jobs", "logs", "there")
    assert (type(error), error.key, error.subject) == (ConfigError, "job", "there")


@pytest.mark.long
def test_a_training_within_submit_prints_its_output_and_is_listed(
    finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images = finished["ranet"].parents[1] / "images5"
    small = [f"data.root={images}", "name=very", "family.depth=8", "training.epochs=1", "tracking.register=null"]
    words = ["submit", "train", "convnet_aig/toy", *small, "evaluation.latency_repeats=0", "compute.workers=0"]
    assert run(*words, "--time", "20m", "--where", "debug") == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert run("jobs", "list") == 0
    assert re.search(r"very\s+DEBUG_\d+\s+RUNNING", capsys.readouterr().out), "the tests' own process lives"


def test_a_user_error_in_a_job_within_submit_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("submit", "report", "runs/none", "--time", "20m", "--where", "debug") == 2
    assert capsys.readouterr().out.startswith("adaptnet: runs/none")


def test_in_a_container_the_batch_script_requeues(tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no scontrol inside; the folder's name holds characters that mean something to a shell."""
    home = tmp_path / "a 'run' & more"
    job = Job("slurm", "train", (), str(home), str(home), 1.0, 1)
    submission = Submission(job, "x", Resources((1, 1), 0, 1, 10), profile.load("container"))
    submission.folder.mkdir(parents=True)
    text = scripts.script(submission)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(submission.folder))
    outside = tmp_path / "outside"
    outside.mkdir()
    fake_schedulers.write_tool(outside, "scontrol", 'echo scontrol "$@"')
    fake_schedulers.write_tool(outside, "srun", "exit 3")
    env = {"PATH": f"{outside}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}

    def end() -> str:
        done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
        assert done.returncode == 3, f"the job's own exit code; {done.stderr}"
        return done.stdout

    assert end() == ""
    schedulers.get("slurm").requeue_this_job("for a test")
    assert [end(), end()] == ["scontrol requeue 7\n", ""]


def _await_end(job: records.JobRecord) -> None:
    deadline = time.monotonic() + 300
    while schedulers.state_of(job).alive:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_dry_run_ends_with_a_summary_and_checks_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "a").mkdir(parents=True)
        (tmp_path / "photos" / split / "a" / "1.jpg").write_bytes(images.jpeg())
    for root, readable in ((tmp_path / "photos", True), (tmp_path / "nowhere", False)):
        line = ["baseline/imagenet_resnet50", f"data.root={root}", "--site", "example", "--nodes", "2", "--dry-run"]
        assert run("submit", "train", *line) == 0, "the images may be on the nodes alone"
        summary = capsys.readouterr().out.rpartition("\n\n")[2]
        facts = dict(re.findall(r"^# (\w[\w ]*?) {2,}(.*)", summary, re.MULTILINE))
        assert set(facts) == {"jobs", "GPUs", "time limit", "images a GPU", "learning rate", "data", "logs", "next"}
        assert facts["images a GPU"].startswith("32 ") and str(root) in facts["data"]
        assert ("WARNING" in facts["data"]) is not readable
        assert (facts["time limit"], facts["learning rate"]) == ("1,440 minutes (24 hours)", "0.1")
        assert facts["logs"] == str(tmp_path / "runs" / "baseline-imagenet_resnet50" / "slurm")


@pytest.mark.parametrize("several", [["--array", "seed=1,2"], ["--seeds", "2"]])
def test_the_summary_of_several_runs_names_the_folder_of_their_logs(
    several: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["baseline/toy", f"data.root={tmp_path}", "compute.workers=0", *several, "--time", "1h", "--dry-run"]
    assert run("submit", "train", *line) == 0
    script, _, summary = capsys.readouterr().out.rpartition("\n\n")
    facts = dict(re.findall(r"^# (\w[\w ]*?) {2,}(.*)", summary, re.MULTILINE))
    (output,) = re.findall(r"^#SBATCH --output=(.*)", script, re.MULTILINE)
    assert output.startswith(facts["logs"] + "/") and Path(facts["logs"]).name == "slurm"
    assert facts["images a worker"].endswith("in the job's own process")


def test_a_jobs_batch_and_rates_are_those_of_the_same_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.verbs.train import _resolved

    words = ["training.scale_lr=linear", f"data.root={tmp_path}"]
    options = SubmitOptions("train", ["baseline/imagenet_resnet50", "--batch-size", "4096", *words], site="example")
    _, (config,) = plan(options)
    alone, _ = _resolved("baseline/imagenet_resnet50", list(words), 4096)
    assert config.training == alone.training and config.training.reference_batch == 256
    line = ["baseline/imagenet_resnet50", "--batch-size", "4096", *words, "--site", "example", "--dry-run"]
    assert run("submit", "train", *line) == 0
    assert re.search(r"# learning rate +1\.6\n", capsys.readouterr().out)


def test_each_parameter_of_train_is_used_by_its_job_or_refused() -> None:
    from typer.main import get_command

    from jobs.verbs import submit as verb
    from jobs.verbs import train

    used = {"recipe", "overrides", "run_dir", "seeds", "allow_changed", "batch_size"}
    assert {param.name for param in get_command(train.app).params} - {"help"} == used | set(verb.TRAIN_PRINTS)


@pytest.mark.parametrize("option", ["--show", "--list", "--json"])
def test_options_of_train_that_train_nothing_are_refused(option: str) -> None:
    with fails(ConfigError, option):
        plan(SubmitOptions("train", [*IMAGENET, option]))


@pytest.mark.parametrize(
    ("overrides", "options", "key"),
    [
        (["training.batch_size=16"], {"nodes": "4", "gpus_per_node": "8", "cpus_per_task": 64}, "training.batch_size"),
        (["compute.workers=64"], {"nodes": "4", "gpus_per_node": "8", "cpus_per_task": 64}, "compute.workers"),
        ([], {"nodes": "4", "gpus_per_node": "h100:8"}, "--cpus-per-task"),
        (["compute.cpus_per_worker=9"], {"gpus_per_node": "8", "cpus_per_task": 64}, "--cpus-per-task"),
        (["compute.workers=8"], {"gpus_per_node": "2", "cpus_per_task": 8}, "compute.workers"),
        (["tracking.uri=htp://x:5000"], {}, "tracking.uri"),
        (["tracking.uri=tracking.vision:5000"], {}, "tracking.uri"),
    ],
)
def test_a_training_that_could_not_start_on_its_nodes_is_refused_now(
    overrides: list[str], options: dict[str, Any], key: str
) -> None:
    with fails(ConfigError, key):
        plan(SubmitOptions("train", [*IMAGENET, *overrides], **options))


def test_trainings_that_fit_on_their_nodes_are_not_refused() -> None:
    for nodes, options in (
        ("4", {"gpus_per_node": "8", "cpus_per_task": 8}),
        ("1-4", {}),
        ("2", {"cpus_per_task": 64}),
    ):
        plan(SubmitOptions("train", IMAGENET, nodes=nodes, **options))
    plan(SubmitOptions("train", [*IMAGENET, "compute.workers=0"], gpus_per_node="8"))


@pytest.mark.parametrize(
    ("words", "near"), [(["--part", "gpu"], "--partition"), (["--allow-change", "a"], "--allow-changed"), (["-p"], "")]
)
def test_an_option_that_does_not_exist_is_one_of_submit(
    words: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("submit", "train", "baseline/toy", *words) == 2
    said = capsys.readouterr().err
    assert words[0] in said and near in said and "adaptnet submit --help" in said and "Usage: train" not in said


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY", "HF_TOKEN"])
def test_a_secret_of_a_sites_environment_is_refused_and_not_shown(name: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"environment: {{{name}: geheim}}")
    with pytest.raises(ConfigError) as caught:
        profile.load(str(tmp_path / "s.yaml"))
    assert name in str(caught.value) and "geheim" not in str(caught.value)


def test_the_table_of_a_profiles_keys_has_each_with_its_default() -> None:
    text = (Path(__file__).parents[1] / "infra" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", text.partition("| key | default |")[2].partition("\n\n")[0], re.M
    )
    keys = {key: default for names, default in rows for key in re.findall(r"\w+", names)}
    assert set(keys) == set(SiteProfile.model_fields)
    for name, field in SiteProfile.model_fields.items():
        if isinstance(field.default, int | float | str):
            shown = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert shown in keys[name], name
