"""Learning from a teacher: neither ranks, micro-batches nor a cut change a step, and the teacher learns nothing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
import two_ranks
from raised import fails
from torch import Tensor, nn

from pipeline import run_config
from pipeline.bench import plan as plans
from pipeline.data import toy
from pipeline.errors import CheckpointError, ConfigError
from pipeline.execution import launch, seeds, teaching
from pipeline.families.convnet_aig.model import Aig, AigConfig
from pipeline.family import AnyFamily, FamilyConfig, find
from pipeline.run_config import RunConfig
from pipeline.runs import journal
from pipeline.training import checkpoint, optim, state, step
from pipeline.training.distillation import Teacher, TrainedTeacher, WholeNetTeacher, divergence
from pipeline.training.loop import train
from pipeline.training.losses.binary_cross_entropy import BinaryCrossEntropyConfig
from pipeline.training.plan import TrainingPlan
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, train_step
from pipeline.training.teachers.base import TeacherConfig
from pipeline.training.teachers.trained import TrainedTeacherConfig
from pipeline.training.teachers.whole_net import WholeNetTeacherConfig

IMAGES, CLASSES, SIDE_PX = 8, 3, 8
HOW: dict[str, TeacherConfig] = {
    "trained": TrainedTeacherConfig(source="unused", weight=0.3, temperature=2.0),
    "whole_net": WholeNetTeacherConfig(weight=0.6, temperature=4.0),
}


class Answering(nn.Module):
    """A net with BatchNorm, whose answers in eval mode are its own for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
        )

    def forward(self, images: Tensor) -> tiny.Logits:
        return tiny.Logits(self.layers(images))


def other_net() -> nn.Module:
    torch.manual_seed(5)
    net = Answering()
    net(torch.randn(4, 3, SIDE_PX, SIDE_PX))  # BatchNorm has statistics
    return net.eval().requires_grad_(False)


def opened(kind: str, **changes: object) -> tuple[TrainingPlan, TrainState]:
    """A gated net, whose loss is of the whole batch, taught by a net of its own kind."""
    family, config = find("convnet_aig"), AigConfig(depth=8, target_rate=0.6)
    training = tiny.training(batch_size=IMAGES, teacher=HOW[kind], **changes)
    current = state.fresh(family, config, training, num_classes=CLASSES, seed=3, device=tiny.CPU)
    plan = tiny.plan(current.net, training)
    return dataclasses.replace(plan, family=family, config=config, teacher=teacher_of(kind, family, config)), current


def teacher_of(kind: str, family: AnyFamily, config: FamilyConfig) -> Teacher:
    if kind == "trained":
        return TrainedTeacher(other_net())
    whole = family.whole(config)
    assert not isinstance(whole, str)
    return WholeNetTeacher(whole)


class Fixed(nn.Module):
    """The net with the noise of each image taken from its first pixel's row."""

    def __init__(self, net: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, images: Tensor) -> object:
        return self.net(images, self.noise[images[:, 0, 0, 0].long()])


def stepped(kind: str, rows: slice, parts: int) -> dict[str, Tensor]:
    """The weights and the metrics after a step in fp64 of these rows over `parts` micro-batches, BatchNorm frozen."""
    plan, current = opened(kind)
    torch.manual_seed(12)
    images = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX, dtype=torch.float64)
    images[:, 0, 0, 0] = torch.arange(IMAGES) + 0.5
    labels, noise = torch.arange(IMAGES) % CLASSES, current.net.draw_noise(IMAGES)
    current.net.double().train()
    for module in current.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if isinstance(plan.teacher, TrainedTeacher):
        plan.teacher.net.double()
    forward, _ = step.wrap(Fixed(current.net, noise), plan.training, tiny.CPU)
    plan = dataclasses.replace(plan, forward=forward)
    pieces = [(images[rows][some], labels[rows][some]) for some in step.split(len(labels[rows]), parts)]
    meter = Meter()
    train_step(plan, current, [MicroBatch(x, y, y) for x, y in pieces], meter)
    return {**current.net.state_dict(), **{name: torch.tensor(value) for name, value in meter.flush().items()}}


