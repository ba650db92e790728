"""The tables of all flags and of memory in docs/training.md, made from the trainer's settings and figures.

    python tools/flags_table.py          # write it
    python tools/flags_table.py --check  # fail where it isn't that of the settings

A test keeps them equal, so run this after a flag was added, its help changed, or a figure did.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from flatlora_diffusion.config.command_line import REFUSED, WITHOUT_EFFECT, field_kind, flags_of
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.train.memory import ENCODING, HALF, SINGLE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- flags: written by tools/flags_table.py -->\n", "<!-- end of flags -->\n"
BEGIN_MEMORY, END_MEMORY = "<!-- memory: written by tools/flags_table.py -->\n", "<!-- end of memory -->\n"

_SECTION = re.compile(r"    # (.+)\.")
_FIELD = re.compile(r"    (\w+): .* = option\(")
_VALUES = {bool: "", int: " N", float: " X", str: " TEXT", tuple: " TEXT ..."}


def sections() -> dict[str, list[dataclasses.Field]]:
    """The settings under the comments that stand above them in `TrainConfig`."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    found: dict[str, list[dataclasses.Field]] = {}
    for line in inspect.getsource(TrainConfig).splitlines():
        if heading := _SECTION.fullmatch(line):
            current = found.setdefault(heading[1], [])
        elif field := _FIELD.match(line):
            current.append(fields.pop(field[1]))
    if fields:
        raise ValueError(f"settings without a section: {', '.join(fields)}")
    return {heading: members for heading, members in found.items() if members}


def table() -> str:
    """The tables of all flags, a heading for each section, as Markdown."""
    lines = []
    for heading, members in sections().items():
        lines += [f"### {heading}", "", "| flag | default | meaning |", "|---|---|---|"]
        lines += [_row(field) for field in members]
        lines.append("")
    lines += ["### Flags of the diffusers script without a meaning here", "", "| flag | why |", "|---|---|"]
    lines += [f"| `--{name}` | {_cell(reason)} |" for name, reason in WITHOUT_EFFECT.items()]
    lines += [f"| `--{name}` | Refused: it {_cell(reason)} |" for name, reason in REFUSED.items()]
    return "\n".join([*lines, ""])


def memory_table() -> str:
    """GiB of a step at 1024 px, as Markdown."""
    kept = [f"{own.checkpointed:.2f} / {own.recomputed:.2f}" for own in (HALF, SINGLE)]
    decoding = [f"{own.decoding:.2f} / {own.decoding_tile:.2f}" for own in (HALF, SINGLE)]
    rows = [
        ("", "bf16", "float32 (no `--mixed_precision`)"),
        ("---", "--:", "--:"),
        ("UNet with its adapter", f"{HALF.unet:.2f}", f"{SINGLE.unet:.2f}"),
        (
            "kept for the backward pass, each sample, without `--gradient_checkpointing`: plain LoRA",
            f"{HALF.plain:.2f}",
            f"{SINGLE.plain:.2f}",
        ),
        ("the same, Flat-LoRA", f"{HALF.flat:.2f}", f"{SINGLE.flat:.2f}"),
        ("with `--gradient_checkpointing`: kept / the greatest part that is computed again", *kept),
        (
            "denoising a picture with guidance, beside the UNet",
            f"{HALF.denoising:.2f}",
            f"{SINGLE.denoising:.2f}",
        ),
        ("decoding a picture of 1024 px / a tile of 512 px, beside the UNet", *decoding),
        ("encoding a training image (before the UNet is there)", "", f"{ENCODING:.2f}"),
    ]
    lines = [" | ".join(row) for row in rows]
    return "".join(f"| {line} |\n" for line in lines).replace("| --- | --: | --: |", "|---|--:|--:|")


def with_table(page: str) -> str:
    """The page with the tables between their marks."""
    page = _between(page, BEGIN_MEMORY, memory_table(), END_MEMORY)
    return _between(page, BEGIN, table(), END)


def _between(page: str, begin: str, text: str, end: str) -> str:
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"{PAGE}: no place for the table between {begin.strip()} and {end.strip()}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _row(field: dataclasses.Field) -> str:
    kind, _ = field_kind(field)
    choices = field.metadata["choices"]
    value = f" {{{','.join(choices)}}}" if choices else _VALUES[kind]
    if field.default is dataclasses.MISSING:
        default = "required"
    elif kind is bool:
        default = "on" if field.default and not field.metadata["only_off"] else "off"
    else:
        default = "" if field.default is None else f"`{field.default}`"
    return f"| `{flags_of(field)[0]}{value}` | {default} | {_cell(field.metadata['help'])} |"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, in one cell."""
    return re.sub(r"([|*<>])", r"\\\1", text)


def main() -> None:
    """Write the table, or with `--check` compare it."""
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        if with_table(page) != page:
            sys.exit(f"{PAGE}: not the flags of the settings; run python tools/flags_table.py")
    else:
        PAGE.write_text(with_table(page), encoding="utf-8")


if __name__ == "__main__":
    main()
