"""Noises of the kinds in VoiceBank+DEMAND, synthesised.

A noise is a function (rng, num_samples, sample_rate) → float32 (num_samples,) of unit mean power.
All that varies is drawn from `rng`: the speed of the engine, who talks and about what, which
dishes fall when. Two draws are two recordings of the same kind of place.

`NOISES` has one table a split, with VBD's names. A name is in one split only, and so are the voices that talk in it,
but the kinds recur: the test set's bus is no training noise, yet engine, road and voices are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import soxr

from scaling.corpus import espeak
from scaling.corpus.espeak import Voice
from scaling.corpus.sentences import draw_text

Noise = Callable[[np.random.Generator, int, int], np.ndarray]

# Who talks in the background: voices (variant and pitch) that no speaker of the corpus has.
CROWDS = {
    "train": (
        Voice("en-us", "Alicia", 40, 175),
        Voice("en-gb-x-rp", "aunty", 82, 185),
        Voice("en-029", "Lee", 55, 170),
        Voice("en-us", "Mario", 45, 190),
        Voice("en-gb-scotland", "steph", 50, 175),
        Voice("en-us-nyc", "Denis", 60, 180),
        Voice("en-gb-x-gbcwmd", "max", 50, 165),
        Voice("en-us", "linda", 20, 180),
    ),
    "validation": (
        Voice("en-us", "shelby", 30, 170),
        Voice("en-gb-x-rp", "Diogo", 60, 180),
        Voice("en-gb-x-gbclan", "robert", 40, 185),
        Voice("en-us", "Andrea", 25, 165),
        Voice("en-029", "travis", 52, 175),
    ),
    "test": (
        Voice("en-us-nyc", "Annie", 25, 180),
        Voice("en-gb-scotland", "rob", 45, 170),
        Voice("en-us", "michel", 62, 185),
        Voice("en-gb-x-gbclan", "f4", 80, 175),
        Voice("en-gb-x-rp", "Hugo", 48, 165),
    ),
}

SPEECH_SLOPE = ((100.0, 0.0), (500.0, 0.0), (1000.0, -7.0), (2000.0, -13.0), (4000.0, -19.0), (8000.0, -26.0))
"""(Hz, dB): the long-term spectrum of speech, roughly, for draws that need no talker."""


# --- the materials: each of unit mean power --------------------------------------------------


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


def blend(rng: np.random.Generator, *parts: tuple[float, np.ndarray]) -> np.ndarray:
    """A mixture of parts (dB, sound), each up to 2 dB louder or softer than said; float32 of unit mean power."""
    mixture = sum(10 ** ((level_db + rng.uniform(-2, 2)) / 20) * sound for level_db, sound in parts)
    return _unit(np.asarray(mixture)).astype(np.float32)


def _unit(sound: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = sound / np.sqrt(np.mean(np.square(sound, dtype=np.float64)) + 1e-12)
    return scaled


# --- the places: train -----------------------------------------------------------------------


def ssn(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Stationary noise with the long-term spectrum of the crowd's voices."""
    speech = talkers(rng, num_samples, sample_rate, CROWDS["train"], 3)
    power = np.abs(np.fft.rfft(speech)) ** 2
    width = max(1, round(120 * num_samples / sample_rate))  # bins in 120 Hz
    smooth = np.sqrt(np.convolve(power, np.full(width, 1 / width), "same"))
    return blend(rng, (0, np.fft.irfft(np.fft.rfft(rng.standard_normal(num_samples)) * smooth, num_samples)))


