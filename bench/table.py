"""README's tables of speed and memory, made from the results in bench/results/.

python -m bench.table            # print them
python -m bench.table --readme   # put them into README.md, between two marks
"""

import sys
from typing import Any

from bench.common import RESULTS, ROOT
from eagle3fn.base.files import read_json, write_text

BEGIN = "<!-- python -m bench.table -->\n\n"
END = "\n<!-- end -->\n"
SIDES = ("specforge", "plain", "fast")
# Options of a command that do not make the case.
HIDDEN = ("--out", "--json", "--rounds", "--mesh", "--allocator", "--no-memory")
HEADER = (
    "`python -m bench.step …`",
    "allocator, processor, load",
    "rows needed",
    "SpecForge, plain, fast: ms",
    "SpecForge / fast",
    "plain / fast",
    "memory of a step: SpecForge, fast, MiB",
    "fast / SpecForge",
    "fast, of the matmul rate",
)


def text() -> str:
    """All tables, as Markdown."""
    steps = sorted(_results("step-*.json"), key=_order)
    blocks = [step_table(steps)]
    blocks += [loss_line(result) for result in _results("loss-*.json")]
    blocks += [attention_line(result) for result in _results("attention-*.json")]
    blocks += [scaling_line(result) for result in _results("scaling-*.json")]
    blocks += [demo_line(result) for result in _results("demo-step-*.json")]
    return "\n".join(blocks) + "\n"


def _results(pattern: str) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(RESULTS.glob(pattern))]


def _order(result: dict[str, Any]) -> tuple[Any, ...]:
    """By device and dtype, raised thresholds first, long samples first, little masked first."""
    settings = result["settings"]
    return (
        settings["device"],
        settings["dtype"],
        settings["allocator"] != "raised",
        -settings["seq"],
        settings["masked"],
    )


def step_table(results: list[dict[str, Any]]) -> str:
    """One row a case."""
    lines = [_row(HEADER), "|---" * len(HEADER) + "|"]
    lines += [metrics_row(result) for result in results]
    return "\n".join(lines) + "\n"


def metrics_row(result: dict[str, Any]) -> str:
    """A case's row; "-": not measured."""
    settings = result["settings"]
    times = [number(1000 * result["seconds"][name]) for name in SIDES]
    memory = memory_ratio = "-"
    if result["memory"]:
        used = {name: value["step"] / 2**20 for name, value in result["memory"].items()}
        memory = f"{number(used['specforge'])}, {number(used['fast'])}"
        memory_ratio = f"{result['memory_ratio']:.2f}"
    processor = result["hardware"]["instructions"]
    return _row(
        (
            f"`{arguments(result['command'])}`",
            f"{settings['allocator']}, {processor}, {result['load_average']:.1f}",
            f"{result['shares']['needed']:.0%}",
            ", ".join(times),
            f"{result['ratio']:.2f}",
            f"{result['ratio_plain']:.2f}",
            memory,
            memory_ratio,
            f"{result['mfu']:.0%} of {number(result['matmul_gflops'])} GFLOP/s",
        )
    )


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def arguments(command: str) -> str:
    """The options that make the case, of a command `python -m bench.step …`."""
    kept = []
    hidden = False
    for word in command.split()[3:]:
        if word.startswith("--"):
            hidden = word in HIDDEN
        if not hidden:
            kept.append(word)
    return " ".join(kept)


def number(value: float) -> str:
    """Rounded, with thousands apart."""
    return f"{value:,.0f}"


def about(result: dict[str, Any]) -> str:
    """Its dtype and processor."""
    settings = result["settings"]
    dtype = settings.get("dtype") or settings["train"]["dtype"]
    return f"{dtype}, {result['hardware']['instructions']}"


def _pairs(values: dict[str, float], pattern: str) -> str:
    """Each value at its place: `1.92 at 8,192, 1.91 at 32,768`."""
    return ", ".join(f"{value:{pattern}} at {int(place):,}" for place, value in values.items())


def loss_line(result: dict[str, Any]) -> str:
    """Head, teacher and loss alone."""
    return (
        f"- Head, teacher and loss alone (`python -m bench.loss`, {about(result)}), plain / fast "
        f"over D: {_pairs(result['ratio'], '.2f')}; "
        f"of the matmul rate: {_pairs(result['mfu'], '.0%')}."
    )


def attention_line(result: dict[str, Any]) -> str:
    """Attention alone."""
    return (
        f"- Attention alone (`python -m bench.attention`, {about(result)}), plain / fast "
        f"over lengths: {_pairs(result['ratio'], '.2f')}; "
        f"of the matmul rate: {_pairs(result['mfu'], '.0%')}."
    )


def scaling_line(result: dict[str, Any]) -> str:
    """How cost grows."""
    seq = result["sweeps"]["seq"]
    beyond = []
    for row in result["sweeps"]["draft_vocab"]:
        beyond.append(f"{number(row['memory_beyond_state'] / 2**20)} at {row['draft_vocab']:,}")
    growth = seq[-1]["us_per_token"] / seq[0]["us_per_token"]
    return (
        f"- Growth of the fast step (`python -m bench.scaling`, {about(result)}): "
        f"from {seq[0]['seq']:,} to {seq[-1]['seq']:,} tokens a sample, {seq[0]['tokens']:,} "
        f"in all, a token takes {result['seq_growth']:.2f} times as long without attention's "
        f"own time, {growth:.2f} times with it; memory beyond weights, gradients, masters and "
        f"moments, in MiB over draft vocabularies: {', '.join(beyond)}."
    )


def demo_line(result: dict[str, Any]) -> str:
    """The demo's own training steps."""
    rates = result["tokens_per_s"]
    lengths = result.get("accepted_length")
    reached = ""
    if lengths:
        reached = f"; held-out accepted length {lengths['plain']:.4f} and {lengths['fast']:.4f}"
    return (
        f"- The demo's training (`python -m bench.demo`, its settings, {result['tokens']:,} "
        f"tokens, {about(result)}): {number(rates['plain'])} tokens/s under the plain numerics, "
        f"{number(rates['fast'])} under the fast ({result['ratio']:.2f} times{reached})."
    )


def put(page: str) -> str:
    """The page with the tables between their two marks."""
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return before + BEGIN + text() + END + after


def main() -> None:
    if "--readme" in sys.argv:
        path = ROOT / "README.md"
        page = put(path.read_text(encoding="utf-8"))
        write_text(path, page)
    print(text(), end="")


if __name__ == "__main__":
    main()
