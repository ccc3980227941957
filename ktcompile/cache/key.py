"""Keys of blocks of keys and values: a block has the key of everything that its content depends on.

Those are the tokens up to its end, and the namespace: the model and how it computes. A key is 32 bytes of SHA-256 over
the key of the block before and the block's own tokens, so equal prefixes have equal keys in every process, and blocks
behind different prefixes have different ones. Parts of what is hashed begin with a domain and their lengths, so no two
different contents are the same bytes. Whoever finds a block by its key compares its tokens all the same.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

KEY_BYTES = 32
# Of a request's cache_salt, in UTF-8.
MAX_SALT_BYTES = 256
# Goes up when keys are to be others for the same content.
_VERSION = 1
_ROOT = b"ktcompile/kv/root"
_TENANT = b"ktcompile/kv/tenant"
_BLOCK = b"ktcompile/kv/block" + struct.pack("<I", _VERSION)


@dataclass(frozen=True, slots=True)
class Namespace:
    """What keys and values depend on beside tokens: blocks of one namespace are good for another only if it is equal.

    weights, tokenizer, adapter: their contents' digests; "" for no adapter. kv_format: a name of
    `ktcompile.ops.KV_FORMATS`. layout: what each layer keeps of a position, and in which order. block_size: positions.
    attention: rotary embeddings, windows and the like, as the model's configuration has them. numerics: of the kernels,
    and the format that weights are packed to. Nothing of it says where files are, who runs or how much memory there is.
    """

    weights: str
    tokenizer: str
    adapter: str
    kv_format: str
    layout: str
    block_size: int
    attention: str
    numerics: str

    @property
    def digest(self) -> bytes:
        """32 bytes that are the namespace's own."""
        parts = [part for f in fields(self) for part in (f.name, str(getattr(self, f.name)))]
        return hashlib.sha256(_joined(_ROOT, struct.pack("<I", _VERSION), *(part.encode() for part in parts))).digest()


def root(namespace: Namespace, salt: str = "", secret: bytes = b"") -> bytes:
    """Return the parent of the first blocks.

    salt: requests of different ones share no block. secret: what the keys of salted blocks are made with, so that who
    knows a salt knows no keys. ValueError: the salt is longer than MAX_SALT_BYTES.
    """
    if not salt:
        return namespace.digest
    encoded = salt.encode("utf-8", "surrogatepass")
    if len(encoded) > MAX_SALT_BYTES:
        raise ValueError(f"cache_salt has {len(encoded)} bytes; it may have {MAX_SALT_BYTES}")
    return hmac.digest(secret, _joined(_TENANT, namespace.digest, encoded), "sha256")


def child(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the key of a block. parent: the key of the block before it, or a root. ValueError: a token is none of
    32 bits."""
    count = len(token_ids)
    try:
        content = struct.pack(f"<{count + 1}I", count, *token_ids)
    except struct.error as error:
        raise ValueError(f"tokens are numbers from 0 to {(1 << 32) - 1}: {error}") from error
    return hashlib.sha256(_BLOCK + parent + content).digest()


def _joined(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)
