"""Static policies of a trained net as files that run without this project: torch.export's .pt2, and ONNX.

A file holds one way to run the net, for images of one size, and what its answers need: mean, std, classes, price. It
is written aside, loaded again and held against the net itself on random pictures before it is moved to its place.
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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import cost
from pipeline.data import pixels
from pipeline.data.config import DataConfig
from pipeline.deploy import evaluations
from pipeline.errors import ConfigError, ContractError, ResourceError
from pipeline.family import Report
from pipeline.registry.model import LoadedModel, describe, load_model
from pipeline.registry.resolve import resolve
from pipeline.runs.files import whole_file
from pipeline.training import checkpoint

FORMATS = ("pt2", "onnx")
FACTS, KEY = "adaptnet.json", "adaptnet"  # where a .pt2 and an .onnx file say what they are
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # the extra `onnx`
TOLERANCE = 1e-4  # how far a file's logits may lie from the net's, as a share of the largest logit
WASTE = 0.01  # share of weights that the graph does not read and that a file may hold all the same
MOST_IMAGES = 65536  # in a batch, where their number is left open
GRAINS = (1, 2, 4, 8, 16)  # how many squares random pictures have across, besides those of single pixels
CHECKED = 20  # pictures, or two batches if that is more
Batch = int | Literal["dynamic"]
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Input:
    """What a file takes: normalised images [B, 3, S, S] f32, or uint8 pixels [B, S, S, 3] if `raw`."""

    side_px: int
    batch: Batch
    raw: bool
    data: DataConfig

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of images that a file is tried with; the first is the one that it is traced with."""
        return (2, 1, 5) if self.batch == "dynamic" else (self.batch,)

    def pictures(self, count: int, number: int = 0) -> Tensor:
        """Random pictures in this form: squares of `number`'s grain."""
        generator = torch.Generator().manual_seed(number)
        across = (*GRAINS, self.side_px)[number % (len(GRAINS) + 1)]
        squares = torch.randint(256, (count, 3, across, across), generator=generator, dtype=torch.uint8)
        found = F.interpolate(squares, (self.side_px, self.side_px)).permute(0, 2, 3, 1).contiguous()
        return found if self.raw else pixels.normalise(found, self.data.mean, self.data.std).contiguous()

    def batches(self) -> Iterator[Tensor]:
        """What a file is checked on."""
        rounds = max(2, len(self.sizes), CHECKED * len(self.sizes) // sum(self.sizes))
        for number, count in enumerate(islice(cycle(self.sizes), rounds)):
            yield self.pictures(count, number)


class FromPixels(nn.Module):
    """A module of normalised images behind the normalisation of uint8 pixels [B, S, S, 3]."""

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
    """A file, what stands in it, and how it stood the check on num_images random pictures."""

    file: Path
    facts: Mapping[str, Any]
    difference: float  # of its logits from the net's, as a share of the largest
    num_images: int
    both_ways: int  # branches of the graph that these pictures took both ways


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
    """Writes the trained net `source` under a static policy to `out`, by default NAME-POLICY.FORMAT here.

    side_px is that of the images, by default the evaluation's; for batch and raw see `Input`.
    Raises ConfigError for a policy that is unknown or decides by image, and for a file that exists, unless `force`;
    ContractError where the file's logits are not the net's.
    """
    _check(form, side_px, batch)
    folder = resolve(source, uri)
    found, model = describe(folder), load_model(folder)
    target = out or Path(f"{found.recipe.get('name') or model.family_config.name}-{policy}.{form}")
    _check_target(target, form, force)
    given = Input(side_px or model.data_config.side_for_eval, batch, raw, model.data_config)
    reports = _reports(source, uri)
    module = static(model, policy, reports, given)
    facts = {"source": source, "step": found.step, "sha256": checkpoint.sha256(found.weights)}
    return write(module, given, target, form, {**facts, **_facts(model, policy, reports, given)})


def names(source: str, uri: str | None = None) -> list[str]:
    """The policies of the trained net `source` that can be exported."""
    model = load_model(resolve(source, uri))
    return list(model.family.static(model.family_config, model.net, _reports(source, uri)))


def _check(form: str, side_px: int | None, batch: Batch) -> None:
    if form not in FORMATS:
        raise ConfigError(f"--format (={form}): no such format; known: {', '.join(FORMATS)}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if form == "onnx" and missing:
        raise ConfigError(
            f"--format onnx needs {', '.join(missing)}, which this environment has not: install the extra `onnx`, "
            "e.g. pip install -c constraints.txt -e '.[onnx]', or take --format pt2"
        )
    if side_px is not None and side_px < 1:
        raise ConfigError(f"--side-px (={side_px}): at least 1")
    if batch != "dynamic" and batch < 1:
        raise ConfigError(f"--batch (={batch}): a number of images, at least 1, or `dynamic`")


def _check_target(target: Path, form: str, force: bool) -> None:
    if target.suffix != f".{form}":
        raise ConfigError(f"{target}: a file of --format {form} ends in .{form}")
    if target.exists() and not (force and target.is_file()):
        what = "exists; name another with --out, or replace it with --force" if target.is_file() else "is no file"
        raise ConfigError(f"{target}: {what}")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}")


def _reports(source: str, uri: str | None) -> Sequence[Report]:
    """The net's stored reports; none where it was never evaluated."""
    try:
        net = evaluations.find(source, uri)
    except ConfigError:
        return ()
    stored = net.on(net.sets[0])
    return stored.reports if stored else ()


def static(model: LoadedModel, policy: str, reports: Sequence[Report], given: Input) -> nn.Module:
    """The net under `policy` as a module in eval mode that takes what `given` says.

    Raises ConfigError listing the static policies where this is none, and by the net's own rule for too small images.
    """
    makers = model.family.static(model.family_config, model.net, reports)
    if policy not in makers:
        decides = policy in [known.name for known in model.policies]
        why = "what it runs depends on the image, which a file cannot hold" if decides else "no such policy"
        more = "" if reports else "; there may be more once `adaptnet evaluate` has stored what the net does"
        raise ConfigError(f"policy {policy}: {why}; this net can be exported as: {', '.join(makers)}{more}")
    normalised = Input(given.side_px, given.batch, False, given.data).pictures(given.sizes[0])
    module = makers[policy](normalised).eval()
    return FromPixels(module, given.data).eval() if given.raw else module


def write(module: nn.Module, given: Input, target: Path, form: str, facts: Mapping[str, Any]) -> Exported:
    """Writes a module that takes what `given` says to `target`, whole and checked or not at all.

    Raises ContractError where torch cannot trace it, or the file's logits are not the module's.
    """
    with torch.no_grad():
        program = _traced(module, given)
        whole = {**facts, **_price(module, program, given), **_of(given), "torch": torch.__version__}
        with _aside(target) as aside:
            run = (_write_onnx if form == "onnx" else _write_pt2)(program, aside, whole)
            difference, count = _difference(module, run, given)
            if not difference <= TOLERANCE:
                raise ContractError(
                    f"{target}: not written, for its logits lie {difference:.1e} of the largest from the net's on "
                    f"{count} random pictures; at most {TOLERANCE:g} is allowed"
                )
        both_ways = _both_ways(program, given) if whole["branches"] else 0
    return Exported(target, whole, difference, count, both_ways)


def _traced(module: nn.Module, given: Input) -> torch.export.ExportedProgram:
    """The module as a graph, without weights that it does not use but for a few, such as BatchNorm's counts."""
    images = given.pictures(given.sizes[0])
    module(images)  # the net's own rules speak first
    shapes = {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)} if given.batch == "dynamic" else None
    try:
        program = torch.export.export(module, (images,), dynamic_shapes=(shapes,))
        unused = _unused(program)
        sizes = {name: value.numel() for name, value in module.state_dict().items()}
        if sum(sizes.get(name, 0) for name in unused) > WASTE * sum(sizes.values()):
            program = torch.export.export(_without(module, unused), (images,), dynamic_shapes=(shapes,))
    except (RuntimeError, torch._dynamo.exc.UserError) as error:
        raise ContractError(f"{type(module).__name__}: torch.export cannot trace it: {error}") from error
    return program


