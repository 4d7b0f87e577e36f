"""Packed models in transformers: `save_pretrained` and `from_pretrained`.

Importing this module registers the method `atom_compile` with transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from .checkpoint import Contents, read_contents
from .errors import CheckpointError, OptionError
from .experts import plan_with_experts, put, split_experts
from .kernels.packing import GroupedWeight
from .options import Options
from .packer import (
    Places,
    input_format,
    is_linear,
    pack_group,
    packed_on_meta,
    shape_of,
)
from .quantized_linear import InputFormat, QuantizedLinear, join_rows
from .transformers_config import METHOD, AtomConfig


@register_quantizer(METHOD)
class AtomQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads packed checkpoints, packs 16-bit ones while they load, and saves either."""

    quantization_config: AtomConfig
    requires_calibration = False

    def __init__(self, quantization_config: AtomConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._contents: Contents | None = None
        self._files: Sequence[str | Path] = ()
        self._packer: _Packer | None = None
        self._awaited: _Awaited | None = None
        self._dtypes: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises OptionError for a model that would be offloaded while it is packed.

        accelerate offloads what files hold, and no file holds it packed.
        """
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if not self.pre_quantized and (offloaded := {"cpu", "disk"} & places) and places != {"cpu"}:
            raise OptionError(
                f"the device_map offloads to {' and '.join(sorted(offloaded))}, which a model that "
                "is packed while it loads cannot be: pack it with atom-compile quantize, and load "
                "that with this device_map"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if getattr(model.config, "distributed_config", None) is not None:
            raise OptionError(
                "packed linears cannot be split over devices (tensor parallel); use device_map"
            )
        with torch.device("cpu"):
            if not self.pre_quantized:
                self._packer = _Packer(model, config.options)
                return
            if config.linears is None or config.content is None:
                raise CheckpointError(
                    "config.json says that the model is packed, but not which linears: it was "
                    "changed, or not written to its end"
                )
            for split in split_experts(model, list(chain(*config.linears))):
                split.release()
            if config.reading is not None:
                config.reading.begin_if_ready()
                self._files = config.reading.files
                self._awaited = _Awaited(model, config)
                config.reading.begin_if_ready()
            else:
                self._files = checkpoint_files or ()
                _hold_packed(model, config)
            if config.contents is not None:
                self._contents = config.contents
            else:
                self._contents = self._read_contents(model)
            awaited = self._awaited.tensors if self._awaited else {}
            self._contents.check_layout(untied(model, model.state_dict()) | awaited)
            if self._awaited is None:
                _hold_dtypes(model, self._contents)
                self._dtypes = {name: one.dtype for name, one in model.named_parameters()}

    def _read_contents(self, model: Any) -> Contents:
        from transformers.conversion_mapping import get_model_conversion_mapping

        # some models' tensors have other names in files, and only what is loaded can be checked
        renamed = bool(get_model_conversion_mapping(model, add_legacy=False))
        settings = self.quantization_config.to_dict()
        return read_contents(self._files, settings, names=not renamed)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self._packer is not None and param_name in self._packer.weights

    def get_quantize_ops(self) -> _Pack:
        assert self._packer is not None
        return _Pack(self._packer)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Where the memory is planned, what is packed later counts as packed, what is there not."""
        if self.quantization_config.reading is not None:
            return 0.0
        if self._packer is not None and param_name in self._packer.weights:
            return self._packer.bytes_per_weight
        size: float = super().param_element_size(model, param_name, param)
        return size

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self._packer is not None:
            self._packer.finish()
            config.describe(model, self._packer.plan.groups)
            self._packer = None
        elif self._contents is not None:
            groups = config.linears or []
            if config.reading is not None and self._awaited is not None:
                tensors = config.reading.tensors
                self._awaited.put(model, tensors)
                arriving = self._awaited.join(
                    model, groups, self._contents, config.reading.arrive()
                )
                self._contents.check_tensors(arriving)
                _convert(model, tensors)
            else:
                _check_loaded(model, self._contents, self._files)
                _convert_renamed(model, self._dtypes)
                for group in groups:
                    linears = [model.get_submodule(name) for name in group]
                    _restore(linears)
                    _join_loaded(group, linears, self._contents)
            self._contents = config.contents = config.reading = None
            self._awaited = None
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What files hold, as tensors that share no memory, and their metadata."""
        config = self.quantization_config
        state_dict = untied(model, _separate(model))
        contents = Contents.of(state_dict)
        config.model, config.content = contents.model, contents.content
        return state_dict, contents.metadata(config.to_dict())

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, options: Options, groups: Sequence[Sequence[str]]) -> None:
    """Tells a model of transformers that `quantize` packed it; any other is left as it is."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    config = AtomConfig(options.scheme, options.recipe, options.include_head, options.skip)
    config.describe(model, groups)
    model.hf_quantizer = AtomQuantizer(config, pre_quantized=True)
    model.hf_quantizer.postprocess_model(model)
    model.is_quantized = True
    model.quantization_method = METHOD


class _Pack(ConversionOps):  # type: ignore[misc]
    """Hands a 16-bit weight to the packer; it gives nothing back for transformers to store."""

    def __init__(self, packer: _Packer) -> None:
        self._packer = packer

    def convert(
        self,
        input_dict: Mapping[str, Any],
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        (weight,) = input_dict.values()
        self._packer.take(full_layer_name, weight[0] if isinstance(weight, list) else weight)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class _Packer:
    """Packs linears as their weights arrive: when an activation's linears are all there.

    Held in 16 bits is never more than the linears of the activations under way, less than a decoder
    block.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.plan, self._splits = plan_with_experts(model, options)
        self._model = model
        self._stacks = {name: split for split in self._splits for name in split.stacks}
        self._group_of = {name: group for group in self.plan.groups for name in group}
        self.weights = {f"{name}.weight" for name in self._group_of}
        self.weights |= self._stacks.keys()
        self._options = options
        self._places = Places(model)
        of_experts = {name for one in self._splits for name in chain(*one.stacks.values())}
        names = self._group_of.keys() | of_experts
        self._linears = {name: model.get_submodule(name) for name in names}
        self._arrived: set[str] = set()
        before = after = 0
        for linear in self._linears.values():
            packed = packed_on_meta(shape_of(linear), options.scheme)
            before += packed.in_features * packed.out_features
            after += sum(one.nbytes for one in packed.packed if one is not None)
        self.bytes_per_weight = after / max(before, 1)
        put(model, self._splits, split=False)  # as transformers knows them, until they are loaded

    def take(self, parameter: str, weight: Tensor) -> None:
        """A linear's, or that of all experts of a layer."""
        if parameter not in self._stacks:
            self._take(parameter.removesuffix(".weight"), weight)
            return
        split = self._stacks[parameter]
        for name, rows in zip(split.stacks[parameter], split.rows(weight), strict=True):
            self._take(name, rows)

    def _take(self, name: str, weight: Tensor) -> None:
        self._linears[name].weight = nn.Parameter(weight, requires_grad=False)
        if name not in self._group_of:  # an expert's that stays as it is
            _mark_initialized(self._linears.pop(name))
            return
        self._arrived.add(name)
        group = self._group_of[name]
        if not self._arrived.issuperset(group):
            return
        options = self.plan.options_of(group, self._options)
        packed = pack_group({one: self._linears[one] for one in group}, options)
        for one, linear in packed.items():
            _mark_initialized(linear)
            self._places.replace(self._linears.pop(one), linear)

    def finish(self) -> None:
        """Raises CheckpointError for weights that never came."""
        if self._linears:
            missing = next(name for name in self._linears if name not in self._arrived)
            raise CheckpointError(f"the 16-bit checkpoint lacks {missing}.weight")
        put(self._model, self._splits, split=True)
        for split in self._splits:
            split.load_biases()
            split.settle()
            split.release()


def _mark_initialized(module: nn.Module) -> None:
    """Tells transformers, which fills weights that no file had, that these are not to be filled."""
    marked: Any
    for marked in (module, *(one for one in module.parameters() if not one.is_meta)):
        marked._is_hf_initialized = True


class _Packed(NamedTuple):
    """A linear that config.json says is packed, and what it becomes, without values."""

    name: str
    linear: nn.Module
    like: QuantizedLinear
    input_format: InputFormat

    def made(self, like: Any) -> QuantizedLinear:
        """With the bias and the mode of the module `like`."""
        packed, order = self.like.packed, self.like.order
        made = QuantizedLinear(packed, order, like.bias, self.input_format, self.like.named)
        return made.train(like.training)


def _find_packed(model: nn.Module, config: AtomConfig) -> Iterator[_Packed]:
    scheme = config.options.scheme
    for name in (name for group in config.linears or [] for name in group):
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if linear is None or not is_linear(linear):
            raise CheckpointError(
                f"config.json says that {name} is packed, and the model has no such linear: it is "
                "of another model"
            )
        like = packed_on_meta(shape_of(linear), scheme)
        form = like.input_format
        if name in config.choices:
            choice = config.choices[name]
            numbers = choice["activation_clip"], choice["int8_groups"]
            form = input_format(scheme, like.in_features, *numbers)
        yield _Packed(name, linear, like, form)


def _hold_packed(model: nn.Module, config: AtomConfig) -> None:
    """Puts packed linears without data where config.json says that they are."""
    places = Places(model)
    for one in _find_packed(model, config):
        packed = one.made(one.linear)
        if config.format_version > 1:
            packed.hold_stored()
        places.replace(one.linear, packed)


class _Awaited:
    """Packed linears whose tensors transformers does not load, and does not see, biases aside."""

    def __init__(self, model: nn.Module, config: AtomConfig) -> None:
        self.tensors: dict[str, Tensor] = {}  # as files should have them, on meta
        self._waiting: list[tuple[_Packed, nn.Module]] = []
        places = Places(model)
        filled: Any = torch.empty(0)  # some models fill the weights of linears that they know
        filled._is_hf_initialized = True
        layouts: dict[QuantizedLinear, dict[str, Tensor]] = {}
        for one in _find_packed(model, config):
            place = nn.Module()
            place.weight = filled
            place.register_parameter("bias", one.linear.bias)  # type: ignore[arg-type]
            places.replace(one.linear, place)
            self._waiting.append((one, place))
            if one.like not in layouts:
                layouts[one.like] = _layout(one.like, stored=config.format_version > 1)
            self.tensors |= {f"{one.name}.{field}": t for field, t in layouts[one.like].items()}

    def put(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Where they belong, each with its tensors as files have them, which leave `tensors`."""
        places = Places(model)
        for one, place in self._waiting:
            linear = one.made(place)
            for field in (*linear.kind._fields, "order"):
                tensor = tensors.pop(f"{one.name}.{field}", None)
                held = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                linear._parameters[field] = held
            places.replace(place, linear)

    def join(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[str]],
        contents: Contents,
        batches: Iterable[Mapping[str, Tensor]],
    ) -> Iterator[Mapping[str, Tensor]]:
        """Passes on what arrives, and joins linears whose tensors have all been passed on."""
        group_of = {name: group for group in groups for name in group}
        missing = Counter(id(group_of[name.rpartition(".")[0]]) for name in self.tensors)
        for batch in batches:
            yield batch
            for name in batch.keys() & self.tensors.keys():
                group = group_of[name.rpartition(".")[0]]
                missing[id(group)] -= 1
                if not missing[id(group)]:
                    linears: list[Any] = [model.get_submodule(one) for one in group]
                    _restore(linears)
                    _join_loaded(group, linears, contents)


def _convert(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Of tensors that transformers converted before they were read, what is read now."""
    for name, tensor in tensors.items():
        loaded = model.get_parameter_or_buffer(name).detach()
        if loaded.data_ptr() != tensor.data_ptr():
            loaded.copy_(tensor)


def _convert_renamed(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """transformers loads what has another name in files in the files' precision."""
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name, parameter.dtype)
        if parameter.dtype != wanted and not parameter.is_meta:
            parameter.data = parameter.data.to(wanted)


def _layout(linear: QuantizedLinear, *, stored: bool) -> dict[str, Tensor]:
    tensors = {**linear.packed._asdict(), "order": linear.order}
    if stored:
        return linear.stored(tensors)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _hold_dtypes(model: nn.Module, contents: Contents) -> None:
    """Scales come in more than one 16-bit format, and transformers loads what the model expects."""
    for name, linear in model.named_modules():
        if isinstance(linear, QuantizedLinear) and linear.kind is GroupedWeight:
            dtype = getattr(torch, contents.dtype(f"{name}.weight_scale"))
            scale = linear.get_parameter("weight_scale").to(dtype)
            linear.weight_scale = nn.Parameter(scale, requires_grad=False)


def untied(model: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What files hold of it: of weights that are one, one."""
    tied = model.all_tied_weights_keys.keys()
    ignored = set(model._keys_to_ignore_on_save or ())
    return {name: one for name, one in state_dict.items() if name not in tied | ignored}


def _separate(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as files have it; what shares memory is copied to the CPU."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    state_dict: dict[str, Tensor] = model.state_dict()
    for name, one in state_dict.items():
        if one.is_meta:
            state_dict[name] = load_offloaded_parameter(model, name)
    for module_name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            shared = ("order", *(module.kind._fields if module.is_joined else ()))
            fields = ("order", *module.kind._fields)
            held = {field: state_dict.get(f"{module_name}.{field}") for field in fields}
            for field, tensor in module.stored(held).items():
                if field in shared or tensor is not held[field]:
                    copied = tensor.contiguous()
                    copy = copied is held[field]
                    state_dict[f"{module_name}.{field}"] = copied.to("cpu", copy=copy)
    return state_dict


def _check_loaded(model: Any, contents: Contents, files: Sequence[str | Path]) -> None:
    """Raises CheckpointError unless every tensor is what was saved.

    Those loaded in another precision, or to disk, are read from the files once more.
    """
    loaded = model.state_dict()
    as_saved = {}
    for name in contents.tensors:
        tensor = loaded[name]
        if not tensor.is_meta and str(tensor.dtype) == f"torch.{contents.dtype(name)}":
            as_saved[name] = tensor
        elif (tensor := _read(name, files)) is not None:
            contents.check_tensors([{name: tensor}])
    contents.check_tensors([as_saved])


def _read(name: str, files: Sequence[str | Path]) -> Tensor | None:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                tensor: Tensor = opened.get_tensor(name)
                return tensor
    return None  # transformers saved it under another name


def _restore(linears: Sequence[QuantizedLinear]) -> None:
    for linear in linears:
        linear.requires_grad_(False)  # transformers loads what is floating-point as trainable
        if not linear.weight.is_meta:  # offloaded: it is restored whenever it is read
            linear.restore()


def _join_loaded(
    names: Sequence[str], linears: Sequence[QuantizedLinear], contents: Contents
) -> None:
    places = {(one.weight.device, one.order is None or one.order.device) for one in linears}
    if len(linears) < 2 or len(places) > 1 or linears[0].weight.is_meta:
        return  # over several devices, or offloaded: held one by one
    # told by their hashes: to compare tensors a GPU would be waited for
    if len({contents.tensors.get(f"{name}.order") for name in names}) > 1:
        raise CheckpointError(
            f"config.json groups {len(linears)} linears that do not have one order of channels"
        )
    join_rows(linears)
