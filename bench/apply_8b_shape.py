"""Scale: `halo apply` on a checkpoint of Llama-3-8B's shape (8 G random weights, bfloat16, four shards).

Proves that HALO's own process stays within 4 GB where the checkpoint has 16, and reports time and memory of each stage.
The process that runs the finished file through llama.cpp once is told apart: it holds the file and its context by
design. The checkpoint is made in DIR (16 GB, another 5 for the result) and deleted at the end.

    python -m halo.bench.apply_8b_shape --dir /root/w/8b --bpw 4.0 --calibration-tokens 2048

With --keep the checkpoint stays and the next run uses it again. --scale small tries the command itself in seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from halo.bench.halo_command import Stage, add_halo_options, halo_and_worker, halo_of, read_bundle, stages
from halo.bench.machine import machine_record
from halo.bench.measure_command import Measurement, ProcessPeak, measure
from halo.bench.random_checkpoint import SHAPES, Shape, is_whole, make_checkpoint
from halo.bench.results import markdown_table, megabytes, parser, write_result

LIMIT = 4_000_000_000


def _need_space(source: Path, shape: Shape, bpw: float) -> None:
    source.parent.mkdir(parents=True, exist_ok=True)
    bytes_a_weight = bpw / 8 + (0 if is_whole(source) else 2)
    need, free = int(shape.n_params * bytes_a_weight * 1.02), shutil.disk_usage(source.parent).free
    if free < need:
        sys.exit(f"{source.parent}: {need / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free")


def _checkpoint(folder: Path, shape: Shape) -> float:
    """Make it unless a run with --keep left it; the seconds that took."""
    began = time.perf_counter()
    if not is_whole(folder):
        print(f"writing {shape.n_params / 1e9:.2f} G random weights to {folder}", file=sys.stderr, flush=True)
        make_checkpoint(folder, shape)
    os.sync()
    return time.perf_counter() - began


def _stage_row(stage: Stage) -> list[object]:
    return [stage.name, f"{stage.seconds:.1f}", megabytes(stage.rss), megabytes(stage.anon)]


def _process_row(name: str, peak: ProcessPeak) -> list[object]:
    return [name, megabytes(peak.hwm), megabytes(peak.anon), megabytes(peak.file)]


def _print_tables(found: list[Stage], halo: ProcessPeak, worker: ProcessPeak) -> None:
    headers = ("stage", "seconds", "peak RSS of the tree, MB", "of it anonymous at most, MB")
    print(markdown_table(headers, [_stage_row(stage) for stage in found]))
    rows = [_process_row("halo", halo), _process_row("worker (llama.cpp)", worker)]
    print("\n" + markdown_table(("process", "VmHWM, MB", "anonymous, MB", "file-mapped, MB"), rows))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--dir", type=Path, required=True, help="folder for the checkpoint and the result")
    made.add_argument("--bpw", type=float, default=4.0, help="default: 4.0")
    made.add_argument("--calibration-tokens", type=int, default=2048, help="default: 2048")
    made.add_argument("--scale", choices=sorted(SHAPES), default="8b", help="default: 8b")
    made.add_argument("--keep", action="store_true", help="leave the checkpoint for the next run")
    add_halo_options(made)
    return made.parse_args(argv)


def run(args: argparse.Namespace, source: Path, out: Path) -> tuple[float, Measurement, int]:
    """Seconds to make the checkpoint, the measured apply, the bytes of its file; deletes both at the end."""
    try:
        making = _checkpoint(source, SHAPES[args.scale])
        tokens = str(args.calibration_tokens)
        options = ("--bpw", f"{args.bpw:g}", "--calibration-tokens", tokens, "-o", out)
        measured = measure(halo_of(args).command("apply", source, *options), echo=True)
        return making, measured, int(read_bundle(out)["file"]["bytes"])
    finally:
        shutil.rmtree(out, ignore_errors=True)
        if not args.keep:
            shutil.rmtree(source, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when HALO's process took more than 4 GB."""
    args, machine = _arguments(argv), machine_record()
    shape, source, out = SHAPES[args.scale], args.dir / f"llama-3-{args.scale}-shape", args.dir / "halo-out"
    if out.exists():
        sys.exit(f"{out}: exists already; remove it or give another --dir")
    _need_space(source, shape, args.bpw)
    making, measured, file_bytes = run(args, source, out)
    found, (halo, worker) = stages(measured), halo_and_worker(measured)
    _print_tables(found, halo, worker)
    met = halo.hwm <= LIMIT
    print(
        f"\n{measured.seconds:.1f} s in all, {measured.cpu_seconds:.1f} s of processor time; file {file_bytes} bytes, "
        f"{file_bytes * 8 / shape.n_params:.3f} bits per weight\n"
        f"peak RSS of halo {megabytes(halo.hwm)} MB, target {megabytes(LIMIT)} MB: {'met' if met else 'MISSED'}"
    )
    record = {
        "shape": asdict(shape),
        "n_params": shape.n_params,
        "seconds_to_make": round(making, 1),
        "file_bytes": file_bytes,
        "limit": LIMIT,
        "met": met,
        "stages": [asdict(stage) for stage in found],
        "halo": asdict(halo),
        "worker": asdict(worker),
        "apply": measured.to_record(),
    }
    print(f"written: {write_result(args.results, 'apply_8b_shape', machine, record)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
