"""The text side: tokenizers of caption words, tiny CLIP and T5 encoders. Nothing here is random:
every process numbers the words alike, so that weights of one fit another.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from attn_control.zoo.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES

LENGTH = 16  # tokens; the longest caption takes 14 with its two marks
WIDTH = 64  # of each encoder; shapes-sd3's pipeline concatenates two

CLIPText = TypeVar("CLIPText", CLIPTextModel, CLIPTextModelWithProjection)


def words() -> list[str]:
    """Every word that a caption can hold."""
    phrases = [*COLOURS, *SHAPES, *BACKGROUNDS, *RELATIONS, "a", "and", "on", "background"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def build_tokenizer(known: list[str] | None = None, length: int = LENGTH) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's own format, where each caption word is one token of its own.

    known: the words, by default those of plain ShapeScenes; length: tokens of the longest caption.

    Spelt out rather than trained: a trained BPE breaks ties at random, so that two processes would
    number the words differently, and data written by one would not fit weights trained by another.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Single characters too, so that any other text still splits into known tokens.
    tokens = letters + [letter + "</w>" for letter in letters]
    merges = []
    # Long words first: their merges then outrank those of a short word inside them.
    for word in sorted(known or words(), key=lambda w: (-len(w), w)):
        *rest, last = word
        head = ""
        for part in [*rest, last + "</w>"]:
            if head and (head, part) not in merges:
                merges.append((head, part))
            head += part
    # A word that repeats its own beginning ("reference") is still in pieces: join those last.
    for word in sorted(known or words()):
        while len(pieces := _split(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    tokens += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """A word as byte pair encoding leaves it: the earliest merge first, at all its places."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    for a, b in merges:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == (a, b):
                pieces[i : i + 2] = [a + b]
            i += 1
    return pieces


def build_encoder(
    tokenizer: CLIPTokenizer, kind: type[CLIPText] = CLIPTextModelWithProjection
) -> CLIPText:
    """An untrained two-layer encoder of width 64, of one of CLIP's two classes."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = kind(config)
    # CLIP starts at std 0.02, which at this width lets the words drown in the first layers' output.
    for name, p in encoder.named_parameters():
        if "token_embedding" in name or "position_embedding" in name:
            torch.nn.init.normal_(p, std=0.3 if "token" in name else 0.1)
    return encoder


def tokenize(
    tokenizer: CLIPTokenizer | PreTrainedTokenizerFast, captions: list[str]
) -> torch.Tensor:
    """Token ids, int64 (captions, the tokenizer's length), exactly as the pipelines make them."""
    length = tokenizer.model_max_length
    return tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def encode(encoders: torch.nn.ModuleList, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, 16, 128) states and (batch, 128) pooled, by the pipeline's convention, without T5."""
    outs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([out.hidden_states[-2] for out in outs], -1)
    return states, torch.cat([out[0] for out in outs], -1)


def build_silent_t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 for the pipeline's third slot that answers every text with zeros.

    diffusers demands the slot on a plain `from_pretrained(folder)`, and fills it with zeros where
    the caller passes None; so both ways of loading agree. Its tokenizer reads every text as empty,
    so that the pipeline never warns of words cut off.
    """
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=256,
    )  # fmt: skip
    config = T5Config(vocab_size=3, d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_t5_tokenizer(known: list[str], length: int) -> PreTrainedTokenizerFast:
    """One token a word, `</s>` at the end, for the T5 slot of a pipeline."""
    numbers = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(known)])}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length,
    )  # fmt: skip
