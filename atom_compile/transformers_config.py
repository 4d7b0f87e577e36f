"""`quantization_config`: what `from_pretrained` takes, and what config.json keeps.

Importing this module registers the method `atom_compile` with transformers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import FORMAT_VERSION, Contents, check_version
from .device_files import DeviceFiles
from .errors import CheckpointError
from .options import Options
from .quantized_linear import QuantizedLinear
from .recipe import Recipe
from .scheme import Scheme

# the name that transformers prints where the package was not imported
METHOD = "atom_compile"
_SCHEME_FIELDS = {field.name for field in dataclasses.fields(Scheme)}


@register_quantization_config(METHOD)
class AtomConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained(..., quantization_config=...)` takes, and config.json keeps.

    scheme: a `Scheme` or a preset's name; the recipe's own by default, `w4a4` without a recipe.
    recipe: a `Recipe`, or the path of one. Only its digest is kept.
    include_head, skip: as among the backend's options.

    The other fields are a saved model's: the names of its quantized linears, those that read one
    activation together; what calibration chose for some of them; the digests of checkpoint.py. Of
    packed tensors that are handed over, and in no file, `contents` says what they are; `reading` is
    where those come from that are being read already.
    """

    def __init__(
        self,
        scheme: str | Scheme | Mapping[str, Any] | None = None,
        recipe: Recipe | str | Path | None = None,
        include_head: bool = False,
        skip: Sequence[str] = (),
        *,
        linears: Sequence[Sequence[str]] | None = None,
        choices: Mapping[str, Mapping[str, Any]] | None = None,
        model: str | None = None,
        content: str | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        check_version(format_version, "config.json")
        self.format_version = format_version
        assert quant_method == METHOD
        self.quant_method = METHOD
        self.linears = None if linears is None else [list(group) for group in linears]
        self.choices = {name: dict(choice) for name, choice in (choices or {}).items()}
        self.model, self.content = model, content
        handed_over = unknown.get("contents")
        self.contents = unknown.pop("contents") if isinstance(handed_over, Contents) else None
        reading = unknown.get("reading")
        self.reading = unknown.pop("reading") if isinstance(reading, DeviceFiles) else None
        fields = scheme.keys() if isinstance(scheme, Mapping) else set()
        if later := [*unknown, *(fields - _SCHEME_FIELDS)]:
            raise CheckpointError(
                f"config.json has fields that this version of atom_compile does not know: "
                f"{', '.join(later)}. Upgrade atom_compile."
            )
        if isinstance(scheme, Mapping):
            scheme = Scheme(**scheme)
        saved = self.linears is not None
        self.recipe = recipe if saved and isinstance(recipe, str) else None
        given = {"scheme": scheme, "recipe": None if saved else recipe}
        self.options = Options.parse({**given, "include_head": include_head, "skip": skip})
        if self.options.recipe is not None:
            self.recipe = self.options.recipe.digest

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "scheme": dataclasses.asdict(self.options.scheme),
            "recipe": self.recipe,
            "include_head": self.options.include_head,
            "skip": list(self.options.skip),
            "linears": self.linears,
            "choices": self.choices,
            "model": self.model,
            "content": self.content,
        }

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: Any) -> AtomConfig:
        """transformers copies configurations; a recipe can be as large as the packed model."""
        copied = copy.copy(self)
        copied.choices = copy.deepcopy(self.choices)
        return copied

    def describe(self, model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
        """Takes down what was quantized, and how; the recipe is not needed any more."""
        self.options = dataclasses.replace(self.options, recipe=None)
        self.linears = [list(group) for group in groups]
        scheme = self.options.scheme
        for name in (name for group in groups for name in group):
            linear = model.get_submodule(name)
            assert isinstance(linear, QuantizedLinear)
            form = linear.input_format
            plain = scheme.activation_clip, scheme.int8_groups(form.cut)
            if (form.clip, form.int8_groups) != plain:
                self.choices[name] = {
                    "activation_clip": form.clip,
                    "int8_groups": form.int8_groups,
                }
