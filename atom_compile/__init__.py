"""INT4 for PyTorch language models, by rewriting the graph: `model.compile(backend="atom")`."""

from .calibrate import calibrate
from .errors import AtomError
from .explain import Report, diff, explain
from .kv_cache import KVCache
from .quantize import Quantized, quantize
from .recipe import Recipe
from .saving import load, save
from .scheme import KVScheme, Scheme
from .transformers_config import AtomConfig

__all__ = [
    "AtomConfig",
    "AtomError",
    "KVCache",
    "KVScheme",
    "Quantized",
    "Recipe",
    "Report",
    "Scheme",
    "calibrate",
    "diff",
    "explain",
    "load",
    "quantize",
    "save",
]
