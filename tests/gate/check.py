"""Checks what the CUDA gate and the tests on a card need, before anything is done.

`python -m tests.gate.check gate|tests OPTIONS` refuses with one sentence on stderr and exit code 2.
Otherwise it prints lines for `scripts/cuda_env.sh`:

1. `ready`: nothing is missing; `site`: nothing is missing with the packages of .venv-cuda;
   `install`: the requirements below are missing
2. the folder of wheels, or an empty line
3. the checkout of SpecForge; `clone` if it must be cloned; empty if its package is installed
4. and more: the requirements to install, one a line

Only the standard library is imported at the top: this runs where nothing is installed yet.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / ".venv-cuda" / "site"
DEFAULT_PARTS = ("smoke", "parity", "bench", "profile")
PARTS = (*DEFAULT_PARTS, "updates")
OLDEST_PYTHON = (3, 11)
LEAST_CAPABILITY = (8, 0)
REQUIRED = tuple("torch triton transformers numpy safetensors tqdm pytest hypothesis".split())
"""Packages that the Python must have already."""

ADDED = ("optree", "yunchang")
"""Packages that are installed if they are missing; SpecForge too, where no checkout is named."""

LONGEST = 120.0  # minutes


class RefusedError(Exception):
    """One sentence: what is missing or wrong, and the remedy."""


class Plan(NamedTuple):
    """What `scripts/cuda_env.sh` has to do."""

    state: str  # ready, site or install
    wheels: str
    src: str
    requirements: list[str]


class _Parser(argparse.ArgumentParser):
    """Reports an error in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise RefusedError(message)


def gate_parser() -> argparse.ArgumentParser:
    """The options of `scripts/cuda_gate.sh all`."""
    parser = _Parser(
        prog="scripts/cuda_gate.sh", description="all checks and measurements on one CUDA card"
    )
    add = parser.add_argument
    add("what", choices=("all",), help="the gate")
    add(
        "--parts",
        default=",".join(DEFAULT_PARTS),
        help=f"some of {', '.join(PARTS)}; or failed:FILE, see docs/verification.md",
    )
    add(
        "--minutes",
        type=float,
        default=5.0,
        help="for all parts together; the call ends a minute later (default 5)",
    )
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a rehearsal that certifies nothing",
    )
    add(
        "--out",
        type=Path,
        help="default bench/results/DATE-cuda-gate.json, or runs/cuda-gate-rehearsal.json",
    )
    add("--revision", help="which revision this is, on a machine without git")
    _sources(parser)
    return parser


def tests_parser() -> argparse.ArgumentParser:
    """The options of `scripts/test.sh --device`, without those of pytest."""
    parser = _Parser(prog="scripts/test.sh", description="the tests on a device")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    _sources(parser)
    return parser


def _sources(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--wheels",
        type=Path,
        help="install what is missing from these wheels alone, without a network",
    )
    add(
        "--src",
        type=Path,
        help="a checkout of SpecForge at the commit of its pull request 600 (or SPECFORGE_SRC)",
    )


def parts_of(options: argparse.Namespace) -> list[str]:
    """The parts to run, in the gate's order.

    After `failed:` these are the parts of an earlier result that did not pass, and `updates`.

    Raises:
        RefusedError: a part that does not exist, none at all, or no such result.
    """
    kind, _, rest = options.parts.partition(":")
    if kind == "failed":
        chosen = [*_not_passed(Path(rest)), "updates"]
    else:
        chosen = [name for name in options.parts.split(",") if name]
        unknown = [name for name in chosen if name not in PARTS]
        if unknown or not chosen:
            raise RefusedError(
                f"--parts {options.parts}: {unknown[0] if unknown else 'nothing'} is no part; "
                f"name some of {', '.join(PARTS)}, or failed:FILE with an earlier result"
            )
    return [name for name in PARTS if name in chosen]


def _not_passed(path: Path) -> list[str]:
    """Names of an earlier result's parts that did not pass, and of what it left out."""
    found = _gate_result(path)
    failed = [name for name, part in found["parts"].items() if part.get("state") != "passed"]
    left_out = [name for name in found["left_out"] if name not in found["parts"]]
    return failed + left_out


