"""The pages, driven in headless Chromium as a reader would: clicks, keys, search, both themes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from transformers import AutoModelForCausalLM

import atom_compile
from atom_compile import KVCache, Report
from atom_compile.report import tables

from ..capturing import token_batch
from ..models import tiny_llama
from .conftest import NETWORK, Open

MODEL = Path(__file__).parents[2] / "examples" / "prose-llama-5m"
SIGNS = {"+": "added", "\N{MINUS SIGN}": "removed", "~": "changed", "\N{UNION}": "merged"}


def small_report() -> Report:
    """The bundled model over a quantized cache, two of its linears left by choice."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    cache = KVCache(model.config, 1, 16, device="cpu")
    options = {"skip": ["model.layers.2.mlp.down_proj.weight", "*.3.self_attn.o_proj.weight"]}
    return atom_compile.explain(
        model.eval(), token_batch(1, 16), past_key_values=cache, options=options
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    report = small_report()
    path = tmp_path_factory.mktemp("small") / "report.html"
    report.save_html(path)
    return path, report.to_dict()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    report = atom_compile.explain(tiny_llama(layers=32), token_batch(), use_cache=False)
    path = tmp_path_factory.mktemp("deep") / "report.html"
    report.save_html(path)
    return path, report.to_dict()


def node(page: Any, name: str, pane: str = "after") -> Any:
    return page.locator(f'#{pane} .node[data-id="{name}"]')


def group(page: Any, path: str, pane: str = "after") -> Any:
    return page.locator(f'#{pane} .group[data-id="module:{path}"]')


def press_head(page: Any, path: str) -> None:
    group(page, path).locator("> .group-head").click(position={"x": 5, "y": 5})


def final_nodes(data: dict[str, Any]) -> list[dict[str, Any]]:
    (graph,) = data["graphs"]
    return [graph["nodes"][position] for position in graph["stages"][-1]["nodes"]]


def test_one_file_without_network(small: tuple[Path, dict[str, Any]]) -> None:
    text = small[0].read_text()
    assert not NETWORK.search(text)
    assert "Permission is hereby granted" in text  # the licence travels with the layout's code


def test_counts_are_those_of_json_and_text(
    small: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    path, data = small
    page = open_page(path)
    assert page.locator("#summary").inner_text() == tables.summary(data)
    assert "26 of 29 linears rewritten" in tables.summary(data)
    (graph,) = data["graphs"]
    steps = page.locator("#stages button").all_inner_texts()
    for step, stage in zip(steps, graph["stages"], strict=True):
        calls = sum(stage["operators"].values())
        assert step.startswith(stage["stage"]) and f"{calls} calls" in step
        for sign, what in SIGNS.items():
            assert (f"{sign}{len(stage[what])}" in step) == bool(stage[what])
    page.click("#weights")
    page.click("#unfold")
    assert page.locator("#after .node").count() == len(final_nodes(data))
    shown = page.locator("#after .node.int4").count()
    assert shown == data["operators"]["atom.linear"]


def test_layers_unfold_and_fold_on_click(
    small: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    page = open_page(small[0])
    assert group(page, "model.layers.0").get_attribute("aria-expanded") == "false"
    press_head(page, "model.layers.0")
    press_head(page, "model.layers.0.mlp")
    assert group(page, "model.layers.0.mlp").locator(".item").count() >= 3
    assert "model.layers.0.mlp" in page.locator("#details h2").inner_text()
    press_head(page, "model.layers.0")
    assert "folded" in group(page, "model.layers.0").get_attribute("class")


def test_a_node_tells_everything(small: tuple[Path, dict[str, Any]], open_page: Open) -> None:
    path, data = small
    (wanted,) = (
        one for one in final_nodes(data) if "model.layers.1.mlp.up_proj.weight" in one["linears"]
    )
    page = open_page(path)
    page.fill("#search", "layers.1.mlp.up_proj.weight")
    page.keyboard.press("Enter")
    assert "selected" in node(page, wanted["name"]).get_attribute("class")
    told = page.locator("#details").inner_text()
    for part in (
        *(wanted["target"], "low-bit operator", "model.layers.1.mlp.gate_proj", "1 x 16 x 1536"),
        *("98.3 kB", "12.6 Mop", "modeling_llama.py", "share_inputs", "one product of 1536 rows"),
    ):
        assert part in told, part


def test_what_was_left_says_why(small: tuple[Path, dict[str, Any]], open_page: Open) -> None:
    path, data = small
    page = open_page(path)
    left = {layer["name"]: layer["remarks"] for layer in data["layers"] if not layer["operator"]}
    assert len(left) == 3
    for record in final_nodes(data):
        if record["kind"] == "untouched" and record["linears"]:
            page.goto(f"{path.as_uri()}#node={record['name']}")
            told = page.locator("#details .reason").inner_text()
            assert all(remark in told for remark in left.pop(record["linears"][0]))
    assert not left


def test_stages_by_list_slider_and_keys(
    small: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    page = open_page(small[0])
    current = page.locator("#stages [aria-current]")
    page.click("#stages button:has-text('share_inputs')")
    assert current.inner_text().startswith("share_inputs")
    assert "stage=share_inputs" in page.url
    page.keyboard.press("]")
    assert current.inner_text().startswith("fuse_attention")
    page.locator("#slider").fill("0")
    assert current.inner_text().startswith("captured")
    assert page.locator("#slider").get_attribute("aria-valuetext") == "captured"
    page.go_back()
    assert current.inner_text().startswith("fuse_attention")


def test_changes_are_marked_and_shown_side_by_side(
    small: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    path, data = small
    (stage,) = (one for one in data["graphs"][0]["stages"] if one["stage"] == "fuse_quantize")
    page = open_page(path, "#stage=fuse_quantize")
    page.click("#side")
    page.click("#unfold")
    merged = [name for one in stage["merged"] for name in one["into"]]
    assert page.locator("#after .node.merged").count() == len(merged)
    placeholders = [n for n in stage["removed"] if node(page, n, "before").count() == 0]
    assert page.locator("#before .node.removed").count() == len(stage["removed"]) - len(
        placeholders
    )
    marked = node(page, merged[-1]).get_attribute("aria-label")
    assert "added in place of several" in marked
    page.click("#side")
    assert page.locator("#before").is_hidden()
    assert page.locator("#after .node.removed").count() == 0
    page.keyboard.press("r")
    assert page.locator("#after .node.removed").count() > 0


def test_deep_links(small: tuple[Path, dict[str, Any]], open_page: Open) -> None:
    path, data = small
    (graph,) = data["graphs"]
    (stage,) = (one for one in graph["stages"] if one["stage"] == "insert_quantization")
    name = next(name for name in stage["added"] if name.startswith("quantize"))
    page = open_page(path, f"#stage=insert_quantization&node={quote(name)}")
    assert node(page, name).is_visible()
    assert page.locator("#details h2").inner_text() == name
    page.locator("#details a").first.click()
    linked = page.locator("#details h2").inner_text()
    assert linked != name and f"node={linked}" in page.url
    assert node(page, linked).count() == 1  # in its own stage, if this one has no such node


def test_search_finds_operators_and_other_stages(
    small: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    page = open_page(small[0])
    page.keyboard.press("/")
    page.keyboard.type("atom.reorder")
    results = page.locator("#results button")
    assert results.count() > 0
    assert "in another stage" in results.first.inner_text()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert "stage=verify" not in page.url and "node=reorder" in page.url
    page.fill("#search", "no such thing")
    assert page.locator("#results").inner_text() == "nothing found"


def test_keys_alone_reach_a_node(small: tuple[Path, dict[str, Any]], open_page: Open) -> None:
    page = open_page(small[0])
    page.locator("#after").focus()
    for _ in range(12):
        page.keyboard.press("ArrowDown")
        cursor = page.locator("#after .cursor")
        if "layers" in (cursor.get_attribute("data-id") or ""):
            break
    assert cursor.get_attribute("data-id").startswith("module:model.layers.")
    page.keyboard.press("Enter")
    assert "open" in cursor.get_attribute("class")
    for _ in range(12):
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        if "node=" in page.url:
            break
    assert "node=" in page.url


def test_table_of_layers_sorts_and_totals(
    small: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    path, data = small
    page = open_page(path, "#tab=layers")
    rows = page.locator("#layers tbody tr")
    assert rows.count() == len(data["layers"])
    total = sum(layer["weight_bytes_after"] for layer in data["layers"])
    assert f"{total:,}" in page.locator("#layers tfoot").inner_text()
    page.click("#layers th:has-text('bytes after') button")
    smallest = min(data["layers"], key=lambda layer: layer["weight_bytes_after"])
    assert f"{smallest['weight_bytes_after']:,}" in rows.first.inner_text()
    page.click("#layers th:has-text('bytes after') button")
    assert "model.embed_tokens.weight" in rows.first.inner_text()
    sorted_by = page.locator("#layers th[aria-sort=descending]")
    assert "bytes after" in sorted_by.inner_text()
    after = page.locator(".bytes").inner_text()
    assert tables.megabytes(data["weight_bytes_after"]) in after
    page.click("#layers a:has-text('layers.2.mlp.down_proj')")
    assert "option skip=" in page.locator("#details .reason").inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes(small: tuple[Path, dict[str, Any]], open_page: Open, theme: str) -> None:
    page = open_page(small[0], theme=theme)
    brightness = """() => getComputedStyle(document.body).backgroundColor
        .match(/\\d+/g).slice(0, 3).reduce((sum, one) => sum + Number(one), 0)"""
    assert (page.evaluate(brightness) > 380) == (theme == "light")
    page.keyboard.press("t")
    assert (page.evaluate(brightness) > 380) == (theme == "dark")


def test_kinds_and_changes_differ_without_colour(
    small: tuple[Path, dict[str, Any]], open_page: Open
) -> None:
    page = open_page(small[0])
    legend = page.locator("#legend svg text").all_inner_texts()
    signs = [text or "" for text in page.locator("#legend svg text").all_text_contents()]
    assert len(set(signs)) == len(signs) == len(legend)


def test_32_layers_stay_smooth(deep: tuple[Path, dict[str, Any]], open_page: Open) -> None:
    """An unfold lays out the group and those around it, and no other: that keeps it quick."""
    path, data = deep
    (graph,) = data["graphs"]
    assert sum(len(stage["nodes"]) for stage in graph["stages"]) > 10_000
    page = open_page(path)
    assert group(page, "model.layers.31").count() == 1
    assert page.locator("#after .item").count() < 80
    page.evaluate(
        """() => { const { drawGroup } = GraphView.prototype;
                   window.layouts = 0;
                   GraphView.prototype.drawGroup = function (group) {
                     if (!group.drawn) window.layouts++;
                     return drawGroup.call(this, group);
                   }; }"""
    )
    press_head(page, "model.layers.17")
    assert page.evaluate("window.layouts") == 3  # the layer, the model, the page
    press_head(page, "model.layers.17")
    press_head(page, "model.layers.17")
    assert page.evaluate("window.layouts") <= 8
    page.click("#unfold")
    shown = [one for one in final_nodes(data) if one["kind"] != "weight"]
    assert page.locator("#after .node").count() == len(shown)
    page.click("#stages button:has-text('fuse_quantize')")
    page.click("#fold")
    page.click("#side")
    assert group(page, "model.layers.31", "before").count() == 1


def test_difference_page(
    small: tuple[Path, dict[str, Any]], tmp_path: Path, open_page: Open
) -> None:
    other = small_report().to_dict()
    other["scheme"]["activation_bits"] = 8
    found = atom_compile.report.difference.Difference(small[1], other, ("4 bits", "<8 bits>"))
    found.save_html(tmp_path / "difference.html")
    page = open_page(tmp_path / "difference.html")
    assert "Difference of 4 bits and <8 bits>" in page.locator("h1").inner_text()
    row = page.locator("#scheme tbody tr")
    assert row.inner_text().split() == ["activation_bits", "4", "8"]
