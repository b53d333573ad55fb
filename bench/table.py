"""Print the tables of speed, Markdown, from bench/latest.json, one for each suite, and a summary.

python bench/table.py           # prints what the last run measured
python bench/table.py --write   # puts each between its markers in docs/speed.md, such as <!-- bench:svd -->, and the
                                # summary into README.md, where the run measured all of it
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS: dict[tuple[str, str], float] = {
    ("d128 b1 fp32", "torch eager"): 8,
    ("d128 b1 fp32", "llama.cpp f32"): 5,
    ("d128 b32 fp32", "torch eager"): 3,
    ("d128 b32 bf16+cache", "torch eager"): 4.5,
    ("d256 b1 fp32", "torch eager"): 9,
    ("d256 b1 fp32", "llama.cpp f32"): 4,
    ("d256 b1 bf16", "tipl fp32"): 1.6,
    ("d256 b32 fp32", "torch eager"): 2.5,
    ("d256 b32 bf16+cache", "torch eager"): 4.5,
    ("d512 b1 fp32", "torch eager"): 3,
    ("d512 b1 bf16", "tipl fp32"): 1.8,
    ("d512 b32 fp32", "torch eager"): 2,
    ("d512 b32 bf16+cache", "torch eager"): 4.5,
    ("d512 b32 bf16+cache", "llama.cpp f16"): 2,
    ("d128 b1 fp32 avx2", "tipl avx512"): 0.6,
    ("d256 b1 fp32 avx2", "tipl avx512"): 0.6,
    ("d512 b1 fp32 avx2", "tipl avx512"): 0.6,
    ("d128 b1 fp32 after torch.mm", "tipl alone"): 0.9,
    ("8192x73484 one-pass", "torch.svd_lowrank niter=2"): 2.5,
    ("8192x73484 one-pass", "sklearn IncrementalPCA"): 45,
    ("8192x73484 two-pass", "torch.svd_lowrank niter=2"): 2,
    ("31296x5708 one-pass", "torch.svd_lowrank niter=2"): 2,
    ("31296x5708 two-pass", "torch.svd_lowrank niter=2"): 1.5,
    ("live row p=100000 k=32", "wanted: 2 ms"): 1,
    ("HalfCheetah-v5 64", "Stable-Baselines3"): 10,
    ("InvertedPendulum-v5 64", "Stable-Baselines3"): 15,
    ("read 20000 checkpoints", "reading the files"): 0.5,
    ("Ray, 2 nodes", "Ray, 1 node"): 1.6,
}
"""(case, peer) -> the ratio that is wanted."""
ROOF_TARGETS = {"d256 b1 fp32": 60, "d512 b1 fp32": 80}
"""case -> percent of the roof that is wanted."""
SUMMARY: dict[tuple[str, str], str] = {
    ("d256 b1 fp32", "torch eager"): "rollout, one path: a step of d256",
    ("d256 b1 fp32", "llama.cpp f32"): "",
    ("d256 b32 bf16+cache", "torch eager"): "rollout, 32 paths, bfloat16: a step of d256",
    ("d256 b32 bf16+cache", "llama.cpp f16"): "",
    ("8192x73484 one-pass", "torch.svd_lowrank niter=2"): "Temporal SVD, 8192 x 73484, one pass",
    ("8192x73484 one-pass", "sklearn IncrementalPCA"): "",
    ("HalfCheetah-v5 64", "Stable-Baselines3"): "PPO, 64 runs of HalfCheetah-v5",
}
"""(case, peer) -> what is measured, for the README; "": the same as in the line above."""
LIKE = {"fp32": "llama.cpp f32", "bf16": "llama.cpp f16", "bf16+cache": "llama.cpp f16", "int8": "llama.cpp q8_0"}
"""Our mode -> llama.cpp's weights of about the same size."""


def number(value: float | None, target: float | None = None) -> str:
    text = "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return text if target is None else f"{text} (≥ {target:g})"


