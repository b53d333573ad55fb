"""What a decode step costs on a CUDA device, counted exactly on the emulator, and a model of its time from the counts.

    TIPL_PTXRUN=FOLDER python bench/cuda_counts.py            writes bench/cuda_counts.json, and a table of docs/cuda.md
    TIPL_PTXRUN=FOLDER python bench/cuda_counts.py --sketch   the same for a block of a sketch: cuda_sketch_counts.json

A step is the difference between generate(3) and generate(2). Blocks that wait look at a count again and again, which
the totals of global loads contain; what 32 further tokens in the cache add has none of that, and shows how well the
cache is read. No time is measured: what the model of time assumes is in CARDS and in model_of_time.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from table import put

ROOT = Path(__file__).parents[1]
OUTPUT, SKETCH_OUTPUT = (Path(__file__).with_name(f"{name}.json") for name in ("cuda_counts", "cuda_sketch_counts"))
PAGE = ROOT / "docs" / "cuda.md"
PREFIX = 64  # tokens held before the step that is counted; and once 32 more


class Stats(ctypes.Structure):
    """ptx_stats of the emulator's ptxrun.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("thread_instructions", "warp_instructions", "flops", "global_load_requests", "global_load_sectors"),
            *("global_store_requests", "global_store_sectors", "global_load_bytes", "global_store_bytes"),
            *("shared_requests", "shared_wavefronts", "local_bytes", "barriers", "divergent_branches", "atomics"),
        )
    )


@dataclasses.dataclass(frozen=True)
class Card:
    """What the model of time assumes of a card."""

    name: str
    arch: int
    num_sms: int
    ghz: float
    meeting_us: float
    """From the last share written to the first one read. Assumed; barriers of whole grids were 0.73 us on 82 SMs and
    0.8 to 1.35 on 148, measured by others."""
    l2_latency_us: float
    l2_bytes_per_clock: float
    """Of one SM."""
    l2_tb_per_s: float
    fma_per_clock: int = 128
    shared_bytes_per_clock: int = 128
    sync_clocks: int = 40
    """Of a barrier of 512 threads."""


CARDS = (
    Card("H100 SXM", 90, 132, 1.755, meeting_us=1.0, l2_latency_us=0.15, l2_bytes_per_clock=64, l2_tb_per_s=5.0),
    Card("A100 SXM", 80, 108, 1.41, meeting_us=1.0, l2_latency_us=0.15, l2_bytes_per_clock=64, l2_tb_per_s=4.0),
)
CASES = (  # d_model, n_layer, n_head, batch, weights; d_ff = 4 d_model, k = 16
    (128, 4, 4, 1, "float32"),
    (128, 4, 4, 1, "bfloat16"),
    (128, 4, 4, 16, "float32"),
    (256, 6, 8, 1, "float32"),
    (256, 6, 8, 1, "bfloat16"),
)


def count(d: int, n_layer: int, n_head: int, batch: int, dtype: str) -> dict[str, Any]:
    """Return the counts of one step in the emulator of this process."""
    import reference

    from tipl.forecasting.decoder import Decoder
    from tipl.forecasting.transformer import ModelConfig

    library = ctypes.CDLL("libcudart.so.13")
    config = ModelConfig(n_components=16, n_layer=n_layer, n_head=n_head, d_model=d, d_ff=4 * d, max_len=PREFIX + 40)
    decoder = Decoder(config, reference.random_forecaster(config, 0), batch, dtype=dtype, device="cuda")

    def step_after(prefix: int) -> dict[str, int]:
        steps = np.cumsum(0.1 * np.random.default_rng(0).standard_normal((batch, prefix, 16)), axis=1)
        stats = []
        for number in (2, 3):
            decoder.reset()
            decoder.prefill(steps.astype(np.float32))
            decoder.generate(number)
            last = Stats()
            library.ptxrunLastStats(ctypes.byref(last))
            stats.append({name: getattr(last, name) for name, _ in Stats._fields_})
        return {name: stats[1][name] - stats[0][name] for name in stats[0]}

    step, later = step_after(PREFIX), step_after(PREFIX + 32)
    sectors, asked = (later[name] - step[name] for name in ("global_load_sectors", "global_load_bytes"))
    return {"d_model": d, "n_layer": n_layer, "n_head": n_head, "batch": batch, "dtype": dtype, **step} | {
        "plan": decoder._core.plan(many_rows=batch > 2 * n_layer),
        "cache_bytes_per_sector_byte": asked / (32 * sectors),
    }


