"""What every command line of the project shares: one-line errors, suggestions, exit codes."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from flatlora_diffusion.common.errors import RunInterruptedError, ToldElsewhereError, UserError
from flatlora_diffusion.common.signals import sigterm_interrupts
from flatlora_diffusion.common.threads import share_processor

DTYPE_NAMES = ("fp32", "fp16", "bf16")
"""Of the flag `--dtype`, here because command lines are parsed before torch is imported: see `DTYPES`."""

# What a disk or a name may do to a run without any mistake of ours.
_SURROUNDINGS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s: one line, without the usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Report a bad argument."""
        raise UserError(message.removeprefix("argument "))

    def parse_all(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse; an unknown flag is named together with the nearest known one.

        Raises:
            UserError: A bad flag or value, or a text that isn't UTF-8. Paths may have any bytes.
        """
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise UserError(f"unknown argument {flag}{nearest(flag, self._option_string_actions)}")
        for name, value in vars(known).items():
            for text in _texts(value):
                if not is_unicode(text):
                    raise UserError(f"--{name} {text!a}: not text in UTF-8; give it another name")
        return known


def _texts(value: object) -> Iterator[str]:
    """The strings in the value of a flag."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in cast("Sequence[object]", value):
            yield from _texts(part)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; what stands in names and arguments for other bytes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def invoked_as(script: str) -> str:
    """What usage messages call a command: its installed name where it was started by that, else `script`."""
    name = Path(sys.argv[0]).stem
    return name if name.startswith("flatlora-") else script


def shell_line(words: Sequence[str]) -> str:
    """Words as a line to paste into the shell of the system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def parse_adapter(argument: str) -> tuple[str, Path]:
    """NAME=PATH of a command line."""
    name, separator, path = argument.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"{argument}: must be NAME=PATH")
    return name, Path(path)


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run a command line's work: bad input prints one line and exits with code 2.

    An interruption exits with 128 plus its signal. Anything else that goes wrong is a bug of ours and
    keeps its traceback.
    """
    # Of several processes one tells how it goes, and all what is wrong.
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(message)s")
    # The libraries read these when they are imported, which the command does.
    share_processor()
    for verbosity in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(verbosity, "error")
    for noisy in ("httpx", "httpx2", "accelerate", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a README needs no metadata
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # it warns in every layer and step
    # A path goes out with the bytes that it came in with.
    cast("io.TextIOWrapper", sys.stdout).reconfigure(errors="surrogateescape")
    try:
        with sigterm_interrupts():
            command()
    except ToldElsewhereError:
        sys.exit(2)
    except UserError as error:
        print(f"error: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
            raise
        print(f"error: {error.filename or 'writing failed'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except RunInterruptedError as stop:
        if not rank:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt as stop:
        if not rank:
            print("interrupted; what was saved before is still there", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    sys.exit(0)


def hide_progress_bars() -> None:
    """Let diffusers and transformers load models without progress bars."""
    # Inside: command lines are parsed before anything slow is imported.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` where a known name is near, else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
