"""`compute.max_batch_per_worker: auto`: halved on all ranks where memory runs out, and otherwise the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
import two_ranks
from raised import fails
from torch import Tensor

from pipeline import ranks, run_config
from pipeline.data import toy
from pipeline.errors import ConfigError
from pipeline.execution import launch
from pipeline.family import find
from pipeline.training import fitting, state
from pipeline.training.fitting import Fit, Need, Remembered, fit
from pipeline.training.loop import train
from pipeline.training.plan import TrainingPlan
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, split, train_step

DROPPING = tiny.TinyConfig(dropout=0.5)  # it draws random numbers
STEPS = 4


class Limited:
    """`train_step` on a CPU with memory for so many images at once; it fails as torch does, after the forward."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, plan: TrainingPlan, current: TrainState, micros: Sequence[MicroBatch], meter: Meter) -> float:
        for micro in micros:
            plan.forward(micro.images)
            torch.rand(())
            if len(micro.labels) > self.most:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried {len(micro.labels)} images")
        return train_step(plan, current, micros, meter)


def _double(current: TrainState) -> TrainState:
    current.net.double()
    return current


def _batches(rows: slice, parts: int):
    for micros in tiny.batches(0, 1, rows):
        images, labels = micros[0].images.double(), micros[0].labels
        yield [MicroBatch(images[some], labels[some], labels[some]) for some in split(len(labels), parts)]


def _trained(
    folder: Path, rows: slice, need: Need, most: int | None, told: int = 2
) -> tuple[dict[str, Tensor], Fit | None]:
    """A run in fp64 whose micro-batches have `told` images, or as many as fit if memory holds `most` images at once."""
    current = _double(tiny.fresh(tiny.training(), DROPPING))
    plan = tiny.plan(current.net, tiny.training(), DROPPING, total_steps=STEPS)
    found = None if most is None else _fitted(plan, current, need, most)
    max_batch = told if found is None else found.max_batch
    train(plan, current, _batches(rows, need.micros(max_batch)), tiny.Recorder(folder))
    return tiny.tensors(current), found


def _fitted(plan: TrainingPlan, current: TrainState, need: Need, most: int) -> Fit:
    """What fits; neither the state nor the random numbers change."""
    numbers, before = torch.get_rng_state(), {name: each.clone() for name, each in tiny.tensors(current).items()}
    found = fit(plan, current, need, take_step=Limited(most))
    assert torch.equal(torch.get_rng_state(), numbers) and current.step == 0
    assert all(torch.equal(before[name], each) for name, each in tiny.tensors(current).items())
    assert not current.optimizers["main"].state and all(each.grad is None for each in current.net.parameters())
    return found


def test_a_run_whose_micro_batch_was_halved_equals_one_that_had_the_smaller_one(tmp_path: Path) -> None:
    need = Need((8, 8), tiny.SIDE)
    told, _ = _trained(tmp_path / "told", slice(None), need, None)
    halved, found = _trained(tmp_path / "halved", slice(None), need, 5)
    assert found is not None and found.max_batch == 2 and [images for images, *_ in found.failed] == [8]
    for name, value in told.items():
        torch.testing.assert_close(halved[name], value, rtol=1e-9, atol=1e-9, msg=name)


def _of_rank(rank: int, folder: Path) -> None:
    """Rank 1 alone runs out of memory."""
    rows, need = ranks.shard(8, rank, 2), Need((4, 4), tiny.SIDE)
    told, _ = _trained(folder / f"told{rank}", rows, need, None, 1)
    halved, found = _trained(folder / f"halved{rank}", rows, need, 3 if rank == 1 else 100)
    assert found is not None
    torch.save((told, halved, found.max_batch, [rank for _, rank, _ in found.failed]), folder / f"{rank}.pt")


