"""A run's output folder on the Hugging Face Hub: the repository before training, the upload after it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import httpx

from flatlora_diffusion.common.command import shell_line
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.output.card import CARD, is_ours
from flatlora_diffusion.output.names import FOLDS

logger = logging.getLogger(__name__)

# What the hub, the way to it, and a name or token of the wrong form raise.
_FAILURES = (OSError, ValueError, httpx.HTTPError)


def open_repository(config: TrainConfig) -> str:
    """Make the repository of a run, or see that it can be written, and tell its full name.

    Raises:
        UserError: The token is missing or not sufficient, the name is none, or the hub cannot be reached.
    """
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    try:
        return create_repo(repo_id=name, exist_ok=True, token=config.hub_token).repo_id
    except _FAILURES as error:
        raise UserError(
            f"--push_to_hub: {name} cannot be opened ({_reason(error, config)}); log in with "
            "`hf auth login` or give --hub_token, or check --hub_model_id"
        ) from error


def upload(config: TrainConfig, repository: str) -> None:
    """Upload the output folder, but for checkpoints, logs, the runs of folds and hidden files.

    A model card that somebody has written on the hub stays.

    Raises:
        UserError: It failed; the message has the command that uploads by hand.
    """
    ignored = ["checkpoint-*", "*/checkpoint-*", ".*", "*/.*", f"{FOLDS}/*/*", f"*/{FOLDS}/*/*"]
    logs = Path(config.logging_dir)
    if not logs.is_absolute():
        ignored += [f"{logs.as_posix()}/*", f"*/{logs.as_posix()}/*"]
    folder = config.output_dir
    try:
        if not _may_replace_card(repository, config.hub_token):
            logger.info(
                "the README.md of %s on the hub was not written by this program and stays", repository
            )
            ignored.append(CARD)
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=ignored,
            token=config.hub_token,
        )
    except _FAILURES as error:
        excluded = [word for pattern in ignored for word in ("--exclude", pattern)]
        command = shell_line(["hf", "upload", repository, folder, ".", *excluded])
        raise UserError(
            f"the upload to {repository} failed ({_reason(error, config)}); upload by hand with: {command}"
        ) from error
    logger.info("uploaded to %s", repository)


def without_token(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with HUB_TOKEN in place of the hub's token, to be shown."""
    shown = list(arguments)
    for index, word in enumerate(shown):
        if word.startswith("--hub_token="):
            shown[index] = "--hub_token=HUB_TOKEN"
        elif index and arguments[index - 1] == "--hub_token":
            shown[index] = "HUB_TOKEN"
    return shown


def _may_replace_card(repository: str, token: str | None) -> bool:
    try:
        known = hf_hub_download(repository, CARD, token=token)
    except RemoteEntryNotFoundError:
        return True
    return is_ours(Path(known).read_bytes())


def _reason(error: Exception, config: TrainConfig) -> str:
    """The first line of an error, without the token, which errors about a malformed one quote."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return reason.replace(config.hub_token, "...")[:300] if config.hub_token else reason[:300]
