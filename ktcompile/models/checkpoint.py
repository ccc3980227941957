"""Where a model comes from, and whether its files are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ktcompile.models.tensor_files import TensorFile

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model")
_OTHER_WEIGHTS = (".bin", ".gguf", ".pt", ".pth", ".ckpt")


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
    files = weight_files(folder)
    if not files:
        found = _other_weights(folder)[0]
        raise ValueError(
            f"{folder} has its weights in {found.name} and not in safetensors; only those are read, since files of "
            "other kinds may run code or hold formats of other programs: load the model with what wrote it, and save "
            "it with transformers' save_pretrained, or use a checkpoint of the model in safetensors"
        )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or was not fully copied: {error}") from error


class Shards(Mapping[str, Tensor]):
    """The tensors of a model's safetensors files, each read into memory of its own when it is asked for.

    What was read does not stay in the system's cache of files if all of it would fill more than half of the RAM: it
    would push out what is in use, and be gone before the next load.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files. Errors as for `check`."""
        check(folder)
        files = weight_files(folder)
        keep = sum(file.stat().st_size for file in files) <= _memory() // 2
        self._files: dict[str, TensorFile] = {}
        for file in files:
            opened = TensorFile(file, keep_cached=keep)
            self._files.update(dict.fromkeys(opened.tensors, opened))

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._files[name].tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in. ValueError: torch has none of its name."""
        return self._files[name].dtype(name)

    def read_into(self, target: Tensor, name: str, first: int) -> None:
        """Fill a contiguous tensor with elements of a stored one, from number `first` on. Errors as for
        `TensorFile.read`."""
        self._files[name].read_into(target, name, first)

    def file(self, name: str) -> Path:
        """Return the file of a tensor, or the first with one whose name begins so. KeyError: there is none."""
        if name in self._files:
            return self._files[name].path
        for stored, file in self._files.items():
            if stored.startswith(name):
                return file.path
        raise KeyError(name)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a model's weights, whether they are there or not; none if they are of another kind.
    ValueError: the index is damaged."""
    shards = set(_index_of(folder).values())
    if shards:
        return [folder / shard for shard in sorted(shards)]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    found = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
    return found if found or _other_weights(folder) else [folder / _WEIGHTS]


def _index_of(folder: Path) -> dict[str, str]:
    """Return the file of each tensor; nothing where there is no index. ValueError: it is damaged."""
    index = folder / _INDEX
    if not index.is_file():
        return {}
    try:
        files = json.loads(index.read_text())["weight_map"]
        # A path out of the folder would be a file that is not the model's.
        if not files or any(Path(file).name != file for file in files.values()):
            raise ValueError("weight_map must give each tensor the name of a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    found: dict[str, str] = files
    return found


def _other_weights(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in _OTHER_WEIGHTS)


def _memory() -> int:
    """Return the bytes of RAM of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fetch(model: str) -> Path:
    """Return the folder into which the configuration and the safetensors of a hub model were downloaded, or in which
    they were. FileNotFoundError: the hub does not give them, and the cache does not have them."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        try:
            index = Path(hf_hub_download(model, _INDEX))
            shards = sorted(set(_index_of(index.parent).values()))
        except EntryNotFoundError:  # also where the cache alone is asked
            shards = [_WEIGHTS]
        # Of subfolders nothing: other forms of the same weights are there.
        return Path(snapshot_download(model, allow_patterns=[*_BESIDE_WEIGHTS, *shards], ignore_patterns=["*/*"]))
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(f"cannot load the model {model}: {error}") from error


def is_hub_id(model: str) -> bool:
    """Return whether `model` has the form of "name" or "owner/name"."""
    parts = model.split("/")
    return len(parts) <= 2 and all(parts) and model[0] not in ".~"
