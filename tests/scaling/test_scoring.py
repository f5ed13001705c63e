"""An utterance's row of scores, and what need not be computed again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

import scaling.scoring
from scaling.errors import UnreachableError
from scaling.metrics import si_sdr
from scaling.scoring import Utterance, score_utterances


def test_unprocessed_scores_that_are_known_are_not_taken_again_and_missing_ones_are(speech):
    noisy, clean = speech
    record = {"id": "p1_001", "speaker": "p1", "noise": None, "snr_db": None, "duration": 1.0}
    known = {"p1_001": {"stoi": (0.123, None), "estoi": (None, "because")}}
    utterances = [Utterance(record, noisy, clean, clean)]
    (row,) = score_utterances(utterances, 1, 1, ["stoi", "estoi", "si_sdr"], known)
    assert row["unprocessed_stoi"] == 0.123
    assert row["unprocessed_estoi"] is None
    assert row["refused"]["unprocessed_estoi"] == "because"
    assert row["unprocessed_si_sdr"] == pytest.approx(si_sdr(noisy, clean))
    assert row["stoi"] == pytest.approx(1)
    names = [f"{prefix}{name}" for prefix in ("", "unprocessed_") for name in ("stoi", "estoi", "si_sdr")]
    assert set(row) == {*record, *names, "refused"}


def test_a_scoring_process_that_freezes_ends_the_scoring_in_a_stated_time(speech, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling.scoring, "LONGEST_SCORING", 3.0)
    noisy, clean = speech
    record = {"id": "p1_001", "speaker": "p1", "noise": None, "snr_db": None, "duration": 1.0}
    frozen: list[multiprocessing.process.BaseProcess] = []

    def utterances() -> Iterator[Utterance]:
        yield Utterance(record, noisy, clean, clean)
        frozen.extend(multiprocessing.active_children())
        for process in frozen:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)

    begun = time.monotonic()
    with pytest.raises(UnreachableError, match=r"metrics have given no result for 3 s: they are frozen or hang"):
        score_utterances(utterances(), 1, 1, ["stoi"], {})
    assert time.monotonic() - begun < 20
    assert frozen
    assert not any(process.is_alive() for process in frozen)
