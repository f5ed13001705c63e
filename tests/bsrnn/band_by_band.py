"""BSRNN written from its published equations alone: one module for each band, one loop over bands.

Independent of `bsrnn`: torch's own layers, nothing batched over bands, and the names of modules that the
FastEnhancer repository's checkpoints have. Slow on purpose: it is what the fast one is compared to.

Equations (arXiv 2212.00406, section 2; arXiv 2509.21867, table of BSRNN): with X the compressed STFT,
    z_k  = W_k BN(Re X_k, Im X_k) + b_k                            for band k
    z   += W LSTM_time(BN(z)) + b;   z += W BiLSTM_band(BN(z)) + b   for every layer
    M_k  = GLU(W tanh(W BN(z_k) + b) + b),   R_k alike               for band k
    Y    = M X + R
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = [2] + [3] * 10 + [8] * 12 + [16] * 7 + [17]


def over_features(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch normalisation over the last axis of a tensor of any shape."""
    return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class Split(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.ModuleList([nn.BatchNorm1d(2 * width) for width in WIDTHS])
        self.fc = nn.ModuleList([nn.Conv1d(2 * width, channels, kernel_size=1) for width in WIDTHS])


class Decoder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp_mask = nn.ModuleList([self.head(channels, width) for width in WIDTHS])
        self.mlp_residual = nn.ModuleList([self.head(channels, width) for width in WIDTHS])

    @staticmethod
    def head(channels: int, width: int) -> nn.Sequential:
        narrow, wide = nn.Conv1d(channels, 4 * channels, 1), nn.Conv1d(4 * channels, 4 * width, 1)
        return nn.Sequential(nn.BatchNorm1d(channels), narrow, nn.Tanh(), wide, nn.GLU(dim=1))


class BandByBand(nn.Module):
    """Noisy waveform (B, samples) → (enhanced waveform, enhanced compressed spectrum (B, F, T))."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.band_split = Split(channels)
        self.norm_time, self.norm_freq = (
            nn.ModuleList([nn.BatchNorm1d(channels) for _ in range(layers)]) for _ in range(2)
        )
        self.rnn_time = nn.ModuleList([nn.LSTM(channels, 2 * channels, batch_first=True) for _ in range(layers)])
        self.fc_time = nn.ModuleList([nn.Linear(2 * channels, channels) for _ in range(layers)])
        self.rnn_freq = nn.ModuleList(
            [nn.LSTM(channels, 2 * channels, batch_first=True, bidirectional=True) for _ in range(layers)]
        )
        self.fc_freq = nn.ModuleList([nn.Linear(4 * channels, channels) for _ in range(layers)])
        self.mask_decoder = Decoder(channels)
        self.register_buffer("window", torch.hann_window(512), persistent=False)

    def forward(self, noisy: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.stft(noisy, 512, 256, window=self.window, return_complex=True)  # (B, F, T)
        magnitude = torch.view_as_real(spectrum).square().sum(-1).clamp(min=1e-10).sqrt()
        compressed = spectrum / magnitude**0.7
        enhanced = self.network(compressed)
        magnitude = torch.view_as_real(enhanced).square().sum(-1).clamp(min=1e-20).sqrt()
        waveform = torch.istft(enhanced * magnitude ** (7 / 3), 512, 256, window=self.window, length=noisy.shape[1])
        return waveform, enhanced

    def network(self, x: Tensor) -> Tensor:
        batch, _, frames = x.shape
        bins = torch.split(x, WIDTHS, dim=1)
        bands = []
        for part, norm, fc in zip(bins, self.band_split.norm, self.band_split.fc, strict=True):
            features = torch.view_as_real(part).permute(0, 1, 3, 2).reshape(batch, -1, frames)  # re and im in turn
            bands.append(fc(norm(features)))  # (B, C, T)
        z = torch.stack(bands, dim=1).transpose(2, 3)  # (B, K, T, C)
        for norm, rnn, fc, norm_band, rnn_band, fc_band in zip(
            self.norm_time, self.rnn_time, self.fc_time, self.norm_freq, self.rnn_freq, self.fc_freq, strict=True
        ):
            over_time, _ = rnn(over_features(norm, z).flatten(0, 1))
            z = z + fc(over_time).view(z.shape)
            over_bands, _ = rnn_band(over_features(norm_band, z).transpose(1, 2).flatten(0, 1))  # (B·T, K, 4C)
            z = z + fc_band(over_bands).view(batch, frames, len(WIDTHS), -1).transpose(1, 2)
        outputs = []
        for k, part in enumerate(bins):
            zk = z[:, k].transpose(1, 2)  # (B, C, T)
            mask, residual = (
                torch.view_as_complex(head(zk).view(batch, -1, 2, frames).transpose(2, 3).contiguous())
                for head in (self.mask_decoder.mlp_mask[k], self.mask_decoder.mlp_residual[k])
            )
            outputs.append(mask * part + residual)
        return torch.cat(outputs, dim=1)
