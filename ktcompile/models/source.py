"""Where the description of a model comes from: its configuration and the headers of its weights, no weights.

A folder, a config.json, or the id of a hub model, of which only these parts are fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktcompile.models.checkpoint import is_hub_id, weight_files
from ktcompile.models.tensor_files import StoredTensor, read_header, stored_tensor

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A described model. config: the contents of its config.json. tensors: of its weights; None: there are none.
    notes: what was missing. loadable: the weights are where `name` says, as far as is known."""

    name: str
    config: dict[str, Any]
    tensors: tuple[StoredTensor, ...] | None
    notes: tuple[str, ...] = ()
    loadable: bool = False


def describe_source(model: str | Path) -> ModelSource:
    """Return the description of a model: a folder, a config.json or a hub id.

    FileNotFoundError: there is no such file or folder. ValueError: a file is damaged, or the hub does not give the
    configuration. Both say what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, str(model))
    if path.is_file():
        return ModelSource(str(model), _read_config(path), None, ("sizes are those of the configuration alone",))
    if isinstance(model, Path) or not is_hub_id(model) or model.endswith(".json"):
        raise FileNotFoundError(f"there is no folder and no config.json {path}; name one, or the id of a hub model")
    return _from_hub(model)


def _from_folder(folder: Path, name: str) -> ModelSource:
    config = folder / _CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{config} is missing; {folder} is not the folder of a model")
    files = weight_files(folder)
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        found = f"{len(missing)} of {len(files)} files of weights are missing" if files else "there are no safetensors"
        note = f"{found}: sizes are those of the configuration alone"
        return ModelSource(name, _read_config(config), None, (note,))
    tensors = tuple(tensor for file in files for tensor in read_header(file))
    return ModelSource(name, _read_config(config), tensors, loadable=True)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{file} is damaged: it is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}; a configuration is a JSON object")
    return config


def _from_hub(model: str) -> ModelSource:
    """Fetch config.json and the headers of the weights; the headers may be missing."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = _read_config(Path(hf_hub_download(model, _CONFIG)))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the hub does not give the configuration of {model!r} ({reason}); download its config.json and name that "
            "file or its folder, or check the id and the connection"
        ) from error
    try:
        files = get_safetensors_metadata(model).files_metadata.values()
        stored = tuple(
            stored_tensor(name, str(t.dtype), t.shape, t.data_offsets) for f in files for name, t in f.tensors.items()
        )
    except Exception as error:  # of the hub, its client or the network: the configuration is enough
        note = (
            f"the hub does not give headers of weights ({type(error).__name__}): sizes are those of the configuration"
        )
        return ModelSource(model, config, None, (note,), loadable=True)
    return ModelSource(model, config, stored, loadable=True)
