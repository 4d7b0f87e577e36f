"""A linear layer that holds its weight packed and computes with the plain operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AtomError
from .kernels.float8_linear import float8_linear
from .kernels.linear import linear
from .kernels.packing import (
    AnyWeight,
    GroupedWeight,
    GroupLayout,
    PackedWeight,
    RowWeight,
    TwoLevelWeight,
    concatenate_rows,
    narrow_rows,
    num_rows,
)
from .kernels.quantize import quantize
from .kernels.quantize_e4m3 import quantize_e4m3
from .kernels.reorder import reorder
from .kernels.rotate import rotate
from .kernels.storing import is_stored, restore, store, store_order
from .kernels.two_level_linear import two_level_linear
from .kernels.weight_only_linear import weight_only_linear
from .passes.derived import named_format
from .passes.transforms import transformed_layout

_PRODUCTS = {
    PackedWeight: linear,
    TwoLevelWeight: two_level_linear,
    GroupedWeight: weight_only_linear,
    RowWeight: float8_linear,
}


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """How a linear's input is quantized: the numbers of `atom::quantize`, before it `atom::rotate`.

    bits: 16 if it stays as it is. cut: of the channels in order. rotation: channels per block, 0
    for none. format: as in `Scheme.activation_format`; of "e4m3" cut and bits alone are read.
    """

    cut: GroupLayout
    bits: int
    clip: float
    int8_groups: int = 0
    rotation: int = 0
    format: str = "int"

    @property
    def layout(self) -> GroupLayout:
        """The cut of the weight's packed columns."""
        return transformed_layout(self.cut, self.rotation)


class QuantizedLinear(nn.Module):
    """x (*, K) -> (*, N) in x's dtype: reorder, rotate if asked for, quantize, 4-bit product.

    Just what `backend="atom"` makes of a 16-bit linear, and fuses in the same way. It runs without
    compilation too, and under any backend.

    packed: a NamedTuple of kernels/packing.py; each field becomes a parameter of that name, so a
        `weight` is not what other software takes for one: its shape (G, N, group_size / 2) says so.
    order: (K,) int32, the input's channels in the order in which they are packed; None if that is
        their own. Linears that read one activation hold the same tensor: a compiler then sees that
        their inputs are the same.
    bias: (N,) or None.
    named: keywords of the product's operator, such as the weight's format.

    Linears that read one activation may hold one larger weight together, see `join_rows`; each then
    multiplies by rows of it. Saved and loaded are a linear's own rows. One that is loaded from a
    file, or read from it at each call, holds its tensors as they lie there, see kernels/storing.py.
    """

    weight: nn.Parameter
    order: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        packed: AnyWeight,
        order: Tensor | None,
        bias: Tensor | None,
        input_format: InputFormat,
        named: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = input_format.cut.width, num_rows(packed)
        self.input_format = input_format
        self.named = dict(named or {})
        self.kind: Any = type(packed)
        self.first_row = 0
        for name, tensor in (*packed._asdict().items(), ("order", order), ("bias", bias)):
            self.register_parameter(name, None if tensor is None else _parameter(tensor))

    @property
    def packed(self) -> AnyWeight:
        """Its own rows."""
        held = restore(self._held(), self.input_format.layout, self.format)
        return narrow_rows(held, self.first_row, self.out_features) if self.is_joined else held

    @property
    def is_joined(self) -> bool:
        """Whether its rows are part of a larger weight."""
        held = self._held()
        return not is_stored(held) and num_rows(held) != self.out_features

    @property
    def format(self) -> str:
        """Of the weight: "int", or a name in kernels/formats.py."""
        return self.named.get("format", "int")

    def hold_stored(self) -> None:
        """From now on it holds its tensors as they lie in a file."""
        held = {**self._held()._asdict(), "order": self.order}
        for name, tensor in self.stored(held).items():
            self._parameters[name] = _parameter(tensor)

    def stored(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Its packed weight and order, by name, as they lie in a file; those that it has."""
        packed = self.kind(*(tensors.get(field) for field in self.kind._fields))
        return stored_tensors(packed, tensors.get("order"), self.input_format.layout, self.format)

    def restore(self) -> None:
        """The reverse of `hold_stored`."""
        if is_stored(self._held()):
            for name, tensor in self.packed._asdict().items():
                self._parameters[name] = None if tensor is None else _parameter(tensor)
        if (order := self._int32_order()) is not None:
            self._parameters["order"] = _parameter(order)

    def _int32_order(self) -> Tensor | None:
        stored = self.order is not None and self.order.dtype != torch.int32
        return self.order.to(torch.int32) if stored else self.order  # type: ignore[union-attr]

    def _held(self) -> AnyWeight:
        held: AnyWeight = self.kind(*(getattr(self, field) for field in self.kind._fields))
        return held

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise AtomError(
                f"a packed linear is called with {x.dtype}: the model casts activations to the "
                'dtype of its weight. Leave it as it is: quantize(model, ..., skip=["*.<its name>'
                '.weight"])'
            )
        form = self.input_format
        cut = form.cut
        order = self._int32_order()
        activation = x if order is None else reorder(x, order)
        if form.rotation:
            numbers = cut.group_size, cut.outlier_channels, form.rotation
            activation = rotate(activation, *numbers)
        operands: Sequence[Any] = (activation,)
        if form.format == "e4m3":
            operands = quantize_e4m3(activation)
        elif form.bits < 16:
            operands = quantize(
                activation,
                form.bits,
                cut.group_size,
                cut.outlier_channels,
                form.clip,
                form.int8_groups,
                0,
                cut.per_token,
                **named_format(form.format),
            )
        operands = (*operands, *self.packed, self.bias, None, x.dtype)
        out: Tensor = _PRODUCTS[self.kind](*operands, **self.named)
        return out

    def extra_repr(self) -> str:
        form = self.input_format
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation_bits={form.bits}, "
            f"group_size={form.cut.group_size}, outlier_channels={form.cut.outlier_channels}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """`.to(...)` and its kin move packed tensors, but a dtype is for the bias alone."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keeps = tensor is self.bias or moved.dtype == tensor.dtype
            return moved if keeps else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._own_rows():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        with self._own_rows():
            super()._load_from_state_dict(state_dict, prefix, *args)

    @contextlib.contextmanager
    def _own_rows(self) -> Iterator[None]:
        """Its own rows in place of the weight that it shares; what is assigned meanwhile stays."""
        if not self.is_joined:
            yield
            return
        held = {field: self._parameters[field] for field in self.kind._fields}
        own = {
            name: None if rows is None else _parameter(rows)
            for name, rows in self.packed._asdict().items()
        }
        self._parameters.update(own)
        yield
        if all(self._parameters[name] is rows for name, rows in own.items()):
            self._parameters.update(held)


def stored_tensors(
    packed: AnyWeight, order: Tensor | None, layout: GroupLayout, format: str
) -> dict[str, Tensor]:
    """What a file has of a packed weight, by name; see kernels/storing.py."""
    fields = store(packed, layout, format)._asdict()
    fields["order"] = None if order is None else store_order(order)
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)


def join_rows(linears: Sequence[QuantizedLinear]) -> None:
    """Puts the weights of linears that read one activation, in one order, into one larger weight.

    Compiled, they are then one product without a copy. Their weights are held twice meanwhile.
    """
    whole = concatenate_rows([one.packed for one in linears])
    joined = {
        name: None if tensor is None else _parameter(tensor)
        for name, tensor in whole._asdict().items()
    }
    start = 0
    for one in linears:
        one._parameters.update(joined)
        one.first_row, start = start, start + one.out_features
        one.order = linears[0].order
