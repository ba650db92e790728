"""What encoders made of pictures and prompts, kept in memory and on disk: nothing is encoded twice."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import user_cache_folder, write_atomically
from flatlora_diffusion.common.packages import LIBRARIES, package_versions

logger = logging.getLogger(__name__)

Encoding = tuple[Tensor, Tensor]
"""Mean and standard deviation of a picture's latents, or embeddings of a prompt's tokens and pooled ones."""

MOST_BYTES = 4 * 2**30
"""What the files may take; of SDXL's latents at 1024 px that are 8,000."""

_FILE_BYTES = 2**26  # what is kept in one file: a run that is killed loses no more
_OURS = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.safetensors")
_UNFINISHED = re.compile(rf"\.{_OURS.pattern}\.tmp")
_STALE_SECONDS = 24 * 60 * 60  # an unfinished file so old is of a process that was killed


def kept_folder() -> Path | None:
    """Where encodings are kept: in the folder that `FLATLORA_CACHE` names, by default one of the user's."""
    folder = user_cache_folder("FLATLORA_CACHE", "flatlora_diffusion")
    if folder is None:
        logger.info("no home folder: encodings are kept for later runs only where FLATLORA_CACHE names one")
    return folder and folder / "encodings"


class Encodings:
    """What all encoders made of what they were shown.

    Files are found by content: of the encoder's weights and of what it was shown, and by all that may decide
    a result's last bits (device, threads, versions). So nothing can go out of date, and a result from a file
    has the bits of one that is computed. Several processes may use one folder at a time.

    Args:
        folder: Where they are kept for later; None: nowhere, so that they serve the runs of this process.
        most_bytes: What the files may take: those used longest ago are removed first.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self._known: dict[str, dict[str, Encoding]] = {}

    def of(
        self, what: str, models: Sequence[nn.Module], device: torch.device, *, writes: bool = True
    ) -> EncodingsOf:
        """Those of some models, to be used as a context: at its end new ones are written.

        Args:
            what: What they are called in the log.
            models: Encoders whose weights decide them.
            device: Where they run.
            writes: Whether this process writes the files; of several that run together one is enough.
        """
        key = _key_of(models, device)
        return EncodingsOf(what, key, self._known.setdefault(key, {}), self, writes=writes)

    def prune(self) -> None:
        """Remove the files that were used longest ago, as far as all of them take too much."""
        assert self.folder is not None, "there are files"
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process has removed it
                name, status = path.name, path.stat()
                if _OURS.fullmatch(name):
                    found.append((status.st_mtime, status.st_size, path))
                elif _UNFINISHED.fullmatch(name) and time.time() - status.st_mtime > _STALE_SECONDS:
                    path.unlink()
        taken = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if taken <= self.most_bytes:
                break
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()
                taken -= size


class EncodingsOf:
    """What some models made of what they were shown; made by `Encodings.of`."""

    def __init__(
        self, what: str, key: str, known: dict[str, Encoding], kept: Encodings, *, writes: bool
    ) -> None:
        self._what = what
        self._key = key
        self._known = known
        self._kept = kept
        self._writes = writes and kept.folder is not None
        self._new: dict[str, Encoding] = {}
        self._found = self._made = 0
        self._files = contextlib.ExitStack()
        self._open: dict[Path, Any] = {}
        self._places: dict[str, Path] = {}  # of an encoding's file, by the encoding's key

    def __enter__(self) -> EncodingsOf:
        """Look which encodings are on disk."""
        folder = self._kept.folder
        for path in sorted(folder.glob(f"{self._key}-*.safetensors")) if folder is not None else ():
            with self._damage_told(path):
                self._open[path] = self._files.enter_context(safe_open(path, "pt"))
                self._places |= dict.fromkeys(self._open[path].metadata() or {}, path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is new, also where something went wrong: it needn't be made again."""
        self._files.close()
        folder = self._kept.folder
        if folder is None:
            return
        self._write()
        if kind is None and self._writes:
            logger.info("%s: %d found in %s, %d encoded", self._what, self._found, folder, self._made)

    def get(self, shown: Sequence[Tensor], encode: Callable[[], Encoding]) -> Encoding:
        """What the models made of something, on the CPU.

        Args:
            shown: All that they are shown.
            encode: Computes it; called where it isn't known.
        """
        key = _digest(shown)
        known = self._known.get(key) or self._read(key)
        if known is None:
            one, other = (tensor.cpu().contiguous() for tensor in encode())
            known = one, other
            self._made += 1
            if self._writes:
                self._new[key] = known
                if sum(tensor.nbytes for encoding in self._new.values() for tensor in encoding) > _FILE_BYTES:
                    self._write()
        else:
            self._found += 1
        self._known[key] = known
        return known

    def _read(self, key: str) -> Encoding | None:
        path = self._places.get(key)
        if path is None:
            return None
        with self._damage_told(path):
            file = self._open[path]
            # Copies: no file stays open for what it holds.
            one, other = (file.get_tensor(name).clone() for name in _names(key))
            if _digest((one, other)) != file.metadata()[key]:
                raise SafetensorError("its content is not what was written")
            with contextlib.suppress(OSError):  # a folder that others keep, to be read only
                os.utime(path)
            return one, other
        return None

    @contextlib.contextmanager
    def _damage_told(self, path: Path) -> Iterator[None]:
        """A file that can't be read is named and removed; what it held is made anew."""
        try:
            yield
        except FileNotFoundError:  # another process has removed it
            pass
        except (OSError, SafetensorError) as error:
            logger.warning("%s: damaged (%s); what it held is encoded anew", path, error)
            lost = [key for key, place in self._places.items() if place == path]
            for key in lost:
                del self._places[key]
                if self._writes and key in self._known:  # read before the damage was met
                    self._new[key] = self._known[key]
            with contextlib.suppress(OSError):
                path.unlink()

    def _write(self) -> None:
        folder = self._kept.folder
        if not self._new or folder is None:
            return
        tensors = {
            name: tensor
            for key, encoding in self._new.items()
            for name, tensor in zip(_names(key), encoding, strict=True)
        }
        digests = {key: _digest(encoding) for key, encoding in self._new.items()}
        self._new = {}
        # A name of its own: two runs that encode the same write two files.
        path = folder / f"{self._key}-{uuid.uuid4().hex}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(tensors, digests))
            self._kept.prune()
        except (OSError, UserError) as error:
            self._writes = False
            logger.warning("%s are not kept for later runs: %s", self._what, error)


