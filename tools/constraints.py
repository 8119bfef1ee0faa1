"""Write constraints.txt: the versions that `make demo`, `make test` and CI install, taken from this environment.

    python tools/constraints.py     # in an environment whose tests have just passed

pyproject.toml has the versions that atomtune supports; constraints.txt has those that a release was tested with.
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "constraints.txt"
HEAD = "# What this version was tested with; written by tools/constraints.py. Ranges are in pyproject.toml.\n"


def requirements() -> dict[str, str]:
    """Every package that pyproject.toml names, with extras, and its requirement."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {re.split(r"[^A-Za-z0-9_.-]", line)[0]: line for line in lines}


def main() -> None:
    lines = []
    for name in sorted(requirements().keys() - {"atomtune"}, key=str.lower):  # atomtune's extras may name others
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # an extra that the tests do not use
        lines.append(f"{name}=={installed.partition('+')[0]}\n")  # without the build: 2.13.0+cpu becomes 2.13.0
    FILE.write_text(HEAD + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
