"""What a packed checkpoint says about itself, and how a damaged one is told from a sound one.

Every safetensors file of a checkpoint carries the same metadata under `atom_compile`, in JSON:

    format_version   of this module; newer ones are refused, and in 1 all was as it is in memory
    scheme           the fields of the `Scheme`, and the other `SETTINGS` of config.json
    recipe           the recipe's digest, or null
    linears, choices which linears are packed, and what calibration chose for some of them
    model            digest of the names, dtypes and shapes of all tensors
    content          digest of all of `tensors`: in config.json too, which ties the files together
    tensors          name -> [dtype, shape, content hash], of every tensor of every file

Nothing is pickled: safetensors and JSON are all there is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .content import named_hashes
from .errors import CheckpointError
from .scheme import Scheme

FORMAT_VERSION = 2
METADATA_KEY = "atom_compile"
SETTINGS = ("scheme", "recipe", "linears", "choices")
"""What config.json and each file must agree on."""
_TENSORS_NAMED = 3  # at most, in a message


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint: name -> (dtype, shape, content hash)."""

    tensors: Mapping[str, tuple[str, tuple[int, ...], str]]

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor]) -> Contents:
        return cls.arriving([state_dict])

    @classmethod
    def arriving(cls, batches: Iterable[Mapping[str, Tensor]]) -> Contents:
        """Of tensors by name that come in batches, each of which is hashed when it comes."""
        layout: dict[str, tuple[str, tuple[int, ...], str]] = {}

        def noted() -> Iterator[Mapping[str, Tensor]]:
            for batch in batches:
                layout.update(cls.without_hashes(batch).tensors)
                yield batch

        hashes = named_hashes(noted())
        return cls({name: (*layout[name][:2], hashes[name]) for name in sorted(layout)})

    @classmethod
    def without_hashes(cls, state_dict: Mapping[str, Tensor]) -> Contents:
        """For `check_layout` alone."""
        return cls({name: (_dtype(one), tuple(one.shape), "") for name, one in state_dict.items()})

    @property
    def model(self) -> str:
        return _digest([[name, *one[:2]] for name, one in self.tensors.items()])

    @property
    def content(self) -> str:
        return _digest([[name, *one] for name, one in self.tensors.items()])

    def metadata(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """What every file carries. settings: those of config.json."""
        record = {
            "format_version": FORMAT_VERSION,
            **{name: settings[name] for name in SETTINGS},
            "model": self.model,
            "content": self.content,
            "tensors": self.tensors,
        }
        return {METADATA_KEY: json.dumps(record)}

    def check_layout(self, expected: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError unless it holds the tensors that the model expects, as it does.

        Of plain weights only the shape counts: they may be loaded in another precision.
        """
        _refuse_missing("the checkpoint lacks", expected.keys() - self.tensors.keys())
        _refuse_missing("the model does not know", self.tensors.keys() - expected.keys())
        forms = {one: (_dtype(one), tuple(one.shape)) for one in set(expected.values())}
        for name, one in expected.items():
            dtype, shape, _ = self.tensors[name]
            wanted_dtype, wanted_shape = forms[one]
            if tuple(shape) != wanted_shape:
                raise CheckpointError(
                    f"{name} is {tuple(shape)} in the checkpoint, and {wanted_shape} by its "
                    "config.json: the files are of another model, scheme or group size"
                )
            if dtype != wanted_dtype and not one.is_floating_point():
                raise CheckpointError(f"{name} is {dtype} in the checkpoint, not {wanted_dtype}")

    def check_tensors(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Raises CheckpointError unless each tensor is what was saved under its name."""
        for name, loaded in Contents.arriving(batches).tensors.items():
            if loaded != self.tensors[name]:
                raise CheckpointError(
                    f"{name} is not what was saved: the checkpoint is damaged. Copy or save it "
                    "again."
                )

    def dtype(self, name: str) -> str:
        return self.tensors[name][0]


def read_contents(
    files: Sequence[str | Path], settings: Mapping[str, Any], names: bool = True
) -> Contents:
    """What the files of a checkpoint say they hold together, each opened and its header read.

    settings: what config.json says. names: whether the files' tensors must be those that were
    saved, by name. Raises CheckpointError for files that are damaged, incomplete, of a newer format
    or of another checkpoint.
    """
    contents: Contents | None = None
    read: str | None = None
    held: set[str] = set()
    for file in files:
        name = Path(file).name
        with open_file(file) as opened:
            metadata = opened.metadata() or {}
            held |= set(opened.keys())
        if METADATA_KEY not in metadata:
            raise CheckpointError(f"{name} was not saved by atom_compile: it has no {METADATA_KEY}")
        if metadata[METADATA_KEY] != read:  # as a rule each file says the same
            read = metadata[METADATA_KEY]
            contents = _read_record(name, read, settings)
    if contents is None:
        raise CheckpointError("the checkpoint has no files")
    if names:
        _refuse_missing("the files lack", contents.tensors.keys() - held)
        _refuse_missing("the files hold, beside what was saved,", held - contents.tensors.keys())
    return contents


def recorded_names(file: str | Path) -> set[str]:
    """The tensors of the whole checkpoint, as the model names them; none if no record is sound."""
    with open_file(file) as opened:
        metadata = opened.metadata() or {}
    try:
        return set(json.loads(metadata[METADATA_KEY])["tensors"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return set()


def open_file(file: str | Path) -> Any:
    """`safe_open`, which checks that the header covers the file; CheckpointError by its name."""
    name = Path(file).name
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing: the checkpoint is incomplete") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{name} is damaged or cut short ({error}): copy or save it again"
        ) from error


def _read_record(name: str, written: str, settings: Mapping[str, Any]) -> Contents:
    try:
        record = json.loads(written)
        check_version(record["format_version"], name)
        contents = Contents(
            {
                one: (dtype, tuple(shape), digest)
                for one, (dtype, shape, digest) in record["tensors"].items()
            }
        )
        known = {setting: record[setting] for setting in ("content", *SETTINGS)}
        known["scheme"] = asdict(Scheme(**known["scheme"]))  # with fields that came later
        damaged = contents.content != known["content"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        damaged = True
    if damaged:
        raise CheckpointError(f"the metadata of {name} is damaged: copy or save it again")
    for setting in SETTINGS:
        if known[setting] != settings[setting]:
            raise CheckpointError(
                f"{_difference(setting, settings[setting], known[setting], name)}: config.json was "
                "changed, or the file is of another checkpoint"
            )
    if known["content"] != settings["content"]:
        raise CheckpointError(
            f"{name} is of another checkpoint than config.json: their contents differ"
        )
    return contents


def _difference(setting: str, in_config: Any, in_file: Any, file: str) -> str:
    """`group_size is 64 in config.json and 128 in model.safetensors`"""
    if setting == "scheme" and in_config.keys() == in_file.keys():
        setting = next(name for name, value in in_config.items() if value != in_file[name])
        in_config, in_file = in_config[setting], in_file[setting]
    if isinstance(in_config, list | dict):
        return f"{setting} is one thing in config.json and another in {file}"
    return f"{setting} is {in_config} in config.json and {in_file} in {file}"


def check_version(version: Any, where: str) -> None:
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{where} is of format {version}; this version of atom_compile reads up to "
            f"{FORMAT_VERSION}. Upgrade atom_compile."
        )


def _refuse_missing(what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:_TENSORS_NAMED])
        more = f" and {len(names) - _TENSORS_NAMED} more" if len(names) > _TENSORS_NAMED else ""
        raise CheckpointError(
            f"{what} {shown}{more}: the checkpoint is of another model, or incomplete"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
