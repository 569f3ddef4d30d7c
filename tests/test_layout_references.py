"""Where pictures given beside the text stand in attention, found by poking one token at a time.

References come packed behind the image and are told apart by their position ids or shapes, as
embedded pictures beside the text, or as the first frame. Wan's keys are in test_wan_keys.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import tiny_more
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from test_wider_families import _moved, _run
from tiny_more import MORE, more_inputs
from tiny_oracle import attention
from tiny_pictures import PICTURES
from tiny_videos import VIDEOS
from tiny_wide import rand

from attn_control import attach, layouts
from attn_control.families import FAMILIES, family_of
from attn_control.processors import HeadGate

Call = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A call with references, and how to poke one token of them.

    Attributes:
        make: the model and its call.
        tokens: of all references.
        poke: (call, token of the references) -> call.
        label: of the site; side: "q", or "k" where only keys have them.
    """

    make: Callable[[], tuple[Any, Call]]
    tokens: int
    poke: Callable[[Call, int], Call]
    label: str = "L0.joint"
    side: str = "q"


def _add(call: Call, name: str, *index: Any) -> Call:
    changed = call[name].clone()
    changed[index] += 1.0
    return call | {name: changed}


def _packed(make: Callable[[], Any], call: Callable[[], Call]) -> Case:
    """Six tokens more, whose ids differ in the first column, behind an image of 16."""

    def build() -> tuple[Any, Call]:
        given = dict(call())
        name = "img_ids" if "img_ids" in given else "position_ids"
        ids = given[name]
        more = torch.zeros(*ids.shape[:-2], 6, ids.shape[-1])
        more[..., 0] = ids[..., -1:, 0] + 1
        more[..., 1:3] = torch.tensor([[y, x] for y in range(2) for x in range(3)])
        given[name] = torch.cat([ids, more], dim=-2)
        given["hidden_states"] = torch.cat([given["hidden_states"], rand(2, 6, 16, seed=9)], dim=1)
        return make(), given

    return Case(build, 6, lambda c, token: _add(c, "hidden_states", slice(None), 16 + token))


def _shapes() -> tuple[Any, Call]:
    call = more_inputs("qwen")
    call["img_shapes"] = [[(1, 4, 4), (1, 2, 3), (1, 1, 2)]] * 2
    call["hidden_states"] = torch.cat([call["hidden_states"], rand(2, 8, 16, seed=9)], dim=1)
    return MORE["qwen"](), call


def _layers() -> tuple[Any, Call]:
    """Three layers to be made, and last the picture that they make up."""
    model = tiny_more._make(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8), use_layer3d_rope=True, use_additional_t_cond=True,
    )  # fmt: skip
    call = more_inputs("qwen") | {
        "img_shapes": [[(1, 2, 3)] * 3 + [(1, 2, 2)]] * 2,
        "hidden_states": rand(2, 22, 16, seed=9),
        "additional_t_cond": torch.zeros(2, dtype=torch.long),
    }
    return model, call


def _shown(model: Any, call: Call) -> tuple[Any, Call]:
    """Four tokens of a frame that is shown, behind the video's 12."""
    tokens, width = call["hidden_states"].shape[1:]
    more = {"hidden_states": torch.cat([call["hidden_states"], rand(2, 4, width, seed=9)], dim=1)}
    ends = (2,) if "audio_hidden_states" in call else ()  # LTX-2 says where a token begins and ends
    return model, call | more | {"video_coords": rand(2, 3, tokens + 4, *ends, seed=8).abs()}


def _wide(table: dict[str, Any], name: str) -> Callable[[], tuple[Any, Call]]:
    return lambda: (table[name].make_quiet(), table[name].call())


def _embedded(name: str) -> Callable[[Call, int], Call]:
    return lambda call, token: _add(call, name, slice(None), token)


def _first_frame(call: Call, token: int) -> Call:
    y, x = divmod(token, 2)
    return _add(call, "hidden_states", slice(None), slice(None), 0, 2 * y + 1, 2 * x)


PACKED = {
    "FluxTransformer2DModel": (tiny.flux, lambda: tiny.inputs("flux")),
    "BriaTransformer2DModel": (PICTURES["bria"].make, PICTURES["bria"].call),
    "Krea2Transformer2DModel": (PICTURES["krea2"].make, PICTURES["krea2"].call),
} | {
    cls: (MORE[name], lambda name=name: more_inputs(name))
    for name, cls in {
        "flux2": "Flux2Transformer2DModel",
        "chroma": "ChromaTransformer2DModel",
        "ovis": "OvisImageTransformer2DModel",
        "longcat": "LongCatImageTransformer2DModel",
    }.items()
}


def _flux3() -> tuple[Any, Call]:
    call = PICTURES["flux3"].call()
    call |= {"image_cond_hidden_states": rand(2, 6, 16, seed=5), "image_cond_ids": rand(6, 4)}
    return PICTURES["flux3"].make_quiet(), call


