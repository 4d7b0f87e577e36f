"""Runs every operator on small sizes under compute-sanitizer; writes its log and JSON.

    python benchmarks/sanitize.py --out benchmarks
    python benchmarks/sanitize.py --run            what it runs, without the sanitizer

memcheck looks for accesses out of bounds, with every tensor in an allocation of its own; racecheck
for races in shared memory. Outputs are compared with the references as well. The sizes are ragged:
the last group, tile and split are partly empty.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.attention import SDPBackend

from atom_compile import KVCache, KVScheme, compat
from atom_compile.backend import atom
from atom_compile.bench import Shape, attention
from atom_compile.bench.cases import SAME_ROUNDING, Case, Setting
from atom_compile.bench.model import random_model
from atom_compile.bench.operators import operator_cases
from atom_compile.bench.result import describe_environment
from atom_compile.kernels import linear, quantize, tuning
from atom_compile.kernels.packing import pack_weight
from atom_compile.scheme import Scheme

SHAPES = (
    Shape(name="ragged", hidden=192, intermediate=352, heads=3, kv_heads=1, head_dim=64),
    Shape(name="wide", hidden=1024, intermediate=1408, heads=8, kv_heads=2, head_dim=128),
)
TOKENS = (1, 5, 17, 40, 130)
ROWS, CANDIDATES = 208, 5  # of a linear that is launched in so many other ways
KV_SCHEMES = (
    KVScheme(bits=4),
    KVScheme(bits=8),
    KVScheme(bits=16),
    KVScheme(bits=4, group_size=64),
    KVScheme(bits=4, residual=8),
    KVScheme(bits=4, keys_before_rope=True),
)
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)")
FOUND = re.compile(r"=+ (?:Error: )?(Race reported .*|Invalid .*|    and (?:Read|Write) access .*)")
ADDRESS = re.compile(r"\+0x[0-9a-f]+| \[\d+ hazards\]")
COMMAND = "compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--minutes", type=float, default=60.0, help="when a tool begins no check")
    parser.add_argument("--processes", type=int, default=4, help="which share the checks")
    parser.add_argument("--part", type=int, default=0, help="with --run: which of the processes")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.run:
        return run_all(device, arguments.part, arguments.processes, 60 * arguments.minutes)
    sanitizer = next(filter(None, map(shutil.which, COMMAND)), None)
    if sanitizer is None:
        sys.exit(f"{COMMAND[0]} is neither on the PATH nor in {Path(COMMAND[1]).parent}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"sanitizer-{tuning.path_for(device).stem}"
    reports = {}
    for tool in arguments.tools.split(","):
        log = arguments.out / f"{stem}-{tool}.log"
        command = [sanitizer, "--tool", tool, "--error-exitcode", "3"]
        reports[tool] = sanitize(command, log, arguments.minutes, arguments.processes)
        print(tool, reports[tool], flush=True)
    record = {"environment": describe_environment(device), "tools": reports}
    (arguments.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(any(any(report["statuses"]) for report in reports.values()))


def sanitize(command: list[str], log: Path, minutes: float, processes: int) -> dict[str, Any]:
    """Runs this file with --run under one tool."""
    # else tensors share allocations, and what one reads of its neighbour is in bounds
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    logs = [log.with_suffix(f".{part}.log") for part in range(processes)]
    running = []
    for part, one in enumerate(logs):
        whole = [*command, "--log-file", str(one), sys.executable, __file__, "--run"]
        whole += ["--part", str(part), "--processes", str(processes), "--minutes", str(minutes)]
        running.append(subprocess.Popen(whole, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0].strip().splitlines()[-1:] for process in running]
    text = "".join(one.read_text() for one in logs)
    log.write_text(text)
    for one in logs:
        one.unlink()
    return {
        "statuses": [process.returncode for process in running],
        "said": [line for lines in said for line in lines],
        "summaries": SUMMARY.findall(text),
        "found": sorted({ADDRESS.sub("", line) for line in FOUND.findall(text)}),
        "seconds": round(time.perf_counter() - start, 1),
    }


@torch.no_grad()
def run_all(device: torch.device, part: int, parts: int, seconds: float) -> int:
    """Every operator, or one of `parts` of that, until the time is up; 1 if any is wrong."""
    end = time.monotonic() + seconds
    wrong = []
    checks = [*operator_checks(device), *launch_checks(device), *model_checks(device)]
    random.Random(0).shuffle(checks)  # in whatever time there is, something of all
    checks, done = checks[part::parts], 0
    for name, check in track(checks, console=Console(stderr=True)):
        if time.monotonic() > end:
            break
        if not (error := check()) <= SAME_ROUNDING:
            wrong.append(f"{name}: relative error {error:.2g}")
        done += 1
    print(
        "\n".join(wrong), f"{done - len(wrong)} of {len(checks)} checks agree with the references"
    )
    return int(bool(wrong))


Check = tuple[str, Any]  # what is checked, and a function of nothing that gives the relative error


def operator_checks(device: torch.device) -> Iterator[Check]:
    """The benchmark's own cases, 16-bit ones aside, nothing compiled."""
    for shape in SHAPES:
        for scheme in (
            "w4a4", "w4a4-fp4", "w4a8", "w6a8", "w4a16", "w5a16", "w6a16", "mxfp4", "nvfp4",
        ):  # fmt: skip
            setting = setting_of(shape, device, scheme)
            cases = list(operator_cases(setting))
            if scheme == "w4a4":
                untimed = {SDPBackend.MATH: 0.0}
                with mock.patch.object(attention, "_sdpa_times", return_value=untimed):
                    for plan in attention.attention_plans(setting, "attention"):
                        cases += attention.attention_cases(setting, plan)
            for case in cases:
                if case.variant != "baseline":
                    name = f"{shape.name} {scheme} {case.op} {case.variant} {case.M}"
                    yield name, functools.partial(case_error, case, setting)


