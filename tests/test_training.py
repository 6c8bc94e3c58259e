"""Tests of the training loop, on a net small enough to reason about."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import two_ranks
from raised import fails
from torch import Tensor, nn

from pipeline import ranks
from pipeline.config import validate
from pipeline.data.config import DataConfig
from pipeline.data.dali import DecodedEvalBatch
from pipeline.errors import ConfigError, ContractError, DivergedError
from pipeline.evaluation.evaluate import Evaluator, _waited_s, evaluate
from pipeline.families.convnet_aig.model import AigOutput
from pipeline.family import Params, Prediction, find
from pipeline.training import checkpoint, optim, state
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import train
from pipeline.training.optimizers.adamw import AdamWConfig
from pipeline.training.optimizers.lamb import LambConfig
from pipeline.training.optimizers.sgd import SgdConfig
from pipeline.training.schedules.base import ScheduleConfig
from pipeline.training.schedules.constant import ConstantConfig
from pipeline.training.schedules.cosine import CosineConfig
from pipeline.training.schedules.linear import LinearConfig
from pipeline.training.schedules.steps import StepsConfig
from pipeline.training.schedules.wsd import WsdConfig
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, num_micros, smooth, split, train_step

OPTIMIZERS = {"sgd": SgdConfig, "adamw": AdamWConfig, "lamb": LambConfig}


def test_schedules_are_closed_forms_of_the_epoch() -> None:
    cosine = CosineConfig(warmup_epochs=5, final_lr=0.1)
    assert cosine.lr_factor(2.5, 90) == 0.5
    assert cosine.lr_factor(5, 90) == 1.0
    assert cosine.lr_factor(47.5, 90) == pytest.approx(0.55)
    assert cosine.lr_factor(90, 90) == pytest.approx(0.1)
    linear = LinearConfig(warmup_epochs=5, final_lr=0.2)
    assert [linear.lr_factor(e, 25) for e in (2.5, 5, 15, 25)] == pytest.approx([0.5, 1, 0.6, 0.2])
    wsd = WsdConfig(warmup_epochs=2, decay_epochs=4)
    assert [wsd.lr_factor(e, 20) for e in (1, 2, 16, 17, 20)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    straight = WsdConfig(decay_epochs=4, curve="linear", final_lr=0.2)
    assert [straight.lr_factor(e, 20) for e in (0, 16, 18, 20)] == pytest.approx([1, 1, 0.6, 0.2])
    steps = StepsConfig(milestones=(150, 250))
    assert [steps.lr_factor(e, 350) for e in (0, 149.9, 150, 250)] == pytest.approx([1, 1, 0.1, 0.01])


SCHEDULES = [ConstantConfig(), StepsConfig(milestones=(2,)), WsdConfig(decay_epochs=1), CosineConfig(), LinearConfig()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("epoch", [2.9, 3.1, 4.0])
def test_epochs_are_raised_on_resume_where_no_rate_up_to_there_would_have_differed(
    schedule: ScheduleConfig, epoch: float
) -> None:
    fixed = tiny.training(epochs=7.0, schedule=schedule).why_not_extended(epoch, 4.0)
    so_far = [epoch * share for share in (0.0, 0.3, 0.6, 0.9, 1.0)]
    differs = [schedule.lr_factor(each, 4.0) for each in so_far] != [schedule.lr_factor(each, 7.0) for each in so_far]
    assert (fixed is not None) == differs
    assert tiny.training(epochs=3.5, schedule=schedule).why_not_extended(2.0, 4.0) is not None


def test_micro_batches_of_any_number_give_the_step_of_the_whole_batch() -> None:
    found = []
    for parts in (1, 2, 3):
        current = tiny.fresh(tiny.training())
        source = tiny.batches(0, parts)
        for _ in range(4):
            train_step(tiny.plan(current.net, tiny.training()), current, next(source), Meter())
        found.append(tiny.tensors(current))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


SHAPED = tiny.TinyConfig(shaped=True)
WITH_SHAPE = tiny.training(other_optimizers={"shape": SgdConfig(lr=0.3)})


def four_steps(rows: slice = slice(None)) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A state with parameters apart after four steps of this rank's rows, and what the meter holds."""
    current, meter = tiny.fresh(WITH_SHAPE, SHAPED), Meter()
    plan, source = tiny.plan(current.net, WITH_SHAPE, SHAPED), tiny.batches(0, 1, rows)
    for _ in range(4):
        train_step(plan, current, next(source), meter)
    return tiny.tensors(current), meter.flush()


