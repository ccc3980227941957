"""The tiers behind the device, as the scheduler uses them: named blocks go there, and beginnings come from there."""

from __future__ import annotations

from dataclasses import dataclass

from ktcompile.cache.block_id import BlockId
from ktcompile.cache.costs import Recompute
from ktcompile.cache.promotion import Loaded, Promotion
from ktcompile.cache.rates import Rates
from ktcompile.cache.tiers import Tiers
from ktcompile.kv.block_pool import BlockPool
from ktcompile.scheduler.request import Request

# Blocks that wait to be copied at a time: those of the longest steps.
MOST_KEPT = 256


@dataclass(slots=True)
class Loading:
    """A request's blocks on their way. first: the number of the first of them. begin: by the clock, in seconds."""

    promotion: Promotion
    first: int
    begin: float


class Behind:
    """Keeps blocks in tiers and brings them back. Nothing waits for a copy, but for the end of one that has begun.

    A block is copied as soon as it has a name, while its request goes on: when it is handed out anew it would be too
    late, as whoever needs it would wait for the copy. It is held until then; `take_back` ends that at once.
    """

    def __init__(self, tiers: Tiers, pool: BlockPool, rates: Rates, block_size: int) -> None:
        self._tiers, self._pool, self._rates, self._size = tiers, pool, rates, block_size
        self._reading: set[int] = set()

    def find(self, request: Request, first: int, recompute: Recompute | None) -> int:
        """Return how many blocks of a request to load, from number `first` on; its names are known to where it may.

        They are looked for once for each `first` while it waits.
        """
        if request.root is None:
            return 0
        ids = self._ids(request, first, request.logits_from // self._size)
        if not ids or request.looked_up == first:
            return 0
        request.looked_up = first
        return self._rates.worth_loading(self._tiers.lookup(ids), first, recompute)

    def load(self, request: Request, first: int, count: int, recompute: Recompute | None, now: float) -> None:
        """Begin to bring `count` blocks, from number `first` on, to those of the request's table."""
        ids, targets = self._ids(request, first, first + count), request.block_table[first : first + count]
        seconds = self._rates.seconds(count, first, recompute)
        request.loading = Loading(self._tiers.promote(ids, targets, seconds), first, now)

    def ended(self, request: Request) -> Loaded | None:
        """Return what came of a load that has ended, and end it; None: it goes on."""
        assert request.loading is not None
        loaded = request.loading.promotion.result()
        if loaded is not None:
            request.loading = None
            self._rates.note(loaded)
        return loaded

    def cancel(self, request: Request) -> None:
        """End a load, if there is one: nothing is written to the request's blocks any more."""
        if request.loading is not None:
            request.loading.promotion.cancel()
            request.loading = None

    def wait(self, request: Request, seconds: float) -> None:
        """Return when a request's load has ended, or after a time."""
        if request.loading is not None:
            request.loading.promotion.wait(seconds)

    def keep(self, request: Request) -> None:
        """Have blocks of a request kept that have names, as many as may be read at a time; the rest when asked next."""
        while request.num_kept < request.num_named and len(self._reading) < MOST_KEPT:
            number = request.num_kept
            block, name = request.block_table[number], request.block_names[number]
            known = self._pool.name_of(block) == name  # or another block has the content, and is kept for it
            if known and block not in self._reading and not self._tiers.has(name.key):
                if not self._tiers.store(self._ids(request, number, number + 1)[0], block):
                    return
                self._pool.hold(block)
                self._reading.add(block)
            request.num_kept += 1

    def forget(self, request: Request) -> None:
        """Have the blocks of a request found no more: what they contain may be wrong."""
        self.take_back()
        self._tiers.forget(self._ids(request, 0, request.num_named))

    def give_back(self) -> None:
        """Release the blocks that were copied."""
        self._release(self._tiers.finished())

    def take_back(self) -> bool:
        """Release all blocks that wait to be copied, and return whether there were any."""
        return self._release(self._tiers.take_back())

    def maintain(self) -> None:
        """Do what is due with time."""
        self._tiers.maintain()

    def _release(self, blocks: list[int]) -> bool:
        for block in blocks:
            self._reading.discard(block)
            self._pool.release([block])
        return bool(blocks)

    def _ids(self, request: Request, begin: int, end: int) -> list[BlockId]:
        """Return blocks [begin, end) of a request, whose names are known."""
        names, root = request.block_names, request.root
        assert root is not None or begin >= end
        return [
            BlockId(names[i].key, names[i].parent, root or b"", i * self._size, names[i].token_ids)
            for i in range(begin, end)
        ]
