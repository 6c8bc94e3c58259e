"""Planning: the formula's own laws, and what is measured is what a real run has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from raised import fails

from jobs import cli
from pipeline import run_config
from pipeline.bench import plan as plans
from pipeline.bench.plan import Images, MachineProfile, plan
from pipeline.errors import ConfigError
from pipeline.run_config import RunConfig

COST = MachineProfile(1_000_000, 12_000_000, 8_000_000, 500_000.0, images_per_s=100.0, decoded_per_s=50.0, metrics=15)
IMAGES = Images(64_000, 10, 2000.0)


def recipe(*overrides: str) -> RunConfig:
    return run_config.load("convnet_aig/toy", ["training.batch_size=256", "training.epochs=10", *overrides])


def test_a_worker_alone_sends_nothing_and_takes_images_over_rate() -> None:
    alone = plan(recipe(), 1, IMAGES, COST, network_bytes_per_s=1e9)
    assert alone.gradient_bytes == 0 and alone.rows == 256 and alone.steps == 2500
    assert alone.total_s == pytest.approx(10 * 64_000 / 100)
    assert alone.read_bytes_per_s == 100 * 2000 and alone.decode_cores == 2


@pytest.mark.parametrize("workers", [2, 8, 64, 256])
def test_more_workers_share_the_batch_until_the_network_is_the_limit(workers: int) -> None:
    fast, slow = (plan(recipe(), workers, IMAGES, COST, network_bytes_per_s=n) for n in (1e12, 1e6))
    assert fast.rows * workers == 256 and fast.limit == "computing" and slow.limit == "network"
    assert fast.images_per_s == pytest.approx(100 * workers)
    assert slow.total_s == pytest.approx(slow.steps * 2 * (workers - 1) / workers * 4e6 / 1e6)


def test_accumulation_holds_fewer_images_and_covers_the_share() -> None:
    found = plan(recipe("compute.max_batch_per_worker=50"), 2, IMAGES, COST, network_bytes_per_s=None)
    assert found.rows == 128 and found.micro_rows == 43 and found.memory_bytes == 12e6 + 43 * 5e5
    assert found.communication_s is None and found.limit is None


def test_saves_come_as_often_as_the_recipe_says() -> None:
    for every, seconds in (("5 minutes", 300), ("2 epochs", 1280), ("100 steps", 256)):
        found = plan(recipe(f"checkpoint.every={every}"), 1, IMAGES, COST, network_bytes_per_s=None)
        assert found.save_every_s == pytest.approx(seconds)
        assert found.save_bytes_per_s == pytest.approx(COST.checkpoint_bytes / seconds)
    found = plan(recipe("logging.every=50 steps"), 2, IMAGES, COST, network_bytes_per_s=None)
    assert found.metrics_per_s == pytest.approx(15 * 200 / (50 * 256))


def test_what_is_not_known_stays_unknown() -> None:
    found = plan(recipe(), 2, Images(64_000, 10), MachineProfile(1, 1, 1, 1.0), network_bytes_per_s=1e9)
    unknown = (found.images_per_s, found.step_s, found.read_bytes_per_s, found.decode_cores, found.total_s, found.limit)
    assert unknown == (None,) * 6


def test_a_step_has_an_image_for_each_worker() -> None:
    with fails(ConfigError, "training.batch_size", 256):
        plan(recipe(), 257, IMAGES, COST, network_bytes_per_s=None)


def test_what_is_measured_is_what_a_run_has(finished: dict[str, Path]) -> None:
    run_dir = finished["convnet_aig"]
    config = run_config.load("convnet_aig/toy", ["family.depth=8", f"data.root={run_dir.parents[1] / 'images5'}"])
    found = plans.images_of(config)
    assert found is not None
    images, train = found
    assert images.count == 160 and images.classes == 4
    cost = plans.measure(config, images.classes, 8, train=train)
    saved = sum(file.stat().st_size for file in (run_dir / "checkpoints" / "step-00000010").iterdir())
    assert cost.checkpoint_bytes == pytest.approx(saved, rel=0.05)
    assert cost.state_bytes == pytest.approx(3 * 4 * cost.parameters, rel=0.05)  # weights, gradients, momentum
    assert cost.images_per_s and cost.decoded_per_s
    lines = [json.loads(line) for line in (run_dir / "journal" / "rank0.jsonl").read_text().splitlines()]
    first = next(line["step"] for line in lines if line.get("key") == "train/loss")
    logged = {line["key"] for line in lines if line.get("step") == first and "key" in line}
    assert cost.metrics == len([key for key in logged if key.startswith(("train/", "time/", "data/"))])
    twice = plans.measure(config, images.classes, 16, train=None, timed=False)
    assert twice.activation_bytes == pytest.approx(cost.activation_bytes, rel=0.05) and twice.images_per_s is None


def test_the_verb_prints_measured_and_given_numbers_and_marks_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["plan", "convnet_aig/toy", "--nodes", "2", "--gpus-per-node", "4"]
    with fails(ConfigError, "data.root"):
        cli.app(args=words, prog_name="adaptnet")
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--images", "100000", "--images-per-s", "3000", "--network-gbs", "0.01"])
    printed = capsys.readouterr().out
    assert (
        not ended.value.code
        and "8 workers, 100,000 images" in printed
        and "3,000 images/s on the target machine" in printed
    )
    assert "reading" in printed and "neither measured nor given" in printed and "network: a step computes" in printed


def test_the_table_in_infras_readme_follows_from_the_formulas() -> None:
    """Each figure is compared to the printed digits; r, d and s are those in its text."""
    text = (Path(__file__).parents[1] / "infra" / "README.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(): cells[3:6] for line in text.splitlines() if len(cells := line.split("|")) == 7}
    config = run_config.load("baseline/imagenet_resnet50", ["training.batch_size=8192", "data.root=x"])
    parameters = 25_557_032
    cost = MachineProfile(parameters, 1, 8 * parameters, 1.0, images_per_s=3079, decoded_per_s=273)
    for column, workers in enumerate((8, 64, 512)):
        found = plan(config, workers, Images(1_281_167, 1000, 110e3), cost, network_bytes_per_s=25e9)
        assert found.step_s and found.communication_s and found.images_per_s and found.decode_cores
        assert found.read_bytes_per_s and found.total_s
        wanted = {
            "computing a step": found.step_s,
            "gradients sent by a GPU": found.gradient_bytes / 1e6,
            "time to send them": found.communication_s,
            "images/s of all GPUs": found.images_per_s,
            "read from storage": found.read_bytes_per_s / 1e9,
            "decoding cores per GPU": found.decode_cores,
            "index on each node": found.index_bytes / 1e6,
            "90 epochs": found.total_s / 60,
        }
        for name, value in wanted.items():
            shown = rows[name][column].strip().split()[0].replace(",", "")
            digits = max(1, len(shown.replace(".", "").strip("0")))
            assert float(shown) == pytest.approx(float(f"{value:.{digits}g}"), rel=1e-6), (name, workers, value)
