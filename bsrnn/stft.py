"""Waveform to compressed spectrum and back.

Silence is added to a signal's end up to a whole number of hops. Without that the last samples of a ragged one
would lie under the end of one window alone, whose square, nearly 0, the inverse divides by. Then frames are
centred, as torch.stft does by default: frame t looks at samples [t·hop - n_fft/2, t·hop + n_fft/2), and a
signal of N samples has ceil(N / hop) + 1 frames.
Compression raises the magnitude to a power and keeps the phase, |X|^p · X/|X|.
Everything here is computed in 32 bits whatever the training's precision is:
a bfloat16 STFT does not exist on CPU and is too coarse on GPU.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

# Below this magnitude the input's compression is linear, so that silence has a finite gain.
MAGNITUDE_FLOOR = 1e-5


def compress(spectrum: Complex[Tensor, "*shape"], exponent: float) -> Complex[Tensor, "*shape"]:
    """Raise the magnitude to `exponent` (at most 1), keep the phase; the magnitude counts as at least 1e-5."""
    if exponent == 1:
        return spectrum
    # The norm of (real, imaginary) has gradient 0 at 0, where that of a complex modulus may be NaN.
    magnitude = torch.linalg.vector_norm(torch.view_as_real(spectrum), dim=-1).clamp(min=MAGNITUDE_FLOOR)
    return spectrum * magnitude.pow(exponent - 1)


def decompress(spectrum: Complex[Tensor, "*shape"], exponent: float) -> Complex[Tensor, "*shape"]:
    """The inverse of `compress` for magnitudes above its floor."""
    if exponent == 1:
        return spectrum
    magnitude = torch.linalg.vector_norm(torch.view_as_real(spectrum), dim=-1)
    return spectrum * magnitude.pow(1 / exponent - 1)


def whole_hops(num_samples: int, n_fft: int, hop_length: int) -> int:
    """The samples of a signal with the silence at its end: hops that hold it and can be mirrored at both ends."""
    return -(-max(num_samples, n_fft // 2 + 1) // hop_length) * hop_length


class CompressedSTFT(nn.Module):
    """The Hann-windowed STFT, times `gain`, with compressed magnitude, and its inverse."""

    window: Tensor

    def __init__(self, n_fft: int, hop_length: int, exponent: float, gain: float = 1.0) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.exponent = exponent
        # The inverse divides by the window's square, so a factor of the window is undone there. A window on the
        # meta device, of a model that is only counted, would make torch load its decompositions: a second.
        self.register_buffer("window", gain * torch.hann_window(n_fft, device="cpu"), persistent=False)

    def forward(self, waveform: Float[Tensor, "batch sample"]) -> Complex[Tensor, "batch bin frame"]:
        """The compressed spectrum of a waveform of at least one sample."""
        num_samples = waveform.shape[-1]
        padding = whole_hops(num_samples, self.n_fft, self.hop_length) - num_samples
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                F.pad(waveform.float(), (0, padding)),
                self.n_fft,
                self.hop_length,
                window=self.window,
                return_complex=True,
            )  # (B, F, T)
            return compress(spectrum, self.exponent)

    def inverse(
        self, spectrum: Complex[Tensor, "batch bin frame"], num_samples: int
    ) -> Float[Tensor, "batch {num_samples}"]:
        """The waveform of a compressed spectrum, `num_samples` long.

        As torch.istft, but for that one's check of the envelope, for which a GPU is waited for and which a CUDA graph
        cannot hold. Of whole hops no sample lies under the end of one window alone.
        """
        start, num_frames = self.n_fft // 2, spectrum.shape[-1]
        with torch.autocast(spectrum.device.type, enabled=False):
            frames = torch.fft.irfft(decompress(spectrum, self.exponent), self.n_fft, dim=1)  # (B, n_fft, T)
            window = self.window.unsqueeze(-1)
            own = slice(start, start + num_samples)  # before it, the first frame's window begins with 0
            signal = self._overlap_add(frames * window)[:, own]
            return signal / self._overlap_add(window.square().expand(1, -1, num_frames))[:, own]

    def _overlap_add(self, frames: Float[Tensor, "batch sample frame"]) -> Float[Tensor, "batch total"]:
        total = self.n_fft + self.hop_length * (frames.shape[-1] - 1)
        return F.fold(frames, (1, total), (1, self.n_fft), stride=(1, self.hop_length))[:, 0, 0]
