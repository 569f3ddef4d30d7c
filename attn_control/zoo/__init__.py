"""The zoo: small trained pipelines that ship inside the package, their prompts and exact scorers.

>>> from attn_control import zoo
>>> zoo.NAMES
('shapes-sd3', 'shapes-sd15', 'shapes-flux', 'shapes-wan')
>>> zoo.is_scorable("shapes-sd3", "a red circle left of a blue square")
True
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_control.errors import AttnControlError

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline

    from attn_control.zoo.scenes import CaptionSpec
    from attn_control.zoo.scorer import Score
    from attn_control.zoo.texture_scorer import TexturedScore
    from attn_control.zoo.textures import TexturedSpec
    from attn_control.zoo.video_scorer import VideoScore
    from attn_control.zoo.videos import VideoSpec

_SIDE = {"height": 128, "width": 128}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "shapes-sd3": {
        "num_inference_steps": 25,
        "guidance_scale": 5.0,
        **_SIDE,
        "max_sequence_length": 1,  # one silent T5 token, rather than 256
    },
    "shapes-sd15": {"num_inference_steps": 25, "guidance_scale": 5.0, **_SIDE},
    "shapes-flux": {
        "num_inference_steps": 25,
        "true_cfg_scale": 4.0,  # the model has no distilled guidance for `guidance_scale` to set
        "negative_prompt": "",
        **_SIDE,
        "max_sequence_length": 24,
    },
    "shapes-wan": {
        "num_inference_steps": 25,
        "guidance_scale": 2.5,
        **_SIDE,
        "num_frames": 17,
        "max_sequence_length": 24,
    },
}
NAMES = tuple(_DEFAULTS)
_VERDICTS = {
    "shapes-flux": ("right", "present", "bound", "relation", "background", "texture"),
    "shapes-wan": ("right", "frames", "direction", "crossing", "background"),
}


def path(name: str) -> Path:
    """The folder of a built-in model, as `from_pretrained` takes it.

    The environment variable ATTN_CONTROL_ZOO_DIR names another folder of models to look in.
    Raises AttnControlError for an unknown name, or where the weights are missing.
    """
    _check(name)
    root = os.environ.get("ATTN_CONTROL_ZOO_DIR")
    folder = (Path(root) if root else Path(__file__).parent / "models") / name
    if not (folder / "model_index.json").is_file():
        raise AttnControlError(
            f"the weights of {name!r} are not in {folder}: reinstall attn-control, point "
            f"ATTN_CONTROL_ZOO_DIR to a folder that holds {name}/, or train them with "
            f"`python -m attn_control.zoo.train {name} --out {folder}`"
        )
    return folder


def defaults(name: str) -> dict[str, Any]:
    """The keyword arguments to call a built-in pipeline with (a fresh dict)."""
    _check(name)
    return dict(_DEFAULTS[name])


def load(name: str, *, device: Any = "cpu", dtype: Any = None) -> DiffusionPipeline:
    """A built-in model as a stock diffusers pipeline, without any network access.

    dtype: a torch dtype; None is float32. The pipeline's progress bar is off.
    """
    folder = path(name)
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype or torch.float32)


def score(
    name: str, image: Any, caption: str, reference: Any = None
) -> Score | TexturedScore | VideoScore:
    """Hold what a built-in model made against a caption, exactly.

    image: a picture (PIL or uint8 (H, W, 3)), for shapes-wan a video (a list of them, or uint8
    (frames, H, W, 3)). reference: for captions of shapes-flux that point to one, the picture or its
    texture's name. Raises AttnControlError for a caption outside the model's grammar.
    """
    _check(name)
    if name == "shapes-flux":
        from attn_control.zoo.texture_scorer import score_textured

        return score_textured(image, caption, reference)
    if reference is not None:
        raise AttnControlError(f"{name} knows no references, got reference={reference!r:.80}")
    if name == "shapes-wan":
        from attn_control.zoo.video_scorer import score_video

        return score_video(image, caption)
    from attn_control.zoo.scorer import score as score_shapes

    return score_shapes(image, caption)


def draw_truth(name: str, caption: str, seed: int, reference: str | None = None) -> np.ndarray:
    """A true drawing of a caption: what a perfect model might answer.

    uint8 (128, 128, 3), for shapes-wan (17, 128, 128, 3). reference: the texture to draw where a
    caption of shapes-flux points to one.
    """
    import numpy as np

    spec: Any = _parse(name, caption)
    rng = np.random.default_rng(seed)
    if name == "shapes-wan":
        from attn_control.zoo.videos import draw_video, place_video

        return draw_video(place_video(spec, rng))
    from attn_control.zoo.scenes import draw, place

    if name == "shapes-flux":
        from attn_control.zoo.textures import place_textured

        return draw(place_textured(spec, rng, reference))
    return draw(place(spec, rng))


def load_prompts(name: str) -> list[dict[str, Any]]:
    """The fixed prompts of a model: dicts of prompt, objects, split, seed (flux: reference)."""
    _check(name)
    from attn_control.zoo.prompts import load_prompts as load_fixed

    return load_fixed(name)


def verdicts(name: str) -> tuple[str, ...]:
    """The parts of a model's score: true or false each, `frames` a share; `right` comes first."""
    _check(name)
    return _VERDICTS.get(name, ("right", "present", "bound", "relation", "background"))


def is_scorable(name: str, caption: str) -> bool:
    """Whether the model's scorer can judge a caption; False also for names outside the zoo.

    A caption of shapes-flux that points to a reference needs that as well.
    """
    if name not in _DEFAULTS:
        return False
    try:
        _parse(name, caption)
    except AttnControlError:
        return False
    return True


def _parse(name: str, caption: str) -> CaptionSpec | TexturedSpec | VideoSpec:
    _check(name)
    if name == "shapes-flux":
        from attn_control.zoo.textures import parse_textured

        return parse_textured(caption)
    if name == "shapes-wan":
        from attn_control.zoo.videos import parse_video

        return parse_video(caption)
    from attn_control.zoo.scenes import parse_caption

    return parse_caption(caption)


def _check(name: str) -> None:
    if name not in _DEFAULTS:
        raise AttnControlError(f"no built-in model {name!r}; there are: {', '.join(_DEFAULTS)}")
