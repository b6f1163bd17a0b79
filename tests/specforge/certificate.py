"""Result files of the CUDA gate: what they must hold and prove, docs/verification.md's rows."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import eagle3fn
from eagle3fn.base.read import read_json, read_jsonl
from eagle3fn.specforge.oracle import COMMIT_FILES

CLAIMS = {
    "kernel": "our Triton loss equals SpecForge's, alone",
    "sdpa": "SpecForge's recipe equals SpecForge with `sdpa`, its Triton loss, dynamo off",
    "flex_attention": (
        "SpecForge's recipe equals SpecForge with `flex_attention` (unfused), its Triton loss, "
        "dynamo off"
    ),
    "dynamo": "distance from SpecForge with dynamo on; no parity",
}
"""Three bit-parity checks and one drift measurement."""

PARITY = ("kernel", "sdpa", "flex_attention")
PATTERN = "*cuda-gate*.json"
TESTS_PATTERN = "*cuda-tests*.jsonl"  # of `scripts/test.sh --device cuda --outcomes=FILE`
LINKS = "../bench/results"  # as seen from docs/verification.md
KIND = "cuda gate"  # of a result that was got on a card
TITLES = {
    "smoke": "every kernel, numerics, step, decoding and extraction once, tiny and at real widths",
    "tests": "the tests that take a device",
    "bench": "a step's time and memory",
    "profile": "one fast step by kernels, without a wait for the host",
    "updates": "SpecForge's script against ours, update by update",
}
OUTCOMES = ("passed", "failed", "skipped", "left_out")
UNVERIFIED = "| anything else on a card | no result file yet | - | not seen |"
NOT_SEEN = "not seen"
_ARITHMETIC = (
    "base/device.py",
    "base/dtypes.py",
    "base/grad.py",
    "base/rows.py",
    "base/tree.py",
    "data/collate.py",
    "model/autograd.py",
    "model/forward.py",
    "model/losses.py",
    "model/plain.py",
    "model/rope.py",
    "model/table.py",
    "model/teacher.py",
    "model/unroll.py",
    "model/visibility.py",
    "specforge/arithmetic.py",
    "specforge/kl_kernel.py",
    "specforge/recipes.py",
    "train/optimizer.py",
    "train/reduce.py",
    "train/step.py",
)
"""The sources of SpecForge's arithmetic and updates: where one changes, the claims are stale."""


def sources(every: bool = False) -> dict[str, str]:
    """Sha256 of each source of SpecForge's arithmetic, or of `every` source of the package."""
    root = Path(eagle3fn.__file__).parent
    names = _ARITHMETIC
    if every:
        names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.py"))]
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}


# What a result proves


def failures(parity: dict[str, Any], claims: tuple[str, ...]) -> list[str]:
    """Why the gate's part `parity` does not prove these claims; empty if it does.

    What did not run has not passed.
    """
    found = []
    if not parity.get("oracle"):
        found.append("no oracle: nothing was compared")
    for name in claims:
        claim = parity["claims"].get(name)
        if claim is None:
            found.append(f"{name}: not run")
        else:
            found += [f"{name}: {fault}" for fault in _faults(name, claim)]
    return found


def _faults(name: str, claim: dict[str, Any]) -> list[str]:
    """Why a claim that ran has not passed."""
    faults = []
    if claim.get("error"):
        faults.append(claim["error"])
    if claim.get("raised"):
        faults.append(f"{claim['raised']} cases ended with an exception")
    cases = claim["cases"]
    if not cases:
        return [*faults, "zero cases"]
    if name not in PARITY:
        return faults

    # Where SpecForge differs from itself nothing can be decided; every other case must be equal,
    # and the control must be detected in it.
    decided = cases - claim["undecidable"]
    if not decided:
        faults.append("every case undecidable: SpecForge differs from itself")
    for key in ("equal_old_kernel", "equal_own_kernel"):
        if claim[key] < decided:
            faults.append(f"{key} in {claim[key]} of {decided} decided cases")
    seen = claim["reordering_seen"]
    if seen < decided:
        faults.append(f"the deliberate reordering was detected in {seen} of {decided} cases")
    if claim["nontrivial"] < 0.8 * cases:
        faults.append(f"{claim['nontrivial']} of {cases} cases are not trivial")
    return faults


