"""What the noises of the demo corpus are made of: engines, dishes, rooms, music, people who talk.

A sound is floating-point (num_samples,) of unit mean power unless it says otherwise; what varies is drawn from `rng`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import soxr

from scaling.corpus import espeak
from scaling.corpus.espeak import Voice
from scaling.corpus.sentences import draw_text


def coloured(
    rng: np.random.Generator, num_samples: int, sample_rate: int, spectrum: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Stationary Gaussian noise whose spectrum goes through points (Hz, dB), straight on a log-frequency axis."""
    frequencies = np.fft.rfftfreq(num_samples, 1 / sample_rate)
    points, levels = np.array([point for point, _ in spectrum]), np.array([level for _, level in spectrum])
    gain_db = np.interp(np.log(np.maximum(frequencies, 1.0)), np.log(points), levels)
    gain = 10 ** (gain_db / 20) * (frequencies > 15)  # no microphone hears below 15 Hz
    return _unit(np.fft.irfft(np.fft.rfft(rng.standard_normal(num_samples)) * gain, num_samples))


def swell(
    rng: np.random.Generator, num_samples: int, sample_rate: int, depth_db: float, period_seconds: float
) -> np.ndarray:
    """A slowly wandering gain, `depth_db` its standard deviation."""
    num_points = int(num_samples / (period_seconds * sample_rate)) + 3
    level_db = rng.standard_normal(num_points) * depth_db
    at = (np.arange(num_samples) / (period_seconds * sample_rate)) + rng.random()
    whole = at.astype(int)
    rise = 0.5 - 0.5 * np.cos(np.pi * (at - whole))
    gain: np.ndarray = 10 ** ((level_db[whole] * (1 - rise) + level_db[whole + 1] * rise) / 20)
    return gain


def engine(rng: np.random.Generator, num_samples: int, sample_rate: int, firing_hz: float) -> np.ndarray:
    """Harmonics of a firing rate that drifts with load, with every second cylinder a little off."""
    drift = np.log(swell(rng, num_samples, sample_rate, 0.35, 0.8))
    phase = 2 * np.pi * np.cumsum(firing_hz * (1 + drift)) / sample_rate + rng.uniform(0, 2 * np.pi)
    half_turn = np.exp(0.5j * phase)
    rotation = np.ones(num_samples, dtype=complex)  # at each harmonic, the last one's turned on: no sine but one
    sound = np.zeros(num_samples)
    for harmonic in np.arange(0.5, 16.0, 0.5):
        if harmonic * firing_hz * 1.3 > sample_rate / 2:
            break
        rotation *= half_turn
        strength = harmonic**-1.1 * rng.uniform(0.4, 1.0) * (0.4 if harmonic % 1 else 1.0)
        angle = rng.uniform(0, 2 * np.pi)
        sound += (strength * np.cos(angle)) * rotation.real + (strength * np.sin(angle)) * rotation.imag
    return _unit(sound)


def hum(rng: np.random.Generator, num_samples: int, sample_rate: int, mains_hz: float = 50.0) -> np.ndarray:
    """A mains hum or a fan's tone: steady harmonics."""
    time = np.arange(num_samples) / sample_rate
    pitch = mains_hz * rng.uniform(0.995, 1.005)
    sound = np.zeros(num_samples)
    for harmonic in range(1, 9):
        strength = rng.uniform(0.2, 1.0) / harmonic
        sound += strength * np.sin(2 * np.pi * harmonic * pitch * time + rng.uniform(0, 2 * np.pi))
    return _unit(sound)


