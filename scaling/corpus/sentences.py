"""Sentences to be spoken: a small grammar with a vocabulary of its own, one set of subjects a split.

Every sentence is about a subject from its split's list, and no subject is in two lists, so no text
is shared between splits however many are drawn. All other words are common to all splits, so the
sounds of English are heard in each.
"""

# ruff: noqa: SIM905 (words in rows read better than as lists of strings)

from __future__ import annotations

import numpy as np

SUBJECTS = {
    "train": """
        plumber choirboy neighbour violinist juggler shepherd ambassador fox goldsmith thief judge cousin
        beekeeper mayor zookeeper witness weaver chef youngster yachtsman widow treasurer thatcher sheriff
        physicist otter ostrich nephew mouse lawyer lion kangaroo joiner investor hitchhiker heron gymnast
        gardener fisherman engineer eagle drummer donkey dentist cyclist crow author chemist carpenter buyer
        brother blackbird biologist baker athlete archer apprentice walrus vicar umpire
    """.split(),
    "validation": """
        janitor sculptor squirrel usher pianist locksmith vulture surgeon teenager badger geologist butcher
        thrush acrobat hedgehog employer voyager chauffeur nurse owl
    """.split(),
    "test": """
        milkman astronaut wrestler penguin jeweller beaver organist sergeant pharmacist youth tortoise
        editor ghost cobbler hawk officer visitor merchant thinker sailor
    """.split(),
    # Talkers in the background: nobody whose words anyone wants to hear.
    "background": """
        waiter tourist conductor customer cleaner passenger student colleague manager stranger family
        teacher doctor guest child client speaker painter driver singer
    """.split(),
}

ADJECTIVES = """
    quiet cheerful yellow ancient heavy gentle purple narrow clumsy royal shiny thirsty young jealous
    orange lazy brave frozen curious thick vague pale muddy rough hollow warm bright crooked dusty enormous
""".split()
OBJECTS = """
    lantern umbrella ladder jigsaw cushion treasure bicycle teapot violin blanket envelope cheese garage
    bathtub trophy machine thimble kite onion whistle basket jersey mirror vase wheelchair photograph shovel
    zip hammer yoghurt cloth sandwich parcel jar bridge feather pudding oyster measure wardrobe
""".split()
PLACES = """
    harbour orchard kitchen valley museum lighthouse village playground chapel stadium bakery quarry
    laboratory beach tunnel cottage theatre courtyard airport highway yard island factory church forest
""".split()
ACTED_ON = """
    carried painted measured noticed borrowed polished chased juggled hid wrapped followed bought washed
    broke described showed wove lifted joined ignored photographed judged used threw
""".split()
ACTED = """
    whistled vanished laughed waited shouted yawned slept argued travelled hurried sighed danced paused
    listened breathed jumped joked ate thought sang
""".split()
PREPOSITIONS = "behind near beyond above across through beside inside towards around under outside".split()
ADVERBS = "slowly usually quietly joyfully again roughly vaguely together bravely smoothly there".split()
TIMES = """
    yesterday,before breakfast,in the autumn,after five hours,every Thursday,at noon,for sixteen years,
    late in July,during the voyage,this evening,once a month,by half past eight
""".replace("\n", "").split(",")
JOINTS = "and,but,while,because,so,although,until,just as".split(",")
DETERMINERS = "the,a,my,their,our,this,that,his,her,your".split(",")


def draw_text(rng: np.random.Generator, split: str, num_words: int) -> str:
    """A sentence of about `num_words` words (three at least) about a subject of the split.

    ValueError if there is no such split.
    """
    if split not in SUBJECTS:
        raise ValueError(f"no subjects for split {split!r}: there are {', '.join(SUBJECTS)}")
    words = _clause(rng, split, num_words)
    while num_words - len(words) >= 4:
        words[-1] += "," if rng.random() < 0.5 else ""
        words += [_one(rng, JOINTS), *_clause(rng, split, num_words - len(words) - 1)]
    text = " ".join(words)
    return text[0].upper() + text[1:] + ("?" if rng.random() < 0.15 else ".")


def _clause(rng: np.random.Generator, split: str, num_words: int) -> list[str]:
    words = _noun_phrase(rng, SUBJECTS[split], with_adjective=num_words >= 5 and rng.random() < 0.5)
    if num_words >= 5 and rng.random() < 0.6:
        words += [_one(rng, ACTED_ON), *_noun_phrase(rng, OBJECTS, with_adjective=num_words >= 7)]
    else:
        words.append(_one(rng, ACTED))
    left = num_words - len(words)
    if left >= 3:
        words += [_one(rng, PREPOSITIONS), *_noun_phrase(rng, PLACES, with_adjective=left >= 5)]
    elif left >= 1:
        words += _one(rng, ADVERBS if left == 1 or rng.random() < 0.5 else TIMES).strip().split()
    return words


def _noun_phrase(rng: np.random.Generator, nouns: list[str], with_adjective: bool) -> list[str]:
    words = [_one(rng, ADJECTIVES)] if with_adjective else []
    words.append(_one(rng, nouns))
    determiner = _one(rng, DETERMINERS)
    if determiner == "a" and words[0][0] in "aeiou":
        determiner = "an"
    return [determiner, *words]


def _one(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))]
