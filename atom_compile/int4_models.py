"""Models of transformers from the 4-bit checkpoints of others; int4_checkpoints.py has the formats.

transformers itself loads what is made of them here: for a packed model what `save` would have
written, for a 16-bit one plain weights. Its own support of these methods, and the packages that it
needs, are not used.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .checkpoint import Contents
from .errors import CheckpointError
from .experts import Split, split_experts
from .int4_checkpoints import BlockLinear, Int4Linear, find_quantized, read_linears
from .kernels.packing import GroupedWeight, concatenate_rows
from .packer import find_readers, is_linear, shape_of
from .progress import track
from .quantized_linear import stored_tensors
from .readers import is_conv1d
from .scheme import Scheme
from .transformers_config import METHOD
from .transformers_quantizer import untied


def load_int4(
    architecture: Any, config: Any, path: Path, *, dequantize: bool, **kwargs: Any
) -> Any:
    """A model whose linears have packed weights alone, or with `dequantize` one in 16 bits.

    architecture, config: the class of transformers, and its configuration, which names the method.
    path: the directory with the safetensors files. kwargs: `from_pretrained`'s own.

    Raises CheckpointError, before a linear is read where names and shapes tell, for a checkpoint
    that is damaged or incomplete, of another model, or in a format that is not read.
    """
    files = _Files(path)
    quantization = config.quantization_config
    del config.quantization_config
    with torch.device("meta"):
        skeleton = architecture(config)
    files.rename(skeleton)
    if quantization.get("quant_method") == "mxfp4":
        files.unstack()
    names = find_quantized(quantization, files)
    splits = split_experts(skeleton, names)
    parts = _find_parts(skeleton, splits, names)
    linears = {name: skeleton.get_submodule(name) for name in parts}
    markers = {name: one for split in splits for name, one in split.marker.items()}
    tensors = _plain_tensors(
        skeleton, files, {*(f"{one}.weight" for one in linears), *markers}, names
    )
    reading = _read(quantization, files, parts, linears)
    read = track(reading, "reading 4-bit weights", total=len(parts))
    if dequantize:
        for name, some in read:
            dtype = _dtype(kwargs.get("dtype"), config, some[0])
            weight = torch.cat([one.dense().to(dtype) for one in some])
            weight = weight.t() if is_conv1d(linears[name]) else weight
            tensors[f"{name}.weight"] = weight.contiguous()
        for split in splits:
            tensors |= split.stacked(tensors)
    else:
        scheme, packed = _pack(read)
        tensors |= markers
        for name, (grouped, order) in packed.items():
            layout = scheme.layout(shape_of(linears[name])[1])
            stored = stored_tensors(grouped, order, layout, scheme.weight_format)
            tensors |= {f"{name}.{field}": one for field, one in stored.items()}
        config.quantization_config = {
            "quant_method": METHOD,
            "scheme": dataclasses.asdict(scheme),
            "linears": _group(skeleton, linears, packed),
            "contents": (contents := Contents.of(tensors)),
            "content": contents.content,
        }
    if (path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        kwargs = {"generation_config": GenerationConfig.from_pretrained(path)} | kwargs
    model = architecture.from_pretrained(None, config=config, state_dict=tensors, **kwargs)
    model.name_or_path = model.config.name_or_path = str(path)
    return model


class _Files(Mapping[str, Tensor]):
    """The tensors of a directory's safetensors files, each read when it is looked up."""

    # name here -> file, the name in it, and the expert, if it has one tensor for all
    _files: dict[str, tuple[Any, str, int | None]]

    def __init__(self, path: Path) -> None:
        self._files = {}
        for file in _list_files(path):
            try:
                opened = safe_open(file, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{file.name} is missing: the checkpoint is incomplete"
                ) from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file.name} is damaged or cut short ({error}): copy it again"
                ) from error
            names: list[str] = opened.keys()  # type: ignore[no-untyped-call]
            self._files |= {name: (opened, name, None) for name in names}

    def rename(self, model: Any) -> None:
        """Gives tensors the names that transformers gives them in that model."""
        every = get_model_conversion_mapping(model, add_legacy=False)
        renamings = [one for one in every if isinstance(one, WeightRenaming)]
        self._files = {
            rename_source_key(name, renamings, [])[0]: found for name, found in self._files.items()
        }

    def unstack(self) -> None:
        """gpt-oss's experts, as compressed-tensors would have their linears in MXFP4."""
        for name in list(self._files):
            if (found := _STACK.fullmatch(name)) is None:
                continue
            file, stored, _ = self._files.pop(name)
            linear, field = _UNSTACKED[found["linear"]], _UNSTACKED[found["field"]]
            for number in range(file.get_slice(stored).get_shape()[0]):
                one = f"{found['experts']}.{number}.{linear}.{field}"
                self._files[one] = file, stored, number

    def __getitem__(self, name: str) -> Tensor:
        file, stored, number = self._files[name]
        if number is None:
            tensor: Tensor = file.get_tensor(stored)
            return tensor
        rows: Tensor = file.get_slice(stored)[number]
        return rows.flatten(1) if name.endswith(".weight_packed") else rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


