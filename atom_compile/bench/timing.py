"""How the benchmark times a call: CUDA-graph replays on a GPU, the wall clock on a CPU.

Calls come as a list of copies, each with inputs of its own, so that together they read past the
last-level cache.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..kernels.arrivals import arrivals_of

Call = Callable[[], object]

_MOST_COPIES = 32  # of inputs so small that a model's previous kernel leaves them in the cache
_MOST_CALLS = 64  # in one replay
_REPLAY_SECONDS = 2e-3  # long enough that the launch of a replay hides behind the one before
_LEAST_SAMPLES, _MOST_SAMPLES = 5, 100


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of one call's time.

    `how`: "graph replay", "events" or "wall clock".
    """

    median_us: float
    iqr_us: float
    how: str


def copies_past_cache(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of inputs exceed twice the L2 together, within a quarter of the free memory."""
    if device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", 64 << 20)
    free, _ = torch.cuda.mem_get_info(device)
    wanted = min(2 * cache // bytes_per_call + 2, _MOST_COPIES)
    return int(max(1, min(wanted, free // 4 // bytes_per_call)))


def measure(calls: Sequence[Call], device: torch.device, seconds: float) -> Timing:
    """The time of one of `calls`, from samples over about `seconds`."""
    if device.type != "cuda":
        return _summary(_time_by_clock(calls, seconds), len(calls), "wall clock")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # thousands of captured launches would use up the counters, and later ones take longer
    with torch.cuda.stream(stream), arrivals_of(stream.device).lent():
        passes = _passes_per_replay(calls)
        try:
            repeat, how = _capture(calls, passes, stream).replay, "graph replay"
        except RuntimeError:  # something in the calls synchronizes: launch them one by one
            repeat, how = (lambda: _run(calls, passes)), "events"
        samples = _time_by_events(repeat, seconds)
    return _summary(samples, passes * len(calls), how)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches on large tensors, measured.

    `copy_gb_per_s` counts bytes read and bytes written. `tera_ops_per_s`: by the width of the
    operands of a matrix product, "8-bit" (the faster of FP8 and INT8) and "16-bit".
    """

    copy_gb_per_s: float
    read_gb_per_s: float
    tera_ops_per_s: dict[str, float]


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    size = 8192 if device.type == "cuda" else 256
    rates: dict[str, float] = {}
    for width, call in _large_products(size, device, dtype):
        try:
            rate = 2 * size**3 / measure([call], device, 0.05).median_us / 1e6
        except RuntimeError:  # a product that this device or build does not have
            continue
        rates[width] = max(rate, rates.get(width, 0.0))
    return Ceilings(
        copy_gb_per_s=round(_copy_bandwidth(device), 1),
        read_gb_per_s=round(_read_bandwidth(device), 1),
        tera_ops_per_s={width: round(rate, 3) for width, rate in rates.items()},
    )


def _large_products(
    size: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Call]]:
    """Width of the operands, and a square matrix product of random ones."""
    pair = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
    yield "16-bit", functools.partial(torch.mm, *pair)
    integers = [(32 * x).clamp(-127, 127).to(torch.int8) for x in pair]
    yield "8-bit", lambda: torch._int_mm(integers[0], integers[1].t())
    if device.type == "cuda":
        floats = [x.to(torch.float8_e4m3fn) for x in pair]
        scale = torch.ones(size, 1, device=device)
        yield (
            "8-bit",
            lambda: torch._scaled_mm(
                floats[0], floats[1].t(), scale, scale.t(), out_dtype=dtype, use_fast_accum=True
            ),
        )


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written by a large copy on the device, in GB/s."""
    size = _large_size(device)
    pairs = [torch.ones(2, size, dtype=torch.uint8, device=device) for _ in range(2)]
    calls = [functools.partial(torch.Tensor.copy_, *pair) for pair in pairs]
    return 2 * size / measure(calls, device, 0.05).median_us / 1e3


def _read_bandwidth(device: torch.device) -> float:
    """Bytes read by a large sum, in GB/s."""
    size = _large_size(device)
    tensors = [torch.ones(size // 4, device=device) for _ in range(2)]
    calls = [functools.partial(torch.sum, tensor) for tensor in tensors]
    return size / measure(calls, device, 0.05).median_us / 1e3


def _large_size(device: torch.device) -> int:
    return 1 << 30 if device.type == "cuda" else 64 << 20


def _run(calls: Sequence[Call], passes: int) -> None:
    for _ in range(passes):
        for call in calls:
            call()


def _passes_per_replay(calls: Sequence[Call]) -> int:
    """Warms up, so that compiling and packing stay out of a capture, and then times one pass."""
    _run(calls, 2)
    torch.cuda.synchronize()
    start = time.perf_counter()
    _run(calls, 1)
    torch.cuda.synchronize()
    wanted = int(_REPLAY_SECONDS / (time.perf_counter() - start))
    return max(1, min(wanted, _MOST_CALLS // len(calls)))


def _capture(calls: Sequence[Call], passes: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        _run(calls, passes)
    return graph


def _time_by_events(repeat: Callable[[], object], seconds: float) -> list[float]:
    start = time.perf_counter()
    for _ in range(3):
        repeat()
    torch.cuda.synchronize()
    samples = _samples_within(seconds, (time.perf_counter() - start) / 3)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    events[0].record()
    for event in events[1:]:
        repeat()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)]


def _time_by_clock(calls: Sequence[Call], seconds: float) -> list[float]:
    _run(calls, 1)
    samples: list[float] = []
    while len(samples) < _samples_within(seconds, sum(samples) / max(1, len(samples))):
        start = time.perf_counter()
        _run(calls, 1)
        samples.append(time.perf_counter() - start)
    return samples


def _samples_within(seconds: float, one: float) -> int:
    return max(_LEAST_SAMPLES, min(int(seconds / max(one, 1e-9)), _MOST_SAMPLES))


def _summary(samples: list[float], calls_per_sample: int, how: str) -> Timing:
    low, median, high = statistics.quantiles(
        (1e6 * sample / calls_per_sample for sample in samples), n=4
    )
    return Timing(median, high - low, how)
