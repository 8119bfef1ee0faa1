"""Print the walks and the signs, and write the map into CONTRIBUTING.md.

python -m tools.house                       # make house
python -m tools.house --source ../other/src/atomtune    # measure another tree; nothing is written
"""

import argparse
from pathlib import Path

from tools.house.map import TITLES, computed, figures, with_map
from tools.house.signs import signs
from tools.house.source import Source
from tools.house.walks import take_walks

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="the folder atomtune of another tree; nothing is written then")
    parser.add_argument("--signs", action="store_true", help="only the signs, which need no run")
    options = parser.parse_args()
    source = Source(options.source or ROOT / "src" / "atomtune")
    if not options.signs:
        walks = take_walks(source)
        for name, walk in walks.items():
            print(f"{TITLES[name]}:\n  {figures(walk)}\n  rooms: {' → '.join(walk.rooms)}\n")
        if options.source is None:
            page = ROOT / "CONTRIBUTING.md"
            page.write_text(with_map(page.read_text(encoding="utf-8"), computed(source, walks)), encoding="utf-8")
    print(signs(source))


if __name__ == "__main__":
    main()
