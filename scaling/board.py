"""What a person listens to and looks at while a run trains: test utterances and their spectrograms on TensorBoard.

The noisy and the clean signal of each utterance are written once, the enhanced one at every interval, under
`samples/UTTERANCE/...`. Test utterances choose nothing: these are for the ear alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from bsrnn import BSRNN
from scaling.config import DataConfig
from scaling.plan import sample_clips
from scaling.shard_reader import ShardReader
from scaling.shards import SAMPLE_RATE, ShardIndex
from scaling.stream import to_float

WINDOW, HOP = 512, 128  # samples
RANGE_DB = 80.0  # below full scale


class SampleBoard:
    """The utterances of a run that go to its TensorBoard."""

    def __init__(self, board: Any, data: DataConfig, index: ShardIndex) -> None:
        """board: a SummaryWriter; UserError if `data.samples` names an utterance that the test set lacks"""
        self.board = board
        self.clips = sample_clips(data, index)
        self.reader = ShardReader(index.root)
        self.has_originals = False

    def write(self, model: BSRNN, step: int) -> None:
        """The utterances as the model enhances them after `step`."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            for clip in self.clips:
                noisy, clean = (to_float(torch.from_numpy(part), device) for part in self.reader.read_clip(clip))
                signals = {"enhanced": model(noisy[None]).waveform[0].float()}
                if not self.has_originals:
                    signals |= {"noisy": noisy, "clean": clean}
                for name, signal in signals.items():
                    self._add(f"samples/{clip.id}/{name}", signal.cpu(), step)
        self.has_originals = True
        model.train(was_training)

    def _add(self, tag: str, signal: Tensor, step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that samples beyond full scale are clipped
            self.board.add_audio(tag, signal.clamp(-1, 1)[None], step, SAMPLE_RATE)
        self.board.add_image(f"{tag}/spectrogram", spectrogram_image(signal), step, dataformats="HWC")


def spectrogram_image(signal: Tensor) -> np.ndarray:
    """A waveform of (samples,) as uint8 colours of (bins, frames, 3), low frequencies at the bottom."""
    spectrum = torch.stft(signal, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    decibels = 20 * torch.log10(spectrum.abs() * 2 / WINDOW + 1e-10)  # 0: a sine of amplitude 1, but for the window
    shade = (1 + decibels / RANGE_DB).clamp(0, 1).flip(0).numpy()
    return (matplotlib.colormaps["magma"](shade)[..., :3] * 255).round().astype(np.uint8)
