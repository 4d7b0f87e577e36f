"""Rounds weights linear by linear, each on what the quantized linears before it compute."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import AtomError, RecipeError
from .gptq import fit_weight, round_weight
from .kernels.packing import dequantize_weight, row_scales, select_rows, to_device
from .passes.linears import FoundLinear, is_weight
from .passes.transforms import Transform
from .precision import ACTIVATION_CLIPS, fake_quantize, sample_rows, transform_of
from .recipe import (
    LayerChoice,
    RoundedWeight,
    checksum,
    rounded_from_tensors,
    rounded_to_tensors,
    save_whole,
)
from .replay import Call, Stream
from .scheme import Scheme

_SAMPLED_TOKENS = 2048


class Rounder:
    """Fills in clips, errors and rounded weights."""

    def __init__(
        self,
        scheme: Scheme,
        orders: Mapping[str, Tensor],
        layers: Mapping[str, LayerChoice],
        error_budget: float | None,
        resume: str | Path | None,
    ) -> None:
        self._scheme = scheme
        self._transforms = {name: transform_of(scheme, order) for name, order in orders.items()}
        self._layers = dict(layers)
        self._error_budget = error_budget
        self._folder = None if resume is None else _Folder(Path(resume))
        self._rounded: dict[str, RoundedWeight] = {}
        # dense float32 weights, transformed, of the linears that batches have yet to run through
        self._dense: dict[str, Tensor] = {}
        self._last_input: tuple[Tensor, str, Tensor] | None = None

    @torch.no_grad()
    def run(
        self, together: Sequence[Sequence[Call]], progress: bool
    ) -> tuple[dict[str, LayerChoice], dict[str, RoundedWeight]]:
        """`together`: see `replay.abreast`."""
        if self._folder is not None:
            self._folder.open(_key(together, self._scheme, self._error_budget))
        total = sum(len(calls[0].groups) * len(calls) for calls in together)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not progress, transient=True) as bar:
            task = bar.add_task("rounding", total=total)
            for calls in together:
                self._run_abreast(calls, lambda: bar.advance(task))
        if self._folder is not None:
            self._folder.remove()
        return self._layers, self._rounded

    def _run_abreast(self, calls: Sequence[Call], step: Any) -> None:
        streams = [Stream(call, self._linear) for call in calls]
        for number in range(len(calls[0].groups)):
            groups = [stream.call.groups[number] for stream in streams]
            for stream, group in zip(streams, groups, strict=True):
                stream.advance(group[0].x)
                step()
            self._dense.clear()
            self._last_input = None
            xs = [stream.value(group[0].x) for stream, group in zip(streams, groups, strict=True)]
            weights = [_weight(streams[0], found) for found in groups[0]]
            self._quantize([found.name for found in groups[0]], weights, xs)

    def _linear(self, found: FoundLinear, x: Tensor, weight: Tensor) -> Tensor | None:
        choice = self._layers[found.name]
        if choice.keep or found.name not in self._rounded:
            return None
        if found.name not in self._dense:  # a weight that a graph reads a second time
            self._dense[found.name] = self._to_dense(found.name)
        # compared as objects: linears of one activation follow each other and share the rounding
        if self._last_input is None or self._last_input[0] is not x:
            transform = self._transforms[found.name]
            numbers = (transform.layout, choice.activation_clip, choice.int8_groups)
            rounded = fake_quantize(transform.apply(x), self._scheme, *numbers)
            self._last_input = x, found.name, rounded
        return F.linear(self._last_input[2], self._dense[found.name])

    def _to_dense(self, name: str) -> Tensor:
        transform = self._transforms[name]
        packed = to_device(self._rounded[name].packed, transform.order.device)
        return dequantize_weight(packed, transform.layout, self._scheme.weight_format)

    def _quantize(
        self,
        names: Sequence[str],
        weights: Sequence[Tensor],
        xs: Sequence[Tensor],
    ) -> None:
        """Rounds the linears of one activation. xs: its value in each batch, (*, K)."""
        known = self._folder.load(names) if self._folder is not None else None
        if known is not None:
            layers, rounded = known
            self._layers |= layers
            self._rounded |= rounded
            return
        if all(name in self._rounded for name in names):
            return  # the same weights, read again
        transform = self._transforms[names[0]]
        transformed = [transform.apply(weight) for weight in weights]
        work = _Work(names, weights, transformed, transform, xs)
        self._search_clip(work)
        error = self._round(work)
        if self._error_budget is not None and error > self._error_budget:
            self._lift(work, error)
        if self._folder is not None:
            self._folder.save(names, self._layers, self._rounded)

    def _search_clip(self, work: _Work) -> None:
        """The activation's clip with the least error of its linears' outputs."""
        choice = self._layers[work.names[0]]
        if self._scheme.activation_bits >= 8:
            return
        x = _sample(work.xs, work.transform)
        layout = work.transform.layout
        gram = sum(weight.float().t() @ weight.float() for weight in work.transformed)

        def error(clip: float) -> float:
            wrong = fake_quantize(x, self._scheme, layout, clip, choice.int8_groups) - x
            return float(((wrong @ gram) * wrong).sum())

        clip = min(ACTIVATION_CLIPS, key=error)
        self._choose(work.names, activation_clip=clip)

    def _round(self, work: _Work) -> float:
        """Rounds each weight to what the activation becomes; returns the largest output error."""
        choice = self._layers[work.names[0]]
        layout = work.transform.layout
        numbers = (self._scheme, layout, choice.activation_clip, choice.int8_groups)
        hessian = torch.zeros(layout.width, layout.width, device=work.xs[0].device)
        cross = torch.zeros_like(hessian)
        for x in work.xs:
            exact_x = work.transform.apply(x).reshape(-1, layout.width).float()
            rounded_x = fake_quantize(exact_x, *numbers)
            hessian.addmm_(rounded_x.t(), rounded_x)
            cross.addmm_(exact_x.t(), rounded_x)
        if not bool(hessian.isfinite().all()):
            raise AtomError(f"the input of {work.names[0]} is not finite in the quantized model")
        # rows do not depend on each other: all linears of one activation at once
        together = torch.cat([weight.float() for weight in work.transformed])
        weight_only = self._scheme.activation_bits == 16
        fitted = together if weight_only else fit_weight(together, hessian, cross)
        del cross
        all_packed, note = round_weight(
            fitted,
            hessian,
            layout,
            self._scheme.weight_bits,
            weight_only=weight_only,
            symmetric=self._scheme.symmetric,
            format=self._scheme.weight_format,
            row_scale=row_scales(work.weights, self._scheme.weight_format),
        )
        del hessian, fitted
        sample = _sample(work.xs, work.transform)
        rounded_sample = fake_quantize(sample, *numbers)
        all_rows = torch.arange(len(together), device=together.device)
        parts = all_rows.split([len(weight) for weight in work.weights])
        largest = 0.0
        for name, weight, rows in zip(work.names, work.weights, parts, strict=True):
            packed, exact = select_rows(all_packed, rows), together[rows]
            self._dense[name] = dequantize_weight(packed, layout, self._scheme.weight_format)
            wanted = F.linear(sample, exact)
            noise = F.linear(rounded_sample, self._dense[name]) - wanted
            error = float(noise.square().sum() / wanted.square().sum().clamp(min=1e-30))
            self._rounded[name] = RoundedWeight(to_device(packed, "cpu"), checksum(weight).cpu())
            self._choose([name], error=error, note=note)
            largest = max(largest, error)
        return largest

    def _lift(self, work: _Work, error: float) -> None:
        """The next precisions, until the error is within the budget: INT8 activations, 16 bits."""
        assert self._error_budget is not None
        layout = work.transform.layout
        reason = f"error {error:.4f}, budget {self._error_budget:g}"
        all_int8 = self._layers[work.names[0]].int8_groups == layout.num_groups
        if self._scheme.activation_bits < 8 and not all_int8:
            self._choose(work.names, int8_groups=layout.num_groups, reason=reason)
            error = self._round(work)
        if error > self._error_budget:
            activations = "INT8"
            if not self._scheme.sorts_channels:
                activations = "16-bit" if self._scheme.activation_bits == 16 else "FP8"
            budget = f"budget {self._error_budget:g}"
            reason = f"error {error:.4f} with {activations} activations, {budget}"
            self._choose(work.names, keep=True, error=0.0, reason=reason)
            for name in work.names:
                del self._rounded[name], self._dense[name]

    def _choose(self, names: Sequence[str], **changes: Any) -> None:
        for name in names:
            self._layers[name] = dataclasses.replace(self._layers[name], **changes)


class _Work(NamedTuple):
    """The linears of one activation, their weights as they are and under `transform`."""

    names: Sequence[str]
    weights: Sequence[Tensor]
    transformed: Sequence[Tensor]
    transform: Transform
    xs: Sequence[Tensor]


def _sample(xs: Sequence[Tensor], transform: Transform) -> Tensor:
    most = -(-_SAMPLED_TOKENS // len(xs))
    return transform.apply(torch.cat([sample_rows(x, most) for x in xs]))


def _weight(stream: Stream, found: FoundLinear) -> Tensor:
    weight = stream.value(found.weight).detach()
    return weight.t() if found.transposed else weight


def _key(together: Sequence[Sequence[Call]], scheme: Scheme, error_budget: float | None) -> str:
    """What a calibration was asked for: model, batches, scheme."""
    digest = hashlib.sha256(repr((scheme, error_budget)).encode())
    for calls in together:
        digest.update(repr(calls[0].names).encode())
        for number, call in enumerate(calls):
            placeholders = call.gm.graph.find_nodes(op="placeholder")
            for node, one in zip(placeholders, call.args, strict=True):
                if isinstance(one, Tensor) and not is_weight(node):
                    digest.update(repr((one.dtype, one.shape)).encode())
                    digest.update(
                        one.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
                    )
                elif isinstance(one, Tensor) and number == 0:  # every batch has the same weights
                    digest.update(repr((one.shape, float(one.detach().double().norm()))).encode())
    return digest.hexdigest()


class _Folder:
    """Finished linears of a calibration under way, one file for those of one activation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._key = ""
        self._written = 0

    def open(self, key: str) -> None:
        """Raises RecipeError if it belongs to another calibration."""
        self._key = key
        self._path.mkdir(parents=True, exist_ok=True)
        for file in self._files():
            if self._read(file)[0] != key:
                raise RecipeError(
                    f"{self._path} holds a calibration of another model, text or scheme; "
                    "remove it or resume from another folder"
                )

    def load(
        self, names: Sequence[str]
    ) -> tuple[dict[str, LayerChoice], dict[str, RoundedWeight]] | None:
        file = self._file(names)
        if not file.is_file():
            return None
        _, header, tensors = self._read(file)
        layers = {name: LayerChoice(**choice) for name, choice in json.loads(header).items()}
        return layers, rounded_from_tensors(tensors)

    def save(
        self,
        names: Sequence[str],
        layers: Mapping[str, LayerChoice],
        rounded: Mapping[str, RoundedWeight],
    ) -> None:
        header = json.dumps({name: dataclasses.asdict(layers[name]) for name in names})
        tensors = {"-": torch.zeros(0)}  # a layer that is kept has none, and a file needs one
        for name in names:
            if name in rounded:
                tensors |= rounded_to_tensors(name, rounded[name])
        save_whole(tensors, {"key": self._key, "layers": header}, self._file(names))

    def remove(self) -> None:
        for file in self._files():
            file.unlink()
        if not any(self._path.iterdir()):
            self._path.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self._path.glob("linears-*.safetensors"))

    def _file(self, names: Sequence[str]) -> Path:
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        return self._path / f"linears-{digest}.safetensors"

    def _read(self, file: Path) -> tuple[str, str, dict[str, Tensor]]:
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                return metadata["key"], metadata["layers"], tensors
        except (SafetensorError, KeyError) as error:
            raise RecipeError(f"{file} is damaged: {error}; remove it") from error
