"""From checkpoints to a folder that the stock pipeline class's `from_pretrained` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def export(pipe: Any, out: Path) -> None:
    """Write a pipeline to `out` as safetensors (large parts in float16, no variant suffix)."""
    # Only the large parts: transformers loads text encoders as they are stored, diffusers its own
    # as float32, and a plain `from_pretrained` must end in one dtype.
    for name in ("transformer", "unet", "vae"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).to(torch.float16)
    pipe.save_pretrained(out, safe_serialization=True)
    # Tokenizer classes by the name that older transformers know, too.
    index = out / "model_index.json"
    parts = json.loads(index.read_text())
    for value in parts.values():
        if isinstance(value, list) and value[1] == "TokenizersBackend":
            value[1] = "PreTrainedTokenizerFast"
    index.write_text(json.dumps(parts, indent=2) + "\n")
    config = out / "vae" / "config.json"
    values = json.loads(config.read_text())
    if values["_class_name"] == "AutoencoderTiny":
        # It writes this key and warns of it when it reads it back.
        values.pop("block_out_channels", None)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
