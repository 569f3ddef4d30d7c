"""Every row's blocks are skipped as if they were not there."""

from __future__ import annotations

import contextlib
import inspect
import re

import diffusers
import pytest
import tiny
import torch
from guides_shared import combine
from tiny_attach_only import ATTACH_ONLY, SEVERAL
from tiny_more import MORE, more_inputs
from tiny_oracle import close
from tiny_pictures import PICTURES
from tiny_videos import VIDEOS
from tiny_wide import make, rand

from attn_control import AttnControlError, attach
from attn_control.call import sample_of
from attn_control.families import FAMILIES, family_of
from attn_control.processors import SkipLayers


def _z_image():
    model = make(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 4, 8], axes_lens=[256, 32, 32],
    )()  # fmt: skip
    return model, {
        "x": list(rand(2, 4, 1, 8, 8).unbind(0)),
        "t": torch.full((2,), 0.5),
        "cap_feats": [rand(5, 32, seed=1), rand(7, 32, seed=2)],
    }


def _animatediff():
    torch.manual_seed(0)
    model = diffusers.UNetMotionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=32,
        motion_num_attention_heads=2, motion_max_seq_length=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2,
    )  # fmt: skip
    return tiny._spread(model), {
        "sample": rand(2, 4, 3, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": rand(2, 5, 32, seed=1).repeat_interleave(3, 0),
    }


TABLES = {**PICTURES, **VIDEOS, **ATTACH_ONLY, **SEVERAL}
MODELS = {
    "z_image": _z_image,
    "animatediff": _animatediff,
    **{name: lambda n=name: (tiny.MODELS[n](), tiny.family_inputs(n)) for name in tiny.MODELS},
    **{name: lambda n=name: (MORE[n](), more_inputs(n)) for name in MORE},
    **{name: lambda n=name: (TABLES[n].make(), TABLES[n].call()) for name in TABLES},
}
# Models that find more than the next block by a block's number: its own layer of the text, its
# modulation, the other stack's block, a skip connection, hints. There the block is replaced by one
# that hands on what the table says, read off diffusers.
NUMBERED = {
    "chroma": {
        "transformer_blocks.#": ("encoder_hidden_states", "hidden_states"),
        "single_transformer_blocks.#": ("hidden_states",),
    },
    "hidream": {
        "double_stream_blocks.#.block": ("hidden_states", "encoder_hidden_states"),
        "single_stream_blocks.#.block": ("hidden_states",),
    },
    "hunyuandit": {"blocks.#": ("hidden_states",)},
    "latte": {
        "transformer_blocks.#": ("hidden_states",),
        "temporal_transformer_blocks.#": ("hidden_states",),
    },
    "vace": {"blocks.#": ("hidden_states",)},
}


def _run(model, call):
    with torch.no_grad():
        return sample_of(model(**call, return_dict=False))


def _blocks(model):
    """The second block of each kind, or the only one: its layer and path."""
    with attach(model) as session:
        sites = session.sites
    found = {}
    for site in sites:
        path = site.name.rpartition(".")[0]
        kind = re.sub(r"\.\d+(?=\.|$)", ".#", path)
        found.setdefault(kind, {})[site.layer] = path
    paths = {kind: list(some.items()) for kind, some in found.items()}
    return {kind: some[min(1, len(some) - 1)] for kind, some in paths.items()}


@contextlib.contextmanager
def _handed_on(block, returns):
    names = list(inspect.signature(type(block).forward).parameters)[1:]

    def forward(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        handed = tuple(given[name] for name in returns)
        return handed if len(handed) > 1 else handed[0]

    block.forward = forward
    yield
    del block.forward


def _without(name, kind, path, call):
    """The prediction of a model that lacks the block."""
    model = MODELS[name]()[0]
    if name in NUMBERED:
        with _handed_on(model.get_submodule(path), NUMBERED[name][kind]):
            return _run(model, call)
    stack, _, number = path.rpartition(".")
    del model.get_submodule(stack)[int(number)]
    return _run(model, call)


@pytest.mark.parametrize("name", MODELS)
def test_a_skipped_block_is_as_if_it_were_not_there(name):
    model, call = MODELS[name]()
    plain = _run(model, call)
    family = family_of(model)
    for kind, (layer, path) in _blocks(model).items():
        if not family.returned_by(path):
            with pytest.raises(AttnControlError, match="cannot be skipped: it hands on what it"):
                attach(model, SkipLayers(f"L{layer}"))
            continue
        perturbed = _without(name, kind, path, call)
        assert (perturbed - plain).abs().max() > 1e-4
        for u in (1.0, 0.5):
            with attach(model, SkipLayers(f"L{layer}", u=u, scale=1.5)) as session:
                got = _run(model, call)
            assert session.report().controls[0].fired
            if u == 1:
                close(got, combine(plain, perturbed, 1.5))
            else:
                assert not torch.equal(got, plain)
        assert torch.equal(_run(model, call), plain)


def test_every_row_is_among_them_and_only_vace_has_blocks_that_cannot_be_skipped():
    rows = {family.denoiser for family in FAMILIES}
    seen = {type(build()[0]).__name__ for build in MODELS.values()}
    assert rows == seen
    cannot = {
        family.denoiser
        for family in FAMILIES
        if not all(family.returned_by(path.replace("#", "0")) for path in family.blocks)
    }
    assert cannot == {"WanVACETransformer3DModel"}


ENDS = {  # a norm stands between the branch and the sum
    "lumina2": ("L1", "layers.1", ("attn",), ("feed_forward",)),
    "z_image": ("L1", "layers.1", ("attention",), ("feed_forward",)),
    "mochi": ("L0", "transformer_blocks.0", ("attn1",), ("ff", "ff_context")),
    "qwen": ("L0", "transformer_blocks.0", ("attn",), ("img_mlp", "txt_mlp")),
    "prx": ("L1", "blocks.1", ("attention",), ("down_proj",)),
}


def _silent(module, args, output):
    return tuple(map(torch.zeros_like, output)) if isinstance(output, tuple) else output * 0


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("what", ["attention", "feed_forward"])
def test_without_its_other_branch_a_block_and_its_branch_are_skipped_alike(name, what):
    """``h + (1 - u) f(h)`` is ``(1 - u) block(h) + u h`` where f is all that the block adds."""
    model, call = MODELS[name]()
    layer, path, attention, feed_forward = ENDS[name]
    others = feed_forward if what == "attention" else attention
    for other in others:
        model.get_submodule(f"{path}.{other}").register_forward_hook(_silent)
    found = []
    for skipped in (what, "block"):
        with attach(model, SkipLayers(layer, u=0.4, scale=1.5, what=skipped)):
            found.append(_run(model, call))
    close(*found)
    assert (found[0] - _run(model, call)).abs().max() > 1e-3