def babble(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Six to nine people talking at once."""
    voices = talkers(rng, num_samples, sample_rate, CROWDS["train"], int(rng.integers(6, 10)))
    return blend(rng, (0, voices), (-22, coloured(rng, num_samples, sample_rate, SPEECH_SLOPE)))


def cafeteria(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """A large room full of voices, trays and plates, with its ventilation."""
    voices = talkers(rng, num_samples, sample_rate, CROWDS["train"], int(rng.integers(5, 8)))
    plates = clatter(rng, num_samples, sample_rate, rng.uniform(1, 4), (900, 6000), 0.06)
    return blend(
        rng,
        (0, in_room(rng, voices, sample_rate, rng.uniform(0.6, 1.2))),
        (-7, in_room(rng, plates, sample_rate, 0.5)),
        (-6, coloured(rng, num_samples, sample_rate, ((50, 0), (200, -3), (1000, -16), (9000, -42)))),
    )


def car(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Inside a car: engine, road under the floor, wind at the windows."""
    road = coloured(rng, num_samples, sample_rate, ((30, 0), (80, 0), (300, -17), (1500, -34), (9000, -56)))
    wind = coloured(rng, num_samples, sample_rate, ((100, -3), (600, 0), (2500, -8), (9000, -24)))
    return blend(
        rng,
        (0, road * swell(rng, num_samples, sample_rate, 2, 0.7)),
        (-5, engine(rng, num_samples, sample_rate, rng.uniform(35, 90))),
        (-13, wind * swell(rng, num_samples, sample_rate, 3, 0.5)),
    )


def kitchen(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Running water or a frying pan, a hood, dishes."""
    hiss = coloured(rng, num_samples, sample_rate, ((200, -12), (800, -3), (rng.uniform(2000, 4000), 0), (9000, -6)))
    hood = coloured(rng, num_samples, sample_rate, ((50, 0), (250, -2), (1000, -12), (9000, -34)))
    return blend(
        rng,
        (-6, hiss * swell(rng, num_samples, sample_rate, 4, 0.4)),
        (-3, hood),
        (-12, hum(rng, num_samples, sample_rate)),
        (0, clatter(rng, num_samples, sample_rate, rng.uniform(1.5, 4), (500, 7000), 0.09)),
    )


def restaurant(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Tables of people, cutlery, music from somewhere."""
    voices = talkers(rng, num_samples, sample_rate, CROWDS["train"], int(rng.integers(4, 8)))
    cutlery = clatter(rng, num_samples, sample_rate, rng.uniform(1, 3), (2000, 8000), 0.05)
    return blend(
        rng,
        (0, in_room(rng, voices, sample_rate, rng.uniform(0.4, 0.8))),
        (-8, in_room(rng, cutlery, sample_rate, 0.4)),
        (rng.uniform(-9, -1), in_room(rng, music(rng, num_samples, sample_rate), sample_rate, 0.5)),
        (-10, coloured(rng, num_samples, sample_rate, SPEECH_SLOPE)),
    )


def station(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """A hall with an announcement from loudspeakers, a murmur, a train idling."""
    announcement = talkers(rng, num_samples, sample_rate, CROWDS["train"], 1)
    murmur = talkers(rng, num_samples, sample_rate, CROWDS["train"], 5)
    idling = engine(rng, num_samples, sample_rate, rng.uniform(20, 40))
    return blend(
        rng,
        (-3, in_room(rng, _loudspeaker(announcement, sample_rate), sample_rate, rng.uniform(1.5, 2.5))),
        (-1, in_room(rng, murmur, sample_rate, 1.8)),
        (-4, idling),
        (0, coloured(rng, num_samples, sample_rate, ((40, 0), (150, -2), (800, -14), (9000, -40)))),
    )


def traffic(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """At the kerb of a busy road: vehicles pass, the rest of the town rumbles."""
    town = coloured(rng, num_samples, sample_rate, ((30, 0), (120, -1), (600, -12), (2000, -22), (9000, -44)))
    return blend(
        rng,
        (0, passing(rng, num_samples, sample_rate, rng.uniform(0.4, 1.2))),
        (-5, town),
        (-15, clatter(rng, num_samples, sample_rate, 0.5, (300, 1500), 0.05)),
    )


# --- the places: validation ------------------------------------------------------------------


def meeting(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """A room where several talk aside, with a projector's fan and paper."""
    voices = talkers(rng, num_samples, sample_rate, CROWDS["validation"], int(rng.integers(4, 7)))
    paper = coloured(rng, num_samples, sample_rate, ((500, -14), (3000, 0), (9000, -4)))
    return blend(
        rng,
        (-1, in_room(rng, voices, sample_rate, rng.uniform(0.4, 0.7))),
        (-3, coloured(rng, num_samples, sample_rate, ((50, 0), (250, -3), (1000, -14), (9000, -40)))),
        (-16, hum(rng, num_samples, sample_rate, rng.uniform(90, 140))),
        (-20, paper * swell(rng, num_samples, sample_rate, 10, 0.15)),
    )


def metro(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Inside an underground train: rumble, rail joints, the motors' whine, a few voices."""
    rumble = coloured(rng, num_samples, sample_rate, ((30, 0), (150, -1), (500, -10), (2000, -24), (9000, -44)))
    whine = hum(rng, num_samples, sample_rate, rng.uniform(250, 500))
    return blend(
        rng,
        (0, rumble * swell(rng, num_samples, sample_rate, 3, 0.6)),
        (-7, rattle(rng, num_samples, sample_rate, rng.uniform(0.8, 2))),
        (-16, whine * swell(rng, num_samples, sample_rate, 5, 0.8)),
        (-10, in_room(rng, talkers(rng, num_samples, sample_rate, CROWDS["validation"], 4), sample_rate, 0.5)),
    )


# --- the places: test ------------------------------------------------------------------------


def bus(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Inside a bus: a diesel, the road, rattling windows, passengers behind."""
    road = coloured(rng, num_samples, sample_rate, ((30, 0), (100, -1), (400, -16), (2000, -30), (9000, -52)))
    return blend(
        rng,
        (0, engine(rng, num_samples, sample_rate, rng.uniform(22, 55))),
        (0, road * swell(rng, num_samples, sample_rate, 3, 0.6)),
        (-16, clatter(rng, num_samples, sample_rate, 3, (150, 2500), 0.03)),
        (-10, in_room(rng, talkers(rng, num_samples, sample_rate, CROWDS["test"], 4), sample_rate, 0.3)),
    )


def cafe(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """A small room of voices, cups, at times the hiss of the coffee machine, music."""
    voices = talkers(rng, num_samples, sample_rate, CROWDS["test"], int(rng.integers(5, 8)))
    hiss = coloured(rng, num_samples, sample_rate, ((300, -14), (1500, -4), (5000, 0), (9000, -3)))
    return blend(
        rng,
        (0, in_room(rng, voices, sample_rate, rng.uniform(0.4, 0.8))),
        (-9, in_room(rng, clatter(rng, num_samples, sample_rate, 2, (1500, 7000), 0.07), sample_rate, 0.4)),
        (-20, hiss * swell(rng, num_samples, sample_rate, 7, 0.8)),
        (-9, in_room(rng, music(rng, num_samples, sample_rate), sample_rate, 0.4)),
        (-6, coloured(rng, num_samples, sample_rate, ((50, 0), (200, -3), (1000, -16), (9000, -42)))),
    )


def living(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """A living room with music on, a refrigerator, things being put away."""
    return blend(
        rng,
        (0, in_room(rng, music(rng, num_samples, sample_rate), sample_rate, rng.uniform(0.3, 0.5))),
        (-5, coloured(rng, num_samples, sample_rate, ((40, 0), (200, -4), (1000, -18), (9000, -38)))),
        (-8, hum(rng, num_samples, sample_rate)),
        (-6, in_room(rng, clatter(rng, num_samples, sample_rate, 1, (200, 3000), 0.04), sample_rate, 0.3)),
    )


def office(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """Computers and ventilation, keys, a conversation down the corridor."""
    keys = clatter(rng, num_samples, sample_rate, rng.uniform(3, 8), (1000, 6000), 0.012)
    return blend(
        rng,
        (0, coloured(rng, num_samples, sample_rate, ((40, 0), (150, -2), (600, -12), (2000, -24), (9000, -42)))),
        (-8, hum(rng, num_samples, sample_rate, rng.uniform(80, 130))),
        (-12, keys),
        (-9, in_room(rng, talkers(rng, num_samples, sample_rate, CROWDS["test"], 3), sample_rate, 0.9)),
    )


def psquare(rng: np.random.Generator, num_samples: int, sample_rate: int) -> np.ndarray:
    """A public square: people, footsteps, a fountain, traffic beyond the houses."""
    fountain = coloured(rng, num_samples, sample_rate, ((200, -10), (1000, -2), (3000, 0), (9000, -8)))
    return blend(
        rng,
        (-4, in_room(rng, talkers(rng, num_samples, sample_rate, CROWDS["test"], 6), sample_rate, 0.3)),
        (-12, rattle(rng, num_samples, sample_rate, rng.uniform(1.5, 2.2))),
        (-18, fountain * swell(rng, num_samples, sample_rate, 2, 0.3)),
        (0, passing(rng, num_samples, sample_rate, 0.5)),
        (-5, coloured(rng, num_samples, sample_rate, ((30, 0), (120, -1), (600, -12), (2000, -22), (9000, -44)))),
    )


def _loudspeaker(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """What a horn loudspeaker passes: about 400 Hz to 3.5 kHz."""
    frequencies = np.fft.rfftfreq(len(sound), 1 / sample_rate)
    passed = np.exp(-((np.log(np.maximum(frequencies, 1) / 1200) / 1.1) ** 4))
    return _unit(np.fft.irfft(np.fft.rfft(sound) * passed, len(sound)))


NOISES: dict[str, dict[str, Noise]] = {
    "train": {
        "ssn": ssn,
        "babble": babble,
        "cafeteria": cafeteria,
        "car": car,
        "kitchen": kitchen,
        "restaurant": restaurant,
        "station": station,
        "traffic": traffic,
    },
    "validation": {"meeting": meeting, "metro": metro},
    "test": {"bus": bus, "cafe": cafe, "living": living, "office": office, "psquare": psquare},
}
"""split → VBD's name of the noise → how it is made."""