class Decoded:
    """The record's rows of the suite `decode`, by case and peer."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = {(row["case"], row["peer"]): row for row in rows if row["suite"] == "decode"}
        self.cases = {case: row for (case, _), row in self.rows.items()}
        measured = {peer for _, peer in self.rows}
        self.compiled = [peer for peer in ("torch.compile", "AOTInductor", "IREE") if peer in measured]

    def peer_us(self, group: str, *peers: str) -> str:
        """A peer's time does not depend on our mode; fp32 is in every group."""
        return " / ".join(number(self.rows.get((f"{group} fp32", peer), {}).get("peer_value")) for peer in peers)

    def ratio(self, case: str, peer: str) -> str:
        return number(self.rows.get((case, peer), {}).get("ratio"), TARGETS.get((case, peer)))

    def roof(self, case: str) -> str:
        percent = number(round(self.cases[case]["percent_of_roof"]), ROOF_TARGETS.get(case))
        return f"{percent} {self.cases[case]['binds']}"

    def line(self, group: str) -> str:
        """The table's line of one model and batch, our modes side by side."""
        cases = [case for case in self.cases if case in {f"{group} {mode}" for mode in LIKE}]
        mode = {case: case.removeprefix(f"{group} ") for case in cases}
        columns = [
            *group.split(),
            " / ".join(mode.values()),
            " / ".join(number(self.cases[case]["ours"]) for case in cases),
            self.peer_us(group, "torch eager"),
            self.peer_us(group, *self.compiled),
            self.peer_us(group, "ONNX Runtime"),
            self.peer_us(group, "llama.cpp f32", "llama.cpp f16", "llama.cpp q8_0"),
            " / ".join(self.ratio(case, "torch eager") for case in cases),
            " / ".join(self.ratio(case, "ONNX Runtime") for case in cases),
            " / ".join(self.ratio(case, LIKE[mode[case]]) for case in cases),
            " / ".join(self.ratio(case, "tipl fp32") for case in cases[1:]),
            " / ".join(self.roof(case) for case in cases),
        ]
        return f"| {' | '.join(columns)} |"


