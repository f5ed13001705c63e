"""BSRNN, the band-split recurrent network for speech enhancement, as one could publish it alone."""

import sys

if sys.argv[:1] == ["-m"]:  # a command of this room starts: an interrupt while Python imports is no traceback
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

from bsrnn.model import BSRNN, BSRNNConfig, Enhanced

__all__ = ["BSRNN", "BSRNNConfig", "Enhanced"]