def expected_bytes(row: dict[str, Any]) -> dict[str, float]:
    """Return the bytes that a step must read from global memory, by purpose."""
    plan, d, B = row["plan"], row["d_model"], row["batch"]
    L, H, U, R = plan["layers"], plan["heads"], plan["units"], plan["rows"]
    tiles = -(-B // R)
    matrices = L * (H * plan["head_bytes"] + U * plan["unit_bytes"])
    slots = PREFIX + 3
    return {
        "weights": 0.0 if plan["resident"] else float(tiles * matrices),
        "ends": 0.0 if plan["ends_resident"] else float(tiles * H * plan["end_bytes"]),
        "shares": float(tiles * L * (U * (H + 1) + H * (U + 1)) * R * d * 4),
        "cache": float(B * L * 2 * slots * d * 4),
        "positions and rows": float(tiles * R * H * d * 4 + tiles * (L * (H + U)) * R * 40),
    }


def model_of_time(row: dict[str, Any], card: Card) -> dict[str, float]:
    """Return the parts of a step in microseconds. One tile: phases one after the other. Many: the pipeline is full, and
    the busiest block, the L2 cache or the arithmetic binds."""
    plan, d, B = row["plan"], row["d_model"], row["batch"]
    L, H, U, R = plan["layers"], plan["heads"], plan["units"], plan["rows"]
    clock = card.ghz * 1e3  # clocks in a microsecond
    D, tiles, slots = d // H, -(-B // R), PREFIX + 3
    resident = bool(plan["resident"])
    per_clock = card.shared_bytes_per_clock if resident else card.l2_bytes_per_clock

    def phase(weights: float, shares: int, syncs: int, cache: float) -> float:
        """One part at one tile: its weights, the shares that it adds up, its barriers, its cache; and a latency of the
        L2 cache for the shares, one for the cache's keys and one for its values."""
        products = weights / (4 if row["dtype"] == "float32" else 2) * R
        bound = max(weights / per_clock, products / card.fma_per_clock)
        read = shares * R * d * 4 / card.l2_bytes_per_clock + cache / card.l2_bytes_per_clock
        latencies = card.l2_latency_us * (1 + (2 if cache else 0))
        return (bound + read + syncs * card.sync_clocks) / clock + latencies

    head = phase(plan["head_bytes"], U + 1, 12, R * 2 * slots * D * 4)
    unit = phase(plan["unit_bytes"], H + 1, 9, 0.0)
    ends = phase(plan["end_bytes"], 0, 8, 0.0)
    if tiles == 1:
        work = L * (head + unit) + ends
        return {"work": work, "meetings": 2 * L * card.meeting_us, "step": work + 2 * L * card.meeting_us}
    busiest = tiles * max(head + ends, unit)  # meetings hide behind other tiles
    total = sum(expected_bytes(row).values())
    l2 = total / card.l2_tb_per_s / 1e6
    arithmetic = row["flops"] / (2 * card.fma_per_clock * card.num_sms * clock)
    return {"work": busiest, "l2": l2, "arithmetic": arithmetic, "step": max(busiest, l2, arithmetic)}


SKETCH = {"num_features": 5708, "range_size": 64, "test_size": 8}


def sketch_block() -> None:
    """Add one block of rows on the device to a sketch, in the emulator of this process."""
    from tipl.device import cuda_engine

    engine = cuda_engine()
    sketch = engine.RowSketch(**SKETCH, seed=0, origin=None, directions=None, device=0)
    rows = np.random.default_rng(0).standard_normal((512, SKETCH["num_features"]), dtype=np.float32)
    sketch.partial_fit(engine.DeviceArray.from_numpy(rows), first_row=0, all_or_none=False)


def sketch_counts() -> list[dict[str, Any]]:
    """Return the counts of each kernel for one block of 256 rows."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "launches.jsonl"
        run_counted(CARDS[0], ["--sketch-block"], PTXRUN_STATS=str(log))
        launches = [json.loads(line) for line in log.read_text().splitlines()]
    block_bytes = 256 * SKETCH["num_features"] * 4
    rows = []
    for kernel in ("map_signs", "add_shares", "add_co_range", "add_gram"):
        launch = next(it for it in launches if kernel in it["kernel"])
        stats = {name: launch[name] for name, _ in Stats._fields_}
        rows.append({"kernel": kernel, **stats, "blocks_read": stats["global_load_bytes"] / block_bytes})
    return rows


def write_sketch() -> None:
    rows = sketch_counts()
    SKETCH_OUTPUT.write_text(
        json.dumps({"command": "python bench/cuda_counts.py --sketch", **SKETCH, "rows": rows}, indent=1) + "\n"
    )
    table = [
        "| kernel | read, in blocks of rows | sectors, read | sectors, written | conflicts | flops, millions |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sectors = [row[f"global_{kind}_bytes"] / (32 * row[f"global_{kind}_sectors"]) for kind in ("load", "store")]
        conflicts = row["shared_wavefronts"] / row["shared_requests"] if row["shared_requests"] else 1.0
        table.append(
            f"| {row['kernel']} | {row['blocks_read']:.3f} | {sectors[0]:.3f} | {sectors[1]:.3f} | {conflicts:.3f} "
            f"| {row['flops'] / 1e6:.1f} |"
        )
    put("\n".join(table), PAGE, "cuda-sketch")


def registers() -> dict[str, dict[str, int]]:
    """Return registers and spilled bytes of each kernel for sm_90, as ptxas says."""
    found = {}
    for source in ("decode_one_row", "decode_many_rows"):
        said = subprocess.run(
            [
                *("nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin", "-arch=sm_90"),
                *("-I", ROOT / "csrc", "-o", os.devnull, ROOT / "csrc" / "cuda" / f"{source}.cu"),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        name = r"decodeILi(\d)E(f|NS0_8Bfloat16E)(f|S\d_|NS0_8Bfloat16E)E"
        pattern = name + r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
        for rows, weights, cache, stores, loads, used in re.findall(pattern, said, re.DOTALL):
            kinds = ["float32" if kind == "f" else "bfloat16" for kind in (weights, cache)]
            key = f"{rows} rows, {kinds[0]} weights, {kinds[1]} cache"
            found[key] = {"registers": int(used), "spilled_bytes": int(stores) + int(loads)}
    return found


def counted(card: Card, *case: Any) -> dict[str, Any]:
    """Return `count` on this card."""
    found: dict[str, Any] = json.loads(run_counted(card, ["--count", *map(str, case)]))
    return found


def run_counted(card: Card, arguments: list[str], **settings: str) -> str:
    """Return what this program prints in a process of its own: the emulator reads its settings once."""
    environment = (
        os.environ
        | settings
        | {
            "LD_LIBRARY_PATH": f"{os.environ['TIPL_PTXRUN']}/cudart",
            "PTXRUN_ARCH": str(card.arch),
            "PTXRUN_SMS": str(card.num_sms),
            "PTXRUN_CHECK": "none",
            "PTXRUN_MAX_INSTRUCTIONS": "0",
            "PYTHONPATH": f"{ROOT / 'tests'}",
        }
    )
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", nargs=5, metavar=("D", "LAYERS", "HEADS", "BATCH", "DTYPE"), help="one case, as JSON"
    )
    parser.add_argument("--sketch", action="store_true", help="count a block of rows of a sketch instead")
    parser.add_argument("--sketch-block", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sketch_block:
        sketch_block()
        return
    if arguments.count:
        *sizes, dtype = arguments.count
        print(json.dumps(count(*map(int, sizes), dtype)))
        return
    if not os.environ.get("TIPL_PTXRUN"):
        parser.error("TIPL_PTXRUN must name the folder of the emulator")
    if arguments.sketch:
        write_sketch()
        return
    rows = []
    for card in CARDS:
        for case in CASES:
            row = counted(card, *case)
            row |= {
                "card": card.name,
                "meetings": 2 * row["n_layer"],
                "bytes": expected_bytes(row),
                "time_us": model_of_time(row, card),
                "shared_wavefronts_per_request": row["shared_wavefronts"] / row["shared_requests"],
            }
            rows.append(row)
            print(line_of(row), flush=True)
    kernels = registers()
    document = {"command": "python bench/cuda_counts.py", "kernels": kernels, "rows": rows}
    OUTPUT.write_text(json.dumps(document, indent=1) + "\n")
    most = max(it["registers"] for it in kernels.values())
    spilled = sum(it["spilled_bytes"] for it in kernels.values())
    table = [
        "| card | model | weights | batch | weights read, MB | resident | meetings | sectors | conflicts "
        "| predicted µs |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(line_of, rows),
        "",
        f"The {len(kernels)} kernels use at most {most} registers of a thread on sm_90, and spill {spilled} bytes.",
    ]
    put("\n".join(table), PAGE, "cuda")


def line_of(row: dict[str, Any]) -> str:
    """Return a row of docs/cuda.md's table."""
    plan, time = row["plan"], row["time_us"]
    return (
        f"| {row['card']} | d{row['d_model']} L{row['n_layer']} | {row['dtype']} | {row['batch']} "
        f"| {row['bytes']['weights'] / 1e6:.1f} | {'yes' if plan['resident'] else 'no'} | {row['meetings']} "
        f"| {row['cache_bytes_per_sector_byte']:.3f} | {row['shared_wavefronts_per_request']:.3f} "
        f"| {time['step']:.1f} |"
    )


if __name__ == "__main__":
    main()
