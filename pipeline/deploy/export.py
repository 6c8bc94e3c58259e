"""Static policies of a trained net as files that run without this project: torch.export's .pt2, and ONNX.

A file holds one policy of the net, for images of one size, and what its answers need: mean, std, classes, cost. It is
written to a temporary path, loaded again and compared with the net on random pictures before it is renamed.
Letters: B images, S side in pixels, K classes.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import cost
from pipeline.data import pixels
from pipeline.data.config import DataConfig
from pipeline.deploy import evaluations
from pipeline.errors import ConfigError, ContractError, JsonValue, ResourceError
from pipeline.family import Report
from pipeline.registry.model import LoadedModel, describe, load_model
from pipeline.registry.resolve import resolve
from pipeline.runs import files
from pipeline.runs.files import whole_file

FORMATS = ("pt2", "onnx")
FACTS, KEY = "adaptnet.json", "adaptnet"  # where the facts are in a .pt2 and in an .onnx file
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # the extra `onnx`
TOLERANCE = 1e-4  # largest difference between a file's logits and the net's, as a share of the largest logit
WASTE = 0.01  # share of the weights that a file may hold although the graph does not read them
MOST_IMAGES = 65536  # upper bound of a dynamic batch size
GRAINS = (1, 2, 4, 8, 16)  # squares across a random picture; a picture of single pixels comes in addition
CHECKED = 20  # pictures on which a file is checked, or two batches if that is more
Batch = int | Literal["dynamic"]
RunFile = Callable[[Tensor], Tensor]  # images as `Input` describes, to logits [B, K]


@dataclass(frozen=True)
class Input:
    """The input of a file: normalised images [B, 3, S, S] f32, or uint8 pixels [B, S, S, 3] if `raw`."""

    side_px: int
    batch: Batch
    raw: bool
    data: DataConfig

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes that a file is checked with; it is traced with the first."""
        return (2, 1, 5) if self.batch == "dynamic" else (self.batch,)

    def pictures(self, count: int, number: int = 0) -> Tensor:
        """`count` random pictures in this form, of squares whose size and colours `number` decides."""
        generator = torch.Generator().manual_seed(number)
        across = (*GRAINS, self.side_px)[number % (len(GRAINS) + 1)]
        squares = torch.randint(256, (count, 3, across, across), generator=generator, dtype=torch.uint8)
        images = F.interpolate(squares, (self.side_px, self.side_px)).permute(0, 2, 3, 1).contiguous()
        return images if self.raw else pixels.normalise(images, self.data.mean, self.data.std).contiguous()

    def batches(self) -> Iterator[Tensor]:
        """The batches that a file is checked on."""
        rounds = max(2, len(self.sizes), CHECKED * len(self.sizes) // sum(self.sizes))
        for number, count in enumerate(islice(cycle(self.sizes), rounds)):
            yield self.pictures(count, number)


class FromPixels(nn.Module):
    """A module for normalised images, preceded by the normalisation of uint8 pixels [B, S, S, 3]."""

    def __init__(self, body: nn.Module, data: DataConfig) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", 255 * torch.tensor(data.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(data.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = (images.permute(0, 3, 1, 2).float() - self.get_buffer("mean")) / self.get_buffer("std")
        logits: Tensor = self.body(x)
        return logits


@dataclass(frozen=True)
class Exported:
    """A file, the facts in it, and the result of its check on num_images random pictures.

    difference: largest distance of its logits from the net's, as a share of the largest logit. both_ways: branches of
    the graph that these pictures took both ways.
    """

    file: Path
    facts: Mapping[str, JsonValue]
    difference: float
    num_images: int
    both_ways: int


def export(
    source: str,
    policy: str,
    *,
    form: str = "pt2",
    out: Path | None = None,
    side_px: int | None = None,
    batch: Batch = "dynamic",
    raw: bool = False,
    force: bool = False,
    uri: str | None = None,
) -> Exported:
    """Writes the trained net `source` with a static policy to `out`, by default NAME-POLICY.FORMAT here.

    side_px: side of the images, by default the evaluation's; for batch and raw see `Input`.
    Raises ConfigError if the policy is unknown or decides by image, or if the file exists and `force` is off;
    ContractError if the file's logits differ from the net's.
    """
    _check(form, side_px, batch)
    folder = resolve(source, uri)
    trained, model = describe(folder), load_model(folder)
    target = out or Path(f"{trained.recipe.get('name') or model.family_config.name}-{policy}.{form}")
    _check_target(target, form, force)
    given = Input(side_px or model.data_config.side_for_eval, batch, raw, model.data_config)
    reports = _reports(source, uri)
    module = static(model, policy, reports, given)
    facts: dict[str, JsonValue] = {
        "source": source,
        "step": trained.step,
        "sha256": files.sha256(trained.weights),
    }
    return write(module, given, target, form, {**facts, **_facts(model, policy, reports, given)})


@dataclass(frozen=True)
class Exportable:
    """A way to run a net that can be exported, or cannot (`fixed` is False) since it decides by image.

    kind is the policy's and what says what it does, both "" of a form of the net that is no policy of it; report: its
    stored figures.
    """

    name: str
    fixed: bool
    kind: str
    what: str
    report: Report | None


def exportable(source: str, uri: str | None = None) -> list[Exportable]:
    """The ways to run the trained net `source`: those that can be exported first."""
    model, reports = load_model(resolve(source, uri)), _reports(source, uri)
    figures = {report.policy: report for report in reports}
    policies = {policy.name: policy for policy in model.policies}
    static = model.family.static(model.family_config, model.net, reports)
    return [
        Exportable(
            name,
            name in static,
            policies[name].kind if name in policies else "",
            model.family.describe(policies[name].kind, policies[name].settings) if name in policies else "",
            figures.get(name),
        )
        for name in dict.fromkeys([*static, *policies])
    ]


def _check(form: str, side_px: int | None, batch: Batch) -> None:
    if form not in FORMATS:
        raise ConfigError(
            f"--format (={form}): no such format; known: {', '.join(FORMATS)}", key="--format", subject=form
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if form == "onnx" and missing:
        raise ConfigError(
            f"--format onnx needs {', '.join(missing)}, which this environment lacks: install the extra `onnx`, e.g. "
            "pip install -c constraints.txt -e '.[onnx]', or choose --format pt2",
            key="--format",
            subject=", ".join(missing),
        )
    if side_px is not None and side_px < 1:
        raise ConfigError(f"--side-px (={side_px}): at least 1", key="--side-px", subject=side_px)
    if batch != "dynamic" and batch < 1:
        raise ConfigError(
            f"--batch (={batch}): a number of images, at least 1, or `dynamic`", key="--batch", subject=batch
        )


def _check_target(target: Path, form: str, force: bool) -> None:
    reason = None
    if target.suffix != f".{form}":
        reason = f"the name of a file of --format {form} ends with .{form}"
    elif target.exists() and not target.is_file():
        reason = "not a file"
    elif target.exists() and not force:
        reason = "exists; name another file with --out, or replace it with --force"
    elif not target.parent.is_dir():
        reason = f"there is no folder {target.parent}"
    if reason:
        raise ConfigError(f"{target}: {reason}", key="--out", subject=target)


def _reports(source: str, uri: str | None) -> Sequence[Report]:
    """The stored reports of the net; empty if it was never evaluated."""
    net = evaluations.look_up(source, uri)
    stored = net.on(net.sets[0]) if net.sets else None
    return stored.reports if stored else ()


def static(model: LoadedModel, policy: str, reports: Sequence[Report], given: Input) -> nn.Module:
    """The net with `policy` as a module in eval mode for the input `given`.

    Raises ConfigError listing the static policies if this is not one, and if the net's own rule refuses small images.
    """
    makers = model.family.static(model.family_config, model.net, reports)
    if policy not in makers:
        decides = policy in [known.name for known in model.policies]
        why = "it decides by image, which a file cannot express" if decides else "no such policy"
        more = "" if reports else "; an evaluation (`adaptnet evaluate`) may make more possible"
        raise ConfigError(
            f"policy {policy}: {why}; this net can be exported as: {', '.join(makers)}{more}",
            key="policy",
            subject=policy,
        )
    normalised = Input(given.side_px, given.batch, False, given.data).pictures(given.sizes[0])
    module = makers[policy](normalised).eval()
    return FromPixels(module, given.data).eval() if given.raw else module


def write(module: nn.Module, given: Input, target: Path, form: str, facts: Mapping[str, JsonValue]) -> Exported:
    """Writes a module for the input `given` to `target`, complete and checked or not at all.

    Raises ContractError if torch cannot trace it, or the file's logits differ from the module's.
    """
    with torch.no_grad():
        program = _traced(module, given)
        whole = {**facts, **_cost(module, program, given), **_input_facts(given), "torch": torch.__version__}
        with _aside(target) as aside:
            run = (_write_onnx if form == "onnx" else _write_pt2)(program, aside, whole)
            difference, count = _difference(module, run, given)
            if not difference <= TOLERANCE:
                raise ContractError(
                    f"{target}: not written, because its logits differ from the net's by {difference:.1e} of the "
                    f"largest on {count} random pictures; at most {TOLERANCE:g} is allowed",
                    key="logits",
                    subject=target,
                )
        both_ways = _both_ways(program, given) if whole["branches"] else 0
    return Exported(target, whole, difference, count, both_ways)


def _traced(module: nn.Module, given: Input) -> torch.export.ExportedProgram:
    """The module as a graph; weights that it does not use are removed, unless they are as few as BatchNorm's counts."""
    images = given.pictures(given.sizes[0])
    module(images)  # so that the net's own rules raise first
    shapes = _dynamic(given.batch)
    try:
        program = torch.export.export(module, (images,), dynamic_shapes=(shapes,))
        unused = _unused(program)
        sizes = {name: value.numel() for name, value in module.state_dict().items()}
        if sum(sizes.get(name, 0) for name in unused) > WASTE * sum(sizes.values()):
            program = torch.export.export(_without(module, unused), (images,), dynamic_shapes=(shapes,))
    except RuntimeError as error:  # torch's own kinds are all RuntimeErrors
        name = type(module).__name__
        raise ContractError(f"{name}: torch.export cannot trace it: {error}", key="forward", subject=name) from error
    return program


def _dynamic(batch: Batch | JsonValue) -> dict[int, object] | None:
    """The sizes of the images that may vary, by axis; None if none may."""
    return {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)} if batch == "dynamic" else None


def _unused(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the weights that no node of the graph reads."""
    signature = program.graph_signature
    owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return [owners[node.name] for node in program.graph.nodes if node.name in owners and not node.users]


def _without(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy without these parameters and buffers."""
    slim = copy.deepcopy(module)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(slim.get_submodule(owner), leaf, None)
    return slim


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A path to write to, renamed to `target` at the end of the block; nothing remains of it if the block fails."""
    try:
        with whole_file(target) as aside:
            yield aside
    except OSError as error:
        why = error.strerror or error
        raise ResourceError(f"{target}: cannot be written ({why})", key="--out", subject=target) from None


def _write_pt2(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, JsonValue]) -> RunFile:
    torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})
    run: RunFile = torch.export.load(path).module()
    return run


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, JsonValue]) -> RunFile:
    import onnxruntime

    exported = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=(_dynamic(facts["batch"]),),  # names the axis
        verbose=False,
        dynamo=True,
    )
    assert exported is not None
    exported.model.metadata_props[KEY] = json.dumps(facts)
    exported.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it would warn of each weight that is used in a branch
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _difference(module: nn.Module, run: RunFile, given: Input) -> tuple[float, int]:
    """(largest distance of the file's logits from the module's as a share of the largest logit, number of pictures)."""
    furthest, largest, count = 0.0, 0.0, 0
    for images in given.batches():
        expected, actual = module(images), run(images)
        distance = float((actual - expected).abs().max()) if actual.shape == expected.shape else math.inf
        furthest = distance if not distance <= furthest else furthest  # keeps NaN
        largest, count = max(largest, float(expected.abs().max())), count + len(images)
    return furthest / max(largest, torch.finfo(torch.float32).tiny), count


def _cost(module: nn.Module, program: torch.export.ExportedProgram, given: Input) -> dict[str, JsonValue]:
    """MACs of one image, None if the graph has branches; and the number of branches."""
    branches = sum(node.target is torch.ops.higher_order.cond for node in program.graph.nodes)
    macs = None if branches else cost.measure(module, given.pictures(1)).macs
    return {"macs": macs, "branches": branches}


class _Watched(torch.fx.Interpreter):
    """Runs a graph and records which way each of its branches went."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.ways: dict[str, set[bool]] = {}

    def run_node(self, n: torch.fx.Node) -> object:
        if n.target is torch.ops.higher_order.cond:
            self.ways.setdefault(n.name, set()).add(bool(self.fetch_args_kwargs_from_env(n)[0][0]))
        return super().run_node(n)


def _both_ways(program: torch.export.ExportedProgram, given: Input) -> int:
    """How many branches of the graph the pictures of the check take both ways."""
    watched = _Watched(program.module())
    for images in given.batches():
        watched.run(images)
    return sum(len(ways) == 2 for ways in watched.ways.values())


def _input_facts(given: Input) -> dict[str, JsonValue]:
    return {
        "input": "uint8 [B, S, S, 3]" if given.raw else "float32 [B, 3, S, S], (pixels / 255 - mean) / std",
        "side_px": given.side_px,
        "batch": given.batch,
        "mean": list(given.data.mean),
        "std": list(given.data.std),
    }


def _facts(model: LoadedModel, policy: str, reports: Sequence[Report], given: Input) -> dict[str, JsonValue]:
    """What the net is, and its stored figures if this policy was evaluated at this side."""
    at_side = given.side_px == model.data_config.side_for_eval
    report = next((report for report in reports if at_side and report.policy == policy), None)
    figures = ("num_images", "top1", "top5", "macs_mean")
    return {
        "family": model.family_config.name,
        "policy": policy,
        "classes": list(model.classes),
        "evaluated": {name: getattr(report, name) for name in figures} if report else None,
    }


def read(file: Path) -> Mapping[str, JsonValue]:
    """The facts in an exported file. Raises ConfigError if `adaptnet export` did not write it."""
    try:
        if file.suffix == ".onnx":
            import onnx

            props = onnx.load(file, load_external_data=False).metadata_props
            text = next(entry.value for entry in props if entry.key == KEY)
        else:
            extra = {FACTS: ""}
            torch.export.load(file, extra_files=extra)
            text = extra[FACTS]
        facts: dict[str, JsonValue] = json.loads(text)
    except Exception as error:  # each library has its own
        why = type(error).__name__
        raise ConfigError(
            f"{file}: not a file that `adaptnet export` wrote ({why})", key="file", subject=file
        ) from None
    return facts
