"""What goes wrong, by name. Every message says what was got, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AtomError(ValueError):
    """The base of every error that this package raises on purpose."""


class OptionError(AtomError):
    """An unknown option, or a value that an option or scheme does not take."""


class TrainingModeError(AtomError):
    """The model is in training mode; its rewritten form has no gradients."""


class RecipeError(AtomError):
    """A recipe that is damaged, of a newer format, or of another model."""


class CheckpointError(AtomError):
    """A packed checkpoint that is damaged, incomplete, of a newer format, or of another model."""


class ReportError(AtomError):
    """A file that is no report, is damaged, or of a newer format."""


class CacheError(AtomError):
    """A KV cache that is full, or was made for another model."""


class EvaluationError(AtomError):
    """A text, dataset or task that a model cannot be evaluated on."""


class NothingRewrittenError(AtomError):
    """A graph with linears of which not one could be rewritten."""


def unknown(kind: str, got: str, allowed: Iterable[str]) -> str:
    """`unknown option 'shceme'; did you mean 'scheme'? Allowed: ...`"""
    names = sorted(allowed)
    close = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    listed = f" Allowed: {', '.join(names)}" if len(names) <= 12 else ""
    return f"unknown {kind} {got!r}{hint}{listed}"