def stale(result: dict[str, Any]) -> list[str]:
    """Files, of ours or of SpecForge's, that have changed since a gate's result was made."""
    changed = []
    for name, digest in sources().items():
        if result["sources"].get(name) != digest:
            changed.append(name)

    oracle = result["parts"]["parity"]["result"]["oracle"]
    known = oracle["hashes"] if oracle["kind"] == "wheel" else COMMIT_FILES
    for name, digest in known.items():
        if oracle["hashes"].get(name) != digest:
            changed.append(f"specforge/{name}")
    return changed


# The rows of docs/verification.md


def rows(folder: str | Path) -> list[str]:
    """The page's rows of four cells: the newest of each part and claim in `folder`.

    A rehearsal on the CPU makes none. Without a result there is one row that reports it.
    """
    newest: dict[str, str] = {}
    for path in sorted(Path(folder).glob(PATTERN), key=lambda path: read_json(path)["date"]):
        for row in _rows(path):
            newest[row.split(":")[0]] = row
    for path in sorted(
        Path(folder).glob(TESTS_PATTERN), key=lambda path: read_jsonl(path)[0]["run"]["date"]
    ):
        row = _tests_row(path)
        newest[row.split(":")[0]] = row
    return list(newest.values()) or [UNVERIFIED]


def _tests_row(path: Path) -> str:
    """The row of a file of outcomes (tests/devices.py)."""
    head, *outcomes = read_jsonl(path)
    run = head["run"]
    counts = Counter(row["outcome"].replace(" ", "_") for row in outcomes if "outcome" in row)
    numbers = ", ".join(f"{counts[key]} {key.replace('_', ' ')}" for key in OUTCOMES)
    link = f"[{run['date'][:10]}]({LINKS}/{path.name}), revision {run['revision'][:12]}"
    return _row(
        f"`tests`: {TITLES['tests']}",
        f"{numbers}; {link}",
        _where(run),
        "scripts/test.sh --device cuda",
    )


def _rows(path: Path) -> list[str]:
    """The rows of a result of the gate."""
    result = read_json(path)
    if result.get("kind") != KIND:
        return []
    where = _where(result)
    link = f"[{result['date'][:10]}]({LINKS}/{path.name})"
    lines = []
    for name, part in result["parts"].items():
        if name == "parity":
            lines += _parity_rows(result, link, where)
        else:
            found = f"{_state(part)}; {link}, revision {result['revision'][:12]}"
            lines.append(_row(f"`{name}`: {TITLES.get(name, name)}", found, where))
    return lines


def _where(run: dict[str, Any]) -> str:
    return f"{run['hardware']['gpu']}, torch {run['versions']['torch']}"


def _parity_rows(result: dict[str, Any], link: str, where: str) -> list[str]:
    """Rows of the claims and, before them, of the tests that ran on the card."""
    part = result["parts"]["parity"]
    parity = part["result"]
    if not isinstance(parity, dict) or "claims" not in parity:
        found = f"not passed: {part['state']}; {link}"
        return [_row("`parity`: nothing was compared", found, where)]

    oracle = parity.get("oracle")
    changed = stale(result) if oracle else []
    if oracle and oracle.get("kind") == "wheel":
        where += "; in SpecForge's place its wheel specforge"

    lines = []
    if parity.get("tests"):
        counts = ", ".join(f"{parity['tests'][key]} {key.replace('_', ' ')}" for key in OUTCOMES)
        lines.append(_row(f"`tests`: {TITLES['tests']}", f"{counts}; {link}", where))
    for name, title in CLAIMS.items():
        faults = failures(parity, (name,))
        if changed:
            names = ", ".join(changed[:2])
            if len(changed) > 2:
                names += f" and {len(changed) - 2} more files"
            state = f"stale: {names} changed"
        elif faults:
            state = f"not passed: {'; '.join(faults)}"
        else:
            state = "passed"
        found = f"{state}{_numbers(parity['claims'].get(name))}; {link}"
        lines.append(_row(f"`{name}`: {title}", found, where))
    return lines


def _row(title: str, found: str, where: str, command: str = "scripts/cuda_gate.sh all") -> str:
    return f"| CUDA, {title} | `{command}` | {where} | {found} |"


def _state(part: dict[str, Any]) -> str:
    """How a part ended, with how many faults and how much left out."""
    result = part["result"] if isinstance(part["result"], dict) else {}
    state = "passed" if part["state"] == "passed" else f"not passed: {part['state']}"
    for name, key in (("faults", "faults"), ("left out", "left_out")):
        count = len(result.get(key, ()))
        if count:
            state += f", {count} {name}"
    return state


