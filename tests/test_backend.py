"""The backend through torch.compile, without Inductor where what that makes is not the question."""

from __future__ import annotations

import copy
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import atom_compile
from atom_compile import compat, store
from atom_compile.errors import NothingRewrittenError, OptionError, TrainingModeError

from .capturing import reference_output, relative_error, rewrites, token_batch
from .models import HandWritten, tiny_llama


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs rewritten graphs as they are; lists those that Inductor would have compiled."""
    graphs: list[Any] = []

    def compile_graph(gm: Any, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(compat, "compile_graph", compile_graph)
    return graphs


def expected(model: nn.Module, *inputs: Any) -> Any:
    """What a fresh copy of `model` computes, with nothing packed or compiled before."""
    torch._dynamo.reset()
    duplicate = copy.deepcopy(model)
    duplicate.__dict__.pop("_compiled_call_impl", None)
    duplicate.compile(backend="atom")
    with torch.no_grad():
        output = duplicate(*inputs)
    torch._dynamo.reset()
    return output


class Block(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __getitem__(self, index: int) -> Any:
        return self.layers[index]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def block(width: int = 256, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block(nn.Linear(width, 384), nn.GELU(), nn.Linear(384, width)).eval()


@pytest.mark.usefixtures("compilations")
class TestNeverTheWrongWeights:
    x = torch.randn(3, 256)

    @torch.no_grad()
    def test_two_instances_of_one_class_share_the_code_but_not_the_weights(
        self, compilations: list[Any]
    ) -> None:
        first, second = block(seed=1), block(seed=2)
        wanted = [expected(first, self.x), expected(second, self.x)]
        compilations.clear()
        for model in (first, second):
            model.compile(backend="atom")
        got = [first(self.x), second(self.x), first(self.x)]
        torch.testing.assert_close(got, [*wanted, wanted[0]])
        assert len(compilations) == 1

    @torch.no_grad()
    def test_a_weight_updated_in_place(self) -> None:
        model = block()
        model.compile(backend="atom")
        before = model(self.x)
        model[0].weight.mul_(-2)
        after = model(self.x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, expected(model, self.x))

    @pytest.mark.parametrize("assign", [False, True])
    @torch.no_grad()
    def test_load_state_dict(self, assign: bool) -> None:
        model, other = block(seed=1), block(seed=2)
        model.compile(backend="atom")
        model(self.x)
        model.load_state_dict(other.state_dict(), assign=assign)
        torch.testing.assert_close(model(self.x), expected(other, self.x))

    @torch.no_grad()
    def test_data_replaced(self) -> None:
        model, other = block(seed=1), block(seed=2)
        model.compile(backend="atom")
        model(self.x)
        model[0].weight.data = other[0].weight.data.clone()
        torch.testing.assert_close(model(self.x), expected(model, self.x))

    @torch.no_grad()
    def test_to_another_dtype_and_back(self) -> None:
        model = block()
        model.compile(backend="atom")
        model(self.x)
        model.bfloat16()
        low = self.x.bfloat16()
        torch.testing.assert_close(model(low), expected(model, low))
        model.float()
        torch.testing.assert_close(model(self.x), expected(model, self.x))

    @torch.no_grad()
    def test_tied_weights(self) -> None:
        model = block()
        tied = Block(model[0], nn.GELU(), model[2], model[0], nn.GELU(), model[2]).eval()
        tied.compile(backend="atom")
        tied(self.x)
        model[0].weight.mul_(-1)
        torch.testing.assert_close(tied(self.x), expected(tied, self.x))

    @torch.no_grad()
    def test_a_changed_scheme(self) -> None:
        model = block()
        outputs = []
        for scheme in ("w4a4", "w4a8"):
            model.compile(backend="atom", options={"scheme": scheme})
            outputs.append(model(self.x))
        assert not torch.equal(*outputs)

    @torch.no_grad()
    def test_packed_weights_die_with_the_model(self) -> None:
        gc.collect()
        held = len(store.STORE)
        model = block()
        model.compile(backend="atom")
        model(self.x)
        assert len(store.STORE) > held
        del model
        gc.collect()
        assert len(store.STORE) == held

    @torch.no_grad()
    def test_inference_tensors(self) -> None:
        with torch.inference_mode():
            model = block()
            model.compile(backend="atom")
            got = model(self.x)
        assert torch.isfinite(got).all()


@torch.no_grad()
def test_equal_blocks_pack_each_weight_once_and_compile_once(compilations: list[Any]) -> None:
    blocks = nn.ModuleList(block(seed=seed) for seed in range(32))
    for one in blocks:
        one.compile(backend="atom")
    packed = store.STORE.computed
    x = torch.randn(3, 256)
    for _ in range(2):
        for one in blocks:
            one(x)
    assert len(compilations) == 1
    # two packed linears and the first's channel order
    assert store.STORE.computed - packed == 32 * 3


@torch.no_grad()
def test_at_most_two_graphs_over_eight_lengths(compilations: list[Any]) -> None:
    model = tiny_llama()
    model.compile(backend="atom")
    for length in (9, 12, 17, 20, 33, 40, 64, 100):
        model(token_batch(2, length), use_cache=False)
    assert len(compilations) <= 2


@torch.no_grad()
def test_prefill_and_decode_share_packed_weights(compilations: list[Any]) -> None:
    model = tiny_llama()
    model.compile(backend="atom")
    packed = store.STORE.computed
    model.generate(token_batch(1, 6), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(compilations) > 1
    # a layer: four products, three orders that no one could fold
    assert store.STORE.computed - packed == 2 * (4 + 3)


@torch.no_grad()
def test_norms_that_differ_in_epsilon_are_fused_and_told_apart(compilations: list[Any]) -> None:
    """Dynamo makes a float that differs between two models an input of the graph."""
    x = torch.randn(3, 256)
    for eps in (1e-5, 1.0, 10.0, 1e-5):
        model = Block(nn.LayerNorm(256, eps=eps), nn.Linear(256, 128)).eval()
        wanted = model(x)
        model.compile(backend="atom", options={"scheme": "w4a8"})
        assert relative_error(model(x), wanted) < 0.3
        (norm,) = [
            one for one in compilations[-1].graph.nodes if "norm_quantize" in str(one.target)
        ]
        assert isinstance(norm.args[4], float)
    assert len(compilations) == 3


def test_plain_call_in_eval_mode(compilations: list[Any]) -> None:
    model = block()
    model.compile(backend="atom")
    out = model(torch.randn(3, 256))
    assert not out.requires_grad


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("as_option", [False, True])
def test_modes_reach_inductor(
    mode: str | None, as_option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def compile_graph(gm: Any, example_inputs: Any, **arguments: Any) -> Callable[..., Any]:
        seen.update(arguments["config_patches"])
        return gm.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(compat, "compile_graph", compile_graph)
    model = block()
    model.compile(backend="atom", **({"options": {"mode": mode}} if as_option else {"mode": mode}))
    model(torch.randn(3, 256))
    assert seen.get("triton.cudagraphs", False) is (mode is not None)


class TestErrors:
    def failing(self, model: nn.Module, **options: Any) -> Exception:
        model.compile(backend="atom", options=options or None)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as failure:
            model(torch.randn(2, 256))
        return failure.value.inner_exception

    def test_training_mode(self) -> None:
        error = self.failing(block().train())
        assert isinstance(error, TrainingModeError)
        assert "model.eval()" in str(error)

    def test_unknown_option_names_the_nearest(self) -> None:
        error = self.failing(block(), shceme="w4a4")
        assert isinstance(error, OptionError)
        assert "did you mean 'scheme'" in str(error)

    def test_unknown_mode(self) -> None:
        assert "did you mean 'reduce-overhead'" in str(self.failing(block(), mode="reduce-overhea"))

    def test_unknown_scheme(self) -> None:
        assert "did you mean 'w4a4'" in str(self.failing(block(), scheme="w4a44"))

    def test_nothing_to_rewrite(self) -> None:
        narrow = Block(nn.Linear(256, 8), nn.Linear(8, 8)).eval()
        error = self.failing(Block(nn.Unflatten(1, (4, 64)), nn.Linear(64, 64)).eval())
        assert isinstance(error, NothingRewrittenError)
        assert "fewer than one group of 128" in str(error)
        reasons = [plan.reason for plan in rewrites(narrow, torch.randn(2, 256))[0].planned]
        assert reasons[0] is None
        assert "8 input channels" in str(reasons[1])

    def test_a_failed_rewrite_compiles_the_graph_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch, compilations: list[Any]
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("a broken pass")

        monkeypatch.setattr("atom_compile.passes.pipeline.plan_linears", fail)
        model, x = block(), torch.randn(2, 256)
        wanted = model(x)
        model.compile(backend="atom")
        with pytest.warns(UserWarning, match="a broken pass"):
            torch.testing.assert_close(model(x), wanted)
        assert "broken pass" in str(self.failing(block(), strict=True))

    def test_recipe_of_another_model(self) -> None:
        recipe = atom_compile.calibrate(block(width=384), [torch.randn(4, 384)], progress=False)
        model = block()
        model.compile(backend="atom", options={"recipe": recipe})
        with pytest.raises(atom_compile.AtomError, match="another model"):
            model(torch.randn(2, 256))


class TestThroughInductor:
    """Slow: each compiles for real."""

    @torch.no_grad()
    def test_llama_agrees_with_the_rewritten_graph(self) -> None:
        model, ids = tiny_llama(layers=1), token_batch()
        wanted = reference_output(model, ids, scheme="w4a8")
        model.compile(backend="atom", options={"scheme": "w4a8", "strict": True})
        assert relative_error(model(ids).logits, wanted) < 1e-3

    def test_by_name_in_a_second_process_with_a_warm_cache(self, tmp_path: Path) -> None:
        """And a changed scheme, weights of another process, and a changed kernel source."""
        package = tmp_path / "source"
        shutil.copytree(Path(atom_compile.__file__).parent, package / "atom_compile")
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(package)}

        def run(seed: int, scheme: str) -> tuple[float, float, int]:
            command = [sys.executable, "-c", _PROGRAM, str(seed), scheme]
            environment = os.environ | variables
            done = subprocess.run(
                command, env=environment, cwd=package, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            norm, error, hits = done.stdout.split()
            return float(norm), float(error), int(hits)

        cold, cold_error, cold_hits = run(0, "w4a4")
        warm, _, warm_hits = run(0, "w4a4")
        assert (warm, cold_hits, warm_hits > 0) == (cold, 0, True)
        _, error, hits = run(1, "w4a4")
        assert error < 0.5
        assert hits > 0
        _, error, hits = run(0, "w4a8")
        assert error < cold_error
        assert hits == 0
        source = package / "atom_compile/kernels/linear.py"
        last = "return out if residual is None else out + residual"
        assert last in source.read_text()
        source.write_text(source.read_text().replace(last, "return 2 * out"))
        changed, _, hits = run(0, "w4a4")
        assert changed == pytest.approx(2 * cold, rel=1e-5)
        assert hits == 0


_PROGRAM = """
import sys, torch
from torch import nn
torch.manual_seed(int(sys.argv[1]))
model = nn.Sequential(nn.Linear(256, 128)).eval()
nn.init.normal_(model[0].weight)
assert "atom_compile" not in sys.modules
compiled = torch.compile(model, backend="atom", options={"scheme": sys.argv[2]})
x = torch.randn(2, 256)
from torch._dynamo.utils import counters
with torch.no_grad():
    got, wanted = compiled(x), model(x)
hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print(got.norm().item(), ((got - wanted).norm() / wanted.norm()).item(), hits)
"""


def test_profiled_operators_carry_their_places(compilations: list[Any]) -> None:
    model, ids = tiny_llama(layers=1), token_batch()
    with torch.no_grad():
        plain: Any = torch.compile(model, backend="atom")
        wanted = plain(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="atom", options={"profile": True})
        with torch.profiler.profile() as profile:
            got = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    names = {event.name for event in profile.events()}
    assert "model.layers.0.mlp.down_proj: atom.linear" in names


LOGGING = """if True:
    import torch, atom_compile
    model = torch.nn.Sequential(torch.nn.Linear(256, 256)).eval()
    atom_compile.explain(model, torch.ones(2, 256), options={"include_head": True})
    """


@pytest.mark.parametrize(("setting", "told"), [("atom_compile", False), ("+atom_compile", True)])
def test_torch_logs_shows_passes_and_their_times(setting: str, told: bool) -> None:
    environment = {**os.environ, "TORCH_LOGS": setting}
    done = subprocess.run(
        [sys.executable, "-c", LOGGING],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(re.findall(r"1 of 1 linears rewritten in \d+ ms", done.stderr)) == 1
    passes = re.findall(r"insert_quantization: \d+\.\d ms", done.stderr)
    assert len(passes) == int(told)


def test_functional_weights_are_left_alone() -> None:
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="passed in at run time"):
        torch.compile(product, backend="atom")(torch.randn(2, 256), torch.randn(64, 256))


@torch.no_grad()
def test_hand_written_model_runs(compilations: list[Any]) -> None:
    model, ids = HandWritten().eval(), token_batch()
    wanted = model(ids)
    model.compile(backend="atom", options={"scheme": "w4a8"})
    assert relative_error(model(ids), wanted) < 0.1
