"""Whether scoring a test set keeps every core busy while its utterances are still being enhanced."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from bsrnn import BSRNN, BSRNNConfig
from scaling.cli import load_config
from scaling.config import DEFAULT_METRICS, RunConfig
from scaling.prepare import open_shards
from scaling.scoring import enhance_clips, score_utterances
from scaling.shards import ShardIndex
from tests.benchmarks.page import PERFORMANCE, measured_on, write_block

NUM_UTTERANCES = 824  # of VoiceBank+DEMAND's test set


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    root = tmp_path_factory.mktemp("corpus")
    words = [f"data.root={root / 'corpus'}", f"data.shards={root / 'shards'}"]
    words += ["data.demo.hours=0.04", f"data.demo.test_utterances={NUM_UTTERANCES}"]
    return open_shards(load_config(RunConfig, "run", words).data)


class Watch(threading.Thread):
    """The seconds that each child process has run, and waited for a core, so far (Linux's schedstat)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: dict[int, tuple[float, float]] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            for child in psutil.Process().children():
                try:
                    ran, waited, _ = Path(f"/proc/{child.pid}/schedstat").read_text().split()
                except (OSError, ValueError):
                    continue
                self.seconds[child.pid] = int(ran) / 1e9, int(waited) / 1e9


def busy_seconds() -> float:
    """CPU time of the whole machine's work since it started."""
    user, nice, system, _, _, interrupt, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def test_scoring_keeps_every_core_busy(corpus: ShardIndex):
    """The demo's test set, enhanced by size xt on one thread meanwhile."""
    clips = sorted(corpus.clips("test"), key=lambda clip: clip.id)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    model = BSRNN(BSRNNConfig(16, 6))
    watch = Watch()
    machine, own, started = busy_seconds(), time.process_time(), time.perf_counter()
    enhanced_by = [0.0]

    def utterances():
        yield from enhance_clips(model, corpus, clips)
        enhanced_by[0] = time.perf_counter() - started

    watch.start()
    rows = score_utterances(utterances(), len(clips), cores, DEFAULT_METRICS, {})
    wall, machine, own = time.perf_counter() - started, busy_seconds() - machine, time.process_time() - own
    watch.ended.set()
    assert len(rows) == len(clips)
    workers = sorted(watch.seconds.values(), key=sum)[-cores:]  # beside them is multiprocessing's resource tracker
    busy = [sum(seconds) / wall for seconds in workers]
    own += sum(ran for ran, _ in workers)
    used = own / (wall * cores - max(0.0, machine - own))  # of what other work left over
    hours = sum(clip.duration for clip in clips) / 3600
    write_block(
        PERFORMANCE,
        "scoring",
        f"""## Scoring

`make benchmarks`, `tests/benchmarks/bench_scoring.py`: {len(clips)} utterances ({hours:.2f} h), enhanced and not,
scored with PESQ, STOI, ESTOI and SI-SDR in {cores} processes, enhanced by size xt on one thread meanwhile.

| | |
|---|--:|
| time of each scoring process in which it ran or was ready to run, the least busy one | {100 * min(busy):.0f} % |
| CPU time of scoring and enhancing, of all cores' time that other work left over | {100 * used:.0f} % |
| CPU time of all cores that other work took | {100 * max(0.0, machine - own) / wall / cores:.0f} % |
| CPU time of scoring, a second of audio | {sum(ran for ran, _ in workers) / hours / 3600:.3f} s |
| of the whole time, enhancement had ended after | {100 * enhanced_by[0] / wall:.0f} % |

{measured_on("pesq", "pystoi", "torch")}. Ready to run counts, because other work on the machine takes cores away.
""",
    )
    assert min(busy) >= 0.9
