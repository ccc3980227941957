"""Whether this process can use a GPU for experts, without loading what only those who use one need."""

from __future__ import annotations

import importlib.util

import torch

from ktcompile.runtime.device import Device

# Of the GPU's memory, for what the rest of the model computes with, and not less than this.
_RESERVE, _LEAST_RESERVE = 0.1, 1 << 30


def why_not() -> str | None:
    """Return what keeps this process from using a GPU, and what to do; None: it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build of torch for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU; check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not hide it"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with: pip install 'ktcompile[gpu]'"
    return None


def cuda_device(memory_bytes: int | None) -> Device:
    """Return the current GPU with a budget for experts; None: what is free now, less a reserve for the rest.

    ValueError: there is no GPU that can be used.
    """
    reason = why_not()
    if reason is not None:
        raise ValueError(f"device 'cuda' cannot be used: {reason}")
    from ktcompile.runtime.cuda import CudaDevice
    from ktcompile.runtime.cuda_streams import CudaStreams

    # cuDNN plans its attention anew for every length of a cache: 9 ms of the CPU for each layer and step, measured with
    # torch 2.11 on an H100. Flash attention, which torch takes then, does not.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda", torch.cuda.current_device())
    if memory_bytes is None:
        free, total = torch.cuda.mem_get_info(device)
        memory_bytes = budget(free, total)
    return CudaDevice(memory_bytes, CudaStreams(device))


def budget(free: int, total: int) -> int:
    """Return the bytes for experts of a GPU with so many free and in total."""
    return max(0, free - max(_LEAST_RESERVE, int(total * _RESERVE)))
