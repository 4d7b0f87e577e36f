"""What is saved loads bit for bit, and what is not what was saved is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    pipeline,
)

import atom_compile
from atom_compile import AtomConfig, Recipe, calibrate, load, quantize, save
from atom_compile.errors import CheckpointError, OptionError, RecipeError
from atom_compile.packer import pack_group
from atom_compile.quantized_linear import QuantizedLinear
from atom_compile.scheme import Scheme

from .capturing import SCHEMES_OF_EVERY_KIND, token_batch
from .models import tiny_llama
from .test_device_loading import load_as_onto_a_gpu

Q_PROJ = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits  # type: ignore[no-any-return]


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit checkpoint."""
    path = tmp_path_factory.mktemp("plain") / "model"
    tiny_llama().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(plain: Path) -> tuple[Path, Tensor]:
    """A packed checkpoint in several files, and its logits on `token_batch()`."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    quantize(model, progress=False)
    path = plain.parent / "packed"
    save(model, path, max_shard_size="200KB")
    return path, logits(model, token_batch())


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def test_a_fresh_process_computes_the_same_bits(packed: tuple[Path, Tensor]) -> None:
    path, want = packed
    assert len(shards(path)) > 2
    assert not [file for file in path.iterdir() if file.suffix not in (".json", ".safetensors")]
    program = f"""if True:
        import torch
        from safetensors.torch import save_file
        import atom_compile
        from transformers import AutoModelForCausalLM
        generator = torch.Generator().manual_seed(12)
        ids = torch.randint(0, 96, (2, 12), generator=generator)
        for number, model in enumerate((
            AutoModelForCausalLM.from_pretrained({str(path)!r}), atom_compile.load({str(path)!r})
        )):
            with torch.no_grad():
                save_file({{"logits": model(ids).logits}}, {str(path.parent)!r} + f"/{{number}}")
        """
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    for number in range(2):
        with safe_open(path.parent / str(number), framework="pt") as file:
            assert torch.equal(file.get_tensor("logits"), want)


def test_loaded_linears_hold_one_weight(packed: tuple[Path, Tensor]) -> None:
    model = load(packed[0])
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.weight is attention.k_proj.weight
    assert attention.q_proj.order is attention.v_proj.order
    assert not any(one.requires_grad for one in attention.parameters())
    assert model.is_quantized and model.quantization_method == "atom_compile"


def test_saved_again_it_is_the_same(packed: tuple[Path, Tensor], tmp_path: Path) -> None:
    path, want = packed
    model = load(path)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    for file in shards(path):  # metadata are in no order
        with safe_open(file, "pt") as old, safe_open(tmp_path / file.name, "pt") as new:
            assert old.metadata() == new.metadata()
            assert list(old.keys()) == list(new.keys())
    assert torch.equal(logits(load(tmp_path), token_batch()), want)


def test_files_hold_no_padding(packed: tuple[Path, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    for file in shards(packed[0]):
        tensors |= load_file(file)
    loaded = load(packed[0]).model.layers[0]
    for name, linear, width, outliers in (
        ("self_attn.q_proj", loaded.self_attn.q_proj, 256, 32),
        ("mlp.down_proj", loaded.mlp.down_proj, 352, 48),
    ):
        weight, order = (tensors[f"model.layers.0.{name}.{one}"] for one in ("weight", "order"))
        assert weight.shape == (256, (width - outliers) // 2)
        assert order.dtype == (torch.uint8 if width == 256 else torch.int16)
        assert linear.packed.weight.shape == (-(-(width - outliers) // 128), 256, 64)
        assert linear.order.dtype == torch.int32


def test_files_of_the_first_format_load(
    packed: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_in_memory(self: QuantizedLinear, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {name: one for name, one in tensors.items() if one is not None}

    path, want = packed
    model = load(path)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedLinear, "stored", as_in_memory)
        for module in ("checkpoint", "transformers_config"):
            patch.setattr(f"atom_compile.{module}.FORMAT_VERSION", 1)
        model.save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")
    assert model.hf_quantizer.quantization_config.format_version == 1
    assert torch.equal(logits(model, token_batch()), want)
    model.save_pretrained(tmp_path / "second")
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 2
    assert torch.equal(logits(load(tmp_path / "second"), token_batch()), want)


@pytest.mark.parametrize("scheme", SCHEMES_OF_EVERY_KIND)
def test_it_packs_while_it_loads(
    scheme: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_batch()
    wanted = AutoModelForCausalLM.from_pretrained(plain)
    quantize(wanted, scheme, progress=False)
    waiting: list[int] = []

    def counting(linears: Any, options: Any) -> Any:
        if not next(iter(linears.values())).weight.is_meta:
            waiting.append(len(linears))
        return pack_group(linears, options)

    monkeypatch.setattr("atom_compile.transformers_quantizer.pack_group", counting)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=AtomConfig(scheme))
    assert sorted(waiting) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert torch.equal(logits(model, ids), logits(wanted, ids))
    assert not [one for one in model.parameters() if one.is_meta]
    save(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert torch.equal(logits(loaded, ids), logits(wanted, ids))
    assert loaded.config.quantization_config.options.scheme == Scheme.of(scheme)


def test_a_recipe_is_remembered_by_its_digest(plain: Path, tmp_path: Path) -> None:
    ids = token_batch()
    model = AutoModelForCausalLM.from_pretrained(plain)
    recipe = calibrate(model, [token_batch(2, 40)], Scheme(int8_share=0.5), progress=False)
    recipe.save(tmp_path / "recipe.safetensors")
    quantize(model, recipe, progress=False)
    save(model, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["recipe"] == recipe.digest == Recipe.load(tmp_path / "recipe.safetensors").digest
    assert config["choices"]
    assert torch.equal(logits(load(tmp_path / "packed"), ids), logits(model, ids))
    by_path = AtomConfig(recipe=tmp_path / "recipe.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(plain, quantization_config=by_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    tiny_llama(intermediate=384).save_pretrained(tmp_path / "narrow")
    with pytest.raises(RecipeError, match="of another model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", quantization_config=by_path)


def test_other_precisions(packed: tuple[Path, Tensor]) -> None:
    path, want = packed
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.weight_scale.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32
    got = logits(model, token_batch())
    assert float((got - want.float()).norm() / want.float().norm()) < 0.3


def test_biases_and_transposed_weights(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=96, n_positions=64)
    model, ids = GPT2LMHeadModel(config).eval(), token_batch()
    model.save_pretrained(tmp_path / "plain")
    quantize(model, progress=False)
    save(model, tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed"), ids), logits(model, ids))
    loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=AtomConfig()
    )
    assert torch.equal(logits(loading, ids), logits(model, ids))


def test_a_model_whose_files_name_its_tensors_otherwise(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=2,
    )
    torch.manual_seed(0)
    model, ids = MixtralForCausalLM(config).eval(), token_batch()
    done = quantize(model, progress=False)
    assert any("experts" in name for group in done.groups for name in group)
    save(model, tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed"), ids), logits(model, ids))


def test_generate_and_pipelines(packed: tuple[Path, Tensor]) -> None:
    model = load(packed[0])
    prompt = token_batch(1, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(prompt, **options)
    assert tokens.shape == (1, 9)
    cache = atom_compile.KVCache(model.config, 1, 16, "kv16")
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), tokens)


def test_a_pipeline_loads_it(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "prose-llama-5m"
    tokenizer = AutoTokenizer.from_pretrained(example)
    model = AutoModelForCausalLM.from_pretrained(example)
    quantize(model, progress=False)
    save(model, tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    generate = pipeline("text-generation", model=str(tmp_path / "packed"))
    assert isinstance(generate.model.model.layers[0].mlp.up_proj, QuantizedLinear)
    (written,) = generate("The sea", max_new_tokens=4, do_sample=False)
    assert written["generated_text"].startswith("The sea")


def test_without_the_package_loading_fails_loudly(packed: tuple[Path, Tensor]) -> None:
    refuse_without_the_package(packed[0])


def refuse_without_the_package(path: Path) -> None:
    program = f"""if True:
        import sys
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained({str(path)!r})
        except RuntimeError as error:
            print("refused:", error)
        assert "atom_compile" not in sys.modules
        """
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:")
    assert "got atom_compile" in done.stderr  # the name of what to import
    assert "MISMATCH" in done.stderr


Damage = Callable[[Path], None]


def edit_config(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config["quantization_config"])
        (path / "config.json").write_text(json.dumps(config))

    return damage


def edit_tensors(change: Callable[[dict[str, Tensor]], None]) -> Damage:
    """Rewrites the first file, its metadata as they were."""

    def damage(path: Path) -> None:
        file = shards(path)[0]
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        change(tensors)
        save_file(tensors, file, metadata=metadata)

    return damage


def edit_metadata(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(path: Path) -> None:
        file = shards(path)[0]
        with safe_open(file, framework="pt") as opened:
            record = json.loads(opened.metadata()["atom_compile"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        change(record)
        save_file(tensors, file, metadata={"format": "pt", "atom_compile": json.dumps(record)})

    return damage


def truncate(path: Path) -> None:
    file = shards(path)[0]
    file.write_bytes(file.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    file = shards(path)[0]
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(content)


def lose_a_file(path: Path) -> None:
    shards(path)[1].unlink()


def take_a_file_of_another_model(path: Path) -> None:
    other = tiny_llama(seed=5).to(torch.bfloat16)
    quantize(other, progress=False)
    other.save_pretrained(path.parent / "other", max_shard_size="200KB")
    file = shards(path)[0]
    file.write_bytes((path.parent / "other" / file.name).read_bytes())


def take_a_plain_file(path: Path) -> None:
    file = shards(path)[0]
    save_file({"model.norm.weight": torch.ones(256)}, file, metadata={"format": "pt"})


def take_another_configuration(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["intermediate_size"] = 384
    (path / "config.json").write_text(json.dumps(config))


def remove_linears(config: dict[str, Any]) -> None:
    del config["linears"]


def group_wrongly(config: dict[str, Any]) -> None:
    first, second, *others = config["linears"]
    config["linears"] = [first + second, *others]


CHOICE = {Q_PROJ: {"activation_clip": 0.9, "int8_groups": 1}}
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a file cut short": (truncate, r"model-00001-of-0000\d.safetensors is damaged or cut short"),
    "a file missing": (lose_a_file, "model-00002-of-0000.*is missing"),
    "a bit flipped": (flip_a_bit, "is not what was saved: the checkpoint is damaged"),
    "a newer format": (
        edit_config(lambda config: config.update(format_version=3)),
        "config.json is of format 3; this version of atom_compile reads up to 2",
    ),
    "a newer format of a file": (
        edit_metadata(lambda record: record.update(format_version=3)),
        "safetensors is of format 3; this version",
    ),
    "the format of another version": (
        edit_config(lambda config: config.update(format_version=1)),
        r"\(\d+, \d+\) in the checkpoint, and \(\d+, \d+, 64\) by its config.json",
    ),
    "a tensor missing": (
        edit_tensors(lambda tensors: tensors.__delitem__(min(tensors))),
        "the files lack .*incomplete",
    ),
    "a tensor too many": (
        edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))),
        "the files hold, beside what was saved, extra",
    ),
    "a file of another model": (take_a_file_of_another_model, "is of another checkpoint"),
    "a file that is not packed": (take_a_plain_file, "was not saved by atom_compile"),
    "another model's config.json": (
        take_another_configuration,
        "the files are of another model, scheme or group size",
    ),
    "another group size": (
        edit_config(lambda config: config["scheme"].update(group_size=64)),
        "group_size is 64 in config.json and 128 in model-00001",
    ),
    "another scheme": (
        edit_config(lambda config: config["scheme"].update(two_level=True, activation_bits=8)),
        "the checkpoint lacks .*group_scale|activation_bits is 8 in config.json and 4 in",
    ),
    "a scheme that there is not": (
        edit_config(lambda config: config["scheme"].update(group_size=100)),
        "group_size is 100; it must be one of",
    ),
    "linears that the model lacks": (
        edit_config(lambda config: config["linears"].append(["model.layers.9.mlp.up_proj"])),
        "model.layers.9.mlp.up_proj is packed, and the model has no such linear",
    ),
    "linears grouped wrongly": (
        edit_config(group_wrongly),
        "linears is one thing in config.json and another in model-00001",
    ),
    "no list of linears": (edit_config(remove_linears), "but not which linears"),
    "another clip": (
        edit_config(lambda config: config["scheme"].update(activation_clip=0.5)),
        "activation_clip is 0.5 in config.json and 0.85 in model-00001",
    ),
    "a choice of another recipe": (
        edit_config(lambda config: config["choices"].update(CHOICE)),
        "choices is one thing in config.json and another",
    ),
    "a field of a later version": (
        edit_config(lambda config: config["scheme"].update(shape="round")),
        "fields that this version of atom_compile does not know: shape",
    ),
    "metadata of another kind": (
        edit_metadata(lambda record: record.update(tensors=[])),
        "the metadata of .* is damaged",
    ),
    "metadata that were changed": (
        edit_metadata(lambda record: record["tensors"].pop("lm_head.weight")),
        "the metadata of .* is damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(name: str, packed: tuple[Path, Tensor], tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    path = tmp_path / "packed"
    path.mkdir()
    for file in packed[0].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    damage(path)
    expected: Any = OptionError if "there is not" in name else CheckpointError
    for loading in (load, AutoModelForCausalLM.from_pretrained, load_as_onto_a_gpu):
        with pytest.raises(expected, match=message):
            loading(path)


def test_what_is_no_packed_model(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no packed model"):
        load(plain)
    with pytest.raises(CheckpointError, match="holds no model of transformers"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"call atom_compile.quantize\(model\) first"):
        save(tiny_llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = tiny_llama(layers=1)
    quantize(model, progress=False)
    (tmp_path / "precious").write_text("text")
    for path, message in ((tmp_path, "holds other files"), (tmp_path / "precious", "is a file")):
        with pytest.raises(CheckpointError, match=message):
            save(model, path)
    with pytest.raises(CheckpointError, match="holds other files"):
        save(model, plain)
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    save(model, tmp_path / "empty")
    assert (tmp_path / "precious").read_text() == "text"


def test_an_interrupted_save_leaves_what_was_there(
    packed: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(packed[0])
    save(model, tmp_path / "packed")
    before = {file.name: file.read_bytes() for file in (tmp_path / "packed").iterdir()}
    written: list[Any] = []

    def full_disk(tensors: Any, file: Any, metadata: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(file)
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path / "packed", max_shard_size="200KB")
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path / "new")
    assert {file.name for file in tmp_path.iterdir()} == {"packed"}
    assert {one.name: one.read_bytes() for one in (tmp_path / "packed").iterdir()} == before
    with pytest.raises(OSError, match="No space left"):  # transformers' own leaves a part
        model.save_pretrained(tmp_path / "part")
    with pytest.raises((CheckpointError, OSError)):
        load(tmp_path / "part")


def test_a_16_bit_weight_that_is_missing(plain: Path, tmp_path: Path) -> None:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with safe_open(shards(plain)[0], framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del tensors[f"{Q_PROJ}.weight"]
    save_file(tensors, shards(tmp_path)[0], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the 16-bit checkpoint lacks {Q_PROJ}.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=AtomConfig())


def test_what_is_left_alone_stays(plain: Path) -> None:
    config = AtomConfig(skip=["*.o_proj.weight"])
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    linears = {name for name, one in model.named_modules() if isinstance(one, QuantizedLinear)}
    assert Q_PROJ in linears
    assert not [name for name in linears if "o_proj" in name or "lm_head" in name]


ON_CPU = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
DEVICE_MAPS: dict[str, Any] = {
    "cpu": "cpu",
    "auto": "auto",
    "all on the CPU": {"": "cpu"},
    "a layer on disk": {**dict.fromkeys(ON_CPU, "cpu"), "model.layers.1": "disk"},
    "all on disk": {"": "disk"},
}


@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_device_maps(packed: tuple[Path, Tensor], tmp_path: Path, name: str) -> None:
    pytest.importorskip("accelerate")
    path, want = packed
    options: dict[str, Any] = {"device_map": DEVICE_MAPS[name]}
    if "disk" in name:
        options["offload_folder"] = tmp_path / "offloaded"
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta is ("disk" in name)
    assert torch.equal(logits(model, token_batch()).cpu(), want)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), token_batch()), want)


@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_device_maps_of_what_is_packed_while_it_loads(
    plain: Path, packed: tuple[Path, Tensor], name: str
) -> None:
    pytest.importorskip("accelerate")
    options: dict[str, Any] = {"device_map": DEVICE_MAPS[name], "quantization_config": AtomConfig()}
    if "disk" in name:
        with pytest.raises(OptionError, match=r"device_map offloads to .*disk, which a model"):
            AutoModelForCausalLM.from_pretrained(plain, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(plain, **options)
        assert torch.equal(logits(model, token_batch()).cpu(), packed[1])


def test_tensor_parallel_loading_is_refused(packed: tuple[Path, Tensor]) -> None:
    model = tiny_llama()
    model.config.distributed_config = object()
    quantizer = load(packed[0]).hf_quantizer
    with pytest.raises(OptionError, match="use device_map"):
        quantizer.preprocess_model(model)


def test_wrong_configurations() -> None:
    with pytest.raises(OptionError, match="unknown scheme 'w4a5'"):
        AtomConfig("w4a5")
    with pytest.raises(RecipeError, match="is no file"):
        AtomConfig(recipe="absent.safetensors")
    with pytest.raises(OptionError, match="skip"):
        AtomConfig(skip="*.o_proj.weight")
