"""INT4 for PyTorch language models, by rewriting the graph: `model.compile(backend="atom")`."""

from .calibrate import calibrate
from .errors import AtomError
from .explain import Report, diff, explain
from .kv_cache import KVCache
from .recipe import Recipe
from .scheme import KVScheme, Scheme

__all__ = [
    "AtomError",
    "KVCache",
    "KVScheme",
    "Recipe",
    "Report",
    "Scheme",
    "calibrate",
    "diff",
    "explain",
]
