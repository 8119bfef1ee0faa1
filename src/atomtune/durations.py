"""Durations: seconds as text in the language in use, measured or estimated."""

from atomtune.language import translated


def duration(seconds: float) -> str:
    """A measured time: `45 s`, `3 min 38 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return translated(f"{hours} h {minutes} min")
    return translated(f"{minutes} min {rest} s") if minutes else translated(f"{rest} s")


def rough_duration(seconds: float) -> str:
    """An estimated time, which a sentence calls `about`: `45 seconds`, `4 minutes`, `2.5 hours`."""
    seconds = max(seconds, 1)
    if seconds < 90:
        return translated(f"{seconds:.0f} seconds")
    if seconds < 90 * 60:
        return translated(f"{seconds / 60:.0f} minutes")
    return translated(f"{seconds / 3600:.1f} hours")
