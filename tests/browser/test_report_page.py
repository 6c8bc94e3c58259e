"""The report's page in a real browser: it loads nothing else, names its points, isolates a family, fits any screen."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import chromium
import drawn_nets
import numpy as np
import pytest
from chromium import Chromium
from PIL import Image

from pipeline import family as families
from pipeline.report import build

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.EXECUTABLE is None, reason=chromium.MISSING),
]
DESKTOP, PHONE, NARROWEST = 1280, 390, 360
PAPER = 718  # px of an A4 page between its margins
FRONTIERS = ("frontier-macs", "frontier-latency-1", "frontier-latency-32")
DRAWINGS = "[...document.querySelectorAll('svg.drawing')].filter((svg) => svg.getBoundingClientRect().width)"
TIP = "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"
SHOWN = """[...document.querySelectorAll('#%s svg g[data-group]')]
  .filter((g) => getComputedStyle(g).visibility === 'visible').map((g) => g.dataset.group)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "find", lambda name: drawn_nets.FAMILIES[name])
        return build(drawn_nets.three(), tmp_path_factory.mktemp("report")).page


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as running:
        yield running


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_smoke_the_page_renders_without_errors_and_requests(
    browser: Chromium, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width, dark=dark)
    seen = pixels(browser.screenshot(whole=True))
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    paper = seen[2, 2]
    assert (paper.max() < 60) if dark else (paper.min() > 240)
    ink = np.abs(seen - paper).max(axis=2) > 60
    assert 0.005 < ink.mean() < 0.6  # neither blank nor covered
    left, top, right, bottom = browser.run(
        f"(() => {{ const b = document.querySelector('#frontier-macs {'.narrow' if width == PHONE else '.wide'} svg')"
        ".getBoundingClientRect();"
        "return [b.left + scrollX, b.top + scrollY, b.right + scrollX, b.bottom + scrollY]; })()"
    )
    scale = seen.shape[1] / width
    drawing = ink[int(top * scale) : int(bottom * scale), int(left * scale) : int(min(right, width) * scale)]
    assert drawing.mean() > 0.005


