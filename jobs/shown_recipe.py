"""What `adaptnet train --show` prints: the resolved recipe as a table, as YAML or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from jobs import environment, tables
from pipeline import config as configs
from pipeline.errors import JsonValue, without_secrets

if TYPE_CHECKING:
    from pipeline.run_config import RunConfig

VALUE_COLUMNS = 48  # a longer value is cut in the table


@dataclass(frozen=True)
class RecipeSource:
    """Where a resolved recipe comes from: its name, the command's overrides, what the environment sets."""

    recipe: str
    overrides: Sequence[str]
    layer: Mapping[str, JsonValue]


def show(config: RunConfig, source: RecipeSource, *, seeds: int | None, as_json: bool) -> None:
    """Prints the recipe: a table on a terminal, else YAML that is a recipe again, or JSON that is one too."""
    if as_json:
        typer.echo(without_secrets(json.dumps(configs.as_mapping(config), indent=1)))
        return
    if sys.stdout.isatty():
        typer.echo(table(config, source))
    else:
        typer.echo(configs.dump_yaml(configs.as_mapping(config)), nl=False)
    typer.echo("\n".join(_remarks(config, source, seeds)))


def table(config: RunConfig, source: RecipeSource) -> str:
    """A row for each key: its value, and whether the command, the recipe, the environment or the default gave it."""
    from pipeline import run_config

    values = configs.flat(configs.as_mapping(config))
    origins = run_config.origins(list(values), source.recipe, source.overrides, source.layer)
    rows = [[key, _shown(value), origins[key]] for key, value in values.items()]
    return tables.align([["key", "value", "from"], *rows], left=True)


def _shown(value: JsonValue) -> str:
    text = without_secrets(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= VALUE_COLUMNS else f"{text[: VALUE_COLUMNS - 4]} ..."


def _remarks(config: RunConfig, source: RecipeSource, seeds: int | None) -> list[str]:
    lines = environment.origins(config, source.recipe, source.overrides, source.layer)
    lines += [f"# {config.training.scaling}"] if config.training.scaling is not None else []
    first = config.seed
    of_seeds = f"# seeds: {first} to {first + (seeds or 1) - 1}, as runs {config.name}-s{first}, ..."
    return lines if seeds is None else [*lines, of_seeds]
