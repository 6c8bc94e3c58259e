"""The user's environment: what it sets is honoured or refused, by every verb, and loopback is spared from proxies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from raised import fails

from jobs import cli, environment
from pipeline import run_config
from pipeline.config import as_mapping
from pipeline.errors import AdaptNetError, ConfigError, without_secrets
from pipeline.execution.sockets import IN_RAY, SOCKET_CHARS, scratch_root
from pipeline.tracking import resolve_uri
from tuning import config as sweeps

THERE = "http://there:5000"
RECIPE = "family: {name: convnet_aig, depth: 8}\ndata: {root: /none}\n"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "RAY_", "no_proxy", "NO_PROXY"))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("recipe", "overrides", "variables", "uri", "origin"),
    [
        ("", [], {}, None, "the default"),
        ("", [], {"MLFLOW_TRACKING_URI": THERE}, THERE, "environment"),
        ("", [], {"MLFLOW_TRACKING_URI": ""}, None, "the default"),
        ("tracking: {uri: http://recipe}", [], {"MLFLOW_TRACKING_URI": THERE}, "http://recipe", "the recipe"),
        ("tracking: {uri: null}", [], {"MLFLOW_TRACKING_URI": THERE}, None, "the recipe"),
        (
            "tracking: {uri: http://recipe}",
            ["tracking.uri=http://command"],
            {"MLFLOW_TRACKING_URI": THERE},
            "http://command",
            "the command",
        ),
    ],
)
def test_the_command_precedes_the_recipe_and_the_recipe_the_environment(
    recipe: str, overrides: list[str], variables: dict[str, str], uri: str | None, origin: str, tmp_path: Path
) -> None:
    source = tmp_path / "mine.yaml"
    source.write_text(RECIPE + recipe)
    layer = environment.recipe_layer(variables)
    config = run_config.load(str(source), overrides, environment=layer)
    assert config.tracking.uri == uri
    assert run_config.origins(["tracking.uri"], str(source), overrides, layer) == {"tracking.uri": origin}
    (line,) = [each for each in environment.origins(config, str(source), overrides, layer) if "tracking.uri" in each]
    assert origin.replace("environment", "the variable MLFLOW_TRACKING_URI") in line and str(uri) in line


def test_experiment_and_ray_cluster_are_taken_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    layer = environment.recipe_layer({"MLFLOW_EXPERIMENT_NAME": "theirs", "RAY_ADDRESS": "10.0.0.1:6379"})
    config = run_config.load(str(tmp_path / "mine.yaml"), environment=layer)
    assert (config.tracking.experiment, config.compute.address) == ("theirs", "10.0.0.1:6379")
    assert environment.recipe_layer({"RAY_ADDRESS": "local"}) == {}


def test_the_trials_of_a_sweep_are_tracked_as_the_environment_says(tmp_path: Path) -> None:
    layer = environment.recipe_layer({"MLFLOW_EXPERIMENT_NAME": "theirs"})
    loaded = sweeps.load("toy", [f"data.root={tmp_path}"], environment=layer)
    assert loaded.base.tracking.experiment == "theirs"
    assert loaded.recipe(loaded.samples()[0]).tracking.experiment == "theirs"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_RUN_ID", "abc"),
        ("MLFLOW_EXPERIMENT_ID", "3"),
        ("MLFLOW_REGISTRY_URI", "http://me:hush@other"),
        ("RAY_ADDRESS", "ray://me:hush@10.0.0.1:10001"),
        ("RAY_ADDRESS", "http://10.0.0.1:8265"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fails(ConfigError, name) as caught:
        environment.recipe_layer({name: value})
    assert "hush" not in f"{caught.value}{caught.value.subject}"
    monkeypatch.setenv(name, value)
    for line in (["train", "convnet_aig/toy", "--show"], ["sweep", "toy", "--show"]):
        with fails(ConfigError, name):
            cli.app(args=line, standalone_mode=False)


def test_an_environment_that_is_wrong_is_refused_like_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    layer = environment.recipe_layer({"MLFLOW_TRACKING_URI": "postgresql://me:hu@sh@host/db"})
    with fails(ConfigError, "tracking.uri") as caught:
        run_config.load(str(tmp_path / "mine.yaml"), environment=layer)
    assert "hu" not in str(caught.value).replace("shown", "") and caught.value.subject == ""


@pytest.mark.parametrize(
    "password", ["hu@sh", "hu/sh", "100%hush", "hu#sh", "hu?sh", "hu[sh", "h@u:/%sh", "hu sh", "hu'sh"]
)
def test_a_password_with_reserved_characters_is_refused_and_no_part_of_it_is_shown(
    password: str, tmp_path: Path
) -> None:
    uri = f"postgresql://me:{password}@host:5432/db"
    (tmp_path / "mine.yaml").write_text(RECIPE)
    errors: list[AdaptNetError] = []
    with fails(ConfigError, "tracking.uri") as caught:
        resolve_uri(uri, tmp_path)
    errors.append(caught.value)
    with fails(ConfigError, "tracking.uri") as caught:
        run_config.load(str(tmp_path / "mine.yaml"), [f"tracking.uri={uri!r}"])
    errors.append(caught.value)
    for error in errors:
        shown = f"{error} {error.subject} {error.to_record()}"
        assert not any(part in shown for part in (password, "hu@", "h@u", "hush@", "me:", "sh@host"))


@pytest.mark.parametrize("password", ["hu%40sh", "hu%2Fsh", "hu%3Ash", "100%25hush", "hu:sh", "hu+sh", "hu=sh!"])
def test_a_password_with_codes_is_taken_whole(password: str, tmp_path: Path) -> None:
    from urllib.parse import unquote

    from sqlalchemy.engine import make_url

    uri = f"postgresql://me:{password}@host:5432/db"
    assert resolve_uri(uri, tmp_path) == uri
    read = make_url(uri)
    assert (read.password, read.host, read.database) == (unquote(password), "host", "db")
    assert without_secrets(f"x {uri} y") == "x postgresql://me@host:5432/db y"


def test_a_stored_uri_is_completed_by_the_environment_and_by_no_other_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's recipe and a run folder hold no password."""
    full = "postgresql://me:hush@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", full)
    assert resolve_uri("postgresql://me@host/db", tmp_path) == full
    assert resolve_uri("postgresql://me@other/db", tmp_path) == "postgresql://me@other/db"
    assert resolve_uri(None, tmp_path / "run").startswith("sqlite:///")


