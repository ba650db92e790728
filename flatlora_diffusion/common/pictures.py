"""Which files are pictures; opening pictures and writing them."""

from __future__ import annotations

import functools
import importlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically

# What Pillow knows by name, and draws with other programs or not at all.
_NO_RASTERS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Packages that teach Pillow a format -> what they call for it, where importing them isn't enough.
_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None}
_NEEDS = {
    **dict.fromkeys([".heic", ".heif", ".hif"], "pip install pillow-heif reads it"),
    ".jxl": "pip install pillow-jxl-plugin reads it",
}
# Pictures of other programs, of which Pillow doesn't even know the suffix.
_FOREIGN = {".svg", ".xcf", ".kra", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf"}

_TURNS = {  # EXIF's orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAYS_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


@functools.cache
def _formats() -> frozenset[str]:
    """The formats of which this Pillow, with its plugins, reads pixels."""
    for package, register in _PLUGINS.items():
        try:
            plugin = importlib.import_module(package)
        except ImportError:
            continue
        if register:
            getattr(plugin, register)()
    Image.init()
    return frozenset(Image.OPEN.keys() - _NO_RASTERS | {"MPO"})  # which Pillow opens as a kind of JPEG


@functools.cache
def _suffixes() -> frozenset[str]:
    """The suffixes of those formats, in small letters."""
    formats = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def has_picture_name(path: Path) -> bool:
    """Whether a file is a picture by its name: one that this Pillow opens, and no hidden file."""
    return path.suffix.lower() in _suffixes() and not path.name.startswith(".")


def why_no_picture(path: Path) -> str | None:
    """Why a file without a picture's name, which seems to be one, isn't read; None where it doesn't seem so.

    Its content tells, or a suffix of pictures that Pillow cannot read.
    """
    suffix = path.suffix.lower()
    if suffix in _NEEDS:
        return _NEEDS[suffix]
    if suffix in _FOREIGN or suffix in Image.registered_extensions():
        return "a format that isn't read"
    # Formats without a mark at their beginning would be seen everywhere.
    marked = [name for name in _formats() if name in Image.OPEN and Image.OPEN[name][1]]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=marked) as image:
                kind = image.format
    except Exception:  # whatever it is, it is no picture that could be trained
        return None
    return f"a picture ({kind}) by its content; rename it so that its suffix says so"


class Readable(Protocol):
    """What has the content of a picture's file, such as the file's path; its `str` says where it is."""

    @property
    def read_bytes(self) -> Callable[[], bytes]:
        """Gives the content."""
        ...


def open_image(source: Readable) -> Image.Image:
    """A picture, decoded in full, turned as its EXIF data says, with 8 bits a channel.

    16-bit greys and floats from 0 to 1 are scaled; where white lies in other deep pictures isn't known.

    Raises:
        UserError: The file is missing, truncated or no picture, or its pixels have another depth.
    """
    _formats()  # plugins
    try:
        with Image.open(io.BytesIO(source.read_bytes())) as image:
            image.load()
            return _upright(image)
    except UserError:  # of what has the content
        raise
    except Exception as error:  # decoders raise anything: struct.error, zlib.error, IndexError, KeyError, ...
        # Pillow names the address of bytes of which it doesn't know the format.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if unknown else getattr(error, "strerror", None) or error
        reason = " ".join(str(reason).split()) or type(error).__name__
        raise UserError(f"{source}: cannot be read as an image ({reason}); mend or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned; unlike Pillow's own function this doesn't write the EXIF data again, which may fail."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    shallow = _eight_bits(image)
    if turn is None:
        return shallow.copy()
    turned = shallow.transpose(turn)
    for name in _SAYS_ORIENTATION:
        turned.info.pop(name, None)
    return turned


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture itself, or where its pixels are deeper, their tones in 8 bits: Pillow would clip at 255."""
    if image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(
                f"floats from {pixels.min():g} to {pixels.max():g}, not from 0 to 1; save it with 8 or 16 "
                "bits a channel"
            )
        tones = (pixels * 255).round()
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tones = np.asarray(image) >> 8
    elif image.mode == "I":
        raise ValueError("32-bit integers; save it with 8 or 16 bits a channel")
    else:
        return image
    shallow = Image.fromarray(tones.astype(np.uint8))
    shallow.info = dict(image.info)
    if isinstance(grey := image.info.get("transparency"), int):
        shallow.info["transparency"] = grey >> 8
    return shallow


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
