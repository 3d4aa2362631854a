"""Which sentence comes next? Multiple-choice items out of plain passages, for benchmarks that need no hub.

Knowledge benchmarks are near chance for the smallest models; what follows in a text is something that they can tell.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

CHOICES = 4
CONTEXT_SENTENCES = 2
WORDS = (6, 30)
"""Of a choice: fewer give nothing away, more cost time."""
_END = re.compile(r"(?<=[.!?][\"”’)]|.[.!?])\s+(?=[A-Z\"“‘(])")


def make_items(passages: Sequence[str], count: int | None = None) -> list[dict[str, Any]]:
    """One item a passage that has enough sentences, in the order of the passages' hashes.

    The context is a passage's first sentences, the right choice its next one; the others are the next sentences of those three
    other passages whose length comes nearest. The same passages give the same items.

    Returns:
        `context`, `choices` (4 texts) and `gold` (which of them) an item.
    """
    found = [(key_of(text), *cut) for text in dict.fromkeys(passages) if (cut := _cut(text)) is not None]
    found.sort()
    items = []
    for key, context, right in found[:count]:
        others = sorted(found, key=lambda other: (abs(len(other[2]) - len(right)), key_of(key + other[0])))
        wrong = [other[2] for other in others if other[2] != right][: CHOICES - 1]
        if len(wrong) < CHOICES - 1:
            break
        gold = int(key[:8], 16) % CHOICES
        items.append({"context": context, "choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold})
    return items


def sentences(text: str) -> list[str]:
    """Of a passage, with single spaces."""
    return [" ".join(part.split()) for part in _END.split(text) if part.strip()]


def _cut(text: str) -> tuple[str, str] | None:
    """(the first sentences, the next one) of a passage."""
    found = sentences(text)
    if len(found) <= CONTEXT_SENTENCES:
        return None
    right = found[CONTEXT_SENTENCES]
    if not WORDS[0] <= len(right.split()) <= WORDS[1] or right[-1] not in '.!?"”’)':  # a passage's last sentence may be cut off
        return None
    return " ".join(found[:CONTEXT_SENTENCES]), right


def key_of(text: str) -> str:
    """What items are put in order by: nothing that the text says."""
    return hashlib.sha256(text.encode()).hexdigest()
