"""An interrupt before a command has begun: while Python imports what it needs, which takes it seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each command and the last outside module that it imports, in whose place one stands that is interrupted.
COMMANDS = {
    "bsrnn.enhance": "soxr",
    "bsrnn.onnx": "onnxruntime",
    "bsrnn.convert": "torch",
    "bsrnn.rtf": "torch",
    "scaling.train": "torch",
    "scaling.prepare": "soundfile",
    "scaling.evaluate": "torch",
    "scaling.rtf": "torch",
    "scaling.verify": "numpy",
    "launch.sweep": "omegaconf",
    "launch.status": "rich",
    "launch.preflight": "omegaconf",
    "analysis.report": "pandas",
    "analysis.advise": "numpy",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_while_a_command_imports_says_nothing(command: str, tmp_path: Path):
    (tmp_path / f"{COMMANDS[command]}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        # where a shell starts the tests in the background, interrupts are ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
