"""What tests share: a tiny demo corpus, made once by the project's own commands, and a way to run those."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.prepare import open_shards
from scaling.shards import ShardIndex
from tests.commands import run_command

# A shell that starts the tests in the background lets them, and all that they start, ignore an interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread: where other work shares the cores, the threads of an LSTM wait for one another longer than they compute.
torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the processes that tests start

# Small enough for a laptop's seconds, and no sounds for the ear; everything else is as users have it.
TINY_RUN = (
    "model=xxt",
    "train.budget.steps=24",
    "train.global_batch=4",
    "train.norm_batch=2",
    "train.crop_seconds=0.5",
    "train.optimiser.warmup_steps=2",
    "execution.log_every=1",
    "execution.checkpoint_every=5",
    "execution.num_validations=1",
    "execution.samples_every=null",
    "execution.threads=1",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    counts = "how often tests/reliability injects each fault; full rewrites the figures of docs/reliability.md"
    parser.addoption("--reliability", choices=("quick", "full"), default="quick", help=counts)


def pytest_configure(config: pytest.Config) -> None:
    """The tests are of the CPU, on a machine with a GPU too; the benchmarks look for one."""
    if "bench_*.py" not in config.getini("python_files"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes of pytest a file's tests share one, as those of the cluster do, which go first."""
    slurm = Path(__file__).parent / "slurm"
    for item in items:
        is_of_cluster = item.path.is_relative_to(slurm)
        item.add_marker(pytest.mark.xdist_group("slurm" if is_of_cluster else str(item.path)))
    items.sort(key=lambda item: not item.path.is_relative_to(slurm))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Several processes that did not keep to the groups would make every module's fixtures, and clusters, twice."""
    if session.config.getoption("loadgroup", False) and any("@" not in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not see the tests' groups: install what constraints.txt has")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a demo corpus of about two and a half minutes, its shards made."""
    root = tmp_path_factory.mktemp("tiny")
    overrides = [
        f"data.root={root / 'corpus'}",
        f"data.shards={root / 'shards'}",
        "data.demo.hours=0.04",
        "data.demo.test_utterances=4",
    ]
    open_shards(load_config(RunConfig, "run", overrides).data)
    return overrides


@pytest.fixture(scope="session")
def tiny_index(tiny_data: list[str]) -> ShardIndex:
    return ShardIndex.load(Path(tiny_data[1].partition("=")[2]))


@pytest.fixture(scope="session")
def tiny_settings() -> tuple[str, ...]:
    return TINY_RUN


@pytest.fixture
def tiny_run(tiny_data: list[str], tmp_path: Path) -> list[str]:
    """Overrides of a run of seconds, in a study of its own."""
    return [*tiny_data, *TINY_RUN, f"study={tmp_path / 'study'}"]


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run a command of the project as a user does: command("scaling.train", "model=xxt", ...)."""

    def run(module: str, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return run_command(module, [*words], tmp_path, os.environ | {"OMP_NUM_THREADS": "1"}, timeout)

    return run
