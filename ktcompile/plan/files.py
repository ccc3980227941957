"""Files that are written at the end of long work."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raise ValueError now if a file could not be written in the end. It is tried beside `path`, which stays as it
    is."""
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a directory")
    folder = path.absolute().parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; is there a directory {folder}?") from error
