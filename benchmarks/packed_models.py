"""What packed models take: memory, time to load, time to a first token; writes JSON.

    python benchmarks/packed_models.py save MODEL... --folder FOLDER --out FILE
    python benchmarks/packed_models.py hold --shape llama3-70b --out FILE
    python benchmarks/packed_models.py load --shape llama3-8b --folder FOLDER --out FILE
    python benchmarks/packed_models.py start --shape llama3-8b --folder FOLDER --out FILE

save    models packed in place, saved, and loaded in a process of their own: bytes in memory and
        in files, and whether the logits are the same, bit for bit
hold    a model of random weights, made and packed linear by linear: the peak of memory, what is
        held afterwards, and tokens per second of one sequence
load    seconds that from_pretrained takes in BF16 and atom_compile.load packed, each in processes
        of its own, which have made the GPU ready; files are in the page cache
start   seconds from the start of a process to its first token, the compile caches filled: packed
        with this backend, BF16 with Inductor

FOLDER keeps the two checkpoints, which `load` and `start` write if they are not there. With
--shape prose-llama-5m all of it runs on a CPU in minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CompileConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import atom_compile
from atom_compile.bench.result import describe_environment
from atom_compile.bench.shapes import SHAPES, find_device, find_shape, llama_config
from atom_compile.files import write_text
from atom_compile.model_folder import load_model
from atom_compile.options import Options
from atom_compile.packer import Places, make_plan, pack_group
from atom_compile.progress import track
from atom_compile.transformers_quantizer import attach

PROMPT_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("save", "hold", "load", "start", "process"))
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="prose-llama-5m")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate")
    parser.add_argument("--repeats", type=int, default=3, help="processes timed, after a first one")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "process":
        return run_process(arguments)
    if arguments.out is None or (arguments.part != "hold" and arguments.folder is None):
        parser.error("--out FILE is needed, and but for hold --folder FOLDER")
    parts = {"save": save, "hold": hold, "load": load, "start": start}
    numbers = parts[arguments.part](arguments)
    record = {
        "environment": describe_environment(find_device(None)),
        "part": arguments.part,
        "shape": None if arguments.part == "save" else arguments.shape,
        "scheme": arguments.scheme,
        **numbers,
    }
    write_text(arguments.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(numbers, indent=1))


@torch.no_grad()
def save(arguments: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for source in arguments.models:
        model = load_model(source, dtype="auto")
        before = model.get_memory_footprint()
        done = atom_compile.quantize(model, arguments.scheme)
        folder = arguments.folder / f"{source.name}-{arguments.scheme}"
        atom_compile.save(model, folder)
        save_file({"logits": logits(model)}, folder.with_suffix(".logits"))
        command = [sys.executable, __file__, "process", "--folder", str(folder), "--out", "save"]
        subprocess.run(command, check=True)
        results[source.name] = {
            "linears_bytes_bf16": done.bytes_before,
            "linears_bytes": done.bytes_after,
            "linears_ratio": done.bytes_after / done.bytes_before,
            "linears_file_bytes": (stored := linears_file_bytes(folder, done)),
            "linears_file_ratio": stored / done.bytes_before,
            "model_bytes_bf16": before,
            "model_bytes": model.get_memory_footprint(),
            "file_bytes": file_bytes(folder),
            "same_logits_in_another_process": True,
        }
    return results


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (2, PROMPT_TOKENS), device=model.device)
    return model(ids).logits.cpu()


@torch.no_grad()
def random_model(shape_name: str, scheme: str | None) -> Any:
    """In BF16, or packed: then one activation's linears at a time are there in BF16."""
    device = find_device(None)
    config = llama_config(find_shape(shape_name))
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    torch.manual_seed(0)
    if scheme is not None:
        options = Options.parse({"scheme": scheme})
        plan, places = make_plan(model, options), Places(model)
        for group in track(plan.groups, "packing"):
            linears = {name: model.get_submodule(name) for name in group}
            for linear in linears.values():
                fill(linear, device)
            for name, packed in pack_group(linears, options).items():
                places.replace(linears.pop(name), packed)
        attach(model, options, plan.groups)
    for module in model.modules():
        fill(module, device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model


def fill(module: nn.Module, device: torch.device) -> None:
    """Random values for the parameters of this very module that have none yet."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            values = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.dim() > 1:
                values.normal_(std=parameter.shape[-1] ** -0.5)
            module._parameters[name] = nn.Parameter(values, requires_grad=False)


def hold(arguments: argparse.Namespace) -> dict[str, Any]:
    model = random_model(arguments.shape, arguments.scheme)
    made = peak_bytes()
    compiled = compiles(arguments) and torch.cuda.is_available()  # generate() does on no CPU
    if compiled:  # a prompt's operators are launched one by one, each further token is a CUDA graph
        config = CompileConfig(backend="atom", mode="reduce-overhead", dynamic=False)
        model.generation_config.compile_config = config
    first, _ = seconds_to_generate(model, 1)
    seconds_to_generate(model, 3)
    short, _ = seconds_to_generate(model, 1)
    long, _ = seconds_to_generate(model, 1 + arguments.tokens)
    plain = sum(one.numel() * 2 for one in _unpacked(arguments.shape).parameters())
    return {
        "parameter_bytes": sum(one.nbytes for one in model.parameters()),
        "parameter_bytes_bf16": plain,
        "peak_bytes_packed": made,
        "peak_bytes_generating": peak_bytes(),
        "compiled": compiled,
        "seconds_to_first_token": first,
        "tokens_per_second": arguments.tokens / (long - short),
    }


def _unpacked(shape_name: str) -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(llama_config(find_shape(shape_name)))


def peak_bytes() -> int:
    """Of the GPU's memory so far; without one of the process, Python and all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compiles(arguments: argparse.Namespace) -> bool:
    return torch.cuda.is_available() if arguments.compile is None else bool(arguments.compile)


@torch.no_grad()
def seconds_to_generate(model: Any, tokens: int) -> tuple[float, torch.Tensor]:
    prompt = torch.randint(0, 500, (1, PROMPT_TOKENS), device=model.device)
    cache = atom_compile.KVCache(model.config, 1, 1024, "kv4", device=model.device)
    before = time.perf_counter()
    written = model.generate(
        prompt, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - before, written


def write_checkpoints(arguments: argparse.Namespace) -> dict[str, Path]:
    folders = {name: arguments.folder / f"{arguments.shape}-{name}" for name in ("bf16", "packed")}
    for name, folder in folders.items():
        if not folder.is_dir():
            model = random_model(arguments.shape, arguments.scheme if name == "packed" else None)
            if name == "packed":
                atom_compile.save(model, folder)
            else:
                model.save_pretrained(folder)
            del model
    return folders


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        name: in_processes(arguments, folder, "load") | {"file_bytes": file_bytes(folder)}
        for name, folder in write_checkpoints(arguments).items()
    }


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        name: in_processes(arguments, folder, "start")
        for name, folder in write_checkpoints(arguments).items()
    }


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def linears_file_bytes(folder: Path, done: atom_compile.Quantized) -> int:
    """Of the packed linears' tensors, without biases and the files' headers."""
    packed = {name for group in done.groups for name in group}
    total = 0
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, field = name.rpartition(".")
            total += tensor.nbytes if module in packed and field != "bias" else 0
    return total


