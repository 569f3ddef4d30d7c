"""Wan's text keys: processors that know pictures take the last 512 of [picture, text] for text."""

from __future__ import annotations

import pytest
import torch
from tiny_oracle import attention
from tiny_wide import make, rand, time

from attn_control import attach
from attn_control.families import family_of

_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 1,
    "image_dim": 8,
    "added_kv_proj_dim": 24,
    "rope_max_seq_len": 32,
}
CLASSES = ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel")


def _call(picture, text):
    return {
        "hidden_states": rand(1, 4, 3, 4, 4),
        "encoder_hidden_states": rand(1, text, 16, seed=1),
        "encoder_hidden_states_image": rand(1, picture, 8, seed=2),
        "timestep": time()[:1],
    }


@torch.no_grad()
def _keys(model, call):
    """Keys of both softmaxes of the first cross-attention: over the picture, over the text."""
    with attention(model) as seen:
        model(**call)
    return [softmax.k for softmax in seen["blocks.0.attn2"]]


def _moved(before, after):
    return (before - after).abs().amax((0, 1, 3)).nonzero().flatten().tolist()


def _layout(model, call):
    with attach(model) as session:
        site = next(site for site in session.sites if site.slot == "cross")
    return [(s.role, s.start, s.stop) for s in family_of(model).layout(site, call, model).k]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "picture, text, expected",
    [
        (3, 512, [("text", 0, 512)]),  # as pipelines call it
        (250, 10, [("reference", 0, 242), ("text", 242, 252)]),  # 8 of 250 are left to the picture
        (3, 6, [("reference", 0, 3), ("text", 3, 9)]),  # nothing is
        (3, 520, [("text", 0, 512)]),  # the first 8 words went to the picture
    ],
)
def test_the_keys_of_the_text(cls, picture, text, expected):
    model, call = make(cls, **_CONFIG)(), _call(picture, text)
    assert _layout(model, call) == expected
    *_, plain = _keys(model, call)
    assert plain.shape[2] == expected[-1][2]
    poked = dict(call)
    role, start, stop = expected[-1]
    for word in (0, text - 1):
        poked["encoder_hidden_states"] = call["encoder_hidden_states"].clone()
        poked["encoder_hidden_states"][:, word] += 1.0
        where = stop - text + word
        assert _moved(plain, _keys(model, poked)[-1]) == ([where] if where >= start else [])
    poked = dict(call)
    poked["encoder_hidden_states_image"] = call["encoder_hidden_states_image"].clone()
    poked["encoder_hidden_states_image"][:, -1] += 1.0
    in_text = expected[0][0] == "reference"
    assert _moved(plain, _keys(model, poked)[-1]) == ([start - 1] if in_text else [])


def test_first_and_last_frame_are_two_rows_of_one_picture():
    model = make("WanTransformer3DModel", **_CONFIG, pos_embed_seq_len=6)()
    call = _call(3, 510) | {"encoder_hidden_states_image": rand(2, 3, 8, seed=2)}
    assert _layout(model, call) == [("reference", 0, 2), ("text", 2, 512)]
    picture, words = _keys(model, call)
    assert picture.shape[2] == 4 and words.shape[2] == 512


def test_a_model_without_pictures_reads_every_word():
    config = {
        name: v for name, v in _CONFIG.items() if name not in ("image_dim", "added_kv_proj_dim")
    }
    model, call = make("WanTransformer3DModel", **config)(), _call(3, 6)
    del call["encoder_hidden_states_image"]
    assert _layout(model, call) == [("text", 0, 6)]
