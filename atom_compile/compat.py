"""Whatever depends on torch's version or reaches into its private parts. Nothing else may."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from .kernels.devices import multiplies_e4m3


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    config_patches: dict[str, Any],
    references: dict[Any, Callable[..., Any]],
    cache_key: str,
) -> Callable[..., Any]:
    """Inductor, for inference. `references`: operators to compile as their decompositions.

    Inductor's caches see neither decompositions nor kernels nor passes; `cache_key` speaks for all.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    decompositions = _Table({**select_decomp_table(), **references}) if references else None
    with torch.no_grad(), torch.compiler.config.patch(cache_key_tag=cache_key):  # type: ignore[attr-defined]
        compiled: Callable[..., Any] = compile_fx(  # type: ignore[assignment]
            gm, list(example_inputs), config_patches=config_patches, decompositions=decompositions
        )
    return compiled


class _Table(dict[Any, Any]):
    """Decompositions that pickle as nothing.

    Inductor pickles its arguments for the cache key, and some of torch's own decompositions cannot
    be: a plain dict would switch the caches off.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, ()


def mode_options(mode: str | None) -> dict[str, Any]:
    """What `torch.compile(mode=...)` means to Inductor."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode else {}


def modes() -> list[str]:
    from torch._inductor import list_mode_options

    return list(list_mode_options())


def inductor_options() -> set[str]:
    from torch._inductor import list_options

    return set(list_options())


def cudagraph_skips() -> int:
    """How many graphs of this process Inductor did not put into a CUDA graph."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def compiles_e4m3(device: torch.device) -> bool:
    """Whether Inductor can cast to float8_e4m3fn there: before torch 2.13 only if the GPU can."""
    from torch._inductor import utils

    falls_back = hasattr(utils, "is_triton_fp8_dtype_supported")
    return falls_back or device.type != "cuda" or multiplies_e4m3(device)


def modules_being_compiled() -> dict[str, torch.nn.Module]:
    """The modules among the local variables of the frame being compiled, by name.

    As a rule that is `self` alone. A backend is not handed the model, but Dynamo's tracer, up the
    stack, knows the frame's variables.
    """
    frame = sys._getframe()
    while frame is not None:
        tracer: Any = frame.f_locals.get("self")
        if type(tracer).__name__ == "OutputGraph":
            scope = tracer.local_scope
            return {
                name: local for name, local in scope.items() if isinstance(local, torch.nn.Module)
            }
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def source_name(node: torch.fx.Node) -> str:
    """How the frame reaches a placeholder: "L['self']._modules['mlp']._parameters['weight']"."""
    name = node._dynamo_source.name  # type: ignore[attr-defined]
    return str(name() if callable(name) else name)  # a method before torch 2.12


def inductor_cache() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def triton_cache() -> Path:
    """Where Triton keeps compiled kernels; Inductor gives it a folder of its own in a compile."""
    home = os.environ.get("TRITON_HOME", str(Path.home()))
    return Path(os.environ.get("TRITON_CACHE_DIR", str(Path(home) / ".triton" / "cache")))
