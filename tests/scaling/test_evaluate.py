"""Scores of a run, or of folders of wav files; an utterance that a metric refuses is counted, not dropped."""

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

from scaling.metrics import pesq_wb, si_sdr, versions


def test_folders_of_wavs_are_scored_one_row_an_utterance(speech, tmp_path: Path, command):
    noisy, clean = speech
    silence = np.zeros(8_000, dtype=np.float32)
    signals = {"p1_001": (noisy, clean, 0.5 * (noisy + clean)), "p1_002": (silence, silence, silence)}
    for name, triple in signals.items():
        for folder, signal_ in zip(("noisy", "clean", "enhanced"), triple, strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            soundfile.write(tmp_path / folder / f"{name}.wav", signal_, 16_000, subtype="FLOAT")
    words = ("noisy=noisy", "clean=clean", "enhanced=enhanced", "scores=out.jsonl")
    words += ("metrics=[pesq_wb,si_sdr,covl]", "processes=1")
    done = command("scaling.evaluate", *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["p1_001", "p1_002"]
    assert rows[0]["pesq_wb"] == pytest.approx(pesq_wb(0.5 * (noisy + clean), clean), abs=1e-3)
    assert rows[0]["unprocessed_si_sdr"] == pytest.approx(si_sdr(noisy, clean), abs=1e-3)
    assert rows[0]["refused"] == {}
    assert rows[0]["covl"] > rows[0]["unprocessed_covl"]
    assert "stoi" not in rows[0]
    assert json.loads((tmp_path / "out.versions.json").read_text()) == versions(["pesq_wb", "si_sdr", "covl"])
    assert rows[1]["pesq_wb"] is None
    assert "No utterances detected" in rows[1]["refused"]["pesq_wb"]
    assert "No utterances detected" in rows[1]["refused"]["unprocessed_pesq_wb"]
    assert '"pesq_wb_refused": 1' in done.stdout

    (tmp_path / "enhanced" / "p1_002.wav").rename(tmp_path / "aside.wav")  # the hard one, on which a system failed
    done = command("scaling.evaluate", *words)
    assert (done.returncode, "enhanced/p1_002.wav: no such file, the twin of clean/p1_002.wav" in done.stderr) == (
        2,
        True,
    )
    (tmp_path / "aside.wav").rename(tmp_path / "enhanced" / "p1_002.wav")
    os.remove(tmp_path / "clean" / "p1_002.wav")
    done = command("scaling.evaluate", *words)
    assert done.returncode == 2
    assert "clean/p1_002.wav: no such file, the twin of enhanced/p1_002.wav" in done.stderr
    soundfile.write(tmp_path / "clean" / "p1_002.wav", np.zeros(8_000), 48_000)
    done = command("scaling.evaluate", *words)
    assert "clean/p1_002.wav: 48000 Hz, mono, 8000 samples; expected 16000 Hz" in done.stderr
    done = command("scaling.evaluate", *words[:4], "metrics=[mos]")
    assert done.returncode == 2
    assert "metrics: mos is not a metric; expected names among pesq_wb, stoi, " in done.stderr
    (tmp_path / "folder.jsonl").mkdir()
    for wrong in ("folder.jsonl", "enhanced/p1_001.wav"):
        done = command("scaling.evaluate", *words[:3], f"scores={wrong}")
        assert (done.returncode, done.stdout) == (2, ""), "before anything is scored"
        assert f"scores = {wrong}: expected a file to write, named like scores.jsonl" in done.stderr
    (tmp_path / "file").touch()
    for folder, why in (("file", "File exists"), ("file/below", "Not a directory")):
        done = command("scaling.evaluate", *words[:3], f"scores={folder}/x.jsonl", "processes=1")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), "before anything is scored"
        assert f"error: {folder} cannot be written ({why}): name another file with scores=FILE" in done.stderr
    for given in (["noisy"], ["run", "scores"]):
        done = command("scaling.evaluate", *(f"{name}={name}.jsonl" for name in given))
        assert done.returncode == 2
        assert f"evaluate was given {', '.join(given)}: expected run=DIR alone, or all of noisy=DIR" in done.stderr


def test_a_finished_run_can_be_scored_again_and_an_unfinished_one_says_so(tiny_run: list[str], tmp_path: Path, command):
    short = [*tiny_run, "train.budget.steps=3", "execution.metrics=[si_sdr,stoi]"]
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
    done = command("scaling.evaluate", f"run={run}", "processes=1", "metrics=[si_sdr,segmental_snr]")
    assert done.returncode == 0, done.stderr
    more = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert [row["id"] for row in more] == [row["id"] for row in after]
    assert {"segmental_snr", "unprocessed_segmental_snr"} == more[0].keys() - after[0].keys()
    assert [row["stoi"] for row in more] == [row["stoi"] for row in after], "other metrics stay"
    assert json.loads((run / "scores.versions.json").read_text()) == versions(["si_sdr", "stoi", "segmental_snr"])
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
