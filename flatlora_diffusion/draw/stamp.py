"""What a picture says of its making: inside the PNG and in a JSON file beside it.

The chunk `parameters` has the form of A1111, which other tools read too. The chunk `flatlora` and the JSON
file have the whole stamp, exactly.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.packages import LIBRARIES, package_versions
from flatlora_diffusion.common.pictures import png_bytes

BASE = "base"
"""What the base is called among the methods: in stamps, on sheets, as a folder."""

CHUNK = "flatlora"
A1111_CHUNK = "parameters"
_HASH_LENGTH = 12  # of A1111's hashes of LoRAs


@dataclass(frozen=True)
class Stamp:
    """How a picture was made.

    Attributes:
        prompt: What was drawn, as it was typed.
        negative_prompt: What guidance steered away from.
        seed: Of the initial noise.
        width: In pixels.
        height: In pixels.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        sampler: Its name.
        base: Name of the SDXL pipeline (`base_name`), never a path.
        method: Label of the column: `BASE`, or an adapter's, such as `Flat-LoRA`.
        adapter_sha256: Of the adapter's file, in hex; None for the base.
        scale: Factor on the adapter; None for the base.
        dtype: Precision, such as `fp32`.
        device: Its kind: `cpu` or `cuda`.
        versions: Package -> version (`versions`).
        caption_chunks: Pieces in which prompts were read.
        mix: Of several adapters at once: the SHA-256 of each file, and its scale.
        transparent: The ground was taken away, where it was flat.

    Raises:
        ValueError: The base is a path.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    base: str
    method: str
    adapter_sha256: str | None
    scale: float | None
    dtype: str
    device: str
    versions: dict[str, str]
    caption_chunks: int = 1
    mix: list[list[str | float]] | None = None
    transparent: bool = False

    def __post_init__(self) -> None:
        if self.base.count("/") > 1 or self.base.startswith(("/", ".", "~")):
            raise ValueError("base: a path would tell of the computer; give base_name(path)")


def base_name(base: str) -> str:
    """A name for a base that tells nothing of the computer: of a local folder its last part alone."""
    path = Path(base).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else base


def versions() -> dict[str, str]:
    """Versions of the packages that decide a picture."""
    return package_versions("flatlora_diffusion", *LIBRARIES)


def parameters(stamp: Stamp) -> str:
    """The text that A1111 writes into its pictures, with fields of our own at the end of the last line.

    A1111's readers give back the prompt and each field, but for spaces around lines and lines of the prompt
    that begin with `Negative prompt:`.
    """
    own = stamp.adapter_sha256
    fields = {
        "Steps": stamp.steps,
        "Sampler": stamp.sampler,
        "CFG scale": _number(stamp.guidance),
        "Seed": stamp.seed,
        "Size": f"{stamp.width}x{stamp.height}",
        "Model": stamp.base,
        "Method": stamp.method,
        "Adapter hash": own and own[:_HASH_LENGTH],
        "Adapter scale": None if stamp.scale is None else _number(stamp.scale),
        "Mix": stamp.mix and " + ".join(f"{str(own)[:_HASH_LENGTH]} x {scale}" for own, scale in stamp.mix),
        "Caption chunks": stamp.caption_chunks if stamp.caption_chunks > 1 else None,
        "Ground": "transparent" if stamp.transparent else None,
        "Version": f"flatlora_diffusion {stamp.versions['flatlora_diffusion']}",
    }
    lines = [stamp.prompt]
    if stamp.negative_prompt:
        lines.append(f"Negative prompt: {stamp.negative_prompt}")
    lines.append(
        ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None)
    )
    return "\n".join(lines)


def png(picture: Image.Image, stamp: Stamp) -> bytes:
    """A picture as a PNG with its stamp: the same bytes each time."""
    info = PngInfo()
    info.add_text(A1111_CHUNK, parameters(stamp))  # an iTXt chunk where Latin-1 doesn't have the signs
    info.add_text(CHUNK, json.dumps(dataclasses.asdict(stamp)))
    return png_bytes(picture, info)


def sidecar(stamp: Stamp) -> bytes:
    """The stamp as a JSON file."""
    return (json.dumps(dataclasses.asdict(stamp), indent=2, ensure_ascii=False) + "\n").encode()


def read(picture: Path | bytes) -> Stamp:
    """The stamp of a PNG, from its file or its bytes.

    Raises:
        UserError: It cannot be read, or has no stamp.
    """
    name = "the picture" if isinstance(picture, bytes) else str(picture)
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            opened.load()  # chunks may follow the pixels
            text = getattr(opened, "text", {}).get(CHUNK)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: cannot be read as a picture ({error})") from error
    if text is None:
        raise UserError(f"{name}: does not say how it was made; give a PNG that this project saved")
    try:
        return Stamp(**json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{name}: its stamp was damaged, or written by another version of this project ({error})"
        ) from error


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _quoted(value: str | float) -> str:
    """As A1111 writes values: in JSON's quotes where they would end the field."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",:\n") else text
