"""Shards that are far away: fetched to this machine once, verified, and shared by its processes.

A shard root that is a URL (`s3://bucket/vbd`, `https://host/vbd`, `file:///lustre/vbd`: whatever
fsspec opens) is read through a folder of this machine, the cache:

    CACHE/SHA256.tar        a shard, whole and verified, under the SHA-256 that its index promises
    CACHE/SHA256.damaged    one that had other bytes at its source; its good clips can be read
    CACHE/SHA256.lock       held by the process that fetches it
    CACHE/.SHA256.*.tmp     in the making
    CACHE/lock              held while room is made

1. Whoever needs a shard looks for its file; if it is there it is whole, because only a rename
   gives it that name.
2. Otherwise it takes the shard's lock. A second process waits there and then finds the file.
   The lock dies with its process.
3. Room is made: what killed fetches left goes, whose locks are free, and then the shards used
   longest ago, until the new one fits into `cache_bytes`.
   One that a process is reading stays readable for it, as the file lives on until it is closed.
   Where the shards that others are fetching leave no room, as several runs may share the cache,
   it is waited for as long as one of those comes on.
4. It is read in parts, each with a time limit and a number of attempts, and hashed on the way.
   A wrong SHA-256 is fetched a second time; if the source is at fault, it is kept as damaged and
   every read from it is checked against the clips' own checksums (see `scaling.shards`).
   Whoever loads the index after that fetches it anew: the source may have been mended.

Credentials and addresses come from the environment, as fsspec and its file systems read them
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, FSSPEC_...).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from scaling.errors import DISK_ERRORS, UnreachableError, UserError
from scaling.locks import held_if_free, held_when_free
from scaling.own_time import OwnTime

log = logging.getLogger(__name__)

PART_BYTES = 8 * 2**20
PART_SECONDS = 60.0  # after which a part that has not come is asked for again
FETCH_PAUSES = (0.2, 1.0, 5.0, 20.0)  # seconds before the second, third, ... attempt at a part
ROOM_PAUSE = 0.2  # seconds between looks whether others' fetches have left room
OWN_NAME = re.compile(r"\.?[0-9a-f]{64}\.")  # the cache's own files, beside whatever else its folder holds
NUM_FETCHERS = 2  # threads a process that fetch ahead

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteRoot:
    """A folder of shards behind a URL, and the cache through which it is read."""

    url: str
    cache: Path
    cache_bytes: int
    promised: dict[str, tuple[int, str]] = field(default_factory=dict, compare=False)  # shard: size and SHA-256
    made: float = field(default_factory=time.time, compare=False)  # what was found damaged before is fetched anew

    def __str__(self) -> str:
        return self.url

    def of(self, promised: dict[str, tuple[int, str]]) -> RemoteRoot:
        """The same folder, knowing the shards that its index promises; UserError if one does not fit the cache."""
        name, (largest, _) = max(promised.items(), key=lambda item: item[1], default=("", (0, "")))
        if largest > self.cache_bytes:
            raise UserError(
                f"data.cache_gb = {self.cache_bytes / 1e9:g} does not hold shard {name} of {self.url}, "
                f"{largest / 1e9:.3g} GB: raise it"
            )
        return replace(self, promised=promised)

    def read(self, name: str) -> bytes:
        """A small file as it is at the source now; FileNotFoundError if there is none."""
        filesystem, path = _filesystem(f"{self.url}/{name}")
        return bytes(_persist(f"{self.url}/{name}", _ask, filesystem, "cat_file", path))

    def fetch(self, shard: str) -> Path:
        """The file of a shard on this machine, brought here first if it is not there yet.

        UnreachableError if its source does not answer, FileNotFoundError if there is nothing, UserError if the cache's
        disk takes no more.
        """
        num_bytes, sha256 = self.promised[shard]
        with self._on_disk():
            if (found := self._find(sha256)) is not None:
                return found
            with held_when_free(self.cache / f"{sha256}.lock", patience=_patience(), progress=self._fetches):
                if (found := self._find(sha256)) is not None:  # another process was first
                    return found
                return self._fetch(shard, num_bytes, sha256)

    def open(self, shard: str) -> int:
        """A descriptor of a shard, which stays readable whatever the cache lets go of; errors as in `fetch`."""
        while True:
            path = self.fetch(shard)
            with suppress(FileNotFoundError):  # another run made room in between
                return os.open(path, os.O_RDONLY)

    def discard(self, shard: str) -> bool:
        """Give up this machine's copy of a shard, unless its source is known to be damaged; whether there was one."""
        with self._on_disk(), suppress(FileNotFoundError):
            (self.cache / f"{self.promised[shard][1]}.tar").unlink()
            return True
        return False

    def prefetch(self, shards: Sequence[str]) -> None:
        """Fetch shards in the background, in this order; those asked for earlier and not begun are forgotten."""
        _fetchers().ask(self, shards)

    def try_fetch(self, shard: str) -> None:
        """Fetch a shard unless it is here, another process is at it or others' fetches fill the cache."""
        num_bytes, sha256 = self.promised[shard]
        with self._on_disk():
            if self._find(sha256) is None:
                with held_if_free(self.cache / f"{sha256}.lock") as got_it:
                    if got_it and self._find(sha256) is None:
                        self._fetch(shard, num_bytes, sha256, waits=False)

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """UserError where the cache's disk takes no more; what a source answers has become other errors by then."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(
                f"data.cache = {self.cache} cannot be written ({error.strerror}): make its disk writable and free some "
                f"space, lower data.cache_gb = {self.cache_bytes / 1e9:g}, or name another folder with data.cache=DIR"
            ) from error

    def _find(self, sha256: str) -> Path | None:
        """The shard's file if it is here and need not be looked for anew; one that is whole is marked as used now."""
        whole, damaged = self.cache / f"{sha256}.tar", self.cache / f"{sha256}.damaged"
        with suppress(FileNotFoundError):
            os.utime(whole)
            return whole
        with suppress(FileNotFoundError):
            if damaged.stat().st_mtime >= self.made:  # when it was fetched
                return damaged
        return None

    def _fetch(self, shard: str, num_bytes: int, sha256: str, waits: bool = True) -> Path:
        """Called with the shard's lock held. OSError if there is no room and `waits` is not."""
        for stale in self.cache.glob(f".{sha256}.*.tmp"):
            stale.unlink()
        temporary = self.cache / f".{sha256}.{socket.gethostname()}.{os.getpid()}.tmp"
        began = time.monotonic()
        try:
            self._reserve(temporary, num_bytes, waits)
            found = _download(f"{self.url}/{shard}", temporary, num_bytes)
            if found != sha256:
                log.warning("shard %s/%s came with another SHA-256 than its index says: fetched again", self.url, shard)
                found = _download(f"{self.url}/{shard}", temporary, num_bytes)
            kind = "tar" if found == sha256 else "damaged"
            if found != sha256:
                log.warning("shard %s/%s is damaged at its source: its clips are checked one by one", self.url, shard)
            path = self.cache / f"{sha256}.{kind}"
            os.utime(temporary, (time.time(),) * 2)  # of this machine's clock, as `made` is
            os.rename(temporary, path)
            if kind == "tar":
                (self.cache / f"{sha256}.damaged").unlink(missing_ok=True)
        finally:
            temporary.unlink(missing_ok=True)
        log.info("fetched %s/%s, %.0f MB in %.1f s", self.url, shard, num_bytes / 1e6, time.monotonic() - began)
        return path

    def _reserve(self, temporary: Path, num_bytes: int, waits: bool) -> None:
        """Reserve `num_bytes` in the file `temporary`, once the shards that others are fetching leave room.

        UnreachableError if none of those comes on for as long as a fetch may take over a part, OSError if there is no
        room now and `waits` is not.
        """
        now = OwnTime()
        seen, since = self._make_room(temporary, num_bytes), now()
        if seen and not waits:
            raise OSError(f"the cache {self.cache} is full of shards that are being fetched")
        if seen:
            log.warning(
                "the cache %s is full of shards that are being fetched: waiting for room; the runs that share it would "
                "be faster with more than data.cache_gb = %g",
                self.cache,
                self.cache_bytes / 1e9,
            )
        patience = _patience()
        while seen:
            time.sleep(ROOM_PAUSE)
            others, lived = self._make_room(temporary, num_bytes), now()
            if others != seen:
                seen, since = others, lived
            elif lived - since > patience:
                raise UnreachableError(
                    f"the cache {self.cache} is full of shards that are being fetched, of which none has come on for "
                    f"{patience:g} s: raise data.cache_gb = {self.cache_bytes / 1e9:g}, or end what fetches them"
                )

    def _make_room(self, temporary: Path, num_bytes: int) -> set[tuple[str, int]]:
        """Let go of the shards used longest ago until `num_bytes` fit, and reserve them in the file `temporary`.

        Where they do not fit beside what others are fetching: what these have come to, see `_fetches`.
        """
        with held_when_free(self.cache / "lock", patience=_patience()):
            while (held := self._held()) is None:
                pass
            fetched = [entry for entry in held if entry[2].suffix == ".tmp"]
            if sum(size for _, size, _ in fetched) + num_bytes > self.cache_bytes:
                return self._fetches()
            total = sum(size for _, size, _ in held)
            for _, size, path in sorted(held):
                if total + num_bytes <= self.cache_bytes:
                    break
                if path.suffix != ".tmp":
                    path.unlink(missing_ok=True)
                    total -= size
            with temporary.open("wb") as file:
                file.truncate(num_bytes)
            return set()

    def _fetches(self) -> set[tuple[str, int]]:
        """The files that are being fetched, each with the time when it was last written to."""
        found = set()
        for path in self.cache.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                found.add((path.name, path.lstat().st_mtime_ns))
        return found

    def _held(self) -> list[tuple[int, int, Path]] | None:
        """What the cache holds, each with when it was last used and its bytes; what dead processes began is removed.

        None if a fetch ended while this looked: its file has another name now, which may not have been seen.
        """
        held = []
        for path in self.cache.iterdir():
            if not OWN_NAME.match(path.name):  # somebody's own file
                continue
            if path.suffix == ".tmp":
                with held_if_free(self.cache / f"{path.name.split('.')[1]}.lock") as of_no_process:
                    if of_no_process:
                        path.unlink(missing_ok=True)
                        continue
            if path.suffix in (".tar", ".damaged", ".tmp"):
                try:
                    status = path.lstat()  # a link may lead nowhere
                except FileNotFoundError:
                    return None
                held.append((status.st_mtime_ns, status.st_size, path))
        return held


