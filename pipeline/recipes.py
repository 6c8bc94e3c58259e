"""The shipped recipes: YAML files `families/<family>/recipes/<recipe>.yaml`, their variants, and their former names.

A recipe may extend another (`extends: baseline/toy`) and may hold `variants:`, a mapping from a variant's name to the
keys that are laid over the recipe: `shape_adaptor/cifar100_resnet50:human` is the variant `human` of that recipe.
The comment above a variant is its header, as the comment at the top is that of the recipe.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import takewhile
from pathlib import Path

from pipeline import config as configs
from pipeline.errors import ConfigError, JsonValue

FOLDER = Path(__file__).parent / "families"
YAML = (".yaml", ".yml")
HEADINGS = ("Source", "Command", "Hardware", "Published", "Ours")  # of a recipe's header
FORMER = {  # names of recipes before they became variants; RECIPE_VARIANT is read as RECIPE:VARIANT without an entry
    "arrn/imagenet_s_steep": "arrn/imagenet",
    "baseline/cifar10_low_pass": "baseline/cifar10_resolutions:low_pass",
    "baseline/cifar10_preresnet110": "baseline/cifar10_resnet110:preactivation",
    "baseline/cifar10_stochastic_depth110": "baseline/cifar10_resnet110:stochastic_depth",
    "shape_adaptor/fine_tuned_cars": "shape_adaptor/autotl_cars:human",
    "shape_adaptor/fine_tuned_cub": "shape_adaptor/autotl_cub:human",
    "shape_adaptor/fine_tuned_flowers102": "shape_adaptor/autotl_flowers102:human",
    "shape_adaptor/fine_tuned_sketches": "shape_adaptor/autotl_sketches:human",
    "shape_adaptor/fine_tuned_wikiart": "shape_adaptor/autotl_wikiart:human",
}


def names() -> list[str]:
    """Every shipped recipe as `family/recipe`, each followed by its variants as `family/recipe:variant`."""
    found = sorted((f"{path.parent.parent.name}/{path.stem}", path) for path in FOLDER.glob("*/recipes/*.yaml"))
    return [name for recipe, path in found for name in (recipe, *(f"{recipe}:{each}" for each in _variants(path)))]


def title(name: str) -> str:
    """The first sentence of the header of a shipped recipe or variant."""
    return re.split(r"\.(?= |$)", _comment(name), maxsplit=1)[0]


def header(name: str) -> dict[str, str]:
    """What the header of a shipped recipe or variant says under Source, Command, Hardware, Published and Ours."""
    parts = re.split(rf"(?:^|(?<=[.)] ))({'|'.join(HEADINGS)})(?:, [^:]*)?: ", _comment(name))
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def _comment(name: str) -> str:
    """The comment above a shipped recipe or variant, as one line."""
    recipe, variant = _split(name)
    lines = _path(recipe).read_text(encoding="utf-8").splitlines()
    if variant:
        key = re.compile(rf"  {re.escape(variant)}:")
        place = next(number for number, line in enumerate(lines) if key.match(line))
        lines = [line.strip() for line in lines[:place]]
        lines = [*takewhile(lambda line: line.startswith("#"), reversed(lines))][::-1]
    return " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))


def layers(source: str) -> list[dict[str, JsonValue]]:
    """The mappings whose keys make up a recipe, to be laid over one another in this order.

    source: `family/recipe` or the path of a YAML file, each with `:variant` behind it to select a variant. The recipes
    that it extends come first. A former name of a shipped recipe is read with a FutureWarning. Raises ConfigError if
    there is no such recipe or variant.
    """
    return _layers(source, ())


def run_name(source: str) -> str:
    """The name of a run of this recipe unless the recipe or an override gives one."""
    recipe, variant = _split(source)
    name = recipe.removesuffix(".yaml").strip("./").replace("/", "-")
    return f"{name}_{variant}" if variant else name


def _layers(source: str, above: tuple[str, ...]) -> list[dict[str, JsonValue]]:
    if source in above:
        chain = " -> ".join([*above, source])
        raise ConfigError(f"recipe {source} extends itself: {chain}", key="extends", subject=source)
    recipe, variant = _split(_today(source))
    mapping = configs.read_mapping(_path(recipe))
    over = _of_variant(configs.section(mapping, "variants"), recipe, variant)
    mapping.pop("variants", None)
    base = mapping.pop("extends", None)
    if not isinstance(base, str | None):
        raise ConfigError(
            f"recipe {source}: extends (={base!r}): name one recipe, e.g. baseline/toy", key="extends", subject=base
        )
    below = [] if base is None else _layers(base, (*above, source))
    return [*below, mapping, *([over] if over else [])]


def _split(source: str) -> tuple[str, str]:
    """The recipe and the variant, "" for the recipe itself; the path of a YAML file may hold colons."""
    if source.endswith(YAML):
        return source, ""
    recipe, _, variant = source.rpartition(":") if ":" in source else (source, "", "")
    return recipe, variant


def _today(source: str) -> str:
    """Today's name of a recipe; a former one is reported as a FutureWarning."""
    if source.endswith(YAML) or ":" in source or _file(source).is_file():
        return source
    name = FORMER.get(source) or next((name for name in names() if name.replace(":", "_") == source), None)
    if name is None:
        return source
    warnings.warn(f"recipe {source} is now called {name}", FutureWarning, stacklevel=2)
    return name


