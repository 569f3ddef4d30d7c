"""The model to examine: found by name, loaded, and run at a small size."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_control.doctor.finding import Skipped
from attn_control.errors import AttnControlError
from attn_control.families import denoisers

PROMPT = "a red circle on a white background"
SIZE = 256  # pixels: a multiple of every patch and autoencoder that diffusers has
FRAMES = 9  # 4 n + 1 and 8 n + 1, as video autoencoders want


@dataclass
class Subject:
    """A loaded model.

    Attributes:
        name: as it was asked for.
        kind: "zoo", "folder", "hub" or "denoiser" (a folder that holds only that).
        pipe: the pipeline; None for a bare denoiser.
        models: its denoisers by component.
        device, dtype: where and in what it runs.
    """

    name: str
    kind: str
    pipe: Any
    models: dict[str, nn.Module]
    device: str
    dtype: str


def load(name: str, device: str = "auto") -> Subject:
    """A built-in model, a folder (of a pipeline or of a denoiser alone) or a hub id, loaded.

    Raises:
        AttnControlError: it cannot be found or loaded, or has no denoiser that can be attached to.
    """
    from attn_control.render.jobfile import model_from
    from attn_control.render.models import choose_device, choose_model, load_model

    folder = _denoiser_folder(Path(name).expanduser())
    spec = model_from({"name": name, "device": device})
    if folder is not None:
        place = choose_device(spec.device)
        dtype = "bfloat16" if place.startswith("cuda") else "float32"
        model = _load_denoiser(folder, getattr(torch, dtype)).to(place).eval()
        return Subject(name, "denoiser", None, denoisers(model), place, dtype)
    choice = choose_model(spec)
    pipe = load_model(choice)
    return Subject(name, choice.kind, pipe, denoisers(pipe), choice.device, choice.dtype)


def _denoiser_folder(folder: Path) -> Path | None:
    """Where a denoiser lies alone: the folder itself, or its transformer/ or unet/."""
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return None
    places = [folder, folder / "transformer", folder / "unet"]
    return next((place for place in places if (place / "config.json").is_file()), None)


def _load_denoiser(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers

    from attn_control.render.hub_errors import first_line
    from attn_control.render.models import check_files, quiet_libraries

    check_files(folder, [folder])
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        cls = getattr(diffusers, name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AttnControlError(
            f"{folder / 'config.json'}: names no model class of diffusers {diffusers.__version__}"
        ) from None
    try:
        with quiet_libraries():
            key = "torch_dtype" if diffusers.__version__.startswith("0.") else "dtype"
            options = {key: dtype, "use_safetensors": True, "local_files_only": True}
            return cls.from_pretrained(str(folder), **options)
    except Exception as error:  # whatever a foreign file makes the loader raise: one sentence
        raise AttnControlError(
            f"denoiser folder {str(folder)!r} cannot be loaded: {first_line(error)}"
        ) from error


def pipeline_arguments(subject: Subject, steps: int) -> dict[str, Any]:
    """What to call the pipeline with: one prompt, a small size, few steps.

    Raises:
        Skipped: it needs something that cannot be made up.
    """
    pipe = subject.pipe
    if pipe is None:
        raise Skipped("a bare denoiser: there is no pipeline to run")
    known = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in known and getattr(pipe, "text_encoder", True) is None:
        raise Skipped(f"{type(pipe).__name__} was loaded without its text encoder")
    wanted: dict[str, Any] = {
        "prompt": PROMPT,
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    if subject.kind == "zoo":
        from attn_control import zoo

        wanted |= zoo.defaults(subject.name) | {"num_inference_steps": steps}
    pictures = [name for name in ("mask_image", "control_image") if name in known]
    if "image" in known and (pictures or known["image"].default is inspect.Parameter.empty):
        pictures.append("image")
    wanted |= {name: _picture() for name in pictures}
    given = {name: value for name, value in wanted.items() if name in known}
    missing = [
        name
        for name, parameter in known.items()
        if name not in ("self", *given)
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing or "num_inference_steps" not in known:
        what = ", ".join(missing) or "num_inference_steps"
        raise Skipped(f"{type(pipe).__name__} cannot be called with a prompt alone: {what}")
    return given


def _picture() -> Any:
    from PIL import Image

    return Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB")


@torch.no_grad()
def run_pipeline(subject: Subject, arguments: dict[str, Any]) -> Tensor:
    """The final latents of a run from fixed noise, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    output = subject.pipe(**arguments, generator=generator)[0]
    while not isinstance(output, Tensor):
        output = output[0]
    return output.detach().to("cpu", copy=True)


@contextmanager
def first_calls(models: dict[str, nn.Module]) -> Iterator[dict[str, dict[str, Any]]]:
    """The arguments of each denoiser's first call, by name, copied before the model sees them."""
    from attn_control.families import bind

    seen: dict[str, dict[str, Any]] = {}
    handles = []
    for component, model in models.items():

        def keep(module: nn.Module, args: Any, kwargs: Any, name: str = component) -> None:
            if name not in seen:
                seen[name] = copied(bind(module, args, kwargs))

        handles.append(model.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def copied(value: Any) -> Any:
    """Tensors cloned, containers made anew, everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return value
