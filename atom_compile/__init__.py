"""INT4 for PyTorch language models, by rewriting the graph: `model.compile(backend="atom")`."""

from .calibrate import calibrate
from .errors import AtomError
from .explain import Report, explain
from .recipe import Recipe
from .scheme import Scheme

__all__ = ["AtomError", "Recipe", "Report", "Scheme", "calibrate", "explain"]
