"""Mixtures of experts: packed, saved, loaded and compiled expert by expert."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from atom_compile import AtomConfig, Recipe, calibrate, explain, load, quantize, save
from atom_compile.errors import CheckpointError, NothingRewrittenError, RecipeError
from atom_compile.experts import ExpertLinears, split_experts
from atom_compile.int4_checkpoints import BlockLinear
from atom_compile.int4_models import _joined
from atom_compile.kernels.block_formats import dequantize_blocks, pack_mxfp4, pack_nvfp4
from atom_compile.kernels.packing import GroupLayout, dequantize_weight
from atom_compile.quantized_linear import QuantizedLinear

from .capturing import rewrites, token_batch
from .test_checkpoint import refuse_without_the_package
from .test_int4_models import PACKERS, Rounded, change_config, change_tensors, logits, settings

COMMON = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 128},
    # transposed weights, biases, gate and up in turns
    "GptOss": {"num_local_experts": 4, "pad_token_id": 0},
}
LINEARS = 4 + 2 * 4  # of attention, and of four experts


def mixture(family: str) -> Any:
    """float32, eval mode, every parameter random."""
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def experts_of(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_linears_of_each_expert_compute_what_the_tensor_of_all_does(family: str) -> None:
    model = mixture(family)
    split = copy.deepcopy(model)
    split_experts(split)
    assert isinstance(experts_of(split), ExpertLinears)
    torch.testing.assert_close(logits(split), logits(model), rtol=1e-5, atol=1e-6)


def test_experts_without_a_gate() -> None:
    config = transformers.NemotronHConfig(
        hidden_size=256, moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    model = nn.Sequential(NemotronHExperts(config).eval())
    config._experts_implementation = "eager"
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    routed = torch.randn(5, 256), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    want = model[0](*routed)
    (split,) = split_experts(model)
    assert [name for name, _ in split.linears.named_children()] == ["0", "1", "2", "3"]
    torch.testing.assert_close(model[0](*routed), want, rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_elsewhere_adds_nothing() -> None:
    model = mixture("Mixtral")
    (split,) = split_experts(model)
    x, weights = torch.randn(5, 256), torch.ones(5, 1)
    nowhere = torch.full((5, 1), len(split.linears))
    assert not split.linears(x, nowhere, weights).any()
    assert split.linears(x[:0], nowhere[:0], weights[:0]).shape == (0, 256)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16", "w6a8"])
def test_experts_are_packed_and_come_back_from_files(
    family: str, scheme: str, tmp_path: Path
) -> None:
    model = mixture(family)
    model.save_pretrained(tmp_path / "plain")
    done = quantize(model, scheme, progress=False)
    assert sum(map(len, done.groups)) == LINEARS
    assert not [name for name in done.left if "experts" in name]
    experts = experts_of(model)
    assert isinstance(experts[3].gate_up, QuantizedLinear)
    assert not list(experts.activation.__self__.parameters())  # the 16-bit weights are gone
    assert not any(buffer.is_meta for buffer in model.buffers())
    want = logits(model)
    save(model, tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), want)
    loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=AtomConfig(scheme)
    )
    assert torch.equal(logits(loading), want)
    assert not any(buffer.is_meta for buffer in loading.buffers())
    loading.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), want)


def test_in_another_precision_and_from_the_disk(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    quantize(model, "w4a16", progress=False)
    save(model, tmp_path / "packed")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    plain = [one for name, one in half.named_parameters() if "proj" not in name]
    assert {one.dtype for one in plain if one.is_floating_point()} == {torch.bfloat16}
    torch.testing.assert_close(logits(half).float(), logits(model), rtol=0.1, atol=0.02)
    places = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed",
        device_map={**places, "model.layers.0": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert torch.equal(logits(offloaded), logits(model))


def divergence(model: Any, wanted: Tensor, text: Tensor) -> float:
    """In nats, from what was wanted of the logits."""
    with torch.no_grad():
        got = model(text).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16", "w6a8"])
def test_calibrated_experts_are_nearer_than_rounded_ones(
    family: str, scheme: str, tmp_path: Path
) -> None:
    model = mixture(family)
    model.save_pretrained(tmp_path / "plain")
    text = torch.randint(96, (8, 48), generator=torch.Generator().manual_seed(0))
    recipe = calibrate(model, text.split(4), scheme=scheme, progress=False).bind(model)
    calibrated = [name for name in recipe.rounded if ".experts." in name]
    assert len(calibrated) == len(recipe.rounded) - 4
    with torch.no_grad():
        wanted = model(text).logits.log_softmax(-1)
    nearest = copy.deepcopy(model)
    quantize(nearest, scheme, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no weight is said to have changed
        done = quantize(model, recipe, progress=False)
    assert sum(map(len, done.groups)) == LINEARS
    assert divergence(model, wanted, text) < 0.7 * divergence(nearest, wanted, text)
    recipe.save(tmp_path / "recipe.safetensors")
    loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=AtomConfig(recipe=tmp_path / "recipe.safetensors"),
    )
    assert torch.equal(logits(loading), logits(model))


def test_experts_that_torch_multiplies_by_an_operator_of_its_own() -> None:
    model = mixture("Mixtral").to(torch.bfloat16)
    recipe = calibrate(model, [token_batch(2, 48)], progress=False, gptq=False)
    assert len([name for name in recipe.shapes if ".experts." in name]) == 8


def test_experts_that_no_token_reached_are_rounded_to_nearest() -> None:
    model = mixture("Mixtral")
    with pytest.warns(UserWarning, match="no token of the batches reached 4 linears"):
        recipe = calibrate(model, [torch.zeros(1, 1, dtype=torch.int64)], progress=False)
    reached = {name for name in recipe.rounded if ".experts." in name}
    assert len(reached) == 4
    assert sum(map(len, quantize(model, recipe, progress=False).groups)) == LINEARS


def test_a_recipe_that_knows_no_experts() -> None:
    model, other = mixture("Qwen3Moe"), mixture("Qwen3Moe")
    recipe = calibrate(model, [token_batch(1, 32)], "w4a16", progress=False, gptq=False)
    known = {name: one for name, one in recipe.shapes.items() if ".experts." not in name}
    diagonals = {name: recipe.hessian_diagonal[name] for name in known}
    quantize(model, Recipe(recipe.scheme, diagonals, known), progress=False)
    quantize(other, "w4a16", progress=False)
    assert torch.equal(logits(model), logits(other))


def test_a_recipe_of_other_experts_is_refused() -> None:
    recipe = calibrate(mixture("Mixtral"), [token_batch(1, 32)], progress=False, gptq=False)
    with pytest.raises(RecipeError, match=r"another model: .*experts\.0\.gate_up\.weight was"):
        recipe.bind(mixture("Qwen3Moe"))


@pytest.mark.parametrize(
    ("skip", "kept", "linears"), [("*.experts.*", True, 4), ("*.down.weight", False, 8)]
)
def test_what_is_skipped_stays_in_its_own_precision(
    family: str, skip: str, kept: bool, linears: int, tmp_path: Path
) -> None:
    model = mixture(family)
    model.save_pretrained(tmp_path / "plain")
    kind = type(experts_of(model))
    done = quantize(model, "w4a16", skip=[skip], progress=False)
    assert sum(map(len, done.groups)) == linears
    assert isinstance(experts_of(model), kind) == kept
    save(model, tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))
    loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=AtomConfig("w4a16", skip=[skip])
    )
    assert torch.equal(logits(loading), logits(model))


def test_experts_alone_do_not_load_without_the_package(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    quantize(model, "w4a16", skip=["*self_attn*"], progress=False)
    save(model, tmp_path)
    refuse_without_the_package(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_a_model_of_which_nothing_is_packed_is_as_it_was() -> None:
    model = mixture("Mixtral")
    kind, want = type(experts_of(model)), logits(model)
    with pytest.raises(NothingRewrittenError):
        quantize(model, skip=["*"], progress=False)
    assert isinstance(experts_of(model), kind) and torch.equal(logits(model), want)


def test_compiled_it_computes_the_same(family: str) -> None:
    model = mixture(family)
    quantize(model, "w4a16", progress=False)
    want = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="atom")
    torch.testing.assert_close(logits(compiled), want, rtol=1e-4, atol=1e-5)


class Routed(nn.Module):
    """A router, a linear of whose outputs only the largest value counts, and a gate."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.router, self.up, self.gate = (nn.Linear(256, rows) for rows in (128, 256, 1))

    def forward(self, x: Tensor) -> Tensor:
        experts = self.choose(F.linear(x, self.router.weight).softmax(-1))
        up: Tensor = self.up(x)
        out: Tensor = self.gate(x) * (up - up.max(-1, keepdim=True).values) + experts
        return out


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores: scores.topk(2).indices.sum(-1, keepdim=True),
        lambda scores: scores.max(-1, keepdim=True)[1],
        lambda scores: scores.argmax(-1, keepdim=True),
    ],
    ids=["topk", "max", "argmax"],
)
def test_the_backend_leaves_what_chooses_experts(choose: Callable[[Tensor], Tensor]) -> None:
    (run,) = rewrites(Routed(choose).eval(), torch.randn(3, 256))
    reasons = {plan.found.name: plan.reason for plan in run.planned}
    assert reasons == {
        "router.weight": "it chooses experts, by the largest of its outputs",
        "up.weight": None,
        "gate.weight": "it has one output: a weight too small to gain by",
    }


