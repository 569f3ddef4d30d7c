"""The card of a model: `python -m attn_control.zoo.card NAME`, its README.md.

What a card says comes from four places: the run's checkpoint and logs, which the trainer's last
stage leaves in the card's front matter; the folder itself; `cards.yaml`, where people tell what a
checkpoint cannot know; and a published evaluation, whose figures count only for the weights that it
measured. Nothing else: a card holds no number that was not measured.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import yaml

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.zoo.card_scores import Data, scores, table
from attn_control.zoo.digest import weights_of

TEXTS = Path(__file__).with_name("cards.yaml")
RESULT = Path(__file__).parents[2] / "docs" / "evaluation" / "zoo" / "result.json"
_OVER = 200  # last steps whose losses are averaged


def texts(name: str) -> dict[str, str]:
    """What people say of a model: what, example, data, loss, history, limits."""
    written: dict[str, dict[str, str]] = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    if name not in written:
        raise AttnControlError(f"{TEXTS.name} says nothing of {name!r}; it tells of {[*written]}")
    return {key: value.strip() for key, value in written[name].items()}


def facts(work: Path, data: Path) -> Data:
    """What a training left in its folders; it goes into the card's front matter.

    work: the folder of `denoiser.pt` and its log; data: of the latents and the autoencoder.
    """
    import numpy as np

    from attn_control.zoo.train.common import load

    state = load(work / "denoiser.pt")
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in state["settings"].items()}
    last = int(state["step"])
    found = {
        "scenes": sum(len(np.load(p, mmap_mode="r")) for p in data.glob("latents-*.npy")),
        "denoiser": {"steps": last, "losses": losses(work / "denoiser.jsonl", last)},
        "settings": settings,
    }
    for part, folder in (("autoencoder", "vae"), ("decoder", "vae-refined")):
        if (data / folder).is_dir():  # perhaps a link to another model's
            log = (data / folder).resolve().parent / f"{part}.jsonl"
            found[part] = {"steps": last_step(log), "losses": losses(log, last_step(log))}
    return found


def _lines(log: Path) -> list[Data]:
    if not log.is_file():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def last_step(log: Path) -> int | None:
    """The step of a log's last line; None where there is none."""
    lines = _lines(log)
    return lines[-1]["step"] if lines else None


def losses(log: Path, last: int | None) -> dict[str, float]:
    """Mean losses by kind of the 200 steps up to `last`; {} where none was logged.

    A resumed run logs some steps again: the later lines count.
    """
    by_step = {line["step"]: line for line in _lines(log)}
    values: dict[str, list[float]] = {}
    for step, line in by_step.items():
        if last is not None and last - _OVER < step <= last:
            for kind in line.keys() - {"step", "s_per_step"}:
                values.setdefault(kind, []).append(line[kind])
    return {kind: round(sum(v) / len(v), 5) for kind, v in sorted(values.items())}


def card(name: str, folder: Path, trained: Data, result: Data | None = None) -> str:
    """The whole README.md of a folder.

    trained: as from `facts`; result: a published evaluation (`result.json`) or None.
    """
    said = texts(name)
    front = {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video" if name == "shapes-wan" else "text-to-image",
        "training": trained,
    }
    parts = [
        "---\n"
        + yaml.safe_dump(front, sort_keys=False, default_flow_style=None, width=100)
        + "---",
        f"# {name}",
        said["what"],
        f"```python\n{said['example']}\n```",
        "## What is inside",
        *inside(folder),
        "## Training",
        *_training(trained, said),
        "### What was run",
        said["history"],
        "## Scores",
        *scores(result, name, weights_of(folder)),
        "## Limits",
        said["limits"],
        "## Licence",
        "Apache-2.0, as the package. It was trained only on what the package's own code draws.",
        "This card is made by `python -m attn_control.zoo.card`, which a test holds it to.",
    ]
    return "\n\n".join(parts) + "\n"


def inside(folder: Path) -> list[str]:
    """The parts of a pipeline's folder, their parameters and bytes."""
    import torch
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    rows, total = [], 0
    for part, value in sorted(pipe.components.items()):
        if value is None:
            continue
        count = "-"
        if isinstance(value, torch.nn.Module):
            count = f"{sum(p.numel() for p in value.parameters()):,}"
        size = sum(file.stat().st_size for file in (folder / part).rglob("*") if file.is_file())
        total += size
        rows.append([part, f"`{index[part][1]}`", count, f"{size:,}"])
    return [
        table(["part", "class", "parameters", "bytes"], rows),
        f"A `{index['_class_name']}`, {total:,} bytes in all; large parts are stored in float16.",
    ]


def _training(trained: Data, said: dict[str, str]) -> list[str]:
    run, settings = trained["denoiser"], trained["settings"]
    told = [f"Data: {trained['scenes']:,} scenes, of the seeds from 0 on. {said['data']}"]
    for part, what in (
        ("autoencoder", "Autoencoder"),
        ("decoder", "Its decoder alone, after that"),
    ):
        if part in trained:
            steps = trained[part]["steps"]
            length = "steps not logged" if steps is None else f"{steps:,} steps"
            told.append(f"{what}: {length}; {_told(trained[part]['losses'])}.")
    told.append(
        f"Denoiser and text encoders: {run['steps']:,} steps of {settings['steps']:,} planned;"
        f" {_told(run['losses'])}. {said['loss']}"
    )
    each = ", ".join(f"{key} {value}" for key, value in settings.items())
    told.append(f"Settings: {each}.")
    return [
        "What the last run's checkpoint and logs say; they know nothing of runs before it.",
        "\n".join(
            textwrap.fill(line, 105, initial_indent="- ", subsequent_indent="  ") for line in told
        ),
    ]


def _told(found: dict[str, float]) -> str:
    if not found:
        return "no loss was logged"
    each = ", ".join(f"{kind} {value:.4f}" for kind, value in found.items())
    return f"mean loss of the last {_OVER} steps, by kind of step: {each}"


def trained_of(folder: Path) -> Data:
    """What a folder's card says of its training. Raises AttnControlError where it says nothing."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    if "training" not in front:
        raise AttnControlError(
            f"{file} tells nothing of the training; expected a card written by the stage 'export',"
            " or --work with the run's folder"
        )
    return dict(front["training"])


def write(name: str, folder: Path, trained: Data, result: Data | None = None) -> Path:
    """Write a folder's README.md."""
    file = folder / "README.md"
    file.write_text(card(name, folder, trained, result), encoding="utf-8")
    return file


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m attn_control.zoo.card", description=__doc__)
    cli.add_argument("names", nargs="*", metavar="NAME", help="default: all that ship")
    cli.add_argument("--folder", type=Path, help="default: where the model is loaded from")
    cli.add_argument("--work", type=Path, help="a run's folder; default: what the card says of it")
    cli.add_argument("--data", type=Path, help="of its autoencoder and latents; default --work")
    cli.add_argument("--result", type=Path, default=RESULT, help="a published evaluation")
    args = cli.parse_args(argv)
    if (args.folder or args.work or args.data) and len(args.names) != 1:
        raise AttnControlError(
            f"--folder, --work and --data name one model's: name one model, got {len(args.names)}"
        )
    result = json.loads(args.result.read_text(encoding="utf-8")) if args.result.is_file() else None
    for name in args.names or zoo.NAMES:
        folder = args.folder or zoo.path(name)
        trained = facts(args.work, args.data or args.work) if args.work else trained_of(folder)
        print(write(name, folder, trained, result))


if __name__ == "__main__":
    main()
