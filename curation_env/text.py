"""One sanitiser and one truncator for every text that an observation carries, so that it lies in its space."""

from __future__ import annotations

import string

#: What a message is made of: printable ASCII, space and newline. Anything else is written as an escape.
CHARSET = frozenset(string.ascii_letters + string.digits + string.punctuation + " \n")
MESSAGE_CHARS = 16_000


def sanitize(text: str) -> str:
    """Return `text` with tabs as spaces and every other character outside CHARSET as its Python escape.

    Terminal escapes, NULs and lone surrogates become visible text; nothing is lost.
    """
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    if all(character in CHARSET for character in set(text)):
        return text
    return "".join(c if c in CHARSET else c.encode("unicode_escape").decode() for c in text)


def truncate(text: str, limit: int = MESSAGE_CHARS) -> str:
    """Return at most `limit` characters: the beginning and the end, and between them how much is left out."""
    if len(text) <= limit:
        return text
    mark = f"\n[... {len(text) - limit:,} characters left out ...]\n"
    head = (limit - len(mark)) // 2
    return text[:head] + mark + text[len(text) - (limit - len(mark) - head) :]


def message(text: str) -> str:
    """Sanitise, then truncate: what goes into an observation."""
    return truncate(sanitize(text))
