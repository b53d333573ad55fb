"""Where the time of `tipl demo` goes: its main thread sampled by py-spy, into docs/figures/demo_profile.svg.

    python bench/profile_demo.py

A sample belongs to the stage that `tipl.pipeline` was in, and there to the function of tipl that was being called, or
waited for. What it calls outside tipl, in the engine, torch or matplotlib, is its own. The samples stay in runs/.
"""

import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs/figures/demo_profile.svg"
RATE = 50  # samples a second
SHOWN = 4  # functions of a stage with a part of their own
FRAME = re.compile(r"(?P<name>.*) \((?P<file>.*?)(:\d+)?\)$")
STAGES = {"collecting": "collect", "forecasting": "train", "judging": "evaluate", "report": "report"}


def sampled(output: Path) -> str:
    """Return the stacks of the demo's main thread with their counts, one to a line, the outermost frame first."""
    command = [sys.executable, "-c", "from tipl.cli import main; main()", "demo", "--output", str(output / "demo")]
    spy = [
        str(Path(sys.executable).with_name("py-spy")),
        "record",
        "--idle",
        "--threads",
        "--rate",
        str(RATE),
        "--format",
        "raw",
    ]
    subprocess.run([*spy, "--output", str(output / "stacks.txt"), "--", *command], check=True)
    return (output / "stacks.txt").read_text()


def seconds_of(stacks: str) -> dict[str, Counter[str]]:
    """Return stage -> function -> seconds."""
    seconds: dict[str, Counter[str]] = defaultdict(Counter)
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        if "MainThread" not in thread:
            continue
        ours = [match for match in map(FRAME.match, frames) if match and "tipl/" in match["file"]]
        files = [match["file"].rpartition("tipl/")[2] for match in ours]
        inside = files.index("pipeline.py") + 1 if "pipeline.py" in files else len(files)
        stage = next((STAGES[it.split("/")[0]] for it in files[inside:] if it.split("/")[0] in STAGES), "other")
        # What is defined inside a function belongs to it.
        function = ours[-1]["name"].partition(".<locals>")[0] if ours else "imports"
        seconds[stage][function if stage != "other" else "imports and the rest"] += int(count) / RATE
    return seconds


def draw(seconds: dict[str, Counter[str]]) -> None:
    """Draw a bar for each stage, its parts side by side, the largest first."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = [stage for stage in (*STAGES.values(), "other") if seconds[stage]]
    with plt.rc_context({"svg.hashsalt": "tipl", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(9, 0.9 * len(stages) + 0.8), layout="constrained")
        longest = max(sum(parts.values()) for parts in seconds.values())
        for row, stage in enumerate(stages):
            parts = seconds[stage].most_common(SHOWN)
            parts.append(("the rest", sum(seconds[stage].values()) - sum(value for _, value in parts)))
            left = 0.0
            for shade, (name, value) in enumerate(parts):
                axes.barh(row, value, left=left, color=plt.colormaps["Blues"](0.6 - 0.12 * shade), edgecolor="white")
                if value > 0.07 * longest:
                    label = f"{name.split('.')[-1]}\n{value:.0f} s"
                    axes.text(left + value / 2, row, label, ha="center", va="center", fontsize=7)
                left += value
            axes.text(left + 0.01 * longest, row, f"{left:.0f} s", va="center")
        axes.set_yticks(range(len(stages)), stages)
        axes.invert_yaxis()
        axes.set(xlabel="seconds", xlim=(0, 1.1 * longest))
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    output = ROOT / "runs" / "profile_demo"
    output.mkdir(parents=True)
    seconds = seconds_of(sampled(output))
    for stage, parts in seconds.items():
        print(f"{stage}: {sum(parts.values()):.0f} s")
        for name, value in parts.most_common(8):
            print(f"  {value:6.1f} s  {name}")
    draw(seconds)


if __name__ == "__main__":
    main()
