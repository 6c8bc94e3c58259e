"""Tests of bad images: what replaces them, whatever the order in which they are found, and how many are too many."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest
from raised import fails

from pipeline.data.bad import BadImages
from pipeline.data.index import ImageIndex, synthetic
from pipeline.errors import DataError


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    return synthetic(30, 3, tmp_path)  # labels 0 1 2 0 1 2 ...


def test_a_bad_image_is_replaced_by_the_next_good_one_of_its_class(index: ImageIndex) -> None:
    bad = BadImages(index, max_share=1)
    assert bad.replacement(3) == 3
    for row in (3, 6, 27):
        assert bad.add(row, "truncated")
    assert not bad.add(3, "again") and bad.reason(3) == "truncated"
    assert (bad.replacement(3), bad.replacement(6), bad.replacement(27)) == (9, 9, 0)


def test_replacements_do_not_depend_on_which_rank_found_the_bad_images_when(index: ImageIndex) -> None:
    found = set()
    for order in permutations([4, 7, 28, 1]):
        here, there = BadImages(index, 1), BadImages(index, 1)
        here.add(order[0], "x"), here.add(order[1], "x"), there.add(order[2], "x"), there.add(order[3], "x")
        state = json.loads(json.dumps(there.state()))
        assert here.merge(state) == 2 and here.merge(state) == 0
        there.merge(here.state())
        assert here.state() == there.state()
        found.add(tuple(here.replacement(row) for row in (1, 4, 7, 28)))
    assert found == {(10, 10, 10, 10)}


def test_a_class_without_a_good_image_left_ends_the_run(index: ImageIndex) -> None:
    bad = BadImages(index, max_share=1)
    for row in range(2, 30, 3):
        bad.add(row, "empty file")
    with fails(DataError, "data.root", subject="n00000002"):
        bad.replacement(2)


def test_more_bad_images_than_the_allowed_share_end_the_run(index: ImageIndex) -> None:
    bad = BadImages(index, max_share=0.1)
    for row in (0, 1, 2):
        bad.add(row, "truncated JPEG")
    with fails(DataError, "data.max_bad_share", subject=0.1):
        bad.add(3, "empty file")


def test_a_state_of_another_set_is_refused(index: ImageIndex, tmp_path: Path) -> None:
    bad = BadImages(index, max_share=1)
    with fails(DataError, "data.root", subject=30):
        bad.merge({"rows": [[30, "x"]]})
