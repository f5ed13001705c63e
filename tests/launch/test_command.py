"""Words of the commands that look after a study."""

from __future__ import annotations

import re

import pytest

from launch.command import parsed
from scaling.errors import UserError

KEYS = {"study": "the study's folder", "rank": "a rank"}
KNOWN = "expected one of study=... (the study's folder), rank=... (a rank), --follow"


def test_settings_flags_and_names_are_told_apart():
    given = parsed(["xt", "--follow", "study=a=b", "t"], KEYS, flags=("--follow",), rest="runs")
    assert given == {"runs": "xt t", "--follow": "", "study": "a=b"}


def test_a_study_in_the_home_folder_is_named_by_a_tilde(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parsed(["study=~/sizes"], KEYS) == {"study": "/home/somebody/sizes"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sdudy=here", f"sdudy=here: no such setting; {KNOWN}"),
        ("study=", f"study=: not understood; {KNOWN}"),
        ("study", f"study: not understood; {KNOWN}"),
        ("--folow", f"--folow: not understood; {KNOWN}"),
    ],
)
def test_what_is_not_understood_is_told_with_what_would_be(word: str, said: str):
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        parsed([word], KEYS, flags=("--follow",))