Root = Path | RemoteRoot  # of a folder of shards


def _patience() -> float:
    """Seconds that a fetch may take over a part."""
    return sum(FETCH_PAUSES) + PART_SECONDS * (len(FETCH_PAUSES) + 1)


# --- one fetch -----------------------------------------------------------------------------


def _download(url: str, target: Path, num_bytes: int) -> str:
    """Write the first `num_bytes` of what is at a URL over `target`; the SHA-256 of what came."""
    filesystem, path = _filesystem(url)
    size = int(_persist(url, _ask, filesystem, "info", path)["size"])
    digest = hashlib.sha256()
    with target.open("r+b") as file:
        done = 0
        while done < min(size, num_bytes):
            end = min(done + PART_BYTES, size, num_bytes)
            part = _persist(url, _read_part, filesystem, path, done, end)
            file.write(part)
            digest.update(part)
            done += len(part)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _read_part(filesystem: Any, path: str, begin: int, end: int) -> bytes:
    """Bytes begin to end of a file; more of them where a server that knows no ranges sends all."""
    part = _ask(filesystem, "cat_file", path, start=begin, end=end)
    if len(part) < end - begin:
        raise OSError(f"{len(part)} bytes came for the {end - begin} from {begin} on")
    return bytes(part) if begin == 0 else bytes(part[: end - begin])