def test_all_ranks_halve_where_one_is_out_of_memory_and_nothing_else_changes(tmp_path: Path) -> None:
    two_ranks.run(_of_rank, tmp_path)
    alone, _ = _trained(tmp_path / "alone", slice(None), Need((8, 8), tiny.SIDE), None)
    for rank in (0, 1):
        told, halved, max_batch, failed = torch.load(tmp_path / f"{rank}.pt")
        assert (max_batch, failed) == (1, [1])
        for name, value in told.items():
            torch.testing.assert_close(halved[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert set(alone) == set(told)


def test_what_fits_is_tried_once_and_changes_nothing() -> None:
    current = tiny.fresh(tiny.training(), DROPPING)
    plan = tiny.plan(current.net, tiny.training(), DROPPING)
    assert fit(plan, current, Need((8, 8), tiny.SIDE)) == Fit(None)
    assert fit(plan, current, Need((8, 8), tiny.SIDE), 3) == Fit(3)
    assert current.step == 0 and not current.optimizers["main"].state


@pytest.mark.parametrize(("fewest", "last"), [(1, 1), (2, 2)])
def test_the_smallest_micro_batch_that_does_not_fit_is_an_error(fewest: int, last: int) -> None:
    current = tiny.fresh(tiny.training())
    plan = tiny.plan(current.net, tiny.training())
    with fails(ConfigError, "compute.max_batch_per_worker", last):
        fit(plan, current, Need((8, 8), tiny.SIDE, fewest), take_step=Limited(0))


def test_another_error_of_a_step_is_raised() -> None:
    current = tiny.fresh(tiny.training())

    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def broken(*_: object) -> float:
        raise error

    with pytest.raises(RuntimeError) as raised:
        fit(tiny.plan(current.net, tiny.training()), current, Need((8, 8), tiny.SIDE), take_step=broken)
    assert raised.value is error and ranks.world() == 1


def test_halves_never_leave_a_rank_without_enough_images() -> None:
    assert [Need((8, 8), 4).halved(each) for each in (None, 4, 2, 1)] == [4, 2, 1, None]
    assert [Need((8, 8), 4, 2).halved(each) for each in (None, 4, 2)] == [4, 2, None]
    assert Need((3, 4), 4, 2).halved(None) is None  # 3 images in two parts: one of a single image
    assert Need((3, 4), 4).halved(2) is None  # 4 parts of 3 images
    assert Need((10, 10), 4).halved(7) == 2  # two parts of 5 images


def test_a_net_with_batchnorm_needs_two_images_at_once() -> None:
    config = run_config.load("baseline/toy", [], data_home="/data")
    net = find("baseline").build(config.family, 2)
    assert fitting.fewest_at_once(net, config.data) == 2
    assert fitting.fewest_at_once(tiny.fresh(tiny.training()).net, config.data) == 1


@pytest.mark.parametrize("recipe", ["baseline/toy", "convnet_aig/toy", "arrn/toy", "ranet/toy", "shape_adaptor/toy"])
def test_trying_leaves_the_state_of_any_family_as_it_was(recipe: str) -> None:
    config = run_config.load(recipe, ["training.ema_decay=0.9", "training.batch_size=8"], data_home="/data")
    family, training, classes = find(config.family.name), config.training, 4
    built = {"num_classes": classes, "seed": 1, "device": tiny.CPU}
    current = state.fresh(family, config.family, training, **built)
    plan = TrainingPlan(family, config.family, training, 1, classes, tiny.CPU, current.net, 8, 0.1)
    before = {name: each.clone() for name, each in tiny.tensors(current).items()}
    found = fit(plan, current, Need((8, 8), config.data.side_px, 2), take_step=Limited(4))
    assert found.max_batch == 2 and current.step == 0 and not any(each.state for each in current.optimizers.values())
    after = tiny.tensors(current)
    assert set(before) == set(after) and all(torch.equal(before[name], each) for name, each in after.items())


def _run(folder: Path, images: Path, max_batch: str) -> dict[str, Tensor]:
    own = [f"data.root={images}", f"tracking.uri=sqlite:///{folder}/mlflow.db", "tracking.register=null"]
    own += ["compute.workers=0", "training.batch_size=16", "training.epochs=1", "evaluation.latency_repeats=0"]
    own += [f"compute.max_batch_per_worker={max_batch}", "data.side_px=16"]
    found = launch.train(run_config.load("baseline/toy", own), folder)
    assert found.finished
    (last,) = sorted((folder / "checkpoints").glob("step-*"))[-1:]
    weights: dict[str, Tensor] = torch.load(last / "state.pt", weights_only=True)["optimizers"]["main"]["state"]
    return {f"{name}.{key}": value for name, each in weights.items() for key, value in each.items()}


def test_a_run_keeps_what_an_earlier_start_has_found(tmp_path: Path) -> None:
    """Its weights are those of a run whose recipe gives this number."""
    images = toy.make(tmp_path / "set", num_classes=4, train=64, val=16, side_px=16, seed=5)
    (tmp_path / "found").mkdir()
    fitting.remember(tmp_path / "found", 4, None)
    found, told = (_run(tmp_path / name, images, value) for name, value in (("found", "auto"), ("told", "4")))
    assert fitting.remembered(tmp_path / "found") == Remembered(4, (16, 16))
    assert not (tmp_path / "told" / fitting.FILE).exists()
    assert found and all(torch.equal(value, told[name]) for name, value in found.items())


def test_a_start_after_a_step_ran_out_of_memory_tries_half_however_many_ranks_say_so(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training(), DROPPING)
    plan = tiny.plan(current.net, tiny.training(), DROPPING, total_steps=STEPS)
    assert fitting.remembered(tmp_path) is None
    for used, half in ((None, 32), (32, 16), (2, 1)):
        step = fitting.remembering(tmp_path, Need((64, 64), 4), used, Limited(0))
        for _ in range(2):  # as of two ranks
            with pytest.raises(RuntimeError):
                step(plan, current, next(iter(tiny.batches(0))), Meter())
            assert fitting.remembered(tmp_path) == Remembered(half, None)


def test_a_step_that_runs_out_with_the_fewest_images_leaves_nothing_to_try(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training(), DROPPING)
    plan = tiny.plan(current.net, tiny.training(), DROPPING, total_steps=STEPS)
    step = fitting.remembering(tmp_path, Need((64, 64), 4, 2), 2, Limited(0))
    with pytest.raises(RuntimeError):
        step(plan, current, next(iter(tiny.batches(0))), Meter())
    assert fitting.remembered(tmp_path) is None


def test_a_remembered_number_that_is_too_small_for_the_net_is_tried_anew(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training(), DROPPING)
    plan = tiny.plan(current.net, tiny.training(), DROPPING, total_steps=STEPS)
    assert fit(plan, current, Need((8, 8), 4, 2), start=1, take_step=Limited(8)).max_batch is None


@pytest.mark.parametrize("other", ["training.cuda_graphs=true", "training.sync_batchnorm=true"])
def test_what_cannot_be_tried_is_refused_before_the_start(tmp_path: Path, other: str) -> None:
    images = toy.make(tmp_path / "set", num_classes=4, train=64, val=16, side_px=16, seed=5)
    own = [f"data.root={images}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "compute.workers=2", other]
    config = run_config.load("baseline/toy", [*own, "compute.max_batch_per_worker=auto"])
    with fails(ConfigError, "training.cuda_graphs" if "graphs" in other else "compute.max_batch_per_worker"):
        launch.train(config, tmp_path / "run")