CASES = {cls: _packed(*built) for cls, built in PACKED.items()} | {
    "Flux3Transformer2DModel": Case(
        _flux3, 6, _embedded("image_cond_hidden_states"), label="L2.joint"
    ),
    "QwenImageTransformer2DModel": Case(
        _shapes, 8, lambda c, token: _add(c, "hidden_states", slice(None), 16 + token)
    ),
    "QwenImageTransformer2DModel in layers": Case(
        _layers, 4, lambda c, token: _add(c, "hidden_states", slice(None), 18 + token)
    ),
    "LTXVideoTransformer3DModel": Case(
        lambda: _shown(MORE["ltx"](), more_inputs("ltx")), 4,
        lambda c, token: _add(c, "hidden_states", slice(None), 12 + token), label="L0.self",
    ),
    "LTX2VideoTransformer3DModel": Case(
        lambda: _shown(VIDEOS["ltx2"].make(), VIDEOS["ltx2"].call()), 4,
        lambda c, token: _add(c, "hidden_states", slice(None), 12 + token), label="L0.self",
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        _wide(VIDEOS, "hunyuanvideo15"), 4, _embedded("image_embeds")
    ),
    "MotifVideoTransformer3DModel": Case(_wide(VIDEOS, "motif"), 4, _embedded("image_embeds")),
    "AnyFlowTransformer3DModel": Case(
        _wide(VIDEOS, "anyflow"), 4, _embedded("encoder_hidden_states_image"),
        label="L0.cross", side="k",
    ),
    "WanAnimateTransformer3DModel": Case(
        _wide(VIDEOS, "wan_animate"), 4, _first_frame, label="L0.self"
    ),
}  # fmt: skip


@pytest.mark.parametrize("cls", CASES)
def test_a_token_of_a_reference_moves_its_own_index(cls):
    case = CASES[cls]
    model, call = case.make()
    assert type(model).__name__ == cls.split()[0]
    with attach(model) as session:
        site = next(site for site in session.sites if site.label == case.label)
    layout = family_of(model).layout(site, call, model)
    segments = [s for s in getattr(layout, case.side) if s.role == "reference"]
    indices = [index for s in segments for index in range(s.start, s.stop)]
    assert len(indices) == case.tokens

    def look(call):
        with attention(model) as seen:
            _run(model, call)
        return getattr(seen[site.name][-1], case.side)

    plain = look(call)
    assert plain.shape[2] == (layout.q_len if case.side == "q" else layout.k_len)
    for token in (0, 1, case.tokens - 1):
        assert _moved(plain, look(case.poke(call, token))) == [indices[token]]


@pytest.mark.parametrize("mode", ["extract", "cached"])
def test_references_whose_keys_are_kept_are_keys_alone(mode):
    """As FLUX.2 klein's KV pipeline runs: the step that fills the cache is given the references in
    front of the image, later steps are not given them at all.
    """
    model, call = MORE["flux2"](), more_inputs("flux2")
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    ids = torch.tensor([[10.0, y, x, 0.0] for y in range(2) for x in range(3)])
    filling = call | {
        "hidden_states": torch.cat([rand(2, 6, 16, seed=9), call["hidden_states"]], dim=1),
        "img_ids": torch.cat([ids.expand(2, -1, -1), call["img_ids"]], dim=1),
        "kv_cache_mode": "extract",
        "num_ref_tokens": 6,
    }
    with torch.no_grad():
        cache = model(**filling, return_dict=False)[1]
    call = filling if mode == "extract" else call | {"kv_cache": cache, "kv_cache_mode": "cached"}
    first = 6 if mode == "extract" else 0

    def look(call):
        with attention(model) as seen:
            _run(model, call)
        return seen[site.name][0]  # what references make of themselves is a softmax behind it

    with attach(model, HeadGate("L1", gain=0.5, tokens="image"), strict=True) as session:
        site, *_, last = session.sites
        gated = _run(model, call)
    plain = look(call)
    assert not torch.equal(gated, _run(model, call))
    for one in (site, last):
        layout = family_of(model).layout(one, call, model)
        assert [(s.role, s.length) for s in layout.q] == [("text", 5), ("image", 16)]
        assert [(s.role, s.start) for s in layout.k] == [
            ("text", 0), ("reference", 5), ("image", 11),
        ]  # fmt: skip
        assert layout.q[1].grid == (1, 4, 4)
    assert (plain.q.shape[2], plain.k.shape[2]) == (layout.q_len, layout.k_len)
    poked = look(_add(call, "hidden_states", slice(None), first + 6))
    assert _moved(plain.q, poked.q) == [5 + 6] and _moved(plain.k, poked.k) == [11 + 6]
    if mode == "extract":
        poked = look(_add(call, "hidden_states", slice(None), 4))
        assert _moved(plain.q, poked.q) == [] and _moved(plain.k, poked.k) == [5 + 4]


