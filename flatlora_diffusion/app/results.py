"""All that shows a comparison: its pictures, the true one, where two differ, and what can be taken home."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from flatlora_diffusion.app.comparison import MOST_KEPT, Asked, Comparison, Shelf
from flatlora_diffusion.app.difference_text import difference_text, same_text, scale_html
from flatlora_diffusion.app.files import KEPT_SECONDS
from flatlora_diffusion.app.keepsakes import keepsakes
from flatlora_diffusion.app.references import true_picture
from flatlora_diffusion.draw.difference import difference

if TYPE_CHECKING:
    from flatlora_diffusion.app.site import Site

Update = dict[gr.components.Component, Any]

_NO_MAP = "The difference of the two sides: not drawn"
_NOT_DRAWN = "The picture of {}: not drawn yet"


class Results:
    """Shows a comparison: builds what does so, in the order in which `build_...` is called, and changes it.

    Args:
        site: Draws.
        opened: What is shown from the start: it is in the page, and needn't be asked for.

    Attributes:
        shelf: A visitor's last comparisons.
        link: To the comparison that is shown.
        strip: The last comparisons, to be clicked on.
    """

    def __init__(self, site: Site, opened: Shelf) -> None:
        self._site = site
        self._methods = site.studio.methods
        self._current = opened.current
        self.shelf = gr.State(opened, time_to_live=KEPT_SECONDS, delete_callback=Shelf.forget)

    def build_pictures(self) -> None:
        """One beside the other, the true one last."""
        current = self._current
        self._pictures: dict[str, gr.Image] = {}
        self._captions: dict[str, gr.Markdown] = {}
        self._truth: tuple[gr.Image, gr.Markdown] | None = None
        with gr.Row(elem_id="pictures"):
            for index, method in enumerate(self._methods):
                shown: tuple[Any, str, str] = (None, _NOT_DRAWN.format(method), "")
                if current:
                    caption = self._caption(current.asked, method, current.seconds[method])
                    shown = (str(current.files[method]), _alt(current.asked, method), caption)
                both = self._framed(method, f"picture-{index}", ["download", "fullscreen"], *shown)
                self._pictures[method], self._captions[method] = both
            if self._site.references.trained or self._site.references.heldout:
                true = self._true(current.asked.prompt if current else "")
                self._truth = self._framed("The true picture", "truth", ["fullscreen"], *true)

    def _framed(
        self, label: str, name: str, buttons: list[Any], picture: Any, alt: str, caption: str
    ) -> tuple[gr.Image, gr.Markdown]:
        """A picture with its caption below."""
        with gr.Column(min_width=140):
            image = gr.Image(
                picture,
                format="png",
                label=label,
                interactive=False,
                buttons=buttons,
                elem_id=name,
                elem_classes=self._site.picture_class,
                alt_text=alt,
            )
            return image, gr.Markdown(caption, elem_classes="caption")

    def build_figure(self, left: str, right: str) -> None:
        """How much two sides differ, in words."""
        self._figure = gr.HTML(self._difference(self._current, left, right)[1], elem_id="figure")

    def build_difference(self, left: str, right: str) -> None:
        """Where two sides differ, the link, the files, and the last comparisons."""
        current = self._current
        map_, _, link = self._difference(current, left, right)
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                self._map = gr.Image(
                    map_,
                    format="png",
                    label="Where left and right differ",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="map",
                    elem_classes=self._site.picture_class,
                    alt_text=_NO_MAP,
                )
                gr.HTML(scale_html())
            with gr.Column(scale=2, min_width=300):
                self.link = gr.Textbox(
                    link, label="Link to this comparison", interactive=False, buttons=["copy"], elem_id="link"
                )
                self._download = gr.DownloadButton(
                    "Download pictures and settings (ZIP)",
                    value=str(current.archive) if current else None,
                    interactive=current is not None,
                    elem_id="download",
                )
                with gr.Row():
                    # Drawn when the page is opened: its start doesn't wait for them.
                    still, moving = self._keepsakes(None, left, right)
                    self._still = gr.DownloadButton(
                        "Both sides (PNG)", min_width=140, elem_id="both", **still
                    )
                    self._moving = gr.DownloadButton(
                        "Sliding (GIF)", min_width=140, elem_id="sliding", **moving
                    )
                self.strip = gr.Gallery(
                    label="Your last comparisons: click one to go back to it",
                    columns=MOST_KEPT,
                    height=150,
                    object_fit="contain",
                    format="png",
                    allow_preview=False,
                    interactive=False,
                    visible=False,
                    buttons=[],
                    elem_id="strip",
                    elem_classes=self._site.picture_class,
                )

    @property
    def pair(self) -> list[gr.components.Component]:
        """What depends on the sides."""
        return [self._map, self._figure, self.link, self._still, self._moving]

    @property
    def components(self) -> list[gr.components.Component]:
        """All that shows a comparison."""
        pictures = [*self._pictures.values(), *self._captions.values()]
        return [self._download, self.strip, self.shelf, *self.pair, *(self._truth or ()), *pictures]

    def sketch(self, method: str, picture: Image.Image) -> Update:
        """What a method's picture has come to."""
        return {self._pictures[method]: picture}

    def picture(self, asked: Asked, method: str, file: Any, seconds: float) -> Update:
        """One method's picture with its caption."""
        return {
            self._pictures[method]: gr.Image(str(file), alt_text=_alt(asked, method)),
            self._captions[method]: self._caption(asked, method, seconds),
        }

    def shown(self, shelf: Shelf, left: str, right: str) -> Update:
        """The current comparison of a shelf with all that belongs to it, or none of it."""
        comparison = shelf.current
        update: Update = {self.shelf: shelf, **self.shown_pair(shelf, left, right)}
        if comparison is None:
            update |= dict.fromkeys(self._captions.values(), "")
            for method, picture in self._pictures.items():
                update[picture] = gr.Image(None, alt_text=_NOT_DRAWN.format(method))
            update[self._download] = gr.DownloadButton(value=None, interactive=False)
            return update
        for method, file in comparison.files.items():
            update |= self.picture(comparison.asked, method, file, comparison.seconds[method])
        update[self._download] = gr.DownloadButton(value=str(comparison.archive), interactive=True)
        if self._truth:
            picture, alt, caption = self._true(comparison.asked.prompt)
            update |= {self._truth[0]: gr.Image(picture, alt_text=alt), self._truth[1]: caption}
        last = [(str(kept.files[right]), kept.asked.prompt) for kept in shelf.kept]
        update[self.strip] = gr.Gallery(last, visible=len(last) > 1, selected_index=None)
        return update

    def shown_pair(self, shelf: Shelf, left: str, right: str) -> Update:
        """What depends on the sides, of the current comparison."""
        picture, figure, link = self._difference(shelf.current, left, right)
        alt = f"Where {left} and {right} differ: bright is more" if picture else _NO_MAP
        still, moving = self._keepsakes(shelf.current, left, right)
        return {
            self._map: gr.Image(picture, alt_text=alt),
            self._figure: figure,
            self.link: link,
            self._still: gr.DownloadButton(**still),
            self._moving: gr.DownloadButton(**moving),
        }

    @staticmethod
    def _keepsakes(comparison: Comparison | None, left: str, right: str) -> list[dict[str, Any]]:
        """The values of the two buttons: a picture of both sides, and one that moves."""
        if comparison is None or left not in comparison.files or right not in comparison.files:
            return [{"value": None, "interactive": False}] * 2
        return [{"value": str(file), "interactive": True} for file in keepsakes(comparison, left, right)]

    def _caption(self, asked: Asked, method: str, seconds: float) -> str:
        how = self._site.caption(*asked.made(method))
        return f"{html.escape(asked.prompt)}  \n{how}, {seconds:.1f} s"

    def _true(self, prompt: str) -> tuple[Image.Image | None, str, str]:
        """The picture that a prompt names, its alternative text and its caption."""
        found = self._site.references.truth(prompt)
        if found and (picture := true_picture(found[1])):
            told, example = found
            return picture, f"{told}: {example.caption}", f"{told}  \n{html.escape(example.caption)}"
        return None, "The true picture: none for this prompt", "No training or held-out picture is called so."

    def _difference(
        self, comparison: Comparison | None, left: str, right: str
    ) -> tuple[Image.Image | None, str, str]:
        """The map of where two sides differ, what is said of it, and the link that shows them."""
        if comparison is None or left not in comparison.files or right not in comparison.files:
            return None, "", ""
        link = comparison.asked.link(left, right)
        adapters = self._site.studio.adapters
        one_file = left in adapters and right in adapters and adapters[left].sha256 == adapters[right].sha256
        if left == right or one_file:
            return None, same_text(left, right), link
        with Image.open(comparison.files[left]) as one, Image.open(comparison.files[right]) as other:
            found = difference(one.convert("RGB"), other.convert("RGB"))
        return found.picture, difference_text(left, right, found), link


def _alt(asked: Asked, method: str) -> str:
    return f'"{asked.prompt}" drawn by {method} with seed {asked.seed}'
