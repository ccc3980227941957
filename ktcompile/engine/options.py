"""What an engine may be told: its limits, its formats, its device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ktcompile.config import DeviceOptions
from ktcompile.ops.kv import KV_FORMATS
from ktcompile.quant import check_format
from ktcompile.scheduler.policy import SchedulerOptions

MLA_STORAGES = ("latent", "expanded")
_AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(DeviceOptions):
    """Options of an engine: those of the device, those of `ktcompile.scheduler.policy.SchedulerOptions`, and these.

    max_model_len: positions of a sequence; None: as many as the model has, and fit into the memory for keys and values.
    kv_device_memory: that memory in bytes; None: a third of what is free, at most what max_num_seqs sequences of
    max_model_len need. kv_format: a name of `ktcompile.ops.KV_FORMATS`, as "int8"; "auto": the model's dtype.
    mla_storage: what layers of latent attention keep of a position: "latent", where they can; "expanded", the keys and
    values of all heads.
    enable_prefix_caching: what was computed of the beginning of a request is taken from blocks of others.
    kv_host_memory: bytes for blocks that the device has no room for; None: none, or with kv_disk_path a quarter of the
    device's. kv_disk_path: a folder for blocks, which outlive the engine; None: none. kv_disk_size: its bytes at most;
    None: 16 GiB.
    weight_format, dense_format, head_format: as of `ktcompile.config.CompileOptions`.
    eager: the model is not compiled; answers may then depend on what else is computed.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    block_size: int = 64
    chunk_size: int = 256
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    max_queue_seconds: float = 60.0
    kv_device_memory: int | None = None
    kv_format: str = _AUTO
    mla_storage: str = "latent"
    kv_host_memory: int | None = None
    kv_disk_path: Path | None = None
    kv_disk_size: int | None = None
    enable_prefix_caching: bool = True
    weight_format: str = _AUTO
    dense_format: str = _AUTO
    head_format: str | None = None
    eager: bool = False

    def __post_init__(self) -> None:
        DeviceOptions.__post_init__(self)
        check_format(self.weight_format)
        check_format(self.dense_format, "dense_format")
        if self.head_format is not None:
            check_format(self.head_format, "head_format")
        if self.kv_format != _AUTO and self.kv_format not in KV_FORMATS:
            known = ", ".join((_AUTO, *KV_FORMATS))
            raise ValueError(f"kv_format is {self.kv_format!r}; it must be one of {known}")
        if self.mla_storage not in MLA_STORAGES:
            raise ValueError(f"mla_storage is {self.mla_storage!r}; it must be one of {', '.join(MLA_STORAGES)}")
        if self.kv_device_memory is not None and self.kv_device_memory < 1:
            raise ValueError(f"kv_device_memory is {self.kv_device_memory}; it must be 1 byte or more")
        if self.kv_host_memory is not None and self.kv_host_memory < 0:
            raise ValueError(f"kv_host_memory is {self.kv_host_memory}; it must be 0 bytes or more")
        if self.kv_disk_size is not None and self.kv_disk_size < 1:
            raise ValueError(f"kv_disk_size is {self.kv_disk_size}; it must be 1 byte or more")
        if self.kv_disk_size is not None and self.kv_disk_path is None:
            raise ValueError("kv_disk_size says how large kv_disk_path may become, which is not given")
        self.scheduler_options(1 if self.max_model_len is None else self.max_model_len)

    def scheduler_options(self, max_model_len: int) -> SchedulerOptions:
        """Return the limits of the scheduler. ValueError: one cannot be."""
        return SchedulerOptions(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=self.block_size,
            chunk_size=self.chunk_size,
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            max_queue_seconds=self.max_queue_seconds,
        )
