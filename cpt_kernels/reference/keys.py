"""The hash by which a completion's row is found: of (reference fingerprint, prompt ids, completion ids), 128 bits.

XXH3 is ten times as fast as a cryptographic hash on rows of a few hundred tokens. Of n rows, two have the same key by
chance with probability n^2 / 2^129: 1.5e-21 for a billion. It is no defence against data that was made to collide; such
a row would be given the values of another of the same length.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from ..errors import UserError

Tokens = Sequence[int] | NDArray[np.integer]
Sequences = Sequence[tuple[Tokens, Tokens]]  # (prompt ids, completion ids) of each

_LENGTHS = struct.Struct("<QQ")
_INT64 = np.dtype("<i8")


def row_keys(
    fingerprint: bytes,  # 16
    sequences: Sequences,
) -> list[bytes]:
    """16 bytes for each (prompt ids, completion ids); about 1 us each from int64 arrays, 3 us from lists.

    The fingerprint and both lengths are hashed ahead of the tokens (int64, little-endian), so (1, 2 | 3) is not
    (1 | 2, 3).

    Raises:
        UserError: token ids that are not a flat sequence of integers.
    """
    keys = []
    for prompt_ids, completion_ids in sequences:
        prompt, completion = _token_bytes(prompt_ids), _token_bytes(completion_ids)
        lengths = _LENGTHS.pack(len(prompt), len(completion))
        keys.append(xxh3_128_digest(b"".join((fingerprint, lengths, prompt, completion))))
    return keys


@lru_cache(1 << 14)
def _packer(length: int) -> struct.Struct:
    return struct.Struct(f"<{length}q")


def _token_bytes(ids: Tokens) -> bytes:
    if type(ids) is np.ndarray and ids.dtype is _INT64 and ids.ndim == 1:
        return ids.tobytes()
    if isinstance(ids, (list, tuple)):
        try:
            return _packer(len(ids)).pack(*ids)  # a fifth of the time that numpy takes to read a list
        except struct.error as error:
            raise UserError(f"token ids must be a flat sequence of integers: {error}") from error
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(f"token ids must be a flat sequence of integers, not {array.dtype} of shape {array.shape}")
    return array.astype("<i8", copy=False).tobytes()
