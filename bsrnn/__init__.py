"""BSRNN, the band-split recurrent network for speech enhancement, as one could publish it alone."""

from bsrnn.model import BSRNN, BSRNNConfig, Enhanced

__all__ = ["BSRNN", "BSRNNConfig", "Enhanced"]
