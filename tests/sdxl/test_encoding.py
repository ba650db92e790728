"""Prompts that are longer than the text encoders read."""

import logging

import pytest

from flatlora_diffusion.sdxl.encoding import tell_cut, where_cut
from tests.conftest import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def long_prompt(beyond):
    """As many words of one token each as there is room for, and some more."""
    return " ".join("abcdefghijklmnopqrstuvwxyz"[index % 26] for index in range(75 + beyond))


def test_a_prompt_that_fits_is_not_cut(tokenizer):
    assert where_cut([tokenizer, tokenizer], "") is None
    assert where_cut([tokenizer, tokenizer], long_prompt(0)) is None


def test_where_a_longer_one_ends(tokenizer):
    """The words are those of the prompt; 75 = 2 * 26 + 23 letters are read, and w is the 23rd."""
    told = where_cut([tokenizer, tokenizer], long_prompt(1).upper().replace("C D", "C\n\nD"))
    assert told == (
        '"A B C D E F G H I J K L M N O P Q R S T U V W X Y Z A B C D..." is longer than the 75 tokens that '
        'the text encoders read: it ends for them with "S T U V W"'
    )


def test_the_encoder_that_reads_least_counts(tokenizer):
    short = build_tokenizer()
    short.model_max_length = 7
    for tokenizers in ([tokenizer, short], [short, tokenizer]):
        told = where_cut(tokenizers, "a b c d e f")
        assert "the 5 tokens" in told
        assert told.endswith('"a b c d e"')


def test_each_is_told_once(tokenizer, caplog):
    prompts = [long_prompt(2), "a", long_prompt(2), long_prompt(3)]
    with caplog.at_level(logging.WARNING):
        tell_cut([tokenizer, tokenizer], prompts)
    assert len(caplog.messages) == 2
