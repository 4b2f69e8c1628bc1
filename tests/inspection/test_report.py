"""The report, opened in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.inspection.report import Report, report, to_html
from tests import architectures
from tests.inspection.browser import Page

# A file name that is also HTML.
NAME = "<img src=x onerror=window.hacked=1>&amp;"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Gemma 3 with three layers, on an H100."""
    directory = tmp_path_factory.mktemp("models") / NAME
    config = architectures.CONFIGS["gemma3_text"]()
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    return report(AutoDeployConfig(model=str(directory), max_seq_len=256), memory=2**30, sm=90)


@pytest.fixture(scope="module")
def file(found: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(to_html(found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(file: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with Page(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(file)
        yield opened


def test_layers_that_are_alike_are_one_row(found: Report) -> None:
    """The layers with a window are 0 and 2; the picture of most of them stands above all tables."""
    html = to_html(found)
    headings = re.findall(r'<h2 id="(\w+)"', html)
    assert headings[:2] == ["picture", "sites"]
    assert html.index("<svg") < html.index("<table")
    (sites,) = re.findall(r'<h2 id="sites">(.*?)</table>', html, re.S)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in sites.split("<tr data-row>")[1:]]
    assert len(found.explanation.sites) == 3
    assert [(row[0], row[1].partition("<")[0], row[3], row[7]) for row in rows] == [
        ("0, 2", "model.model.layers.[0, 2].self_attn", "causal sliding_window=12", "kv_cache_[0, 2]"),
        ("1", "model.model.layers.1.self_attn", "causal", "kv_cache_1"),
    ]


def test_nothing_is_asked_for_and_the_console_is_empty(page: Page, file: Path) -> None:
    """The page is the only request."""
    page.evaluate("document.getElementById('search').dispatchEvent(new Event('input'))")
    assert [url for url in page.requests if not url.startswith("data:")] == [file.as_uri()]
    assert page.messages == []


def test_names_are_text(page: Page, found: Report) -> None:
    """A name that is HTML is shown as it is."""
    assert page.evaluate("document.querySelector('h1').textContent") == found.title
    assert found.title.endswith(NAME)
    assert page.evaluate("document.querySelector('img')") is None
    assert page.evaluate("window.hacked") is None


def test_all_parts_are_there(page: Page, found: Report) -> None:
    """A row for each kind of site, memory use and transform, and two pictures with one attention each."""
    rows = "document.querySelectorAll('#{} ~ .scroll')[0].querySelectorAll('[data-row]').length"
    assert page.evaluate(rows.format("sites")) == 2  # with a window and without
    assert page.evaluate(rows.format("memory")) == len(found.memory.rows)
    assert page.evaluate(rows.format("transforms")) == len(found.transforms)
    counts = "[...document.querySelectorAll('.pair svg')].map(s => s.querySelectorAll('.attention').length)"
    assert page.evaluate(counts) == [1, 1]
    assert page.evaluate("document.querySelectorAll('.pair svg')[1].querySelectorAll('.append').length") == 1
    assert page.evaluate("document.querySelectorAll('.marked').length") > 5


def test_boxes_of_the_pictures_do_not_overlap(page: Page) -> None:
    """No two rectangles of one picture share a point."""
    overlaps = """
        [...document.querySelectorAll('.pair svg')].map(svg => {
          const boxes = [...svg.querySelectorAll('rect')].map(r => r.getBoundingClientRect());
          return boxes.filter((a, i) => boxes.some((b, j) => j > i && a.left < b.right && b.left < a.right
            && a.top < b.bottom && b.top < a.bottom)).length; })"""
    assert page.evaluate(overlaps) == [0, 0]


def test_search_keeps_the_rows_with_all_words(page: Page, found: Report) -> None:
    """Changes of the graph are opened where they match; an empty search shows all again."""
    search = "var s = document.getElementById('search'); s.value = '{}'; s.dispatchEvent(new Event('input'))"
    shown = "[...document.querySelectorAll('[data-row]')].filter(r => !r.hidden).map(r => r.textContent)"
    everything = len(page.evaluate(shown))

    page.evaluate(search.format("ROPE_APPEND layers.1"))
    texts = page.evaluate(shown)
    assert 0 < len(texts) < everything
    assert all("rope_append" in text.lower() and "layers.1" in text for text in texts)
    assert page.evaluate("document.querySelectorAll('details[open]').length") > 0
    assert (
        page.evaluate("document.getElementById('count').textContent") == f"{len(texts)} of {everything} rows"
    )

    page.evaluate(search.format(""))
    assert len(page.evaluate(shown)) == everything
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read(file: Path, tmp_path: Path, dark: bool) -> None:
    """Contrast is at least 4.5 to 1 (WCAG 2.1, 1.4.3), for text on the page and in the boxes."""
    contrasts = """
        (() => {
          const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(channel);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const contrast = (...colors) => { const [a, b] = colors.map(light).sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05); };
          const style = getComputedStyle, background = style(document.body).backgroundColor;
          const page = ['body', 'th', 'small', 'a', 'h2'].map(
            name => contrast(style(document.querySelector(name)).color, background));
          const boxes = [...document.querySelectorAll('.box')].map(
            box => contrast(style(box.querySelector('text')).fill, style(box.querySelector('rect')).fill));
          return [light(background), ...page, ...boxes]; })()"""
    with Page(tmp_path, dark=dark) as opened:
        opened.open(file)
        background, *found = opened.evaluate(contrasts)
    assert (background < 0.1) == dark
    assert len(found) > 40
    assert min(found) >= 4.5


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says where it is."""
    config = architectures.CONFIGS["llama_mha"]()
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path)
    output = tmp_path / "out.html"
    with pytest.raises(SystemExit) as stop:
        main(["report", "-m", str(tmp_path / "config.json"), "-o", str(output)])
    assert not stop.value.code
    assert f"wrote {output}" in capsys.readouterr().err
    assert output.read_text().startswith("<!DOCTYPE html>")
