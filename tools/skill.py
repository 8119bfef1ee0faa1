"""Write the last part of SKILL.md, the commands and the exit codes, from the declarations of the command line.

python -m tools.skill
"""

from pathlib import Path

from atomtune.cli import COMMANDS
from atomtune.errors import EXIT_CODE_MEANINGS
from atomtune.settings.flags import types_of
from atomtune.settings.help import USAGE
from atomtune.settings.read import GROUPS

FILE = Path(__file__).resolve().parents[1] / "SKILL.md"
MARK = "<!-- computed by `python -m tools.skill` -->\n"


def tables() -> str:
    """The table of commands, with those that print JSON, and the table of exit codes."""
    lines = ["## Commands", "", "| command | what it does | `--json` |", "|---|---|---|"]
    for name, command in COMMANDS.items():
        prints_json = "yes" if "json" in types_of(GROUPS[name]) else ""
        usage = USAGE[name].replace("|", "\\|")
        lines.append(f"| `atomtune {name} {usage}` | {command.summary} | {prints_json} |")
    lines += ["", "## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {int(code)} | {meaning} |" for code, meaning in EXIT_CODE_MEANINGS.items()]
    return "\n".join(lines) + "\n"


def written() -> str:
    """The text that SKILL.md should have."""
    by_hand = FILE.read_text(encoding="utf-8").partition(MARK)[0]
    return f"{by_hand}{MARK}\n{tables()}"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