def test_explain_lists_experts_in_16_bits() -> None:
    report = explain(mixture("Qwen3Moe"), token_batch())
    left = {layer.name: layer.remarks for layer in report.layers if layer.operator is None}
    remark = "a weight of all experts; atom_compile.quantize packs them"
    assert left["model.layers.0.mlp.experts.gate_up_proj"] == (remark,)
    assert left["model.layers.0.mlp.experts.down_proj"] == (remark,)


def test_quantize_leaves_linears_that_choose_experts() -> None:
    model = nn.Module()
    model.scores, model.gate = nn.Linear(256, 8), nn.Module()
    model.gate.linear = nn.Linear(256, 8)
    model.shared, model.experts = nn.Module(), nn.ModuleList([nn.Linear(256, 256)])
    model.shared.up = nn.Linear(256, 256)
    done = quantize(model.eval(), progress=False)
    assert done.groups == (("shared.up",), ("experts.0",))
    reason = "it is beside experts, and chooses among them"
    assert done.left == {"scores.weight": reason, "gate.linear.weight": reason}


NAMES = {"Mixtral": ("w1", "w3", "w2"), "Qwen3Moe": ("gate_proj", "up_proj", "down_proj")}


def write_theirs(path: Path, family: str, method: str, act_order: bool, symmetric: bool) -> Any:
    """A mixture in another's format, as its authors name tensors; what its weights stand for."""
    gate, up, down = NAMES[family]
    model = mixture(family)
    model.save_pretrained(path)
    split_experts(model)
    tensors = {}
    for name, parameter in model.named_parameters():
        is_packed = ".experts." in name or ("self_attn" in name and "_proj" in name)
        if not is_packed:
            tensors[name] = parameter.data
            continue
        groups = torch.arange(parameter.shape[1]) // 64
        if act_order:
            generator = torch.Generator().manual_seed(len(groups))
            groups = groups[torch.randperm(len(groups), generator=generator)]
        base = name.removesuffix(".weight")
        its = {base: parameter.data}
        if base.endswith("gate_up"):
            halves = parameter.data.chunk(2)
            its = {
                base.replace("gate_up", one): w for one, w in zip((gate, up), halves, strict=True)
            }
        elif base.endswith(".down"):
            its = {base.replace(".down", f".{down}"): parameter.data}
        rounded = {one: Rounded(weight, groups, symmetric) for one, weight in its.items()}
        parameter.data = torch.cat([one.weight for one in rounded.values()])
        for linear, one in rounded.items():
            fields = PACKERS[method](one)
            tensors |= {f"{linear}.{field}": tensor for field, tensor in fields.items()}
    if family == "Mixtral":
        tensors = {name.replace(".mlp.", ".block_sparse_moe."): t for name, t in tensors.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    change_config(path, quantization_config=settings(method, 64))
    return model


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    ("method", "act_order", "symmetric"),
    [("gptq", True, False), ("awq", False, False), ("compressed-tensors", True, True)],
)
def test_checkpoints_of_others(
    family: str, method: str, act_order: bool, symmetric: bool, tmp_path: Path
) -> None:
    want = write_theirs(tmp_path / "theirs", family, method, act_order, symmetric)
    model = load(tmp_path / "theirs")
    assert isinstance(experts_of(model)[0].gate_up, QuantizedLinear)
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)
    save(model, tmp_path / "ours")
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))
    dense = load(tmp_path / "theirs", dequantize=True)
    assert not isinstance(experts_of(dense), ExpertLinears)
    torch.testing.assert_close(logits(dense), logits(want), rtol=1e-4, atol=1e-5)


