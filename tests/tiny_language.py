"""Tiny diffusion language models and their pipelines, at random.

DiffusionGemma is transformers' own class. LLaDA 2 is not in transformers: its class comes with the
checkpoint. The one here is written for these tests, and has of it what matters to attention: where
its modules are, what its pipeline calls it with, and how they ask transformers' interface for the
softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline, LLaDA2Pipeline
from torch import Tensor, nn
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

WORDS, MASK, END = 40, 39, 38


class LLaDA2Config(PreTrainedConfig):
    """sees: "all", "causal" or "blocks" (of 8: one's own and those before)."""

    model_type = "tiny_llada2"

    def __init__(self, sees: str = "all", **kwargs: Any) -> None:
        self.sees = sees
        self.hidden_size, self.num_hidden_layers = 32, 2
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = 4, 2, 8
        super().__init__(**kwargs)


def eager_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class LLaDA2MoeAttention(nn.Module):
    def __init__(self, config: LLaDA2Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.head_dim = config.head_dim
        self.heads, kv = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.heads // kv
        self.sizes = [self.heads, kv, kv]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes) * self.head_dim)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        made = self.query_key_value(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        scale = self.head_dim**-0.5
        out, _ = attend(self, *made.split(self.sizes, 1), mask, scaling=scale, dropout=0.0)
        return self.dense(out.flatten(2))


class LLaDA2MoeLayer(nn.Module):
    def __init__(self, config: LLaDA2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x + self.mlp(x)


class LLaDA2MoeModel(nn.Module):
    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(WORDS, config.hidden_size)
        self.places = nn.Embedding(256, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeLayer(config, n) for n in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.word_embeddings(input_ids) + self.places(position_ids)
        mask = self._mask(attention_mask.bool(), x)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def _mask(self, valid: Tensor, x: Tensor) -> Tensor | None:
        if self.config.sees == "all" and valid.all():
            return None
        at = torch.arange(valid.shape[1]) // (8 if self.config.sees == "blocks" else 1)
        on = valid[:, None, None].expand(-1, 1, len(at), -1)
        if self.config.sees != "all":
            on = on & (at[:, None] >= at)
        if self.config._attn_implementation == "eager":
            return torch.zeros_like(on, dtype=x.dtype).masked_fill(~on, torch.finfo(x.dtype).min)
        return on


class LLaDA2MoeModelLM(PreTrainedModel):
    config_class = LLaDA2Config
    _supports_sdpa = True

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, WORDS, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> CausalLMOutput:
        hidden = self.model(input_ids, attention_mask, position_ids)
        return CausalLMOutput(logits=self.lm_head(hidden))


class Processor:
    """Words are letters; every prompt begins with the same token."""

    eos_token_id, mask_token_id = END, MASK

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, Tensor]:
        several = messages if isinstance(messages[0], list) else [messages]
        texts = [chat[0]["content"] for chat in several]
        longest = max(map(len, texts))
        ids, valid = [], []
        for text in texts:
            pad = longest - len(text)
            ids.append([0] * pad + [1 + ord(letter) % 36 for letter in text])
            valid.append([0] * pad + [1] * len(text))
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(valid)}

    def __call__(self, prompt: str, **_: Any) -> dict[str, Tensor]:
        return self.apply_chat_template([{"content": prompt}])

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return ["".join(chr(96 + int(word)) for word in row) for row in rows]


def llada2(sees: str = "all", attention: str = "sdpa") -> LLaDA2Pipeline:
    """A text of 40 words: a prompt of 20, blocks of 8."""
    torch.manual_seed(0)
    model = LLaDA2MoeModelLM._from_config(LLaDA2Config(sees), attn_implementation=attention)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.35)
    scheduler = BlockRefinementScheduler(block_length=8)
    pipe = LLaDA2Pipeline(model.eval().double(), scheduler, Processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gemma(attention: str = "sdpa", window: int = 14) -> DiffusionGemmaPipeline:
    """Two layers with a sliding window, one without; a canvas of 16 words."""
    torch.manual_seed(0)
    text = DiffusionGemmaTextConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8,
        num_global_key_value_heads=1, sliding_window=window, num_experts=2, top_k_experts=1,
        moe_intermediate_size=16, max_position_embeddings=256,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=16)
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # the default has no float64
    model = DiffusionGemmaForBlockDiffusion(config).eval().double()
    for name, parameter in model.model.decoder.named_parameters():
        if "norm" not in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    pipe = DiffusionGemmaPipeline(model, BlockRefinementScheduler(block_length=16), Processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT = "the quick brown fox."


def run_llada2(pipe: LLaDA2Pipeline, steps: int = 6, seed: int = 0, **more: Any) -> Tensor:
    """Tokens (rows, 20)."""
    ids = Processor().apply_chat_template([{"content": PROMPT}])["input_ids"]
    given = {"input_ids": ids, "gen_length": 20, "block_length": 8, "threshold": 0.999} | more
    return pipe(
        num_inference_steps=steps,
        editing_threshold=None,
        eos_early_stop=False,
        output_type="seq",
        sampling_method="greedy",
        generator=torch.Generator().manual_seed(seed),
        **given,
    ).sequences


def run_gemma(pipe: DiffusionGemmaPipeline, steps: int = 6, seed: int = 0, **more: Any) -> Tensor:
    """Tokens (rows, 32)."""
    given = {"prompt": PROMPT, "gen_length": 32, "confidence_threshold": None} | more
    return pipe(
        num_inference_steps=steps,
        eos_early_stop=False,
        output_type="seq",
        generator=torch.Generator().manual_seed(seed),
        **given,
    ).sequences