def _names(key: str) -> tuple[str, str]:
    return f"{key}.0", f"{key}.1"


def _digest(tensors: Iterable[Tensor]) -> str:
    """A hash of some tensors' shapes, types and bits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _key_of(models: Sequence[nn.Module], device: torch.device) -> str:
    """A hash of all that decides what encoders make of what they are shown, but for that itself."""
    sha = hashlib.sha256(repr(_circumstances(device)).encode())
    with ThreadPoolExecutor() as threads:
        for model in models:
            settings: Any = getattr(model, "config", {})
            settings = dict(settings.to_dict() if hasattr(settings, "to_dict") else settings)
            # Those with a _ tell where it was loaded from.
            public = sorted(
                (name, repr(value)) for name, value in settings.items() if not name.startswith("_")
            )
            weights = model.state_dict()
            sha.update(repr((type(model).__name__, public, list(weights))).encode())
            for digest in threads.map(lambda weight: _digest([weight]), weights.values()):
                sha.update(digest.encode())
    return sha.hexdigest()[:16]


def _circumstances(device: torch.device) -> list[object]:
    """What may decide the last bits of a result."""
    known: list[object] = [
        package_versions(*LIBRARIES),
        torch.__version__,
        device.type,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    ]
    if device.type == "cuda":
        known += [torch.cuda.get_device_name(device), torch.backends.cudnn.version()]
        known += [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark]
    return known
