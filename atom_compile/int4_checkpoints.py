"""Checkpoints of others in 4 bits: GPTQ, AWQ, compressed-tensors, ModelOpt and gpt-oss.

INT4, as codes, scales and zero points:

    stored                         shape, int32           bits 4i .. 4i+3 of a word
    GPTQ    qweight                (K / 8, N)             channel 8 * word + i
            qzeros                 (G, N / 8)             row 8 * word + i; version 1 holds zero - 1
            scales                 (G, N)
            g_idx                  (K,)                   each channel's group
    AWQ     qweight                (K, N / 8)             row 8 * word + (0 2 4 6 1 3 5 7)[i]
            qzeros                 (G, N / 8)             the same
            scales                 (G, N)
    compressed-tensors
            weight_packed          (N, ceil(K / 8))       channel 8 * word + i
            weight_zero_point      (ceil(N / 8), G)       row 8 * word + i
            weight_scale           (N, G)
            weight_g_idx           (K,)                   each channel's group
            weight_shape           (2,)                   N, K

Codes are stored plus 8, as 0 to 15.

NVFP4 and MXFP4, in blocks as kernels/block_formats.py has them:

    stored                         shape                  dtype
    compressed-tensors
            weight_packed          (N, K / 2)             uint8
            weight_scale           (N, K / block)         float8_e4m3fn; of MXFP4 uint8, as e8m0
            weight_global_scale    (1,)                   float32, which divides; NVFP4's alone
    ModelOpt
            weight                 (N, K / 2)             uint8
            weight_scale           (N, K / 16)            float8_e4m3fn
            weight_scale_2         ()                     float32, which multiplies
    gpt-oss ("mxfp4"), of all experts of a layer
            gate_up_proj_blocks    (E, N, K / 32, 16)     uint8; down_proj_blocks too
            gate_up_proj_scales    (E, N, K / 32)         uint8, as e8m0
            gate_up_proj_bias      (E, N)

What they have of activations is not read: those stay in 16 bits.

Sources: the packers of GPTQModel (`gptq`, `gptq_v2`), AutoAWQ (`gemm`), compressed-tensors
(`pack-quantized`, `nvfp4-pack-quantized`, `mxfp4-pack-quantized`) and NVIDIA's Model Optimizer
(`NVFP4`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError
from .kernels.block_formats import BlockWeight, dequantize_blocks, to_grouped_weight
from .kernels.formats import BLOCK_FORMATS
from .kernels.packing import GroupedWeight, GroupLayout, grouped_codes

METHODS = ("gptq", "awq", "compressed-tensors", "modelopt", "mxfp4")
"""`quant_method` in config.json."""
_PER_WORD = 8  # codes of an int32
_AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
_WHOLE_ROW = -1  # a group_size
_SPLIT = 128  # what a group of a whole row is cut into
_GROUP_SIZES = (_WHOLE_ROW, 32, 64, 128, 256, 512, 1024)


class Int4Linear(NamedTuple):
    """One linear: w[n, order[k]] = (codes[n, k] - zero_point[n, g]) * scale[n, g], g of channel k.

    codes: (N, K) int8, -8 to 7. scale: (N, G), of 16 bits or float32. zero_point: (N, G) int8, -8
    to 8, or None for 0. order: (K,) int64, the input channel of each column, or None if they are as
    they were. bias: (N,) or None. group_size: consecutive columns that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    group_size: int
    format: str = "int"

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.codes.shape
        return N, K

    def cut(self, group_size: int) -> Int4Linear:
        """The same in smaller groups, several of which have one scale."""
        if self.group_size == group_size:
            return self
        if self.group_size % group_size:
            raise CheckpointError(
                f"a group of {self.group_size} channels cannot be cut into groups of {group_size}"
            )
        count = -(-self.shape[1] // group_size)

        def repeated(numbers: Tensor) -> Tensor:
            return numbers.repeat_interleave(self.group_size // group_size, 1)[:, :count]

        zero_point = None if self.zero_point is None else repeated(self.zero_point)
        return self._replace(
            scale=repeated(self.scale), zero_point=zero_point, group_size=group_size
        )

    def packed(self) -> GroupedWeight:
        """For `atom::weight_only_linear`, on activations whose channels are in `order`."""
        layout = GroupLayout(self.codes.shape[1], self.group_size, 0)
        groups, _ = layout.split(self.codes)
        return grouped_codes(groups, self.scale, self.zero_point)

    def dense(self) -> Tensor:
        """(N, K) float32, the channels as they were: to quantize anew, in another scheme."""
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        codes = self.codes.float()
        if self.zero_point is not None:
            codes = codes - self.zero_point[:, group]
        weight = codes * self.scale[:, group].float()
        return weight if self.order is None else weight[:, self.order.argsort()]


class BlockLinear(NamedTuple):
    """One linear whose weight is NVFP4 or MXFP4; format: which of the two."""

    weight: BlockWeight
    bias: Tensor | None
    format: str

    @property
    def order(self) -> None:
        """Channels are as they were."""

    @property
    def shape(self) -> tuple[int, int]:
        N, half = self.weight.codes.shape
        return N, 2 * half

    @property
    def group_size(self) -> int:
        return BLOCK_FORMATS[self.format].size

    def packed(self) -> GroupedWeight:
        """For `atom::weight_only_linear`."""
        return to_grouped_weight(self.weight)

    def dense(self) -> Tensor:
        """(N, K) float32."""
        return dequantize_blocks(self.weight)


def find_quantized(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The modules that are quantized, by the names of a checkpoint's tensors.

    Raises CheckpointError as `read_linears` does, and if there is none.
    """
    suffix, _ = _reader(config)
    found = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    if not found:
        raise CheckpointError(f"the checkpoint has no {suffix!r}: nothing in it is quantized")
    return found


def read_linears(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Int4Linear | BlockLinear]]:
    """Module name -> linear, of all that are quantized, one at a time.

    config: a transformers configuration's `quantization_config`. tensors: the checkpoint's, by
    name; each is looked up once, so that a lazy mapping serves.

    Raises CheckpointError for a method, layout or number of bits that is not read here, and for
    tensors that are missing or do not fit each other.
    """
    _, read = _reader(config)
    for name in find_quantized(config, tensors):
        try:
            linear = read(name, tensors)
        except KeyError as missing:
            raise CheckpointError(f"{name}: the checkpoint has no {missing}") from None
        except CheckpointError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{name}: its tensors are not as its format has them ({error})"
            ) from error
        yield name, linear


_Read = Callable[[str, Mapping[str, Tensor]], Int4Linear | BlockLinear]
_Fields = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Codes (N, K), scales (N, G), zero points (N, G), groups of channels (K,)."""


def _reader(config: Mapping[str, Any]) -> tuple[str, _Read]:
    """How the names of quantized linears' tensors end, of one for each, and what reads a linear."""
    method = config.get("quant_method")
    if method == "gptq":
        layout = config.get("checkpoint_format", "gptq")
        _require("checkpoint_format", layout, ("gptq", "gptq_v2"))
        _require("bits", config.get("bits"), (4,))
        _require("group_size", config.get("group_size"), _GROUP_SIZES)
        read = functools.partial(_gptq, offset=1 if layout == "gptq" else 0)
        return ".qweight", _of_integers(read, {int(config["group_size"])})
    if method == "awq":
        _require("version", str(config.get("version", "gemm")).lower(), ("gemm",))
        _require("bits", config.get("bits", config.get("w_bit")), (4,))
        group_size: Any = config.get("group_size", config.get("q_group_size"))
        _require("group_size", group_size, _GROUP_SIZES)
        return ".qweight", _of_integers(_awq, {int(group_size)})
    if method == "modelopt":
        _require("quant_algo", config.get("quant_algo"), ("NVFP4",))
        return ".weight_scale_2", _modelopt
    if method == "mxfp4":
        return ".weight_packed", _mxfp4
    _require("quant_method", method, METHODS)
    format = config.get("format")
    _require("format", format, ("pack-quantized", *_BLOCK_READERS))
    if format in _BLOCK_READERS:
        return ".weight_packed", _BLOCK_READERS[format]
    return ".weight_packed", _of_integers(_compressed_tensors, _compressed_tensors_groups(config))


def _of_integers(
    read: Callable[[str, Mapping[str, Tensor]], _Fields], group_sizes: Set[int]
) -> Callable[[str, Mapping[str, Tensor]], Int4Linear]:
    """group_sizes: the linears' own, which are all cut into the smallest."""
    smallest = min(_SPLIT if size == _WHOLE_ROW else size for size in group_sizes)

    def read_linear(name: str, tensors: Mapping[str, Tensor]) -> Int4Linear:
        fields, bias = read(name, tensors), tensors.get(f"{name}.bias")
        codes, scale, *_ = fields
        size = _group_size_of(name, codes.shape[1], scale.shape[1], group_sizes)
        return _linear(name, *fields, bias, size).cut(smallest)

    return read_linear


def _group_size_of(name: str, K: int, G: int, group_sizes: Set[int]) -> int:
    """Which of them a linear of K channels has, by its number of groups."""
    if len(group_sizes) == 1:
        return next(iter(group_sizes))
    if G == 1 and _WHOLE_ROW in group_sizes:
        return _WHOLE_ROW
    found = [size for size in group_sizes if size != _WHOLE_ROW and -(-K // size) == G]
    if len(found) != 1:
        listed = ", ".join(map(str, sorted(group_sizes)))
        raise CheckpointError(
            f"{name}: {G} groups of {K} channels are of none of the sizes {listed}"
        )
    return found[0]


def _require(name: str, got: object, allowed: tuple[object, ...]) -> None:
    if got not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise CheckpointError(f"the checkpoint's {name} is {got!r}; what is read is {listed}")


def _compressed_tensors_groups(config: Mapping[str, Any]) -> set[int]:
    sizes = set()
    for group in config.get("config_groups", {}).values():
        if group.get("input_activations") or group.get("output_activations"):
            raise CheckpointError(
                "the checkpoint quantizes activations; what is read are weights alone"
            )
        weights = group["weights"]
        _require("num_bits", weights.get("num_bits"), (4,))
        _require("type", weights.get("type"), ("int",))
        _require("strategy", weights.get("strategy"), ("group", "channel"))
        size = weights.get("group_size") if weights["strategy"] == "group" else _WHOLE_ROW
        _require("group_size", size, _GROUP_SIZES)
        sizes.add(int(size))
    if not sizes:
        raise CheckpointError(
            "the checkpoint's config_groups is empty: nothing says how it was cut"
        )
    return sizes


def _gptq(name: str, tensors: Mapping[str, Tensor], offset: int) -> _Fields:
    codes = _unpack(tensors[f"{name}.qweight"], dim=0).t()
    zero_point = _unpack(tensors[f"{name}.qzeros"], dim=1).t() + offset
    return codes, tensors[f"{name}.scales"].t(), zero_point, tensors.get(f"{name}.g_idx")


def _awq(name: str, tensors: Mapping[str, Tensor]) -> _Fields:
    codes = _unpack(tensors[f"{name}.qweight"], dim=1, order=_AWQ_ROWS).t()
    zero_point = _unpack(tensors[f"{name}.qzeros"], dim=1, order=_AWQ_ROWS).t()
    return codes, tensors[f"{name}.scales"].t(), zero_point, None


def _compressed_tensors(name: str, tensors: Mapping[str, Tensor]) -> _Fields:
    N, K = tensors[f"{name}.weight_shape"].tolist()
    codes = _unpack(tensors[f"{name}.weight_packed"], dim=1)[:N, :K]
    zero_point = tensors.get(f"{name}.weight_zero_point")
    if zero_point is not None:  # older files have them unpacked
        packed = zero_point.dtype == torch.int32
        zero_point = _unpack(zero_point, dim=0)[:N] if packed else zero_point.to(torch.int8)
    return codes, tensors[f"{name}.weight_scale"], zero_point, tensors.get(f"{name}.weight_g_idx")


def _nvfp4(name: str, tensors: Mapping[str, Tensor]) -> BlockLinear:
    tensor_scale = tensors[f"{name}.weight_global_scale"].float().reciprocal()
    return _block_linear(name, tensors, "weight_packed", tensor_scale, "nvfp4")


def _mxfp4(name: str, tensors: Mapping[str, Tensor]) -> BlockLinear:
    return _block_linear(name, tensors, "weight_packed", torch.ones(()), "mxfp4")


def _modelopt(name: str, tensors: Mapping[str, Tensor]) -> BlockLinear:
    tensor_scale = tensors[f"{name}.weight_scale_2"].float()
    return _block_linear(name, tensors, "weight", tensor_scale, "nvfp4")


_BLOCK_READERS: dict[Any, _Read] = {
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
}


def _block_linear(
    name: str, tensors: Mapping[str, Tensor], codes_name: str, tensor_scale: Tensor, format: str
) -> BlockLinear:
    codes, scale = tensors[f"{name}.{codes_name}"], tensors[f"{name}.weight_scale"]
    block = BLOCK_FORMATS[format]
    wanted = codes.shape[0], 2 * codes.shape[1] // block.size
    stored = block.scale.dtype, torch.uint8  # of e8m0 the very bytes
    if codes.dtype != torch.uint8 or scale.dtype not in stored or scale.shape != wanted:
        raise CheckpointError(
            f"{name}: codes {tuple(codes.shape)} of {codes.dtype} and scales {tuple(scale.shape)} "
            f"of {scale.dtype} are no {format} weight, whose blocks have {block.size} channels"
        )
    scale = scale.view(block.scale.dtype)
    weight = BlockWeight(codes, scale, tensor_scale.reshape(()))
    return BlockLinear(weight, tensors.get(f"{name}.bias"), format)


def _unpack(words: Tensor, dim: int, order: tuple[int, ...] = tuple(range(_PER_WORD))) -> Tensor:
    """int32 -> int8 codes in -8..7, eight times as many along `dim`."""
    places = [order.index(place) for place in range(_PER_WORD)]
    codes = [((words >> (4 * place)) & 0xF).to(torch.int8) - 8 for place in places]
    return torch.stack(codes, dim + 1).flatten(dim, dim + 1)


def _linear(
    name: str,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    groups: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Int4Linear:
    """Checks what was read, and sorts channels by their groups where they are not."""
    (N, K), order = codes.shape, None
    if group_size == _WHOLE_ROW:
        if scale.shape != (N, 1) or K % _SPLIT:
            raise CheckpointError(
                f"{name}: scales {tuple(scale.shape)} for {K} channels in one group; what is read "
                f"is one scale a row, of a multiple of {_SPLIT} channels"
            )
        group_size, groups = _SPLIT, None
        scale = scale.expand(N, K // _SPLIT)
        zero_point = None if zero_point is None else zero_point.expand(N, K // _SPLIT)
    shape = N, -(-K // group_size)
    wrong = [one for one in (scale, zero_point) if one is not None and one.shape != shape]
    if wrong:
        raise CheckpointError(
            f"{name}: scales or zero points {tuple(wrong[0].shape)} do not go with {N} x {K} codes "
            f"in groups of {group_size}, which have {shape}"
        )
    in_order = torch.arange(K, device=codes.device) // group_size
    if groups is not None and not torch.equal(groups.long(), in_order):
        order = groups.long().argsort(stable=True)
        if not torch.equal(groups.long()[order], in_order):
            raise CheckpointError(f"{name}: its g_idx has groups of other sizes than {group_size}")
        codes = codes[:, order]
    if zero_point is not None and not bool(zero_point.any()):
        zero_point = None
    return Int4Linear(codes, scale, zero_point, order, bias, group_size)
