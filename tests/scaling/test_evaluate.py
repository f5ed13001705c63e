"""Metrics mean what their definitions say, and an utterance they refuse is counted, not dropped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from scaling.metrics import METRICS, RefusedError, pesq_wb, score, short_time_intelligibility, si_sdr
from scaling.shards import ShardIndex, ShardReader


@pytest.fixture(scope="module")
def speech(tiny_index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    clip = min(tiny_index.clips("test"), key=lambda clip: clip.snr_db)
    noisy, clean = ShardReader(tiny_index.root).read_clip(clip)
    return noisy.astype(np.float32) / 32768, clean.astype(np.float32) / 32768


def test_si_sdr_is_scale_invariant_and_subtracts_no_mean():
    rng = np.random.default_rng(0)
    clean = rng.standard_normal(16_000)
    noise = rng.standard_normal(16_000)
    noise -= noise @ clean / (clean @ clean) * clean  # orthogonal, so the ratio of energies is the definition
    expected = 10 * np.log10((clean @ clean) / (0.01 * noise @ noise))
    assert si_sdr(clean + 0.1 * noise, clean) == pytest.approx(expected)
    assert si_sdr(7 * (clean + 0.1 * noise), clean) == pytest.approx(expected)
    offset = si_sdr(clean + 0.5, clean)
    assert offset == pytest.approx(10 * np.log10(1 / 0.25), abs=0.3)  # a mean would have been subtracted away


def test_every_metric_prefers_less_noise(speech):
    noisy, clean = speech
    better, _ = score(clean + 0.1 * (noisy - clean), clean)
    worse, _ = score(noisy, clean)
    assert set(better) == {"pesq_wb", "stoi", "estoi", "si_sdr"} == set(METRICS)
    for name in METRICS:
        assert better[name] > worse[name], name
    assert better["si_sdr"] - worse["si_sdr"] == pytest.approx(20, abs=0.5)


def test_what_a_metric_refuses_it_refuses_with_the_reason(speech):
    _, clean = speech
    silence = np.zeros(16_000, dtype=np.float32)
    with pytest.raises(RefusedError, match="No utterances detected"):
        pesq_wb(silence, silence)
    with pytest.raises(RefusedError, match="1/4 of a second"):
        pesq_wb(clean[:1_000], clean[:1_000])
    with pytest.raises(RefusedError, match="Not enough STFT frames"):
        short_time_intelligibility(clean[:2_000], clean[:2_000])
    with pytest.raises(RefusedError, match="clean signal is silent"):
        si_sdr(clean, np.zeros_like(clean))
    values, refused = score(silence, silence)
    assert values == dict.fromkeys(METRICS)
    assert set(refused) == set(METRICS)


def test_folders_of_wavs_are_scored_one_row_an_utterance(speech, tmp_path: Path, command):
    noisy, clean = speech
    silence = np.zeros(8_000, dtype=np.float32)
    signals = {"p1_001": (noisy, clean, 0.5 * (noisy + clean)), "p1_002": (silence, silence, silence)}
    for name, triple in signals.items():
        for folder, signal_ in zip(("noisy", "clean", "enhanced"), triple, strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            soundfile.write(tmp_path / folder / f"{name}.wav", signal_, 16_000, subtype="FLOAT")
    words = ("noisy=noisy", "clean=clean", "enhanced=enhanced", "scores=out.jsonl")
    done = command("scaling.evaluate", *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["p1_001", "p1_002"]
    assert rows[0]["pesq_wb"] == pytest.approx(pesq_wb(0.5 * (noisy + clean), clean), abs=1e-3)
    assert rows[0]["unprocessed_si_sdr"] == pytest.approx(si_sdr(noisy, clean), abs=1e-3)
    assert rows[0]["refused"] == {}
    assert rows[1]["pesq_wb"] is None
    assert "No utterances detected" in rows[1]["refused"]["pesq_wb"]
    assert "No utterances detected" in rows[1]["refused"]["unprocessed_pesq_wb"]
    assert '"pesq_wb_refused": 1' in done.stdout

    os.remove(tmp_path / "clean" / "p1_002.wav")
    done = command("scaling.evaluate", *words)
    assert done.returncode == 2
    assert "clean/p1_002.wav: no such file, the twin of enhanced/p1_002.wav" in done.stderr
    soundfile.write(tmp_path / "clean" / "p1_002.wav", np.zeros(8_000), 48_000)
    done = command("scaling.evaluate", *words)
    assert "clean/p1_002.wav: 48000 Hz, mono, 8000 samples; expected 16000 Hz" in done.stderr
    done = command("scaling.evaluate", "noisy=noisy")
    assert done.returncode == 2
    assert "evaluate needs run=DIR, or all of" in done.stderr


def test_a_finished_run_can_be_scored_again_and_an_unfinished_one_says_so(tiny_run: list[str], tmp_path: Path, command):
    short = [*tiny_run, "train.budget.steps=3"]
    assert command("scaling.train", *short).returncode == 0
    (run,) = (tmp_path / "study" / "runs").iterdir()
    before = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    (run / "scores.jsonl").unlink()
    done = command("scaling.evaluate", f"run={run}", "processes=1")
    assert done.returncode == 0, done.stderr
    after = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    for old, new in zip(before, after, strict=True):
        for key, value in old.items():
            assert new[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.with_name("step-00000001"))
    done = command("scaling.evaluate", f"run={run}")
    assert done.returncode == 2
    assert "has checkpoints of 1 of its 3 steps: finish its training" in done.stderr
    done = command("scaling.evaluate", "run=nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no run at nowhere" in done.stderr


def test_scoring_processes_end_with_a_killed_evaluation(speech, tmp_path: Path):
    """No process that a killed evaluation started is left behind."""
    for folder in ("noisy", "clean", "enhanced"):
        (tmp_path / folder).mkdir()
        for number in range(100):  # many seconds of scoring
            soundfile.write(tmp_path / folder / f"p1_{number:03d}.wav", speech[folder == "clean"], 16_000)
    words = ["noisy=noisy", "clean=clean", "enhanced=enhanced", "scores=out.jsonl", "processes=2"]
    process = subprocess.Popen([sys.executable, "-m", "scaling.evaluate", *words], cwd=tmp_path, stderr=-3)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while len(workers) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "the evaluation ended before its workers were seen"
        workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in _words_of(child)]
        time.sleep(0.01)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert not (tmp_path / "out.jsonl").exists()


def _words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it is just being started
        return ""
