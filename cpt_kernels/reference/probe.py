"""Proves that a stored reference is the one at hand, by the log-probs of a few tokens that its folder holds.

The fingerprint covers tensors and configs. An adapter's scale that was set in memory, RoPE frequencies, attributes of
modules and hooks change log-probs, too, and leave the fingerprint as it is. So references of one fingerprint whose
log-probs differ by more than rounding have folders of their own: the first has the fingerprint's, the others follow.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import stores
from ..errors import UserError
from ..files import create_text
from ..model.conditions import PinnedRouting, undisturbed
from ..model.hooks import in_training_mode, set_attention
from ..model.packed_model import PackedModel, base_model
from ..model.proof import token_source

PROBE = "probe.json"  # in a reference's folder

_TOKENS = 24
_FARTHEST = 4096  # position of the last tokens, so that low frequencies of RoPE count


@dataclass(frozen=True)
class ReferenceProbe:
    """Log-probs of fixed tokens under a reference, in nats."""

    logps: list[float]
    allowance: float  # how far rounding may move one of them

    def difference(self, other: ReferenceProbe) -> float:
        """The largest difference of two probes beyond which they are of one reference; infinite for other tokens."""
        if len(self.logps) != len(other.logps):
            return float("inf")
        return max(abs(one - two) for one, two in zip(self.logps, other.logps))

    def agrees(self, other: ReferenceProbe) -> bool:
        """Whether rounding explains the difference."""
        return self.difference(other) <= max(self.allowance, other.allowance)


class ProvenFolder(NamedTuple):
    """The folder of a reference."""

    fingerprint: str  # its name
    rivals: int  # folders of the same tensors and configs that hold another reference's log-probs
    difference: float  # the smallest difference from those, in nats; infinite if none has a readable probe


@torch.no_grad()
def measure(packed: PackedModel, compute_dtype: torch.dtype) -> ReferenceProbe:
    """Runs the model's own forward on the tokens of the probe, alone and in a batch of two, which shows its rounding.

    Raises:
        UserError: a log-prob is not finite.
    """
    base: Any = base_model(packed.model)
    attention = base.config._attn_implementation
    config = base.config.get_text_config()
    limit = min(getattr(config, "max_position_embeddings", None) or _FARTHEST, packed.share_limit or _FARTHEST)
    limit = min(limit, _FARTHEST)
    tokens = token_source(base)(min(_TOKENS, limit))
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters
    positions = _positions(len(tokens), limit)[None].to(base.device)

    def run(rows: int) -> Tensor:
        inputs: dict[str, Any] = {"position_ids": positions.repeat(rows, 1)} if takes_positions else {}
        ids = torch.tensor([tokens] * rows, device=base.device)
        # With a mask, transformers does not take the gaps between positions for borders of sequences.
        mask = torch.ones_like(ids)
        with routing.follow([tokens] * rows, rows=rows):
            logits = packed.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits[0, :-1]
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return logps.gather(-1, ids[0, 1:, None])[:, 0].double()

    routing = PinnedRouting()
    with undisturbed(packed.model), in_training_mode(packed.quantized):
        try:
            if base.device.type == "cpu" and ("flash" in attention or "over_fa" in attention):
                set_attention(base, "sdpa")
            with torch.compiler.set_stance("force_eager"):  # two small shapes are not worth a set of graphs each
                logps = run(1)
                noise = (run(2) - logps).abs().max().item()
        finally:
            set_attention(base, attention)
    if not logps.isfinite().all():
        raise UserError(f"log-probs of the reference are not finite ({type(base).__name__})")
    eps = torch.finfo(compute_dtype).eps
    rounding = (128 if eps < 1e-4 else 2) * eps * (1 + logps.abs().max().item())
    return ReferenceProbe(logps.tolist(), 2 * noise + rounding)


def find_folder(directory: Path, fingerprint: str, probe: ReferenceProbe) -> ProvenFolder:
    """Returns the folder whose probe agrees, or the next free one, which is claimed by storing the probe.

    A folder with rows and without a readable probe proves nothing, so its rows are not served. Any number of processes
    may call it at once: the first one claims a folder, the others compare with what it stored.
    """
    differences = []
    text = json.dumps(asdict(probe), indent=1) + "\n"
    for name in _folder_names(fingerprint):
        folder = directory / name
        file = folder / PROBE
        if (url := stores.url_of(folder)) is not None:
            _claim_on_store(url, file, text)
        if not file.exists() and not any(folder.glob("*.arrow")):
            # A folder that cannot be written to says so when rows are written; until then there is nothing to serve.
            with contextlib.suppress(OSError):
                if url is None:
                    create_text(file, text)
            if not file.exists():
                break
        stored = read_probe(folder)
        if stored is not None and probe.agrees(stored):
            break
        differences.append(float("inf") if stored is None else probe.difference(stored))
    return ProvenFolder(name, len(differences), min(differences, default=0.0))


def _claim_on_store(url: str, file: Path, text: str) -> None:
    """Stores a probe in a reference's folder on a store that has neither a probe nor rows, and copies it from there."""
    there = stores.list_files(url)
    is_free = PROBE not in there and not any(name.endswith(".list") for name in there)
    if is_free and (file.exists() or not any(file.parent.glob("*.arrow"))):
        # Rows that wait in the local folder belong to the local probe.
        with contextlib.suppress(UserError):  # as for a folder that cannot be written to
            stores.create_bytes(f"{url}/{PROBE}", file.read_bytes() if file.exists() else text.encode())
    try:
        stores.download(f"{url}/{PROBE}", file)
    except FileNotFoundError:
        file.unlink(missing_ok=True)


def read_probe(folder: Path) -> ReferenceProbe | None:
    """Returns the probe in a folder; None if there is none, or if the file is damaged."""
    try:
        stored = json.loads((folder / PROBE).read_text())
        return ReferenceProbe([float(x) for x in stored["logps"]], float(stored["allowance"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _folder_names(fingerprint: str) -> Iterator[str]:
    yield fingerprint
    number = 1
    while True:
        yield sha256(f"{fingerprint}/{number}".encode()).hexdigest()[:32]
        number += 1


def _positions(count: int, limit: int) -> Tensor:
    """Returns increasing positions (count,) below a limit, in three runs that lie apart."""
    third = count // 3
    positions = torch.arange(count)
    spare = limit - count
    positions[third:] += spare // 16
    positions[2 * third :] += spare - spare // 16
    return positions
