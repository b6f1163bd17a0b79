"""Stands in for bench/speculators_step.py: our own plain step on the file that a peer is given.

python tests/bench/fake_peer.py bench/speculators_step.py CASE TINY
"""

import json
import sys
from typing import Any

from safetensors import safe_open

from bench import sides
from bench.answers import open_answers, serve
from bench.problem import Problem
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.types import Batch, Frozen


def main() -> None:
    answers = open_answers()
    print("noise that is no answer")
    with safe_open(sys.argv[2], "pt") as file:
        head = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def part(group: str) -> dict[str, Any]:
        prefix = f"{group}."
        return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}

    draft = DraftConfig(**json.loads(head["draft"]))
    problem = Problem(draft, Frozen(**part("frozen")), Batch(**part("batch")))
    assert str(problem.batch.aux_hidden.dtype) == f"torch.{head['dtype']}"
    update = sides.make_side("plain", problem, part("params"), None, int(head["k"]))
    ready = {
        "versions": {"fake": "1.0"},
        "notes": ["it is our own step"],
        "memory": {"peak": 3000, "inputs": 1000, "idle": 2000, "step": 2000},
        "own_loss": float(head["decay"]),
        "first_loss": float(update()),
    }
    serve(answers, ready, update)


if __name__ == "__main__":
    main()
