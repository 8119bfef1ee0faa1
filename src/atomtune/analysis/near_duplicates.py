"""Near-duplicates: which texts are nearly equal, found without comparing each with each (MinHash).

Two texts are near where the Jaccard index of their shingles (three characters in a row, ends marked; case, width, space
and punctuation folded away) reaches the threshold. MinHash in bands proposes pairs, and every pair is then measured
exactly: what stands in one group is near by measurement, never by chance. What chance decides is whether a pair is
proposed: at 0.8, 998 of 1,000 are; at 0.9, all but one of a million.
Memory: 64 bytes a text and a window of a few MB; the shingles lie in a temporary file, four bytes each.
"""

import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeAlias

import numpy
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[Any]

SHINGLE = 3
BANDS, ROWS = 16, 5
#: Characters that are shingled at once, and shingles that are compared at once.
_WINDOW = 2**20
#: Of a bucket, each text is compared with the first and with so many before it; a bucket of thousands costs no square.
_NEIGHBOURS = 8
_START, _END = "\x02", "\x03\x03"


class _Folds(dict[int, str]):
    """Code point → what stands for it: nothing for space, punctuation and controls; found once and kept."""

    def __missing__(self, point: int) -> str:
        kept = "" if unicodedata.category(chr(point))[0] in "ZPC" else chr(point)
        self[point] = kept
        return kept


_FOLDS = _Folds()


def folded(text: str) -> str:
    """A text without case, width, space and punctuation; one that is nothing else keeps its punctuation."""
    same_width = unicodedata.normalize("NFKC", text).casefold()
    return same_width.translate(_FOLDS) or "".join(same_width.split())


def near_groups(texts: Iterable[str], *, threshold: float = 0.8) -> Numbers:
    """A group for each text, by the number of its first member; texts that are near, or linked by near ones, share it.

    The texts are read once. The same texts in the same order give the same groups.
    Checked against all pairs: tests/analysis/test_near_duplicates.py.
    """
    assert 0 < threshold <= 1
    with tempfile.TemporaryFile() as file:
        sizes, keys = _sketch(texts, file)
        if not len(sizes):
            return numpy.zeros(0, dtype=numpy.int64)
        file.flush()
        shingles = _Shingles(numpy.memmap(file, dtype=numpy.uint32, mode="r"), sizes)
        groups = numpy.arange(len(sizes))
        for band in range(BANDS):
            for left, right in _proposed(keys[band]):
                apart = groups[left] != groups[right]
                left, right = left[apart], right[apart]  # noqa: PLW2901  # the rest is known
                near = shingles.near(left, right, threshold)
                groups = _united(groups, left[near], right[near])
    return groups


def equal_groups(values: Numbers) -> Numbers:
    """A group for each value, by the number of its first place; equal values share it."""
    _, first, inverse = numpy.unique(values, return_index=True, return_inverse=True)
    return first[inverse].astype(numpy.int64)


def joined(*groupings: Numbers) -> Numbers:
    """Groups such that what shares one in any of the groupings shares one here, by the number of the first member."""
    groups = numpy.arange(len(groupings[0]))
    for grouping in groupings:
        assert len(grouping) == len(groups)
        groups = _united(groups, equal_groups(grouping), numpy.arange(len(groups)))
    return groups


def _united(groups: Numbers, left: Numbers, right: Numbers) -> Numbers:
    """The groups with each left[i] and right[i] in one. Each member names its group's first, before and after."""
    groups = groups.copy()
    while True:
        a, b = groups[left], groups[right]
        apart = a != b
        if not apart.any():
            return groups
        # Of several that one is to join, any will do: the others are still apart from it in the next round.
        groups[numpy.maximum(a, b)[apart]] = numpy.minimum(a, b)[apart]
        while (groups != (further := groups[groups])).any():
            groups = further


def _sketch(texts: Iterable[str], file: IO[bytes]) -> tuple[Numbers, Numbers]:
    """Write every text's shingles, each once and sorted; (how many of each text, [BANDS, texts] keys of its bands)."""
    factors, offsets = _hashes()
    sizes, keys = [], []
    for window in _windows(texts):
        rows, shingles = _shingled(window)
        shingles.tofile(file)
        size = numpy.bincount(rows, minlength=len(window))
        starts = numpy.cumsum(size) - size
        band_keys = numpy.zeros((BANDS, len(window)), dtype=numpy.uint32)
        for number, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
            least = numpy.minimum.reduceat(_mixed((shingles ^ offset) * factor), starts)
            band = number // ROWS
            band_keys[band] = _mixed(band_keys[band] * numpy.uint32(0x9E3779B1) + least)
        sizes.append(size)
        keys.append(band_keys)
    if not sizes:
        return numpy.zeros(0, dtype=numpy.int64), numpy.zeros((BANDS, 0), dtype=numpy.uint32)
    return numpy.concatenate(sizes), numpy.concatenate(keys, axis=1)


