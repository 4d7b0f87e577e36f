"""Models in the formats of others, packed here, load, compute as they are, compile and save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from atom_compile import calibrate, load, quantize, save
from atom_compile.errors import CheckpointError, OptionError
from atom_compile.kernels.block_formats import dequantize_blocks, pack_mxfp4, pack_nvfp4
from atom_compile.quantized_linear import QuantizedLinear
from atom_compile.scheme import Scheme

from .capturing import atom_operators, reference_output, token_batch
from .models import tiny_llama
from .test_cli import MODEL, run
from .test_int4_checkpoints import IN_ORDER, INTERLEAVED, words


class Rounded:
    """A weight (N, K) rounded to nearest on a 4-bit grid, its channels in groups of any order."""

    def __init__(self, weight: Tensor, groups: Tensor, symmetric: bool) -> None:
        self.groups = groups
        count = int(groups.max()) + 1
        member = torch.nn.functional.one_hot(groups, count).bool()  # (K, G)
        spread = torch.where(member, weight[..., None], 0.0)
        least, largest = spread.amin(1), spread.amax(1)
        if symmetric:
            scale = torch.maximum(-least, largest) / 7
            self.zeros = torch.full_like(scale, 8).long()
        else:
            scale = (largest - least) / 15
            self.zeros = (-least / scale).round().long().clamp(1, 15)
        self.scale = scale.half()
        each = self.scale.float()[:, groups]
        self.codes = ((weight / each).round() + self.zeros[:, groups]).long().clamp(0, 15)
        self.weight = (self.codes - self.zeros[:, groups]) * each


def gptq(one: Rounded, zero_offset: int = 1) -> dict[str, Tensor]:
    return {
        "qweight": words(one.codes.tolist(), IN_ORDER).t(),
        "qzeros": words((one.zeros - zero_offset).t().tolist(), IN_ORDER),
        "scales": one.scale.t(),
        "g_idx": one.groups.int(),
    }


def awq(one: Rounded) -> dict[str, Tensor]:
    return {
        "qweight": words(one.codes.t().tolist(), INTERLEAVED),
        "qzeros": words(one.zeros.t().tolist(), INTERLEAVED),
        "scales": one.scale.t(),
    }


def compressed_tensors(one: Rounded) -> dict[str, Tensor]:
    return {
        "weight_packed": words(one.codes.tolist(), IN_ORDER),
        "weight_scale": one.scale,
        "weight_zero_point": words(one.zeros.t().tolist(), IN_ORDER).t(),
        "weight_g_idx": one.groups.int(),
        "weight_shape": torch.tensor(one.codes.shape),
    }


PACKERS: Mapping[str, Any] = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors}


READERS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
ACTIVATIONS = {name: number for number, names in enumerate(READERS) for name in names}


def settings(method: str, group_size: int) -> dict[str, Any]:
    if method != "compressed-tensors":
        return {"quant_method": method, "bits": 4, "group_size": group_size, "version": "gemm"}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
    return {
        "quant_method": method,
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }


def write(
    path: Path,
    method: str,
    group_size: int,
    act_order: bool = False,
    symmetric: bool = False,
    model: Any = None,
    linears: str = "_proj",
) -> Any:
    """Packs some linears of a model, a tiny Llama by default; returns it with what they stand for.

    Those of one activation have one order of channels, as they have for GPTQ.
    """
    model = model or tiny_llama(layers=1, intermediate=256)
    model.save_pretrained(path)
    tied = model.all_tied_weights_keys
    tensors = {name: one for name, one in model.state_dict().items() if name not in tied}
    for name in [name for name in tensors if "_proj" in name and linears in name]:
        weight = tensors.pop(name)
        groups = torch.arange(weight.shape[1]) // group_size
        if act_order:
            activation = ACTIVATIONS[name.split(".")[-2]]
            generator = torch.Generator().manual_seed(activation)
            groups = groups[torch.randperm(len(groups), generator=generator)]
        rounded = Rounded(weight, groups, symmetric)
        for field, tensor in PACKERS[method](rounded).items():
            tensors[name.replace("weight", field)] = tensor.contiguous()
        model.get_parameter(name).data = rounded.weight
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    change_config(path, quantization_config=settings(method, group_size))
    return model


def change_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(path: Path, change: Any) -> None:
    file = path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(token_batch()).logits  # type: ignore[no-any-return]


CASES = [
    (method, group_size, act_order)
    for method in PACKERS
    for group_size in (32, 64, 128)
    for act_order in ((False,) if method == "awq" else (False, True))
]


@pytest.mark.parametrize(("method", "group_size", "act_order"), CASES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_computes_with_the_very_weights(
    method: str, group_size: int, act_order: bool, symmetric: bool, tmp_path: Path
) -> None:
    want = write(tmp_path / "theirs", method, group_size, act_order, symmetric)
    dense = load(tmp_path / "theirs", dequantize=True)
    for name, parameter in want.named_parameters():
        assert torch.equal(dense.get_parameter(name), parameter), name
    model = load(tmp_path / "theirs")
    scheme = model.config.quantization_config.options.scheme
    assert (scheme.group_size, scheme.act_order) == (group_size, act_order)
    assert scheme.symmetric == symmetric and scheme.activation_bits == 16
    packed = [one for one in model.modules() if isinstance(one, QuantizedLinear)]
    assert len(packed) == 7 and packed[0].get_parameter("weight_scale").dtype == torch.float16
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)

    save(model, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.options.scheme == scheme


@pytest.mark.parametrize(
    ("method", "act_order"), [("gptq", True), ("awq", False), ("compressed-tensors", True)]
)
def test_linears_of_one_activation_are_one_product(
    method: str, act_order: bool, tmp_path: Path
) -> None:
    want = write(tmp_path, method, 64, act_order)
    model = load(tmp_path)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight is attention.v_proj.weight
    assert attention.q_proj.order is attention.v_proj.order
    counts = atom_operators(model, token_batch())
    assert counts["atom.weight_only_linear"] == 4 and counts["linear"] == 1, counts
    torch.testing.assert_close(
        reference_output(model, token_batch()), logits(want), rtol=1e-4, atol=1e-5
    )


BLOCKS: Mapping[str, tuple[str, dict[str, str]]] = {
    "nvfp4": ("nvfp4", {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    "mxfp4": ("mxfp4", {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}),
    "modelopt": ("nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


def write_blocks(path: Path, kind: str) -> Any:
    """As `write`, with the linears in blocks of E2M1."""
    format, config = BLOCKS[kind]
    model = tiny_llama(layers=1, intermediate=256)
    model.save_pretrained(path)
    tensors = model.state_dict()
    for name in [name for name in tensors if "_proj" in name]:
        packed = (pack_nvfp4 if format == "nvfp4" else pack_mxfp4)(tensors.pop(name))
        # a power of two divides as it multiplies
        tensor_scale = torch.exp2(packed.tensor_scale.log2().round())
        packed = packed._replace(tensor_scale=tensor_scale)
        fields = {"weight_packed": packed.codes, "weight_scale": packed.block_scale}
        if kind == "modelopt":
            fields |= {"weight": fields.pop("weight_packed"), "weight_scale_2": tensor_scale}
            fields["input_scale"] = torch.ones(())
        elif kind == "nvfp4":
            fields["weight_global_scale"] = tensor_scale.reciprocal().reshape(1)
        else:
            fields["weight_scale"] = packed.block_scale.view(torch.uint8)
        for field, tensor in fields.items():
            tensors[name.replace("weight", field)] = tensor
        model.get_parameter(name).data = dequantize_blocks(packed)
    for field in ("k_scale", "v_scale"):  # of a cache in FP8
        tensors[f"model.layers.0.self_attn.{field}"] = torch.ones(1)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    change_config(path, quantization_config=config)
    return model


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_e2m1(kind: str, tmp_path: Path) -> None:
    want = write_blocks(tmp_path / "theirs", kind)
    dense = load(tmp_path / "theirs", dequantize=True)
    for name, parameter in want.named_parameters():
        assert torch.equal(dense.get_parameter(name), parameter), name
    model = load(tmp_path / "theirs")
    assert model.config.quantization_config.options.scheme == Scheme.of(BLOCKS[kind][0])
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight is attention.v_proj.weight
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)
    counts = atom_operators(model, token_batch())
    assert counts["atom.weight_only_linear"] == 4, counts

    save(model, tmp_path / "ours")
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_it_compiles(tmp_path: Path) -> None:
    want = write(tmp_path, "gptq", 64, act_order=True)
    model = load(tmp_path)
    model.compile(backend="atom")
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)


def test_it_loads_by_a_repository_name(tmp_path: Path) -> None:
    """From the hub's cache, which needs no network."""
    repository = tmp_path / "models--some--model"
    folder = repository / "snapshots" / "1"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    want = write(folder, "gptq", 64)
    source: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    model = load("some/model", **source)
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)
    save(model, tmp_path / "ours")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "ours", folder)
    assert torch.equal(logits(load("some/model", **source)), logits(model))
    with pytest.raises(CheckpointError, match="some/model holds no model of transformers"):
        load("some/model", revision="other", **source)


