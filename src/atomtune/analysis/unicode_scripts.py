"""Writing systems: the script of each letter of a text, by its code point; no language model is involved.

Only letters count: digits, punctuation, symbols and emoji belong to no script.
"""

from collections.abc import Sequence

import numpy

from atomtune.analysis.near_duplicates import Numbers
from atomtune.language import message

SCRIPTS = tuple(map(message, ("Han", "Latin", "Kana", "Hangul", "Cyrillic", "Arabic", "other")))
_HAN, _LATIN, _KANA, _HANGUL, _CYRILLIC, _ARABIC, _OTHER, _NONE = range(8)

#: (first code point, script from there on), simplified from Unicode's blocks.
_FROM = (
    (0x0000, _NONE),
    (0x0041, _LATIN),  # A
    (0x005B, _NONE),
    (0x0061, _LATIN),  # a
    (0x007B, _NONE),
    (0x00C0, _LATIN),
    (0x0300, _NONE),  # combining marks
    (0x0370, _OTHER),  # Greek
    (0x0400, _CYRILLIC),
    (0x0530, _OTHER),
    (0x0600, _ARABIC),
    (0x0700, _OTHER),
    (0x0750, _ARABIC),
    (0x0780, _OTHER),
    (0x0870, _ARABIC),
    (0x0900, _OTHER),
    (0x1100, _HANGUL),
    (0x1200, _OTHER),
    (0x1C80, _CYRILLIC),
    (0x1C90, _OTHER),
    (0x1D00, _LATIN),  # phonetic
    (0x1DC0, _NONE),
    (0x1E00, _LATIN),
    (0x1F00, _OTHER),
    (0x2000, _NONE),  # punctuation, arrows, mathematics, boxes
    (0x2C00, _OTHER),
    (0x2C60, _LATIN),
    (0x2C80, _OTHER),
    (0x2DE0, _CYRILLIC),
    (0x2E00, _NONE),
    (0x2E80, _HAN),  # radicals
    (0x3000, _NONE),  # CJK punctuation
    (0x3005, _HAN),
    (0x3008, _NONE),
    (0x3021, _HAN),
    (0x3030, _NONE),
    (0x3041, _KANA),
    (0x3100, _OTHER),  # Bopomofo
    (0x3130, _HANGUL),
    (0x3190, _NONE),
    (0x31F0, _KANA),
    (0x3200, _NONE),
    (0x3400, _HAN),
    (0x4DC0, _NONE),
    (0x4E00, _HAN),
    (0xA000, _OTHER),
    (0xA640, _CYRILLIC),
    (0xA6A0, _OTHER),
    (0xA720, _LATIN),
    (0xA800, _OTHER),
    (0xA960, _HANGUL),
    (0xA980, _OTHER),
    (0xAC00, _HANGUL),
    (0xD800, _NONE),  # surrogates, private use
    (0xF900, _HAN),
    (0xFB00, _LATIN),
    (0xFB13, _OTHER),
    (0xFB50, _ARABIC),
    (0xFE00, _NONE),
    (0xFE70, _ARABIC),
    (0xFEFF, _NONE),
    (0xFF21, _LATIN),  # full width
    (0xFF3B, _NONE),
    (0xFF41, _LATIN),
    (0xFF5B, _NONE),
    (0xFF66, _KANA),
    (0xFFA0, _HANGUL),
    (0xFFE0, _NONE),
    (0x10000, _OTHER),
    (0x1F000, _NONE),  # emoji and other pictures
    (0x20000, _HAN),
    (0xE0000, _NONE),
)
_STARTS = numpy.array([start for start, _ in _FROM], dtype=numpy.uint32)
_SCRIPT = numpy.array([script for _, script in _FROM])


def letters_of(texts: Sequence[str]) -> Numbers:
    """The number of letters of each script in each text: [texts, len(SCRIPTS)]."""
    points = numpy.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    scripts = _SCRIPT[numpy.searchsorted(_STARTS, points, side="right") - 1]
    rows = numpy.repeat(numpy.arange(len(texts)), list(map(len, texts)))
    width = len(SCRIPTS) + 1
    counts = numpy.bincount(rows * width + scripts, minlength=len(texts) * width)
    return counts.reshape(len(texts), width)[:, : len(SCRIPTS)]
