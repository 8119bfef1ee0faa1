"""Media: records with images, audio or video, which a text model cannot be trained on, are refused."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from atomtune.data.formats.fields import is_empty
from atomtune.data.formats.schema import MEDIA
from atomtune.data.records import Turn

KEYS = frozenset(MEDIA)
#: Placeholders for media in published data. Plain tags count only at an end of the text or on a line of their own, so
#: that a question about the HTML tag <video> is not refused.
_PLACEHOLDER = re.compile(
    r"\A\s*<(?:image|video|audio)>"
    r"|^[ \t]*<(?:image|video|audio)>[ \t]*$"
    r"|<image>\s*\Z"
    r"|<\|(?:image|video|audio)_?(?:pad|start)?\|>|<\|vision_start\|>|<start_of_image>|<image_soft_token>",
    re.MULTILINE,
)


def problems_of_media(record: Mapping[str, Any], turns: Iterable[Turn]) -> tuple[str, ...]:
    """Why a record with media is refused; () if it has none. Trained as text, it would teach the model to guess."""
    if not KEYS.isdisjoint(record):
        for key in sorted(KEYS.intersection(record)):
            if not is_empty(record[key]) and record[key] != "[]":  # as in the cell of a table
                return (f'key "{key}" holds media; only text can be trained on',)
    for number, turn in enumerate(turns, 1):
        if "<" not in turn.text and "<" not in turn.input:
            continue
        match = _PLACEHOLDER.search(turn.text) or _PLACEHOLDER.search(turn.input)
        if match and turn.role not in ("assistant", "text"):
            placeholder = match.group().strip()
            return (f"turn {number} holds {placeholder}, which stands for media; only text can be trained on",)
    return ()
