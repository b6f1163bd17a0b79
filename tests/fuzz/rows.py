"""Rows that a resumed run may not lose without a word."""

import json
from pathlib import Path
from typing import Any

STEP = 4  # that the world's run resumes from


class Rows:
    """The rows of a file of JSON lines before a call."""

    def __init__(self, path: Path) -> None:
        """Read what can be read; a file that is none has no rows."""
        self.path = path
        self.good: list[Any] = []
        self.bad = 0
        if not path.is_file() or path.stat().st_size > 1 << 20:
            self.bad = 1
            return

        # The last line may be half written: a run that was killed leaves it so.
        text = path.read_bytes().decode(errors="backslashreplace")
        lines = text.split("\n")[:-1]
        for line in lines:
            row = _row(line)
            if row is None:
                self.bad += bool(line.strip())
            elif row["step"] <= STEP:
                self.good.append(row)

    def lost(self) -> int:
        """How many damaged rows there were, and good ones that are gone now."""
        kept = Rows(self.path).good
        return self.bad + sum(row not in kept for row in self.good)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row
