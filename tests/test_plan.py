"""Planning: the formula's own laws, and what is measured is what a real run has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from raised import fails

from jobs import cli
from pipeline import run_config
from pipeline.bench import advice
from pipeline.bench import plan as plans
from pipeline.bench.measured import MeasuredProfiles
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
    assert cost.metrics == len([key for key in logged if key.startswith(("train/", "time/", "data/", "memory/"))])
    twice = plans.measure(config, images.classes, 16, train=None, timed=False)
    assert twice.activation_bytes == pytest.approx(cost.activation_bytes, rel=0.05) and twice.images_per_s is None


def test_the_verb_prints_measured_and_given_numbers_and_marks_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # for the measurements that are remembered
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


def test_a_measurement_is_remembered_for_the_same_step_only(tmp_path: Path) -> None:
    what = {"classes": 4, "rows": 8}
    MeasuredProfiles(recipe(), what, tmp_path).put(COST)
    found = MeasuredProfiles(recipe("training.batch_size=512", "name=other"), what, tmp_path).find()
    assert found is not None and found.profile == COST
    for other in ("data.side_px=64", "family.depth=20", "training.ema_decay=0.9"):
        assert MeasuredProfiles(recipe(other), what, tmp_path).find() is None
    assert MeasuredProfiles(recipe(), {**what, "rows": 2}, tmp_path).find() is None
    (path,) = tmp_path.iterdir()
    path.write_text("{}")
    assert MeasuredProfiles(recipe(), what, tmp_path).find() is None


def _advice(workers: int, *overrides: str, gpus: int = 4, network: float | None = None) -> str:
    config = recipe(*overrides)
    found = plan(config, workers, IMAGES, COST, network_bytes_per_s=network)
    return "\n".join(advice.advise(config, found, gpus_per_node=gpus))


def test_a_batch_too_small_for_its_gpus_is_answered_with_one_that_fills_them_and_its_learning_rate() -> None:
    text = _advice(32, "training.optimizer.lr=0.1")
    assert "8 images a GPU: batch 256 over 32 GPUs is too small" in text and "with batch 2048 each has 64" in text
    assert "--batch-size 2048 training.scale_lr=linear" in text and "becomes 0.8" in text
    rooted = _advice(32, "training.optimizer.kind=adamw", "training.optimizer.lr=0.001")
    assert "training.scale_lr=sqrt" in rooted and f"becomes {0.001 * 8**0.5:.4g}" in rooted
    assert "lamb" in _advice(256, "training.optimizer.lr=0.1") and "lamb" not in text
    assert "too small" not in _advice(8) + _advice(32, gpus=0)


def test_advice_names_the_workers_that_were_asked_for_unless_the_recipe_has_them() -> None:
    assert "compute.workers=8: one for each GPU" in _advice(8)
    assert "compute.workers=8" not in _advice(8, "compute.workers=8")


def test_advice_names_the_limit_of_the_network_and_the_cores_that_decode() -> None:
    assert "compute.cpus_per_worker=2, so 8 cores on each node" in _advice(2)
    assert "decoding" not in _advice(2, "compute.cpus_per_worker=2")
    slow, fast = _advice(2, network=1e6), _advice(2, network=1e12)
    assert "the network is the limit" in slow and "network" not in fast
    found = plan(recipe(), 2, IMAGES, COST, network_bytes_per_s=1e6)
    batch = int(slow.split("(batch ")[1].split(")")[0])
    enough = plan(recipe(f"training.batch_size={batch}"), 2, IMAGES, COST, network_bytes_per_s=1e6)
    assert found.limit == "network" and enough.step_s == pytest.approx(enough.communication_s, rel=0.05)


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


def test_a_batch_by_option_is_planned_as_it_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["baseline/imagenet_resnet50", "--images", "1281167", "--images-per-s", "3000", "training.scale_lr=linear"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *words, "--nodes", "4", "--gpus-per-node", "8", "--batch-size", "4096"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert re.search(r"images per worker and step +128", printed) and "too small" not in printed
