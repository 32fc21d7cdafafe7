"""A folder of adapter files kept in step with a pool: NAME.safetensors is the adapter NAME."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alore_ext.training.errors import InputError

if TYPE_CHECKING:
    from . import AdapterPool

__all__ = ["AdapterDirectory", "ReloadReport"]

_log = logging.getLogger("alore_ext.serving")

SUFFIX = ".safetensors"
# Any write to the file, and any other file put in its place, changes one of them.
Signature = tuple[int, int, int]


@dataclass(frozen=True)
class ReloadReport:
    """What one look at the folder changed."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # name -> why; the one loaded before stays

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __bool__(self) -> bool:
        return any(asdict(self).values())


class AdapterDirectory:
    """Loads, replaces and removes a pool's adapters as their files come, change and go.

    An active adapter whose file goes is deactivated, and activated again when a file of its name comes, unless another
    is active by then. Adapters that were put in the pool by other means are left alone. Files whose names begin with a
    dot are not looked at: `save_adapter` and others write under such a name and rename.

    Args:
        check: raises for a file that shall not be loaded, before the pool sees it.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(
        self, folder: str | os.PathLike, pool: AdapterPool, check: Callable[[Path], None] = lambda file: None
    ) -> None:
        self.folder, self.pool, self._check = Path(folder), pool, check
        if not self.folder.is_dir():
            raise InputError(f"--adapters: there is no folder {self.folder}")
        self._loaded: dict[str, Signature] = {}
        self._failed: dict[str, tuple[Signature | None, str]] = {}
        self._wanted: str | None = None  # was active when its file went
        self._last_seen: dict[str, Signature] = {}
        self._copies = tempfile.TemporaryDirectory(prefix="alore_ext_")
        self._lock = threading.Lock()

    def reload(
        self, apply: Callable[[Callable[[], None]], None] = lambda change: change(), *, settled_only: bool = False
    ) -> ReloadReport:
        """Bring the pool in step with the folder. Blocks; safe to call from several threads.

        Args:
            apply: runs one change of the pool, between two batches where batches run.
            settled_only: leave out files that changed since the last look, which may be half written, and those
                that failed and have not changed since. Without it, whoever calls vouches that the files are whole.

        Raises:
            OSError: the folder cannot be listed. The pool is left as it is.
        """
        with self._lock:
            found, unreadable = self._scan()
            before, self._last_seen = self._last_seen, found
            report = ReloadReport()
            for name in [name for name in self._loaded if name not in found and name not in unreadable]:
                self._attempt(name, lambda name=name: self._remove(name), apply, report, report.removed)
            for name in [name for name in self._failed if name not in found and name not in unreadable]:
                del self._failed[name]
            for name, reason in unreadable.items():
                if not settled_only or self._failed.get(name) != (None, reason):
                    self._fail(name, None, reason, report)
            for name, signature in found.items():
                if self._loaded.get(name) == signature:
                    self._failed.pop(name, None)
                    continue
                if settled_only and before.get(name) != signature:
                    continue
                if settled_only and self._failed.get(name, (None, ""))[0] == signature:
                    continue
                self._load(name, signature, apply, report)
            return report

    def _scan(self) -> tuple[dict[str, Signature], dict[str, str]]:
        """The files, and why others that are there cannot be looked at."""
        found, unreadable = {}, {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.endswith(SUFFIX):
                    continue
                name = entry.name.removesuffix(SUFFIX)
                try:
                    status = entry.stat()
                except FileNotFoundError:  # gone since it was listed, or a dangling link
                    continue
                except OSError as error:  # a disk's or a network's trouble: what was loaded stays
                    unreadable[name] = error.strerror or str(error)
                    continue
                if stat.S_ISREG(status.st_mode):
                    found[name] = _signature(status)
        return dict(sorted(found.items())), unreadable

    def _load(self, name: str, signature: Signature, apply, report: ReloadReport) -> None:
        if not name.isprintable():
            self._fail(name, signature, "the file's name has characters that cannot be printed", report)
            return
        file = self.folder / f"{name}{SUFFIX}"
        known = name in self._loaded
        # A private copy: safetensors maps files into memory, and one that is overwritten in place while it is
        # mapped ends the process with SIGBUS.
        copy = Path(self._copies.name) / file.name
        try:
            copy.write_bytes(file.read_bytes())
            if _signature(file.stat()) != signature:
                raise OSError("the file changed while it was read")
        except OSError as error:
            self._fail(name, signature, str(error), report)
            return

        def change() -> None:
            self._check(copy)
            self._replace(name, copy) if known else self._add(name, copy)

        error = self._attempt(name, change, apply, report, report.replaced if known else report.added)
        copy.unlink()
        if error is None:
            self._loaded[name] = signature
            self._failed.pop(name, None)
        else:
            self._failed[name] = (signature, error)

    def _attempt(self, name: str, change, apply, report: ReloadReport, done: list[str]) -> str | None:
        """Apply a change and write down how it went; returns the error's message."""
        try:
            apply(change)
        except Exception as error:  # one adapter's trouble is not the others'
            message = str(error).replace(f"{self._copies.name}{os.sep}", "").replace(repr(_trial(name)), repr(name))
            message = message.strip() or type(error).__name__
            report.failed[name] = message
            _log.warning("adapter %r: %s", name, message)
            return message
        done.append(name)
        return None

    def _fail(self, name: str, signature: Signature | None, message: str, report: ReloadReport) -> None:
        self._failed[name] = (signature, message)
        report.failed[name] = message
        _log.warning("adapter %r: %s", name, message)

    def _add(self, name: str, file: Path) -> None:
        self.pool.add(name, file)
        if name != self._wanted or self.pool.active is not None:
            return
        try:
            self.pool.activate(name)
        except Exception:
            self.pool.remove(name)
            raise
        self._wanted = None
        _log.info("adapter %r is back, and active again", name)

    def _replace(self, name: str, file: Path) -> None:
        """Another file under the same name. A file that cannot take its place leaves the former adapter there."""
        if self.pool.active != name:
            self.pool.add(name, file, replace=True)
            return
        # The active one is replaced once its successor is known to merge too.
        trial = _trial(name)
        self.pool.add(trial, file)
        try:
            self.pool.activate(trial)
            self.pool.add(name, file, replace=True)
        finally:
            self.pool.activate(name)
            self.pool.remove(trial)

    def _remove(self, name: str) -> None:
        if self.pool.active == name:
            self.pool.deactivate()
            self._wanted = name
            _log.warning("adapter %r was active, and its file is gone: activated again when it comes back", name)
        self.pool.remove(name)
        del self._loaded[name]


def _trial(name: str) -> str:
    """What a file that may follow an active adapter is called until then; none that is looked at has such a name."""
    return f".{name}"


def _signature(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino
