"""Exported files give the policies' logits and hold only the weights that they use; otherwise they are not written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow_here import finish, run_folder
from raised import fails
from test_family_contract import CLASSES, opened
from torch import Tensor, nn

from jobs.cli import main
from pipeline import config as configs
from pipeline import cost
from pipeline.data.config import DataConfig
from pipeline.deploy import export
from pipeline.deploy.export import Input
from pipeline.errors import ConfigError, ContractError
from pipeline.families.convnet_aig.model import Aig
from pipeline.family import Fitted, Report
from pipeline.runs import files
from pipeline.runs.records import Meta
from pipeline.training import checkpoint

SIDE_PX = 16
CASES = ("arrn", "baseline", "convnet_aig-scaled", "convnet_aig-fixed", "msdnet", "ranet", "shape_adaptor")
RATES = [0.9, 0.55, 0.35, 1.0, 0.2, 0.6]
WITHOUT_ONNX = "needs the extra `onnx`: onnx, onnxscript and onnxruntime"
needs_onnx = pytest.mark.skipif(any(importlib.util.find_spec(n) is None for n in export.NEEDED), reason=WITHOUT_ONNX)


def reports(blocks: int) -> list[Report]:
    """Reports as an evaluation stores them: the gates' mean rates, and fitted rates."""
    facts = {"gates": RATES[:blocks]}
    identity = {"kind": "gates", "settings": {"gates": "hard"}}
    hard = Report("gates-hard", 10, 0.9, None, 0.01, 3e7, 4e7, 0.6, **identity, facts=facts)  # type: ignore[arg-type]
    rated = Report("expected-rate", 10, 0.9, None, 0.01, 3e7, 4e7, 0.6, calibration={"rates": RATES[:blocks]})
    return [hard, rated]


def awake(net: nn.Module) -> nn.Module:
    """The net in eval mode, with BatchNorm that has an effect and gates that images open and close."""
    torch.manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    net.eval()
    if isinstance(net, Aig):
        _even(net)
    return net


@torch.no_grad()
def _even(net: Aig) -> None:
    """Each gate opens for half of the pictures on which a file is checked."""
    x = net.stem(torch.cat(list(given(1).batches())))
    for block in net.blocks:
        if block.gate is not None:
            nn.init.normal_(block.gate.fc2.weight)
            block.gate.fc2.bias[1] -= block.gate(x).median() + 1e-4
        gates = torch.ones(len(x), dtype=torch.bool) if block.gate is None else block.gate(x) > 0
        x = block.skipping(x, gates.nonzero().flatten())


def makers(case: str) -> tuple[nn.Module, dict[str, Any], dict[str, Callable[[Tensor], nn.Module]]]:
    """The net, its policies by name (calibrated if reports hold a calibration), and its static modules."""
    family, config, net = opened(case)
    awake(net)
    stored = reports(len(net.blocks)) if isinstance(net, Aig) else []
    states = {report.policy: report.calibration for report in stored}
    found = {policy.name: policy for policy in family.policies(config, net)}
    for name, policy in found.items():
        if isinstance(policy, Fitted) and states.get(name):
            found[name] = policy.restored(states[name])
    return net, found, dict(family.static(config, net, stored))


def given(batch: Any = "dynamic", *, raw: bool = False) -> Input:
    return Input(SIDE_PX, batch, raw, DataConfig(root=Path("nowhere"), side_px=SIDE_PX))


def written(maker: Callable[[Tensor], nn.Module], what: Input, file: Path) -> export.Exported:
    module = maker(what.pictures(what.sizes[0])).eval()
    return export.write(module, what, file, file.suffix[1:], {})


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=[pytest.mark.long]
            if case in ("arrn", "ranet", "convnet_aig-scaled", "convnet_aig-fixed", "shape_adaptor")
            else [],
        )
        for case in CASES
    ],
)
def test_a_file_gives_the_logits_and_the_cost_of_its_policy(case: str, tmp_path: Path) -> None:
    net, policies, static = makers(case)
    assert static
    for name, maker in static.items():
        one = name.startswith("gates")
        done = written(maker, given(1 if one else "dynamic"), tmp_path / f"{name}.pt2")
        run = torch.export.load(done.file).module()
        for count in (1, 1, 1) if one else (1, 3, 7):
            images = torch.randn(count, 3, SIDE_PX, SIDE_PX)
            if name in policies:
                with torch.no_grad():
                    expected = policies[name].predict(net, images)
                torch.testing.assert_close(run(images), expected.logits, rtol=1e-4, atol=1e-5)
                assert one or expected.macs.tolist() == [export.read(done.file)["macs"]] * count
            assert run(images).shape == (count, CLASSES)
    unlike = set(static) - set(policies)
    assert unlike == ({"all-open", "mask-0.3", "mask-0.5", "mask-0.7"} if isinstance(net, Aig) else set())


