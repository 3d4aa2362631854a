"""Which wording did somebody write? Multiple-choice items out of single sentences, whose answer depends on fluency alone.

What a pruned model has lost and distillation brings back is above all how words go together; knowledge is near chance for the
smallest models either way. Sentences are short, so that many items cost little. The same passages give the same items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neo_ray.continuations import CHOICES, key_of, sentences

WORDS = (10, 26)
"""Of a sentence: fewer have too few places to change, more cost time."""
GIVEN_WORDS = 3
"""The sentence's first ones are the context; what is changed comes after them."""
SHORTEST = 4
"""Letters of a word that is exchanged: function words of fewer are guessed by any model."""


def order_items(passages: Sequence[str], count: int | None) -> list[dict[str, Any]]:
    """One item a passage: the rest of a sentence, and three times the same with two neighbouring words exchanged.

    Returns:
        `context`, `choices` (4 texts) and `gold` (which of them) an item, in the order of the passages' hashes.
    """
    items = []
    for key, words in _sentences(passages):
        places = [i for i in range(GIVEN_WORDS, len(words) - 2) if _is_plain(words[i]) and _is_plain(words[i + 1])]
        changed = [[*words[:i], words[i + 1], words[i], *words[i + 2 :]] for i in places if words[i] != words[i + 1]]
        changed.sort(key=lambda other: key_of(key + " ".join(other)))
        if len(changed) >= CHOICES - 1:
            items.append(_item(key, words, changed[: CHOICES - 1]))
    return items[:count]


def word_items(passages: Sequence[str], count: int | None) -> list[dict[str, Any]]:
    """One item a passage: the rest of a sentence, and three times the same with one word of it changed for another.

    The others are as long, and stand in the sentences of other passages.

    Returns:
        As `order_items`.
    """
    found = [(key, words, places) for key, words in _sentences(passages) if (places := _places(words))]
    chosen = [(key, words, places[int(key[:8], 16) % len(places)]) for key, words, places in found]
    items = []
    for key, words, place in chosen:
        right = words[place]
        same = {other[at] for _, other, at in chosen if len(other[at]) == len(right)} - set(words)
        wrong = sorted(same, key=lambda word: key_of(key + word))[: CHOICES - 1]
        if len(wrong) == CHOICES - 1:
            items.append(_item(key, words, [[*words[:place], word, *words[place + 1 :]] for word in wrong]))
    return items[:count]


def _sentences(passages: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(hash of a passage, words of the first of its sentences that will do), by hash."""
    found = []
    for text in dict.fromkeys(passages):
        usable = [words for sentence in sentences(text)[:-1] if WORDS[0] <= len(words := sentence.split()) <= WORDS[1]]
        found += [(key_of(text), usable[0])] if usable else []  # a passage's last sentence may be cut off
    return sorted(found)


def _places(words: list[str]) -> list[int]:
    return [i for i in range(GIVEN_WORDS, len(words) - 1) if _is_plain(words[i]) and len(words[i]) >= SHORTEST]


def _is_plain(word: str) -> bool:
    """No name, number or punctuation, which would give the place away."""
    return word.isalpha() and word.islower() and word.isascii()


def _item(key: str, words: list[str], changed: list[list[str]]) -> dict[str, Any]:
    right, *wrong = (" ".join(one[GIVEN_WORDS:]) for one in (words, *changed))
    gold = int(key[:8], 16) % CHOICES
    return {"context": " ".join(words[:GIVEN_WORDS]), "choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold}