HEADER = """\
| model | batch | precision | tipl | torch eager | {compiled} | ONNX Runtime | \
llama.cpp f32 / f16 / q8 | x torch eager | x ONNX Runtime | x llama.cpp, like precision | x tipl fp32 | \
% of the roof that binds |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def decode_table(record: dict[str, Any]) -> list[str]:
    decoded = Decoded(record["rows"])
    groups = dict.fromkeys(" ".join(case.split()[:2]) for case in decoded.cases if len(case.split()) == 3)
    others = [f"{case} {decoded.ratio(case, peer)} x {peer}" for case, peer in decoded.rows if len(case.split()) > 3]
    return [
        "Microseconds a step, medians of one run; (≥ target).",
        "",
        HEADER.format(compiled=" / ".join(decoded.compiled)),
        *(decoded.line(group) for group in groups),
        "",
        *([f"Speed beside our own: {'; '.join(others)}.", ""] if others else []),
        machine_line(record),
    ]


def plain_table(record: dict[str, Any], suite: str, what: str) -> list[str]:
    """A line a row of the record."""
    lines = []
    for row in (row for row in record["rows"] if row["suite"] == suite):
        roof = "-" if row["percent_of_roof"] is None else f"{row['percent_of_roof']:.0f} {row['binds']}"
        ratio = number(row["ratio"], TARGETS.get((row["case"], row["peer"])))
        ours, theirs = (f"{number(row[name])} {row['unit']}" for name in ("ours", "peer_value"))
        lines.append(f"| {row['case']} | {ours} | {row['peer']} | {theirs} | {ratio} | {roof} |")
    header = f"| {what} | tipl | peer | | x | % of the roof that binds |"
    return [
        "Medians of one run; (≥ target).",
        "",
        header,
        "|---|---|---|---|---|---|",
        *lines,
        "",
        machine_line(record),
    ]


def busy_table(record: dict[str, Any]) -> list[str]:
    """A line for each stage, and a column for each number of competitors."""
    rows = [row for row in record["rows"] if row["suite"] == "busy"]
    stages = dict.fromkeys(row["case"].split(" beside ")[0] for row in rows)
    fair = {row["case"].split(" beside ")[1]: row["peer_value"] for row in rows}
    took = {row["case"]: number(row["ours"]) for row in rows}
    return [
        "Medians of one run.",
        "",
        f"| time over that on the quiet machine | {' | '.join(f'{k} competitors' for k in fair)} |",
        "|---" * (len(fair) + 1) + "|",
        f"| *fair share* | {' | '.join(map(number, fair.values()))} |",
        *(f"| {stage} | {' | '.join(took[f'{stage} beside {k}'] for k in fair)} |" for stage in stages),
        "",
        machine_line(record),
    ]


def summary_table(record: dict[str, Any]) -> list[str]:
    """A few lines of all suites, for the README."""
    rows = {(row["case"], row["peer"]): row for row in record["rows"]}
    lines = []
    for (case, peer), what in SUMMARY.items():
        row = rows[case, peer]
        unit = "µs" if row["suite"] == "decode" else row["unit"]
        ours = f"{number(row['ours'])} {unit}" if what else ""
        lines.append(f"| {what} | {ours} | {peer} | {number(row['peer_value'])} {unit} | {number(row['ratio'])} |")
    machine = record["machine"]
    where = f"Medians of one run on {machine['cores']} cores of an {machine['cpu']} ({machine['isa']})."
    return ["| | tipl | peer | | x |", "|---|---|---|---|---|", *lines, "", where]


def machine_line(record: dict[str, Any]) -> str:
    machine, roofs = record["machine"], record["roofs"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in machine["versions"] if name != "tipl")
    text = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, {machine['compiler']}, {versions}, "
        f"{machine['git_sha']}."
    )
    if roofs:  # empty where no benchmark of the run needed them
        reads = ", ".join(f"{name} {number(gbps)}" for name, gbps in roofs["read_gbps"].items())
        gemms = ", ".join(f"{name} {number(gflops)}" for name, gflops in roofs["gemm_gflops"].items())
        text += f" Roofs: reading, GB/s: {reads}; torch's GEMM, GFLOP/s: {gemms}."
    return text


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "decode": decode_table,
    "svd": lambda record: plain_table(record, "svd", "rows x columns"),
    "collect": lambda record: plain_table(record, "collect", "task, trials"),
    "train": lambda record: plain_table(record, "train", "model, batch"),
    "rollout": lambda record: plain_table(record, "rollout", "policy"),
    "evaluate": lambda record: plain_table(record, "evaluate", "task"),
    "busy": busy_table,
    "pipeline": lambda record: plain_table(record, "pipeline", "command"),
}


def put(text: str, file: Path, name: str) -> None:
    """Put `text` between the markers of `name` in the page `file`."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = file.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"table: {file} has no {begin} ... {end}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of speed from bench/latest.json.")
    parser.add_argument("--write", action="store_true", help="put them into docs/speed.md and README.md")
    write: bool = parser.parse_args().write
    record = json.loads(Path(__file__).with_name("latest.json").read_text())
    root = Path(__file__).parents[1]
    measured = {row["suite"] for row in record["rows"]}
    tables = {suite: (root / "docs" / "speed.md", table) for suite, table in TABLES.items() if suite in measured}
    if SUMMARY.keys() <= {(row["case"], row["peer"]) for row in record["rows"]}:
        tables["summary"] = root / "README.md", summary_table
    for name, (page, table) in tables.items():
        text = "\n".join(table(record))
        if write:
            put(text, page, name)
        else:
            print(text, end="\n\n")


if __name__ == "__main__":
    main()
