"""The benchmark's page in headless Chromium: tables, figures, both themes, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atom_compile import bench
from atom_compile.bench.page import save_page
from atom_compile.bench.saved import load_all

from .conftest import NETWORK, Open

FOLDER = Path(__file__).parents[2] / "benchmarks"
MEASURED = sorted({*FOLDER.glob("llama3-8b-*.json"), *FOLDER.glob("*-model-*.json")})


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Of all that was measured, and of a small run on this CPU."""
    results = load_all(MEASURED)
    results["small"] = bench.run_overhead(device="cpu", quick=True)
    path = tmp_path_factory.mktemp("bench") / "report.html"
    save_page(results, path)
    return path, results


def test_one_file_without_network(page_file: tuple[Path, dict[str, Any]]) -> None:
    text = page_file[0].read_text()
    assert not NETWORK.search(text)
    assert list(page_file[0].parent.iterdir()) == [page_file[0]]


def test_tables_have_the_rows_of_the_json(
    page_file: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    path, results = page_file
    page = open_page(path)
    assert page.locator("#contents a").count() == 1 + len(results)
    for name, result in results.items():
        section = page.locator(f"section:has(h2:text-is('{name}'))")
        assert section.locator("tbody tr").count() == len(json.loads(result.to_json())["rows"])
        device = result.environment.get("device")
        assert device is None or device in section.locator("details").inner_html()
    total = sum(len(one.rows) for one in results.values())
    assert f"{len(results)} results, {total} rows" in page.locator("#summary").inner_text()


def test_figures_are_drawn_and_named(
    page_file: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    page = open_page(page_file[0])
    figures = page.locator("figure")
    names = [one.get_attribute("aria-label") for one in figures.all()]
    assert {"accuracy-against-speed", "memory-llama3-8b", "small"} <= set(names)
    assert len(names) == page.locator("figure svg").count() == len(set(names))
    for figure in figures.all():
        box = figure.locator("svg").bounding_box()
        assert box["width"] > 600 and box["height"] > 200
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_column_sorts_both_ways(page_file: tuple[Path, dict[str, Any]], open_page: Open) -> None:
    path, results = page_file
    page = open_page(path)
    name = next(name for name in results if "two-level-operators" in name)
    table = page.locator(f"section:has(h2:text-is('{name}')) table")
    times = [row.median_us for row in results[name].rows]
    for wanted, direction in ((sorted(times), "ascending"), (sorted(times)[::-1], "descending")):
        table.locator("thead button").get_by_text("us", exact=False).locator(
            "xpath=self::*[starts-with(text(), 'us')]"
        ).click()
        head = table.locator(f"th[aria-sort={direction}]")
        assert head.inner_text().startswith("us")
        column = head.evaluate("head => head.cellIndex")
        shown = table.evaluate(
            "(table, at) => [...table.tBodies[0].rows].map(row => +row.cells[at].dataset.value)",
            column,
        )
        assert shown == wanted


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_reach_the_figures(
    page_file: tuple[Path, dict[str, Any]], open_page: Open, theme: str
) -> None:
    page = open_page(page_file[0], theme=theme)
    brightness = """selector => {
        const style = getComputedStyle(document.querySelector(selector));
        const colour = selector === "body" ? style.backgroundColor : style.fill;
        return colour.match(/\\d+/g).slice(0, 3).reduce((sum, one) => sum + Number(one), 0);
    }"""
    for is_light in (theme == "light", theme == "dark"):
        assert (page.evaluate(brightness, "body") > 380) == is_light
        assert (page.evaluate(brightness, "figure svg text") < 380) == is_light
        page.keyboard.press("t")
