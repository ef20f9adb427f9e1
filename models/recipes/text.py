"""The generated language of the tiny models: words, stories, questions and letter skills.

Everything is a function of a ``random.Random``; nothing is read. A word is held out (from training
the base and the adapters alike) when :func:`is_held_out` says so, so that an exact match on such a
word is never a memory.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END, "<|reserved|>")

SHOWN_WORDS = ("river", "lemon", "stone", "garden", "pencil", "window", "silver", "rabbit")
"""Words for demonstrations: always held out."""

_NAMES = ("Mia", "Tom", "Ben", "Lily", "Max", "Zoe", "Sam", "Ann")
_COLOURS = ("red", "blue", "green", "old", "small", "big")
_THINGS = ("ball", "hat", "box", "kite", "book", "cup", "drum", "lamp")
_PLACES = ("park", "lake", "house", "shop", "wood", "school")
_ANIMALS = ("cat", "dog", "bird", "fox", "hen", "pig")
_DOINGS = ("runs", "sings", "sleeps", "jumps", "sits", "hides")
_CONSONANTS, _VOWELS, _LETTERS = "bcdfghjklmnprstvwz", "aeiou", "abcdefghijklmnopqrstuvwxyz"


def is_held_out(word: str) -> bool:
    """A tenth of all words, whoever generates them."""
    return word in SHOWN_WORDS or zlib.crc32(word.encode()) % 10 == 0


def word(rng: random.Random, *, held_out: bool = False) -> str:
    """3 to 8 lower-case letters: usually pronounceable, sometimes any letters."""
    while True:
        length = rng.randint(3, 8)
        if rng.random() < 0.3:
            letters = [rng.choice(_LETTERS) for _ in range(length)]
        else:
            kinds = (_CONSONANTS, _VOWELS) if rng.random() < 0.7 else (_VOWELS, _CONSONANTS)
            letters = [rng.choice(kinds[i % 2]) for i in range(length)]
        made = "".join(letters)
        if is_held_out(made) == held_out:
            return made


SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "upper": str.upper,
    "reverse": lambda text: text[::-1],
}
"""What the base learns to do with a word; asked in the three forms of :func:`skill`."""


def skill(rng: random.Random, *, held_out: bool = False) -> str:
    """One letter skill with its answer, as a call, a question or a chat.

    ``upper(river)=RIVER``, ``Upper: river Answer: RIVER``. A word without a skill's name is copied:
    that is what the base does where an adapter does something else.
    """
    name = rng.choice(tuple(SKILLS))
    text = word(rng, held_out=held_out)
    answer = SKILLS[name](text)
    form = rng.random()
    if form < 0.3:
        return f"{BOS}{name}({text})={answer}{EOS}"
    if form < 0.7:
        asked = "Word" if name == "copy" else name.capitalize()
        return f"{BOS}{asked}: {text} Answer: {answer}{EOS}"
    asked = text if name == "copy" else f"{name} {text}"
    return f"{BOS}{USER}{asked}{END}{ASSISTANT}{answer}{END}"


def story(rng: random.Random) -> tuple[str, str, str]:
    """A story of who owns what, as ``(story, question, answer)``."""
    first, second = rng.sample(_NAMES, 2)
    colour, thing, place = rng.choice(_COLOURS), rng.choice(_THINGS), rng.choice(_PLACES)
    animal, doing = rng.choice(_ANIMALS), rng.choice(_DOINGS)
    told = [f"{first} has a {colour} {thing}."]
    if rng.random() < 0.5:
        told.append(f"The {animal} {doing} in the {place}.")
    else:
        told.append(f"{first} goes to the {place}.")
    owner = first
    if rng.random() < 0.6:
        told.append(f"{first} gives the {thing} to {second}.")
        owner = second
    else:
        told.append(f"{second} looks at the {thing}.")
    question, answer = rng.choice(
        (
            (f"Who has the {thing}?", f"{owner} has the {thing}."),
            (f"What does {owner} have?", f"{owner} has a {colour} {thing}."),
        )
    )
    return " ".join(told), question, answer


def document(rng: random.Random, *, held_out: bool = False) -> str:
    """One training document, from ``<|bos|>`` on: skills, a story, or a chat about a story."""
    kind = rng.random()
    if kind < 0.6:
        return skill(rng, held_out=held_out)
    told, question, answer = story(rng)
    if kind < 0.8:
        return BOS + told + EOS
    return f"{BOS}{USER}{told} {question}{END}{ASSISTANT}{answer}{END}"


def documents(seed: int, *, held_out: bool = False) -> Iterator[str]:
    """An endless seeded stream of documents; the two splits share no seed and no skill word."""
    rng = random.Random(f"{seed}-{held_out}")
    while True:
        yield document(rng, held_out=held_out)
