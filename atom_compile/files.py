"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Through a temporary name beside it, so that a reader never sees half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".atom-") as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        os.replace(unfinished, path)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_whole`, a folder with all that is in it; one that was there is replaced."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".atom-") as folder:
        unfinished, before = Path(folder) / path.name, Path(folder) / "before"
        unfinished.mkdir()
        write(unfinished)
        if path.is_dir():
            path.rename(before)
        try:
            unfinished.rename(path)
        except BaseException:
            if before.is_dir():
                before.rename(path)
            raise


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