def test_a_mask_runs_the_blocks_above_its_rate_and_no_gate(tmp_path: Path) -> None:
    net, _, static = makers("convnet_aig-fixed")
    images = given().pictures(1)
    costs = cost.measure(net, images)
    blocks = range(len(net.blocks))
    residuals = [costs.by_module[f"blocks.{number}.residual"] for number in blocks]
    gates = sum(costs.by_module.get(f"blocks.{number}.gate", 0) for number in blocks)
    bare = costs.macs - gates - sum(residuals)
    for name, least in {"all-open": 0, "mask-0.3": 0.3, "mask-0.5": 0.5, "mask-0.7": 0.7}.items():
        runs = [price for price, rate in zip(residuals, RATES, strict=True) if rate >= least]
        done = written(static[name], given(), tmp_path / f"{name}.pt2")
        assert done.facts["macs"] == bare + sum(runs)
    x = net.stem(images)
    for number, block in enumerate(net.blocks):
        x = torch.relu(block.shortcut(x) + (block.residual(x) if RATES[number] >= 0.5 else 0))
    run = torch.export.load(tmp_path / "mask-0.5.pt2").module()
    torch.testing.assert_close(run(images), net.fc(x.mean(dim=(2, 3))))


def test_masks_and_fitted_rates_need_a_stored_evaluation() -> None:
    family, config, net = opened("convnet_aig-scaled")
    assert list(family.static(config, net, [])) == ["all-open", "expected-prob", "gates-hard"]


def test_gates_become_branches_of_the_graph(tmp_path: Path) -> None:
    net, policies, static = makers("convnet_aig-fixed")
    done = written(static["gates-hard"], given(1), tmp_path / "gates.pt2")
    assert done.facts["branches"] == len(net.gates()) == done.both_ways == 4 and done.facts["macs"] is None
    run = torch.export.load(done.file).module()
    for bias in (-1e6, 1e6):  # all closed, all open: in the file and in the net
        states = [net.state_dict(), run.state_dict()]
        for name, value in [pair for state in states for pair in state.items()]:
            if name.endswith("gate.fc2.bias"):
                value.copy_(torch.tensor([0.0, bias]))
        images = torch.randn(1, 3, SIDE_PX, SIDE_PX)
        with torch.no_grad():
            expected = policies["gates-hard"].predict(net, images)
        assert expected.facts["gates"][0, [1, 2, 4, 5]].tolist() == [bias > 0] * 4
        torch.testing.assert_close(run(images), expected.logits)
    with pytest.raises(ConfigError):
        static["gates-hard"](given().pictures(2))


def test_raw_pixels_are_normalised_in_the_file(tmp_path: Path) -> None:
    _, _, static = makers("baseline")
    whole, raw = given(), given(raw=True)
    body = static["native"](whole.pictures(2)).eval()
    export.write(export.FromPixels(body, raw.data).eval(), raw, tmp_path / "raw.pt2", "pt2", {})
    run, images = torch.export.load(tmp_path / "raw.pt2").module(), raw.pictures(4, 5)
    assert images.dtype == torch.uint8 and images.shape == (4, SIDE_PX, SIDE_PX, 3)
    torch.testing.assert_close(run(images), body(whole.pictures(4, 5)), rtol=1e-4, atol=1e-5)


def test_a_file_holds_no_weights_that_it_does_not_read(tmp_path: Path) -> None:
    net, _, static = makers("ranet")
    first = written(static["exit-1"], given(), tmp_path / "exit-1.pt2")
    held = torch.export.load(first.file).state_dict
    assert not [name for name in held if "classifiers.1" in name or "subnetworks.1" in name]
    assert [name for name in held if "classifiers.0" in name]
    assert all(parameter is not None for parameter in net.parameters()) and len(net.state_dict()) > len(held)