_STACK = re.compile(r"(?P<experts>.*\.experts)\.(?P<linear>\w+_proj)_(?P<field>blocks|scales|bias)")
_UNSTACKED = {
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "blocks": "weight_packed",
    "scales": "weight_scale",
    "bias": "bias",
}


def _list_files(path: Path) -> list[Path]:
    """Those of transformers' names; with none of them all, as others have names of many kinds."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            return [path / name for name in sorted(names)]
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index.name} is damaged ({error!r}): copy it again") from error
    single = path / "model.safetensors"
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no safetensors files")
    return files


def _find_parts(
    skeleton: Any, splits: Sequence[Split], names: Sequence[str]
) -> dict[str, list[str]]:
    """The linears of the model that the checkpoint has quantized, and what it calls them.

    It has an expert's gate and up apart.
    """
    called = _parts_of_experts(skeleton)
    parts: dict[str, list[str]] = {}
    for split in splits:
        for stack, linears in split.stacks.items():
            for linear in linears:
                expert, _, own = linear.rpartition(".")
                some = called.get(stack.rpartition(".")[2], [own])
                parts[linear] = [f"{expert}.{one}" for one in some]
    of_experts = {one for some in parts.values() for one in some}
    for name in sorted(of_experts.difference(names)):
        raise CheckpointError(f"the checkpoint does not have {name} quantized, but other experts")
    modules = dict(skeleton.named_modules())
    tied = skeleton.all_tied_weights_keys
    shared = {*tied.keys(), *tied.values()}
    for name in names:
        if name in of_experts:
            continue
        if name not in modules or not is_linear(modules[name]):
            raise CheckpointError(
                f"the checkpoint has {name} quantized, and the model has no such linear: it is of "
                "another model"
            )
        if f"{name}.weight" in shared:
            raise CheckpointError(f"the checkpoint has {name} quantized, whose weight is tied")
        parts[name] = [name]
    return parts


def _parts_of_experts(skeleton: Any) -> dict[str, list[str]]:
    """By the name of a tensor of all experts: what files call the linears of an expert whose rows
    it has, one after the other."""
    found = {}
    for one in get_model_conversion_mapping(skeleton, add_legacy=False):
        if isinstance(one, WeightConverter) and "experts" in one.target_patterns[0]:
            stack = one.target_patterns[0].rpartition(".")[2]
            found[stack] = [source.split(".")[-2] for source in one.source_patterns]
    return found


def _plain_tensors(
    skeleton: Any, files: Mapping[str, Tensor], made: Collection[str], names: Collection[str]
) -> dict[str, Tensor]:
    """All that belongs to no packed weight; it must be what the model has beside `made`.

    names: of the packed linears in files.
    """
    names = set(names)
    expected = untied(skeleton, skeleton.state_dict())
    # scales of a KV cache in FP8, and what transformers passes over too
    ignored = [r"\.[kv]_scale$", r"rotary_emb\.inv_freq$"]
    ignored += skeleton._keys_to_ignore_on_load_unexpected or ()
    tensors: dict[str, Tensor] = {}
    for name in files:
        module, _, field = name.rpartition(".")
        of_packed = module in names and field != "bias"
        if of_packed or name in skeleton.all_tied_weights_keys:
            continue
        if name not in expected and any(re.search(one, name) for one in ignored):
            continue
        tensor = files[name]
        # AutoGPTQ writes biases of zeros for linears that have none
        if module in names and name not in expected and not bool(tensor.any()):
            continue
        tensors[name] = tensor
    Contents.without_hashes(tensors).check_layout(
        {name: one for name, one in expected.items() if name not in made}
    )
    return tensors


_Linear = Int4Linear | BlockLinear


def _read(
    quantization: Mapping[str, Any],
    files: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[str]],
    linears: Mapping[str, nn.Module],
) -> Iterator[tuple[str, list[_Linear]]]:
    """The model's linears, each in its parts."""
    whole = {part: name for name, some in parts.items() for part in some}
    arrived: dict[str, _Linear] = {}
    for part, linear in read_linears(quantization, files):
        arrived[part] = linear
        name = whole[part]
        if not arrived.keys() >= set(parts[name]):
            continue
        some = [arrived.pop(one) for one in parts[name]]
        widths = {one.shape[1] for one in some}
        shape, wanted = (sum(one.shape[0] for one in some), max(widths)), shape_of(linears[name])
        if shape != wanted or len(widths) > 1:
            raise CheckpointError(
                f"{name} is {shape} in the checkpoint, and {wanted} by its config.json: it is of "
                "another model"
            )
        if shape[1] < linear.group_size:
            raise CheckpointError(
                f"{name} has {shape[1]} input channels, fewer than a group of {linear.group_size}"
            )
        yield name, some


