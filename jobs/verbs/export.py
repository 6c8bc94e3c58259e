"""`adaptnet export`: a static policy of a trained net as a file for torch.export or ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import ConfigError

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

EXAMPLES = """Writes MODEL under a policy that does the same for every image to a file that runs without adaptnet: a
resolution of ARRN, an exit of RANet, a frozen shape, a fixed mask of gates. The file's logits are checked against the
net's on random pictures before it is put in its place; it also holds mean, std, classes and MACs per image. Gates that
decide by image are exported for one image at a time, each block as a branch of the graph (--batch 1).

Without --policy, the policies that can be exported are listed.

Examples:

  adaptnet export runs/convnet_aig-toy --policy mask-0.5

  adaptnet export models:/aig-toy@candidate --policy gates-hard --batch 1 --format onnx --out gated.onnx

  adaptnet export runs/arrn-toy --policy 16px --side-px 16 --raw
"""


@app.command(help=EXAMPLES)
def export(
    model: Annotated[str, typer.Argument(help="run folder, checkpoint folder or models:/NAME@ALIAS")],
    policy: Annotated[str | None, typer.Option(help="the way to run the net, e.g. exit-2; none: list them")] = None,
    form: Annotated[str, typer.Option("--format", help="pt2 or onnx")] = "pt2",
    out: Annotated[Path | None, typer.Option(help="the file; default NAME-POLICY.FORMAT here")] = None,
    side_px: Annotated[int | None, typer.Option(help="side of the images; default the evaluation's")] = None,
    batch: Annotated[str, typer.Option(help="images at a time, or `dynamic`: any number")] = "dynamic",
    raw: Annotated[bool, typer.Option("--raw", help="take uint8 pixels [B, S, S, 3]; the file normalises")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,
    uri: Annotated[str | None, typer.Option(help="tracking server of models:/; default runs/mlflow.db")] = None,
) -> None:
    from pipeline.deploy import export as exports

    if policy is None:
        typer.echo("\n".join(exports.names(model, uri)))
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
    typer.echo(_told(done.facts))
    typer.echo(f"checked on {done.num_images} random pictures: logits within {done.difference:.1e} of the largest")
    if branches := done.facts["branches"]:
        typer.echo(f"these took {done.both_ways} of its {branches} branches both ways")
    typer.echo(f"written to {done.file} ({done.file.stat().st_size / 1e6:.2f} MB)")


def _batch(text: str) -> Any:
    if text != "dynamic" and not text.isdecimal():
        raise ConfigError(f"--batch (={text}): a number of images, at least 1, or `dynamic`")
    return text if text == "dynamic" else int(text)


def _told(facts: Any) -> str:
    price = "MACs by image" if facts["macs"] is None else f"{facts['macs'] / 1e6:.3f} MMACs per image"
    what = f"{facts['source']} (step {facts['step']}), {facts['policy']}"
    return f"{what}: {facts['input']}, S = {facts['side_px']}, {price}"
