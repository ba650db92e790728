"""The command `flatlora-captions`: write captions where there are none, and say what is wrong with others."""

from __future__ import annotations

import argparse
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from flatlora_diffusion.common.command import OneLineParser, invoked_as
from flatlora_diffusion.common.errors import UserError

_FIELDS = ("name", "style", "caption", "instance_prompt")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: captions from file names or a model, a trigger added, what lacks, is cut or repeats."""
    given = _parser().parse_all(arguments)
    template = _template(given)
    if given.trigger is not None and not given.trigger.strip():
        raise UserError("--trigger is empty; give a word such as sks, or leave it out")
    if given.caption_chunks < 1:
        raise UserError(f"--caption_chunks {given.caption_chunks}: must be greater than 0")
    if not given.folder.is_dir():
        met = "not a folder" if given.folder.exists() else "no such folder"
        raise UserError(f"{given.folder}: {met}; give that of the training images")
    # After parsing: --help and bad flags answer at once.
    from flatlora_diffusion.common.pictures import open_image
    from flatlora_diffusion.data.caption_files import problems, tokenizers_of, with_trigger, write_captions
    from flatlora_diffusion.data.folders import Picture, read_folder

    def read() -> list[Picture]:
        return read_folder(given.folder, given.caption_column, kohya_folders=given.kohya_folders).pictures

    tokenizers = tokenizers_of(given.base)
    pictures = read()
    if not pictures:
        raise UserError(f"{given.folder}: no image in it")
    for picture in pictures:
        open_image(picture.path)  # a damaged file is reported before anything is written

    def write(told: str, parts: Iterable[Mapping[Path, str]]) -> None:
        written: Counter[str] = Counter()
        for captions in parts:
            changed = [picture for picture in pictures if picture.path in captions]
            written += write_captions(given.folder, changed, captions, given.caption_column)
        for file, number in written.items():
            print(f"{told} {number} caption{'s' * (number != 1)} in {file}")

    if template is not None:
        lacking = [picture.path for picture in pictures if not picture.caption]
        write("wrote", _new_captions(lacking, template, given))
        pictures = read()
    if given.trigger:
        captions = {own.path: own.caption for own in pictures if own.caption}
        added = {path: with_trigger(caption, given.trigger) for path, caption in captions.items()}
        write("added the trigger to", [{p: text for p, text in added.items() if text != captions[p]}])
        pictures = read()
    found = problems(pictures, given.folder, tokenizers, given.caption_chunks)
    for kind, lines in found.items():
        for line in lines:
            print(f"{kind}: {line}")
    print(f"{len(pictures)} images: " + ", ".join(f"{len(lines)} {kind}" for kind, lines in found.items()))


def _new_captions(
    paths: Sequence[Path], template: str, given: argparse.Namespace
) -> Iterator[dict[Path, str]]:
    """Captions for pictures; those of a model one by one, so that an interruption loses none of them."""
    from flatlora_diffusion.data.caption_files import name_in_words

    def caption(path: Path, seen: str = "") -> str:
        own = {"name": name_in_words(path), "style": given.style, "caption": seen}
        return template.format(**own, instance_prompt="{instance_prompt}")

    if given.model is None:
        yield {path: caption(path) for path in paths}
        return
    describe = _captioner(given)
    for path in paths:
        yield {path: caption(path, describe(path))}


def _captioner(given: argparse.Namespace) -> Callable[[Path], str]:
    from flatlora_diffusion.common.command import hide_progress_bars
    from flatlora_diffusion.common.devices import checked_device
    from flatlora_diffusion.data.caption_model import Captioner

    hide_progress_bars()
    return Captioner(given.model, checked_device(given.device)).describe


def _template(given: argparse.Namespace) -> str | None:
    """The template, where captions are to be written.

    Raises:
        UserError: It has other fields than there are, or doesn't use what is given for it.
    """
    template = given.template
    if template is None:
        if given.style is not None:
            raise UserError("--style is for --template; leave it out, or give both")
        return None if given.model is None else "{caption}"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"--template {template}: {error}; write {{{{ and }}}} for braces") from error
    fields = [field for _, field, _, _ in parts if field is not None]
    for _, field, form, conversion in parts:
        if field is not None and (field not in _FIELDS or form or conversion):
            known = ", ".join(f"{{{name}}}" for name in _FIELDS)
            raise UserError(f"--template {template}: {{{field}}} isn't one of {known}")
    for field, flag in (("style", "style"), ("caption", "model")):
        if (field in fields) != (getattr(given, flag) is not None):
            raise UserError(
                f"--template {template}: {{{field}}} and --{flag} go together; give both or none of them"
            )
    if not template.strip():
        raise UserError("--template is empty; give one such as 'a 3d icon of {name}'")
    return template


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=invoked_as("python -m flatlora_diffusion.captions"),
        description="Say which training images of a folder lack a caption, have one that the text encoders "
        "cut, or one that others have too. With --template or --model, write captions for those without; "
        "with --trigger, add a word to those that lack it. Captions go where the folder has them: "
        "metadata.jsonl, else .txt files.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="Folder of the training images.")
    add(
        "--template",
        metavar="TEXT",
        help='Caption of images without one, such as "a {style} icon of {name}": {name} is the file\'s name '
        "in words, {style} what --style says, {caption} what --model sees.",
    )
    add("--style", metavar="TEXT", help="In the place of {style}.")
    add("--trigger", metavar="WORD", help="Put this before captions that don't have it.")
    add(
        "--model",
        metavar="NAME",
        help="Folder or hub name of a captioning model of transformers, such as "
        "Salesforce/blip-image-captioning-base, for images without a caption.",
    )
    add("--device", help="Where it runs, such as cuda or cpu (default: the accelerator at hand).")
    add("--base", metavar="BASE", help="SDXL base whose tokenizers count (default: SDXL's own).")
    add("--caption_chunks", type=int, default=1, metavar="N", help="Pieces of a caption that count (1).")
    add(
        "--caption_column", default="text", metavar="KEY", help="What captions are called in metadata (text)."
    )
    add("--kohya_folders", action="store_true", help="Read sub-folders such as 10_fox too.")
    return parser
