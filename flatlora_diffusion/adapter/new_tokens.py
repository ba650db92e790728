"""Pivotal tuning: new tokens whose embeddings are trained together with the LoRA (textual inversion).

In training the embedding tables of the base stay frozen, and the new rows are parameters of their own beside
them. They are saved beside the adapter and loaded by diffusers' own `load_textual_inversion`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel

from flatlora_diffusion.adapter.file import FLAT_METADATA_KEY, with_sorted_metadata
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.seeds import keyed_generator

if TYPE_CHECKING:
    from flatlora_diffusion.data.images import Sample

EMBEDDINGS_NAME = "learned_embeds.safetensors"  # diffusers' own name for textual inversions
FACTS_KEY = "new_tokens"
_FILE_KEYS = ("clip_l", "clip_g")  # how diffusers' scripts, ComfyUI and A1111 call SDXL's text encoders
_PULL = 0.1  # of the diffusers script


def new_tokens(words: Iterable[str], count: int) -> dict[str, list[str]]:
    """The words of the prompts that stand for something new, and the `count` tokens that replace each.

    They have the names that the diffusers script gives them: `<s0>`, `<s1>`, ...
    """
    return {
        word: [f"<s{index}>" for index in range(place * count, (place + 1) * count)]
        for place, word in enumerate(words)
    }


def require_words(words: Iterable[str], samples: Sequence[Sample]) -> None:
    """Refuse training of a word that no caption has.

    Raises:
        UserError: Names the word.
    """
    for word in words:
        if all(replace_words(sample.caption, {word: ""}) == sample.caption for sample in samples):
            raise UserError(
                f"--token_abstraction {word}: in none of the {len(samples)} captions; write it where the new "
                f"tokens belong (--instance_prompt 'an icon in the style of {word}', say)"
            )


def replace_words(text: str, words: Mapping[str, str]) -> str:
    """The text with the words that `words` knows replaced: whole ones, in the same case.

    `TOK` is replaced in `a TOK.` and `TOK's`, and left alone in `TOKYO` and `tok`.
    """
    if not words:
        return text
    whole = []
    for word in sorted(words, key=len, reverse=True):
        begins, ends = (r"\b" if re.fullmatch(r"\w", letter) else "" for letter in (word[0], word[-1]))
        whole.append(begins + re.escape(word) + ends)
    return re.sub("|".join(whole), lambda match: words[match[0]], text)


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table with a few rows beside it, which alone are trained.

    Args:
        table: Token ids -> (..., features).
        ids: Of the new tokens, in the order of their rows.
        rows: Their initial embeddings (tokens, features), float32.
    """

    ids: Tensor

    def __init__(self, table: nn.Embedding, ids: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.table = table
        # A module, and the second one: a model's precision is said to be that of its first parameter.
        self.new = nn.Embedding.from_pretrained(rows, freeze=False)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., features) of token ids (...), in the precision of the table."""
        matches = ids[..., None] == self.ids
        is_new = matches.any(dim=-1)
        known = self.table(ids.masked_fill(is_new, 0))
        new = self.new(matches.int().argmax(dim=-1)).to(known.dtype)
        return torch.where(is_new[..., None], new, known)


class NewTokens:
    """New tokens in both tokenizers, and their trainable embeddings in both text encoders.

    Their initial embeddings are normals of the standard deviation of the table, which `keep_scale` makes them
    keep, as in the diffusers script.

    Many of SDXL's text encoders (those with `eos_token_id` 2) pool a prompt at its highest token id, which is
    that of a new token. Training keeps to that, because diffusers' pipelines do.

    Args:
        tokens: The words of prompts -> the new tokens that replace each.
        tokenizers: The tokens are added to them.
        text_encoders: On the CPU. Their embedding tables are wrapped.
        seed: Decides the initial embeddings.

    Raises:
        UserError: A tokenizer has such a token already, or can't be given new ones.
    """

    def __init__(
        self,
        tokens: Mapping[str, Sequence[str]],
        tokenizers: Sequence[CLIPTokenizer],
        text_encoders: Sequence[PreTrainedModel],
        seed: int,
    ) -> None:
        self.words = {word: "".join(own) for word, own in tokens.items()}
        self._tokens = [token for own in tokens.values() for token in own]
        self._tokenizers = tokenizers
        self._embeddings: dict[str, ExtendedEmbedding] = {}
        self._std: dict[str, Tensor] = {}
        for key, tokenizer, text_encoder in zip(_FILE_KEYS, tokenizers, text_encoders, strict=True):
            known = sorted(tokenizer.get_vocab().keys() & set(self._tokens))
            if known:
                raise UserError(
                    f"--train_text_encoder_ti: the base's tokenizer has the token {known[0]} already; give a "
                    "base without learned tokens"
                )
            tokenizer.add_tokens(self._tokens)
            ids = tokenizer.convert_tokens_to_ids(self._tokens)
            assert isinstance(ids, list), "several tokens have several ids"
            if ids[-1] >= len(tokenizer):
                raise UserError(
                    "--train_text_encoder_ti: the ids of the base's tokenizer have gaps, so diffusers could "
                    "not load the new tokens"
                )
            table = text_encoder.get_input_embeddings()
            assert isinstance(table, nn.Embedding)
            draws = [keyed_generator(seed, "new token", key, index) for index in range(len(ids))]
            normals = torch.stack([torch.randn(table.embedding_dim, generator=draw) for draw in draws])
            self._std[key] = table.weight.float().std()
            self._embeddings[key] = ExtendedEmbedding(table, ids, self._std[key] * normals)
            text_encoder.set_input_embeddings(self._embeddings[key])

    def captioned(self, samples: Iterable[Sample]) -> list[Sample]:
        """The samples with the new tokens in their captions."""
        return [
            dataclasses.replace(sample, caption=replace_words(sample.caption, self.words))
            for sample in samples
        ]

    def require_room(self, samples: Iterable[Sample], chunks: int = 1) -> None:
        """Refuse training of a token that is cut off in the captions of all samples.

        Args:
            samples: From `captioned`.
            chunks: Pieces in which captions are read, see `sdxl.encoding.encode_prompts`.

        Raises:
            UserError: Names the token.
        """
        tokenizer = self._tokenizers[0]
        own = tokenizer.num_special_tokens_to_add()
        room = chunks * (tokenizer.model_max_length - own)
        captions = [sample.caption for sample in samples]
        ids = tokenizer(captions, truncation=True, max_length=room + own).input_ids
        kept = {token for caption in ids for token in tokenizer.convert_ids_to_tokens(caption)}
        for token in self._tokens:
            if token not in kept:
                raise UserError(
                    f"--train_text_encoder_ti: {token} lies beyond the {room + own} tokens "
                    "of a prompt in every caption; shorten them, or lower --num_new_tokens_per_abstraction"
                )

    def keep_scale(self) -> None:
        """After an optimizer step: pull the new rows towards the standard deviation of the table.

        As in the diffusers script, they are multiplied by `(std of the table / their std) ** 0.1`.
        """
        with torch.no_grad():
            for key, embedding in self._embeddings.items():
                rows = embedding.new.weight
                if rows.requires_grad:
                    rows.mul_((self._std[key].to(rows.device) / rows.std()) ** _PULL)

    def file(self) -> bytes:
        """The embeddings as a safetensors file: `clip_l` and `clip_g`, each (tokens, features), float32."""
        tensors = {key: embedding.new.weight.detach().cpu() for key, embedding in self._embeddings.items()}
        facts = {"tokens": self._tokens, "words": self.words}
        metadata = {"format": "pt", FLAT_METADATA_KEY: json.dumps({FACTS_KEY: facts}, sort_keys=True)}
        return with_sorted_metadata(save(tensors, metadata=metadata))

    def facts(self) -> dict[str, Any]:
        """What the adapter's file says of the embeddings that belong to it.

        Its `tokens` are in the order of the rows, `words` are those of prompts with what replaces them.
        """
        sha = hashlib.sha256(self.file()).hexdigest()
        return {"tokens": self._tokens, "words": self.words, "sha256": sha}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the tensors of `file` back, bit for bit."""
        with torch.no_grad():
            for key, embedding in self._embeddings.items():
                embedding.new.weight.copy_(tensors[key])


