"""A stand-in for an engine's program: decodes by a rule, and counts rounds as engines do.

The plain token after `t` is `(3·t + 1) % VOCAB`. Settings' arguments say how it goes wrong.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from answering import serve  # pyright: ignore[reportMissingImports]

VOCAB = 64


def start(settings: dict[str, Any]) -> Any:
    wrong = settings["arguments"]
    if wrong.get("refuses") and settings["draft"]:
        raise RuntimeError("no such draft:\nfc.weight has the wrong shape")

    def answer(request: dict[str, Any]) -> Any:
        if wrong.get("dies") and settings["draft"]:
            raise SystemExit(7)
        return decode(request, settings, wrong)

    facts = {"version": wrong.get("version", "2030.1"), "samples": not wrong.get("greedy")}
    return facts, answer


def decode(request: dict[str, Any], settings: dict[str, Any], wrong: dict[str, Any]) -> Any:
    length = settings["draft_length"]
    tokens = [following(request["prompt"][-1])]
    accepted = [0] * length
    rounds = 0
    while not ended(tokens, request, settings):
        # Round r accepts r modulo (length + 1) drafted tokens, also those beyond the end.
        count = rounds % (length + 1) if settings["draft"] else 0
        rounds += 1
        for position in range(count):
            accepted[position] += 1
        for _ in range(count + 1):
            if not ended(tokens, request, settings):
                tokens.append(following(tokens[-1]))

    if wrong.get("differs") and settings["draft"] and len(tokens) > 3:
        tokens[3] += 1
    counts = None
    if settings["draft"]:
        counts = {
            "rounds": rounds,
            "drafted": rounds * length,
            "accepted": sum(accepted),
            "drafted_by_position": [rounds] * length,
            "accepted_by_position": accepted,
        }
        if wrong.get("ignores"):
            counts = {"rounds": 0, "drafted": 0, "accepted": 0}
        if wrong.get("silent"):
            counts = {}
    return {"tokens": tokens, "seconds": 0.5 if settings["draft"] else 1.0, "counts": counts}


def following(token: int) -> int:
    return (3 * token + 1) % VOCAB


def ended(tokens: list[int], request: dict[str, Any], settings: dict[str, Any]) -> bool:
    return len(tokens) >= request["max_new"] or tokens[-1] in settings["end_tokens"]


if __name__ == "__main__":
    serve(start)