def _gate_result(path: Path) -> dict[str, Any]:
    """An earlier result of the gate."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        parts_are_records = all(isinstance(part, dict) for part in tree["parts"].values())
        names_are_text = all(isinstance(name, str) for name in tree["left_out"])
        if parts_are_records and names_are_text:
            return tree
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise RefusedError(
        f"--parts failed:{path}: no result of the gate there; name the file of an earlier --out"
    )


def check_options(options: argparse.Namespace) -> None:
    """Refuse an impossible time, parts that don't exist, and a result file that can't be written.

    Raises:
        RefusedError: names the option, its value and the remedy.
    """
    if not 0 < options.minutes <= LONGEST:
        raise RefusedError(
            f"--minutes {options.minutes:g}: must be above 0 and at most {LONGEST:g}"
        )
    parts_of(options)

    out = options.out
    if out is None:
        return
    kind, _, earlier = options.parts.partition(":")
    if kind == "failed" and out.absolute() == Path(earlier).absolute():
        raise RefusedError(
            f"--out {out}: holds the earlier result, which would be lost; name another file"
        )
    if out.is_dir() or not _writable(out.parent):
        raise RefusedError(f"--out {out}: cannot be written; name a file in a folder of yours")


def _writable(folder: Path) -> bool:
    """Whether a file can be created there, once missing folders are created too."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_python(device: str) -> None:
    """Refuse a Python that is too old or lacks a required package, and an unusable card.

    Raises:
        RefusedError: names what is missing and the remedy.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        least = ".".join(map(str, OLDEST_PYTHON))
        raise RefusedError(
            f"Python {sys.version.split()[0]}: {least} or newer is needed; name another by PYTHON"
        )
    for package in REQUIRED:
        if importlib.util.find_spec(package) is None:
            why = "the kernels are written in it; " if package == "triton" else ""
            raise RefusedError(
                f"{sys.executable} has no {package}: {why}install it, "
                "or name another Python by PYTHON"
            )

    if device == "cuda":
        try:
            check_card()
        except (RuntimeError, OSError, ImportError) as error:
            # A driver, a library or a card that does not work.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RefusedError(
                f"the card cannot be used ({reason}); mend it, or --device cpu rehearses"
            ) from None


def check_card() -> None:
    """Refuse a machine without a card that torch has code for and that the kernels run on.

    Raises:
        RefusedError: names the card and what it lacks.
    """
    import torch

    cuda = torch.cuda
    if not cuda.is_available():
        built = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        raise RefusedError(f"no CUDA card is here{built}; --device cpu rehearses on the CPU")
    card = cuda.get_device_name()
    capability = cuda.get_device_capability()
    shown = ".".join(map(str, capability))
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise RefusedError(
            f"{card} has compute capability {shown}; {least} or newer is needed, for bf16 and flash"
        )
    if not has_code(capability, cuda.get_arch_list()):
        raise RefusedError(
            f"torch {torch.__version__} has no code for {card} of compute capability {shown} "
            f"(it has {', '.join(cuda.get_arch_list())}); install a torch built for it"
        )


def has_code(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a card can run one of the architectures that torch was built for.

    Machine code runs on its own generation from its version on; PTX also on newer generations.
    """
    for name in built:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if found is None:
            continue
        version = (int(found[2]), int(found[3]))
        if version == capability:
            return True

        only_that_card = found[4] == "a"
        is_ptx = found[1] == "compute"
        same_generation = version[0] == capability[0]
        if version < capability and not only_that_card and (is_ptx or same_generation):
            return True
    return False


