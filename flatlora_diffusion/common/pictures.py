"""Opening pictures and writing them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically


class Readable(Protocol):
    """What has the content of a picture's file, such as the file's path; its `str` says where it is."""

    @property
    def read_bytes(self) -> Callable[[], bytes]:
        """Gives the content."""
        ...


def open_image(source: Readable) -> Image.Image:
    """A picture, decoded in full and turned as its EXIF data says.

    Raises:
        UserError: The file is missing, truncated or no picture.
    """
    try:
        with Image.open(io.BytesIO(source.read_bytes())) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow names the address of bytes of which it doesn't know the format.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if unknown else getattr(error, "strerror", None) or error
        raise UserError(f"{source}: cannot be read as an image ({reason}); mend or remove it") from error


def png_bytes(picture: Image.Image, info: PngInfo | None = None) -> bytes:
    """A picture as a PNG, the same bytes each time.

    Args:
        picture: Any.
        info: Texts that go with it.
    """
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=info)
    return content.getvalue()


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all.

    Raises:
        UserError: The disk is full or not writable.
    """
    write_atomically(path, png_bytes(picture))
