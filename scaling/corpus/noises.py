"""Noises of the kinds in VoiceBank+DEMAND, synthesised.

A noise is a function (rng, num_samples, sample_rate) → float32 (num_samples,) of unit mean power.
All that varies is drawn from `rng`: the speed of the engine, who talks and about what, which
dishes fall when. Two draws are two recordings of the same kind of place.

`NOISES` has one table a split, with VBD's names. A name is in one split only, and so are the voices that talk in it,
but the kinds recur: the test set's bus is no training noise, yet engine, road and voices are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scaling.corpus.espeak import Voice
from scaling.corpus.sounds import (
    blend,
    clatter,
    coloured,
    engine,
    hum,
    in_room,
    music,
    passing,
    rattle,
    swell,
    talkers,
    through_loudspeaker,
)

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
        (-3, in_room(rng, through_loudspeaker(announcement, sample_rate), sample_rate, rng.uniform(1.5, 2.5))),
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
