"""Finds the nets of one recipe that were trained with several seeds: by the group's folder, or a pattern of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import run_config
from pipeline.deploy import evaluations
from pipeline.errors import ConfigError
from pipeline.evaluation.over_seeds import SeedGroup, seed_of
from pipeline.evaluation.seed_means import mean_of
from pipeline.family import Evaluated
from pipeline.runs import records, seed_runs
from pipeline.training.checkpoint import differences


def members(source: str) -> list[str]:
    """The folders of the finished runs of the group `source`: NAME-seeds, or a pattern such as runs/NAME-s*.

    Empty if it is no group. Raises ConfigError if a pattern matches no finished run.
    """
    if seeds := seed_runs.seeds_in(Path(source)):
        folders = [seed_runs.folder_of(Path(source), seed) for seed in seeds]
    elif "*" in source:
        folders = sorted(Path(source).parent.glob(Path(source).name))
    else:
        return []
    done = [str(folder) for folder in folders if records.read_status(folder).finished and not _is_group(folder)]
    if not done:
        raise ConfigError(
            f"{source}: no finished run of a seed is there; train with `adaptnet train RECIPE --seeds 3`",
            key="source",
            subject=source,
        )
    return done


def _is_group(folder: Path) -> bool:
    return bool(seed_runs.seeds_in(folder))


def pair(a: str, b: str, uri: str | None = None) -> tuple[SeedGroup, SeedGroup]:
    """The two groups on the images that all their nets were evaluated on.

    Raises ConfigError if nets of a group differ in more than the seed, or have no images in common.
    """
    sources_a, sources_b = members(a) or [a], members(b) or [b]
    found = evaluations.together([evaluations.find(source, uri) for source in (*sources_a, *sources_b)])
    return group(a, found[: len(sources_a)]), group(b, found[len(sources_a) :])


def means(sources: Sequence[str], members: Sequence[Sequence[str]], nets: Sequence[Evaluated]) -> list[Evaluated]:
    """One net for each source: of a group the mean of its seeds, under a name that no other has.

    members: of each source (see `members`); nets: of all members and single sources, in their order. Raises ConfigError
    as `group` does.
    """
    left, shown = list(nets), list[Evaluated]()
    for source, found in zip(sources, members, strict=True):
        own = [left.pop(0) for _ in found or [source]]
        shown.append(mean_of(group(source, own)) if found else own[0])
    names = [net.name for net in shown]
    return [
        replace(net, name=source) if names.count(net.name) > 1 and net.seeds else net
        for source, net in zip(sources, shown, strict=True)
    ]


def group(name: str, nets: Sequence[Evaluated]) -> SeedGroup:
    """The nets by seed. Raises ConfigError if they differ in more than the seed, or a seed is there twice."""
    first = _learned(nets[0])
    for net in nets[1:]:
        if changed := differences(first, _learned(net)):
            raise ConfigError(
                f"{name}: {net.name} differs from {nets[0].name} in {', '.join(changed)}; give runs of one recipe, "
                "which differ in the seed only",
                key="source",
                subject=net.name,
            )
    seeds = [seed_of(net) for net in nets]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{name}: seeds {', '.join(map(str, seeds))}: a seed is there twice; give each once",
            key="source",
            subject=name,
        )
    return SeedGroup(_short(name), sorted(nets, key=seed_of))


def _short(name: str) -> str:
    return Path(name).name.removesuffix(seed_runs.GROUP).removesuffix("-s*")


def _learned(net: Evaluated) -> dict[str, object]:
    """What decides what is learned, without the seed and the images, of which a seed holds out its own.

    Without the precision too, which each run may choose by timing; reports name it.
    """
    fingerprint = run_config.fingerprint(run_config.from_stored(net.recipe, f"recipe of {net.name}"), "")
    return {key: value for key, value in fingerprint.items() if key not in ("seed", "training.precision")}