def _numbers(claim: dict[str, Any] | None) -> str:
    """The counts or distances of a claim, as the end of a sentence."""
    if claim is None or not claim["cases"]:
        return ""
    if "ulps" in claim:
        parts = [f"{value} ulps in {name}" for name, value in claim["ulps"].items()]
        return f", at most {', '.join(parts)}"
    decided = claim["cases"] - claim["undecidable"]
    return (
        f", {claim['equal_own_kernel']} of {decided} cases with our loss kernel, "
        f"{claim['equal_old_kernel']} with SpecForge's; {claim['undecidable']} undecidable"
    )


# Which tests a card has run


class Run(NamedTuple):
    """One run of the tests on a card."""

    date: str
    files: dict[str, Counter[str]]  # of each file how many tests: all, ended, passed
    sources: dict[str, str]  # sha256 of the package's files
    link: str


def seen(files: set[str], folder: str | Path) -> str:
    """The page's last cell of a row that names these files of tests.

    It reports the newest run in which one of their tests ended.
    """
    found = NOT_SEEN
    for run in sorted(_runs(Path(folder)), key=lambda run: run.date):
        ran = [run.files[name] for name in files if name in run.files and run.files[name]["ended"]]
        if not ran:
            continue

        every = sum(counts["all"] for counts in ran)
        passed = sum(counts["passed"] for counts in ran)
        whole = passed == every and len(ran) == len(files)
        state = "passed" if whole else f"{passed} of {every} passed"
        found = f"{state}, [{run.date[:10]}]({run.link})"
        if _package(run.sources) != _package(sources(every=True)):
            found += ", sources have changed since"
    return found


def _package(hashes: dict[str, str]) -> dict[str, str]:
    """Without the folder that only tests use."""
    return {name: digest for name, digest in hashes.items() if not name.startswith("testing/")}


MOVED = {
    "tests/test_data_target.py": "tests/data/test_target.py",
    "tests/test_data_online.py": "tests/data/test_online.py",
    "tests/test_laws.py": "tests/model/test_laws.py",
    "tests/test_parity.py": "tests/model/test_reference_parity.py",
    "tests/test_fast.py": "tests/model/test_fast.py",
    "tests/test_fast_cuda.py": "tests/model/test_fast_cuda.py",
    "tests/test_specforge_kernel.py": "tests/specforge/test_kl_kernel.py",
    "tests/test_oracle_training.py": "tests/specforge/test_oracle_training.py",
    "tests/test_reference_oracle.py": "tests/specforge/test_reference_oracle.py",
    "tests/test_mesh_of_one.py": "tests/train/test_mesh_of_one.py",
    "tests/test_use_decode.py": "tests/use/test_decode.py",
}
"""Files of tests under the names that results of 2026-11-26 give them, and where they are now."""


def _runs(folder: Path) -> Iterator[Run]:
    """The runs of the tests in results of the gate, and in files of outcomes (tests/devices.py)."""
    for path in folder.glob(PATTERN):
        result = read_json(path)
        parity = (result["parts"].get("parity") or {}).get("result") or {}
        tests = parity.get("tests") or {}
        if result.get("kind") == KIND and tests.get("files"):
            # Older results don't count what ended: what passed did.
            files = {}
            for name, counts in tests["files"].items():
                files[MOVED.get(name, name)] = Counter({"ended": counts["passed"]} | counts)
            yield Run(result["date"], files, result["sources"], f"{LINKS}/{path.name}")

    for path in folder.glob(TESTS_PATTERN):
        head, *outcomes = read_jsonl(path)
        run = head["run"]
        files = _counted(outcomes)
        yield Run(run["date"], files, run["sources"], f"{LINKS}/{path.name}")


def _counted(outcomes: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """The counts of each file, of a file of outcomes."""
    files: dict[str, Counter[str]] = {}
    for row in outcomes:
        for name in row.get("collected", ()):
            files.setdefault(_file_of(name), Counter())["all"] += 1
        if row.get("outcome") in ("passed", "failed", "skipped"):
            counts = files[_file_of(row["test"])]
            counts["ended"] += 1
            if row["outcome"] == "passed":
                counts["passed"] += 1
    return files


def _file_of(test: str) -> str:
    """The file of a test, where it is now."""
    file = test.partition("::")[0]
    return MOVED.get(file, file)


if __name__ == "__main__":
    print("\n".join(rows(sys.argv[1] if len(sys.argv) > 1 else "bench/results")))
