"""That the processes of a run live: a sign from each to all, a last word, and an end where no exception can reach.

Every rank leaves a sign of life in the run's store every two seconds and reads the others'. A rank that
leaves none for a stated time (killed, frozen, its node gone) is named, and ends the run on all others. So do ranks
that all live and wait for one another. Last words have a time limit too: the storage that they go to may hang.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from torch import distributed

from scaling.errors import first_line
from scaling.own_time import OwnTime
from scaling.statuses import LOST

log = logging.getLogger(__name__)

# With the pause that counts of a suspension two signs come within the shortest silence_timeout that may be set, 5 s.
SECONDS_BETWEEN_SIGNS = 2.0
SECONDS_TO_BE_HEARD = 3 * SECONDS_BETWEEN_SIGNS  # within which whoever lives has read a last word
SECONDS_FOR_LAST_WORDS = 30.0  # to put on record why this process ends, and to tell the others


class LostRankError(Exception):
    """Another rank of the run has died, is frozen, or has failed."""


def within(seconds: float, act: Callable[..., None], *arguments: str) -> None:
    """Do what may hang, in a thread of its own, and go on after so many seconds if it does."""
    acting = threading.Thread(target=act, args=arguments, daemon=True)
    acting.start()
    acting.join(seconds)


class Watch(threading.Thread):
    """Signs of life: this rank's own, and a look at all others', over a connection of its own."""

    def __init__(
        self, store: distributed.TCPStore, rank: int, world_size: int, silence_timeout: float, longest_wait: float
    ) -> None:
        """longest_wait: seconds between two marks of this rank's progress, those in which it is stopped left out"""
        super().__init__(daemon=True, name="watch")
        self.store = distributed.PrefixStore(f"signs-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.rank, self.world_size, self.silence_timeout = rank, world_size, silence_timeout
        self.longest_wait = longest_wait
        self.phase = "joining"
        self.on_loss: Callable[[str], None] = log.critical  # told of a lost rank, by the lowest that lives
        self._where = f"on {socket.gethostname()} (process {os.getpid()})"
        self._count = 0
        self._seen: dict[int, tuple[str, float]] = {}  # rank: its last sign, and when it was new
        self._is_closed = threading.Event()
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._now = OwnTime()
        self._last_look = self._now()
        self._marked = self._now()
        self._sign()

    def run(self) -> None:
        """Look every two seconds; whatever a look says, or that it does not return, ends this process."""
        threading.Thread(target=self._keep_looking, daemon=True, name="look").start()
        # A look hangs where rank 0, which keeps the store, is frozen: no timeout of the store's ends that.
        while not self._is_closed.wait(OwnTime.LONGEST_PAUSE):
            now = self._now()
            silent = now - self._last_look
            if self._lost is None and silent > self.silence_timeout:
                self._lost = f"rank 0, which keeps the store of the run, has given no answer for {silent:.0f} s"
            if self._lost is None and now - self._marked > self.longest_wait:
                self._lost = f"the ranks wait for one another without end, rank by rank: {self.phases()}"
            if self._lost is not None and not self._is_closed.is_set():
                try:
                    within(SECONDS_FOR_LAST_WORDS, self._end_for_the_lost)
                finally:
                    # The main thread may sit in a collective that never returns: no exception would reach it.
                    os._exit(LOST)

    def _end_for_the_lost(self) -> None:
        assert self._lost is not None
        self.on_loss(self._lost)
        self.tell_and_be_heard(f"lost {self._lost}")

    def mark(self) -> None:
        """This rank's main thread has come on: it does not wait, neither in a collective nor for a GPU or storage."""
        self._marked = self._now()

    def _keep_looking(self) -> None:
        while not self._is_closed.wait(SECONDS_BETWEEN_SIGNS) and self._lost is None:
            self._lost = self._look(self.silence_timeout)
            self._last_look = self._now()

    def tell(self, word: str) -> None:
        """Leave a last word, which the others take for what became of this rank."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        within(SECONDS_TO_BE_HEARD, self._say, word)  # where the store is frozen there is nobody to tell

    def _say(self, word: str) -> None:
        with contextlib.suppress(RuntimeError), self._lock:
            self.store.set(str(self.rank), f"{self._where}\t{word}")

    def tell_and_be_heard(self, word: str) -> None:
        """Leave a last word; rank 0, with whom the store goes, stays until the others have read it."""
        self.tell(word)
        if self.rank == 0:
            within(SECONDS_TO_BE_HEARD, self._stay_while_others_are_there)

    def _stay_while_others_are_there(self) -> None:
        with contextlib.suppress(RuntimeError):
            while self._is_anyone_there():
                time.sleep(0.1)

    def _is_anyone_there(self) -> bool:
        """Whether a rank beside this one lives and has not left."""
        with self._lock:
            self._look_at_signs()
        now = self._now()
        return any(
            not sign.partition("\t")[2].startswith(("left", "failed ", "lost ")) and now - since < SECONDS_TO_BE_HEARD
            for sign, since in self._seen.values()
        )

    def close(self) -> None:
        self.tell("left")

    def find_lost(self, seconds: float) -> str | None:
        """The rank that failed or gives no sign, by name; None if all live for `seconds` more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.2)
            lost = self._look(min(self.silence_timeout, seconds * 0.7))
            if lost is not None:
                return lost
        return None

    def phases(self) -> str:
        """What every rank was doing when it last gave a sign."""
        phases = self.phases_of_others() | {self.rank: self.phase}
        return ", ".join(f"{rank} {phase}" for rank, phase in sorted(phases.items()))

    def phases_of_others(self) -> dict[int, str]:
        return {rank: sign.rpartition("\t")[2] for rank, (sign, _) in list(self._seen.items())}

    def _sign(self) -> None:
        self._count += 1
        self.store.set(str(self.rank), f"{self._where}\t{self._count}\t{self.phase}")

    def _look(self, patience: float) -> str | None:
        """Leave a sign, read the others'; what to say if one of them is lost."""
        with self._lock:
            try:
                if not self._is_closed.is_set():
                    self._sign()
                self._look_at_signs()
            except RuntimeError as error:
                return f"rank 0, which keeps the store of the run, is gone ({first_line(error)})"
            now = self._now()
            for rank, (sign, since) in self._seen.items():
                where, _, word = sign.partition("\t")
                if word.startswith("failed "):
                    return f"rank {rank} {where} failed: {word.removeprefix('failed ')}"
                if word.startswith("lost "):
                    return word.removeprefix("lost ")
                if word != "left" and now - since > patience:
                    phase = word.partition("\t")[2]
                    seen = f"{where} has given no sign of life for {now - since:.0f} s, last seen at {phase}"
                    seen = seen if sign else f"has come and given no sign of life in {now - since:.0f} s"
                    return f"rank {rank} {seen}: it was killed, is frozen, or its node is gone"
        return None

    def _look_at_signs(self) -> None:
        for rank in range(self.world_size):
            if rank != self.rank:
                sign = self.store.get(str(rank)).decode() if self.store.check([str(rank)]) else ""
                if rank not in self._seen or sign != self._seen[rank][0]:
                    self._seen[rank] = (sign, self._now())