STEPS = [(1, 4), (2, 3), (4, 4)]  # micro-batches of each rank, and the images of rank 0


def _of_two(rank: int, folder: Path) -> None:
    shares = {cut: slice(0, cut) if rank == 0 else slice(cut, IMAGES) for _, cut in STEPS}
    found = {
        (kind, parts): stepped(kind, shares[cut], min(parts, 3 if cut == 3 else parts))
        for kind in HOW
        for parts, cut in STEPS
    }
    torch.save(found, folder / f"{rank}.pt")


def same(found: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert set(found) == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", HOW)
def test_micro_batches_do_not_change_a_taught_step(kind: str) -> None:
    whole = stepped(kind, slice(None), 1)
    assert whole["teacher_divergence"] > 0
    for parts in (2, 4):
        same(stepped(kind, slice(None), parts), whole)


def test_ranks_do_not_change_a_taught_step(tmp_path: Path) -> None:
    two_ranks.run(_of_two, tmp_path)
    for rank in (0, 1):
        for (kind, _), found in torch.load(tmp_path / f"{rank}.pt").items():
            same(found, stepped(kind, slice(None), 1))


def test_the_loss_is_hintons_and_leaves_the_teacher_alone() -> None:
    plan, current = opened("trained")
    teacher = plan.teacher
    assert isinstance(teacher, TrainedTeacher)
    before = copy.deepcopy(teacher.net.state_dict())
    images, labels = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX), torch.arange(IMAGES) % CLASSES
    reference = copy.deepcopy(current.net)
    torch.manual_seed(state.seed_of(plan.seed, "noise", 0, 0, 0))
    output = reference.train()(images)
    p, q = (teacher.net(images).logits / 2).softmax(1), (output.logits / 2).softmax(1)
    hinton = 4 * (p * (p / q).log()).sum(1).mean()
    loss = 0.7 * F.cross_entropy(output.logits, labels) + 0.3 * hinton
    rates = plan.family.loss(plan.config, output, labels, lambda *_: torch.zeros(())).total
    (loss + rates).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters()}

    found: dict[str, Tensor] = {}
    (optimizer,) = current.optimizers.values()
    optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in current.net.named_parameters()})
    )
    meter = Meter()
    train_step(plan, current, [MicroBatch(images, labels, labels)], meter)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    values = meter.flush()
    assert values["loss"] == pytest.approx((loss + rates).item(), rel=1e-5)
    assert values["teacher_divergence"] == pytest.approx(hinton.item(), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())
    assert all(p.grad is None for p in teacher.net.parameters())


def test_the_whole_net_gets_no_gradient_as_a_teacher_and_keeps_its_mode_and_statistics() -> None:
    plan, current = opened("whole_net")
    net = current.net.train()
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    modes = [module.training for module in net.modules()]
    before = copy.deepcopy(net.state_dict())
    images = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX)
    assert plan.teacher is not None
    answers = plan.teacher(net, images)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    logits = net(images).logits
    divergence(logits, answers, 2.0).backward()
    constant = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    divergence(net(images, None).logits.detach().requires_grad_(), answers, 2.0).backward()
    assert constant
    assert all(p.grad is None for p in net.parameters())


def test_all_gates_of_the_whole_net_are_open() -> None:
    plan, current = opened("whole_net")
    net, images = current.net.eval(), torch.randn(2, 3, SIDE_PX, SIDE_PX)
    assert isinstance(net, Aig)
    assert plan.teacher is not None
    answers = plan.teacher(net, images)
    for gate in net.gates():
        nn.init.constant_(gate.fc2.bias[1:], 1e6)  # type: ignore[index]
    torch.testing.assert_close(net(images).logits, answers)


