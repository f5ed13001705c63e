"""Numbers are written as people read them."""

from __future__ import annotations

import pytest

from analysis.quantities import CEILINGS, CHOSEN_METRICS, METRICS, human_count, human_hours
from scaling.dnsmos import CALIBRATION


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999.6, "1.00 K"),
        (999.4, "999"),
        (0, "0"),
        (254_492, "254 K"),
        (90.1e6, "90.1 M"),
        (3.812e9, "3.81 G"),
        (999_950, "1.00 M"),
        (150, "150"),
        (120e9, "120 G"),
    ],
)
def test_counts_are_written_as_people_say_them(count: float, text: str) -> None:
    assert human_count(count) == text


def test_hours_are_never_written_in_powers_of_ten() -> None:
    assert [human_hours(hours) for hours in (0.37, 9.4, 999.7, 10_000)] == ["0.37", "9.4", "1,000", "10,000"]
    assert [human_hours(hours) for hours in (0, 0.00004, 9.996e-5, 1.234e-7)] == [
        "0",
        "0.00004",
        "0.0001",
        "0.000000123",
    ]


def test_a_fixed_ceiling_is_the_highest_value_that_its_metric_can_take():
    names = ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl")
    for name, (square, slope, constant) in zip(names, CALIBRATION, strict=True):
        assert CEILINGS[name] == pytest.approx(constant - slope**2 / (4 * square), abs=1e-3)
    assert {CEILINGS[name] for name in ("csig", "cbak", "covl", "dnsmos_p808")} == {5.0}
    unbounded = {"si_sdr", "segmental_snr"}
    assert set(CEILINGS) == {metric.key for metric in METRICS + CHOSEN_METRICS} - unbounded
