"""Tests of sections of several kinds and of keys that change nothing: refused where typed, dropped where stored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from raised import fails

from pipeline import run_config
from pipeline.config import as_mapping, dump_yaml, flat, merge
from pipeline.errors import ConfigError
from pipeline.training.config import EvaluationConfig
from pipeline.training.losses.base import LossConfig
from pipeline.training.losses.binary_cross_entropy import BinaryCrossEntropyConfig
from pipeline.training.losses.cross_entropy import CrossEntropyConfig
from pipeline.training.optimizers.adamw import AdamWConfig
from pipeline.training.optimizers.sgd import SgdConfig

ADAMW = ["training.optimizer.kind=adamw"]
BCE = ["training.loss.kind=binary_cross_entropy"]
# A recipe's sections as commit bc067e3 stored them: every key of every kind, with its default.
OLD: dict[str, Any] = {
    "training": {
        "optimizer": {
            "kind": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "betas": [0.9, 0.999],
            "weight_decay": 0.0005,
        },
        "schedule": {"kind": "cosine", "warmup_epochs": 0.5, "milestones": [], "factor": 0.1, "final_lr": 0.0},
    },
    "data": {"shuffle": "full", "lanes": 64, "window": 2048},
}


def toy(*overrides: str) -> run_config.RunConfig:
    return run_config.load("baseline/toy", overrides)


def test_a_rule_of_a_kind_is_reported_at_its_section() -> None:
    with fails(ConfigError, "training.schedule"):
        toy("training.schedule.kind=steps")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([*ADAMW, "training.optimizer.momentum=0.9"], "training.optimizer.momentum"),
        ([*ADAMW, "training.optimizer.nesterov=false"], "training.optimizer.nesterov"),
        (["training.optimizer.betas=[0.9, 0.999]"], "training.optimizer.betas"),
        (["training.optimizer.momentum=0", "training.optimizer.nesterov=false"], "training.optimizer.nesterov"),
        (["training.schedule.milestones=[]"], "training.schedule.milestones"),
        (["training.schedule.kind=constant", "training.schedule.final_lr=0"], "training.schedule.final_lr"),
        (["training.other_optimizers={foo: {lr: 9}}"], "training.other_optimizers.foo"),
        (["training.other_optimizers={1: {lr: 9}}"], "training.other_optimizers.1"),
        (["evaluation.latency_repeats=0", "evaluation.latency_batches=[1]"], "evaluation.latency_batches"),
        (["evaluation.latency_batches=[]", "evaluation.latency_repeats=5"], "evaluation.latency_repeats"),
        (["compute.workers=0", "compute.max_failures=3"], "compute.max_failures"),
        ([*BCE, "training.loss.target_threshold=0.2", "training.label_smoothing=0.1"], "training.label_smoothing"),
        (["training.ema_warmup=ramp"], "training.ema_warmup"),
        (["training.schedule.kind=wsd", "training.schedule.decay_epochs=900"], "training.schedule.decay_epochs"),
        (["training.loss.target_threshold=0.2"], "training.loss.target_threshold"),
    ],
)
def test_a_key_that_changes_nothing_is_refused_even_at_its_default(overrides: list[str], key: str) -> None:
    with fails(ConfigError, key):
        toy(*overrides)


def test_all_keys_that_change_nothing_are_named_at_once() -> None:
    keys = ("training.optimizer.momentum", "training.schedule.milestones", "training.other_optimizers.foo")
    with fails(ConfigError, keys[0]) as caught:
        toy(*ADAMW, f"{keys[0]}=0.3", f"{keys[1]}=[3]", "training.other_optimizers={foo: {lr: 9}}")
    assert set(caught.value.keys) == set(keys)


def test_a_family_without_adaptors_takes_no_optimizer_for_them() -> None:
    human = ["family.mode=human"]
    assert "shape" in run_config.load("shape_adaptor/toy").training.other_optimizers
    assert run_config.load("shape_adaptor/toy", human).training.other_optimizers == {}
    with fails(ConfigError, "training.other_optimizers.shape"):
        run_config.load("shape_adaptor/toy", [*human, "training.other_optimizers={shape: {lr: 0.1}}"])


def test_a_kind_that_does_not_exist_is_refused_by_its_key() -> None:
    with fails(ConfigError, "training.optimizer.kind", "adam"):
        toy("training.optimizer.kind=adam")


def test_an_inherited_key_of_another_kind_is_dropped_and_one_beside_the_kind_refused(tmp_path: Path) -> None:
    base, over = tmp_path / "base.yaml", tmp_path / "over.yaml"
    sgd = {"kind": "sgd", "lr": 0.3, "momentum": 0.5, "nesterov": True}
    base.write_text(dump_yaml({"extends": "baseline/toy", "training": {"optimizer": sgd}}))
    over.write_text(dump_yaml({"extends": str(base), "training": {"optimizer": {"kind": "adamw"}}}))
    expected = AdamWConfig(lr=0.3, weight_decay=5e-4)
    assert run_config.load(str(over)).training.optimizer == expected
    assert run_config.load(str(base), ADAMW).training.optimizer == expected
    assert run_config.load(str(base), [], drawn=ADAMW).training.optimizer == expected
    with fails(ConfigError, "training.optimizer.momentum"):
        run_config.load(str(over), ["training.optimizer.momentum=0.5"])
    over.write_text(dump_yaml({"extends": str(base), "training": {"optimizer": {"kind": "adamw", "momentum": 0.5}}}))
    with fails(ConfigError, "training.optimizer.momentum"):
        run_config.load(str(over), ["training.epochs=3"])


def test_what_is_stored_holds_only_live_keys_and_reads_back_equal() -> None:
    for overrides in ([], ADAMW, ["evaluation.latency_repeats=0", "compute.workers=0"]):
        config = toy(*overrides)
        stored = as_mapping(config)
        assert run_config.from_mapping(stored, "stored") == config
        assert run_config.from_stored(stored, "stored") == config
    keys = run_config.fingerprint(toy(*ADAMW), "abc")
    assert "training.optimizer.momentum" not in keys and "training.optimizer.betas" in keys


def test_a_recipe_that_was_stored_with_the_keys_of_every_kind_is_read_and_overridden() -> None:
    stored = merge(as_mapping(toy()), OLD)
    assert run_config.from_stored(stored, "stored") == toy()
    changed = run_config.from_stored(stored, "stored", ADAMW)
    assert changed.training.optimizer == AdamWConfig(weight_decay=5e-4)
    with fails(ConfigError, "training.optimizer.momentum"):
        run_config.from_stored(stored, "stored", [*ADAMW, "training.optimizer.momentum=0.9"])


def test_a_fingerprint_that_was_stored_with_the_keys_of_every_kind_equals_todays() -> None:
    now = run_config.fingerprint(toy(), "abc")
    old = {key: value for key, value in now.items() if key != "training.loss.kind"}  # which is newer
    old |= flat({"training": OLD["training"], "data": {"augment": {"pad_px": 4, "low_pass": 0.5}}})
    assert run_config.translated(old) == now
    assert run_config.translated({**old, "training.optimizer.momentum": 0.5}) != now
    assert run_config.translated({"seed": 1}) == {"seed": 1}


def test_latency_keys_are_both_live_by_default() -> None:
    assert {"latency_batches", "latency_repeats"} <= set(as_mapping(EvaluationConfig()))


def test_binary_cross_entropy_is_that_of_one_hot_targets() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    dense = F.one_hot(labels, 3).float()
    loss = BinaryCrossEntropyConfig().criterion
    by_hand = -(dense * F.logsigmoid(logits) + (1 - dense) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(loss(logits, labels), by_hand)
    torch.testing.assert_close(loss(logits, dense), by_hand)


def test_targets_above_the_threshold_become_one_and_others_zero() -> None:
    logits = torch.randn(2, 4)
    mixed, binary = torch.tensor([[0.7, 0.3, 0, 0], [0.9, 0, 0, 0.1]]), torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    loss = BinaryCrossEntropyConfig(target_threshold=0.2)
    torch.testing.assert_close(
        loss.criterion(logits, mixed), F.binary_cross_entropy_with_logits(logits, binary), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("loss", [BinaryCrossEntropyConfig(), CrossEntropyConfig()])
def test_a_loss_is_the_mean_of_its_images_and_weights_make_it_a_weighted_mean(loss: LossConfig) -> None:
    logits, labels = torch.randn(7, 3, dtype=torch.float64), torch.arange(7) % 3
    weights, of_images = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)[labels]
    terms = loss.per_image(logits, labels)
    torch.testing.assert_close(loss.criterion(logits, labels), terms.mean())
    weighted = loss.weighted(weights, of_images.mean())
    torch.testing.assert_close(weighted(logits, labels), (terms * of_images).sum() / of_images.sum())
    torch.testing.assert_close(weighted(logits, F.one_hot(labels, 3).double()), weighted(logits, labels))


def test_weighted_cross_entropy_is_that_of_torch() -> None:
    logits, labels, weights = torch.randn(7, 3), torch.arange(7) % 3, torch.tensor([0.5, 1.0, 4.0])
    ours = CrossEntropyConfig().weighted(weights, weights[labels].mean())
    torch.testing.assert_close(ours(logits, labels), F.cross_entropy(logits, labels, weights))


def test_inverse_frequencies_give_every_class_the_same_total_weight() -> None:
    counts = torch.tensor([10, 0, 2, 4])
    weights = CrossEntropyConfig(class_weights="inverse-frequency").weights(counts.tolist())
    assert weights is not None
    torch.testing.assert_close((weights * counts)[counts > 0], torch.full((3,), 16 / 3))
    assert CrossEntropyConfig().weights([1, 2]) is None
    with fails(ConfigError, "training.loss.class_weights", subject=3):
        CrossEntropyConfig(class_weights=(1.0, 2.0, 3.0)).weights([1, 2])


ADDED = {
    "optimizers/rmsprop.py": """