def _of_variant(variants: Mapping[str, JsonValue], recipe: str, variant: str) -> dict[str, JsonValue]:
    if variant and variant not in variants:
        known = f"known: {', '.join(variants)}" if variants else "it has none"
        raise ConfigError(
            f"recipe {recipe}:{variant}: no such variant; {known}", key="recipe", subject=f"{recipe}:{variant}"
        )
    return configs.section(variants, variant)


@cache
def _variants(path: Path) -> Sequence[str]:
    """The names of a shipped recipe's variants; a file without any is not parsed."""
    if "\nvariants:" not in path.read_text(encoding="utf-8"):
        return ()
    return tuple(configs.section(configs.read_mapping(path), "variants"))


def _path(recipe: str) -> Path:
    if recipe.endswith(YAML):
        if not Path(recipe).is_file():
            raise ConfigError(f"recipe {recipe}: no such file", key="recipe", subject=recipe)
        return Path(recipe)
    if recipe.count("/") != 1 or not _file(recipe).is_file():
        raise ConfigError(f"recipe {recipe}: no such recipe{_hint(recipe, names())}", key="recipe", subject=recipe)
    return _file(recipe)


def _file(recipe: str) -> Path:
    family, _, name = recipe.partition("/")
    return FOLDER / family / "recipes" / f"{name}.yaml"


def _hint(source: str, known: Sequence[str]) -> str:
    """The nearest recipe, and the recipes of that family; the families if the family is unknown as well."""
    if "/" not in source and (named := _named(source, known)):
        return f"; did you mean {named[0]}? Known of this name: {', '.join(named)}; or a path ending in .yaml"
    family = source.partition("/")[0]
    families = sorted({name.partition("/")[0] for name in known})
    near = get_close_matches(family, families, 1, 0.6)
    own = [name for name in known if near and name.startswith(f"{near[0]}/")]
    close = get_close_matches(source, own or known, 1, 0.4)
    there = f"recipes of {near[0]}: {', '.join(own)}" if own else f"families: {', '.join(families)}"
    return (f"; did you mean {close[0]}? " if close and own else ". ") + f"Known {there}; or a path ending in .yaml"


def _named(bare: str, known: Sequence[str]) -> list[str]:
    """The recipes whose name without the family is `bare`, or else contains it."""
    for found in (
        [each for each in known if each.partition("/")[2] == bare],
        [each for each in known if bare and bare in each.partition("/")[2]],
    ):
        if found:
            return found
    return []
