"""Checkpoints of others, written here word by word after their published layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atom_compile.errors import CheckpointError
from atom_compile.int4_checkpoints import BlockLinear, Int4Linear, read_linears
from atom_compile.kernels import weight_only_linear
from atom_compile.kernels.packing import GroupLayout, dequantize_weight

N, K, GROUP = 16, 256, 64
NAME = "model.layers.0.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}


def compressed_tensors(**weights: Any) -> dict[str, Any]:
    numbers = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP} | weights
    group = {"weights": numbers, "input_activations": None, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }


class Drawn:
    """A random weight: codes and zero points 0..15, channels in shuffled groups if asked for."""

    def __init__(self, shuffled: bool = False, symmetric: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randint(0, 16, (N, K), generator=generator)
        self.scale = (0.01 + 0.01 * torch.rand(N, K // GROUP, generator=generator)).half()
        self.zeros = torch.randint(1, 17, (N, K // GROUP), generator=generator)
        if symmetric:
            self.zeros.fill_(8)
        self.groups = torch.arange(K) // GROUP
        if shuffled:
            self.groups = self.groups[torch.randperm(K, generator=generator)]

    @property
    def weight(self) -> Tensor:
        return (self.codes - self.zeros[:, self.groups]) * self.scale[:, self.groups].float()


def words(rows: list[list[int]], places: list[int]) -> Tensor:
    """Rows of numbers, eight to a word: number `places[i]` of each eight in bits 4i to 4i + 3."""
    packed = [
        [sum(row[at + place] << (4 * i) for i, place in enumerate(places))
         for at in range(0, len(row), 8)]
        for row in rows
    ]  # fmt: skip
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)  # wraps as the packers' do


IN_ORDER, INTERLEAVED = list(range(8)), [0, 2, 4, 6, 1, 3, 5, 7]


def gptq_tensors(drawn: Drawn, zero_offset: int) -> dict[str, Tensor]:
    return {
        f"{NAME}.qweight": words(drawn.codes.tolist(), IN_ORDER).t().contiguous(),
        f"{NAME}.qzeros": words((drawn.zeros - zero_offset).t().tolist(), IN_ORDER),
        f"{NAME}.scales": drawn.scale.t().contiguous(),
        f"{NAME}.g_idx": drawn.groups.int(),
        f"{NAME}.bias": torch.arange(N).half(),
        "model.norm.weight": torch.ones(K),
    }


def read(config: dict[str, Any], tensors: dict[str, Tensor]) -> Int4Linear:
    ((name, linear),) = read_linears(config, tensors)
    assert name == NAME and isinstance(linear, Int4Linear)
    return linear


def assert_is(linear: Int4Linear, weight: Tensor) -> None:
    """As a dense weight, and as what the operator multiplies by."""
    torch.testing.assert_close(linear.dense(), weight, rtol=0.0, atol=0.0)
    x = torch.randn(3, weight.shape[1])
    ordered = x if linear.order is None else x[:, linear.order]
    packed = linear.packed()
    out = weight_only_linear.reference(ordered, *packed, None, None, torch.float32)
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-4, atol=1e-4)
    layout = GroupLayout(weight.shape[1], linear.group_size, 0)
    assert dequantize_weight(packed, layout).shape == weight.shape


@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq_with_zeros_less_one(shuffled: bool) -> None:
    drawn = Drawn(shuffled)
    linear = read(GPTQ, gptq_tensors(drawn, zero_offset=1))
    assert (linear.order is not None) == shuffled and linear.zero_point is not None
    assert linear.zero_point.max() == 8 and linear.codes.min() == -8
    assert linear.bias is not None and torch.equal(linear.bias, torch.arange(N).half())
    assert_is(linear, drawn.weight)


def test_gptq_version_2() -> None:
    drawn = Drawn()
    drawn.zeros -= 1
    tensors = gptq_tensors(drawn, zero_offset=0)
    assert_is(read(GPTQ | {"checkpoint_format": "gptq_v2"}, tensors), drawn.weight)


def test_symmetric_gptq_has_no_zero_points() -> None:
    drawn = Drawn(symmetric=True)
    linear = read(GPTQ | {"sym": True}, gptq_tensors(drawn, zero_offset=1))
    assert linear.zero_point is None and linear.packed().zero_point is None
    assert_is(linear, drawn.weight)


def test_one_group_a_row() -> None:
    drawn = Drawn()
    drawn.scale, drawn.zeros, drawn.groups = drawn.scale[:, :1], drawn.zeros[:, :1], torch.zeros(K)
    drawn.groups = drawn.groups.long()
    linear = read(GPTQ | {"group_size": -1}, gptq_tensors(drawn, zero_offset=1))
    assert linear.group_size == 128 and linear.scale.shape == (N, 2)
    assert_is(linear, drawn.weight)


def awq_tensors(drawn: Drawn) -> dict[str, Tensor]:
    return {
        f"{NAME}.qweight": words(drawn.codes.t().tolist(), INTERLEAVED),
        f"{NAME}.qzeros": words(drawn.zeros.t().tolist(), INTERLEAVED),
        f"{NAME}.scales": drawn.scale.t().contiguous(),
    }


def test_awq() -> None:
    drawn = Drawn()
    drawn.zeros -= 1
    assert_is(read(AWQ, awq_tensors(drawn)), drawn.weight)


def of_two_sizes() -> dict[str, Any]:
    """Groups of 32 for other linears, and of GROUP or a row for the one that is read."""
    config = compressed_tensors()
    others = compressed_tensors(group_size=32)["config_groups"]["group_0"]
    rows = compressed_tensors(strategy="channel", group_size=None)["config_groups"]["group_0"]
    config["config_groups"] |= {"group_1": others, "group_2": rows}
    return config


@pytest.mark.parametrize("whole_row", [True, False])
def test_groups_of_several_sizes_are_cut_into_the_smallest(whole_row: bool) -> None:
    drawn = Drawn()
    if whole_row:
        drawn.scale, drawn.zeros = drawn.scale[:, :1], drawn.zeros[:, :1]
        drawn.groups = torch.zeros(K, dtype=torch.int64)
    tensors = {
        f"{NAME}.weight_packed": words(drawn.codes.tolist(), IN_ORDER),
        f"{NAME}.weight_scale": drawn.scale,
        f"{NAME}.weight_zero_point": (drawn.zeros - 8).to(torch.int8),
        f"{NAME}.weight_shape": torch.tensor([N, K]),
    }
    linear = read(of_two_sizes(), tensors)
    assert linear.group_size == 32 and linear.scale.shape == (N, K // 32)
    assert_is(linear, drawn.weight)
    tensors[f"{NAME}.weight_scale"] = drawn.scale[:, :1].expand(N, 3).contiguous()
    with pytest.raises(CheckpointError, match="3 groups of 256 channels are of none of the sizes"):
        read(of_two_sizes(), tensors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("packed_zeros", [True, False])
def test_compressed_tensors(symmetric: bool, shuffled: bool, packed_zeros: bool) -> None:
    drawn = Drawn(shuffled, symmetric)
    drawn.zeros -= 0 if symmetric else 1
    tensors = {
        f"{NAME}.weight_packed": words(drawn.codes.tolist(), IN_ORDER),
        f"{NAME}.weight_scale": drawn.scale,
        f"{NAME}.weight_shape": torch.tensor([N, K]),
    }
    if shuffled:
        tensors[f"{NAME}.weight_g_idx"] = drawn.groups.int()
    if not symmetric:
        zeros = words(drawn.zeros.t().tolist(), IN_ORDER).t().contiguous()
        unpacked = (drawn.zeros - 8).to(torch.int8)
        tensors[f"{NAME}.weight_zero_point"] = zeros if packed_zeros else unpacked
    linear = read(compressed_tensors(symmetric=symmetric), tensors)
    assert (linear.zero_point is None) == symmetric
    assert_is(linear, drawn.weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method is 'bitsandbytes'; what is read",
        ),
        (GPTQ | {"bits": 3}, "bits is 3; what is read is 4"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"group_size": 48}, "group_size is 48; what is read is -1, 32"),
        ({name: one for name, one in GPTQ.items() if name != "group_size"}, "group_size is None"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; what is read is 'gemm'"),
        (AWQ | {"bits": 8}, "bits is 8"),
        (compressed_tensors() | {"format": "int-quantized"}, "format is 'int-quantized'"),
        (compressed_tensors(num_bits=8), "num_bits is 8"),
        (compressed_tensors(type="float"), "type is 'float'"),
        (compressed_tensors(strategy="tensor"), "strategy is 'tensor'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "is 'FP8'; what is read is 'NVFP4'"),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        next(read_linears(config, {}))


def test_quantized_activations_are_refused() -> None:
    config = compressed_tensors()
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointError, match="quantizes activations"):
        next(read_linears(config, {}))


def test_damage_is_named() -> None:
    drawn = Drawn(shuffled=True)
    tensors = gptq_tensors(drawn, zero_offset=1)
    with pytest.raises(CheckpointError, match="nothing in it is quantized"):
        next(read_linears(AWQ, {"model.norm.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=rf"{NAME}: the checkpoint has no '{NAME}.scales'"):
        read(GPTQ, {name: one for name, one in tensors.items() if "scales" not in name})
    with pytest.raises(CheckpointError, match=f"^{NAME}: scales .* do not go with 16 x 256 codes"):
        read(GPTQ | {"group_size": 128}, tensors)
    uneven = torch.zeros_like(drawn.groups)
    with pytest.raises(CheckpointError, match="groups of other sizes than 64"):
        read(GPTQ, tensors | {f"{NAME}.g_idx": uneven})


NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
MXFP4 = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def block_tensors(config: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """A linear of random codes and scales, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N, K), generator=generator)
    values = E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    fields = {"weight" if config is MODELOPT else "weight_packed": pairs}
    if config is MXFP4:
        exponent = torch.randint(115, 125, (N, K // 32), generator=generator)
        fields["weight_scale"] = exponent.to(torch.uint8)
        scale = torch.exp2(exponent.float() - 127).repeat_interleave(32, dim=1)
    else:
        stored = (1 + 400 * torch.rand(N, K // 16, generator=generator)).to(torch.float8_e4m3fn)
        fields["weight_scale"] = stored
        fields["input_scale" if config is MODELOPT else "input_global_scale"] = torch.ones(1)
        if config is MODELOPT:
            fields["weight_scale_2"] = torch.tensor(2.0**-12)
        else:
            fields["weight_global_scale"] = torch.tensor([2.0**12])
        scale = stored.float().repeat_interleave(16, dim=1) * 2.0**-12
    return {f"{NAME}.{field}": one for field, one in fields.items()}, values * scale


@pytest.mark.parametrize("config", [NVFP4, MXFP4, MODELOPT])
def test_blocks_of_e2m1(config: dict[str, Any]) -> None:
    tensors, weight = block_tensors(config)
    ((name, linear),) = read_linears(config, tensors)
    assert name == NAME and isinstance(linear, BlockLinear)
    assert linear.shape == (N, K) and linear.group_size == (32 if config is MXFP4 else 16)
    assert linear.bias is None and linear.order is None
    assert torch.equal(linear.dense(), weight)
    packed, x = linear.packed(), torch.randn(3, K)
    out = weight_only_linear.reference(x, *packed, None, None, x.dtype, format=linear.format)
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [NVFP4, MXFP4, MODELOPT])
def test_blocks_that_do_not_fit_are_refused(config: dict[str, Any]) -> None:
    tensors, _ = block_tensors(config)
    scale = f"{NAME}.weight_scale"
    for wrong in (tensors[scale][:, :-1], tensors[scale].float()):
        with pytest.raises(CheckpointError, match=f"^{NAME}: codes .* are no .*fp4 weight, whose"):
            list(read_linears(config, tensors | {scale: wrong}))
    del tensors[scale]
    with pytest.raises(CheckpointError, match=f"{NAME}: the checkpoint has no '{scale}'"):
        list(read_linears(config, tensors))