def _two_ranks(rank: int, folder: Path) -> None:
    rows = slice(0, 3) if rank == 0 else slice(3, 8)  # unequal shares
    torch.save(four_steps(rows), folder / f"two{rank}.pt")
    current = tiny.fresh(tiny.training())
    plan = tiny.plan(current.net, tiny.training(), total_steps=100)
    try:
        bad = tiny.Recorder(folder / f"saves{rank}")
        source = tiny.batches(0, 1, rows)

        def poisoned():
            for number, micros in enumerate(source):
                if rank == 1 and number == 3:
                    micros[0].images[0] = math.nan
                yield micros

        train(plan, current, poisoned(), bad)
    except DivergedError as error:
        torch.save((error.step, error.checkpoint), folder / f"diverged{rank}.pt")


def test_two_ranks_with_unequal_shares_equal_one_and_diverge_at_the_same_step(tmp_path: Path) -> None:
    two_ranks.run(_two_ranks, tmp_path)
    mine, means = four_steps()
    assert (mine["net.alpha"] - torch.tensor([0.5, -0.5])).abs().min() > 1e-3
    for rank in (0, 1):
        theirs, their_means = torch.load(tmp_path / f"two{rank}.pt")
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert their_means == pytest.approx(means, abs=1e-6)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"diverged{rank}.pt") == (3, None)


def test_each_update_moves_its_own_parameters_alone() -> None:
    current = tiny.fresh(WITH_SHAPE, SHAPED)
    plan, source, moved = tiny.plan(current.net, WITH_SHAPE, SHAPED), tiny.batches(0), []
    for name in ("main", "shape"):
        family = dataclasses.replace(tiny.FAMILY, updates=lambda config, step, name=name: [name])
        before = {key: value.clone() for key, value in current.net.state_dict().items()}
        train_step(dataclasses.replace(plan, family=family), current, next(source), Meter())
        moved.append({key for key, value in current.net.state_dict().items() if not torch.equal(value, before[key])})
    assert moved == [set(before) - {"alpha"}, {"alpha"}]
    assert current.net.alpha.requires_grad


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_equals_uninterrupted_bitwise(tmp_path: Path, kind: str) -> None:
    settings = tiny.training(optimizer=OPTIMIZERS[kind](lr=0.01), ema_decay=0.9, clip_norm=1.0, label_smoothing=0.1)
    noisy = tiny.TinyConfig(dropout=0.3)
    whole = tiny.fresh(settings, noisy)
    assert train(tiny.plan(whole.net, settings, noisy, total_steps=12), whole, tiny.batches(0), tiny.Recorder(tmp_path))

    again = tiny.fresh(settings, noisy)
    torch.manual_seed(99)
    state.restore(again, checkpoint.read(tmp_path / "step-00000005"))
    assert again.step == 5
    recorder = tiny.Recorder(tmp_path / "again")
    train(tiny.plan(again.net, settings, noisy, total_steps=12), again, tiny.batches(5), recorder)
    theirs = tiny.tensors(again)
    for name, value in tiny.tensors(whole).items():
        assert torch.equal(theirs[name], value), name
    assert recorder.saved == [10, 12]


def test_a_stopped_training_saves_at_its_last_step(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training())
    recorder = tiny.Recorder(tmp_path, stop_at=1)
    finished = train(tiny.plan(current.net, tiny.training(), total_steps=12), current, tiny.batches(0), recorder)
    assert not finished
    assert recorder.storage.names() == [checkpoint.name_of(current.step)]


def test_events_in_epochs_fall_on_the_first_step_at_or_past_the_border(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training())
    recorder = tiny.Recorder(tmp_path)
    every = tiny.plan(
        current.net,
        tiny.training(),
        total_steps=13,
        evaluate_every="0.5 epochs",
        log_every="100 steps",
        save_every="100 steps",
    )
    train(every, current, tiny.batches(0), recorder)
    assert recorder.evaluated == [3, 5, 8, 10, 13]  # half an epoch is 2.5 steps
    assert list(recorder.logged) == [13]


def test_times_are_shares_that_add_up(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training())
    recorder = tiny.Recorder(tmp_path)
    train(tiny.plan(current.net, tiny.training(), total_steps=6), current, tiny.batches(0), recorder)
    for values in recorder.logged.values():
        shares = [value for key, value in values.items() if key.endswith("_share")]
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1)


def test_divergence_reports_the_step_and_the_last_good_checkpoint_and_saves_nothing_more(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training())
    recorder = tiny.Recorder(tmp_path)

    def poisoned():
        for step, micros in enumerate(tiny.batches(0)):
            if step == 8:
                micros[0].images[0] = math.inf
            yield micros

    with fails(DivergedError, "training.optimizer.lr") as caught:
        train(tiny.plan(current.net, tiny.training(), total_steps=20), current, poisoned(), recorder)
    assert (caught.value.step, caught.value.checkpoint) == (8, "step-00000005")
    assert recorder.storage.names() == ["step-00000005"]


