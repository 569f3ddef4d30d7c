"""`python -m attn_control.zoo.train NAME`: one trainer for all models, all stages or some of them.

Everything but the exported folder lies in --work. A killed stage goes on from its last checkpoint
with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = {"shapes-sd3": "sd3", "shapes-sd15": "sd15", "shapes-flux": "flux", "shapes-wan": "wan"}


def module(name: str) -> Any:
    """What is a model's own: Settings, Lesson, pipeline, perhaps SOURCE, LABELS, AUTOENCODER."""
    return import_module(f"attn_control.zoo.train.{MODULES[name]}")


def autoencoder_of(name: str) -> Any:
    """The module that trains a model's autoencoder: the pictures' own, unless the model says."""
    from attn_control.zoo.train import autoencoder

    return getattr(module(name), "AUTOENCODER", autoencoder)


def _add_settings(cli: argparse.ArgumentParser, settings: type) -> None:
    for field in dataclasses.fields(settings):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            cli.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        elif isinstance(field.default, tuple):
            kind = type(field.default[0])
            cli.add_argument(flag, type=kind, nargs="+", default=field.default)
        else:
            cli.add_argument(flag, type=type(field.default), default=field.default)


def parser() -> argparse.ArgumentParser:
    """The command line: a subcommand a model, with that model's own settings."""
    cli = argparse.ArgumentParser(prog="python -m attn_control.zoo.train", description=__doc__)
    names = cli.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in MODULES:
        # An abbreviation would be another setting where a model lacks the one that is meant.
        summary = (module(name).__doc__ or "").split("\n")[0]
        sub = names.add_parser(name, help=summary, allow_abbrev=False)
        ae = autoencoder_of(name)
        sub.add_argument(
            "--stages", nargs="+", choices=[*ae.STAGES, "keep"], default=list(ae.STAGES)
        )
        sub.add_argument("--work", type=Path, help="default ~/.cache/attn_control/zoo/NAME")
        sub.add_argument("--data", type=Path, help="autoencoder and latents; default --work")
        sub.add_argument(
            "--out",
            type=Path,
            help="where the pipeline (or what is kept) goes; default WORK/export",
        )
        sub.add_argument("--resume", action="store_true", help="go on from --work's checkpoints")
        sub.add_argument(
            "--init-from", type=Path, help="a denoiser.pt or trainee.safetensors to start from"
        )
        sub.add_argument("--threads", type=int, default=os.cpu_count())
        sub.add_argument("--scenes", type=int, default=ae.SCENES, help="kept as latents")
        sub.add_argument("--autoencoder-steps", type=int, default=2400)
        sub.add_argument("--autoencoder-width", type=int, default=ae.WIDTH)
        sub.add_argument("--autoencoder-from", type=Path, help="a --data folder to start it from")
        sub.add_argument("--decoder-steps", type=int, default=3000)
        sub.add_argument("--part", default="1/1", help="I/N: only the I-th of N parts of latents")
        sub.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
        _add_settings(sub, module(name).Settings)
    return cli


def main(argv: list[str] | None = None) -> None:
    """Run the chosen stages."""
    args = parser().parse_args(argv)
    import torch

    from attn_control.zoo import card
    from attn_control.zoo.train import latents, loop, quick, seeing
    from attn_control.zoo.train.export import export
    from attn_control.zoo.train.keep import keep

    torch.set_num_threads(args.threads)
    quick.keep_memory()
    model, autoencoder = module(args.name), autoencoder_of(args.name)
    work = args.work or Path.home() / ".cache" / "attn_control" / "zoo" / args.name
    data = args.data or work
    fields = dataclasses.fields(model.Settings)
    settings = model.Settings(**{f.name: getattr(args, f.name) for f in fields})
    source = getattr(model, "SOURCE", latents.plain)
    common = {"count": min(args.scenes, 8000), "resume": args.resume}  # count: kept in memory
    if "autoencoder" in args.stages:
        width, init = args.autoencoder_width, args.autoencoder_from
        autoencoder.train(data, args.autoencoder_steps, source, width=width, init=init, **common)
    if "latents" in args.stages:
        part, parts = map(int, args.part.split("/"))
        encode = partial(autoencoder.encode, autoencoder.load_vae(data))
        latents.encode_part(data, source, encode, args.scenes, part - 1, parts)
    if "denoiser" in args.stages:
        examples = latents.load_latents(data)
        told = []
        if hasattr(model, "LABELS"):
            told = [seeing.gather(model.LABELS, len(examples.targets), data / "seen.npz")]
        lesson = model.Lesson(settings, examples, *told)
        loop.train(
            work, lesson, resume=args.resume, init_from=args.init_from, save_every=args.save_every
        )
    if "decoder" in args.stages:
        autoencoder.refine_decoder(data, args.decoder_steps, source, **common)
    out = args.out or work / "export"
    if "keep" in args.stages:
        keep(loop.averaged(work, model.Settings, model.Trainee), autoencoder.load_vae(data), out)
    if "export" in args.stages:
        export(model.pipeline(work, data), out)
        card.write(args.name, out, card.facts(work, data))


if __name__ == "__main__":
    main()
