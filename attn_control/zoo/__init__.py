"""The zoo: small trained pipelines that ship inside the package, their prompts and exact scorers.

>>> from attn_control import zoo
>>> zoo.NAMES
('shapes-sd3',)
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

    from attn_control.zoo.scorer import Score

NAMES: tuple[str, ...] = ("shapes-sd3",)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "shapes-sd3": {
        "num_inference_steps": 25,
        "guidance_scale": 5.0,
        "height": 128,
        "width": 128,
        "max_sequence_length": 1,  # one silent T5 token, rather than 256
    }
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


def score(name: str, image: Any, caption: str) -> Score:
    """Hold a picture (PIL or uint8 (H, W, 3)) of a built-in model against a caption, exactly.

    Raises AttnControlError for a caption outside the model's grammar.
    """
    _check(name)
    from attn_control.zoo.scorer import score as score_shapes

    return score_shapes(image, caption)


def draw_truth(name: str, caption: str, seed: int) -> np.ndarray:
    """A true drawing of a caption, uint8 (128, 128, 3): what a perfect model might answer."""
    _check(name)
    import numpy as np

    from attn_control.zoo.scenes import draw, parse_caption, place

    return draw(place(parse_caption(caption), np.random.default_rng(seed)))


def load_prompts(name: str) -> list[dict[str, Any]]:
    """The fixed prompts of a built-in model: dicts of prompt, objects, split, seed."""
    _check(name)
    from attn_control.zoo.prompts import load_prompts as load_fixed

    return load_fixed(name)


def is_scorable(name: str, caption: str) -> bool:
    """Whether the model's scorer can judge a caption; False also for names outside the zoo."""
    if name not in NAMES:
        return False
    from attn_control.zoo.scenes import parse_caption

    try:
        parse_caption(caption)
    except AttnControlError:
        return False
    return True


def _check(name: str) -> None:
    if name not in NAMES:
        raise AttnControlError(f"no built-in model {name!r}; there are: {', '.join(NAMES)}")
