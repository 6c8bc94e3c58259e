"""`adaptnet compare`: a paired test of two trained nets on the same images."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.evaluation.comparing import AtCost, PairedTest
    from pipeline.evaluation.over_seeds import Estimate, GroupAtCost, GroupTest

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(help="run folder, checkpoint folder, models:/NAME@ALIAS, or seeds: NAME-seeds, 'NAME-s*'")
    ],
    b: Annotated[str, typer.Argument(help="net to compare A with; same forms")],
    policy_a: Annotated[str | None, typer.Option(help="policy of A; default: the first")] = None,
    policy_b: Annotated[str | None, typer.Option(help="policy of B; default: the first")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
    uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="tracking server of models:/; default runs/mlflow.db"),
    ] = None,
) -> None:
    """Tests whether net A is more accurate than net B: McNemar's test on the images that both were evaluated on, and
    the difference at equal cost along both frontiers, each with a 95 % confidence interval over images. It uses the
    evaluations stored by training and by `adaptnet evaluate`. A and B are run folders, checkpoint folders or registry
    versions.

    Of two recipes that were trained with several seeds each (`adaptnet train RECIPE --seeds 3`), A and B are the
    folders NAME-seeds, or quoted patterns. Then every figure has its standard deviation over seeds, and the difference
    is tested over seeds and images; the same seeds are compared in pairs.

    Examples:

      adaptnet compare runs/convnet_aig-toy models:/aig-toy@candidate

      adaptnet compare runs/aig-seeds 'runs/resnet-s*'

      adaptnet compare models:/aig@champion models:/ranet@candidate --policy-b budget-0.5 --json
    """
    from pipeline.deploy import evaluations, seed_groups
    from pipeline.evaluation import comparing

    if seed_groups.members(a) or seed_groups.members(b):
        _compare_groups(a, b, (policy_a, policy_b), uri, as_json=as_json)
        return
    net_a, net_b = evaluations.together([evaluations.find(source, uri) for source in (a, b)])
    pair = comparing.policies(net_a, net_b, policy_a, policy_b)
    costs = comparing.at_equal_cost(net_a, net_b)
    if as_json:
        typer.echo(json.dumps({"policies": asdict(pair), "at_equal_cost": [asdict(each) for each in costs]}, indent=1))
    else:
        _print(pair, costs)


def _compare_groups(a: str, b: str, policies: tuple[str | None, str | None], uri: str | None, *, as_json: bool) -> None:
    from pipeline.deploy import seed_groups
    from pipeline.evaluation import over_seeds

    groups = seed_groups.pair(a, b, uri)
    test, costs = over_seeds.policies(*groups, *policies), over_seeds.at_equal_cost(*groups)
    if as_json:
        document = {"over_seeds": asdict(test), "at_equal_cost": [asdict(each) for each in costs]}
        typer.echo(json.dumps(document, indent=1))
    else:
        _print_groups(test, costs)


def _print_groups(test: GroupTest, costs: Sequence[GroupAtCost]) -> None:
    from jobs import tables
    from pipeline.evaluation.frontier import macs_text

    rows = [["", "policy", "top-1 %", "sd", "95 % from", "to", "MMACs", "sd", "n"]]
    for letter, side in (("A", test.a), ("B", test.b)):
        macs = tables.of_spread(side.macs, 1e-6, 3)[:2]
        top1 = tables.of_spread(side.top1, 100, 2)
        rows.append([f"{letter}  {side.name}", side.policy, *top1, *macs, str(side.top1.n)])
    typer.echo(tables.align(rows))
    how = "the same seeds, compared in pairs" if test.paired else "different seeds, so they are not paired"
    typer.echo(f"{test.num_images:,} images; {how}")
    for name, estimate in (("over seeds", test.over_seeds), ("over seeds and images", test.over_both)):
        typer.echo(
            f"A - B = {_points(estimate.difference)} points, 95 % interval {name} {_points(estimate.low)} to "
            f"{_points(estimate.high)}; t test p = {estimate.p_value:.2g}"
        )
    typer.echo(_group_verdict(test.over_both, min(test.a.top1.n, test.b.top1.n)))
    rows = [["at equal cost", "A %", "B %", "A - B", "95 % from", "to", "n"]]
    for each in costs:
        found = each.over_both
        values = [f"{100 * each.top1_a:.2f}", f"{100 * each.top1_b:.2f}"]
        values += [_points(value) for value in (found.difference, found.low, found.high)]
        rows.append([macs_text(each.macs), *values, f"{test.a.top1.n}, {test.b.top1.n}"])
    typer.echo("\n" + tables.align(rows))


def _group_verdict(found: Estimate, n: int) -> str:
    if not found.resolved:
        return f"below the resolution of {n} seeds, which is {100 * found.resolution:.2f} points"
    return f"{'A' if found.difference > 0 else 'B'} is more accurate"


def _print(pair: PairedTest, costs: Sequence[AtCost]) -> None:
    from jobs import tables
    from pipeline.evaluation.frontier import macs_text

    for letter, side in (("A", pair.a), ("B", pair.b)):
        typer.echo(f"{letter}  {side.name} {side.policy}: top-1 {100 * side.top1:.2f} %, {macs_text(side.macs)}")
    typer.echo(f"{pair.num_images:,} images; only A is right on {pair.only_a:,}, only B on {pair.only_b:,}")
    typer.echo(
        f"A - B = {_points(pair.difference)} points, 95 % interval {_points(pair.low)} to {_points(pair.high)}; "
        f"McNemar's p = {pair.p_value:.2g}: {_verdict(pair)}"
    )
    rows = [["at equal cost", "A %", "B %", "A - B", "95 % from", "to"]]
    for each in costs:
        accuracies = [f"{100 * each.top1_a:.2f}", f"{100 * each.top1_b:.2f}"]
        difference = [_points(value) for value in (each.difference, each.low, each.high)]
        rows.append([macs_text(each.macs), *accuracies, *difference])
    typer.echo("\n" + tables.align(rows))


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _verdict(pair: PairedTest) -> str:
    if pair.p_value >= 0.05:
        return "no significant difference on these images"
    return f"{'A' if pair.difference > 0 else 'B'} is more accurate"
