"""Where a model comes from, and whether its files are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def locate(model: str | Path) -> str:
    """Return what transformers loads: a checked directory, or `model` itself if it is the id of a hub model.

    FileNotFoundError: it is written as a path and there is no such directory, or files are missing in it.
    ValueError: a file is damaged. Both name the file.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        check(folder)
        return str(folder)
    if folder.exists():
        raise ValueError(f"{folder} is a file; a model is a directory with config.json and weights")
    if isinstance(model, Path) or not is_hub_id(model):
        raise FileNotFoundError(f"there is no directory {folder}")
    return model


def check(folder: Path) -> None:
    """Read the header of each weights file of a model, not the weights. Errors as for `locate`."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing; {folder} is not the directory of a model")
    for file in weight_files(folder):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or was not fully copied: {error}") from error


class Shards(Mapping[str, Tensor]):
    """The tensors of a model's safetensors files, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Open the files. Errors as for `check`; ValueError also if they are of another kind."""
        check(folder)
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in weight_files(folder):
            self._open[file] = safe_open(file, "pt")
            self._files.update(dict.fromkeys(self._open[file].keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._files[name]].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, name: str) -> Path:
        """Return the file of a tensor, or the first with one whose name begins so. KeyError: there is none."""
        if name in self._files:
            return self._files[name]
        for stored, file in self._files.items():
            if stored.startswith(name):
                return file
        raise KeyError(name)


def weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        # Weights of another name or format are for transformers to find.
        others = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf")]
        found = sorted(p for p in others if p.suffix == ".safetensors")
        return found if others else [folder / _WEIGHTS]
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    return [folder / shard for shard in sorted(shards)]


def is_hub_id(model: str) -> bool:
    """Return whether `model` has the form of "name" or "owner/name"."""
    parts = model.split("/")
    return len(parts) <= 2 and all(parts) and model[0] not in ".~"