class Deadline:
    """Ends this process when a thing it does takes too long, where no exception could reach it.

    A loader's worker that is frozen can hold the main process inside a read for ever: the queue's own
    timeout does not cover the exchange with the worker that follows.
    """

    def __init__(self, seconds: float, on_expiry: Callable[[str], None]) -> None:
        """on_expiry: told which child processes are frozen, before the process ends with LOST"""
        self.seconds, self.on_expiry = seconds, on_expiry
        self._now = OwnTime()
        self._since: float | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="deadline")
        self._thread.start()

    @contextmanager
    def running(self) -> Iterator[None]:
        self._since = self._now()
        try:
            yield
        finally:
            self._since = None

    def close(self) -> None:
        """End the thread: one that let go of a model while Python ends would abort the process."""
        self._is_closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_closed.wait(0.5):
            since, now = self._since, self._now()
            if since is not None and now - since > self.seconds:
                try:
                    children = psutil.Process().children(recursive=True)
                    frozen = ", ".join(str(child.pid) for child in children if _is_stopped(child))
                    what = f"worker process {frozen} is frozen" if frozen else "no worker is frozen"
                    within(SECONDS_FOR_LAST_WORDS, self.on_expiry, what)
                    for child in children:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            child.kill()
                finally:  # whatever the last words met
                    os._exit(LOST)


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False
