"""Run the demo and draw what it prints: docs/demo.svg, the picture in the README.

python tools/draw_demo.py
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110
PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "atomtune", "train"],
            cwd=folder,
            env={**os.environ, "COLUMNS": str(WIDTH), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
    package = str(Path(__file__).parents[1] / "src" / "atomtune")
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    console.print(Text("$ atomtune train", style="bold green"))
    console.print(Text(done.stdout.replace(package, "atomtune")))
    svg = console.export_svg(title="atomtune")
    # Rich's SVG makes the browser download a font; without it the browser uses its own.
    PICTURE.write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")
    print(done.stdout)


if __name__ == "__main__":
    main()
