"""Recipes by name: variants, recipes that extend others, former names."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from raised import fails

from pipeline import recipes, run_config
from pipeline.errors import ConfigError

OURS = """\
# Ours. A sentence.
extends: baseline/toy
training: {epochs: 3}
variants:
  # Shorter.
  short:
    training: {epochs: 1}
"""


@pytest.mark.parametrize("name", recipes.names())
def test_each_recipe_and_variant_is_valid_and_has_a_title(name: str) -> None:
    config = run_config.load(name, data_home="/data")
    assert config.family.name == name.partition("/")[0]
    assert len(recipes.title(name)) > 5


# training images of the sets; published recipes train on all of them
TRAINED = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "tiny-imagenet": 100_000, "imagenet": 1_281_167}
TRAINED |= {"wikiart": 42_129, "sketches": 16_000, "stl10": 5_000, "aircraft": 6_667, "cars": 8_144, "cub": 5_994}
TRAINED |= {"flowers102": 2_040, "flowers": 2_040}


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_of_a_large_set_chooses_its_checkpoint_on_held_out_images(name: str) -> None:
    """From 10,000 training images on: at most a tenth of them, and enough to tell nets apart."""
    data = run_config.load(name, data_home="/data").data
    count = TRAINED.get(data.root.name, 0)
    if count >= 10_000:
        assert data.held_out * count >= 300 and data.held_out <= 0.1
    elif count:
        assert data.held_out == 0


def test_no_two_recipes_register_under_the_same_name() -> None:
    registered = [run_config.load(name, data_home="/data").tracking.register for name in recipes.names()]
    assert len(set(registered)) == len(registered)


def test_a_variant_is_laid_over_its_recipe_and_names_the_run() -> None:
    plain, human = (run_config.load(f"shape_adaptor/cifar100_resnet50{v}", data_home="/d") for v in ("", ":human"))
    assert human.family.model_copy(update={"mode": "sa"}) == plain.family
    assert human.name == "shape_adaptor-cifar100_resnet50_human"


def test_an_override_is_laid_over_the_variant() -> None:
    config = run_config.load("arrn/cifar10:kaiser", ["family.filters=box"], data_home="/d")
    assert config.family.model_dump()["filters"] == "box"


def test_a_file_may_have_variants(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OURS)
    assert run_config.load(str(path), ["name=a"]).training.epochs == 3
    assert run_config.load(f"{path}:short", ["name=a"]).training.epochs == 1
    assert recipes.title(f"{path}:short") == "Shorter"
    over = tmp_path / "over.yaml"
    over.write_text(f"extends: {path}:short\nseed: 5\n")
    config = run_config.load(str(over), ["name=a"])
    assert (config.training.epochs, config.seed) == (1, 5)


def test_the_path_of_a_file_may_hold_colons(tmp_path: Path) -> None:
    path = tmp_path / "at-12:30" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(OURS)
    assert run_config.load(str(path), ["name=a"]).training.epochs == 3
    assert run_config.load(f"{path}:short", ["name=a"]).training.epochs == 1


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ("shape_adaptor/cifar100_resnet50_human", "shape_adaptor/cifar100_resnet50:human"),
        ("shape_adaptor/imagenet_mobilenet_v2_autosc085", "shape_adaptor/imagenet_mobilenet_v2:autosc085"),
        *recipes.FORMER.items(),
    ],
)
def test_a_former_name_is_read_with_a_warning_and_names_the_run_as_before(former: str, today: str) -> None:
    with pytest.warns(FutureWarning) as caught:
        mine = run_config.load(former, data_home="/d")
    assert today in str(caught[0].message)
    theirs = run_config.load(today, [f"name={mine.name}"], data_home="/d")
    assert mine.model_dump() == theirs.model_dump()
    assert mine.name == former.replace("/", "-")


def test_no_shipped_recipe_uses_a_former_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for name in recipes.names():
            recipes.layers(name)


def test_an_unknown_recipe_or_variant_is_refused_with_the_nearest() -> None:
    for name in ("convnet_aig/toi", "shape_adaptor/cifar100_resnet50:humane", "a/b/c", "../toy"):
        with fails(ConfigError, "recipe", subject=name):
            run_config.load(name)


@pytest.mark.parametrize(
    ("bare", "recipe"), [("cifar10_resnet20", "baseline/cifar10_resnet20"), ("resnet20", "baseline/cifar10_resnet20")]
)
def test_a_name_without_its_family_is_refused_with_the_recipes_of_that_name(bare: str, recipe: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config.load(bare)
    assert caught.value.key == "recipe" and recipe in str(caught.value)


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(f"extends: {other}\n")
    other.write_text(f"extends: {one}\n")
    with fails(ConfigError, "extends"):
        run_config.load(str(one))
