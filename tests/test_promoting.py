"""Promotion: the gate, the log that only one of two concurrent writers may continue, and rollbacks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow_here import CONTEXT, database, finish, run_folder
from raised import fails

from jobs.cli import main
from pipeline import config as configs
from pipeline import family as families
from pipeline.data import toy
from pipeline.deploy import promoting
from pipeline.errors import CheckpointError, ConfigError, ResourceError
from pipeline.family import Report
from pipeline.registry import catalogue, promotion_log
from pipeline.registry.model import describe
from pipeline.registry.promotion_log import HolderChange
from pipeline.registry.resolve import resolve
from pipeline.runs import files
from pipeline.runs.records import Meta
from pipeline.tracking import connect
from pipeline.training import checkpoint


def report(policy: str, top1: float, macs: float) -> Report:
    return Report(policy, 100, top1, None, 0.01, macs, macs, 1.0)


CHAMPION = [report("full", 0.90, 2e9), report("half", 0.80, 1e9)]


@pytest.mark.parametrize(
    ("challenger", "named"),
    [
        ([report("a", 0.85, 2e9)], ["a", "full", "5.00", "0.0"]),
        ([report("a", 0.80, 1.25e9)], ["a", "half", "0.00", "20.0"]),
        ([report("a", 0.70, 3e9), report("b", 0.80, 1e9)], ["b", "half", "0.00", "0.0"]),  # not its dominated policy
        (CHAMPION, ["full", "half"]),  # nothing new
        ([report("a", 0.91, 9e9)], None),  # more accurate
        ([report("a", 0.10, 5e8)], None),  # cheaper
        ([report("a", 0.10, 9e9), report("b", 0.85, 1.5e9)], None),  # between
    ],
)
def test_the_gate_names_policies_points_and_percent(challenger: list[Report], named: list[str] | None) -> None:
    reason = promoting.gate(challenger, CHAMPION)
    if named is None:
        assert reason is None
    else:
        words = str(reason).replace(":", " ").replace(";", " ").split()
        assert set(named) <= set(words) and ("a" in words) == ("a" in named)


# --- the log


@pytest.fixture
def registered(tmp_path: Path) -> tuple[str, Any, str]:
    """A registry with the model `net` of four versions without files, its client and a run."""
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    run_id = client.create_run("0").info.run_id
    client.create_registered_model("net")
    for _ in range(4):
        client.create_model_version("net", f"{client.get_run(run_id).info.artifact_uri}/x", run_id)
    return uri, client, run_id


def write(client: Any, uri: str, version: int, **changes: Any) -> promotion_log.PromotionEntry:
    """Appends to the log of `net` as a promoter that has read its present state."""
    counted = promotion_log.history(uri, "net", "champion")
    present = client.get_registered_model("net").aliases.get("champion")
    given = {
        "name": "net",
        "alias": "champion",
        "kind": "promotion",
        "version": version,
        "before": int(present) if present else None,
        "follows": counted[-1].number if counted else 0,
        "who": "me@here",
        "why": "",
        "forced": False,
        "source": client.get_model_version("net", "1").source,
        "run_id": client.get_model_version("net", "1").run_id,  # a server requires it beside the source
        "facts": {},
    }
    return promotion_log.append(client, uri, HolderChange(**{**given, **changes}))


def holder(client: Any) -> int:
    return int(client.get_registered_model("net").aliases["champion"])


def contend(uri: str, version: int, start: Any, answers: Any) -> None:
    client = connect(uri)
    start.wait()
    try:
        write(client, uri, version, before=None, follows=0, who=f"promoter-{version}@here")
        answers.put(version)
    except ResourceError as error:
        answers.put((error.key, error.subject))


@pytest.mark.long
def test_of_concurrent_promotions_one_wins_and_the_others_are_refused(registered: tuple[str, Any, str]) -> None:
    uri, client, _ = registered
    start, answers = CONTEXT.Barrier(4), CONTEXT.Queue()
    racing = [CONTEXT.Process(target=contend, args=(uri, n, start, answers)) for n in (1, 2, 3, 4)]
    for process in racing:
        process.start()
    results = [answers.get(timeout=600) for _ in racing]
    for process in racing:
        process.join(300)
    won = [each for each in results if isinstance(each, int)]
    assert len(won) == 1 and holder(client) == won[0]
    assert results.count(("--alias", "net@champion")) == 3
    (entry,) = promotion_log.history(uri, "net", "champion")
    assert (entry.version, entry.done) == (won[0], True)
    assert [v.version for v in catalogue.versions(uri)] == [4, 3, 2, 1]  # the log is not listed among the models


class Dead(Exception):
    pass


class Dying:
    """A client whose process is killed at its n-th call, before or after the answer."""

    def __init__(self, client: Any, moment: int) -> None:
        self._client, self._left = client, moment

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self._die()
            answer = getattr(self._client, name)(*args, **named)
            self._die()
            return answer

        return call

    def _die(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Dead


@pytest.mark.faults
def test_a_promoter_killed_anywhere_leaves_a_clear_holder(registered: tuple[str, Any, str]) -> None:
    uri, client, _ = registered
    write(client, uri, 1)
    moment, entered = 0, 0
    while True:
        moment += 1
        before = len(promotion_log.history(uri, "net", "champion"))
        wanted = 2 + moment % 2
        try:
            write(Dying(client, moment), uri, wanted, before=holder(client))
        except Dead:
            counts = len(promotion_log.history(uri, "net", "champion")) > before
            entered += counts
            was = holder(client)
            promotion_log.settle(client, uri, "net", "champion")  # as the next promoter does first
            assert holder(client) == (wanted if counts else was)
        else:
            break
    assert moment > 8 and entered >= 4
    assert holder(client) == wanted and promotion_log.history(uri, "net", "champion")[-1].done
    assert (
        f"entry {promotion_log.history(uri, 'net', 'champion')[-1].number}"
        in (client.get_model_version("net", str(wanted)).tags["adaptnet.alias.champion"])
    )


class Slow:
    """A client that pauses before it moves an alias; meanwhile another promoter finishes."""

    def __init__(self, client: Any, meanwhile: Callable[[], Any]) -> None:
        self._client, self._meanwhile = client, [meanwhile]

    def __getattr__(self, name: str) -> Any:
        if name == "set_registered_model_alias" and self._meanwhile:
            self._meanwhile.pop()()
        return getattr(self._client, name)


def test_a_slow_promoter_does_not_move_the_alias_back(registered: tuple[str, Any, str]) -> None:
    uri, client, _ = registered

    def other() -> None:
        promotion_log.settle(client, uri, "net", "champion")
        write(client, uri, 2)

    write(Slow(client, other), uri, 1)
    assert holder(client) == 2
    assert [entry.version for entry in promotion_log.history(uri, "net", "champion")] == [1, 2]


def test_each_rollback_goes_back_by_one_holder(registered: tuple[str, Any, str]) -> None:
    uri, client, _ = registered

    def back() -> int | None:
        return promotion_log.previous(promotion_log.history(uri, "net", "champion"), holder(client))

    for version in (1, 2, 3):
        write(client, uri, version)
    assert back() == 2
    write(client, uri, 2, kind="rollback")
    assert back() == 1
    write(client, uri, 4)
    assert back() == 2
    client.set_registered_model_alias("net", "champion", "3")  # by hand, without the log
    assert back() == 4
    write(client, uri, 1)
    assert back() == 3  # the version that was set by hand counts as a holder
    assert [entry.kind for entry in promotion_log.history(uri, "net", "champion")].count("rollback") == 1


def test_a_model_with_the_name_of_the_log_is_not_used_as_one(registered: tuple[str, Any, str]) -> None:
    uri, client, _ = registered
    client.create_registered_model("net.promotions")
    with fails(ConfigError, "name", subject="net.promotions"):
        write(client, uri, 1)


# --- the commands

SECTION = {"name": "convnet_aig", "depth": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and two runs of untrained nets in runs/."""
    home = tmp_path_factory.mktemp("promoting")
    root = toy.make(home / "images", num_classes=3, train=12, val=40, side_px=32, seed=3)
    for seed in (1, 2):
        make_run(home / "runs" / f"run{seed}", root, seed)
    shutil.copyfile(database().path, home / "runs" / "mlflow.db")
    return home


