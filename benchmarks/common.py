"""What the benchmarks share: facts about the machine, the clock, the command line, the report on disk."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from flatlora_diffusion.common.memory import peak_memory

DEMO_BASE = Path(__file__).parents[1] / "assets" / "micro-sdxl"
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The paper's adapter for SDXL.
SIGMA = 0.1
RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of a precision."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def processor() -> tuple[str, list[str]]:
    """Name of the processor, and those of its instruction sets that decide the speed of matrix products."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), []
    lines = [line.partition(":") for line in info.read_text(encoding="utf-8").splitlines()]
    fields = {key.strip(): value.strip() for key, _, value in lines}
    flags = fields.get("flags", "").split()
    return fields.get("model name", platform.machine()), [flag for flag in CPU_FLAGS if flag in flags]


def has_fast_bf16() -> bool:
    """Whether the processor multiplies matrices in bf16 by instructions of its own."""
    return any("bf16" in flag for flag in processor()[1])


def machine() -> str:
    """The machine in one line, with what its processor can do."""
    name, flags = processor()
    bf16 = "in hardware" if has_fast_bf16() else "emulated, and so slow"
    parts = [
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        f"CPU flags: {' '.join(flags) or 'unknown'}",
        f"bf16 matrix products on the CPU are {bf16}",
        f"torch {torch.__version__}",
    ]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return "; ".join(parts)


def now(device: torch.device) -> float:
    """The time when all work given to the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def proc_bytes(text: str, field: str) -> int:
    """A field of /proc/self/status or /proc/meminfo, which count in kB of 1,024 bytes."""
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return int(lines[field].split()[0]) * 1024


def process_peak() -> int:
    """The most bytes this process has had in memory at once; on a GPU, in tensors since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def benchmark_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, which shows the description as it is."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog=f"python -m benchmarks.{name}",
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--threads", type=positive, help="CPU threads (torch's choice)")
    parser.add_argument("--output", type=report_file, help="also write the report to this .md or .json file")


def report_file(text: str) -> Path:
    """A path whose ending says in which format the report is written, for argparse."""
    path = Path(text)
    if path.suffix not in (".md", ".json"):
        raise argparse.ArgumentTypeError(f"{text} must end in .md or .json")
    return path


def default_dtype() -> str:
    """The precision that suits the machine: bf16 where it is computed in hardware."""
    return "bf16" if torch.cuda.is_available() or has_fast_bf16() else "fp32"


def write_report(text: str, content: dict[str, Any], output: Path | None) -> None:
    """Print the report, and write it, or what it was made of, to the file asked for."""
    print(text)
    if output and output.suffix == ".json":
        text = json.dumps({"machine": machine()} | content, indent=2) + "\n"
    if output:
        output.write_text(text, encoding="utf-8")
