"""Near-duplicates: groups of nearly equal texts, found without comparing all pairs (MinHash).

Two texts are near if the Jaccard index of their shingles reaches the threshold. A shingle is three consecutive
characters, ends marked, after case, width, space and punctuation are removed. MinHash with bands proposes pairs, and
each pair is then measured exactly, so chance never puts two texts into one group. Chance only decides whether a pair is
proposed: 998 of 1,000 pairs at index 0.8, all but one in a million at 0.9.
Memory: 64 bytes per text and a window of a few MB; the shingles are in a temporary file, four bytes each.
"""

import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeAlias

import numpy
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[Any]

SHINGLE = 3
#: A pair with Jaccard index j is proposed with probability 1 - (1 - j**ROWS)**BANDS:
#:     j        0.5   0.6   0.7   0.8    0.9
#:     chance   0.40  0.73  0.95  0.998  0.999999
BANDS, ROWS = 16, 5
#: Characters that are shingled at once; a quarter of the shingles that are compared at once.
_WINDOW = 2**20
#: Within a bucket, each text is compared with the first and with this many before it, so that the time is linear.
_NEIGHBOURS = 8
_START, _END = "\x02", "\x03\x03"


class _Folds(dict[int, str]):
    """Code point → its character, or "" for space, punctuation and controls; filled on demand."""

    def __missing__(self, point: int) -> str:
        character = chr(point)
        if unicodedata.category(character)[0] in "ZPC":
            character = ""
        self[point] = character
        return character


_FOLDS = _Folds()


def folded(text: str) -> str:
    """The text with case and width normalized, without space and punctuation; if nothing is left, with punctuation."""
    same_width = unicodedata.normalize("NFKC", text).casefold()
    return same_width.translate(_FOLDS) or "".join(same_width.split())


def near_groups(texts: Iterable[str], *, threshold: float = 0.8) -> Numbers:
    """The group of each of N texts, int64 [N]: the index of its first member.

    Texts that are near, directly or through a chain of near texts, share a group. The texts are read once. The same
    texts in the same order give the same groups.
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
                # Most pairs of later bands are in one group already and need not be measured again.
                is_new = groups[left] != groups[right]
                new_left, new_right = left[is_new], right[is_new]
                near = shingles.near(new_left, new_right, threshold)
                groups = _united(groups, new_left[near], new_right[near])
    return groups


def equal_groups(values: Numbers) -> Numbers:
    """The group of each value, int64 [N]: the index of the first equal value."""
    _, first, inverse = numpy.unique(values, return_index=True, return_inverse=True)
    return first[inverse].astype(numpy.int64)


def joined(*groupings: Numbers) -> Numbers:
    """Merge groupings of the same N items: items in one group of any grouping share a group of the result.

    Each grouping, and the result, is [N]; a group of the result is named by the index of its first member.
    """
    groups = numpy.arange(len(groupings[0]))
    for grouping in groupings:
        assert len(grouping) == len(groups)
        groups = _united(groups, equal_groups(grouping), numpy.arange(len(groups)))
    return groups


def _united(groups: Numbers, left: Numbers, right: Numbers) -> Numbers:
    """The groups after left[i] and right[i] are merged, for each i. A group is named by its first member's index."""
    groups = groups.copy()
    while True:
        left_firsts, right_firsts = groups[left], groups[right]
        differ = left_firsts != right_firsts
        if not differ.any():
            return groups
        earlier = numpy.minimum(left_firsts, right_firsts)[differ]
        later = numpy.maximum(left_firsts, right_firsts)[differ]
        # If a group is to join several, any one of them will do: the rest is merged in the next round.
        groups[later] = earlier
        groups = _named_by_firsts(groups)


def _named_by_firsts(groups: Numbers) -> Numbers:
    """Follow chains of groups to their end: 3 → 2 → 0 becomes 3 → 0."""
    while True:
        further = groups[groups]
        if (further == groups).all():
            return groups
        groups = further


def _sketch(texts: Iterable[str], file: IO[bytes]) -> tuple[Numbers, Numbers]:
    """Write the distinct shingles of each text, sorted, to the file as uint32.

    Returns (sizes [N], the number of shingles of each text; keys [BANDS, N], see _band_keys).
    """
    factors, offsets = _hashes()
    sizes, keys = [], []
    for window in _windows(texts):
        rows, shingles = _shingled(window)
        file.write(shingles.data)  # shingles.tofile(file) reports a full disk without its errno
        window_sizes = numpy.bincount(rows, minlength=len(window))  # [W]
        sizes.append(window_sizes)
        keys.append(_band_keys(shingles, window_sizes, factors, offsets))
    if not sizes:
        return numpy.zeros(0, dtype=numpy.int64), numpy.zeros((BANDS, 0), dtype=numpy.uint32)
    return numpy.concatenate(sizes), numpy.concatenate(keys, axis=1)


def _band_keys(shingles: Numbers, sizes: Numbers, factors: Numbers, offsets: Numbers) -> Numbers:
    """[BANDS, W] One key per band and text: texts whose minima agree in all ROWS hashes of a band share its key.

    shingles  of W texts, concatenated
    sizes     [W] number of shingles of each text
    """
    starts = numpy.cumsum(sizes) - sizes
    keys = numpy.zeros((BANDS, len(sizes)), dtype=numpy.uint32)
    for number, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        hashes = _mixed((shingles ^ offset) * factor)
        minima = numpy.minimum.reduceat(hashes, starts)  # [W]
        band = number // ROWS
        keys[band] = _mixed(keys[band] * numpy.uint32(0x9E3779B1) + minima)  # a prime near 2**32 / golden ratio
    return keys


