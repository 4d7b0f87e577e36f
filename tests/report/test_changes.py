from __future__ import annotations

from typing import Any

from atom_compile.report.changes import changes


def stage(**reads: list[str]) -> dict[str, dict[str, Any]]:
    """Name -> what it reads, as a stage's records."""
    return {
        name: {"op": "call_function", "inputs": inputs, "module": "layers.0"}
        for name, inputs in reads.items()
    }


def test_a_stage_that_does_nothing_changes_nothing() -> None:
    before = stage(x=[], y=["x"])
    assert changes(before, before) == {"added": [], "removed": [], "changed": [], "merged": []}


def test_two_calls_become_one() -> None:
    before = stage(x=[], reorder=["x"], quantize=["reorder"], out=["quantize"])
    after = stage(x=[], fused=["x"], out=["fused"])
    assert changes(before, after) == {
        "added": ["fused"],
        "removed": ["reorder", "quantize"],
        "changed": ["out"],
        "merged": [{"from": ["quantize", "reorder"], "into": ["fused"]}],
    }


def test_three_products_become_one() -> None:
    before = stage(x=[], q=["x"], k=["x"], v=["x"], sdpa=["q", "k", "v"])
    after = stage(x=[], qkv=["x"], sdpa=["qkv"])
    assert changes(before, after)["merged"] == [{"from": ["k", "q", "v"], "into": ["qkv"]}]


def test_what_nobody_reads_is_known_by_what_it_reads() -> None:
    before = stage(x=[], rope=["x"], append=["rope"])
    after = stage(x=[], both=["x"])
    assert changes(before, after)["merged"] == [{"from": ["append", "rope"], "into": ["both"]}]


def test_a_replacement_of_as_many_calls_is_no_merge() -> None:
    before = stage(x=[], pow=["x"], out=["pow"])
    after = stage(x=[], mul=["x"], out=["mul"])
    assert changes(before, after)["merged"] == []


def test_layers_apart_merge_apart() -> None:
    names: dict[str, list[str]] = {}
    for layer in (0, 1):
        names |= {f"linear_{layer}": [f"add_{layer - 1}"] if layer else ["x"]}
        names |= {f"add_{layer}": [f"linear_{layer}"]}
    before = stage(x=[], **names, out=["add_1"])
    after = stage(x=[], fused_0=["x"], fused_1=["fused_0"], out=["fused_1"])
    for records in (before, after):
        for name in records:
            if name.endswith("_1"):
                records[name]["module"] = "layers.1.mlp"
    merged = changes(before, after)["merged"]
    assert {"from": ["add_1", "linear_1"], "into": ["fused_1"]} in merged