def make_run(path: Path, root: Path, seed: int, section: dict[str, Any] = SECTION) -> None:
    """A finished run of an untrained net, with stored reports."""
    run_dir, recipe = run_folder(path)
    recipe |= {"family": section, "data": {"root": str(root), "side_px": 32, "eval_resize_px": 32}}
    recipe |= {"training": {"start_from": "/weights/small"} if seed == 2 else {}}
    recipe |= {"evaluation": {"latency_repeats": 1, "latency_batches": [1]}}
    (run_dir / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    family = families.find(section["name"])
    torch.manual_seed(seed)
    net = family.build(configs.validate(family.config, section, "test"), 3)
    classes = sorted(path.name for path in (root / "train").iterdir())
    fingerprint = {"seed": seed, "data.identity": "abc"}
    meta = Meta(step=seed, recipe=recipe, fingerprint=fingerprint, classes=tuple(classes))
    name = checkpoint.name_of(seed)
    checkpoint.write(run_dir / "checkpoints" / name, {"net": net.state_dict(), "step": seed}, meta)
    store = run_dir / "evaluations" / "final"
    store.mkdir(parents=True)
    found = [report("gates-hard", 0.5, 1e6).to_json(), report("all", 0.4, 2e6).to_json()]
    (store / "reports.json").write_text(json.dumps(found))
    about = {"source": str(run_dir), "step": seed, "data": "abc", "root": str(root), "policies": None, "attack": None}
    (store / "about.json").write_text(json.dumps(about))
    finish(run_dir, best=name)


@pytest.fixture
def call(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(home)

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def test_from_register_to_rollback(call: Callable[..., tuple[int, str]], home: Path) -> None:
    uri = f"sqlite:///{home}/runs/mlflow.db"
    for number in (1, 2):
        words = ("--licence", "MIT", "--note", f"net {number}")
        code, text = call("models", "register", f"runs/run{number}", "gated", *words)
        assert code == 0 and f"models:/gated/{number}" in text, text
    assert "models:/gated/2" in call("models", "register", "runs/run2", "gated")[1]  # again: the same version
    code, text = call("models", "promote", "gated", 1, "--why", "the first")
    assert code == 0 and "models:/gated/1" in text and "the first" in text, text
    code, text = call("models", "promote", "gated", 1)
    assert code == 0 and "models:/gated/1" in text and len(promotion_log.history(uri, "gated", "champion")) == 1
    assert call("models", "promote", "gated", 7)[0] == 2
    for arguments, key in (
        ({"number": 7}, "version"),
        ({"number": 2, "force": True}, "--why"),
        *(({"number": 2, "alias": alias}, "--alias") for alias in ("latest", "V2", "my champion", "", "candidate")),
    ):
        with fails(ConfigError, key):
            promoting.promote("gated", uri=uri, **arguments)
    code, text = call("models", "promote", "gated", 2, "--alias", "reports")  # a name that must not break the card
    assert code == 0 and "models:/gated/2" in text
    assert "dominated" in call("models", "show", "models:/gated@reports")[1]
    code, text = call("models", "promote", "gated", 2, "--why", "better?")
    refused = code == 2
    if refused:  # both nets are untrained: which is better is chance, but its consequences are not
        with fails(ConfigError, "--force", subject="models:/gated/2"):
            promoting.promote("gated", 2, uri=uri, why="better?")
        code, text = call("models", "promote", "gated", 2, "--force", "--why", "better nevertheless")
        assert "forced" in text
    assert code == 0 and "models:/gated/2" in text and "models:/gated/1" in text, text
    client = connect(uri)
    entry = promotion_log.history(uri, "gated", "champion")[-1]
    assert (entry.version, entry.before, entry.forced, entry.done) == (2, 1, refused, True)
    made = client.get_model_version("gated.promotions", str(entry.number))
    stored_at = Path(made.source.removeprefix("file://"))
    assert {path.name for path in stored_at.iterdir()} == {"challenger.json", "champion.json"}
    stored = json.loads((stored_at / "challenger.json").read_text())
    assert stored["of"] == "models:/gated/2" and stored["reports"][0]["num_images"] == 40
    assert json.loads(made.tags["adaptnet.reports"])[0]["top1"] == stored["reports"][0]["top1"]
    code, text = call("models", "rollback", "gated", "--why", "dark images")
    assert code == 0 and text.index("models:/gated/1") < text.index("models:/gated/2")
    for alias in ("champion", "chmpion"):
        assert call("models", "rollback", "gated", "--alias", alias)[0] == 2
        with fails(ConfigError, "--alias", subject=f"gated@{alias}"):
            promoting.rollback("gated", alias=alias, uri=uri)
    with fails(ConfigError, "--alias", subject="champion"):  # without the gate
        promoting.register("runs/run2", "gated", alias="champion")
    assert client.get_registered_model("gated").aliases["champion"] in (1, "1")
    code, text = call("models", "show", "models:/gated@champion")
    assert "net 1" in text and "MIT" in text and "dark images" in text and "run1" in text and "lineage" not in text
    lines = [line.split() for line in text.splitlines() if line.startswith(("gates-hard", "all"))]
    assert [line[-1] for line in lines] == ["yes", "dominated"]
    assert "/weights/small" in call("models", "show", "models:/gated/2")[1]
    code, text = call("models", "diff", "models:/gated/1", "models:/gated/2")
    assert "net 1" in text and "start from" in text and "policy" not in text, text


WITHOUT_MLFLOW = """
import sys
sys.modules["mlflow"] = None  # as where it is not installed
from jobs.cli import main
main(sys.argv[1:])
"""


@pytest.mark.long
def test_a_pulled_folder_needs_no_mlflow(call: Callable[..., tuple[int, str]], home: Path, tmp_path: Path) -> None:
    assert call("models", "register", "runs/run1", "pulled")[0] == 0
    folder = tmp_path / "mine"
    code, text = call("models", "pull", "models:/pulled/1", folder)
    assert code == 0 and str(folder) in text
    assert json.loads((folder / "origin.json").read_text())["version"] == "models:/pulled/1"
    assert call("models", "pull", "models:/pulled/1", folder)[0] == 2
    image = next((home / "images" / "val").rglob("*.*"))
    code, text = call("predict", folder, image, "--budget", "100%")
    assert code == 0 and str(image) in text, text
    words = [sys.executable, "-c", WITHOUT_MLFLOW, "predict", str(folder), str(image), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["images"][0]["file"] == str(image), done.stderr
    code, text = call("evaluate", folder)
    assert code == 0 and f"{folder}/evaluations/images-" in text, text
    assert "40" in call("compare", folder, folder)[1]
    net = folder / "net.safetensors"
    net.write_bytes(net.read_bytes()[:-1] + b"\x01")
    assert call("predict", folder, image)[0] == 2
    with fails(CheckpointError, "net.safetensors"):
        describe(folder)


def test_a_version_with_exchanged_files_is_not_promoted(call: Callable[..., tuple[int, str]], home: Path) -> None:
    assert call("models", "register", "runs/run1", "tampered")[0] == 0
    uri = f"sqlite:///{home}/runs/mlflow.db"
    place = resolve("models:/tampered/1", uri)
    recipe = place / "recipe.yaml"
    whole = recipe.read_text()
    recipe.write_text("\n".join(whole.splitlines()[:-1]) + "\n")  # cut off: still YAML
    with fails(CheckpointError, "recipe.yaml"):
        describe(place)
    recipe.write_text(whole)
    card = json.loads((place / "card.json").read_text())
    other = home / "runs" / "run2" / "checkpoints" / checkpoint.name_of(2) / "net.safetensors"
    shutil.copyfile(other, place / "net.safetensors")
    card["weights"] = {"bytes": other.stat().st_size, "sha256": files.sha256(other)}
    (place / "card.json").write_text(json.dumps(card))  # a complete folder, of another net
    with fails(CheckpointError, "weights", subject="models:/tampered/1"):
        promoting.promote("tampered", 1, uri=uri)
    client = connect(uri)
    assert call("models", "register", "runs/run2", "tampered")[0] == 0
    client.set_registered_model_alias("tampered", "champion", "1")  # a holder that can no longer be evaluated
    with fails(ConfigError, "--force", subject="models:/tampered/2"):
        promoting.promote("tampered", 2, uri=uri)
    code, text = call("models", "promote", "tampered", 2, "--force", "--why", "the old one is damaged")
    assert code == 0 and "forced" in text and "models:/tampered/1" in text, text
    client.delete_run(catalogue.lookup("models:/tampered/1", uri).run_id)
    assert "mlflow runs restore" in call("models", "show", "models:/tampered/1")[1]