def _hashes() -> tuple[Numbers, Numbers]:
    """Odd factors and offsets of the BANDS * ROWS hash functions, the same in every process."""
    generator = numpy.random.default_rng(20_26)
    halves = generator.integers(0, 2**31, BANDS * ROWS, numpy.uint32)
    factors = halves * numpy.uint32(2) + numpy.uint32(1)  # an even factor would give many shingles the same hash
    offsets = generator.integers(0, 2**32, BANDS * ROWS, numpy.uint32)
    return factors, offsets


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
    """(rows, shingles) of the distinct shingles of each text, sorted by row, then by shingle."""
    points = numpy.frombuffer("".join(window).encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)  # [P]
    lengths = numpy.fromiter(map(len, window), dtype=numpy.int64, count=len(window))
    rows = numpy.repeat(numpy.arange(len(window), dtype=numpy.uint64), lengths)  # [P] the text of each character

    n_shingles = len(points) - SHINGLE + 1
    hashes = numpy.zeros(n_shingles, dtype=numpy.uint32)
    for i in range(SHINGLE):
        hashes = _mixed(hashes * numpy.uint32(0x01000193) + points[i : i + n_shingles])  # FNV's prime
    within_text = rows[:n_shingles] == rows[SHINGLE - 1 :]  # first and last character are in the same text

    # row and shingle as one number, so that one sort orders both:   row << 32 | shingle
    pairs = numpy.sort((rows[:n_shingles][within_text] << numpy.uint64(32)) | hashes[within_text])
    pairs = pairs[_is_new(pairs)]  # numpy.unique uses hashing and takes five times as long
    return (pairs >> numpy.uint64(32)).astype(numpy.int64), pairs.astype(numpy.uint32)


def _is_new(ordered: Numbers) -> Numbers:
    """Whether each value differs from the one before it."""
    return numpy.concatenate([[True], ordered[1:] != ordered[:-1]])


def _mixed(values: Numbers) -> Numbers:
    """MurmurHash3's finalizer for uint32: a bijection in which every input bit affects every output bit."""
    values = values ^ (values >> numpy.uint32(16))
    values = values * numpy.uint32(0x85EBCA6B)
    values = values ^ (values >> numpy.uint32(13))
    values = values * numpy.uint32(0xC2B2AE35)
    return values ^ (values >> numpy.uint32(16))


def _proposed(keys: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """Pairs of texts with equal keys, most likely first: each with the first of its bucket, then with those before it.

    keys  [N]  of one band
    """
    order = numpy.argsort(keys, kind="stable")
    ordered = keys[order]
    # keys in order   5 5 5 8 9 9
    # begins          1 . . 1 1 .
    # bucket_first    0 0 0 3 4 4
    begins = _is_new(ordered)
    bucket_first = numpy.maximum.accumulate(numpy.where(begins, numpy.arange(len(keys)), 0))
    yield order[bucket_first[~begins]], order[~begins]
    for distance in range(1, _NEIGHBOURS + 1):
        same = numpy.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            return
        yield order[same], order[same + distance]


class _Shingles:
    """The shingles of all texts, concatenated in `flat`; text i has sizes[i] of them from starts[i] on."""

    def __init__(self, flat: Numbers, sizes: Numbers) -> None:
        self.flat, self.sizes = flat, sizes
        self.starts = numpy.cumsum(sizes) - sizes

    def near(self, left: Numbers, right: Numbers, threshold: float) -> Numbers:
        """Whether the exact Jaccard index of each pair (left[i], right[i]) reaches the threshold, bool."""
        near = numpy.zeros(len(left), dtype=bool)
        left_sizes, right_sizes = self.sizes[left], self.sizes[right]
        smaller = numpy.minimum(left_sizes, right_sizes)
        larger = numpy.maximum(left_sizes, right_sizes)
        # The index is at most smaller / larger, so the sizes alone rule out most pairs.
        possible = numpy.flatnonzero(smaller >= threshold * larger)

        # Compare about 4 * _WINDOW shingles at once: a new part begins where the running sum passes a multiple of that.
        both_sizes = left_sizes + right_sizes
        part_numbers = numpy.cumsum(both_sizes[possible]) // (4 * _WINDOW)
        borders = numpy.flatnonzero(numpy.diff(part_numbers)) + 1
        for part in numpy.split(possible, borders):
            shared = self._shared(left[part], right[part])
            union = both_sizes[part] - shared
            near[part] = shared >= threshold * union
        return near

    def _shared(self, left: Numbers, right: Numbers) -> Numbers:
        """The number of shingles that each pair has in common."""
        # A text has each shingle once, so a value that occurs twice is in both texts of its pair.
        both = numpy.sort(numpy.concatenate([self._numbered(left), self._numbered(right)]))
        twice = both[1:][both[1:] == both[:-1]]
        pairs = (twice >> numpy.uint64(32)).astype(numpy.int64)
        return numpy.bincount(pairs, minlength=len(left))

    def _numbered(self, texts: Numbers) -> Numbers:
        """The shingles of these texts as place << 32 | shingle, with the index of the text in `texts` as place."""
        sizes = self.sizes[texts]
        places = numpy.repeat(numpy.arange(len(texts), dtype=numpy.uint64), sizes)
        first_places = numpy.repeat(numpy.cumsum(sizes) - sizes, sizes)
        number_in_text = numpy.arange(len(places)) - first_places
        shingles = self.flat[numpy.repeat(self.starts[texts], sizes) + number_in_text]
        return (places << numpy.uint64(32)) | shingles
