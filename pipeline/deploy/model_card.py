"""The model card of a trained net in Hugging Face's form: YAML front matter, then Markdown; and the folder to upload.

Every figure is that of a stored evaluation; a card of a net without one says so. `push` writes the layout that
`huggingface_hub.upload_folder` takes: README.md (the card), model.safetensors, recipe.yaml and config.json, beside
card.json and reports/, by which every command that takes a model's folder reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import config as configs
from pipeline import family as families
from pipeline.data.config import DataConfig
from pipeline.deploy import evaluations
from pipeline.deploy.evaluations import EvaluatedNet, Stored
from pipeline.errors import ConfigError, JsonValue
from pipeline.family import Report
from pipeline.registry import catalogue, public
from pipeline.registry.model import ORIGIN_OF_CARD, write_model_folder
from pipeline.runs import provenance
from pipeline.runs.files import write_json, write_text

README = "README.md"
LISTED = 20  # classes that a card names
# Hugging Face's identifiers of licences that weights usually have; any other is `other`, with its name
LICENCES = frozenset({
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "unlicense",
    "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0",
    "openrail", "unknown",
})  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """What a card states besides the net, its recipe and its evaluations; None or {} where it is not known.

    name: title of the card. licence: of the weights, as the user gave it. commit: of the code that trained the net.
    uncommitted: whether that code had changes besides. lineage: the weights that the training started from.
    """

    name: str
    licence: str | None = None
    note: str | None = None
    commit: str | None = None
    uncommitted: bool = False
    lineage: Mapping[str, str] = field(default_factory=dict)


def card(source: str, uri: str | None = None, *, licence: str | None = None, note: str | None = None) -> str:
    """The card of the net that `source` names: a version (also NAME alone), or the folder of a run or of a model.

    licence, note: what the user states; by default what was registered with the version, or pushed with the folder.
    Raises ConfigError if nothing has this name.
    """
    source = reference_of(source)
    net = evaluations.look_up(source, uri)
    return text_of(net, _facts(net, source, uri, licence, note))


def push(
    source: str, folder: Path, uri: str | None = None, *, licence: str | None = None, note: str | None = None
) -> Path:
    """Writes the net and its card to a new folder, completely or not at all, in the layout of the module's head.

    Raises ConfigError if the folder exists, ResourceError if it cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"--to (={folder}): exists already; name a new folder", key="--to", subject=folder)
    source = reference_of(source)
    net = evaluations.look_up(source, uri)
    facts = _facts(net, source, uri, licence, note)

    def add(aside: Path) -> None:
        write_text(aside / README, text_of(net, facts))
        write_json(aside / "config.json", _hub_config(net))

    stored = net.newest if net.sets else None
    return write_model_folder(
        net.model.folder,
        stored.reports if stored else (),
        folder,
        evaluated_on=stored.data if stored else None,
        origin=_origin(facts),
        for_hub=add,
    )


def _origin(facts: CardFacts) -> dict[str, JsonValue]:
    known: dict[str, JsonValue] = {"name": facts.name, "licence": facts.licence, "note": facts.note}
    return {**known, "commit": facts.commit, "uncommitted": facts.uncommitted, **facts.lineage}


def reference_of(source: str) -> str:
    """A name without a folder behind it means the newest version of that name."""
    plain = re.fullmatch(r"[\w.-]+", source) is not None and not Path(source).exists()
    return f"models:/{source}/latest" if plain else source


def _facts(net: EvaluatedNet, source: str, uri: str | None, licence: str | None, note: str | None) -> CardFacts:
    known = {
        **_of_training(net),
        **_of_folder(net),
        **(_of_version(source, uri) if source.startswith("models:") else {}),
    }
    known |= {key: text for key, text in (("licence", licence), ("note", note)) if text}
    name = known.get("name") or str(net.model.recipe.get("name") or net.config.name)
    lineage = {key: public.name_of(known[key]) for key in ("start_from",) if key in known}
    lineage |= {key: known[key] for key in ("imported",) if key in known}
    changed = known.get("uncommitted", "").lower() == "true"
    return CardFacts(name, known.get("licence"), known.get("note"), known.get("commit"), changed, lineage)


def _of_training(net: EvaluatedNet) -> dict[str, str]:
    git = provenance.read(net.run_dir).get("git") if net.run_dir else None
    started = net.model.section("training").get("start_from")
    of_code = {"commit": git["commit"], "uncommitted": str(git.get("dirty", False))} if git else {}
    return of_code | ({"start_from": str(started)} if started else {})


def _of_folder(net: EvaluatedNet) -> dict[str, str]:
    """What a pushed folder says of itself."""
    stored = net.model.card.get(ORIGIN_OF_CARD)
    return {key: str(value) for key, value in stored.items() if value} if isinstance(stored, Mapping) else {}


def _of_version(source: str, uri: str | None) -> dict[str, str]:
    place = catalogue.address(uri)
    version = catalogue.lookup(source, place)
    of_code = catalogue.code_of(version, place)
    keys = ("licence", "note", "start_from", "imported")
    known = {key: version.tags[f"adaptnet.{key}"] for key in keys if f"adaptnet.{key}" in version.tags}
    return {"name": version.name, **known, **of_code}


# ---- the text


def text_of(net: EvaluatedNet, facts: CardFacts) -> str:
    """The whole card: front matter, then the sections."""
    return f"---\n{configs.dump_yaml(_front_matter(net, facts))}---\n\n" + "\n".join(_sections(net, facts))


