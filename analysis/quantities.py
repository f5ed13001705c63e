"""The quantities a study measures, and how their numbers are written in tables and on axes.

A metric that the evaluation adds needs an entry here only for a proper name: an unknown one is
carried through tables and figures under its own key, with three digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

MISSING = "–"


@dataclass(frozen=True)
class Quantity:
    """What a column of numbers measures."""

    key: str  # its name in records and frames
    label: str  # its name for a reader
    digits: int = 3  # decimals in a table
    unit: str = ""
    higher_is_better: bool = True

    @property
    def heading(self) -> str:
        """Name, unit and the direction of better: "SI-SDR (dB) ↑"."""
        return f"{self.axis} {'↑' if self.higher_is_better else '↓'}"

    @property
    def axis(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


VALIDATION_LOSS = Quantity("validation_loss", "Validation loss", digits=4, higher_is_better=False)

# Where the speakers of validation were trained on too (data.train_on_validation): in all runs, and in some.
TRAINED_LOSS = replace(VALIDATION_LOSS, label="Loss on training speakers")
MIXED_LOSS = replace(VALIDATION_LOSS, label="Loss on held-out or training speakers")


def loss_of(train_on_validation: Iterable[bool]) -> Quantity:
    """What the validation loss of these runs is."""
    kinds = {bool(trained) for trained in train_on_validation}
    return MIXED_LOSS if len(kinds) > 1 else TRAINED_LOSS if True in kinds else VALIDATION_LOSS


METRICS = (
    Quantity("pesq_wb", "PESQ-WB"),
    Quantity("stoi", "STOI"),
    Quantity("estoi", "ESTOI"),
    Quantity("si_sdr", "SI-SDR", digits=2, unit="dB"),
)

# Metrics that a study may choose beside these.
CHOSEN_METRICS = (
    Quantity("segmental_snr", "Segmental SNR", digits=2, unit="dB"),
    Quantity("csig", "CSIG"),
    Quantity("cbak", "CBAK"),
    Quantity("covl", "COVL"),
    Quantity("dnsmos_p808", "DNSMOS P.808"),
    Quantity("dnsmos_sig", "DNSMOS SIG"),
    Quantity("dnsmos_bak", "DNSMOS BAK"),
    Quantity("dnsmos_ovrl", "DNSMOS OVRL"),
)

# The highest value that a metric can take, where it has one.
CEILINGS = {"pesq_wb": 4.64, "stoi": 1.0, "estoi": 1.0}
CEILINGS |= {"csig": 5.0, "cbak": 5.0, "covl": 5.0, "dnsmos_p808": 5.0}
CEILINGS |= {"dnsmos_sig": 4.443, "dnsmos_bak": 4.521, "dnsmos_ovrl": 4.644}  # the tops of the published polynomials

# The SI-SDR gain on the noisiest quarter of the test utterances (see reading.noisiest_quarter).
NOISIEST_GAIN = Quantity("noisiest_si_sdr_gain", "SI-SDR gain, noisiest 25 %", digits=2, unit="dB")


def metrics_named(keys: Iterable[str]) -> tuple[Quantity, ...]:
    """METRICS, always, then those of CHOSEN_METRICS among `keys`, then the unknown ones in the order of their names."""
    given = set(keys)
    chosen = tuple(metric for metric in CHOSEN_METRICS if metric.key in given)
    unknown = given - {metric.key for metric in METRICS + CHOSEN_METRICS}
    return METRICS + chosen + tuple(Quantity(key, key.replace("_", " ")) for key in sorted(unknown))


def human_count(count: float, digits: int = 3) -> str:
    """A count as people say it, in three significant digits: 254 K, 90.1 M, 3.81 G."""
    if not math.isfinite(count):
        return MISSING
    if abs(count) < 999.5:  # above, it rounds to 1 K
        return _plain(count)
    scale = math.floor(math.log10(abs(count)) / 3)
    # 999,950 rounds to 1,000 K, which is 1.00 M.
    if float(f"{abs(count) / 1000**scale:.{digits - 1}e}") >= 1000:
        scale += 1
    scale = min(scale, 5)
    scaled = float(f"{count / 1000**scale:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:.{decimals}f} {' KMGTP'[scale]}"


def human_interval(low: float, high: float) -> str:
    """Of a best size: 0 stands for one below the sizes trained, infinity for one beyond them."""
    if math.isnan(low):
        return MISSING
    if high == 0:
        return "below the smallest"
    if math.isinf(low):
        return "beyond the largest"
    first = human_count(low) if low > 0 else "below the smallest"
    return f"{first} to {human_count(high) if math.isfinite(high) else 'beyond the largest'}"


def _plain(value: float) -> str:
    """A number below 1,000 in three significant digits: 150, 0.37, and 0.00004 where Python writes 4e-05."""
    text = f"{value:.3g}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}".rstrip("0") if "e" in text else text


def human_macs(count: float) -> str:
    """Multiply-accumulates: 1.60 TMACs."""
    return f"{human_count(count)}MACs" if math.isfinite(count) else MISSING


def human_hours(hours: float) -> str:
    """Hours of audio in three significant digits, never in powers of ten: 0.37, 9.4, 1,000."""
    if not math.isfinite(hours):
        return MISSING
    return _plain(hours) if abs(hours) < 999.5 else f"{hours:,.0f}"


def round_hours(hours: float) -> float:
    """Hours as a budget: to three significant digits, since whole clips never fill it exactly."""
    return float(f"{hours:.3g}")


def mean_and_spread(mean: float | None, std: float | None, quantity: Quantity, sign: str = "") -> str:
    """Mean ± standard deviation in the quantity's digits; a spread below what they can show is given as a bound."""
    if mean is None or math.isnan(mean):
        return MISSING
    text = f"{mean:{sign}.{quantity.digits}f}"
    if std is None or math.isnan(std):
        return text
    smallest = 10**-quantity.digits
    spread = f"{std:.{quantity.digits}f}" if std == 0 or std >= smallest / 2 else f"<{smallest:.{quantity.digits}f}"
    return f"{text} ± {spread}"


def steps_text(planned: int, taken: float) -> str:
    """Steps of a cell: as planned, and before them the mean of what its runs took where any stopped early."""
    return f"{taken:,.0f} of {planned:,}" if taken < planned else f"{planned:,}"


def axis_value(value: object) -> str:
    """The value of an axis as text."""
    if value is None or value != value:
        return MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)
