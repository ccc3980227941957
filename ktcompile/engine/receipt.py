"""Where the keys and values of a prompt came from, and what that saved."""

from __future__ import annotations

from dataclasses import dataclass

from ktcompile.cache.costs import Recompute
from ktcompile.cache.tiers import DISK, HOST
from ktcompile.scheduler.batch import Start


@dataclass(frozen=True, slots=True)
class Receipt:
    """Of one answer's prompt, when it began: tokens, all together those of the prompt, bytes and seconds by tier.

    device_tokens: in blocks of other requests. host_tokens, disk_tokens: loaded. computed_tokens: the rest.
    host_bytes, disk_bytes: that were loaded, used or not; host_seconds, disk_seconds: of the threads that did it.
    load_seconds: for which the request waited. saved_seconds: what the first three would have taken to compute, as
    prompts were computed lately, less load_seconds; it may be negative. 0 where no prompt was measured.
    """

    device_tokens: int
    host_tokens: int
    disk_tokens: int
    computed_tokens: int
    host_bytes: int = 0
    disk_bytes: int = 0
    host_seconds: float = 0.0
    disk_seconds: float = 0.0
    load_seconds: float = 0.0
    saved_seconds: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return self.device_tokens + self.host_tokens + self.disk_tokens + self.computed_tokens


def receipt_of(start: Start, prompt_tokens: int, block_size: int, recompute: Recompute | None) -> Receipt:
    """Return the receipt of a prompt that began. recompute: what prefill costs."""
    loaded, cached = start.loaded, start.num_cached_tokens
    saved = 0.0 if recompute is None else recompute.seconds(0, cached) - start.load_seconds
    if loaded is None:
        return Receipt(cached, 0, 0, prompt_tokens - cached, saved_seconds=saved)
    host, disk = (loaded.tiers.count(tier) * block_size for tier in (HOST, DISK))
    return Receipt(
        cached - host - disk,
        host,
        disk,
        prompt_tokens - cached,
        loaded.bytes.get(HOST, 0),
        loaded.bytes.get(DISK, 0),
        loaded.seconds.get(HOST, 0.0),
        loaded.seconds.get(DISK, 0.0),
        start.load_seconds,
        saved,
    )