def _hashes() -> tuple[Numbers, Numbers]:
    """Odd factors and offsets of the BANDS * ROWS hash functions: the same ones in every process."""
    draw = numpy.random.default_rng(20_26)
    count = BANDS * ROWS
    return draw.integers(0, 2**31, count, numpy.uint32) * numpy.uint32(2) + numpy.uint32(1), draw.integers(
        0, 2**32, count, numpy.uint32
    )


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    window: list[str] = []
    length = 0
    for text in texts:
        window.append(f"{_START}{folded(text)}{_END}")
        length += len(window[-1])
        if length >= _WINDOW:
            yield window
            window, length = [], 0
    if window:
        yield window


def _shingled(window: list[str]) -> tuple[Numbers, Numbers]:
    """(row, shingle) of each different shingle of each text, sorted by both."""
    points = numpy.frombuffer("".join(window).encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    lengths = numpy.fromiter(map(len, window), dtype=numpy.int64, count=len(window))
    rows = numpy.repeat(numpy.arange(len(window), dtype=numpy.uint64), lengths)
    size = len(points) - SHINGLE + 1
    hashes = numpy.zeros(size, dtype=numpy.uint32)
    for i in range(SHINGLE):
        hashes = _mixed(hashes * numpy.uint32(0x01000193) + points[i : i + size])
    own = rows[:size] == rows[SHINGLE - 1 :]  # not across two texts
    both = numpy.sort((rows[:size][own] << numpy.uint64(32)) | hashes[own])
    both = both[numpy.concatenate([[True], both[1:] != both[:-1]])]  # numpy.unique hashes: five times the seconds
    return (both >> numpy.uint64(32)).astype(numpy.int64), both.astype(numpy.uint32)


def _mixed(values: Numbers) -> Numbers:
    """MurmurHash3's finalizer: every bit of 32 decides every other; a different value for each."""
    values = values ^ (values >> numpy.uint32(16))
    values = values * numpy.uint32(0x85EBCA6B)
    values = values ^ (values >> numpy.uint32(13))
    values = values * numpy.uint32(0xC2B2AE35)
    return values ^ (values >> numpy.uint32(16))


def _proposed(keys: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """Pairs with an equal key, the likeliest first: each with its bucket's first, then with those just before it."""
    order = numpy.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = numpy.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = numpy.maximum.accumulate(numpy.where(begins, numpy.arange(len(keys)), 0))
    yield order[first[~begins]], order[~begins]
    for distance in range(1, _NEIGHBOURS + 1):
        same = numpy.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            return
        yield order[same], order[same + distance]


class _Shingles:
    """The shingles of all texts, one behind the other."""

    def __init__(self, flat: Numbers, sizes: Numbers) -> None:
        self.flat, self.sizes = flat, sizes
        self.starts = numpy.cumsum(sizes) - sizes

    def near(self, left: Numbers, right: Numbers, threshold: float) -> Numbers:
        """Whether the Jaccard index of each pair reaches the threshold, exactly."""
        near = numpy.zeros(len(left), dtype=bool)
        sizes = self.sizes[left], self.sizes[right]
        may = numpy.flatnonzero(numpy.minimum(*sizes) >= threshold * numpy.maximum(*sizes))
        ends = numpy.cumsum(self.sizes[left[may]] + self.sizes[right[may]])
        for part in numpy.split(may, numpy.flatnonzero(numpy.diff(ends // (4 * _WINDOW))) + 1):
            shared = self._shared(left[part], right[part])
            union = self.sizes[left[part]] + self.sizes[right[part]] - shared
            near[part] = shared >= threshold * union
        return near

    def _shared(self, left: Numbers, right: Numbers) -> Numbers:
        """How many shingles each pair has in common."""
        both = numpy.sort(numpy.concatenate([self._numbered(left), self._numbered(right)]))
        twice = both[1:][both[1:] == both[:-1]] >> numpy.uint64(32)
        return numpy.bincount(twice.astype(numpy.int64), minlength=len(left))

    def _numbered(self, texts: Numbers) -> Numbers:
        """The shingles of these texts, each behind the place of its text among them."""
        sizes = self.sizes[texts]
        places = numpy.repeat(numpy.arange(len(texts), dtype=numpy.uint64), sizes)
        within = numpy.arange(len(places)) - numpy.repeat(numpy.cumsum(sizes) - sizes, sizes)
        flat = self.flat[numpy.repeat(self.starts[texts], sizes) + within]
        return (places << numpy.uint64(32)) | flat
