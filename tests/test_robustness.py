"""Attacked images stay within their bounds and mislead the net; a policy at the native side is the plain policy."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from raised import fails
from test_family_contract import CASES, CLASSES, case, opened  # noqa: F401
from torch import Tensor, nn

from jobs.cli import main
from pipeline import cost, run_config
from pipeline import family as families
from pipeline.data import toy
from pipeline.data.config import DataConfig
from pipeline.deploy import evaluations, importing
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import Evaluator, evaluate
from pipeline.evaluation.robustness import Attack, Attacked, ResizedPolicy, ResolutionSweep, compressed, sides, strength
from pipeline.families.baseline.model import BaselineConfig
from pipeline.family import Fitted
from pipeline.report.resolutions import resolutions

SIDE_PX, EPS = 16, 4 / 255


@dataclass(frozen=True)
class Batch:
    images: Tensor
    labels: Tensor
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images in memory, in batches of five."""

    images: Tensor
    labels: Tensor
    unreadable: Sequence[str] = field(default=("lost.jpg",))

    def __iter__(self) -> Iterator[Batch]:
        for at in range(0, len(self.images), 5):
            rows = np.arange(at, min(at + 5, len(self.images)))
            yield Batch(self.images[rows], self.labels[rows], rows)


def noise(count: int = 8) -> Split:
    images = torch.randint(256, (count, SIDE_PX, SIDE_PX, 3), dtype=torch.uint8, generator=torch.manual_seed(3))
    return Split(images, torch.arange(count) % CLASSES)


def toys(count: int, seed: int) -> Split:
    """Toy images of three classes at 24 px."""
    labels = torch.arange(count) % 3
    found = []
    for number, label in enumerate(labels.tolist()):
        jpeg = toy.draw(label, 3, 24, np.random.Philox(key=[seed, number]))
        found.append(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((24, 24))))
    return Split(torch.from_numpy(np.stack(found)), labels)


def how(classes: int = CLASSES) -> Evaluator:
    return Evaluator(DataConfig(root=Path("nowhere")), torch.device("cpu"), classes)


def attacked(split: Split, net: nn.Module, attack: Attack, classes: int = CLASSES) -> list[Tensor]:
    return [batch.images for batch in Attacked(split, net, how(classes), attack)]


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    """A small ResNet trained on the toy set."""
    torch.manual_seed(0)
    net = families.find("baseline").build(BaselineConfig(net="cifar_resnet", depth=8), 3)
    split = toys(90, seed=1)
    images = how().images(Batch(split.images, split.labels, np.arange(90)))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(60):
        rows = torch.randperm(90, generator=torch.Generator().manual_seed(step))[:30]
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]).logits, split.labels[rows]).backward()
        optimizer.step()
    return net


# ---- attacks


def test_eps_0_changes_nothing(case: str) -> None:  # noqa: F811
    _, _, net = opened(case)
    split = noise()
    found = list(Attacked(split, net, how(), Attack("fgsm", 0.0)))
    for before, after in zip(split, found, strict=True):
        assert torch.equal(before.images, after.images) and after.images.dtype == torch.uint8
        assert torch.equal(before.labels, after.labels) and np.array_equal(before.rows, after.rows)
    assert Attacked(split, net, how(), Attack("fgsm", 0.0)).unreadable == ("lost.jpg",)


