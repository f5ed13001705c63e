"""The losses are the published ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bsrnn import BSRNN, BSRNNConfig, Enhanced
from bsrnn.losses import LossConfig, enhancement_loss, multi_resolution_l1, unprocessed
from bsrnn.stft import CompressedSTFT, compress, decompress


def test_each_term_equals_its_formula_in_numpy():
    torch.manual_seed(0)
    stft = CompressedSTFT(512, 256, 0.3)
    clean, estimate = torch.randn(2, 4_096), torch.randn(2, 4_096)
    spectrum = torch.randn(2, 257, 17, dtype=torch.complex64)
    loss = enhancement_loss(Enhanced(estimate, spectrum), clean, stft, LossConfig())

    def compressed(waveform: torch.Tensor) -> np.ndarray:
        padded = np.pad(waveform.numpy().astype(np.float64), ((0, 0), (256, 256)), mode="reflect")
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
        frames = np.stack([padded[:, t * 256 : t * 256 + 512] * window for t in range(17)], axis=-1)
        spectrum = np.fft.rfft(frames, axis=1)
        return spectrum * np.maximum(np.abs(spectrum), 1e-5) ** (0.3 - 1)

    target, given, consistent = compressed(clean), spectrum.numpy(), compressed(estimate)
    expected = {
        "magnitude": np.mean((np.abs(given) - np.abs(target)) ** 2),
        "complex": np.mean(np.abs(given - target) ** 2) / 2,  # over real and imaginary parts
        "consistency": np.mean(np.abs(consistent - target) ** 2) / 2,
        "waveform": np.mean(np.abs(estimate.numpy() - clean.numpy())),
    }
    assert {name: term.item() for name, term in loss.terms.items()} == pytest.approx(expected, rel=1e-4)
    weighted = 0.3 * expected["magnitude"] + 0.2 * expected["complex"]
    weighted += 0.3 * expected["consistency"] + 0.2 * expected["waveform"]
    assert loss.total.item() == pytest.approx(weighted, rel=1e-4)


def test_a_perfect_estimate_has_no_loss_and_the_noisy_input_has_some():
    stft = CompressedSTFT(512, 256, 0.3)
    clean = torch.randn(1, 4_096)
    assert enhancement_loss(unprocessed(clean, stft), clean, stft, LossConfig()).total.item() == 0
    assert enhancement_loss(unprocessed(clean + 1, stft), clean, stft, LossConfig()).total.item() > 0.1


def test_compression_keeps_the_phase_and_is_undone():
    spectrum = torch.randn(3, 50, dtype=torch.complex64)
    compressed = compress(spectrum, 0.3)
    torch.testing.assert_close(compressed.abs(), spectrum.abs().pow(0.3))
    torch.testing.assert_close(compressed.angle(), spectrum.angle())
    torch.testing.assert_close(decompress(compressed, 0.3), spectrum, atol=1e-5, rtol=1e-4)


def test_a_term_of_weight_zero_is_not_computed_and_all_zero_is_refused():
    stft = CompressedSTFT(512, 256, 0.3)
    clean = torch.randn(1, 4_096)
    loss = enhancement_loss(unprocessed(clean, stft), clean, stft, LossConfig(consistency=0.0, waveform=0.0))
    assert set(loss.terms) == {"magnitude", "complex"}
    with pytest.raises(ValueError, match="every loss weight is 0"):
        LossConfig(0.0, 0.0, 0.0, 0.0)


def test_a_small_model_learns_to_beat_its_input():
    """Thirty steps on one batch of a tone in noise: the loss falls below the unprocessed input's."""
    torch.manual_seed(0)
    time = torch.arange(8_000) / 16_000
    clean = 0.3 * torch.sin(2 * torch.pi * torch.tensor([[300.0], [700.0]]) * time)
    noisy = clean + 0.3 * torch.randn_like(clean)
    model = BSRNN(BSRNNConfig(16, 2))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = enhancement_loss(model(noisy), clean, model.stft, LossConfig()).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (
        loss.item()
        < 0.5 * enhancement_loss(unprocessed(noisy, model.stft), clean, model.stft, LossConfig()).total.item()
    )