def in_processes(arguments: argparse.Namespace, folder: Path, part: str) -> dict[str, Any]:
    """Seconds of several processes; the first one fills the caches."""
    command = [sys.executable, __file__, "process", "--folder", str(folder), "--out", part]
    command.append("--compile" if compiles(arguments) else "--no-compile")
    seconds = []
    for _ in range(1 + arguments.repeats):
        before = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        whole = time.perf_counter() - before
        if done.returncode:
            raise SystemExit(done.stderr)
        said = float(done.stdout.split()[-1])
        seconds.append(said if part == "load" else whole)
    return {"first": seconds[0], "seconds": seconds[1:], "median": statistics.median(seconds[1:])}


def run_process(arguments: argparse.Namespace) -> None:
    """Loads a checkpoint and says how long it took; for `start` goes on to a first token."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # the first use takes half a second, whatever is loaded
        torch.cuda.synchronize()
    before = time.perf_counter()
    model = load_model(arguments.folder, dtype="auto")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - before
    if str(arguments.out) == "save":
        with torch.no_grad():
            same = torch.equal(
                logits(model), load_file(arguments.folder.with_suffix(".logits"))["logits"]
            )
        assert same, "other logits than before it was saved"
    if str(arguments.out) == "start":
        if arguments.compile:
            packed = getattr(model, "hf_quantizer", None) is not None
            model.compile(backend="atom" if packed else "inductor")
        seconds_to_generate(model, 1)
    print(seconds)


if __name__ == "__main__":
    main()