def _front_matter(net: EvaluatedNet, facts: CardFacts) -> dict[str, JsonValue]:
    licence = (facts.licence or "other").lower()
    named: dict[str, JsonValue] = {"license": licence}
    if licence not in LICENCES:
        named = {"license": "other", **({"license_name": facts.licence} if facts.licence else {})}
    return {
        **named,
        "library_name": "adaptnet",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "adaptive-inference", net.config.name],
        "datasets": [_data_name(net)],
        "metrics": ["accuracy"],
        "model-index": [{"name": facts.name, "results": [_result(net, net.on(data)) for data in net.sets]}],
    }


def _result(net: EvaluatedNet, stored: Stored | None) -> JsonValue:
    assert stored is not None
    return {
        "task": {"type": "image-classification"},
        "dataset": {"name": _set_name(net, stored), "type": _set_name(net, stored), "split": "val"},
        "metrics": [
            {"type": "accuracy", "name": f"top-1, policy {each.policy}", "value": round(each.top1, 6)}
            for each in stored.reports
        ],
    }


def _sections(net: EvaluatedNet, facts: CardFacts) -> Iterator[str]:
    kind = families.summary(net.config.name)
    yield f"# {facts.name}\n"
    yield f"{kind}\n"
    if facts.note:
        yield f"{facts.note}\n"
    yield f"The net has {net.parameters:,} parameters and tells {len(net.model.classes):,} classes apart.\n"
    yield from ("## Data\n", *_data(net))
    yield from ("\n## Figures\n", *_figures(net))
    yield from ("\n## Use and limits\n", *_limits(net))
    yield from ("\n## How to load\n", *_loading())
    yield from ("\n## Licence\n", _licence(facts))
    yield from ("\n## Training\n", *_training(net, facts))


def _data(net: EvaluatedNet) -> Iterator[str]:
    classes = net.model.classes
    more = f" and {len(classes) - LISTED:,} more" if len(classes) > LISTED else ""
    yield f"- Trained on `{_data_name(net)}`; identity of these images: {net.model.trained_on or 'not recorded'}."
    yield f"- Classes: {', '.join(classes[:LISTED])}{more}."


def _figures(net: EvaluatedNet) -> Iterator[str]:
    if not net.sets:
        yield "No evaluation of this net is stored, so this card states no accuracy."
        return
    for data in net.sets:
        stored = net.on(data)
        assert stored is not None
        yield f"On {stored.reports[0].num_images:,} images of `{_set_name(net, stored)}` (identity {data}):\n"
        yield "| policy | top-1 (%) | MMACs an image | share of the whole net |"
        yield "|---|---|---|---|"
        yield from (_row(each) for each in stored.reports)
        if stored.reports[0].choice:
            yield f"\nThe checkpoint is {stored.reports[0].choice}."
    yield "\n± is the standard error over the evaluated images; another training may differ by more. "
    yield "MACs are multiply-accumulates, measured on the images."


def _row(report: Report) -> str:
    error = 100 * (report.top1 * (1 - report.top1) / max(1, report.num_images)) ** 0.5
    figures = (f"{100 * report.top1:.2f} ± {error:.2f}", f"{report.macs_mean / 1e6:.3f}")
    return f"| {report.policy} | {' | '.join(figures)} | {100 * report.relative_macs:.1f} % |"


def _limits(net: EvaluatedNet) -> Iterator[str]:
    data = configs.validate_stored(DataConfig, net.model.section("data"), f"{net.source}: recipe.data")
    side, resize = data.side_for_eval, data.resize_for_eval
    yield (
        f"- Input: RGB images whose shorter side is resized to {resize} px ({data.interpolation}) and whose central "
        f"{side} px are cut out; pixels in 0..1, less the mean {list(data.mean)}, over {list(data.std)}."
    )
    yield "- Every image is given one of the classes, also an image of none of them."
    yield "- The figures hold for images like those of the evaluation; measure again on yours: `adaptnet evaluate`."


def _loading() -> Iterator[str]:
    yield "```sh\nadaptnet predict FOLDER image.jpg --budget 80%   # FOLDER holds this card\n```\n"
    yield "```python\nimport adaptnet\n"
    yield 'answer = adaptnet.load("FOLDER").predict("image.jpg")'
    yield "print(answer.label, answer.probability)\n```"


def _licence(facts: CardFacts) -> str:
    if facts.licence is None:
        return "No licence of the weights was stated."
    return f"The weights are under {facts.licence}."


def _training(net: EvaluatedNet, facts: CardFacts) -> Iterator[str]:
    yield f"- Recipe `{net.model.recipe.get('name')}`, family `{net.config.name}`, step {net.model.step:,}."
    yield f"- Seed: {net.model.recipe.get('seed')}."
    changes = " with uncommitted changes" if facts.uncommitted else ""
    yield f"- Code: {f'commit {facts.commit}{changes}' if facts.commit else 'the commit was not recorded'}."
    yield from (f"- {key.replace('_', ' ').capitalize()}: {value}" for key, value in facts.lineage.items())
    learned = configs.dump_yaml(public.recipe(net.model.recipe))
    yield f"\n<details><summary>The recipe</summary>\n\n```yaml\n{learned}```\n\n</details>\n"


def _data_name(net: EvaluatedNet) -> str:
    return Path(str(net.model.section("data").get("root", "unknown"))).name


def _set_name(net: EvaluatedNet, stored: Stored) -> str:
    return Path(stored.about.root).name if stored.about.root else _data_name(net)


def _hub_config(net: EvaluatedNet) -> dict[str, JsonValue]:
    """What programs of the Hub read of a classifier."""
    classes: Sequence[str] = net.model.classes
    return {
        "library_name": "adaptnet",
        "model_type": net.config.name,
        "architectures": [net.config.name],
        "num_labels": len(classes),
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "family": configs.as_mapping(net.config),
    }
