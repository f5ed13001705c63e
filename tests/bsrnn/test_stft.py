"""A signal of any length is enhanced to its last sample, whole and as a stream, at every front end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.front_end import FRONT_ENDS
from bsrnn.stft import CompressedSTFT, compress, decompress
from bsrnn.streaming import Stream

CONFIGS = {name: BSRNNConfig(8, 1, **vars(front_end), norm="cumulative") for name, front_end in FRONT_ENDS.items()}
CONFIGS["streaming_16khz"] = BSRNNConfig(8, 1, **vars(FRONT_ENDS["streaming_16khz"]))
for rate in (8_000, 16_000, 44_100):
    CONFIGS[f"universal_48khz at {rate} Hz"] = CONFIGS["universal_48khz"].at_sample_rate(rate)


def untrained(name: str) -> BSRNN:
    torch.manual_seed(0)
    return BSRNN(CONFIGS[name]).eval()


def noise(num_samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(1, num_samples, generator=torch.Generator().manual_seed(0))


def streamed(model: BSRNN, signal: torch.Tensor) -> torch.Tensor:
    stream = Stream(model, use_kernel=False)
    parts = [stream.process(chunk) for chunk in signal.split(1_000, dim=1)]
    return torch.cat([*parts, stream.flush()], dim=1)


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_samples_are_no_louder_than_the_others_whatever_the_length(name: str):
    model = untrained(name)
    hop = model.config.hop_length
    loudest = float(model(noise(20 * hop)).waveform.abs().max())
    for over in (1, hop // 2, hop - 2, hop - 1):  # the last is the worst: its last sample is next to a window's end
        enhanced = model(noise(19 * hop + over)).waveform
        assert float(enhanced[:, -hop:].abs().max()) < 2 * loudest, over


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_signal_of_any_length_comes_back_whole_and_as_a_stream_alike(name: str):
    model = untrained(name)
    n_fft, hop = model.config.n_fft, model.config.hop_length
    loudest = float(model(noise(9 * hop)).waveform.abs().max())  # a single sample may be next to nothing
    for num_samples in (1, n_fft // 2, n_fft // 2 + 1, 9 * hop - 1, 9 * hop, 9 * hop + 1):
        signal = noise(num_samples)
        whole = model(signal).waveform
        assert whole.shape == signal.shape
        difference = float((streamed(model, signal) - whole).abs().max())
        scale = float(whole.abs().max()) if num_samples > 1 else loudest
        assert difference <= 1e-5 * scale, num_samples


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_hops_have_the_spectrum_and_the_waveform_that_torch_gives_them(name: str):
    """Nothing is added to them: the spectrum is torch's to the last bit, the waveform but for the order of sums."""
    config, stft = CONFIGS[name], untrained(name).stft
    signal, front_end = noise(9 * config.hop_length), (config.n_fft, config.hop_length)
    spectrum = torch.stft(signal, *front_end, window=stft.window, return_complex=True)
    assert torch.equal(stft(signal), compress(spectrum, config.compression))
    given = compress(spectrum.flip(2), config.compression)
    waveform = torch.istft(
        decompress(given, config.compression), *front_end, window=stft.window, length=signal.shape[1]
    )
    torch.testing.assert_close(stft.inverse(given, signal.shape[1]), waveform, atol=1e-6, rtol=1e-5)


def test_no_sample_of_a_ragged_crop_outweighs_the_others_in_training():
    """The gradient of one sample by the spectrum, over that of a sample in the middle."""
    stft = CompressedSTFT(512, 256, 1.0)
    crop = noise(256 * 20 + 255)
    spectrum = stft(crop).requires_grad_()
    waveform = stft.inverse(spectrum, crop.shape[1])
    weights = [
        torch.autograd.grad(waveform[0, sample], spectrum, retain_graph=True)[0].abs().max()
        for sample in np.linspace(0, crop.shape[1] - 1, 50).astype(int)
    ]
    assert max(weights) < 2 * min(weights)