def test_a_gradient_that_is_not_finite_is_found_before_its_weights_are_saved(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training())
    recorder = tiny.Recorder(tmp_path)

    def poisoned():
        for step, micros in enumerate(tiny.batches(0)):
            if step == 9:  # the last before the save at 10: its loss is finite
                current.net.head.weight.register_hook(lambda gradient: gradient * math.nan)
            yield micros

    with fails(DivergedError, "training.optimizer.lr") as caught:
        train(tiny.plan(current.net, tiny.training(), total_steps=20), current, poisoned(), recorder)
    assert (caught.value.step, caught.value.checkpoint) == (9, "step-00000005")
    assert recorder.storage.names() == ["step-00000005"]


def test_every_evaluation_is_followed_by_a_save(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training())
    recorder = tiny.Recorder(tmp_path)
    plan = tiny.plan(current.net, tiny.training(), total_steps=10, evaluate_every="4 steps", save_every="7 steps")
    train(plan, current, tiny.batches(0), recorder)
    assert (recorder.evaluated, recorder.saved) == ([4, 8, 10], [4, 7, 8, 10])


def test_minutes_are_a_span_for_logging_too(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training())
    recorder = tiny.Recorder(tmp_path)
    plan = tiny.plan(current.net, tiny.training(), total_steps=12, log_every="0.00001 minutes", save_every="100 steps")
    train(plan, current, tiny.batches(0), recorder, sync_every_s=0.0)
    assert len(recorder.logged) > 3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_restored_moments_have_the_memory_format_of_their_weights(tmp_path: Path, kind: str) -> None:
    settings = tiny.training(optimizer=OPTIMIZERS[kind]())
    baseline = find("baseline")
    config = validate(baseline.config, {"name": "baseline", "net": "cifar_resnet", "depth": 8}, "family")

    def fresh() -> TrainState:
        return state.fresh(baseline, config, settings, num_classes=3, seed=1, device=tiny.CPU, channels_last=True)

    old, new = fresh(), fresh()
    torch.autograd.backward(old.net(torch.randn(2, 3, 8, 8)).logits.sum())
    old.optimizers["main"].step()
    tiny.Recorder(tmp_path).save(old, wait=True)
    state.restore(new, checkpoint.read(tmp_path / "step-00000000"))
    found = [(p, m) for p, kept in new.optimizers["main"].state.items() for m in kept.values() if m.dim() == 4]
    assert found and all(moment.stride() == parameter.stride() for parameter, moment in found)
    assert any(parameter.stride()[1] == 1 for parameter, _ in found)  # channels_last in truth


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_changed_optimizer_setting_applies_after_a_restore_and_the_moments_stay(kind: str) -> None:
    before = tiny.training(optimizer=OPTIMIZERS[kind](lr=0.1, weight_decay=0.01))
    after = tiny.training(optimizer=OPTIMIZERS[kind](lr=0.02, weight_decay=0.3))
    old, new = tiny.fresh(before), tiny.fresh(after)
    source = tiny.batches(0)
    for _ in range(3):
        train_step(tiny.plan(old.net, before), old, next(source), Meter())
    state.restore(new, state.to_mapping(old))
    group = new.optimizers["main"].param_groups[0]
    assert (group["full_lr"], group["weight_decay"]) == (0.02, 0.3)
    moments = {name: value for name, value in tiny.tensors(old).items() if name.startswith("main.")}
    assert moments and all(torch.equal(tiny.tensors(new)[name], value) for name, value in moments.items())


def _evaluate_one(rank: int, folder: Path) -> None:
    """One image over two ranks, which the second one has."""

    class Batches:
        unreadable = ()

        def __iter__(self):
            if rank == 1:
                images = torch.zeros(1, tiny.SIDE, tiny.SIDE, 3, dtype=torch.uint8)
                yield DecodedEvalBatch(images, torch.tensor([2]), np.array([0]))

    class Whole:
        name, kind, settings = "whole", "whole", dict[str, int]()

        def predict(self, net: nn.Module, images: Tensor) -> Prediction:
            return Prediction(net(images).logits, torch.ones(len(images), dtype=torch.float64))

    data = DataConfig(root=Path("nowhere"), side_px=tiny.SIDE)
    how = Evaluator(data=data, device=tiny.CPU, num_classes=tiny.CLASSES)
    net = tiny.fresh(tiny.training()).net
    (report,) = evaluate(net, [Whole()], Batches(), how)
    torch.save(report.num_images, folder / f"{rank}.pt")


