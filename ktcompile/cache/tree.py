"""Blocks of a tier by key, each behind its parent: no block is there without those before it."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar


class Node(Protocol):
    """What a tree keeps of a block. position: tokens before it; where it is 0, the parent is no block."""

    @property
    def key(self) -> bytes: ...
    @property
    def parent(self) -> bytes: ...
    @property
    def position(self) -> int: ...


N = TypeVar("N", bound=Node)


class Tree(Generic[N]):
    """A dictionary of blocks that knows the children of each."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, N] = {}
        self._children: dict[bytes, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._nodes

    def get(self, key: bytes) -> N | None:
        """Return a block, None: it is not here."""
        return self._nodes.get(key)

    def nodes(self) -> list[N]:
        """Return all blocks, in the order in which they came: parents before children."""
        return list(self._nodes.values())

    def takes(self, node: Node) -> bool:
        """Return whether a block may be added: it is not here, and what it continues is."""
        return node.key not in self._nodes and (node.position == 0 or node.parent in self._nodes)

    def add(self, node: N) -> None:
        """Add a block that `takes` is true for."""
        assert self.takes(node), f"{node.key.hex()} is here, or its parent is not"
        self._nodes[node.key] = node
        self._children.setdefault(node.parent, set()).add(node.key)

    def cut(self, key: bytes) -> list[N]:
        """Remove a block with all behind it, and return these, children before parents; none where it is not here."""
        if key not in self._nodes:
            return []
        order = [key]
        for each in order:
            order.extend(self._children.get(each, ()))
        removed = [self._nodes.pop(each) for each in reversed(order)]
        for node in removed:
            siblings = self._children[node.parent]
            siblings.discard(node.key)
            if not siblings:
                del self._children[node.parent]
        return removed
