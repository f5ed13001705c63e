"""The differentiable PESQ is PESQ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pesq import pesq
from scipy.stats import spearmanr
from torch.nn import functional as F

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.perceptual import BINS, PerceptualModel
from scaling.corpus.noises import NOISES
from scaling.shard_reader import ShardReader
from scaling.shards import ShardIndex

RATE = 16_000


@pytest.fixture(scope="module")
def model() -> PerceptualModel:
    return PerceptualModel()


@pytest.fixture(scope="module")
def speech(tiny_index: ShardIndex) -> list[np.ndarray]:
    """Clean utterances, float32 of full scale 1."""
    reader = ShardReader(tiny_index.root)
    return [reader.read_clip(clip)[1].astype(np.float32) / 32768 for clip in tiny_index.clips("test")]


def pairs_of(index: ShardIndex, split: str, num_clips: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(noisy, clean) of the first 2 seconds of clips."""
    reader = ShardReader(index.root)
    clips = [clip for clip in index.clips(split) if clip.num_samples >= 2 * RATE][:num_clips]
    return [
        (torch.from_numpy(noisy / np.float32(32768)), torch.from_numpy(clean / np.float32(32768)))
        for noisy, clean in (reader.read_crop(clip, 0, 2 * RATE) for clip in clips)
    ]


def score(model: PerceptualModel, estimate: np.ndarray, clean: np.ndarray) -> float:
    with torch.no_grad():
        return model(torch.from_numpy(estimate)[None], torch.from_numpy(clean)[None]).score.item()


def at_snr(clean: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    gain = np.sqrt(np.mean(clean**2) / np.mean(noise**2) / 10 ** (snr_db / 10))
    return (clean + gain * noise).astype(np.float32)


def enhanced(noisy: np.ndarray, noise: np.ndarray, strength: float) -> np.ndarray:
    """Spectral subtraction with the noise's mean spectrum; a strong one leaves musical noise."""
    window = torch.hann_window(512)
    spectrum = torch.stft(torch.from_numpy(noisy), 512, 128, window=window, return_complex=True)
    noise_power = torch.stft(torch.from_numpy(noise), 512, 128, window=window, return_complex=True).abs().square()
    power = spectrum.abs().square()
    gain = (1 - strength * noise_power.mean(-1, keepdim=True) / power.clamp(min=1e-10)).clamp(min=1e-2).sqrt()
    return torch.istft(gain * spectrum, 512, 128, window=window, length=len(noisy)).numpy()


def test_it_orders_degradations_as_pesq_does(model: PerceptualModel, speech: list[np.ndarray]):
    """Every noise of the demo corpus at four SNRs, and what spectral subtraction of two strengths makes of it."""
    theirs, ours = [], []
    kinds = [make_noise for split in NOISES.values() for make_noise in split.values()]
    assert len(kinds) >= 15
    for number, make_noise in enumerate(kinds):
        clean = speech[number % len(speech)][: 2 * RATE]
        noise = make_noise(np.random.default_rng(number), len(clean), RATE)
        for snr_db in (-2.5, 2.5, 7.5, 15):
            noisy = at_snr(clean, noise, snr_db)
            estimates = [noisy]
            if snr_db in (2.5, 7.5):
                estimates.append(enhanced(noisy, noisy - clean, strength=1.0 if snr_db == 2.5 else 4.0))
            for estimate in estimates:
                theirs.append(pesq(RATE, clean, estimate, "wb"))
                ours.append(score(model, estimate, clean))
    assert spearmanr(theirs, ours).statistic >= 0.95
    # but for the alignment in time it is the same measure
    assert np.median(np.abs(np.subtract(theirs, ours))) < 0.01


def test_it_orders_what_a_model_makes_of_noisy_speech_as_pesq_does(model: PerceptualModel, tiny_index: ShardIndex):
    """Test utterances and what a model makes of them at four moments of a short training; all scores together."""
    torch.manual_seed(0)
    network = BSRNN(BSRNNConfig(16, 1))
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    train, test = (pairs_of(tiny_index, split) for split in ("train", "test"))
    theirs, ours = [], []

    def judge(estimates: list[torch.Tensor]) -> float:
        scores = [pesq(RATE, clean.numpy(), e.numpy(), "wb") for (_, clean), e in zip(test, estimates, strict=True)]
        theirs.extend(scores)
        ours.extend(score(model, e.numpy(), clean.numpy()) for (_, clean), e in zip(test, estimates, strict=True))
        return float(np.mean(scores))

    unprocessed = judge([noisy for noisy, _ in test])
    means = []
    for step in range(60):
        noisy, clean = (torch.stack([pair[part] for pair in train]) for part in (0, 1))
        crop = slice(start := 4_000 * (step % 5), start + 8_000)
        loss = (network(noisy[:, crop]).spectrum - network.stft(clean[:, crop])).abs().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in (5, 15, 30, 59):
            with torch.inference_mode():
                means.append(judge([network.eval()(noisy[None]).waveform[0] for noisy, _ in test]))
            network.train()
    assert max(means) - min(means) > 0.2  # outputs of different quality
    assert max(means) > unprocessed - 0.5
    assert spearmanr(theirs, ours).statistic >= 0.95


def test_a_perfect_estimate_has_the_best_score_at_any_level(model: PerceptualModel, speech: list[np.ndarray]):
    clean = torch.from_numpy(speech[0])[None]
    for estimate in (clean, 0.1 * clean, -clean):
        disturbance = model(estimate, clean)
        assert disturbance.loss.item() < 2e-3
        assert disturbance.score.item() == pytest.approx(4.644, abs=2e-3)


def test_the_loss_is_what_the_raw_score_lacks(model: PerceptualModel, speech: list[np.ndarray]):
    """Solved for the raw score, P.862.2's mapping of the reference gives 4.5 less the loss."""
    clean = speech[0]
    noisy = at_snr(clean, np.random.default_rng(0).standard_normal(len(clean)), 25)
    mapped = pesq(RATE, clean, noisy, "wb")
    raw = (3.8224 - np.log(4 / (mapped - 0.999) - 1)) / 1.3669
    disturbance = model(torch.from_numpy(noisy)[None], torch.from_numpy(clean)[None])
    assert disturbance.loss.item() == pytest.approx(4.5 - raw, abs=0.01)
    assert disturbance.loss.item() == pytest.approx(
        0.1 * disturbance.symmetric.item() + 0.0309 * disturbance.asymmetric.item()
    )


def test_added_noise_is_asymmetric_and_lost_speech_is_not(model: PerceptualModel, speech: list[np.ndarray]):
    clean = torch.from_numpy(speech[0])[None]
    added = model(clean + 0.01 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), clean)
    spectrum = torch.stft(clean, 512, 256, window=torch.hann_window(512), return_complex=True)
    spectrum[:, 40:] = 0  # above 1.25 kHz
    lost = model(torch.istft(spectrum, 512, 256, window=torch.hann_window(512), length=clean.shape[-1]), clean)
    assert added.asymmetric.item() > added.symmetric.item()
    assert lost.asymmetric.item() < 0.5 * lost.symmetric.item()