def _unused(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the weights that no step of the graph reads."""
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
    """A path to write to, moved over `target` at the end of the block; nothing is left of it where that fails."""
    try:
        with whole_file(target) as aside:
            yield aside
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({error.strerror or error})") from None


def _write_pt2(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, Any]) -> Run:
    torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})
    found: Run = torch.export.load(path).module()
    return found


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, Any]) -> Run:
    import onnxruntime

    found = torch.onnx.export(program, input_names=["images"], output_names=["logits"], verbose=False, dynamo=True)
    assert found is not None
    found.model.metadata_props[KEY] = json.dumps(facts)
    found.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; branches leave weights that it would name one by one
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _difference(module: nn.Module, run: Run, given: Input) -> tuple[float, int]:
    """(largest distance of the file's logits from the module's, as a share of the largest logit; pictures)."""
    furthest, largest, count = 0.0, 0.0, 0
    for images in given.batches():
        expected, found = module(images), run(images)
        distance = float((found - expected).abs().max()) if found.shape == expected.shape else math.inf
        furthest = distance if not distance <= furthest else furthest  # NaN stays
        largest, count = max(largest, float(expected.abs().max())), count + len(images)
    return furthest / max(largest, torch.finfo(torch.float32).tiny), count


def _price(module: nn.Module, program: torch.export.ExportedProgram, given: Input) -> Mapping[str, Any]:
    """MACs of one image; None where the graph has branches, whose number is told."""
    branches = sum(node.target is torch.ops.higher_order.cond for node in program.graph.nodes)
    macs = None if branches else cost.measure(module, given.pictures(1)).macs
    return {"macs": macs, "branches": branches}


class _Watched(torch.fx.Interpreter):
    """Runs a graph and notes which way each of its branches went."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.ways: dict[str, set[bool]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target is torch.ops.higher_order.cond:
            self.ways.setdefault(n.name, set()).add(bool(self.fetch_args_kwargs_from_env(n)[0][0]))
        return super().run_node(n)


def _both_ways(program: torch.export.ExportedProgram, given: Input) -> int:
    """How many branches of the graph the checked pictures take both ways."""
    watched = _Watched(program.module())
    for images in given.batches():
        watched.run(images)
    return sum(len(ways) == 2 for ways in watched.ways.values())


def _of(given: Input) -> Mapping[str, Any]:
    return {
        "input": "uint8 [B, S, S, 3]" if given.raw else "float32 [B, 3, S, S], (pixels / 255 - mean) / std",
        "side_px": given.side_px,
        "batch": given.batch,
        "mean": list(given.data.mean),
        "std": list(given.data.std),
    }


def _facts(model: LoadedModel, policy: str, reports: Sequence[Report], given: Input) -> Mapping[str, Any]:
    """What the net is; its stored figures where this very policy was evaluated, at this side."""
    at_side = given.side_px == model.data_config.side_for_eval
    report = next((report for report in reports if at_side and report.policy == policy), None)
    figures = ("num_images", "top1", "top5", "macs_mean")
    return {
        "family": model.family_config.name,
        "policy": policy,
        "classes": list(model.classes),
        "evaluated": {name: getattr(report, name) for name in figures} if report else None,
    }


def read(file: Path) -> Mapping[str, Any]:
    """What an exported file says of itself. Raises ConfigError where it is none of ours."""
    try:
        if file.suffix == ".onnx":
            import onnx

            props = onnx.load(file, load_external_data=False).metadata_props
            text = next(entry.value for entry in props if entry.key == KEY)
        else:
            extra = {FACTS: ""}
            torch.export.load(file, extra_files=extra)
            text = extra[FACTS]
        found: Mapping[str, Any] = json.loads(text)
    except Exception as error:  # each library has its own
        raise ConfigError(f"{file}: not a file that `adaptnet export` wrote ({type(error).__name__})") from None
    return found