def setting_of(shape: Shape, device: torch.device, scheme: str) -> Setting:
    return Setting(
        shape=shape,
        scheme=Scheme.preset(scheme),
        tokens=TOKENS,
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        batches=(1, 3),
        lengths=(37, 130),
    )


def case_error(case: Case, setting: Setting) -> float:
    """As a share of what the case allows, on the scale of SAME_ROUNDING."""
    inputs = case.inputs(setting.draw(0))
    with torch.compiler.set_stance("force_eager"):
        got = case.observe(case.function(*inputs), *inputs)
    return relative_error(got, case.reference(*inputs)) * SAME_ROUNDING / case.limit


def launch_checks(device: torch.device) -> Iterator[Check]:
    """Launches of the linear that other sizes take, with bias and residual."""
    if device.type != "cuda":
        return
    setting = setting_of(SHAPES[0], device, "w4a4")
    layout = setting.scheme.layout(SHAPES[0].hidden)
    for M in TOKENS[::2]:
        found = linear.candidates(M, ROWS, layout.num_groups)
        for tiling in found[:: max(1, len(found) // CANDIDATES)]:
            check = functools.partial(launch_error, setting, M, layout.width, tiling)
            yield f"{linear.path_of(tiling)}, {M} tokens, {tuple(tiling)}", check


def launch_error(
    setting: Setting, M: int, K: int, tiling: linear.Tiling | linear.HopperTiling
) -> float:
    scheme, layout, draw = setting.scheme, setting.scheme.layout(K), setting.draw(0)
    numbers = scheme.activation_bits, layout.group_size, layout.outlier_channels
    quantized = quantize.reference(draw.normal(M, K), *numbers, scheme.activation_clip)
    packed = pack_weight(draw.normal(ROWS, K), layout, scheme.weight_bits, scheme.weight_clip)
    rest = draw.normal(ROWS), draw.normal(M, ROWS), setting.dtype
    arguments: list[Any] = [*quantized, *packed, *rest]
    return relative_error(linear.launch(*arguments, tiling), linear.reference(*arguments))


def model_checks(device: torch.device) -> Iterator[Check]:
    """A model of two layers, prefill in two chunks and decoding, the rewritten graphs run as is."""
    narrow, wide = SHAPES
    for shape, schemes in ((narrow, KV_SCHEMES), (wide, KV_SCHEMES[:2])):
        for scheme in schemes:
            check = functools.partial(model_error, shape, device, scheme)
            yield f"{shape.name} model {scheme}", check


def model_error(shape: Shape, device: torch.device, scheme: KVScheme) -> float:
    """0 if every logit is a number."""
    setting = setting_of(shape, device, "w4a4")
    model = random_model(setting)
    torch.compiler.reset()
    model.compile(backend=atom, options={"strict": True, "include_embeddings": True})
    cache = KVCache(model.config, 2, 64, scheme, device=device, dtype=setting.dtype)
    ids = torch.arange(2 * 44, device=device).view(2, 44)
    with mock.patch.object(compat, "compile_graph", lambda gm, *_, **__: gm.forward):
        logits = [
            model(part, past_key_values=cache).logits for part in ids.split((20, 22, 1, 1), dim=1)
        ]
    return 0.0 if all(bool(part.isfinite().all()) for part in logits) else float("nan")


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    off = got.float() - expected.float()
    norm = torch.linalg.vector_norm
    return float(norm(off, dtype=torch.float64) / norm(expected.float(), dtype=torch.float64))


if __name__ == "__main__":
    sys.exit(main())
