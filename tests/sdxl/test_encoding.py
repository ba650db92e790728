"""Prompts that are longer than the text encoders read."""

import logging

import pytest
import torch
from torch.testing import assert_close

from flatlora_diffusion.draw.pipeline import load_pipeline
from flatlora_diffusion.sdxl.encoding import encode_prompts, tell_cut, where_cut
from tests.tiny import build_text_encoders, build_tokenizer


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
        'the text encoders read: it ends for them with "S T U V W"; --caption_chunks 2 reads all of it'
    )


def test_the_encoder_that_reads_least_counts(tokenizer):
    short = build_tokenizer()
    short.model_max_length = 7
    for tokenizers in ([tokenizer, short], [short, tokenizer]):
        told = where_cut(tokenizers, "a b c d e f")
        assert "the 5 tokens" in told
        assert '"a b c d e"' in told


def test_each_is_told_once(tokenizer, caplog):
    prompts = [long_prompt(2), "a", long_prompt(2), long_prompt(3)]
    with caplog.at_level(logging.WARNING):
        tell_cut([tokenizer, tokenizer], prompts)
    assert len(caplog.messages) == 2


def test_pieces_are_read_as_a1111_does(tokenizer):
    """The twin: tokens in pieces of 75, each between its own first and last one, side by side."""
    tokenizers, encoders = (tokenizer, build_tokenizer()), build_text_encoders()
    prompts = [long_prompt(20), "a icon", long_prompt(100)]
    with torch.no_grad():
        read = encode_prompts(tokenizers, encoders, prompts, chunks=2)
        for place, prompt in enumerate(prompts):
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            pieces = [[598, *own, 599] + [599] * (75 - len(own)) for own in (ids[:75], ids[75:150])]
            outputs = [
                encoder(torch.tensor(pieces), output_hidden_states=True, return_dict=True)
                for encoder in encoders
            ]
            states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            assert_close(read.tokens[place], states.flatten(0, 1))
            assert_close(read.pooled[place], outputs[1].text_embeds[0])


def test_one_piece_has_the_bits_of_the_plain_pipeline(base_path):
    pipeline = load_pipeline(str(base_path))
    encoders = (pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2)
    prompts = [long_prompt(20), "", "a icon"]
    with torch.no_grad():
        read = encode_prompts(*encoders, prompts)
        tokens, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(read.tokens, tokens) and torch.equal(read.pooled, pooled)


def test_a_prompt_is_told_when_it_is_longer_than_all_pieces(tokenizer):
    tokenizers = [tokenizer, tokenizer]
    assert where_cut(tokenizers, long_prompt(75), 2) is None
    told = where_cut(tokenizers, long_prompt(76), 2)
    assert "the 150 tokens" in told and '"p q r s t"; --caption_chunks 3 reads all of it' in told
