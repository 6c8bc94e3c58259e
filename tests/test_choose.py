"""Choosing recipes: what is recommended is within the limits, fits the images and can be run as printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from raised import fails

from jobs import cli
from pipeline import recipes, run_config
from pipeline.data.toy import make
from pipeline.deploy import choosing, net_costs
from pipeline.deploy.choosing import ImageFolder
from pipeline.errors import AdaptNetError, ConfigError
from pipeline.evaluation.frontier import parse_budget

GUIDE = Path(__file__).parents[1] / "infra" / "docs" / "choose.md"
PHOTOS = ImageFolder(Path("/data/my photos"), (60, 50, 55), 480.0)
MANY = ImageFolder(Path("/data/many"), (5_000,) * 10, 32.0)


def test_every_shipped_recipe_has_a_stored_cost() -> None:
    """Run `python -c "from pipeline.deploy import net_costs; net_costs.write()"` after a change of a family's recipes,
    with the extra `timm` installed."""
    configs = [run_config.load(name, data_home=net_costs.NOWHERE) for name in recipes.names()]
    lacking = [config.name for config in configs if net_costs.key_of(config) not in net_costs.stored()]
    assert not lacking


@pytest.mark.parametrize("family", ["arrn", "baseline", "convnet_aig", "ranet", "shape_adaptor"])
def test_the_stored_cost_is_what_the_net_takes(family: str) -> None:
    config = run_config.load(f"{family}/toy", data_home=net_costs.NOWHERE)
    assert net_costs.measure(config) == net_costs.of(f"{family}/toy")


@pytest.mark.parametrize("folder", [PHOTOS, MANY], ids=["photos", "many"])
@pytest.mark.parametrize("limit", ["60M", "300M", "2G", "6G"])
def test_what_is_recommended_is_within_the_limit_and_few_and_each_of_its_kind(folder: ImageFolder, limit: str) -> None:
    found = choosing.recommend(folder, max_macs=parse_budget(limit))
    assert 1 <= len(found) <= choosing.MOST
    kinds = [each.candidate.tuned or each.candidate.family for each in found]
    assert len(set(kinds)) == len(kinds)
    for each in found:
        cost = each.candidate.cost
        assert each.candidate.macs <= parse_budget(limit).amount and each.candidate.within
        assert all(cost.policies.get(name, cost.macs) <= parse_budget(limit).amount for name in each.candidate.within)


@pytest.mark.parametrize("limit", ["6M", "20M", "60M", "300M"])
def test_no_net_is_recommended_for_its_poorest_policy_alone(limit: str) -> None:
    folder = ImageFolder(Path("/images"), (600,) * 12, 48.0)
    for each in choosing.recommend(folder, max_macs=parse_budget(limit)):
        assert each.candidate.macs >= each.candidate.cost.macs / 8, each.candidate.recipe


def test_few_images_a_class_put_trained_weights_first() -> None:
    assert choosing.recommend(PHOTOS)[0].candidate.tuned
    assert not choosing.recommend(MANY)[0].candidate.tuned


def test_the_side_of_the_images_decides_between_recipes_of_a_family() -> None:
    assert all(each.candidate.cost.side_px == 32 for each in choosing.recommend(MANY))
    assert all(each.candidate.cost.side_px >= 128 for each in choosing.recommend(PHOTOS))


@pytest.mark.parametrize("folder", [PHOTOS, MANY], ids=["photos", "many"])
def test_each_printed_command_is_a_recipe_that_resolves(folder: ImageFolder) -> None:
    from test_readme import parse

    for each in choosing.recommend(folder):
        parse(each.command)
        words = shlex.split(each.command)
        config = run_config.load(words[2], [word for word in words[3:] if word.startswith("data.")], data_home="/d")
        assert config.data.root == folder.root


@pytest.mark.parametrize("folder", [PHOTOS, MANY], ids=["photos", "many"])
def test_a_command_for_a_clusters_recipe_takes_no_more_cpus_than_there_are(
    folder: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing.os, "cpu_count", lambda: 4)
    for each in choosing.recommend(folder):
        words = shlex.split(each.command)
        config = run_config.load(words[2], [word for word in words if word.startswith("compute.")], data_home="/d")
        assert config.compute.workers == 1 or each.candidate.config.compute.device != "cuda"
        assert config.compute.cpus_per_worker == min(4, each.candidate.config.compute.cpus_per_worker)


def test_macs_that_training_changes_are_said_to_be_those_of_its_start() -> None:
    found = [each for each in choosing.candidates(None) if each.family in ("shape_adaptor", "ranet")]
    assert {each.family for each in found} == {"shape_adaptor", "ranet"}
    for each in found:
        text = " ".join(choosing._reasons(each, MANY))
        assert ("at the start of the training" in text) is (each.family == "shape_adaptor")


def test_a_limit_in_time_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ms(each: choosing.Candidate) -> dict[str, float]:
        asked.append(each.recipe)
        return dict.fromkeys(each.within, 3.0 if each.family == "baseline" else 7.0)

    monkeypatch.setattr(choosing, "measured_ms", ms)
    found = choosing.recommend(MANY, latency=parse_budget("5ms"))
    assert {each.candidate.family for each in found} == {"baseline"} and asked
    with fails(ConfigError, "--latency", subject="1ms"):
        choosing.recommend(MANY, latency=parse_budget("1ms"))


def test_recipes_that_train_within_an_hour_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first = []
    for peak in (1e9, 1e18):  # MACs a second
        monkeypatch.setattr(choosing, "machine_peak", lambda peak=peak: peak)
        first.append(choosing.recommend(PHOTOS)[0].candidate)
    slow, fast = first
    assert slow.tuned and fast.tuned and slow.macs < fast.macs


def test_a_limit_on_training_hours_leaves_out_what_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "machine_peak", lambda: 5e10)
    everything = {each.candidate.recipe: each.candidate.hours for each in choosing.recommend(PHOTOS)}
    most = sorted(everything.values())[0]
    assert all(each.candidate.hours <= most for each in choosing.recommend(PHOTOS, max_hours=most))
    with fails(ConfigError, "--max-hours", subject=1e-9):
        choosing.recommend(PHOTOS, max_hours=1e-9)


def test_training_hours_are_three_passes_of_all_images() -> None:
    each = next(each for each in choosing.candidates(None) if each.recipe == "baseline/cifar10_resnet20")
    images = each.config.training.epochs * MANY.images
    assert choosing.training_hours(each, MANY, 3 * each.cost.macs * images) == pytest.approx(1 / 3600)


def test_it_says_why_no_recipe_with_trained_weights_is_recommended() -> None:
    for each in choosing.recommend(PHOTOS, max_macs=parse_budget("100M")):
        assert not each.candidate.tuned and any("baseline/finetune" in reason for reason in each.reasons)


def test_a_limit_below_every_net_is_refused() -> None:
    with fails(ConfigError, "--max-macs", subject="1k"):
        choosing.recommend(MANY, max_macs=parse_budget("1k"))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ([], "--images"),
        (["--images", "x", "--max-macs", "5ms"], "--max-macs"),
        (["--images", "x", "--max-macs", "300"], "--max-macs"),
        (["--images", "x", "--max-macs", "many"], "--max-macs"),
        (["--images", "x", "--latency", "3G"], "--latency"),
        (["--images", "x", "--max-macs", "3G"], "data.root"),
    ],
)
def test_a_wrong_option_is_refused_by_its_key(words: list[str], key: str) -> None:
    with pytest.raises(AdaptNetError) as caught:
        cli.app(args=["choose", *words], standalone_mode=False)
    assert caught.value.key == key


def test_the_command_answers_as_a_table_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "toy", num_classes=3, train=30, val=6, side_px=24)
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["choose", "--images", str(root), "--max-macs", "300M", *words])
        assert ended.value.code in (None, 0)
        printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["folder"]["class_counts"] == [10, 10, 10] and 1 <= len(found["recommended"]) <= 3
    assert all(each["macs"] <= 300e6 and each["command"] for each in found["recommended"])


def test_the_guide_holds_the_table_of_the_command() -> None:
    """To accept a change: `adaptnet choose --table`, below the comment of that name."""
    text = GUIDE.read_text(encoding="utf-8").partition("<!-- adaptnet choose --table -->\n")[2]
    assert text.strip() == choosing.markdown()
