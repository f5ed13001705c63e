"""Test signals, and a model that lets them through."""

from __future__ import annotations

import io

import numpy as np
import soundfile
import torch

from bsrnn import BSRNN, BSRNNConfig


def music(num_samples: int, sample_rate: int, num_channels: int) -> np.ndarray:
    """Tones below 4 kHz, other ones in every channel."""
    time = np.arange(num_samples)[:, None] / sample_rate
    tones = 100.0 * (1 + np.arange(num_channels)) + np.array([0, 333, 1_777, 3_000])[:, None, None]
    return (0.1 * np.sin(2 * np.pi * tones * time).sum(0)).astype(np.float32)


def wav(signal: np.ndarray, subtype: str = "PCM_16") -> bytes:
    """A WAV file of 16 kHz, whose data length is in bytes 40 to 44 if it is 16-bit PCM."""
    buffer = io.BytesIO()
    soundfile.write(buffer, signal, 16_000, subtype=subtype, format="WAV")
    return buffer.getvalue()


def passing_through() -> BSRNN:
    """A model whose mask is 1 and whose residual is 0: what it makes of a signal is the signal."""
    model = BSRNN(BSRNNConfig(16, 1))
    with torch.no_grad():
        for group, linear in zip(model.mask_decoder.groups, model.mask_decoder.outputs, strict=True):
            linear.weight.zero_()
            linear.bias.zero_()
            linear.bias[::2, : 2 * group.width : 2] = 1  # the real parts of the masks
            linear.bias[::2, 2 * group.width :] = 30  # their gates, open
    return model.eval()
