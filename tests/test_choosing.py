"""No figure flatters itself: ties count by chance, and a report says how its checkpoint was chosen and computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from jobs import tables
from pipeline.evaluation.evaluate import _results, calibration_error
from pipeline.evaluation.from_weights import chosen_on
from pipeline.family import HELD_OUT, THESE_IMAGES, Latency, Prediction, Report, top1
from pipeline.figures import hits
from pipeline.training.plan import precision_of

LOGITS = torch.tensor(
    [[2.0, 1, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 2, 2, 0, 0, 0], [torch.nan] * 6],
    dtype=torch.bfloat16,
)
LABELS = torch.tensor([0, 1, 5, 0, 0])
FIRST, FIFTH = [1, 1 / 2, 1 / 6, 0, 0], [1, 1, 5 / 6, 1, 0]


class Batch:
    labels = LABELS


def test_a_label_that_shares_its_logit_counts_by_the_chance_of_drawing_it() -> None:
    found = _results(Prediction(LOGITS, torch.zeros(5)), Batch())  # type: ignore[arg-type]
    arrays = {name: value.numpy() for name, value in found.items()}
    assert hits(arrays) == pytest.approx(FIRST)
    assert hits(arrays, 5) == pytest.approx(FIFTH)
    assert top1(LOGITS, LABELS).tolist() == pytest.approx(FIRST)
    wanted = -LOGITS.double().log_softmax(1)[range(len(LABELS)), LABELS]
    assert arrays["loss"].tolist() == pytest.approx(wanted.tolist(), nan_ok=True)


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_the_calibration_error_is_torchmetrics_one(count: int) -> None:
    draw = np.random.default_rng(count)
    confidence = np.concatenate([draw.beta(2, 1, count), [1.0, 1.5e-8]]).astype(np.float32)
    hit = draw.random(count + 2) < confidence
    peer = binary_calibration_error(torch.from_numpy(confidence), torch.from_numpy(hit).int(), n_bins=15, norm="l1")
    assert calibration_error(confidence, hit) == pytest.approx(float(peer), abs=1e-5)


def test_arrays_of_older_evaluations_are_read_as_they_were() -> None:
    arrays = {"predicted": np.array([0, 1]), "labels": np.array([0, 0]), "rank_of_truth": np.array([0, 4])}
    assert hits(arrays).tolist() == [1, 0]
    assert hits(arrays, 5).tolist() == [1, 1]


def test_a_constant_net_has_the_accuracy_of_chance() -> None:
    labels = torch.arange(60) % 6
    found = top1(torch.zeros(60, 6, dtype=torch.bfloat16), labels)
    assert found.mean().item() == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("metric", "images"),
    [("eval/full/top1", THESE_IMAGES), ("held_out/full/top1", HELD_OUT), ("loss", "loss"), ("", "")],
)
def test_the_images_of_the_choice_are_named_by_its_metric(metric: str, images: str) -> None:
    assert chosen_on(metric) == images


def test_a_table_names_precision_and_choice_with_the_last_checkpoints_figure() -> None:
    latency = Latency(1, 2.0, 3.0, 500.0, "a processor", 2, precision="bf16")
    report = Report("full", 10, 0.75, None, 0.1, 1e6, 1e6, 1.0, latency=[latency], precision="bf16")
    chosen = Report(**{**vars(report), "chosen_on": THESE_IMAGES, "last_top1": 0.7})
    text = tables.of_reports([chosen])
    assert "precision: bf16" in text and "2 threads, bf16" in text and "70.00 %" in text and THESE_IMAGES in text
    assert Report.from_json(chosen.to_json()) == chosen
    assert "checkpoint" not in tables.of_reports([report])


def test_a_processor_computes_in_fp32_and_autocast_in_bf16() -> None:
    assert precision_of(torch.device("cpu"), autocast=False) == "fp32"
    assert precision_of(torch.device("cpu"), autocast=True) == "bf16"