def test_fewer_images_than_ranks_are_evaluated(tmp_path: Path) -> None:
    two_ranks.run(_evaluate_one, tmp_path)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [1, 1]


def test_norms_and_biases_decay_only_if_the_recipe_says_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    groups = {"main": [Params(list(net.parameters()))]}
    for spared in (False, True):
        built = optim.build(groups, net, tiny.training(decay_norms_and_biases=not spared))["main"]
        bare = sum(len(g["params"]) for g in built.param_groups if g["weight_decay"] == 0)
        assert bare == (4 if spared else 0)


def test_groups_that_are_no_partition_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with fails(ContractError, "groups", "1.weight, 1.bias"):
        optim.build({"main": [Params(list(net[0].parameters()))]}, net, tiny.training())


def test_the_moving_average_follows_and_forgets_the_start() -> None:
    net, ema = nn.Linear(2, 2), nn.Linear(2, 2)
    state.update_ema(ema, net, 0.999, 0)
    assert torch.allclose(ema.weight, net.weight, atol=0.2)
    before = ema.weight.clone()
    state.update_ema(ema, net, 0.999, 10**6)
    torch.testing.assert_close(ema.weight, before + 0.001 * (net.weight - before))


def test_smoothing_spreads_mass_evenly() -> None:
    soft = smooth(torch.tensor([1]), 4, 0.2)
    torch.testing.assert_close(soft, torch.tensor([[0.05, 0.85, 0.05, 0.05]]))


def test_micro_batches_fill_the_cap_and_impossible_ones_are_refused() -> None:
    assert num_micros((128, 128), 2, 64) == 2
    assert num_micros((85, 86), 3, 64) == 2
    assert num_micros((128, 128), 2, None) == 1
    with fails(ConfigError, "compute.max_batch_per_worker", 1):
        num_micros((1, 2), 2, 1)


def test_a_squared_rate_of_micro_batches_is_that_of_their_outputs_together() -> None:
    """With BatchNorm in training, which normalises each micro-batch, and moves its statistics once."""
    family = find("convnet_aig")
    config = family.config(depth=8, target_rate=0.4)
    current = state.fresh(family, config, tiny.training(), num_classes=3, seed=3, device=tiny.CPU)
    expected = copy.deepcopy(current.net).double().train()
    current.net.double().train()
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    parts = [MicroBatch(images[some], labels[some], labels[some]) for some in split(6, 2)]
    outputs = []
    for number, micro in enumerate(parts):
        torch.manual_seed(state.seed_of(3, "noise", 0, number, 0))
        outputs.append(expected(micro.images))
    whole = AigOutput(torch.cat([each.logits for each in outputs]), torch.cat([each.gates for each in outputs]))
    total = family.loss(config, whole, labels).total
    total.backward()
    found: dict[str, torch.Tensor] = {}
    names = {id(parameter): name for name, parameter in current.net.named_parameters()}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found.update({names[id(p)]: p.grad.clone() for group in optimizer.param_groups for p in group["params"]})

    current.optimizers["main"].register_step_pre_hook(keep)
    meter = Meter()
    plan = dataclasses.replace(
        tiny.plan(current.net, tiny.training(batch_size=6)), family=family, config=config, batch_size=6
    )
    train_step(plan, current, parts, meter)
    assert meter.flush()["loss"] == pytest.approx(total.item(), abs=1e-9)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(current.net.get_buffer(name), buffer, rtol=1e-12, atol=1e-12, msg=name)


def test_shards_partition_any_length() -> None:
    for length in (1, 7, 64):
        for world in (1, 2, 3, 7):
            covered = [i for rank in range(world) for i in range(length)[ranks.shard(length, rank, world)]]
            assert covered == list(range(length))


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say how long threads waited")
def test_the_time_that_threads_waited_for_a_core_is_measured() -> None:
    cores = os.sched_getaffinity(0)
    work = [threading.Thread(target=lambda: hashlib.sha256(bytes(200_000_000))) for _ in range(3)]
    before = _waited_s()
    os.sched_setaffinity(0, {min(cores)})
    try:
        for thread in work:
            thread.start()
        time.sleep(0.2)
        while_they_ran = _waited_s() - before
    finally:
        os.sched_setaffinity(0, cores)
        for thread in work:
            thread.join()
    assert while_they_ran > 0.1  # of three threads' 0.2 s, two thirds


def test_a_batch_above_the_training_images_is_warned_of() -> None:
    training = TrainingConfig(batch_size=64)
    assert training.above(64) is None and "64" in (training.above(63) or "")
