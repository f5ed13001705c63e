"""An utterance's row of scores, and what need not be computed again."""

from __future__ import annotations

import pytest

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
