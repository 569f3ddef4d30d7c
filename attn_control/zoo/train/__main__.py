"""`python -m attn_control.zoo.train shapes-sd3`: all stages, or some of them.

Stages: autoencoder, latents, denoiser, decoder, export. Everything but the exported folder lies in
--work. A killed stage goes on from its last checkpoint with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

STAGES = ("autoencoder", "latents", "denoiser", "decoder", "export")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from attn_control.zoo.train.denoiser import Settings

    cli = argparse.ArgumentParser(prog="python -m attn_control.zoo.train", description=__doc__)
    cli.add_argument("name", choices=("shapes-sd3",))
    cli.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    cli.add_argument("--work", type=Path, help="default ~/.cache/attn_control/zoo/NAME")
    cli.add_argument("--out", type=Path, help="where the pipeline goes; default WORK/export")
    cli.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    cli.add_argument("--init-from", type=Path, help="a denoiser.pt to start the weights from")
    cli.add_argument("--threads", type=int, default=os.cpu_count())
    cli.add_argument("--scenes", type=int, default=120_000, help="scenes kept as latents")
    cli.add_argument("--autoencoder-steps", type=int, default=2400)
    cli.add_argument("--autoencoder-width", type=int, default=32)
    cli.add_argument("--decoder-steps", type=int, default=3000)
    cli.add_argument("--part", help="I/N: only the I-th of N parts of the latents (from 1)")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            cli.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            cli.add_argument(flag, type=type(field.default), default=field.default)
    return cli


def main(argv: list[str] | None = None) -> None:
    """Run the chosen stages."""
    args = parser().parse_args(argv)
    import torch

    from attn_control.zoo.train import autoencoder, denoiser, latents
    from attn_control.zoo.train.export import export

    torch.set_num_threads(args.threads)
    work = args.work or Path.home() / ".cache" / "attn_control" / "zoo" / args.name
    fields = dataclasses.fields(denoiser.Settings)
    settings = denoiser.Settings(**{f.name: getattr(args, f.name) for f in fields})
    if "autoencoder" in args.stages:
        autoencoder.train(
            work, args.autoencoder_steps, width=args.autoencoder_width, resume=args.resume
        )
    if "latents" in args.stages:
        part, parts = map(int, (args.part or "1/1").split("/"))
        latents.encode_part(work, args.scenes, part - 1, parts)
    if "denoiser" in args.stages:
        denoiser.train(
            work, settings, latents.load_latents(work), resume=args.resume, init_from=args.init_from
        )
    if "decoder" in args.stages:
        autoencoder.refine_decoder(work, args.decoder_steps, resume=args.resume)
    if "export" in args.stages:
        export(work, args.out or work / "export")


if __name__ == "__main__":
    main()