@pytest.mark.parametrize("kind", HOW)
def test_a_resumed_run_has_the_answers_of_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    def run(steps: int, folder: Path) -> TrainState:
        plan, current = opened(kind, ema_decay=0.9)
        events = tiny.Recorder(folder)
        if (last := events.last_good()) is not None:
            state.restore(current, checkpoint.read(folder / last))
        train(dataclasses.replace(plan, total_steps=steps), current, batches(current.step), events)
        return current

    whole = tiny.tensors(run(6, tmp_path / "whole"))
    run(3, tmp_path / "cut")
    found = tiny.tensors(run(6, tmp_path / "cut"))
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def batches(start: int) -> Iterator[list[MicroBatch]]:
    while True:
        generator = torch.Generator().manual_seed(start)
        images = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX, generator=generator)
        labels = torch.arange(IMAGES) % CLASSES
        yield [MicroBatch(images[some], labels[some], labels[some]) for some in (slice(0, 4), slice(4, 8))]
        start += 1


def test_the_answers_alone_do_not_depend_on_the_labels() -> None:
    how = TrainedTeacherConfig(source="unused", weight=1.0)
    plan, current = opened("trained")
    plan = dataclasses.replace(
        plan, training=plan.training.model_copy(update={"teacher": how, "loss": BinaryCrossEntropyConfig()})
    )
    images, moved = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX), []
    for shift in (0, 1):
        mine = copy.deepcopy(current)
        mine.optimizers = optim.build(plan.family.groups(plan.config, mine.net), mine.net, plan.training)
        labels = (torch.arange(IMAGES) + shift) % CLASSES
        train_step(dataclasses.replace(plan, forward=mine.net), mine, [MicroBatch(images, labels, labels)], Meter())
        moved.append(mine.net.state_dict())
    assert all(torch.equal(value, moved[1][name]) for name, value in moved[0].items())
    assert not all(torch.equal(value, moved[0][name]) for name, value in current.net.state_dict().items())


def test_a_teacher_of_other_pixels_sees_its_own() -> None:
    pixels = torch.rand(2, 3, SIDE_PX, SIDE_PX)
    net = other_net()
    ours, theirs = (pixels - 0.5) / 0.25, (pixels - 0.4) / 0.2
    taught = TrainedTeacher(net, torch.full((1, 3, 1, 1), 0.25 / 0.2), torch.full((1, 3, 1, 1), (0.5 - 0.4) / 0.2))
    torch.testing.assert_close(taught(net, ours), net(theirs).logits)
    small = F.interpolate(pixels, (4, 4), mode="bilinear", antialias=True)
    small = F.interpolate(small, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)
    resized = TrainedTeacher(net, side_px=SIDE_PX)
    assert resized(net, F.interpolate(pixels, (4, 4), mode="bilinear", antialias=True)).equal(net(small).logits)


# ---- recipes and runs


