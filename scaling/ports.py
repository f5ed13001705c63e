"""A port for the processes of a run to meet at."""

from __future__ import annotations

import contextlib
import random
import socket

# Below those that Linux gives to whoever asks for any: rank 0 listens there only when it has loaded everything.
PORTS = range(15000, 32768)


def free_port(address: str = "") -> int:
    """A port that nobody listens on at this moment, at `address` of this machine ("": at any); seldom the same."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return port
    raise RuntimeError(f"of 100 ports from {PORTS.start} to {PORTS.stop - 1} none is free on this machine")
