"""Real processes of one run, as a launcher starts them: tests start them, harm them, and read what they say.

They are forked from a server that has imported what they need already, which saves each of them seconds: beside torch
what torch and Accelerate import for the first optimiser.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from torch.nn.parallel import DistributedDataParallel

import scaling.processes
from scaling.ports import free_port
from scaling.processes import join

CONTEXT = multiprocessing.get_context("forkserver")
OF_A_RUN = ("scaling.run", "pystoi", "torch.utils.tensorboard", "torch._dynamo", "deepspeed", "transformers")
CONTEXT.set_forkserver_preload([*OF_A_RUN, "tests.ranks"])

STARTED: list[Rank] = []


@dataclass
class Rank:
    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float = 120) -> int:
        """The exit status; AssertionError with where all ranks are if this one does not end in time."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            said = "\n".join(f"{rank.log.name}, {rank.abort()}:\n{rank.said}" for rank in [*STARTED])
            raise AssertionError(f"{self.log.name}: rank did not end within {timeout} s\n{said}")
        return self.process.exitcode

    def abort(self) -> str:
        """End the rank, if it lives, with its threads' stacks in its log; how it ended."""
        if (status := self.process.exitcode) is not None:
            return f"ended with {status} before"
        os.kill(self.pid, signal.SIGABRT)
        self.process.join(5)
        self.kill()
        return "ended now"

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.pid).children(recursive=True), psutil.Process(self.pid)]:
                process.kill()
        self.process.join()

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def start_ranks(
    words: list[str],
    folder: Path,
    world_size: int,
    *,
    command: str = "train",
    ranks: list[int] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> list[Rank]:
    """Start ranks of a run (all, unless some are named), each with a log of its own in the folder.

    command: "execute" is what `python -m scaling.train` does; "train" ends with the last step, before the
        test set is scored, and says the hash of the weights; "meet and part" does that at each port of the words;
        "fall out" lets rank 1 do what the word says once all have met; "hang at step 3" is
        "execute" in which rank 0 hangs there, as it puts the step on record
    """
    port = port or free_port()
    started = []
    for rank in range(world_size) if ranks is None else ranks:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        log = folder / f"rank-{rank}-of-{world_size}-{port}.log"
        process = CONTEXT.Process(target=_run, args=(command, words, environment, log))
        process.start()
        started.append(Rank(process, log))
    STARTED.extend(started)
    return started


def end_all() -> None:
    """Kill whatever a test has left."""
    while STARTED:
        rank = STARTED.pop()
        if rank.process.is_alive():
            rank.kill()


def run_ranks(words: list[str], folder: Path, world_size: int, **options: str) -> str:
    """Run all ranks to their end, which must be good; the hash of the weights, which they must agree on."""
    ranks = start_ranks(words, folder, world_size, **options)
    hashes = set()
    for rank in ranks:
        status = rank.wait()
        assert status == 0, rank.said
        hashes |= {line.split()[1] for line in rank.said.splitlines() if line.startswith("weights ")}
    assert len(hashes) == 1, f"the ranks ended with different weights: {hashes}"
    return hashes.pop()


def _run(command: str, words: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    try:
        commands = {
            "execute": _execute,
            "train": _train,
            "meet and part": _meet_and_part,
            "fall out": _fall_out,
            "hang at step 3": _hang,
        }
        status = commands[command](words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def _execute(words: list[str]) -> NoReturn:
    from scaling.command import run_main
    from scaling.train import main

    sys.argv = ["scaling.train", *words]
    run_main(main, "")


def _train(words: list[str]) -> int:
    from scaling.cli import load_config
    from scaling.config import RunConfig
    from scaling.plan import plan_run
    from scaling.prepare import open_shards
    from scaling.run import train
    from scaling.stopping import StopFlag

    config = load_config(RunConfig, "run", words)
    plan = plan_run(config, open_shards(config.data))
    execution = config.execution
    with StopFlag() as stop:
        processes = join(
            60,
            execution.silence_timeout,
            execution.step_timeout,
            execution.device,
            needs_group=execution.zero_stage is not None,
        )
        plan.directory.path.mkdir(parents=True, exist_ok=True)
        model, _ = train(plan, plan.directory, processes, stop)
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        print("weights", digest.hexdigest(), flush=True)
        processes.leave()
    return 0


def _meet_and_part(ports: list[str]) -> int:
    """Meet, take gradients over all, and part; the model over them is gone at once, as in a run that is stopped."""
    for port in ports:
        os.environ["MASTER_PORT"] = port
        processes = join(60, 5, 60, "cpu")
        model = DistributedDataParallel(torch.nn.Linear(1, 1))
        model(torch.ones(1, 1)).sum().backward()
        assert processes.watch is not None
        processes.watch.close()
        processes.watch.close = lambda: None  # it gives the group's threads time to come to rest
        processes.leave()
        del model, processes
        gc.collect()
    return 0


def _fall_out(words: list[str]) -> int:
    def fall_out(*ignored: object) -> None:
        if words[0].startswith("freezes"):
            os.kill(os.getpid(), signal.SIGSTOP)
        raise RuntimeError("the GPU is busy")

    if os.environ["RANK"] == "1":
        setattr(scaling.processes, "Watch" if "first sign" in words[0] else "_make_group", fall_out)
    join(60, 5, 600, "cpu")
    return 0


def _hang(words: list[str]) -> NoReturn:
    from scaling.trainer import Trainer

    log = Trainer._log

    def hang(trainer: Trainer, board: object, kind: str, row: dict[str, object]) -> None:
        if trainer.step == 3 and trainer.processes.is_first:
            time.sleep(3600)
        log(trainer, board, kind, row)

    Trainer._log = hang
    _execute(words)
