"""Sentences about a generated scene, each of them true of that description and of no other."""

from __future__ import annotations

import numpy as np

from .description import Group, Scene

COUNT_WORDS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
COLOUR_WORDS = {"purple": ("purple", "violet")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "square": ("square", "block")}
LEADS = ("", "", "", "a picture of ", "an image with ", "we see ")

PHRASES = {
    "left of": (
        "{a} left of {b}",
        "{a} to the left of {b}",
        "{b} right of {a}",
        "{b} to the right of {a}",
        "{a} on the left and {b} on the right",
        "{b} on the right and {a} on the left",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{b} below {a}",
        "{b} under {a}",
        "{a} at the top and {b} at the bottom",
        "{b} at the bottom and {a} at the top",
    ),
    "inside": ("{a} inside {b}", "{a} within {b}", "{b} around {a}", "{b} with {a} inside"),
    "between": ("{a} between {b}", "{a} flanked by {b}", "{b} on both sides of {a}", "{b} with {a} in between"),
}
SENTENCES = {
    "left of": ("{a} {a_be} left of {b}", "{b} {b_be} to the right of {a}", "on the left {a}, on the right {b}"),
    "above": ("{a} {a_be} above {b}", "{b} {b_be} below {a}", "at the top {a}, at the bottom {b}"),
    "inside": ("{a} {a_be} inside {b}", "{b} {b_be} around {a}"),
    "between": ("{a} {a_be} between {b}", "{b} {b_be} on both sides of {a}"),
}


def _pick(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[rng.integers(len(words))]


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _noun_phrase(group: Group, rng: np.random.Generator, size_word: str | None) -> str:
    noun = _pick(SHAPE_WORDS.get(group.shape, (group.shape,)), rng)
    words = [
        _pick(COUNT_WORDS[group.count], rng),
        size_word,
        _pick(COLOUR_WORDS.get(group.colour, (group.colour,)), rng),
        noun if group.count == 1 else _plural(noun),
    ]
    phrase = " ".join(word for word in words if word)
    return phrase.replace("a orange", "an orange")


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption that names count, size, colour and shape of both groups and their relation.

    Leaving any of them out would make the caption true of a look-alike as well, and a correct answer would then be
    counted as an error. A size that both groups share may be said once, at the end.
    """
    size_of_all = scene.first.size if scene.first.size == scene.second.size and rng.random() < 0.4 else None
    a, b = (
        _noun_phrase(group, rng, None if size_of_all else _pick(SIZE_WORDS[group.size], rng))
        for group in (scene.first, scene.second)
    )
    if rng.random() < 0.3:
        template, lead = _pick(SENTENCES[scene.relation], rng), ""
    else:
        template, lead = _pick(PHRASES[scene.relation], rng), _pick(LEADS, rng)
    verbs = {"a_be": "is" if scene.first.count == 1 else "are", "b_be": "is" if scene.second.count == 1 else "are"}
    tail = f", all {_pick(SIZE_WORDS[size_of_all], rng)}" if size_of_all else ""
    return lead + template.format(a=a, b=b, **verbs) + tail


def paired_captions(scene: Scene, other: Scene, seed: int) -> tuple[str, str]:
    """A caption of each of two scenes in the same words, as far as the scenes are the same."""
    return write_caption(scene, np.random.default_rng(seed)), write_caption(other, np.random.default_rng(seed))


def write_captions(scene: Scene, rng: np.random.Generator, count: int) -> list[str]:
    """`count` captions of one scene, all worded differently."""
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[write_caption(scene, rng)] = None
    return list(captions)
