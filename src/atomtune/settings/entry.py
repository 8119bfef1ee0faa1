"""Entry: a value as the user wrote it, and where."""

from dataclasses import dataclass
from typing import Any

from atomtune.language import message

#: Origins of values that nobody wrote: the library's default, atomtune's default, the demo, or chosen by the run (then
#: its reason follows).
DEFAULT, OWN_DEFAULT, OF_THE_DEMO, FOUND = "default", message("atomtune's default"), message("the demo"), "auto"
LONGEST_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Entry:
    """A value as the user wrote it, and its origin: a flag, or a line of a file."""

    value: Any
    origin: str  # `--lora_rank`, `run.yaml:3`, `the demo`

    def place(self, name: str) -> str:
        """The setting with its origin, for messages: `--lora_rank 'x'`, `run.yaml:3: lora_rank 'x'`."""
        where = self.origin if self.origin.startswith("--") else f"{self.origin}: {name}"
        return f"{where} {self.shown()}"

    def shown(self) -> str:
        """The value in quotes, shortened if it is long."""
        words = self.value if isinstance(self.value, list) else [self.value]
        shown = ["" if word is None else str(word) for word in words[:9]]  # more would be cut anyway
        text = " ".join(shown)
        if len(text) > LONGEST_SHOWN:
            text = f"{text[:LONGEST_SHOWN]}…"
        return repr(text)
