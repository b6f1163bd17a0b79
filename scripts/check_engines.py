"""A draft in serving engines against the same draft here: logits, tokens, rounds, accepted tokens.

Each engine gets an environment of its own, at the tested versions. EAGLE's source is named by
EAGLE_SRC; llama.cpp's converter comes from LLAMACPP_SRC, or from a source package by pip. Exit code
0: all agree; 1: one does not; 2: bad input, or one cannot represent the draft.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from eagle3fn.base.files import write_json
from eagle3fn.base.program import exit_code
from eagle3fn.base.provenance import own_command, provenance
from eagle3fn.engines.environments import find_places
from eagle3fn.use.engine_check import ENGINES
from eagle3fn.use.engine_pair import CheckSettings
from eagle3fn.use.engine_run import GIVEN, check_drafts, parse_places, table, verdict
from eagle3fn.use.prompts import read_prompts


def parse() -> argparse.Namespace:
    """The options."""
    default = CheckSettings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("draft", metavar="DRAFT", help="exported folder")
    parser.add_argument("target", metavar="TARGET", help="the target's folder")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all"
    )
    parser.add_argument("--prompts", required=True, help='rows with a "prompt", such as HumanEval')
    parser.add_argument("--tasks", type=int, default=default.tasks, help="prompts decoded")
    parser.add_argument("--max-new", type=int, default=default.max_new, help="tokens an answer")
    parser.add_argument("--draft-length", type=int, default=default.draft_length)
    parser.add_argument("--logit-tasks", type=int, default=default.logit_tasks)
    parser.add_argument(
        "--variants",
        nargs="*",
        metavar="NAME",
        help="also drafts with other taps, D = V, each RoPE variant and switch: these, or all",
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH", help="an engine's Python"
    )
    parser.add_argument("--environments", default=".venv-engines", help="folder that holds them")
    parser.add_argument("--logs", help="folder for what engines print (default: with environments)")
    parser.add_argument("--out", help="file for the result with its origin")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> int:
    """Check, and say how it went."""
    options = parse()
    settings = CheckSettings(
        options.tasks, options.max_new, options.draft_length, options.logit_tasks
    )
    prompts = read_prompts(options.prompts).texts
    origin = provenance(own_command("scripts/check_engines.py"))
    given = parse_places(options.python, ENGINES)
    places = find_places(options.engines, options.environments, given)

    results = check_drafts(
        options.target,
        options.draft,
        prompts,
        places,
        settings,
        options.logs or Path(options.environments) / "logs",
        names=options.variants,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if options.out:
        settled = {**asdict(settings), "prompts": Path(options.prompts).name}
        write_json(options.out, {**origin, "settings": settled, "drafts": results})
    shown = results[GIVEN] if options.variants is None else results
    print(json.dumps(shown, indent=2) if options.json else table(results))
    return verdict(results)


if __name__ == "__main__":
    sys.exit(exit_code("check_engines", main))