def _dtype(asked: torch.dtype | str | None, config: Any, linear: _Linear) -> torch.dtype:
    """What transformers will load it in: a float32 copy of the whole model is not made before."""
    if asked is None or asked == "auto":
        of_scales = linear.scale.dtype if isinstance(linear, Int4Linear) else torch.bfloat16
        asked = config.dtype or of_scales
    dtype: torch.dtype = getattr(torch, asked) if isinstance(asked, str) else asked
    return dtype


_Packed = dict[str, tuple[GroupedWeight, Tensor | None]]
"""Name -> weight, and the order of its channels."""


def _pack(linears: Iterable[tuple[str, Sequence[_Linear]]]) -> tuple[Scheme, _Packed]:
    """The linears as `QuantizedLinear` holds them, and the scheme that describes them.

    A scheme is of the whole model: if one linear has zero points or an order, all get them.
    """
    packed: _Packed = {}
    widths: dict[str, int] = {}
    group_size, format = 0, "int"
    for name, parts in linears:
        packed[name] = _joined(name, parts)
        linear = parts[0]
        widths[name], group_size, format = linear.shape[1], linear.group_size, linear.format
    if format != "int":
        return Scheme.of(format), packed
    symmetric = all(weight.zero_point is None for weight, _ in packed.values())
    act_order = any(order is not None for _, order in packed.values())
    for name, (weight, order) in packed.items():
        if not symmetric:
            weight = _with_zero_point(weight)
        if act_order:
            order = torch.arange(widths[name]) if order is None else order
            order = order.to(torch.int32)
        packed[name] = weight, order
    scheme = Scheme(
        activation_bits=16,
        group_size=group_size,
        outlier_channels=0,
        weight_clip=1.0,
        activation_clip=1.0,
        symmetric=symmetric,
        act_order=act_order,
    )
    return scheme, packed


def _joined(name: str, parts: Sequence[_Linear]) -> tuple[GroupedWeight, Tensor | None]:
    order, weights = parts[0].order, [one.packed() for one in parts]
    if len(parts) == 1:
        return weights[0], order
    for one in parts:
        if _listed(one.order) != _listed(order):
            raise CheckpointError(f"{name}: its gate and up have channels in different orders")
    if any(one.zero_point is not None for one in weights):
        weights = [_with_zero_point(one) for one in weights]
    return concatenate_rows(weights), order


def _listed(order: Tensor | None) -> list[int] | None:
    return None if order is None else order.tolist()


def _with_zero_point(weight: GroupedWeight) -> GroupedWeight:
    if weight.zero_point is not None:
        return weight
    return weight._replace(zero_point=torch.zeros_like(weight.weight_scale, dtype=torch.int8))


def _group(
    skeleton: nn.Module, linears: Mapping[str, nn.Module], packed: _Packed
) -> list[list[str]]:
    """Those that read one activation in one order together: they become one weight."""
    groups: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for number, readers in enumerate(find_readers(skeleton, linears, None, None)):
        for name in readers:
            order = packed[name][1]
            key = b"" if order is None else order.numpy().tobytes()
            groups[number, key].append(name)
    return list(groups.values())