class Drifting(nn.Module):
    """Adds to the logits the number of its calls, which a graph cannot express."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(3, 2), 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(images.mean(dim=(2, 3))) + self.calls


def test_a_file_with_other_logits_than_the_net_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "before.pt2").write_text("before")
    with fails(ContractError, "logits", subject="before.pt2"):
        export.write(Drifting().eval(), given(2), tmp_path / "before.pt2", "pt2", {})
    assert [path.name for path in tmp_path.iterdir()] == ["before.pt2"]
    assert (tmp_path / "before.pt2").read_text() == "before"


class Blank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.mean(dim=(2, 3))) * float("nan")


def test_logits_that_are_not_numbers_count_as_a_difference(tmp_path: Path) -> None:
    with fails(ContractError, "logits", subject="blank.pt2"):
        export.write(Blank().eval(), given(2), tmp_path / "blank.pt2", "pt2", {})


# ---- ONNX


def batch_axis(batch: Any) -> int | str:
    return "batch" if batch == "dynamic" else int(batch)


@needs_onnx
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("arrn", "12px"),
        pytest.param("arrn", "full-8px", marks=pytest.mark.long),
        pytest.param("baseline", "down-and-up-8px", marks=pytest.mark.long),
        pytest.param("convnet_aig-scaled", "expected-rate", marks=pytest.mark.long),
        pytest.param("convnet_aig-fixed", "mask-0.5", marks=pytest.mark.long),
        pytest.param("convnet_aig-fixed", "gates-hard", marks=pytest.mark.long),
        pytest.param("ranet", "exit-2", marks=pytest.mark.long),
        pytest.param("shape_adaptor", "frozen", marks=pytest.mark.long),
    ],
)
def test_onnxruntime_gives_the_same_logits(case: str, name: str, tmp_path: Path) -> None:
    import onnxruntime

    _, _, static = makers(case)
    batch: Any = 1 if name == "gates-hard" else "dynamic"
    done = written(static[name], given(batch), tmp_path / "net.onnx")
    assert done.difference < 1e-5 and export.read(done.file) == done.facts
    session = onnxruntime.InferenceSession(done.file, providers=["CPUExecutionProvider"])
    assert [each.shape[0] for each in (*session.get_inputs(), *session.get_outputs())] == [batch_axis(batch)] * 2
    for count in (1,) if batch == 1 else (1, 3, 7):
        images = given(batch).pictures(count, 4)
        with torch.no_grad():
            expected = static[name](images)(images)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-5)


# ---- from a run, by the command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small gated net with an evaluation."""
    folder, recipe = run_folder(tmp_path_factory.mktemp("trained") / "runs" / "aig")
    section = {"name": "convnet_aig", "depth": 8, "scaled": ["rate"]}
    data = {"root": "/nowhere", "side_px": SIDE_PX, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
    recipe |= {"name": "aig", "family": section, "data": data}
    (folder / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    _, _, net = opened("convnet_aig")
    meta = Meta(step=7, recipe=recipe, fingerprint={"seed": 1}, classes=tuple("abcde"))
    checkpoint.write(folder / "checkpoints" / "step-00000007", {"net": awake(net).state_dict(), "step": 7}, meta)
    home = folder / "evaluations" / "final"
    home.mkdir(parents=True)
    (home / "reports.json").write_text(json.dumps([report.to_json() for report in reports(3)]))
    (home / "about.json").write_text(json.dumps({"step": 7, "data": "abc", "root": "/nowhere"}))
    finish(folder, best="step-00000007")
    return folder


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["export", *(str(word) for word in words)])
    return int(ended.value.code or 0)


def test_the_command_writes_a_file_with_its_facts(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run_dir) == 0
    listed = ["all-open", "mask-0.3", "mask-0.5", "mask-0.7", "expected-rate", "gates-hard"]
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert [name for name in rows if name in listed] == listed, "the policies that can be exported, in order"
    assert "90.00" in rows["gates-hard"] and "90.00" not in rows["all-open"], "figures of policies that have some"
    file = tmp_path / "net.pt2"
    assert command(run_dir, "--policy", "gates-hard", "--batch", "1", "--out", file, "--raw") == 0
    assert str(file) in capsys.readouterr().out
    facts = export.read(file)
    weights = run_dir / "checkpoints" / "step-00000007" / "net.safetensors"
    assert facts["sha256"] == files.sha256(weights) and facts["step"] == 7 and facts["source"] == str(run_dir)
    assert (facts["mean"], facts["std"], facts["side_px"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.1], SIDE_PX)
    assert facts["classes"] == list("abcde") and facts["policy"] == "gates-hard" and facts["evaluated"]["top1"] == 0.9
    assert command(run_dir, "--policy", "all-open", "--out", file) == 2
    assert capsys.readouterr().err
    assert command(run_dir, "--policy", "all-open", "--out", file, "--force", "--side-px", "24") == 0
    assert export.read(file)["side_px"] == 24
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"policy": "mask-0.9"}, "policy"),
        ({"policy": "gates-sampled"}, "policy"),
        ({"policy": "all-open", "form": "tflite"}, "--format"),
        ({"policy": "all-open", "batch": 0}, "--batch"),
        ({"policy": "all-open", "side_px": 0}, "--side-px"),
        ({"policy": "all-open", "out": Path("net.onnx")}, "--out"),
        ({"policy": "all-open", "out": Path("no/net.pt2")}, "--out"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_exported_is_refused_by_its_key(
    arguments: dict[str, Any], key: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with fails(ConfigError, key):
        export.export(str(run_dir), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["--policy", "gates-hard"], ["--policy", "all-open", "--batch", "many"]], ids=lambda words: words[-1]
)
def test_the_command_ends_with_2_if_it_cannot_export(
    words: list[str], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(run_dir, *words) == 2
    assert capsys.readouterr().err and not list(tmp_path.iterdir())


def test_onnx_without_its_packages_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with fails(ConfigError, "--format", subject="onnxscript"):
        export.export(str(run_dir), "all-open", form="onnx")


def test_images_too_small_for_the_net_are_refused_by_its_own_rule(tmp_path: Path) -> None:
    _, _, static = makers("arrn-kaiser")
    small = dataclasses.replace(given(), side_px=8)
    with pytest.raises(ConfigError):
        written(static["18px"], small, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
