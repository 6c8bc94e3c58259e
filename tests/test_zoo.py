"""The zoo: a net is named by zoo:NAME wherever a trained net is named, and an unknown name is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from raised import fails

from pipeline import zoo
from pipeline.deploy import evaluations, predicting
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import load_reports
from pipeline.registry.model import write_model_folder
from pipeline.registry.resolve import resolve


@pytest.fixture(scope="module")
def nets(finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with one net, `exits`, beside a folder that is no net."""
    home, run = tmp_path_factory.mktemp("zoo"), finished["ranet"]
    write_model_folder(resolve(str(run)), load_reports(run / "evaluations" / "final"), home / "exits", evaluated_on="d")
    (home / "notes").mkdir()
    return home


def test_the_shipped_names_are_those_of_the_folders() -> None:
    assert all(zoo.folder(name).parent == zoo.NETS for name in zoo.names())


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    assert zoo.names(tmp_path / "nothing") == []
    for name in ("exists-not", "zoo:exists-not", "..", "zoo:", "zoo:/"):
        with fails(ConfigError, "source", subject="zoo:"):
            zoo.folder(name, tmp_path)
    with fails(ConfigError, "source", subject="zoo:exists-not"):
        resolve("zoo:exists-not")


def test_a_net_of_the_zoo_answers_as_the_run_it_was_made_from(nets: Path, finished: dict[str, Path]) -> None:
    assert zoo.names(nets) == ["exits"]
    picture = sorted((finished["ranet"].parents[1] / "images5" / "val").rglob("*.jpg"))[:1]
    shipped = predicting.load("zoo:exits", device="cpu", nets=nets)
    trained = predicting.load(str(finished["ranet"]), device="cpu")
    (here,), (there,) = (list(each.answers(picture, "exit-1")) for each in (shipped, trained))
    assert here == there
    assert [each.policy for each in shipped.reports] == [each.policy for each in trained.reports]


def test_its_evaluations_are_beside_the_runs(nets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    net = evaluations.find("zoo:exits", nets=nets)
    assert net.run_dir is None and net.sets == ["d"]
    (made,) = (nets / "exits" / "reports").iterdir()
    place = tmp_path / "runs" / "evaluations" / "zoo-exits" / "mine"
    place.mkdir(parents=True)
    shutil.copyfile(made, place / "reports.json")
    (place / "about.json").write_text(f'{{"step": {net.model.step}, "data": "e"}}')
    assert set(evaluations.find("zoo:exits", nets=nets).sets) == {"d", "e"}
