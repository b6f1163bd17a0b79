"""A stand-in for vLLM's program of features: answers with files that were made beforehand.

It runs without torch, so that it starts at once. A file `plan.json` next to it has the version, the
folder of the files and how it goes wrong.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from answering import serve  # pyright: ignore[reportMissingImports]

PLAN = Path(__file__).parent / "plan.json"


def start(settings: dict[str, Any]) -> Any:
    plan = json.loads(PLAN.read_text())
    made = json.loads((Path(plan["files"]) / "rows.json").read_text())
    loads = {"folder": ""}
    served = [0]

    def answer(request: dict[str, Any]) -> Any:
        if "load" in request:
            assert not loads["folder"], "it is loaded"
            Path(plan["files"], "load.json").write_text(json.dumps(request["load"]))
            loads["folder"] = request["load"]["folder"]
            time.sleep(plan.get("load_seconds", 0))
            if plan.get("wrong") == "loads not":
                raise RuntimeError("no kernel\nfor heads of 16")
            return {"dtype": "float32", "quantization": None}
        if "write" in request:
            Path(plan["files"], "write.json").write_text(json.dumps(request))
            return ordered([one(row_after(prompt), False) for prompt in request["write"]])
        return ordered([one(row, request["scores"]) for row in request["rows"]])

    def ordered(answers: list[Any]) -> list[Any]:
        return answers[::-1] if plan.get("order") == "reversed" else answers

    def row_after(prompt: list[int]) -> list[int]:
        rows = [json.loads(name) for name in made]
        return next(row for row in rows if row[: -plan["written"]] == prompt)

    def one(row: list[int], scores: bool) -> Any:
        served[0] += 1
        files = plan["files"]
        if served[0] > plan.get("rows", 10**9):
            files = plan.get("wrong_files") or fail(plan["wrong"])
        found = made[json.dumps(row)]
        path = os.path.join(loads["folder"], f"{served[0]}.safetensors")
        shutil.copy(os.path.join(files, found["file"]), path)
        return {"path": path, "scores": found["scores"] if scores else []}

    facts = {"version": plan["version"], "device": "cpu", "samples": plan.get("samples", True)}
    return facts, answer


def fail(how: str) -> str:
    """End, or do not."""
    if how == "memory":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB")
        os._exit(1)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        time.sleep(60)
    raise ValueError(how)


if __name__ == "__main__":
    serve(start)
