"""Entry: one value as the user wrote it, and where."""

from dataclasses import dataclass
from typing import Any

LONGEST_SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True)
class Entry:
    """A value as the user wrote it, and its origin: a flag, or a line of a file."""

    value: Any
    origin: str  # `--lora_rank`, `run.yaml:3`, `the demo`

    def place(self, name: str) -> str:
        """How an error names it: `--lora_rank 'x'`, `run.yaml:3: lora_rank 'x'`."""
        where = self.origin if self.origin.startswith("--") else f"{self.origin}: {name}"
        return f"{where} {self.shown()}"

    def shown(self) -> str:
        value = " ".join(map(str, self.value[:9])) if isinstance(self.value, list) else str(self.value)
        return repr(value if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]}…")
