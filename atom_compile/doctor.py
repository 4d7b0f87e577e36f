"""`atom-compile doctor`: what is installed, what can run here, and what is known to go wrong."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version
from rich.table import Table

from .compat import inductor_cache, triton_cache
from .kernels import (
    float8_linear,
    linear,
    linear_hopper,
    packing,
    quantize,
    quantize_e4m3,
    tuning,
    two_level_linear,
)
from .kernels.hopper_tiles import HopperTiling
from .kernels.packing import GroupLayout

_OLDEST = {"torch": "2.11", "triton": "3.6", "transformers": "5"}
_OPTIONAL = {
    "accelerate": "device_map of from_pretrained needs it",
    "lm-eval": "eval --tasks needs it",
    "datasets": "eval --dataset needs it",
}
_OLDEST_CAPABILITY = (8, 0)
_LARGEST_ERROR = 1e-4
_LARGEST_ERROR_FLOAT8 = 1e-3  # tensor cores keep some 14 bits of a sum of e4m3 products


@dataclass(frozen=True)
class Finding:
    """One line: ok, warning (it runs, but not as it should), or error."""

    about: str
    found: str
    status: str = "ok"
    advice: str = ""


def examine() -> list[Finding]:
    """Looks at this machine and runs each product's kernel once."""
    return [*_versions(), *_device(), *_kernels(), *_caches(), *_combinations()]


def _versions() -> list[Finding]:
    found = [Finding("python", sys.version.split()[0])]
    for name, oldest in _OLDEST.items():
        version = _version(name)
        if version is None:
            found.append(Finding(name, "missing", "error", f"pip install '{name}>={oldest}'"))
        else:
            old = Version(version).release < Version(oldest).release
            advice = f"{oldest} is the oldest that was tested" if old else ""
            found.append(Finding(name, version, "error" if old else "ok", advice))
    for name, use in _OPTIONAL.items():
        found.append(Finding(name, _version(name) or f"missing: {use}"))
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> list[Finding]:
    if not torch.cuda.is_available():
        built = f", PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        advice = "correct, and slow" if not built else "check the driver: PyTorch finds no GPU"
        return [Finding("device", f"CPU{built}", "warning", advice)]
    found = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}"
        if capability < _OLDEST_CAPABILITY:
            found.append(Finding(f"cuda:{index}", name, "error", "linears stay in 16 bits"))
        else:
            found.append(Finding(f"cuda:{index}", name))
    return found


def _kernels() -> list[Finding]:
    layout = GroupLayout(512, 128, 128)
    x, weight = torch.randn(64, 512), torch.randn(256, 512)
    codes, scale = quantize.reference(x, 4, 128, 128, 0.9)
    packed = packing.pack_weight(weight, layout, 4, 0.85)
    arguments = (codes, scale, *packed, None, None, torch.float32)
    in_e2m1 = quantize.reference(x, 4, 128, 128, 1.0, format="e2m1")
    packed = packing.pack_weight(weight, layout, 4, 1.0, "e2m1")
    floating = (*in_e2m1, *packed, None, None, torch.float32)
    both = quantize.reference(x, 8, 128, 128, 1.0, per_token=True)
    two_levels = (*both, *packing.pack_two_level(weight, layout), None, None, torch.float32)
    rows = packing.pack_rows(weight, packing.GroupLayout(512, 128, 0, True), "e2m3")
    in_float8 = (*quantize_e4m3.reference(x), *rows, None, None, torch.float32)
    # so many tokens that Hopper's own kernel runs, where there is one
    many_in_float8 = (*quantize_e4m3.reference(x.repeat(4, 1)), *in_float8[2:])
    small = linear.Tiling(64, 16, 1)
    large = HopperTiling(64, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hopper = functools.partial(linear.launch, tiling=large)
    found = [
        _run("atom::linear", linear.linear, linear.reference, arguments, device),
        _run(
            "atom::linear of E2M1",
            functools.partial(linear.linear, format="e2m1"),
            functools.partial(linear.reference, format="e2m1"),
            floating,
            device,
        ),
        _run(
            "atom::two_level_linear",
            two_level_linear.two_level_linear,
            two_level_linear.reference,
            two_levels,
            device,
        ),
        *(
            _run(
                f"atom::float8_linear, {len(one[0])} tokens",
                functools.partial(float8_linear.float8_linear, format="e2m3"),
                functools.partial(float8_linear.reference, format="e2m3"),
                one,
                device,
                _LARGEST_ERROR_FLOAT8,
            )
            for one in (in_float8, many_in_float8)
        ),
    ]
    if device.type == "cuda":
        launch = functools.partial(linear.launch, tiling=small)
        found.append(_run(linear.PATH, launch, linear.reference, arguments, device))
    if linear_hopper.fits(device, 256, 128, 128):
        found.append(_run(linear_hopper.PATH, hopper, linear.reference, arguments, device))
    return found


def _run(
    name: str,
    kernel: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    arguments: tuple[object, ...],
    device: torch.device,
    largest_error: float = _LARGEST_ERROR,
) -> Finding:
    moved = [one.to(device) if isinstance(one, torch.Tensor) else one for one in arguments]
    where = "kernel" if device.type == "cuda" else "reference"
    try:
        got = kernel(*moved).cpu()
    except (RuntimeError, OSError) as error:
        line = str(error).strip().partition("\n")[0]
        return Finding(name, f"{type(error).__name__}: {line}", "error", "the kernel does not run")
    want = reference(*arguments)
    error_of = float((got - want).norm() / want.norm())
    if not error_of < largest_error:
        return Finding(name, f"relative error {error_of:.1e}", "error", "the kernel is wrong here")
    return Finding(name, f"{where} runs, and agrees with its definition")


def _caches() -> list[Finding]:
    found = []
    for name, folder in (
        ("Inductor's cache", inductor_cache()),
        ("Triton's cache", triton_cache()),
    ):
        parent = next(one for one in (folder, *folder.parents) if one.exists())
        writable = os.access(parent, os.W_OK)
        advice = "" if writable else "every start compiles anew: make it writable"
        found.append(Finding(name, str(folder), "ok" if writable else "warning", advice))
    if torch.cuda.is_available():
        tuned = tuning.path_for(torch.device("cuda"))
        advice = "" if tuned.is_file() else "defaults serve; `atom-compile tune` finds faster ones"
        status = "ok" if tuned.is_file() else "warning"
        found.append(Finding("tuned launches", str(tuned), status, advice))
    return found


def _combinations() -> list[Finding]:
    """What is known to go wrong, if it is the case here."""
    found = []
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1":
        advice = "unset it: kernels are interpreted, thousands of times slower"
        found.append(Finding("TRITON_INTERPRET=1", "with a GPU", "error", advice))
    if not torch.cuda.is_available():
        if shutil.which("c++") is None and shutil.which("g++") is None:
            advice = "Inductor compiles with one on a CPU: apt-get install g++"
            found.append(Finding("C++ compiler", "missing", "error", advice))
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            advice = "Inductor needs Python's headers on a CPU: apt-get install python3-dev"
            found.append(Finding("Python.h", "missing", "error", advice))
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None and _version("kernels") is None:
        advice = "transformers takes this folder for the package `kernels`: rename it"
        found.append(Finding("kernels", spec.origin, "error", advice))
    return found


_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def as_table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "about", "found"):
        table.add_column(heading, overflow="fold")
    for one in findings:
        advice = f": {one.advice}" if one.advice else ""
        colour = _COLOURS[one.status]
        table.add_row(f"[{colour}]{one.status}[/]", one.about, f"{one.found}{advice}")
    return table