def _ask(filesystem: Any, what: str, path: str, **options: Any) -> Any:
    """A call of a file system, with a time limit where it keeps one."""
    from fsspec.asyn import sync

    if filesystem.async_impl:
        call = getattr(filesystem, f"_{what}")
        return sync(filesystem.loop, call, path, timeout=PART_SECONDS, **options)
    return getattr(filesystem, what)(path, **options)


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, of this process's own, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:  # a protocol that is unknown, or whose package is not installed
        raise UserError(
            f"data.shards = {url} cannot be opened ({error}): install the package, or name another"
        ) from None


def _persist(url: str, call: Callable[..., T], *values: Any) -> T:
    """The result of a call, tried again where it fails; UnreachableError where it goes on failing."""
    for attempt, pause in enumerate((*FETCH_PAUSES, None), start=1):
        try:
            return call(*values)
        except FileNotFoundError:
            raise
        except Exception as error:  # every file system has errors of its own
            if pause is None or isinstance(error, PermissionError):
                attempts = f"{attempt} attempt{'s' * (attempt > 1)}"
                raise UnreachableError(
                    f"{url} cannot be read ({type(error).__name__}: {error}), in {attempts}: "
                    "look whether it is there and may be read, then run the same command again"
                ) from error
            log.warning("%s: %s: %s; trying again in %g s", url, type(error).__name__, error, pause)
            time.sleep(pause)
    raise AssertionError


# --- fetching ahead ------------------------------------------------------------------------


class _Fetchers:
    """Threads of this process that fetch what they are asked for."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._wanted: list[tuple[RemoteRoot, str]] = []
        self._changed = threading.Condition()
        for _ in range(NUM_FETCHERS):
            threading.Thread(target=self._work, daemon=True, name="shard prefetch").start()

    def ask(self, root: RemoteRoot, shards: Sequence[str]) -> None:
        with self._changed:
            self._wanted = [(root, shard) for shard in shards]
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                root, shard = self._wanted.pop(0)
            try:
                root.try_fetch(shard)
            except (OSError, UserError) as error:  # who needs the shard will be told
                log.warning("shard %s was not fetched ahead: %s", shard, error)


_fetchers_of_process: _Fetchers | None = None


def _fetchers() -> _Fetchers:
    global _fetchers_of_process
    if _fetchers_of_process is None or _fetchers_of_process.pid != os.getpid():  # threads do not live through a fork
        _fetchers_of_process = _Fetchers()
    return _fetchers_of_process