def clatter(
    rng: np.random.Generator,
    num_samples: int,
    sample_rate: int,
    per_second: float,
    resonances_hz: tuple[float, float],
    ring_seconds: float,
) -> np.ndarray:
    """Knocks and rings: things with a handful of resonances, struck at random moments, often in small bursts."""
    sound = np.zeros(num_samples)
    seconds = num_samples / sample_rate
    starts = rng.uniform(-0.1, seconds, max(1, rng.poisson(per_second * seconds)))
    burst = starts[rng.random(len(starts)) < 0.4]
    starts = np.concatenate([starts, burst + rng.uniform(0.03, 0.15, len(burst))])
    for start in starts:
        length = int(sample_rate * ring_seconds * rng.uniform(2.0, 5.0))
        time = np.arange(length) / sample_rate
        struck = 0.3 * rng.standard_normal(length) * np.exp(-time / 0.003)
        for _ in range(int(rng.integers(3, 7))):
            frequency = np.exp(rng.uniform(*np.log(resonances_hz)))
            decay = ring_seconds * rng.uniform(0.2, 1.0)
            struck += rng.uniform(0.2, 1.0) * np.sin(2 * np.pi * frequency * time) * np.exp(-time / decay)
        first = int(start * sample_rate)
        skipped, kept = max(0, -first), min(length, num_samples - first)
        if kept > skipped:
            sound[first + skipped : first + kept] += struck[skipped:kept] * np.exp(rng.normal(0, 0.6))
    return _unit(sound)


def rattle(rng: np.random.Generator, num_samples: int, sample_rate: int, per_second: float) -> np.ndarray:
    """Wheels over rail joints or footsteps: dull double knocks in a rhythm."""
    sound = np.zeros(num_samples)
    length = int(0.12 * sample_rate)
    time = np.arange(length) / sample_rate
    at = rng.uniform(0, 1 / per_second)
    while at < num_samples / sample_rate:
        for moment in (at, at + rng.uniform(0.1, 0.14)):
            first = int(moment * sample_rate)
            knock = rng.standard_normal(length) * np.exp(-time / 0.012)
            knock += 2 * np.sin(2 * np.pi * rng.uniform(70, 180) * time) * np.exp(-time / 0.03)
            kept = max(0, min(length, num_samples - first))
            sound[first : first + kept] += rng.uniform(0.5, 1.0) * knock[:kept]
        at += rng.uniform(0.9, 1.1) / per_second
    return _unit(sound)


def passing(rng: np.random.Generator, num_samples: int, sample_rate: int, per_second: float) -> np.ndarray:
    """Vehicles that come and go: tyres and engine, swelling over a second or two."""
    seconds = num_samples / sample_rate
    time = np.arange(num_samples) / sample_rate
    sound = np.zeros(num_samples)
    for _ in range(max(1, rng.poisson(per_second * seconds))):
        roar = rng.uniform(500, 1200)
        tyres = coloured(rng, num_samples, sample_rate, ((60, -6), (150, 0), (roar, -6), (3000, -24), (9000, -46)))
        motor = engine(rng, num_samples, sample_rate, rng.uniform(30, 80))
        nearest, width = rng.uniform(-0.5, seconds + 0.5), rng.uniform(0.4, 1.5)
        distance = 1 / (1 + ((time - nearest) / width) ** 2)
        sound += np.exp(rng.normal(0, 0.4)) * distance * (tyres + rng.uniform(0.3, 0.8) * motor)
    return _unit(sound)


