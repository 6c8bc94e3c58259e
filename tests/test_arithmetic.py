"""How a run computes where its recipe leaves it open: timed once, the same after a resume, the net as it was."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline import run_config
from pipeline.data import toy
from pipeline.execution import launch
from pipeline.family import find
from pipeline.runs import journal
from pipeline.training import arithmetic, checkpoint
from pipeline.training.arithmetic import Arithmetic, Length, Timed
from pipeline.training.config import TrainingConfig

CPU = torch.device("cpu")
SHORT, LONG = Length(1_000_000, 1_000.0, 4, 30), Length(1_000_000, 1e9, 4, 30)
HAS_BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no products of bf16")


@dataclass
class Logits:
    logits: Tensor


class Fails(nn.Module):
    """A net that cannot run under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.LazyLinear(2)
        self(torch.zeros(1, 3, 8, 8))

    def forward(self, images: Tensor) -> Logits:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel\nand more")
        return Logits(self.head(self.conv(images).mean((2, 3))))


def _timed(net: nn.Module | None = None) -> Timed:
    config = run_config.load("baseline/toy", [], data_home="/data").family
    family = find("baseline")
    net = net or family.build(config, 2)
    return Timed(family, config, net, torch.randn(4, 3, 16, 16), torch.arange(4) % 2)


@pytest.mark.parametrize("compiled", ["auto", True, False])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_a_short_run_times_nothing(precision: str, compiled: str | bool) -> None:
    training = TrainingConfig.model_validate({"precision": precision, "compile": compiled})
    chosen = arithmetic.choose(training, SHORT, _timed(), fixed_sizes=True)
    assert chosen.arithmetic == Arithmetic(precision == "bf16", compiled is True) and not chosen.seconds


@needs_bf16
def test_a_long_run_takes_a_choice_that_is_a_tenth_faster_than_any_simpler_one() -> None:
    training = TrainingConfig(compile=False)
    for _ in range(3):
        chosen = arithmetic.choose(training, LONG, _timed(), fixed_sizes=True)
        simple, other = Arithmetic(False, False), Arithmetic(True, False)
        assert set(chosen.seconds) == {simple, other}
        is_faster = chosen.seconds[other] <= arithmetic.FASTER * chosen.seconds[simple]
        assert chosen.arithmetic == (other if is_faster else simple)


@needs_bf16
def test_timing_leaves_the_net_its_gradients_and_the_random_numbers_as_they_were() -> None:
    timed = _timed()
    before, numbers = copy.deepcopy(timed.net.state_dict()), torch.get_rng_state()
    arithmetic.choose(TrainingConfig(compile=False), LONG, timed, fixed_sizes=True)
    assert all(torch.equal(value, before[name]) for name, value in timed.net.state_dict().items())
    assert all(parameter.grad is None for parameter in timed.net.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)


@needs_bf16
def test_a_choice_that_fails_is_left_out_with_its_reason() -> None:
    chosen = arithmetic.choose(TrainingConfig(compile=False), LONG, _timed(Fails()), fixed_sizes=True)
    assert chosen.arithmetic == Arithmetic(False, False)
    assert chosen.failed == {Arithmetic(True, False): "RuntimeError: no kernel"} and "no kernel" in chosen.text


def test_nets_whose_maps_change_size_are_not_compiled_unless_the_recipe_says_so() -> None:
    fixed = TrainingConfig(precision="fp32")
    assert not arithmetic.choose(fixed, LONG, _timed(), fixed_sizes=False).seconds
    told = fixed.model_copy(update={"compile": True})
    assert arithmetic.choose(told, LONG, _timed(), fixed_sizes=False).arithmetic.compiled


def test_a_net_of_many_layers_is_not_compiled_in_a_run_that_compiling_would_prolong() -> None:
    many = replace(LONG, layers=10**9)
    assert not arithmetic.choose(TrainingConfig(precision="fp32"), many, _timed(), fixed_sizes=True).seconds


@pytest.mark.parametrize(("bf16", "compiled"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_resumed_run_computes_as_before(bf16: bool, compiled: bool) -> None:
    """Whatever was chosen, the recipe in the checkpoint says it."""
    asked, chosen = TrainingConfig(), Arithmetic(bf16, compiled)
    saved = arithmetic.settled(asked, chosen, CPU)
    assert arithmetic.of_checkpoint(asked, saved.model_dump(mode="json"), CPU) == chosen
    assert arithmetic.of_checkpoint(asked, {}, CPU) == Arithmetic(False, False)  # of older code


@needs_bf16
def test_a_run_times_its_net_once_and_goes_on_as_it_began(tmp_path: Path) -> None:
    images = toy.make(tmp_path / "set", num_classes=2, train=16, val=8, side_px=32)
    words = [f"data.root={images}", "family.depth=8", "training.batch_size=8", "training.epochs=1000000"]
    words += ["compute.workers=0", "tracking.register=null", "training.compile=false", "evaluation.every=2 steps"]
    config, run_dir = run_config.load("baseline/toy", words), tmp_path / "run"
    saved, stop = [], run_dir / "stop"
    for start in range(3):
        if start == 1:  # as if it had been killed before its first checkpoint
            shutil.rmtree(run_dir / "checkpoints")
            (run_dir / "status.json").unlink()
        result = launch.train(config, run_dir, on_start=stop.touch)
        meta = checkpoint.open_storage(config.checkpoint, run_dir).meta(checkpoint.name_of(result.step))
        saved.append(meta.recipe["training"])
    events = [
        each for each in journal.read_all(run_dir / "journal" / "rank0.jsonl") if each.get("event") == "arithmetic"
    ]
    assert len(events) == 1 and saved[0] == saved[1] == saved[2]
    taken = "bf16" if "computes in bf16" in str(events[0]["text"]) else "auto"
    assert isinstance(saved[0], dict) and saved[0]["precision"] == taken and saved[0]["compile"] is False