def commit_files() -> dict[str, str]:
    """`eagle3fn.specforge.oracle.COMMIT_FILES`, parsed: what that file imports may be missing."""
    source = (ROOT / "eagle3fn" / "specforge" / "oracle.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "COMMIT_FILES":
            return ast.literal_eval(node.value)
    raise AssertionError("oracle.py has no COMMIT_FILES")


def check_src(src: Path) -> None:
    """Refuse a folder that is not SpecForge at the commit of its pull request 600.

    Raises:
        RefusedError: names the file that is missing or other.
    """
    if not (src / "specforge" / "optimizer.py").is_file():
        raise RefusedError(
            f"--src {src}: no checkout of SpecForge there (specforge/optimizer.py is missing)"
        )
    for name, digest in commit_files().items():
        path = src / "specforge" / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise RefusedError(
                f"--src {src}: specforge/{name} is not the file of pull request 600; "
                "check out its commit there"
            )


def importable(package: str, site: Path | None = None) -> bool:
    """Whether a fresh process imports it, with the packages in `site` before its own."""
    # SpecForge imports many packages and needs settings of its own: it is only looked for.
    if package == "specforge":
        if importlib.util.find_spec(package) is not None:
            return True
        if site is None:
            return False
        return importlib.machinery.PathFinder.find_spec(package, [str(site)]) is not None

    path = [str(site)] if site else []
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    call = [sys.executable, "-c", f"import {package}"]
    done = subprocess.run(call, env=variables, capture_output=True, check=False)
    return done.returncode == 0


def requirements(packages: list[str]) -> list[str]:
    """Lines of `scripts/cuda-requirements.txt` for these packages: versions with hashes."""
    path = ROOT / "scripts" / "cuda-requirements.txt"
    joined = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [" ".join(line.split()) for line in lines if line.split("==")[0] in packages]


def check_wheels(wheels: Path, lines: list[str]) -> None:
    """Refuse a folder that lacks a wheel for this Python, or holds one with other bytes.

    Raises:
        RefusedError: names the wheel.
    """
    if not wheels.is_dir():
        raise RefusedError(f"--wheels {wheels}: no such folder")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for line in lines:
        name, version = line.split()[0].split("==")
        hashes = re.findall(r"sha256:([0-9a-f]{64})", line)
        fitting = [path for path in wheels.glob(f"{name}-{version}-*.whl") if _fits(path)]
        if not fitting:
            raise RefusedError(
                f"--wheels {wheels}: no wheel of {name} {version} for Python {python}; add it"
            )
        if not any(hashlib.sha256(path.read_bytes()).hexdigest() in hashes for path in fitting):
            raise RefusedError(
                f"--wheels {wheels}: {fitting[0].name} has other bytes than expected; fetch it anew"
            )


def _fits(wheel: Path) -> bool:
    """Whether a wheel's name has the tags of this Python and this kind of machine."""
    *_, python, _abi, platform = wheel.stem.split("-")
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    fits_python = bool({own, "py3"} & set(python.split(".")))
    fits_machine = platform == "any" or os.uname().machine in platform
    return fits_python and fits_machine


def plan_of(options: argparse.Namespace) -> Plan:
    """What is missing here, and where it comes from.

    Raises:
        RefusedError: a folder of SpecForge or of wheels that does not fit, or no pip.
    """
    # SpecForge's checkout: the option, or the variable.
    given = options.src
    if given is None and os.environ.get("SPECFORGE_SRC"):
        given = Path(os.environ["SPECFORGE_SRC"])
    if given is not None:
        check_src(given)
    if options.wheels is not None:
        check_wheels(options.wheels, [])
    src = str(given.absolute()) if given is not None else ""
    wheels = str(options.wheels.absolute()) if options.wheels is not None else ""

    # What is missing. Without a checkout SpecForge's package is installed from a wheel, or its
    # repository is cloned.
    packages = list(ADDED) if given is not None else [*ADDED, "specforge"]
    missing = [package for package in packages if not importable(package)]
    if "specforge" in missing and options.wheels is None:
        missing.remove("specforge")
        src = "clone"
    if not missing:
        return Plan("ready", wheels, src, [])
    if SITE.is_dir() and all(importable(package, SITE) for package in missing):
        return Plan("site", wheels, src, [])

    # What is installed, by version and hash.
    lines = requirements(missing)
    if options.wheels is not None:
        check_wheels(options.wheels, lines)
    if importlib.util.find_spec("pip") is None:
        raise RefusedError(
            f"{sys.executable} has no pip and no {missing[0]}: install it, "
            "or name another by PYTHON"
        )
    return Plan("install", wheels, src, lines)


def main(arguments: list[str]) -> int:
    """Check for the gate or for the tests, and print the plan."""
    name = "scripts/cuda_gate.sh"
    try:
        if arguments[:1] == ["tests"]:
            name = "scripts/test.sh"
            options = tests_parser().parse_args(arguments[1:])
        else:
            options = gate_parser().parse_args(arguments[1:])
            check_options(options)
        check_python(options.device)
        plan = plan_of(options)
    except RefusedError as refusal:
        print(f"{name}: {refusal}", file=sys.stderr)
        return 2
    print("\n".join([plan.state, plan.wheels, plan.src, *plan.requirements]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