def test_an_expert_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    write_theirs(tmp_path, "Qwen3Moe", "awq", False, False)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "experts.2.up_proj" in name]:
            del tensors[name]

    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"does not have .*experts\.2\.up_proj quantized"):
        load(tmp_path)


def test_gate_and_up_in_different_orders_are_refused(tmp_path: Path) -> None:
    write_theirs(tmp_path, "Qwen3Moe", "gptq", True, False)

    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.experts.1.up_proj.g_idx"
        tensors[name] = tensors[name].flip(0)

    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"experts\.1\.gate_up: .* different orders"):
        load(tmp_path)


@pytest.mark.parametrize("dequantize", [False, True])
def test_gpt_oss_as_it_is_published(dequantize: bool, tmp_path: Path) -> None:
    want = mixture("GptOss")
    want.save_pretrained(tmp_path)
    tensors = dict(want.state_dict())
    experts = experts_of(want)
    for name in ("gate_up_proj", "down_proj"):
        stack = experts.get_parameter(name)
        packed = [pack_mxfp4(weight.t().contiguous()) for weight in stack]
        prefix = f"model.layers.0.mlp.experts.{name}"
        del tensors[prefix]
        blocks = torch.stack([one.codes for one in packed])
        tensors[f"{prefix}_blocks"] = blocks.unflatten(2, (-1, 16))
        scales = torch.stack([one.block_scale.view(torch.uint8) for one in packed])
        tensors[f"{prefix}_scales"] = scales
        theirs = tensors[f"{prefix}_blocks"], scales
        stack.data = convert_moe_packed_tensors(*theirs, dtype=torch.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    model = load(tmp_path, dequantize=dequantize)
    assert isinstance(experts_of(model), ExpertLinears) != dequantize
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)


def test_gate_and_up_in_blocks_with_scales_of_their_own() -> None:
    weights = [pack_nvfp4(torch.randn(64, 128) * size) for size in (1, 50)]
    joined, order = _joined("experts.0.gate_up", [BlockLinear(w, None, "nvfp4") for w in weights])
    dense = dequantize_weight(joined, GroupLayout(128, 32, 0), "nvfp4")
    assert order is None
    assert torch.equal(dense, torch.cat([dequantize_blocks(one) for one in weights]))
