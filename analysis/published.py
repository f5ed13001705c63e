"""Published results on the VoiceBank+DEMAND test set, as reference points beside a study's own.

Only results on the same test set belong in one figure: of other corpora they show where published systems stand, not
which is better. Sources: [1] FastEnhancer (arXiv 2509.21867), its tables of FastEnhancer and BSRNN, metrics of the
VoiceBank+DEMAND test set; [2] github.com/sungwon23/BSRNN.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A system: multiply-accumulates per second of audio, and its metrics by key."""

    name: str
    macs_per_second: float
    metrics: dict[str, float]
    source: str
    short: str


def _system(name: str, short: str, macs: float, source: str, *values: float) -> Published:
    keys = ("pesq_wb", "stoi", "estoi", "si_sdr")
    return Published(name, macs, dict(zip(keys, values, strict=False)), source, short)


SYSTEMS = (
    _system("BSRNN xt (mean of 5 seeds)", "BSRNN xt", 245e6, "[1]", 3.06, 0.942, 0.855, 18.9),
    _system("FastEnhancer T", "FE-T", 60e6, "[1]", 2.99, 0.940, 0.850, 18.6),
    _system("FastEnhancer B", "FE-B", 262e6, "[1]", 3.13, 0.945, 0.861, 19.0),
    _system("FastEnhancer S", "FE-S", 664e6, "[1]", 3.19, 0.947, 0.866, 19.2),
    _system("FastEnhancer M", "FE-M", 2.9e9, "[1]", 3.24, 0.950, 0.873, 19.4),
    _system("FastEnhancer L", "FE-L", 12e9, "[1]", 3.26, 0.952, 0.877, 19.6),
    _system("BSRNN, metric discriminator, 1 frame of look-ahead", "BSRNN-MD", 6.4e9, "[2]", 3.10, 0.95),
)
UNPROCESSED = {"pesq_wb": 1.97, "stoi": 0.921, "estoi": 0.787, "si_sdr": 8.45}
CORPUS = "vbd"  # the corpus of a study whose numbers these may be compared with
SOURCES = "[1] FastEnhancer, arXiv 2509.21867; [2] github.com/sungwon23/BSRNN"
