"""Loading models of diffusers and transformers: what is missing or damaged is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from flatlora_diffusion.common.errors import UserError


def local_folder(what: str, name: str, advice: str) -> Path | None:
    """The folder of a model; None for a name that is no local path: it is on the hub, so loading will tell.

    Args:
        what: Names the model in errors.
        name: As the user gave it.
        advice: What to give instead.

    Raises:
        UserError: It is a file, or there is no such folder.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"{what}: a single file; {advice}")
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"{what}: no such folder; {advice}")
    return None


def check_local(what: str, name: str, advice: str) -> None:
    """Refuse a model of transformers that is a local path, but no folder with a configuration and weights.

    Args:
        what: Names the model in errors.
        name: As the user gave it; of a name on the hub, loading will tell.
        advice: What to give instead.

    Raises:
        UserError: Says what is missing, or that the weights are pickled.
    """
    folder = local_folder(what, name, advice)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UserError(f"{what}: no config.json in it; {advice}")
        check_weights(what, folder)


def check_weights(what: str, folder: Path) -> None:
    """Refuse a folder without weights, or with pickled ones.

    Raises:
        UserError: Says which of the two it is.
    """
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        met = "only pickled weights (.bin), which can run code" if pickled else "no weights"
        raise UserError(f"{what}: {met} in {folder.name}/; give one saved as safetensors")


def check_vocabulary(what: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that was made without its files.

    Raises:
        UserError: It knows no word.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{what}: there is no vocabulary (tokenizer.json, or vocab.json and merges.txt)")


def load_whole(what: str, load: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Call a loader of diffusers or transformers; its complaint becomes one line.

    Args:
        what: Names the model in errors.
        load: Such as `from_pretrained`; with `use_safetensors` it loads weights, and all of them are needed.
        arguments: For it.
        settings: For it.

    Raises:
        UserError: Something is missing or damaged.
    """
    try:
        if "use_safetensors" not in settings:  # no weights: a tokenizer, a scheduler
            return load(*arguments, **settings)
        model, report = load(*arguments, **settings, output_loading_info=True)
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: cannot be loaded ({reason[:300]})") from error
    if report["missing_keys"]:  # the libraries would go on with random values in their place
        missing = sorted(report["missing_keys"])
        raise UserError(f"{what}: {len(missing)} weights are missing from its files ({missing[0]}, ...)")
    return model
