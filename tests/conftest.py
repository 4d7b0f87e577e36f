"""Without a GPU, Triton's interpreter runs the kernels, and tests marked `gpu` are skipped.

With one, kernels and what is marked `gpu` run there, and everything else on the CPU as ever.
"""

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest import mock

# processes that share the tests share the cores too; read when torch is imported, and inherited
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("gpu") or "kernels" in item.path.parts:
        return (yield)
    with mock.patch.object(torch.cuda, "is_available", return_value=False):  # what defaults ask
        return (yield)


@pytest.fixture
def graphs_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The backend rewrites graphs, listed here, as always; Inductor, which is slow, is left out."""
    from atom_compile import compat

    graphs = []

    def compile_graph(gm: Any, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward  # type: ignore[no-any-return]

    torch._dynamo.reset()
    monkeypatch.setattr(compat, "compile_graph", compile_graph)
    yield graphs
    torch._dynamo.reset()
