"""Peers: their arithmetic where a CPU has it, what is said of those that cannot run, means."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from atom_compile import bench
from atom_compile.bench import Result, Shape, peers
from atom_compile.bench.cases import FIRST_WEIGHT, Draw
from atom_compile.bench.peers import PEERS

SHAPES = [
    Shape(name="tiny-a", hidden=128, intermediate=256, heads=2, kv_heads=1, head_dim=64),
    Shape(name="tiny-b", hidden=256, intermediate=128, heads=2, kv_heads=1, head_dim=64),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> Result:
    return bench.run(
        SHAPES,
        tokens=[1, 17],
        level="operators",
        only=["linears"],
        peers=True,
        device="cpu",
        quick=True,
    )


def test_models_share_a_run_and_a_mean(result: Result) -> None:
    assert len(result.linears) == len(result.ops) == 8
    assert result.ops[0] == "tiny-a qkv_proj"
    assert result.ops[-1] == "tiny-b down_proj"
    speedups = [result.speedup(result.variants(op, 17)["fused"]) for op in result.linears]
    mean = result.mean_speedup("fused", 17, result.linears)
    product = torch.tensor([speedup or 0.0 for speedup in speedups], dtype=torch.float64).prod()
    assert mean == pytest.approx(float(product) ** (1 / 8))
    assert result.mean_speedup("int8", 17, result.linears) is None


def test_a_peer_that_cannot_run_is_listed_with_the_reason_and_fails_nothing(
    result: Result,
) -> None:
    assert result.peers == [peer.name for peer in PEERS]
    assert result.failures == []
    assert set(result.absent_peers) == {(peer.name, "needs a GPU") for peer in PEERS}
    console = Console(width=80, file=io.StringIO(), record=True)
    result.print(console)
    printed = console.export_text()
    assert "no time of tinygemm at 1, 17 tokens: needs a GPU" in printed
    assert "geometric mean of the speed-ups over 8 linears" in printed


def test_every_row_has_a_floor_and_says_which_kernel_ran(result: Result) -> None:
    ceilings = result.environment
    bandwidth = max(ceilings["copy_gb_per_s"], ceilings["read_gb_per_s"])
    for row in result.rows:
        if row.is_peer:
            continue
        rate = ceilings["tera_ops_per_s"][row.arithmetic]
        by_bytes, by_operations = row.bytes / bandwidth / 1e3, row.flops / rate / 1e6
        assert result.floor_us(row) == pytest.approx(max(by_bytes, by_operations))
        assert row.arithmetic == ("16-bit" if row.variant == "baseline" else "8-bit")
        assert row.path == ("" if row.variant == "baseline" else "reference")


@pytest.mark.parametrize(
    ("M", "name", "reason"),
    [
        (16, "int8", "takes no fewer than 17 tokens"),
        (1024, "tinygemm", "made for few tokens, not timed past 512"),
        (1, "gemlite", "gemlite is not installed"),
        (1024, "fp8 row", None),
    ],
)
def test_why_a_peer_is_missing_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, M: int, name: str, reason: str | None
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (peer,) = (peer for peer in PEERS if peer.name == name)
    assert peer.missing(M, torch.device("cuda")) == reason


@pytest.mark.parametrize("name", ["fp8 row", "int8"])
def test_the_reference_is_what_the_peer_computes(name: str) -> None:
    (peer,) = (peer for peer in PEERS if peer.name == name)
    inputs = (
        *peer.activations(Draw(0, CPU, torch.bfloat16), 32, 256),
        *peer.weights(Draw(FIRST_WEIGHT, CPU, torch.bfloat16), 64, 256),
    )
    checked = torch.tensor([0, 7, 31])
    got, wanted = peer.function(*inputs)[checked].float(), peer.reference(checked, *inputs)
    assert torch.linalg.vector_norm(got - wanted) < peer.limit * torch.linalg.vector_norm(wanted)


def test_tinygemm_weights_stand_for_what_the_reference_multiplies() -> None:
    codes, scale, zero = peers._int4_rows(Draw(0, CPU, torch.bfloat16), 8, 256)
    x = torch.randn(3, 256)
    weight = codes.float().unflatten(1, (2, 128)) * scale.float()[..., None]
    weight = (weight + zero.float()[..., None]).flatten(1)
    rows = peers._Unpacked((codes, scale, zero))
    got = peers._int4_reference(torch.arange(3), x, rows)
    torch.testing.assert_close(got, x @ weight.t())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [peer.name for peer in PEERS if not peer.package])
def test_peers_of_torch_pass_their_gate_on_a_gpu(name: str) -> None:
    shape = Shape(name="small", hidden=1024, intermediate=1024, heads=8, kv_heads=4, head_dim=128)
    result = bench.run(
        shape, tokens=[32], level="operators", only=["o_proj"], device="cuda", quick=True
    )
    row = result.variants("o_proj", 32)[name]
    if torch.cuda.get_device_capability() == (9, 0):
        assert row.failure is None
