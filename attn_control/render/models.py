"""Loads the pipeline of a job: a built-in model, a local folder or a hub id.

Only safetensors, never pickle, and never code that lies beside the weights. What can go wrong on
the way to a hub model is told in one sentence that ends with a way out.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.hub_errors import explain_hub_error, first_line
from attn_control.render.job import ModelSpec, close

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModelChoice:
    """A model that was found by name: `kind` is "zoo", "folder" or "hub"."""

    kind: str
    name: str
    folder: Path | None
    revision: str | None
    dtype: str
    device: str


def choose_model(spec: ModelSpec, base: Path | None = None) -> ModelChoice:
    """Decide what `spec.name` means, without loading; relative folders are looked up in `base`.

    Raises:
        AttnControlError: neither a built-in model, nor a folder, nor shaped like a hub id.
    """
    from attn_control import zoo

    device = choose_device(spec.device)
    name = spec.name
    if name in zoo.NAMES:
        if spec.revision is not None:
            raise AttnControlError(
                f"model.revision {spec.revision!r}: the built-in model {name!r} has none"
            )
        dtype: str = "float32" if spec.dtype == "auto" else spec.dtype
        return ModelChoice("zoo", name, None, None, dtype, device)
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    folder = Path(name).expanduser()
    found = next((path for path in (folder, (base or Path()) / folder) if path.is_dir()), None)
    if found is not None:
        check_folder(found)
        return ModelChoice("folder", name, found.resolve(), None, dtype, device)
    if Path(name).expanduser().is_file():
        raise AttnControlError(
            f"model {name!r} is a single file, expected a diffusers folder with a model_index.json"
        )
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise AttnControlError(
            f"model {name!r} is neither a built-in model ({', '.join(zoo.NAMES)}), nor a folder "
            f"here, nor a hub id like 'owner/name'{close(name, zoo.NAMES)}"
        )
    return ModelChoice("hub", name, None, spec.revision, dtype, device)


def choose_device(device: str) -> str:
    """`auto` becomes the best device of this machine; a device that is absent is an error."""
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and index >= cuda:
        raise AttnControlError(
            f"device {device!r}: torch {torch.__version__} sees {cuda} CUDA device(s) here; "
            "use --device cpu"
        )
    if device == "mps" and not mps:
        raise AttnControlError("device 'mps': torch sees no Apple GPU here; use --device cpu")
    return device


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no pipeline, brings its own code, or holds only pickled weights."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise AttnControlError(
            f"model folder {str(folder)!r} has no model_index.json, expected a pipeline written by "
            "save_pretrained"
        )
    try:
        class_name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        raise AttnControlError(f"{index}: is not a JSON object") from None
    if not isinstance(class_name, str):
        raise AttnControlError(
            f"{index}: _class_name is {class_name!r}; a pipeline with code of its own is not loaded"
        )
    check_files(folder, [folder, *sorted(path for path in folder.iterdir() if path.is_dir())])


def check_files(folder: Path, parts: list[Path]) -> None:
    """Refuse a model folder of which a part holds code, or weights that are only pickled."""
    for part in parts:
        files = sorted(path.name for path in part.iterdir())
        code = [name for name in files if name.endswith(".py")]
        if code:
            raise AttnControlError(
                f"model folder {str(folder)!r}: holds code ({code[0]}), which loading would run; "
                "expected weights and configurations only"
            )
        pickles = [name for name in files if name.endswith(_PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in files):
            raise AttnControlError(
                f"model folder {str(folder)!r}: {part.name!r} has only pickled weights "
                f"({pickles[0]}), which can run code when loaded; expected safetensors: save it "
                "again with safe_serialization=True"
            )


def load_model(choice: ModelChoice) -> Any:
    """The loaded diffusers pipeline, on its device, with its own progress bar switched off."""
    import torch

    dtype = getattr(torch, choice.dtype)
    with quiet_libraries():
        try:
            if choice.kind == "zoo":
                from attn_control import zoo

                pipe = zoo.load(choice.name, device=choice.device, dtype=dtype)
            else:
                pipe = _from_pretrained(choice, dtype).to(choice.device)
        except torch.OutOfMemoryError as error:
            raise AttnControlError(
                f"model {choice.name!r} does not fit on {choice.device}: {first_line(error)}; use "
                "a smaller dtype or another device"
            ) from None
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No notes and bars of loaders; downloads keep theirs, and all is as it was afterwards."""
    from transformers.utils import logging as transformers_logging

    # Before diffusers is imported: it makes transformers talk about torchvision.
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    from diffusers.utils import logging as diffusers_logging

    also_before = diffusers_logging.get_verbosity()
    bars = [
        logging
        for logging in (transformers_logging, diffusers_logging)
        if logging.is_progress_bar_enabled()
    ]
    diffusers_logging.set_verbosity_error()
    for logging in bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        diffusers_logging.set_verbosity(also_before)
        for logging in bars:
            logging.enable_progress_bar()


def _from_pretrained(choice: ModelChoice, dtype: Any) -> Any:
    import diffusers

    # torch_dtype works in every release before 1.0, the newer dtype in the last few only.
    key = "torch_dtype" if diffusers.__version__.startswith("0.") else "dtype"
    options: dict[str, Any] = {key: dtype, "use_safetensors": True}
    load = diffusers.DiffusionPipeline.from_pretrained
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            if choice.folder is not None:
                return load(str(choice.folder), local_files_only=True, **options)
            return load(choice.name, revision=choice.revision, **options)
    except Exception as error:  # whatever a foreign file makes the loader raise: one sentence
        if choice.kind == "hub":
            raise AttnControlError(
                explain_hub_error(choice.name, choice.revision, error)
            ) from error
        raise AttnControlError(
            f"model folder {choice.name!r} cannot be loaded: {first_line(error)}"
        ) from error


def fingerprint(choice: ModelChoice) -> dict[str, Any]:
    """What identifies the weights; part of every picture's settings, so that resume mixes none."""
    if choice.kind == "hub":
        return {"kind": "hub", "name": choice.name, "revision": _commit(choice)}
    from attn_control.zoo.digest import weights_of

    folder = choice.folder
    if folder is None:
        from attn_control import zoo

        folder = Path(zoo.path(choice.name))
    name = choice.name if choice.kind == "zoo" else os.path.basename(folder)
    return {"kind": choice.kind, "name": name, "weights": weights_of(folder)}


def _commit(choice: ModelChoice) -> str | None:
    """The commit that the cache holds for this revision: `main` moves, a commit does not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(choice.name, "model_index.json", revision=choice.revision)
    return Path(found).parent.name if isinstance(found, str) else choice.revision
