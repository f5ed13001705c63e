"""The processes of a run: that all of them come, that all of them live, and what they tell one another.

A run is executed by W processes, ranks 0 to W − 1, each started with RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment: by torchrun, by accelerate launch,
or by the launcher's jobs. In order:

1. Every rank checks that MASTER_ADDR resolves, meets rank 0 at a store there, and says it is here.
2. Rank 0 waits for all for a stated time, and tells all the verdict: to go on, or who is missing.
3. From then on every rank leaves a sign of life in the store every two seconds and reads the
   others'. A rank that leaves none for a stated time (killed, frozen, its node gone) is named,
   and ends the run on all others: a collective would wait for it for ever.
4. The process group is made, over the same store. On CPU its collectives have no timeout that matters: theirs would
   count the time for which a run is suspended. The watch ends a rank that does not come on, in time lived.

One process alone needs none of this: `ALONE`.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from scaling.device import name_of, shun_broken_links, uses_gpu
from scaling.errors import MeetingError, UserError, first_line
from scaling.liveness import LostRankError, Watch, within
from scaling.ports import free_port
from scaling.records import RecordError
from scaling.stopping import StoppedError

log = logging.getLogger(__name__)

T = TypeVar("T")

UNBOUNDED = timedelta(days=365)  # of a collective on CPU: `scaling.liveness.Watch` ends a wait
LEFT: list[distributed.ProcessGroup] = []  # the group that this process has parted from last
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECONDS_TO_NAME_THE_LOST = 12.0  # after a collective has broken


@dataclass
class Processes:
    """This process among the W of a run; its methods are collectives, called by every rank in the same order."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    watch: Watch | None = field(default=None, repr=False)
    timeout: timedelta | None = None  # of a collective

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes the run's records."""
        return self.rank == 0

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """What every rank gave, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        with self.naming_the_lost():
            distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; where it raises UserError or RecordError, others exit with 2."""
        if self.world_size == 1:
            return make()
        error: UserError | RecordError | None = None
        made: tuple[bool, T | None] = (False, None)
        if self.is_first:
            try:
                made = (True, make())
            except (UserError, RecordError) as raised:
                error = raised
        with self.naming_the_lost():
            shared = [made]
            distributed.broadcast_object_list(shared)
        if error is not None:
            raise error
        is_made, value = shared[0]
        if not is_made:
            raise SystemExit(2)  # rank 0 says why
        return value  # type: ignore[return-value]

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.world_size > 1:
            with self.naming_the_lost():
                distributed.all_reduce(x)
        return x

    def gather_tensors(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, stacked in the order of the ranks."""
        if self.world_size == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        with self.naming_the_lost():
            distributed.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    def subgroup(self, size: int) -> distributed.ProcessGroup:
        """The group of `size` ranks side by side that this rank is in; `size` divides the world size."""
        if size == self.world_size:
            assert distributed.group.WORLD is not None
            return distributed.group.WORLD
        firsts = range(0, self.world_size, size)
        groups = [distributed.new_group(list(range(first, first + size)), self.timeout) for first in firsts]
        return groups[self.rank // size]

    def at(self, phase: str) -> None:
        """Leave word of what this rank is doing, for the message if it should be lost."""
        if self.watch is not None:
            self.watch.phase = phase
            self.watch.mark()

    def mark(self) -> None:
        """Say that this rank has come on; one that does not for two `step_timeout` is taken to hang."""
        if self.watch is not None:
            self.watch.mark()

    def is_any_at(self, phase: str) -> bool:
        """Whether another rank was doing this when it last gave a sign, at most two seconds ago; no collective."""
        return self.watch is not None and phase in self.watch.phases_of_others().values()

    @contextmanager
    def naming_the_lost(self, whatever_fails: bool = True) -> Iterator[None]:
        """A context in which a broken collective becomes LostRankError, which names the rank that broke it.

        whatever_fails: take every RuntimeError for one that does not say that it is this rank's own, not only those
            that say so
        """
        self.mark()
        try:
            yield
            self.mark()
        except RuntimeError as error:
            is_of_one = whatever_fails and not _is_of_this_rank(error)
            if self.watch is None or self.world_size == 1 or not (is_of_one or _is_of_a_collective(error)):
                raise
            lost = self.watch.find_lost(SECONDS_TO_NAME_THE_LOST)
            if lost is None:
                raise
            raise LostRankError(lost) from error

    def tell_failure(self, reason: str) -> None:
        """Let the other ranks know that this rank ends, and why."""
        if self.watch is not None:
            self.watch.tell_and_be_heard(f"failed {reason}")

    def tell_loss(self, lost: str) -> None:
        """Let the other ranks know that this rank ends because another is lost, in the words that name that one."""
        if self.watch is not None:
            self.watch.tell_and_be_heard(f"lost {lost}")

    def leave(self, wait: bool = True) -> None:
        """Part from the group; with `wait` in good order, together. This process may go on alone."""
        if self.watch is not None:
            if wait:
                self.barrier()
            self.watch.close()
            if wait:
                # Kept, so that DDP's reducer is not the last to let go of it: that would hold Python's lock while it
                # waits for the group's threads, and they need the lock to let go of the last collective's tensors.
                assert distributed.group.WORLD is not None
                LEFT[:] = [distributed.group.WORLD]
                distributed.destroy_process_group()
        self.world_size, self.watch = 1, None


ALONE = Processes()


def join(
    rendezvous_timeout: float,
    silence_timeout: float,
    step_timeout: float,
    device: str = "auto",
    needs_group: bool = False,
) -> Processes:
    """Meet the other processes of the run, as the environment names them.

    rendezvous_timeout: seconds within which all ranks must have come
    silence_timeout: seconds without a sign of life after which a rank counts as lost
    step_timeout: seconds that a rank may take between two collectives
    device: as execution.device; a GPU is one process's alone
    needs_group: make a process group even for one process (DeepSpeed wants one)

    UserError if the environment is incomplete, MASTER_ADDR does not resolve, or two ranks have one GPU; MeetingError if
    it cannot be reached, its port is taken, a rank does not come in time, or some ranks see a GPU and others none.
    """
    world_size = _whole_number("WORLD_SIZE", 1)
    if world_size == 1 and not needs_group:
        for name in VARIABLES:  # of a launcher that started one process: Accelerate would make a group of it
            os.environ.pop(name, None)
        return Processes()
    if world_size == 1:
        values = ("0", "1", "0", "127.0.0.1", str(free_port("127.0.0.1")))
        os.environ |= dict(zip(VARIABLES, values, strict=True))
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE = {world_size} but {', '.join(missing)} not set: start all processes with torchrun, "
            "accelerate launch or python -m launch.sweep"
        )
    rank, local_rank = _whole_number("RANK"), _whole_number("LOCAL_RANK")
    if not 0 <= rank < world_size:
        raise UserError(f"RANK = {rank}: expected 0 to {world_size - 1}, as WORLD_SIZE = {world_size} says")
    host, port = os.environ["MASTER_ADDR"], _whole_number("MASTER_PORT")
    on_gpu = uses_gpu(device)
    if on_gpu:  # before the meeting, since a GPU may take its time or be broken
        shun_broken_links()  # before NCCL makes any
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        # Where each process sees its own GPU alone; Accelerate and DeepSpeed take the variable for the GPU's number.
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    store = _meet(host, port, rank, world_size, rendezvous_timeout)
    try:
        own = _connect(host, port, world_size, False, silence_timeout)
    except RuntimeError as error:
        raise MeetingError(f"rank 0 at {host}:{port} was there and is frozen or gone ({first_line(error)})") from None
    # Longer than what a rank itself allows, so that the one that is late says why before the others give up.
    watch = Watch(own, rank, world_size, silence_timeout, longest_wait=2 * step_timeout)
    watch.start()
    # NCCL waits for as long as this when a group ends, too, and then no watch is left.
    timeout = timedelta(seconds=2 * step_timeout) if on_gpu else UNBOUNDED
    processes = Processes(rank, world_size, local_rank, watch, timeout)
    try:
        _make_group(store, processes, "cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    except LostRankError as error:
        processes.tell_loss(str(error))
        raise
    except BaseException as error:
        processes.tell_failure(f"preempted: {error}" if isinstance(error, StoppedError) else first_line(error))
        raise
    _check_devices(processes, device)
    return processes


def _make_group(store: distributed.Store, processes: Processes, backend: str) -> None:
    with processes.naming_the_lost():
        distributed.init_process_group(
            backend,
            store=distributed.PrefixStore("group", store),
            rank=processes.rank,
            world_size=processes.world_size,
            timeout=processes.timeout,
        )
    processes.barrier()


def _check_devices(processes: Processes, device: str) -> None:
    """UserError if two ranks have the same GPU: NCCL would refuse it in the middle of a step.

    MeetingError if some have one and others do not see any.
    """
    owners: dict[str, int] = {}
    given = processes.gather((name_of(device), socket.gethostname()))
    blind = [f"rank {rank} on {host}" for rank, (gpu, host) in enumerate(given) if not gpu]
    if 0 < len(blind) < len(given):
        raise MeetingError(f"{', '.join(blind)} sees no GPU and the other ranks do: check that node's driver")
    for rank, (gpu, _) in enumerate(given):
        if gpu in owners:
            raise UserError(
                f"ranks {owners[gpu]} and {rank} have one GPU, {gpu}: start as many processes on a node as it has "
                "GPUs, or take execution.device=cpu"
            )
        if gpu:
            owners[gpu] = rank


def _whole_number(variable: str, default: int | None = None) -> int:
    text = os.environ.get(variable, None if default is None else str(default))
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"the environment has {variable} = {text!r}: expected a whole number") from None


def _meet(host: str, port: int, rank: int, world_size: int, timeout: float) -> distributed.Store:
    """The store at rank 0, once every rank has said there that it has come."""
    here = f"rank {rank} on {socket.gethostname()}"
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise UserError(
            f"{here}: MASTER_ADDR = {host} does not resolve ({error.strerror}): the nodes must know each other's names "
            "(DNS or the hosts file), or MASTER_ADDR be an address"
        ) from None
    # Under torchrun its agent keeps the store, else rank 0 does.
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not keeps_store:
            _wait_for_port(host, port, time.monotonic() + timeout)
        attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = distributed.PrefixStore(attempt, _connect(host, port, world_size, keeps_store, timeout))
        store.set(f"here/{rank}", f"{socket.gethostname()} (process {os.getpid()})")
    except (RuntimeError, OSError) as error:
        if keeps_store:
            reason = f"{here} cannot listen on {host}:{port} ({first_line(error)}): set another port"
            raise MeetingError(reason) from None
        raise MeetingError(
            f"{here} did not reach rank 0 at {host}:{port} within {timeout:g} s: "
            "it has not started, or a firewall is between"
        ) from None
    if rank == 0:
        deadline = time.monotonic() + timeout
        absent = [other for other in range(world_size) if not _is_there(store, f"here/{other}", deadline)]
        ranks = ", ".join(map(str, absent))
        verdict = f"rank {ranks} of {world_size} did not come to {host}:{port} within {timeout:g} s" if absent else ""
        store.set("verdict", verdict or "go")
        if verdict:  # the store goes with this process: let those who came read it
            for other in set(range(1, world_size)) - set(absent):
                _is_there(store, f"heard/{other}", time.monotonic() + 5)
    else:
        if not _is_there(store, "verdict", time.monotonic() + timeout + 30):
            raise MeetingError(f"{here}: rank 0 at {host}:{port} said nothing within {timeout:g} s: see its log")
        verdict = store.get("verdict").decode().removeprefix("go")
        if verdict:
            store.set(f"heard/{rank}", "")
    if verdict:
        raise MeetingError(f"{verdict}: see that rank's log; execution.rendezvous_timeout is how long to wait")
    return store


def _connect(host: str, port: int, world_size: int, keeps_store: bool, timeout: float) -> distributed.TCPStore:
    """RuntimeError if there is no answer: made in a thread, since a frozen rank 0 keeps the making for ever."""
    made: list[distributed.TCPStore] = []
    errors: list[RuntimeError] = []

    def connect() -> None:
        limit = timedelta(seconds=timeout)
        try:
            made.append(
                distributed.TCPStore(host, port, world_size, keeps_store, timeout=limit, wait_for_workers=False)
            )
        except RuntimeError as error:
            errors.append(error)

    within(timeout + 1, connect)
    if not made:
        raise errors[0] if errors else RuntimeError(f"no answer from {host}:{port} within {timeout:g} s")
    return made[0]


def _wait_for_port(host: str, port: int, deadline: float) -> None:
    """Until somebody listens there; OSError if nobody does in time. The store's own waiting hears no signal."""
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _is_there(store: distributed.Store, key: str, deadline: float) -> bool:
    """Whether a key comes in time. It is asked for in a thread: where rank 0 is frozen no timeout ends that."""
    found = threading.Event()

    def ask() -> None:
        with suppress(RuntimeError):  # rank 0 has gone
            while not store.check([key]):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)
            found.set()

    within(max(0.0, deadline - time.monotonic()) + 1, ask)
    return found.is_set()


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Whether an error comes from the exchange with other processes, by what it says."""
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket")
    return isinstance(error, distributed.DistError) or any(word in str(error).lower() for word in words)


def _is_of_this_rank(error: RuntimeError) -> bool:
    """Whether an error comes from this rank alone, by what it says: of a loader's worker it may be raised anywhere."""
    return isinstance(error, torch.OutOfMemoryError) or "DataLoader worker (pid" in str(error)