def test_a_repository_that_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "gptq", 64)
    config = AutoConfig.from_pretrained(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    with pytest.raises(CheckpointError, match="some/model is no directory, and no repository"):
        load("some/model", cache_dir=tmp_path, local_files_only=True)


def test_other_orders_stay_apart(tmp_path: Path) -> None:
    want = write(tmp_path, "gptq", 64, act_order=True)
    name = "model.layers.0.self_attn.k_proj"
    weight = want.get_parameter(f"{name}.weight")
    rounded = Rounded(weight, torch.arange(256) // 64, symmetric=False)
    weight.data = rounded.weight
    fields = {f"{name}.{field}": one.contiguous() for field, one in gptq(rounded).items()}
    change_tensors(tmp_path, lambda tensors: tensors.update(fields))
    model = load(tmp_path)
    groups = model.config.quantization_config.linears
    assert sorted(len(group) for group in groups) == [1, 1, 1, 2, 2]
    assert [name] in groups
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)


def test_mixed_symmetry_and_version_2_and_other_names(tmp_path: Path) -> None:
    """One linear without zero points among others; AutoGPTQ's biases of zeros, its file's name."""
    want = write(tmp_path, "gptq", 64)
    name = "model.layers.0.mlp.down_proj"
    rounded = Rounded(want.get_parameter(f"{name}.weight"), torch.arange(256) // 64, symmetric=True)

    def change(tensors: dict[str, Tensor]) -> None:
        for one in [one for one in tensors if one.endswith("qzeros")]:
            tensors[one] = tensors[one] + 0x11111111  # version 2 keeps zero points as they are
        tensors |= {f"{name}.{field}": one.contiguous() for field, one in gptq(rounded, 0).items()}
        tensors[f"{name}.bias"] = torch.zeros(256)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)

    change_tensors(tmp_path, change)
    quantization = settings("gptq", 64) | {"checkpoint_format": "gptq_v2"}
    change_config(tmp_path, quantization_config=quantization)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-64g.safetensors")
    want.get_parameter(f"{name}.weight").data = rounded.weight
    model = load(tmp_path)
    assert model.model.layers[0].mlp.down_proj.zero_point is not None
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8"])
def test_quantized_anew(scheme: str, tmp_path: Path) -> None:
    write(tmp_path / "theirs", "gptq", 64, act_order=True)
    model = load(tmp_path / "theirs", dequantize=True)
    before = logits(model)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    recipe = calibrate(model, [token_batch()], scheme=scheme, progress=False)
    quantize(model, recipe, progress=False)
    assert 0.0 < float((logits(model) - before).norm() / before.norm()) < 0.5
    save(model, tmp_path / "ours")
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_the_command_line_takes_them(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    # the others stay as they are, the head is tied
    want = write(theirs, "gptq", 64, model=model, linears="layers.0.self_attn.")
    torch.testing.assert_close(
        logits(load(theirs, dtype=torch.float32)), logits(want), rtol=1e-3, atol=1e-3
    )
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(theirs)
    status, output = run("generate", theirs, "--prompt", "The sea", "--tokens", 3)
    assert status == 0 and "The sea" in output, output
    status, output = run("quantize", theirs, ours, "--scheme", "w4a8")
    assert status == 0 and "28 linears packed" in output, output
    status, output = run("generate", ours, "--prompt", "The sea", "--tokens", 3)
    assert status == 0 and "The sea" in output, output


def remove(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("model.norm.weight"), "lacks model.norm.weight"),
        (remove("model.layers.0.mlp.up_proj.qweight"), "lacks model.layers.0.mlp.up_proj.weight"),
        (remove("model.layers.0.mlp.up_proj.scales"), "the checkpoint has no .*up_proj.scales"),
        (put("model.more.weight", 3), "the model does not know model.more.weight"),
        (put("model.layers.0.mlp.up_proj.bias", 256), "does not know .*up_proj.bias"),
        (put("model.norm.weight", 3), r"model.norm.weight is \(3,\) in the checkpoint"),
        (put("model.layers.0.mlp.up_proj.qweight", 3), "up_proj: its tensors are not as its"),
        (put("model.layers.7.mlp.up_proj.qweight", 3), "layers.7.mlp.up_proj quantized"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    change: Any, message: str, dequantize: bool, tmp_path: Path
) -> None:
    write(tmp_path, "gptq", 64)
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, dequantize=dequantize)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "awq", 64)
    change_config(tmp_path, intermediate_size=512)
    with pytest.raises(
        CheckpointError, match=r"down_proj is \(256, 256\) in .*, and \(256, 512\) by"
    ):
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        load(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load(tmp_path)
    index.unlink()
    file.unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        load(tmp_path)


def test_conv1d_in_several_files(tmp_path: Path) -> None:
    """GPT-2 stores its linears' weights as (K, N)."""
    config = GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=96, n_positions=64)
    torch.manual_seed(0)
    want = GPT2LMHeadModel(config).eval()
    want.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = {name: one for name, one in want.state_dict().items() if name != "lm_head.weight"}
    weight = want.transformer.h[0].mlp.c_fc.weight
    rounded = Rounded(weight.detach().t(), torch.arange(128) // 32, symmetric=False)
    weight.data = rounded.weight.t()
    name = "transformer.h.0.mlp.c_fc"
    del tensors[f"{name}.weight"]
    packed = {f"{name}.{field}": one.contiguous() for field, one in gptq(rounded).items()}
    save_file(tensors, tmp_path / "first.safetensors")
    save_file(packed, tmp_path / "second.safetensors")
    files = dict.fromkeys(tensors, "first.safetensors") | dict.fromkeys(
        packed, "second.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    change_config(tmp_path, quantization_config=settings("gptq", 32))
    for dequantize in (False, True):
        model = load(tmp_path, dequantize=dequantize)
        torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)


def test_our_own_are_not_dequantized(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    quantize(model, progress=False)
    save(model, tmp_path / "ours")
    with pytest.raises(OptionError, match="dequantize is for models that others quantized"):
        load(tmp_path / "ours", dequantize=True)
