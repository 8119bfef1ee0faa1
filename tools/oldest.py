"""Print the lower bounds of pyproject.toml as exact requirements, for `make test-oldest`.

python tools/oldest.py [NAME ...]     packages to leave as they are, for example torch if only one build is available
"""

import re
import sys
import tomllib
from pathlib import Path


def oldest(requirement: str) -> str | None:
    """`torch>=2.11,<2.14` → `torch==2.11.*`; None for a requirement without a lower bound."""
    match = re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
    return f"{match[1]}=={match[2]}.*" if match else None


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    left = sys.argv[1:]
    requirements = [line for line in project["dependencies"] if not line.startswith(tuple(left))]
    print(" ".join(filter(None, map(oldest, requirements))))
