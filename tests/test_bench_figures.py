"""Figures hold what the JSON says; what is no result of a benchmark is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.container import BarContainer
from typer.testing import CliRunner

from atom_compile import bench
from atom_compile.bench import Result
from atom_compile.bench.accuracy_result import AccuracyResult
from atom_compile.bench.bars import layer_figure, memory_figure, overhead_figure
from atom_compile.bench.figures import figures_of, save_figures, shared_figures
from atom_compile.bench.model_result import ModelResult, ModelRow
from atom_compile.bench.overhead import OverheadResult, OverheadRow
from atom_compile.bench.plot import speed_figure
from atom_compile.bench.result import Measured
from atom_compile.bench.saved import load, load_all
from atom_compile.bench.shapes import SHAPES
from atom_compile.bench.style import inline_svg
from atom_compile.bench.tradeoff import accuracy_figure
from atom_compile.cli import app
from atom_compile.errors import OptionError, ReportError

MEASURED = Path(__file__).parents[1] / "benchmarks"
FILES = sorted(
    path
    for kind in ("llama3-8b-*", "accuracy-*", "*-model-*", "kv-cache-*", "rotations-*")
    for path in MEASURED.glob(f"{kind}.json")
)
LAYER = MEASURED / "llama3-8b-w4a4-layer-nvidia-h200.json"
OPERATORS = MEASURED / "llama3-8b-llama3-70b-w4a4-operators-nvidia-h100-80gb-hbm3.json"
WHERE = {"device": "a device", "torch": "2.13.0", "triton": "3.6.0", "date": "2026-11-22T00:00:00"}


def read(path: Path) -> Any:
    return load(path)


def bars_of(axes: Any) -> dict[str, list[float]]:
    """Label -> heights."""
    return {
        str(one.get_label()): [float(bar.get_height()) for bar in one]
        for one in axes.containers
        if isinstance(one, BarContainer)
    }


def shown_panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_visible()]


def with_peers(result: Result) -> Result:
    """As if the run had measured two more peers, one of which could not run."""
    peers = [
        dataclasses.replace(row, variant=name, median_us=time, failure=None if time else "no GPU")
        for row in result.rows
        if row.N and row.variant == "baseline" and row.median_us
        for name, time in (("twice as fast", row.median_us / 2), ("never", None))
    ]
    return Result(result.environment, [*result.rows, *peers])


def model_result() -> ModelResult:
    rows = [
        ModelRow(
            variant=variant,
            phase=phase,
            batch=batch,
            tokens=64 if phase == "prefill" else batch,
            median_ms=milliseconds,
            iqr_ms=0.1,
            first_call_s=10.0,
            peak_gb=17.0,
        )
        for variant, milliseconds in (("baseline", 8.0), ("static", 4.0), ("kv4", 2.0))
        for phase, batch in (("decode", 1), ("decode", 8), ("prefill", 1))
    ]
    environment = {"model": "llama3-8b", "layers": 32, "scheme_name": "w4a4", "length": 64}
    return ModelResult(WHERE | environment | {"baseline": "bf16", "level": "model"}, rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_measured_file_is_read_in_full(path: Path) -> None:
    data, result = json.loads(path.read_text()), load(path)
    if isinstance(data.get("rows"), list):
        assert len(result.rows) == len(data["rows"])
        again = json.loads(result.to_json())
        for row, was in zip(again["rows"], data["rows"], strict=True):
            kept = {name: row[name] for name in was if name != "floor_us"}
            assert kept == pytest.approx({name: was[name] for name in kept}, nan_ok=True)
    else:
        assert isinstance(result, AccuracyResult)
        ratios = re.findall(r'"ratio": ([\d.]+)', path.read_text())
        assert {str(row.ratio) for row in result.rows} <= set(ratios)
        assert len(result.rows) == len(ratios) - path.read_text().count("eager_ms")


def test_speed_has_a_panel_per_operator_and_a_line_per_variant() -> None:
    result = with_peers(read(OPERATORS))
    figure = speed_figure(result)
    panels = shown_panels(figure)
    assert [axes.get_title() for axes in panels] == result.ops
    lines = {line.get_label(): line for line in panels[0].get_lines()}
    assert list(lines) == [
        *("bf16", "fp8 row", "fp8 1x128", "int8", "tinygemm", "twice as fast"),
        *("INT4, plain operators", "INT4, fused operators", "floor: bytes and operations"),
    ]
    fused = [result.variants(result.ops[0], M)["fused"] for M in result.counts(result.ops[0])]
    speedups = [result.speedup(row) for row in fused]
    assert list(lines["INT4, fused operators"].get_ydata()) == pytest.approx(speedups)
    assert set(lines["twice as fast"].get_ydata()) == {2.0}
    markers = [line.get_marker() for name, line in lines.items() if "oper" in str(name)]
    assert len(set(markers)) == len(markers) == 3  # plain, fused, and none on the floor


def test_layer_has_a_bar_per_variant_and_count() -> None:
    result = read(LAYER)
    figure = layer_figure(result)
    assert figure is not None
    (axes,) = shown_panels(figure)
    bars = bars_of(axes)
    counts = result.counts("decoder_layer")
    assert {name: len(heights) for name, heights in bars.items()} == dict.fromkeys(
        ("bf16", "plain operators", "fused operators"), len(counts)
    )
    fused = [result.variants("decoder_layer", M)["fused"] for M in counts]
    assert bars["fused operators"] == pytest.approx([result.speedup(row) for row in fused])
    shown = {text.get_text() for text in axes.texts}
    assert {f"{row.median_us:,.0f} us" for row in fused} <= shown
    assert len({bar.patches[0].get_hatch() for bar in axes.containers}) == 3


def test_model_has_speeds_first_calls_and_memory() -> None:
    (figure,) = figures_of(model_result(), "name").values()
    panels = {axes.get_title(): axes for axes in shown_panels(figure)}
    assert list(panels) == [
        *("decode: speed", "prefill: speed"),
        *("first call, compiling included", "most memory allocated"),
    ]
    speeds = bars_of(panels["decode: speed"])
    assert speeds["INT4, INT4 cache"] == pytest.approx([500.0, 4000.0])
    assert panels["decode: speed"].get_ylabel() == "tokens / s"
    assert all(len(one) == 3 for one in bars_of(panels["most memory allocated"]).values())


def test_overhead_has_the_host_time_of_every_operator() -> None:
    rows = [
        OverheadRow(op=op, operator_us=us, operator_iqr_us=0.1, launcher_us=us / 2)
        for op, us in (("linear", 8.0), ("quantize", 6.0))
    ]
    (axes,) = shown_panels(overhead_figure(OverheadResult(WHERE, rows)))
    assert list(bars_of(axes).values()) == [[8.0, 6.0], [4.0, 3.0]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["linear", "quantize"]


def test_memory_is_that_of_the_packed_weights_and_caches() -> None:
    figure = memory_figure("llama3-8b", [read(LAYER)])
    assert figure is not None
    weights, cache = shown_panels(figure)
    ((full, packed),) = bars_of(weights).values()
    sizes = SHAPES["llama3-8b"].linears.values()
    assert full == pytest.approx(32 * 2 * sum(N * K for N, K in sizes) / 1e9)
    assert 0.25 < packed / full < 0.28
    assert list(bars_of(cache).values()) == [[131.072, 67.584, 34.816]]
    assert memory_figure("a model of my own", [read(LAYER)]) is None


def test_accuracy_of_every_scheme_and_against_speed() -> None:
    files = [path for path in FILES if not path.stem.startswith("llama3")]
    results = [load(path) for path in (*files, LAYER, OPERATORS)]
    figure = accuracy_figure(results)
    assert figure is not None
    every, *speeds = shown_panels(figure)
    rows = [
        row
        for one in results
        if isinstance(one, AccuracyResult)
        for row in one.rows
        if row.cache_bytes is None
    ]
    points = [line for line in every.get_lines() if len(line.get_xdata()) == 1]
    assert sorted(line.get_xdata()[0] for line in points) == sorted(row.ratio for row in rows)
    titles = [" ".join(axes.get_title().split("\n")[:-1]) for axes in speeds]
    assert titles == [
        *("llama3-8b decoder layer, 1 token", "llama3-8b decoder layer, 4096 tokens"),
        *(f"llama3-8b-llama3-70b mean of linears, {M}" for M in ("1 token", "8192 tokens")),
    ]
    layer: Any = read(LAYER)
    speedup = layer.speedup(layer.variants("decoder_layer", 1)["fused"])
    found = {line.get_xdata()[0] for line in speeds[0].get_lines() if line.get_label() != "float32"}
    assert speedup in found
    assert accuracy_figure([load(LAYER)]) is None


def test_accuracy_rows_by_name(tmp_path: Path) -> None:
    path = MEASURED / "accuracy-prose-llama-25m-cpu.json"
    data = {key: value for key, value in json.loads(path.read_text()).items() if key != "runs"}
    named = {"w4a4-rotated + kv4": {"ratio": 1.04}, "w4a8, nearest": {"ratio": 1.01}}
    (tmp_path / "named.json").write_text(json.dumps(data | {"rows": named}))
    rows = read(tmp_path / "named.json").rows
    assert [(row.scheme, row.method, row.ratio) for row in rows] == [
        ("w4a4-rotated kv4", "gptq", 1.04),
        ("w4a8", "nearest", 1.01),
    ]


def test_a_scheme_of_a_model_with_a_speed_is_drawn_at_it() -> None:
    accuracy = load(MEASURED / "accuracy-prose-llama-25m-cpu.json")
    figure = accuracy_figure([accuracy, model_result()])
    assert figure is not None
    assert [axes.get_title().split("\n")[0] for axes in shown_panels(figure)][1:] == [
        f"llama3-8b {case}" for case in ("decode x1", "decode x8", "prefill x1")
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_captions_name_device_and_versions_and_axes_have_names(path: Path) -> None:
    result = load(path)
    for figure in [*figures_of(result, "x").values(), *shared_figures([result]).values()]:
        caption = figure.get_supxlabel()
        if "computed" not in caption:
            assert result.environment.get("torch", "torch") in caption
            assert ("triton" in caption) == ("triton" in result.environment)
        assert all(axes.get_ylabel() for axes in shown_panels(figure))


def test_files_are_png_and_svg_with_text_and_always_the_same(tmp_path: Path) -> None:
    figures = figures_of(load(LAYER), "layer")
    paths = save_figures(figures, tmp_path)
    assert [path.name for path in paths] == ["layer.png", "layer.svg"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    svg = paths[1].read_text()
    assert all(text in svg for text in ("fused operators", "NVIDIA H200", "triton 3.6.0"))
    save_figures(figures_of(load(LAYER), "layer"), tmp_path)
    assert paths[1].read_text() == svg
    inline = inline_svg(figures["layer"], "layer")
    assert "light-dark(#93c5fd, #1e40af)" in inline
    assert inline.startswith("<svg")


def test_plot_writes_figures_and_a_page(tmp_path: Path) -> None:
    files = [str(path) for path in (LAYER, MEASURED / "reference-model-cpu.json")]
    page = tmp_path / "new" / "report.html"
    done = CliRunner().invoke(app, ["plot", *files, "--out", str(tmp_path), "--html", str(page)])
    assert done.exit_code == 0, done.output
    names = {path.name for path in tmp_path.glob("*.svg")}
    assert names == {f"{LAYER.stem}.svg", "accuracy-against-speed.svg", "memory-llama3-8b.svg"}
    assert page.read_text().count("<svg") == 3
    rows = sum(len(load(Path(file)).rows) for file in files)
    assert len(re.findall('<tr><th scope="row">', page.read_text())) == rows


def test_plot_without_a_place_to_write_to() -> None:
    done = CliRunner().invoke(app, ["plot", str(LAYER)])
    assert done.exit_code == 2
    assert "plot writes figures to --out DIR" in done.output


def _without(data: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    if part == "rows":
        return data | {"rows": [{k: v for k, v in row.items() if k != name} for row in data[part]]}
    return data | {part: {k: v for k, v in data[part].items() if k != name}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {}, "is no result of a benchmark"),
        (lambda data: [1, 2], "is no result of a benchmark"),
        (lambda data: {"format": "atom_compile report"}, "is no result of a benchmark"),
        (lambda data: _without(data, "environment", "torch"), "damaged: it lacks 'torch'"),
        (lambda data: _without(data, "rows", "median_us"), "damaged: .*median_us"),
        (lambda data: data | {"rows": 5}, "damaged: 'int' object"),
        (lambda data: data | {"rows": []}, "damaged: it has no rows"),
        (
            lambda data: data | {"rows": [data["rows"][0] | {"median_us": "fast"}]},
            "damaged: median_us is 'fast'",
        ),
    ],
)
def test_what_is_foreign_or_damaged_is_refused_by_name(
    change: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(change(json.loads(LAYER.read_text()))))
    with pytest.raises(ReportError, match=rf"some\.json is .*{message.removeprefix('is ')}"):
        load(path)


def test_what_was_cut_short_or_is_missing_or_given_twice(tmp_path: Path) -> None:
    path = tmp_path / LAYER.name
    path.write_text(LAYER.read_text()[:1000])
    with pytest.raises(ReportError, match=rf"{LAYER.name} is no JSON"):
        load(path)
    with pytest.raises(ReportError, match=r"nowhere\.json is no file"):
        load(tmp_path / "nowhere.json")
    with pytest.raises(OptionError, match=f"two files are called {LAYER.name}"):
        load_all([LAYER, LAYER])
    done = CliRunner().invoke(app, ["plot", str(path), "--out", str(tmp_path / "figures")])
    assert done.exit_code == 2
    assert not (tmp_path / "figures").exists()


def test_a_run_on_a_cpu_is_read_back_and_drawn(tmp_path: Path) -> None:
    shape = bench.Shape(name="tiny", hidden=192, intermediate=352, heads=3, kv_heads=1, head_dim=64)
    with torch.compiler.set_stance("force_eager"):
        result = bench.run(shape, tokens=[1, 3], level="layer", device="cpu", quick=True)
    saved: Measured = load(result.save(tmp_path)[0])
    assert isinstance(saved, Result)
    assert saved.rows == result.rows
    assert saved.environment == result.environment