@pytest.mark.parametrize("name", ["", " ", "..", "a/../b", ".", "a\nb", "n" * 501])
def test_the_name_of_an_experiment_is_checked_before_a_run(name: str, tmp_path: Path) -> None:
    from pipeline.config import validate
    from pipeline.tracking import TrackingConfig

    with fails(ConfigError, "experiment"):
        validate(TrackingConfig, {"experiment": name}, "recipe")
    assert validate(TrackingConfig, {"experiment": "n" * 500}, "recipe").experiment == "n" * 500


def test_every_verb_reaches_this_machine_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.request import getproxies, proxy_bypass

    from requests.utils import should_bypass_proxies

    variables = {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "a.example"}
    environment.spare_loopback(variables)
    assert variables["no_proxy"] == variables["NO_PROXY"] == "a.example,localhost,127.0.0.1,::1"
    plain: dict[str, str] = {}
    environment.spare_loopback(plain)
    assert plain == {}
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        cli.main(["train", "--list"])
    with pytest.raises(SystemExit):
        cli.main(["runs", "list", "/nowhere"])
    assert getproxies()["https"] and proxy_bypass("127.0.0.1")
    for host in ("127.0.0.1", "localhost"):
        assert should_bypass_proxies(f"http://{host}:5000", None)
    assert not should_bypass_proxies("http://there:5000", None)


def test_rays_sockets_have_a_place_whatever_tmpdir_is(tmp_path: Path) -> None:
    short = Path("/tmp")
    assert scratch_root({}) == scratch_root({"TMPDIR": ""}) == short
    assert scratch_root({"TMPDIR": "/dev/shm"}) == Path("/dev/shm")
    long = tmp_path / ("n" * SOCKET_CHARS)
    long.mkdir()
    for wrong in (str(long), "/no/such", "relative", "/proc"):
        assert scratch_root({"TMPDIR": wrong}) == scratch_root({"RAY_TMPDIR": wrong}) == short
    assert len(str(short) + IN_RAY) < SOCKET_CHARS


def test_a_misspelt_key_is_named_before_a_missing_folder_of_data(tmp_path: Path) -> None:
    with fails(ConfigError, "training.epoch"):
        run_config.load("convnet_aig/cifar10_small", ["training.epoch=3"])
    with fails(ConfigError, "${data_home}"):
        run_config.load("convnet_aig/cifar10_small")


def test_a_rule_about_several_keys_names_those_that_were_given() -> None:
    with fails(ConfigError, "compute.workers", "[3, 2]") as caught:
        run_config.load("convnet_aig/toy", ["compute.workers=[3, 2]", "data.root=/none"])
    assert caught.value.keys == ("compute.workers", "compute")
    with fails(ConfigError, "family.depth", "9"):
        run_config.load("convnet_aig/toy", ["family.depth=9", "data.root=/none"])


def test_show_prints_a_recipe_that_can_be_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@there:5000")
    with pytest.raises(SystemExit):
        cli.main(["train", "convnet_aig/toy", "data.root=/none", "--show"])
    text = capsys.readouterr().out
    assert "hush" not in text and "the variable MLFLOW_TRACKING_URI" in text
    (tmp_path / "shown.yaml").write_text(text)
    shown = run_config.load(str(tmp_path / "shown.yaml"))
    assert shown.tracking.uri == THERE and as_mapping(shown)["name"] == "convnet_aig-toy"