def music(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Plucked chords, a tune and a bass over four chords in a key, at a tempo."""
    sound = np.zeros(num_samples)
    key = rng.uniform(100, 200)
    scale = np.array([0, 2, 4, 5, 7, 9, 11] if rng.random() < 0.6 else [0, 2, 3, 5, 7, 8, 10])
    beat = rng.uniform(0.3, 0.6)
    harmonics = np.arange(1, int(rng.integers(4, 8)))
    brightness = rng.uniform(0.9, 1.8)
    chords = rng.permutation(6)[:4]

    def pitch(step: int) -> float:
        octave, degree = divmod(int(step), 7)
        return float(key * 2 ** (octave + scale[degree] / 12))

    def pluck(start: float, frequency: float, seconds: float, loudness: float) -> None:
        first, length = int(start * sample_rate), int(seconds * 2.5 * sample_rate)
        skipped, kept = max(0, -first), min(length, num_samples - first)
        if kept <= skipped:
            return
        time = np.arange(skipped, kept) / sample_rate
        attack = loudness * np.minimum(1, time / 0.008) * np.exp(-time / seconds)
        fundamental = np.exp((2j * np.pi * frequency - 1) * time)  # its powers: the higher, the faster they fade
        partial = np.ones(kept - skipped, dtype=complex)
        for harmonic in harmonics:
            if harmonic * frequency < sample_rate / 2:
                partial *= fundamental
                sound[first + skipped : first + kept] += harmonic**-brightness * attack * partial.imag

    at, number = -rng.uniform(0, 4 * beat), 0
    while at < num_samples / sample_rate:
        root = chords[number // 4 % 4]
        if number % 4 == 0:
            for third in (0, 2, 4):
                pluck(at, pitch(root + third + 7), 3 * beat, 0.6)
        if number % 2 == 0:
            pluck(at, pitch(root) / 2, beat, 0.9)
        if rng.random() < 0.8:
            pluck(at, pitch(root + rng.integers(7, 21)), beat, 0.8)
        at, number = at + beat, number + 1
    return _unit(sound)


def talkers(
    rng: np.random.Generator, num_samples: int, sample_rate: int, crowd: Sequence[Voice], num_talkers: int
) -> np.ndarray:
    """Several people talking at once, some nearer than others, each in a voice of the crowd's."""
    sound = np.zeros(num_samples)
    seconds = num_samples / sample_rate
    order = rng.permutation(len(crowd))
    for index in range(num_talkers):
        voice = crowd[order[index % len(crowd)]]
        varied = Voice(voice.accent, voice.variant, voice.pitch + int(rng.integers(-6, 7)), voice.words_per_minute)
        text = draw_text(rng, "background", max(4, round(3.4 * min(seconds, 4.0))))  # said again if too short
        speech = espeak.speak(varied, text)
        if sample_rate != espeak.SAMPLE_RATE:
            speech = soxr.resample(speech, espeak.SAMPLE_RATE, sample_rate)
        loop = np.resize(np.concatenate([speech, np.zeros(int(rng.uniform(0.1, 0.6) * sample_rate))]), num_samples)
        sound += _unit(np.roll(loop, int(rng.integers(num_samples)))) * np.exp(rng.normal(0, 0.35))
    return _unit(sound)


def in_room(
    rng: np.random.Generator, sound: np.ndarray, sample_rate: int, decay_seconds: float, direct_db: float = -6.0
) -> np.ndarray:
    """A sound in a room that takes `decay_seconds` to fall silent (−60 dB), `direct_db` above its reverberation.

    By default it comes from far across the room. Walls, clothes and air swallow the treble of the
    reverberation: 6 dB an octave above 1.5 kHz.
    """
    length = int(decay_seconds * sample_rate)
    tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail /= np.sqrt(np.sum(tail**2))
    size = -(-(len(sound) + length) // 4096) * 4096  # a size with small factors, for the FFT
    absorption = 1 / np.sqrt(1 + (np.fft.rfftfreq(size, 1 / sample_rate) / 1500) ** 2)
    response = 10 ** (direct_db / 20) + np.fft.rfft(tail, size) * absorption
    return _unit(np.fft.irfft(np.fft.rfft(sound, size) * response, size)[: len(sound)])


def through_loudspeaker(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """What a horn loudspeaker passes: about 400 Hz to 3.5 kHz."""
    frequencies = np.fft.rfftfreq(len(sound), 1 / sample_rate)
    passed = np.exp(-((np.log(np.maximum(frequencies, 1) / 1200) / 1.1) ** 4))
    return _unit(np.fft.irfft(np.fft.rfft(sound) * passed, len(sound)))


def blend(rng: np.random.Generator, *parts: tuple[float, np.ndarray]) -> np.ndarray:
    """A mixture of parts (dB, sound), each up to 2 dB louder or softer than said; float32 of unit mean power."""
    mixture = sum(10 ** ((level_db + rng.uniform(-2, 2)) / 20) * sound for level_db, sound in parts)
    return _unit(np.asarray(mixture)).astype(np.float32)


def _unit(sound: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = sound / np.sqrt(np.mean(np.square(sound, dtype=np.float64)) + 1e-12)
    return scaled
