"""Registers "kt" with transformers as soon as transformers can run models, which many commands never do.

`transformers.modeling_utils` takes seconds to import. So what is to be registered waits until somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ktcompile.models import hf_attention, hf_experts, hf_paged

_AWAITED = "transformers.modeling_utils"


def register() -> None:
    """Register the implementations of experts and of attention, now or when transformers has loaded its models."""
    if _AWAITED in sys.modules:
        _register_all()
    else:
        sys.meta_path.insert(0, _Finder())


def _register_all() -> None:
    hf_experts.register()
    hf_attention.register()
    hf_paged.register()


class _Finder(MetaPathFinder):
    """Finds one module, once, as the others would, and has it loaded by `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as another one does, and registers afterwards."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # As if nobody had come between: what reads source or resources of a module asks its loader.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register_all()
