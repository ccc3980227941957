"""The small Mixture-of-Experts model that ships with the package."""

from __future__ import annotations

from pathlib import Path

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def path() -> Path:
    """Return the directory of the model. FileNotFoundError: this installation lacks its files."""
    folder = Path(__file__).parent / "tiny"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the model that ships with ktcompile is incomplete: {folder} lacks {', '.join(missing)}; reinstall "
            "ktcompile, make it with examples/train_tiny_moe.py --out of that directory, or name a model"
        )
    return folder