def test_requests_and_errors_are_detected(browser: Chromium, tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    text = "<!doctype html><title>x</title><img src='http://example.org/a.png'><script>nothing.there()</script>"
    (tmp_path / "bad.html").write_text(text)
    browser.open(tmp_path / "bad.html", DESKTOP)
    assert "http://example.org/a.png" in browser.requests
    assert any("nothing is not defined" in error for error in browser.errors)


@pytest.mark.parametrize("width", [DESKTOP, PHONE, NARROWEST])
def test_the_page_does_not_scroll_sideways_and_small_text_is_legible(browser: Chromium, page: Path, width: int) -> None:
    browser.open(page, width)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    smallest = browser.run(
        f"Math.min(...{DRAWINGS}.flatMap((svg) => {{"
        "const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;"
        "return [...svg.querySelectorAll('text')].map((t) => scale * parseFloat(getComputedStyle(t).fontSize)); }))"
    )
    assert smallest >= 11
    drawings = browser.run(f"{DRAWINGS}.map((svg) => svg.closest('figure').id)")
    assert len(drawings) == len(set(drawings)) and set(FRONTIERS) < set(drawings)  # each in one width
    assert browser.run("Math.min(...[...document.querySelectorAll('td, th, p, figcaption, li')]"
                       ".map((e) => parseFloat(getComputedStyle(e).fontSize)))") >= 11  # fmt: skip


@pytest.mark.parametrize("width", [PHONE, NARROWEST])
def test_points_and_bars_fit_a_phone_without_scrolling_in_their_box(browser: Chromium, page: Path, width: int) -> None:
    browser.open(page, width)
    boxes = browser.run(
        "[...document.querySelectorAll('.narrow')].map((d) => d.closest('.box')).map("
        "(b) => b.scrollWidth - b.clientWidth)"
    )
    assert boxes and max(boxes) <= 0
    outside = browser.run(
        f"{DRAWINGS}.filter((svg) => svg.closest('.narrow')).flatMap((svg) => {{"
        "const frame = svg.getBoundingClientRect(); return [...svg.querySelectorAll('text')].filter((t) => {"
        "const b = t.getBoundingClientRect(); return b.left < frame.left - 1 || b.right > frame.right + 1; })"
        ".map((t) => t.textContent); })"
    )
    assert outside == []


def test_pointing_at_a_mark_shows_its_name_and_numbers(browser: Chromium, page: Path) -> None:
    browser.open(page, DESKTOP)
    assert browser.run(TIP) is None
    for name in FRONTIERS:
        text = browser.run(f"document.querySelector('#{name} .spot').dataset.text")
        browser.hover(f"#{name} .spot")
        shown = browser.run(TIP)
        assert text in shown.split("\n\n") and "first-net · low" in shown and "top-1 (%)" in shown
    browser.hover("h1")
    assert browser.run(TIP) is None


def test_a_tap_on_a_phone_names_a_mark(browser: Chromium, page: Path) -> None:
    browser.open(page, PHONE)
    browser.ask("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        browser.tap("#frontier-macs .narrow .spot")
        assert "first-net · low" in browser.run(TIP)
        left, right = browser.run(
            "(() => { const b = document.getElementById('tip').getBoundingClientRect(); return [b.left, b.right]; })()"
        )
        assert left >= 0 and right <= PHONE
        browser.tap("h1")
        assert browser.run(TIP) is None
    finally:
        browser.ask("Emulation.setTouchEmulationEnabled", enabled=False)


def test_all_points_at_one_place_are_named(browser: Chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "find", lambda name: drawn_nets.FAMILIES[name])
    twins = [drawn_nets.net("one", 5, policies=["a"]), drawn_nets.net("two", 5, policies=["a"])]
    browser.open(build(twins, tmp_path / "out").page, DESKTOP)
    browser.hover("#frontier-macs .spot")
    assert {text.split("\n")[0] for text in browser.run(TIP).split("\n\n")} == {"one · a", "two · a"}


def test_a_click_on_the_legend_isolates_a_family_everywhere_and_a_second_one_restores_all(
    browser: Chromium, page: Path
) -> None:
    browser.open(page, DESKTOP)
    everything = {name: browser.run(SHOWN % name) for name in FRONTIERS}
    assert all(set(groups) == {"tiny", "other", "baseline"} for groups in everything.values())
    browser.click('#frontier-latency-1 .key[data-group="other"]')
    assert {name: set(browser.run(SHOWN % name)) for name in FRONTIERS} == {name: {"other"} for name in FRONTIERS}
    assert browser.run("document.querySelectorAll('#tiny-training .away').length") == 0
    texts = browser.run("[...document.querySelectorAll('#frontier-macs .spot:not(.away)')].map((s) => s.dataset.text)")
    assert texts and all(text.startswith("second <net>") for text in texts)
    browser.click('#frontier-macs .key[data-group="other"]')
    assert {name: browser.run(SHOWN % name) for name in FRONTIERS} == everything


def test_everything_can_be_done_with_the_keyboard(browser: Chromium, page: Path) -> None:
    browser.open(page, DESKTOP)
    browser.run("document.querySelector('#frontier-macs svg').focus()")
    order = browser.run("[...document.querySelectorAll('#frontier-macs .spot')].map((s) => s.dataset.text)")
    for key, place in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", -1)):
        browser.press(key)
        assert order[place] in browser.run(TIP)
    browser.press("Escape")
    assert browser.run(TIP) is None
    browser.press("Tab")
    assert browser.run("document.activeElement.classList.contains('key')")
    group = browser.run("document.activeElement.dataset.group")
    browser.press("Enter")
    assert set(browser.run(SHOWN % "frontier-macs")) == {group}
    assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    browser.press(" ")
    assert len(set(browser.run(SHOWN % "frontier-macs"))) == 3


def test_a_cell_of_a_heat_map_shows_its_value_in_the_table(browser: Chromium, page: Path) -> None:
    browser.open(page, DESKTOP)
    browser.hover("#tiny-rates .cells")
    cells = browser.run(
        "[...document.querySelectorAll('#tiny-rates tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    shown = browser.run(TIP)
    assert shown.split("\n")[-1] in {value or "no value" for row in cells for value in row[2:]}
    assert any(
        shown == "\n".join([row[0], row[1], f"layer {n + 1}", row[2 + n] or "no value"])
        for row in cells
        for n in (0, 1)
    )


def test_names_with_markup_are_shown_as_plain_text(browser: Chromium, page: Path) -> None:
    browser.open(page, DESKTOP)
    heads = browser.run("[...document.querySelectorAll('#accuracy-by-class tbody th')].map((c) => c.textContent)")
    assert heads[0] == drawn_nets.HOSTILE[0] and heads[2] == "=SUM(A1)"
    assert browser.run("document.querySelectorAll('main b, main i').length") == 0


def test_the_printed_page_is_light_and_has_no_controls(browser: Chromium, page: Path) -> None:
    browser.open(page, PAPER, dark=True, media="print")
    assert browser.run("document.documentElement.scrollWidth") <= PAPER
    paper, ink = browser.run("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (paper, ink) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    for part in ("nav", "summary", ".key"):
        assert browser.run(f"getComputedStyle(document.querySelector('{part}')).display") == "none"
    assert browser.pdf()[:4] == b"%PDF"