def test_pixels_move_by_eps_up_the_loss_whatever_the_family(case: str) -> None:  # noqa: F811
    family, config, net = opened(case)
    split = noise()
    policy = family.policies(config, net)[0]
    with torch.inference_mode():  # inference tensors that a policy caches must not break the gradient
        policy.predict(net.eval(), how().images(next(iter(split))))
    net.train()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    found = torch.cat(attacked(split, net, Attack("fgsm", EPS)))
    moved = found.int() - split.images.int()
    inside = (split.images >= 4) & (split.images <= 251)
    assert set(moved[inside].abs().unique().tolist()) <= {0, 4} and moved.abs().max() == 4
    assert (moved[inside] != 0).float().mean() > 0.9  # the gradient reaches the pixels
    assert torch.equal(found, torch.cat(attacked(split, net, Attack("fgsm", EPS))))
    assert net.training and all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_sign_is_that_of_the_losss_gradient(learned: nn.Module) -> None:
    split = toys(5, seed=9)
    (found,) = attacked(split, learned, Attack("fgsm", EPS), 3)
    learned.eval()
    pixels = split.images.double().requires_grad_()
    data = how().data
    scaled = (pixels / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    F.cross_entropy(learned.double()(scaled.permute(0, 3, 1, 2)).logits, split.labels).backward()
    learned.float()
    assert pixels.grad is not None
    expected = (split.images + 4 * pixels.grad.sign()).clamp(0, 255)
    assert (found.double() == expected).double().mean() > 0.999  # fp32 may round a gradient of nothing


def test_an_attack_misleads_a_trained_net(learned: nn.Module) -> None:
    split, attack = toys(60, seed=2), Attack("fgsm", 8 / 255)
    policy = families.find("baseline").policies(BaselineConfig(net="cifar_resnet", depth=8), learned)[0]
    (clean,) = evaluate(learned, [policy], split, how(3))
    (worse,) = evaluate(learned, [policy], Attacked(split, learned, how(3), attack), how(3))
    assert clean.top1 > 0.6 and worse.top1 < clean.top1 - 0.3, (clean.top1, worse.top1)
    assert clean.macs_mean == worse.macs_mean and worse.num_images == 60
    for before, after in zip(split, Attacked(split, learned, how(3), attack), strict=True):
        losses = [F.cross_entropy(learned(how().images(each)).logits, each.labels) for each in (before, after)]
        assert losses[1] > losses[0]


def test_jpeg_changes_little_at_100_and_more_at_lower_quality() -> None:
    grey = toys(6, seed=4).images.float().mean(3, keepdim=True)  # colours lose half of their pixels at any quality
    images = grey.to(torch.uint8).expand(-1, -1, -1, 3)
    moved = {q: (compressed(images, q).int() - images.int()).abs().float().mean().item() for q in (100, 75, 5)}
    assert 0 < moved[100] < 2 and moved[100] < moved[75] < moved[5] and moved[5] > 5, moved
    assert compressed(images, 75).shape == images.shape and compressed(images, 75).dtype == torch.uint8


def test_jpeg_comes_after_the_attack_and_alone(learned: nn.Module) -> None:
    split = toys(5, seed=5)
    (sharp,) = attacked(split, learned, Attack("fgsm", EPS), 3)
    (both,) = attacked(split, learned, Attack("fgsm", EPS, 60), 3)
    (alone,) = attacked(split, learned, Attack(jpeg=60), 3)
    assert torch.equal(both, compressed(sharp, 60)) and torch.equal(alone, compressed(split.images, 60))


def test_names_and_strengths() -> None:
    assert Attack("fgsm", strength("4/255"), 75).name == "fgsm-eps0.0157-jpeg75"
    assert Attack("fgsm", strength("0.03")).name == "fgsm-eps0.03" and Attack(jpeg=9).name == "jpeg9"
    assert Attack("fgsm", 0.01).step == 3 and sides("224, 160") == (224, 160)
    assert ResolutionSweep((24, 16), True).name == "sides24+16-and-up"


@pytest.mark.parametrize("eps", ["1.5", "-1", "4/0", "four", "4/255/2", ""])
def test_strengths_outside_0_to_1_are_refused(eps: str) -> None:
    with fails(ConfigError, "--eps", eps):
        Attack("fgsm", strength(eps))


# ---- lower resolutions


def test_a_resized_policy_is_the_plain_policy_on_resized_images(case: str) -> None:  # noqa: F811
    family, config, net = opened(case)
    images = how().images(next(iter(noise())))
    lower = 12
    for policy in family.policies(config, net.eval()):
        if isinstance(policy, Fitted) and not policy.state():
            continue
        with torch.inference_mode():
            plain, native = policy.predict(net, images), ResizedPolicy(policy, SIDE_PX, True).predict(net, images)
            smaller = F.interpolate(images, (lower, lower), mode="bilinear", antialias=True)
            below, expected = ResizedPolicy(policy, lower).predict(net, images), policy.predict(net, smaller)
            back = F.interpolate(smaller, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)
            again, up = ResizedPolicy(policy, lower, True).predict(net, images), policy.predict(net, back)
        for found, wanted in ((native, plain), (below, expected), (again, up)):
            assert torch.equal(found.logits, wanted.logits) and torch.equal(found.macs, wanted.macs)
    assert ResizedPolicy(policy, lower).name == f"{policy.name}@12px"
    assert ResizedPolicy(policy, lower, True).name == f"{policy.name}@12px-and-up"


def test_macs_are_those_of_the_smaller_images(learned: nn.Module) -> None:
    policy = families.find("baseline").policies(BaselineConfig(net="cifar_resnet", depth=8), learned)[0]
    split = toys(10, seed=6)
    at24, at12, back = evaluate(
        learned, [policy, ResizedPolicy(policy, 12), ResizedPolicy(policy, 12, True)], split, how(3)
    )
    assert at12.macs_mean == cost.measure(learned, torch.zeros(1, 3, 12, 12)).macs < at24.macs_mean == back.macs_mean
    assert at12.relative_macs == pytest.approx(at12.macs_mean / at24.macs_mean)


def test_a_side_that_the_net_does_not_accept_is_refused_by_the_net() -> None:
    with fails(ConfigError, "images"):
        ResolutionSweep((16, 3)).check(opened("arrn")[2].eval(), 16)
    with fails(ConfigError, "images"):
        ResolutionSweep((16, 2)).check(opened("ranet-imagenet")[2].eval(), 16)
    vgg = families.find("baseline").build(BaselineConfig(net="vgg16"), 2)
    with fails(ConfigError, "images"):
        ResolutionSweep((32, 24)).check(vgg.eval(), 32)
    with fails(ConfigError, "--sides", 17):
        ResolutionSweep((17, 8)).check(opened("arrn")[2].eval(), 16)
    ResolutionSweep((2,), True).check(opened("arrn")[2].eval(), 16)  # images are brought back to their own side
    for wrong in ((), (16, 16), (0,)):
        with fails(ConfigError, "--sides"):
            ResolutionSweep(wrong)


# ---- by the command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, learned: nn.Module) -> Path:
    """A run of the trained net with its evaluation on toy images."""
    home = tmp_path_factory.mktemp("robust")
    images = toy.make(home / "toy", num_classes=3, train=9, val=24, side_px=24)
    net = [
        "family.net=cifar_resnet",
        "family.depth=8",
        "family.resolutions_px=[]",
        "data.side_px=24",
        "data.eval_side_px=24",
    ]
    quiet = ["tracking.register=null", "evaluation.latency_repeats=0", "compute.workers=0", "data.eval_resize_px=24"]
    config = run_config.load("baseline/toy", [f"data.root={images}", *quiet, *net])
    torch.save(learned.state_dict(), home / "net.pt")
    importing.import_weights(config, home / "net.pt", home / "runs" / "robust")
    return home / "runs" / "robust"


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *(str(word) for word in words)])
    return int(ended.value.code or 0)