import torch
from typing import Literal
from pipeline.training.optimizers.base import OptimizerConfig
class RmspropConfig(OptimizerConfig):
    kind: Literal["rmsprop"] = "rmsprop"
    alpha: float = 0.99
    def build(self, groups):
        return torch.optim.RMSprop([{**group} for group in groups], lr=self.lr, alpha=self.alpha)
""",
    "schedules/straight.py": """
from typing import Literal
from pipeline.training.schedules.base import ScheduleConfig
class StraightConfig(ScheduleConfig):
    kind: Literal["straight"] = "straight"
    def factor_at(self, epoch, epochs):
        return 1 - epoch / epochs
""",
    "losses/squared.py": """
from typing import Literal
import torch.nn.functional as F
from pipeline.training.losses.base import LossConfig
class SquaredConfig(LossConfig):
    kind: Literal["squared"] = "squared"
    def per_image(self, logits, targets):
        return (logits - F.one_hot(targets, logits.shape[1])).square().mean(1)
""",
}
USES = """
import sys
from importlib.machinery import PathFinder
folder = sys.argv[1]
class Finder:  # as if the files lay beside the others
    @staticmethod
    def find_spec(name, path=None, target=None):
        found = PathFinder.find_spec(name, path, target)
        parts = name.split(".")
        ours = len(parts) == 3 and parts[:2] == ["pipeline", "training"]
        if ours and found.submodule_search_locations:
            found.submodule_search_locations.append(f"{folder}/{parts[2]}")
        return found
sys.meta_path.insert(0, Finder)
import torch
import tiny
from pipeline import run_config
from pipeline.training.step import Meter, train_step
config = run_config.load("baseline/toy", [
    "training.optimizer.kind=rmsprop", "training.optimizer.alpha=0.5", "training.schedule.kind=straight",
    "training.loss.kind=squared"]).training
assert config.schedule.lr_factor(4.0, 8.0) == 0.5, config
assert float(config.loss.criterion(torch.zeros(1, 2), torch.tensor([1]))) == 0.5
settings = tiny.training(optimizer=config.optimizer, schedule=config.schedule, loss=config.loss)
current = tiny.fresh(settings)
assert type(current.optimizers["main"]) is torch.optim.RMSprop
"""


def test_a_kind_is_added_by_one_file(tmp_path: Path) -> None:
    for name, text in ADDED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", USES, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_default_kinds_are_those_of_before_there_were_kinds() -> None:
    training = toy().training
    assert isinstance(training.optimizer, SgdConfig)
    assert (training.schedule.kind, training.loss.kind) == ("cosine", "cross_entropy")