@pytest.mark.parametrize(
    ("recipe", "overrides", "key"),
    [
        ("convnet_aig/toy", ["training.teacher.weight=0.5"], "training.teacher.weight"),
        ("convnet_aig/toy", ["training.teacher={kind: whole_net, weight: 0}"], "training.teacher.weight"),
        ("convnet_aig/toy", ["training.teacher={kind: whole_net, side_px: 32}"], "training.teacher.side_px"),
        ("convnet_aig/toy", ["training.teacher.kind=trained"], "training.teacher.source"),
        ("convnet_aig/toy", ["training.teacher.kind=parent"], "training.teacher.kind"),
        ("convnet_aig/toy", ["training.teacher.kind=whole_net", "family.target_rate=1"], "training.teacher.kind"),
        ("ranet/toy", ["training.teacher.kind=whole_net"], "training.teacher.kind"),
        ("baseline/toy", ["training.teacher.kind=whole_net"], "training.teacher.kind"),
        (
            "convnet_aig/toy",
            ["training.teacher={kind: whole_net, weight: 1}", "training.label_smoothing=0.1"],
            "training.label_smoothing",
        ),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(recipe: str, overrides: list[str], key: str) -> None:
    with fails(ConfigError, key):
        run_config.load(recipe, overrides, data_home="/d")


def test_a_fingerprint_without_the_section_is_that_of_no_teacher() -> None:
    now = run_config.fingerprint(run_config.load("convnet_aig/toy"), "images")
    old = {key: value for key, value in now.items() if not key.startswith("training.teacher")}
    assert len(old) < len(now)
    assert run_config.translated(old) == now


def recipe(images: Path, *overrides: str) -> RunConfig:
    small = ["family.depth=8", "training.batch_size=32", "training.epochs=0.4", "training.schedule.warmup_epochs=0"]
    quiet = ["tracking.register=null", "evaluation.latency_repeats=0", "compute.workers=0", f"data.root={images}"]
    return run_config.load(
        "convnet_aig/toy", [*small, *quiet, "evaluation.policies=[gates-hard]", "logging.every=1 steps", *overrides]
    )


def by(source: object) -> str:
    return f"training.teacher={{kind: trained, source: '{source}'}}"


def test_a_run_learns_from_another_and_goes_on_with_no_other_teacher(finished: dict[str, Path], tmp_path: Path) -> None:
    teacher, home = finished["convnet_aig"], finished["convnet_aig"].parents[1]
    images, database = home / "images5", f"tracking.uri=sqlite:///{home}/runs/mlflow.db"
    student = tmp_path / "student"
    launch.train(recipe(images, database, by("models:/gated@candidate")), student)
    records = list(journal.read_all(student / "journal" / "rank0.jsonl"))
    (about,) = [record for record in records if record.get("event") == "teacher"]
    assert about["mmacs_per_image"] > 1
    assert {"train/teacher_top1", "train/teacher_divergence"} <= {record.get("key") for record in records}
    assert launch.train(recipe(images, database, by(teacher)), student).finished  # the same weights at another place
    with fails(CheckpointError, "training.teacher.source"):
        launch.train(recipe(images, database, by(finished["ranet"])), student)
    with fails(ConfigError, "source", tmp_path / "none"):
        launch.train(recipe(images, database, by(tmp_path / "none")), tmp_path / "other")
    assert launch.train(recipe(images, database, by(tmp_path / "none")), student).finished  # it needs no teacher more
    taught = recipe(images, database, by(teacher))
    alone, both = (plans.measure(each, 4, 8, train=None, timed=False) for each in (recipe(images, database), taught))
    assert both.state_bytes - alone.state_bytes == 4 * alone.parameters  # the teacher's, of the same kind
    with fails(ConfigError, "training.teacher.source", teacher):
        plans.measure(taught, 3, 8, train=None, timed=False)
    three = toy.make(tmp_path / "three", num_classes=3, train=64, val=12, side_px=32, seed=5)
    with fails(ConfigError, "training.teacher.source", teacher):
        launch.train(recipe(three, database, by(teacher)), tmp_path / "other")


def test_a_teacher_that_cannot_see_the_students_images_is_refused() -> None:
    config = recipe(Path("/d"), "training.teacher={kind: trained, source: x}", "data.side_px=4", "data.eval_side_px=4")
    with fails(ConfigError, "training.teacher.source", 4):
        teaching.check_sides(config, TrainedTeacher(Narrow()), tiny.CPU)
    teaching.check_sides(config, TrainedTeacher(Narrow(), side_px=16), tiny.CPU)


class Narrow(nn.Module):
    """A net whose convolution has no place on images below 8 px."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, CLASSES, 8)

    def forward(self, images: Tensor) -> tiny.Logits:
        return tiny.Logits(self.layer(images).mean(dim=(2, 3)))


def test_a_group_of_seeds_leaves_its_teacher_to_its_runs(tmp_path: Path) -> None:
    """They compare its weights. Its place is no part of a group's recipe; how much is learned from it is."""

    def create(teacher: str, weight: float) -> None:
        how = f"training.teacher={{kind: trained, source: {teacher}, weight: {weight}}}"
        seeds.create(seeds.plan(recipe(tmp_path, how), 1, tmp_path / "runs" / "net"))

    create("/one", 0.5)
    create("/other", 0.5)
    with fails(CheckpointError, "training.teacher.weight"):
        create("/one", 0.7)