def test_attacks_and_resolution_sweeps_are_stored_separately_from_the_clean_evaluation(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluations.find(str(run_dir))
    (data,) = before.sets
    clean = before.on(data)
    assert clean is not None
    assert command(run_dir, "--attack", "fgsm", "--eps", "8/255", "--jpeg", "90") == 0
    printed = capsys.readouterr().out
    assert "top-1 % clean  attacked" in printed and f"{100 * clean.reports[0].top1:.2f}" in printed
    assert command(run_dir, "--sides", "24,12", "--down-and-up") == 0
    assert command(run_dir, "--sides", "24,12") == 0
    assert command(run_dir, "--sides", "12", "--jpeg", "50") == 0
    names = sorted(path.name.removeprefix(f"toy-{data}") for path in (run_dir / "evaluations").iterdir())
    attack = "-fgsm-eps0.0314-jpeg90"
    assert names == sorted(["final", attack, "-sides24+12-and-up", "-sides24+12", "-jpeg50-sides12"])
    after = evaluations.find(str(run_dir))
    assert after.on(data) == clean and after.sets == [data]
    (shown,) = evaluations.together([after])
    assert list(shown.attacked) == [attack[1:]] and shown.reports == clean.reports
    assert shown.attacked[attack[1:]][0].top1 < clean.reports[0].top1
    assert sorted(shown.swept) == ["sides24+12", "sides24+12-and-up"]
    drawn, rows = resolutions([shown])
    assert [series.x for series in drawn.series] == [[12.0, 24.0]] * 2
    assert [series.y[1] for series in drawn.series] == [100 * clean.reports[0].top1] * 2
    assert len(rows.rows) == 4
    swept = json.loads((run_dir / "evaluations" / f"toy-{data}-sides24+12" / "reports.json").read_text())
    assert [report["policy"] for report in swept] == ["native@24px", "native@12px"]
    assert swept[0]["top1"] == clean.reports[0].top1 and swept[1]["macs_mean"] < swept[0]["macs_mean"]


def test_an_attacked_evaluation_does_not_replace_a_clean_one(run_dir: Path, tmp_path: Path) -> None:
    final = run_dir / "evaluations" / "final"
    before = (final / "reports.json").read_bytes()
    with fails(ConfigError, "--out", "final"):
        evaluations.evaluate(str(run_dir), attack=Attack("fgsm", EPS), out=final)
    assert (final / "reports.json").read_bytes() == before
    evaluations.evaluate(str(run_dir), attack=Attack(jpeg=50), out=tmp_path / "a")
    with fails(ConfigError, "--out", tmp_path / "a"):
        evaluations.evaluate(str(run_dir), out=tmp_path / "a")


@pytest.mark.parametrize(
    "options",
    [
        ["--attack", "fgsm"],
        ["--eps", "4/255"],
        ["--attack", "pgd", "--eps", "4/255"],
        ["--attack", "fgsm", "--eps", "4"],
        ["--attack", "fgsm", "--eps", "0.001"],
        ["--jpeg", "0"],
        ["--jpeg", "101"],
        ["--sides", "24,big"],
        ["--sides", "48"],
        ["--down-and-up"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_refused_and_leave_nothing(options: list[str], run_dir: Path) -> None:
    stored = sorted((run_dir / "evaluations").iterdir())
    assert command(run_dir, *options) == 2
    assert sorted((run_dir / "evaluations").iterdir()) == stored


@pytest.mark.parametrize(
    ("attack", "key"),
    [
        ({"kind": "pgd", "eps": 0.1}, "--attack"),
        ({}, "--attack"),
        ({"kind": "fgsm", "eps": 4.0}, "--eps"),
        ({"kind": "fgsm", "eps": 0.001}, "--eps"),
        ({"jpeg": 0}, "--jpeg"),
        ({"jpeg": 101}, "--jpeg"),
    ],
    ids=str,
)
def test_a_wrong_attack_is_refused_by_option(attack: dict[str, Any], key: str) -> None:
    with fails(ConfigError, key):
        Attack(**attack)


@pytest.mark.parametrize("text", ["24,big", "", "24;12"])
def test_wrong_sides_are_refused(text: str) -> None:
    with fails(ConfigError, "--sides", text):
        sides(text)
