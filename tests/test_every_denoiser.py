"""Every denoiser that diffusers exports has a row, is attach-only, or is refused with a reason."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import tiny
from diffusers.models import transformers, unets
from tiny_attach_only import SEVERAL
from tiny_more import MORE
from tiny_pictures import PICTURES
from tiny_videos import VIDEOS

from attn_control import attach
from attn_control.errors import AttnControlError
from attn_control.families import FAMILIES, REFUSED

ROWS = {family.denoiser: family for family in FAMILIES}


def exported() -> list[str]:
    """Classes of diffusers' transformers and UNets; ModelMixin itself is imported there too."""
    models = {
        name: value
        for folder in (transformers, unets)
        for name, value in vars(folder).items()
        if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin)
    }
    return sorted(models)


def kind(name: str) -> str:
    if name in ROWS:
        return "row" if ROWS[name].layout is not None else "attach-only"
    return f"refused: {REFUSED[name]}" if name in REFUSED else "not listed"


def test_the_list_is_what_diffusers_exports():
    assert len(exported()) >= 80
    assert {"FluxTransformer2DModel", "UNet2DConditionModel"} <= set(exported())


@pytest.mark.parametrize("name", exported())
def test_every_denoiser_is_decided(name):
    assert kind(name) != "not listed", f"{name}: write its row, or put it in REFUSED with a reason"


def test_no_denoiser_is_decided_twice_and_none_is_made_up():
    assert len(ROWS) == len(FAMILIES)
    assert not set(ROWS) & set(REFUSED)
    for name in (*ROWS, *REFUSED):
        assert hasattr(diffusers, name), name
    assert all(REFUSED.values())


def test_at_least_36_rows_are_proved():
    assert sum(kind(name) == "row" for name in exported()) >= 36


def test_the_layout_of_every_row_is_proved_by_poking_tokens():
    """The tables of tiny models that test_wider_families, test_more_families and test_layouts poke;
    Z-Image, AnimateDiff and those of several softmaxes have tests of their own.
    """
    made = [one.make() for one in (*PICTURES.values(), *VIDEOS.values())]
    made += [make() for make in (*MORE.values(), tiny.sd3, tiny.flux, tiny.wan, tiny.unet)]
    poked = {type(model).__name__ for model in made}
    alone = {"ZImageTransformer2DModel", "UNetMotionModel"}
    alone |= {type(one.make()).__name__ for one in SEVERAL.values()}  # test_several_softmaxes.py
    assert poked | alone == {name for name in exported() if kind(name) == "row"}
    assert not poked & alone


def test_a_refused_model_says_why():
    model = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8,
        num_embeddings=3,
    )  # fmt: skip
    with pytest.raises(AttnControlError, match="PriorTransformer cannot be .* embeddings"):
        attach(model)
