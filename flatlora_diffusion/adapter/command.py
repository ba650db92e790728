"""The command `flatlora-kohya`: adapter files to kohya's format and back, or to the nearest plain LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flatlora_diffusion.common.command import OneLineParser, invoked_as
from flatlora_diffusion.common.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: convert a LoRA file into the other format, or into the nearest plain LoRA."""
    parser = OneLineParser(
        prog=invoked_as("python -m flatlora_diffusion.kohya"),
        description="Convert an SDXL LoRA between the diffusers format and kohya's, which ComfyUI, A1111 and "
        "sd-scripts read. The names in SOURCE decide the direction.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="A .safetensors file, or a run's folder.")
    parser.add_argument("target", type=Path, metavar="TARGET", help="A .safetensors file that doesn't exist.")
    parser.add_argument("--layers_per_block", type=int, default=2, metavar="N", help="Of the UNet (2).")
    parser.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="Write the nearest plain LoRA of this rank, in kohya's format: what every program reads alike.",
    )
    parser.add_argument("--base", metavar="BASE", help="Of a DoRA, with --rank: its update depends on it.")
    given = parser.parse_all(arguments)
    # After parsing: --help and bad flags answer at once.
    from flatlora_diffusion.adapter.file import adapter_file
    from flatlora_diffusion.adapter.kohya import convert
    from flatlora_diffusion.adapter.nearest import write_nearest

    source = adapter_file(given.source)
    for path in (source, given.target):
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: must be a .safetensors file; a pickled one could run code")
    if given.target.exists():
        raise UserError(f"{given.target}: exists; name another file, or remove it")
    if not given.target.parent.is_dir():
        raise UserError(f"{given.target}: its folder doesn't exist; make it first")
    if given.layers_per_block < 1:
        raise UserError(f"--layers_per_block {given.layers_per_block}: must be at least 1")
    if given.rank is None and given.base is not None:
        raise UserError("--base is for --rank; leave it out, or give both")
    if given.rank is None:
        convert(source, given.target, given.layers_per_block)
        print(given.target)
        return
    if given.rank < 1:
        raise UserError(f"--rank {given.rank}: must be at least 1")
    error = write_nearest(source, given.target, given.rank, given.base, given.layers_per_block)
    print(f"{given.target}: a plain LoRA of rank {given.rank}; relative error of its update {error:.2%}")