@pytest.mark.parametrize("estimate_level", [0.0, 1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("clean_level", [0.0, 1e-8, 1e-4, 1.0])
def test_gradients_are_finite_down_to_silence(
    model: PerceptualModel, speech: list[np.ndarray], estimate_level: float, clean_level: float
):
    clean = torch.from_numpy(speech[0][:RATE])[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for shape in (clean + 0.1 * noise, clean, torch.zeros_like(clean), F.pad(clean[:, : RATE // 2], (0, RATE // 2))):
        estimate = (estimate_level * shape).requires_grad_()
        loss = model(estimate, clean_level * clean).loss
        loss.sum().backward()
        assert loss.isfinite().all()
        assert estimate.grad is not None
        assert estimate.grad.isfinite().all()


def test_a_crop_without_speech_has_no_loss(model: PerceptualModel):
    assert model(torch.randn(1, RATE), torch.zeros(1, RATE)).loss.item() == 0


def test_the_gradient_points_to_a_better_score(model: PerceptualModel, speech: list[np.ndarray]):
    """A few steps down the loss raise the score of the reference, which took no part."""
    clean = speech[1][: 2 * RATE]
    noisy = at_snr(clean, np.random.default_rng(0).standard_normal(len(clean)), 10)
    estimate = torch.from_numpy(noisy.copy())[None].requires_grad_()
    for _ in range(10):
        (gradient,) = torch.autograd.grad(model(estimate, torch.from_numpy(clean)[None]).loss.sum(), estimate)
        with torch.no_grad():
            estimate -= 0.05 * gradient * estimate.norm() / gradient.norm()
    after = pesq(RATE, clean, estimate.detach()[0].numpy(), "wb")
    assert after > pesq(RATE, clean, noisy, "wb") + 0.3


def test_the_gradient_is_that_of_the_loss(model: PerceptualModel, speech: list[np.ndarray]):
    clean = torch.from_numpy(speech[0][:RATE])[None].double()
    direction = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).double()
    exact = PerceptualModel().double()
    estimate = (clean + 0.02 * direction.flip(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(exact(estimate, clean).loss.sum(), estimate)
    with torch.no_grad():
        ahead, behind = (exact(estimate + side * 3e-4 * direction, clean).loss.item() for side in (1, -1))
    assert (ahead - behind) / 6e-4 == pytest.approx((gradient * direction).sum().item(), rel=0.05)


def test_a_crop_has_the_same_loss_in_any_batch(model: PerceptualModel, speech: list[np.ndarray]):
    clean = torch.stack([F.pad(torch.from_numpy(s[: 2 * RATE]), (RATE // 3, 0))[: 2 * RATE] for s in speech])
    clean[1, : RATE // 2] = 0  # begins later than the others
    estimate = clean + 0.02 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    together = model(estimate, clean).loss
    alone = torch.cat([model(estimate[i : i + 1], clean[i : i + 1]).loss for i in range(len(clean))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_bark_bands_cover_the_spectrum():
    assert sum(BINS) == 256