def read_embeddings(adapter: Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The embeddings that belong to an adapter, from the file beside it; none where it has no new tokens.

    Args:
        adapter: The adapter's file.
        facts: What it says of itself (`file.read_facts`).

    Raises:
        UserError: The embeddings are missing, damaged, or of another adapter.
    """
    if FACTS_KEY not in facts:
        return {}
    known = facts[FACTS_KEY]
    if not isinstance(known, dict) or not {"tokens", "words", "sha256"} <= known.keys():
        raise UserError(f"{adapter}: what it says of its new tokens is damaged; get a sound file")
    path = adapter.with_name(EMBEDDINGS_NAME)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); {adapter.name} was trained together with these "
            "embeddings: put them beside it"
        ) from error
    if hashlib.sha256(content).hexdigest() != known["sha256"]:
        raise UserError(
            f"{path}: damaged, or of another training than {adapter.name}; put the embeddings beside it that "
            "were written with it"
        )
    return load(content)


def load_embeddings(
    pipeline: StableDiffusionXLPipeline, name: str, facts: Mapping[str, Any], embeddings: Mapping[str, Tensor]
) -> None:
    """Give a pipeline the new tokens of an adapter, and remember what replaces its words.

    The tokens get names that no other adapter's have and that no prompt contains: without this adapter a
    prompt means what it did before.

    Args:
        pipeline: Its tokenizers and embedding tables grow.
        name: Under which the adapter is loaded.
        facts: What the adapter's file says of itself.
        embeddings: From `read_embeddings`.

    Raises:
        ValueError: The embeddings don't fit the text encoders.
    """
    words: dict[str, str] = {}
    if embeddings:
        tokens = facts[FACTS_KEY]["tokens"]
        first = len(pipeline.tokenizer)
        renamed = {token: f"<|learned-{first + index}|>" for index, token in enumerate(tokens)}
        words = {word: replace_words(own, renamed) for word, own in facts[FACTS_KEY]["words"].items()}
        words |= renamed
        parts = (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        )
        devices = [pipeline.device] if pipeline.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the rows start random, before they are filled
            for key, (tokenizer, text_encoder) in zip(_FILE_KEYS, parts, strict=True):
                # Without this the rows would be drawn like those of the table: slow, and in vain.
                text_encoder.resize_token_embeddings(len(tokenizer) + len(tokens), mean_resizing=False)
                pipeline.load_textual_inversion(
                    embeddings[key],  # pyright: ignore[reportArgumentType]  # a tensor of several rows is taken
                    list(renamed.values()),
                    tokenizer=tokenizer,
                    text_encoder=text_encoder,
                )
    remember_words(pipeline, name, words)


def remember_words(pipeline: StableDiffusionXLPipeline, name: str, words: dict[str, str]) -> None:
    """Note what replaces words of prompts while an adapter is active: see `loaded_words`."""
    vars(pipeline).setdefault(_WORDS, {})[name] = words


def loaded_words(pipeline: StableDiffusionXLPipeline, adapter: str | None) -> dict[str, str]:
    """What replaces words of prompts while this adapter is active: nothing without new tokens."""
    return vars(pipeline).get(_WORDS, {}).get(adapter, {})


_WORDS = "learned_words"  # attribute of a pipeline: adapter -> word -> tokens
