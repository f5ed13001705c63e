"""An S3 object store on this machine (moto's server), which can be told to answer slowly, wrongly or not at all.

    python tests/reliability/object_store.py

prints its address and serves until it is ended. POST a list of faults to /-faults: each download of
a shard takes one off the list until it is empty, and meets "500", "503", "cut" (half of the body,
then the connection ends) or a number of seconds before the answer. GET /-log lists the downloads.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class FaultyStore:
    """WSGI: the store's own application, behind the faults."""

    def __init__(self) -> None:
        self.store = DomainDispatcherApplication(create_backend_app)
        self.lock = threading.Lock()
        self.faults: list[str | float] = []
        self.log: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/-faults":
            self.faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start_response("204 No Content", [])
            return []
        if path == "/-log":
            start_response("200 OK", [])
            return [json.dumps(self.log).encode()]
        fault: str | float | None = None
        if environ["REQUEST_METHOD"] == "GET" and path.endswith(".tar"):
            with self.lock:
                self.log.append(path.rsplit("/", 1)[-1])
                fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, (int, float)):
            time.sleep(fault)
        elif fault in ("500", "503"):
            start_response(f"{fault} Fault", [])
            return [b"<Error><Code>InternalError</Code><Message>told to fail</Message></Error>"]
        answer = self.store(environ, start_response)
        return _half(answer) if fault == "cut" else answer


def _half(answer: Iterable[bytes]) -> Iterable[bytes]:
    content = b"".join(answer)
    yield content[: len(content) // 2]
    raise ConnectionAbortedError("told to end here")


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, FaultyStore(), threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
