"""What threads read is what one reads, and damage has a name."""

from __future__ import annotations

import copy
import os
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from atom_compile.device_files import DeviceFiles
from atom_compile.errors import CheckpointError

CPU = torch.device("cpu")


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return alike and torch.equal(*bits)


def random_tensors(dtypes: list[torch.dtype], shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    tensors = {}
    for number, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True)):
        count = torch.Size(shape).numel() * dtype.itemsize
        values = torch.randint(2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
        tensors[f"{number}"] = values.view(dtype).view(shape)
    return tensors


DTYPES = [torch.bool, torch.uint8, torch.int32, torch.bfloat16, torch.float32, torch.float8_e4m3fn]
TENSORS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=3).map(tuple)),
    max_size=40,
)


LIMITS = st.fixed_dictionaries(
    {
        "_PIECE": st.integers(1, 300) | st.just(2**25),
        "_SMALL": st.integers(0, 100) | st.just(2**21),
        "_PATIENCE": st.sampled_from([0.0, 2.0]),
    }
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(TENSORS, TENSORS, LIMITS)
def test_it_reads_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, first: Any, second: Any, limits: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    wanted: dict[str, Tensor] = {}
    for name, tensors in (("a", first), ("b", second)):
        held = random_tensors([one[0] for one in tensors], [one[1] for one in tensors])
        save_file({f"{name}{one}": tensor for one, tensor in held.items()}, folder / name)
        wanted |= load_file(folder / name)
    arrived: dict[str, Tensor] = {}
    with (
        mock.patch.multiple("atom_compile.device_files", **limits),
        DeviceFiles([folder / "a", folder / "b"], CPU) as reading,
    ):
        assert sorted(reading.names) == sorted(wanted)
        tensors = reading.tensors
        for batch in reading.arrive():
            assert not batch.keys() & arrived.keys()
            assert all(same_bits(wanted[name], tensor) for name, tensor in batch.items())
            arrived |= batch
        assert tensors is reading.tensors is reading.wait()
    assert tensors.keys() == arrived.keys() == wanted.keys()
    assert all(tensors[name] is tensor for name, tensor in arrived.items())
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in tensors.values())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"one": torch.arange(5000), "two": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def read(*files: Path) -> None:
    with DeviceFiles(files, CPU) as reading:
        reading.wait()


def test_damage_has_a_name(file: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(CheckpointError, match=r"absent.safetensors is missing"):
        read(file, tmp_path / "absent.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
        read(file)
    file.write_bytes(whole.replace(b'"I64"', b'"F4" '))
    with pytest.raises(CheckpointError):
        read(file)
    assert threading.active_count() == before


def test_a_file_that_is_cut_short_meanwhile_has_a_name(file: Path) -> None:
    with DeviceFiles([file], CPU) as reading:
        os.truncate(file, 1000)
        with pytest.raises(CheckpointError, match=r"model.safetensors was cut short while"):
            reading.wait()


def test_left_early_its_threads_have_ended(file: Path) -> None:
    before, interval = threading.active_count(), sys.getswitchinterval()
    with DeviceFiles([file], CPU) as reading:
        assert copy.deepcopy({"reading": reading})["reading"] is reading
        assert threading.active_count() > before
    assert threading.active_count() == before
    assert sys.getswitchinterval() == interval
