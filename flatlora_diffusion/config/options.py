"""How a setting is declared: its default, help, choices and rules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


def option(
    default: Any,
    help: str,
    choices: Iterable[str] | None = None,
    *,
    rules: tuple[Rule, ...] = (),
    secret: bool = False,
    decides: bool = True,
    later: bool = False,
    only_off: bool = False,
) -> Any:
    """A field of the configuration.

    Args:
        default: `REQUIRED` where there is none.
        help: What the command line says about it.
        choices: The values that it may have.
        rules: That a value must keep to, unless it is None.
        secret: It is never written anywhere.
        decides: Runs that differ in it may end in different adapters. The data counts by its content, the
            steps where a schedule stretches over them: not by the settings that name or count them.
        later: It came when there were checkpoints without it already, whose runs had its default: that is
            not recorded.
        only_off: A switch that is on, of which the command line has the `--no-` form alone.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices else None,
        "rules": rules,
        "secret": secret,
        "decides": decides,
        "later": later,
        "only_off": only_off,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Rule:
    """A rule for one value.

    Attributes:
        text: What is told of a value that breaks it.
        holds: Whether a value keeps to it.
    """

    text: str
    holds: Callable[[Any], object]


POSITIVE = Rule("must be greater than 0", lambda value: value > 0)
NOT_NEGATIVE = Rule("must be 0 or more", lambda value: value >= 0)
BELOW_ONE = Rule("must be in [0, 1)", lambda value: 0 <= value < 1)
FRACTION = Rule("must be in [0, 1]", lambda value: 0 <= value <= 1)
LEARNING_RATE = (NOT_NEGATIVE, Rule("must be at most 1e30", lambda value: value <= 1e30))
FROM_2 = Rule("must be 2 or more", lambda value: value >= 2)
FROM_8 = Rule("must be 8 or more", lambda value: value >= 8)
MULTIPLE_OF_8 = Rule("must be a multiple of 8", lambda value: value % 8 == 0)
INITIALISATION = Rule(
    "must be gaussian, default, pissa, pissa_niter_N (with N at least 1), olora, eva or lora_ga",
    re.compile(r"gaussian|default|eva|pissa(_niter_[1-9]\d*)?|olora|lora_ga").fullmatch,
)
