"""`adaptnet export`: writes a static policy of a trained net as a file of torch.export or ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.deploy.export import Batch, Exportable

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

EXPLAINED = {  # of kinds that say more here than their description
    "": "runs the same blocks for every image; no policy of an evaluation",
    "gates": "; a file takes one image at a time (--batch 1)",
}


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="run folder, checkpoint folder or models:/NAME@ALIAS")],
    policy: Annotated[str | None, typer.Option(help="policy to export, e.g. exit-2; default: list policies")] = None,
    form: Annotated[str, typer.Option("--format", help="pt2 or onnx")] = "pt2",
    out: Annotated[Path | None, typer.Option(help="file to write; default: NAME-POLICY.FORMAT in this folder")] = None,
    side_px: Annotated[int | None, typer.Option(help="side of the images; default: that of the evaluation")] = None,
    batch: Annotated[str, typer.Option(help="number of images in a batch, or `dynamic` for any number")] = "dynamic",
    raw: Annotated[bool, typer.Option("--raw", help="take uint8 pixels [B, S, S, 3]; the file normalises")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
    uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="tracking server of models:/; default: runs/mlflow.db"),
    ] = None,
) -> None:
    """Writes MODEL under a static policy, one that does the same for every image, to a file that runs without adaptnet.
    Static policies are a resolution of ARRN, an exit of RANet, a frozen shape or a fixed mask of gates. Before the file
    is moved to its final place its logits are compared with those of the net on random images. The file also holds
    mean, std, classes and MACs per image. Gates that decide image by image can be exported for one image at a time
    (--batch 1), with each block as a branch of the graph.

    Without --policy this lists the net's policies, what each does, and which of them can be exported.

    Examples:

      adaptnet export runs/convnet_aig-toy --policy mask-0.5

      adaptnet export models:/aig-toy@candidate --policy gates-hard --batch 1 --format onnx --out gated.onnx

      adaptnet export runs/arrn-toy --policy 16px --side-px 16 --raw
    """
    from pipeline.deploy import export as exports

    if policy is None:
        _list(exports.exportable(model, uri), model)
        return
    done = exports.export(
        model,
        policy,
        form=form,
        out=out,
        side_px=side_px,
        batch=_batch(batch),
        raw=raw,
        force=force,
        uri=uri,
    )
    typer.echo(_summary(done.facts))
    typer.echo(f"checked on {done.num_images} random images: logits within {done.difference:.1e} of the largest")
    if branches := done.facts["branches"]:
        typer.echo(f"these images took {done.both_ways} of the {branches} branches in both directions")
    typer.echo(f"written to {done.file} ({done.file.stat().st_size / 1e6:.2f} MB)")


def _list(policies: Sequence[Exportable], model: str) -> None:
    from jobs import tables

    fixed = [each for each in policies if each.fixed]
    rows = [["policy", "top-1 %", "MMACs", "what it does"], *(_row(each) for each in fixed)]
    typer.echo("A policy is one way to run the net. A file holds one, which must do the same for every image:\n")
    typer.echo(tables.align(rows, left=True))
    if deciding := [each.name for each in policies if not each.fixed]:
        typer.echo(f"\nThese decide image by image and cannot be exported: {', '.join(deciding)}")
    if all(each.report is None for each in policies):
        typer.echo(f"\nNo figures are stored; `adaptnet evaluate {model}` measures them")
    if fixed:
        typer.echo(f"\nNext: adaptnet export {model} --policy {fixed[0].name}")


def _row(policy: Exportable) -> list[str]:
    report = policy.report
    figures = [f"{100 * report.top1:.2f}", f"{report.macs_mean / 1e6:.3f}"] if report else ["-", "-"]
    return [policy.name, *figures, policy.what + EXPLAINED.get(policy.kind, "")]


def _batch(text: str) -> Batch:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal():
        message = f"--batch (={text}) must be a number of images, at least 1, or `dynamic`"
        raise ConfigError(message, key="--batch", subject=text)
    return int(text)


def _summary(facts: Mapping[str, object]) -> str:
    macs = facts["macs"]
    cost = f"{macs / 1e6:.3f} MMACs per image" if isinstance(macs, int | float) else "MACs depend on the image"
    what = f"{facts['source']} (step {facts['step']}), {facts['policy']}"
    return f"{what}: {facts['input']}, S = {facts['side_px']}, {cost}"