def test_a_reference_read_from_a_cache_stands_before_the_text():
    """As GLM-Image runs: a call for each reference fills the cache, later calls read it."""
    tiny = PICTURES["glm"]
    model, call = tiny.make(), tiny.call()
    with attach(model) as session:
        site = session.sites[0]
    caches = GlmImageKVCache(len(model.transformer_blocks))
    caches.set_mode("write")
    filling = call | {
        "hidden_states": rand(1, 4, 4, 8, seed=9),
        "encoder_hidden_states": torch.zeros(1, 0, 32),
        "timestep": torch.zeros(1),
        "prior_token_id": torch.arange(8)[None],
        "prior_token_drop": torch.zeros(1, 8, dtype=torch.bool),
        "target_size": torch.full((1, 2), 8.0),
        "crop_coords": torch.zeros(1, 2),
        "kv_caches": caches,
    }
    layout = family_of(model).layout(site, filling, model)
    assert [(s.role, s.length, s.grid) for s in layout.q] == [("reference", 8, (1, 2, 4))]
    with attention(model) as seen:
        _run(model, filling)
    assert seen[site.name][0].q.shape[2] == layout.q_len
    for mode, keys in (
        ("read", [("reference", 0), ("text", 8), ("image", 13)]),
        ("skip", [("text", 0), ("image", 5)]),
    ):
        caches.set_mode(mode)
        reading = call | {"kv_caches": caches}
        layout = family_of(model).layout(site, reading, model)
        assert [(s.role, s.start) for s in layout.q] == [("text", 0), ("image", 5)]
        assert [(s.role, s.start) for s in layout.k] == keys
        looks = []
        for given in (reading, tiny.poked(reading, 6)):
            with attention(model) as seen:
                _run(model, given)
            looks.append(seen[site.name][0])
        plain, poked = looks
        assert (plain.q.shape[2], plain.k.shape[2]) == (layout.q_len, layout.k_len)
        assert _moved(plain.q, poked.q) == [5 + 6]
        assert _moved(plain.k, poked.k) == [keys[-1][1] + 6]


# test_wan_keys.py, for its keys; test_several_softmaxes.py.
ELSEWHERE = {"wan_video_and_text", "reference_video_and_text", "stretches_then_image"}


def _may_have_references(function: Any) -> bool:
    source = inspect.getsource(function)
    called = [
        f for name, f in vars(layouts).items() if f"{name}(" in source and inspect.isfunction(f)
    ]
    return any('"reference"' in inspect.getsource(f) for f in {function, *called})


def test_every_row_whose_layout_may_hold_references_is_poked():
    rows = [f for f in FAMILIES if f.layout is not None and _may_have_references(f.layout)]
    names = {f.denoiser for f in rows if f.layout.__name__ not in ELSEWHERE}
    # HunyuanVideo packs as Motif-Video does, but its denoiser takes no embedded picture; GLM-Image
    # has the test above.
    names -= {"HunyuanVideoTransformer3DModel", "GlmImageTransformer2DModel"}
    assert names == {cls.split()[0] for cls in CASES} - {"WanAnimateTransformer3DModel"}


def test_marks_are_no_references_where_conditions_are_channels():
    """VisualCloze, on FLUX.1 Fill: rows of examples and of what is made, marked 0, 1, ..."""
    model = tiny_more._make(
        "FluxTransformer2DModel", patch_size=1, in_channels=48, out_channels=16, num_layers=1,
        num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    call = tiny.inputs("flux")
    rows = [
        [mark, y, x] for mark, width in ((0, 3), (1, 5)) for y in range(2) for x in range(width)
    ]
    call |= {"hidden_states": rand(2, 16, 48), "img_ids": torch.tensor(rows, dtype=torch.float32)}
    with attach(model) as session:
        layout = family_of(model).layout(session.sites[0], call, model)
    assert [(s.role, s.length, s.grid) for s in layout.q] == [
        ("text", 5, None), ("image", 16, None),
    ]  # fmt: skip
    with attention(model) as seen:
        _run(model, call)
    assert seen["transformer_blocks.0.attn"][0].q.shape[2] == layout.q_len


def test_all_layers_of_a_picture_are_images():
    model, call = _layers()
    with attach(model) as session:
        layout = family_of(model).layout(session.sites[0], call, model)
    assert [(s.role, s.start, s.grid) for s in layout.q] == [
        ("text", 0, None), ("image", 5, (1, 2, 3)), ("image", 11, (1, 2, 3)),
        ("image", 17, (1, 2, 3)), ("reference", 23, (1, 2, 2)),
    ]  # fmt: skip
    assert layout.span("image") == ((5, 11), (11, 17), (17, 23))
    plain = _run(model, call)
    with attach(model, HeadGate("L0", gain=0.5, tokens="image"), strict=True):
        assert not torch.equal(_run(model, call), plain)
