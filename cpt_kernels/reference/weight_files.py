"""The files that a model's weights came from, as a memo of their tensors' digests.

To digest eight billion weights takes seconds that a run from the same files need not spend again. A fingerprint is of
tensors in memory, though, and files only lead to it: an entry is served where the model was loaded by `load`, every
weight of it from these very files, and nothing has had the model in between. Whatever a model goes through besides
(quantisation, weights that a checkpoint lacks, code of its own) has no entry, nor has a model that somebody hands over.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .shards import publish

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

Digest = list  # [dtype, shape, hex digits]
FOLDER = "weights"  # of the entries, in the cache's

_FORMAT = 1  # of an entry, and of the digests in it
_SETTLED = 2e9  # nanoseconds: a file that changed later than that may change once more without another time stamp
_PLAIN = {"dtype", "revision", "trust_remote_code", "attn_implementation"}  # options that leave weights as they are

_loaded: WeakKeyDictionary[nn.Module, WeightFiles] = WeakKeyDictionary()


@dataclass(frozen=True)
class WeightFiles:
    """How a model was loaded.

    Attributes:
        folder: where they are.
        stats: name -> size, time of change of content and of inode in nanoseconds, inode; of all files of its folder.
        options: whatever else the tensors in memory depend on.
    """

    folder: Path
    stats: Mapping[str, tuple[int, int, int, int]]
    options: Mapping[str, str]

    def read(self, directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, Digest] | None:
        """Digests of tensors, as an earlier run found them; None if it did not, or if these tensors are others.

        Args:
            directory: of the cache.
            tensors: of the model, by name; their types and shapes are compared.
        """
        path = self._path(directory)
        if self._changed():
            return None
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            digests = entry["tensors"]
            if entry["checksum"] != _checksum(digests):
                raise ValueError("its checksum is wrong")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError) as error:
            logger.warning("%s is damaged, and ignored: %s", path, error)
            return None
        return digests if {name: digest[:2] for name, digest in digests.items()} == _kinds(tensors) else None

    def write(self, directory: Path, digests: Mapping[str, Digest]) -> None:
        """Keep digests for later runs."""
        if self._changed():
            return
        entry = {"files": self.stats, "options": self.options, "tensors": digests, "checksum": _checksum(digests)}
        try:
            publish(self._path(directory), lambda file: file.write(json.dumps(entry, indent=1).encode()))
        except OSError as error:  # it would have saved time, no more
            logger.warning("digests of weights cannot be kept in %s: %s", directory, error)

    def _changed(self) -> bool:
        """Whether the files are others by now: tensors on a CPU may be mapped from them, and change with them."""
        return _stats(self.folder) != self.stats

    def _path(self, directory: Path) -> Path:
        key = json.dumps([_FORMAT, self.stats, self.options], sort_keys=True)
        return directory / FOLDER / f"{sha256(key.encode()).hexdigest()[:32]}.json"


def load(auto_model: Any, source: str, **options: Any) -> Any:
    """``auto_model.from_pretrained(source, **options)``, remembering the files. Errors are transformers'."""
    started = time.time_ns()
    folder = _folder(source, options.get("revision"))
    before = _stats(folder) if folder else {}
    model, info = auto_model.from_pretrained(source, output_loading_info=True, **options)
    settled = bool(before) and max(max(times[1:3]) for times in before.values()) < started - _SETTLED
    # Weights that are not in the files are random.
    complete = not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "error_msgs"))
    own_code = not type(model).__module__.startswith("transformers.")
    quantised = getattr(model.config, "quantization_config", None) is not None
    plain = set(options) <= _PLAIN and not own_code and not quantised and "adapter_config.json" not in before
    if settled and complete and plain and _folder(source, options.get("revision")) == folder:
        packages = {name: version(name) for name in ("torch", "transformers")}
        _loaded[model] = WeightFiles(folder, before, {"dtype": str(options.get("dtype")), **packages})
    return model


def claim(model: nn.Module) -> WeightFiles | None:
    """The files of a model that comes from `load`. Once: who asks may let others change the model from now on."""
    return _loaded.pop(model, None)


def _folder(source: str, revision: str | None) -> Path | None:
    """A local folder, or a hub's as it was downloaded before; None if it was not."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _stats(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    try:
        stats = {entry.name: os.stat(entry.path) for entry in os.scandir(folder)}  # of what links lead to
    except OSError:  # a file came or went
        return {}
    return {
        name: (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        for name, about in sorted(stats.items())
        if stat.S_ISREG(about.st_mode)
    }


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, list]:
    return {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}


def _checksum(digests: Mapping[str, Digest]) -> str:
    return sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
