"""Rules for names: the split of a folder or tar, and whether a file is an image, may be one, or is irrelevant.

Nothing is opened here. A file that is not used is *lost* if it may be an image or hold images: only those count in
`data.max_bad_share`. So archives count, each as one file: they may hold images that nobody has unpacked. Texts, tables
and programs do not: in folders the label is the folder's name. Hidden folders do not either: tools keep copies there
(.git, .dvc, .ipynb_checkpoints). What does not count is listed nonetheless.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from pipeline.data.image_headers import EXTENSIONS, HEIC_WAY_OUT

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "valset", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "tst"), "test"),
}
_FILLERS = "set data dataset image images img imgs photo photos picture pictures split seg"
_SYSTEM = frozenset(
    {
        *("@eadir", "#recycle", "@recycle", "#snapshot", "lost+found", "__macosx"),
        *("$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
        *(".ds_store", ".trashes", ".spotlight-v100", ".fseventsd"),
    }
)
_COMPANIONS = """.txt .md .rst .json .jsonl .csv .tsv .xml .yaml .yml .toml .ini .cfg .html .htm .pdf .doc .docx .xls
.xlsx .log .py .ipynb .sh .m .cls .idx .index .db .sqlite .lock .md5 .sha1 .sha256 .sha256sum .url .bib .tex .lst .list
.names"""  # texts, tables, programs: neither images nor holding any
_BESIDE_A_SPLIT, _NO_IMAGES = frozenset(_FILLERS.split()), frozenset(_COMPANIONS.split())
_EXTENSION = re.compile(r"\.[a-z][a-z0-9_+~-]{0,11}")
_HEIC = frozenset({".heic", ".heif"})
_IMAGENET = re.compile(
    r"n\d{8}(\.tar|(_\d+)+(_n\d{8})?\.jpe?g)|ILSVRC2012_(train|val|test)_\d{8}(_n\d{8})?\.jpe?g", re.I
)
OURS = (".adaptnet-index", ".packing")  # folders of ours in a root; pack.py and index.py write them


def split_of(folder: str) -> str | None:
    """The split that a folder's name means: "train", "val" or "test"; None for any other name.

    Besides the word there may be digits and words such as `set` or `images`: Train, train2017, seg_train.
    """
    words = _words(folder)
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    whole = all(word in SPLIT_WORDS or word in _BESIDE_A_SPLIT for word in words)
    return splits.pop() if len(splits) == 1 and whole else None


def splits_of_tar(file: str) -> frozenset[str]:
    """The splits that a tar's name mentions beside any other words, such as the set's name."""
    return frozenset(SPLIT_WORDS[word] for word in _words(file) if word in SPLIT_WORDS)


def _words(name: str) -> list[str]:
    return [word.casefold() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+", name)]


def is_system(name: str) -> bool:
    """Whether an operating system or a file server makes files or folders of this name."""
    return name.casefold() in _SYSTEM or name.startswith("._")


def is_visible(folder: str) -> bool:
    """Whether a folder of this name may hold images of a set."""
    return not folder.startswith(".") and not is_system(folder)


def why_no_image(name: str) -> tuple[str, bool | None] | None:
    """(reason, whether it may be an image) of a file that is not used; None for an image by its name.

    Without an extension only the content can tell whether it may be an image: None.
    """
    extension = os.path.splitext(name)[1].lower()
    if is_system(name):
        return "made by the operating system", False
    if name.startswith("."):
        return ("hidden image", True) if extension in EXTENSIONS else ("hidden file", False)
    if extension in EXTENSIONS:
        return None
    if not extension:
        return "no extension", None
    if extension in _HEIC:
        return f"extension {extension} {HEIC_WAY_OUT}", True
    if _EXTENSION.fullmatch(extension):
        return f"extension {extension}", extension not in _NO_IMAGES
    return "no extension of an image", True


def of_imagenet(names: Iterable[str]) -> bool:
    """Whether files are named as ImageNet's publisher or a mirror names images and tars without class folders."""
    names = [name for name in names if not name.endswith("/")]
    return any(_IMAGENET.fullmatch(os.path.basename(name)) for name in names)


def shown(name: str) -> str:
    """A name as it can be printed on one line: line breaks, control characters and undecodable bytes are escaped."""
    if name.isprintable() and name == name.strip():
        return name
    return repr(name) if name.isprintable() else repr(name)[1:-1]