def test_the_multi_resolution_loss_equals_its_formula_in_numpy():
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 4_096)), rng.standard_normal((2, 4_096))
    estimate = 0.2 * clean + 0.1 * noise
    expected = []
    for e, c in zip(estimate, clean, strict=True):
        e, c = e / e.std(ddof=1), c / c.std(ddof=1)
        e = e * (e @ c) / (e @ e)
        distances = []
        for size in (256, 512, 768, 1024):
            padded = [np.pad(signal, size // 2, mode="reflect") for signal in (e, c)]
            starts = range(0, len(c) + 1, size // 2)
            spectra = [np.abs(np.fft.rfft([part[s : s + size] for s in starts], axis=-1)) for part in padded]
            distances.append(np.abs(spectra[0] - spectra[1]).sum())
        expected.append(0.5 * np.abs(e - c).sum() + 0.5 * np.mean(distances))
    given = multi_resolution_l1(torch.tensor(estimate).float(), torch.tensor(clean).float())
    assert given.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("level", [0.0, 1e-9, 1.0])
def test_the_multi_resolution_loss_has_finite_gradients_on_silence(level: float):
    torch.manual_seed(0)
    for clean in (torch.zeros(1, 4_096), level * torch.randn(1, 4_096)):
        estimate = (level * torch.randn(1, 4_096)).requires_grad_()
        multi_resolution_l1(estimate, clean).sum().backward()
        assert estimate.grad is not None
        assert estimate.grad.isfinite().all()


def test_the_loss_of_a_batch_is_the_mean_of_its_crops_losses():
    torch.manual_seed(0)
    stft = CompressedSTFT(512, 256, 0.3)
    clean = 0.1 * torch.randn(4, 8_000)
    noisy = clean + 0.05 * torch.randn(4, 8_000)
    weights = LossConfig(pesq=1e-3, multi_resolution=1.0)
    whole = enhancement_loss(unprocessed(noisy, stft), clean, stft, weights)
    pairs = zip(noisy.split(1), clean.split(1), strict=True)
    parts = [enhancement_loss(unprocessed(n, stft), c, stft, weights) for n, c in pairs]
    assert set(whole.terms) == {"magnitude", "complex", "consistency", "waveform", "pesq", "multi_resolution"}
    for name, term in whole.terms.items():
        assert term.item() == pytest.approx(np.mean([part.terms[name].item() for part in parts]), rel=1e-4), name
    assert whole.total.item() == pytest.approx(np.mean([part.total.item() for part in parts]), rel=1e-4)


@pytest.mark.parametrize(("term", "fewest"), [("pesq", 256), ("multi_resolution", 513), ("waveform", 1)])
def test_a_signal_too_short_for_a_term_is_refused_with_its_length_and_the_fewest_samples(term: str, fewest: int):
    torch.manual_seed(0)
    stft = CompressedSTFT(512, 256, 0.3)
    weights = LossConfig(**{name: float(name == term) for name in vars(LossConfig())})
    assert weights.fewest_samples == fewest
    clean, noisy = torch.randn(2, fewest), torch.randn(2, fewest).requires_grad_()
    loss = enhancement_loss(unprocessed(noisy, stft), clean, stft, weights).total
    loss.backward()
    assert noisy.grad is not None
    assert loss.isfinite()
    assert noisy.grad.isfinite().all()
    if fewest > 1:
        estimate, clean = unprocessed(noisy[:, 1:].detach(), stft), clean[:, 1:]
        with pytest.raises(ValueError, match=rf"{fewest - 1} samples: expected at least {fewest}\b.*; pad the signals"):
            enhancement_loss(estimate, clean, stft, weights)
