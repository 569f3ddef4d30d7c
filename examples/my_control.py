"""A control of your own, outside the package: a softmax temperature for chosen heads.

python examples/my_control.py --model zoo
"""

import argparse
from dataclasses import dataclass

import torch

from attn_control import attach, zoo
from attn_control.plan import Part
from attn_control.processors import Control


@dataclass(frozen=True)
class Temperature(Control):
    """Multiply the attention scores of chosen heads by ``t``: above 1 sharpens, below 1 softens."""

    t: float = 1.0

    @property
    def idle(self):
        return "t is 1" if self.t == 1 else None

    def contribute(self, builder, number, layout, heads, rows):
        def epilogue(out, call):
            """Attend once more with another scale, for these heads alone."""
            h, new = list(heads), out.clone()
            scale = (call.scale or call.q.shape[-1] ** -0.5) * self.t
            new[:, h] = torch.nn.functional.scaled_dot_product_attention(
                call.q[:, h], call.k[:, h], call.v[:, h], attn_mask=call.mask, scale=scale
            )
            return new

        builder.add(Part(number, epilogue))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo", choices=["zoo"])
    parser.add_argument("--heads", default="L2-3")
    parser.add_argument("--t", type=float, default=2.0)
    parser.add_argument("--out", default="temperature.png")
    args = parser.parse_args()
    pipe, options = zoo.load("shapes-sd3"), zoo.defaults("shapes-sd3")
    with attach(pipe, Temperature(args.heads, t=args.t)) as session:
        image = pipe("a green ring on a black background", **options).images[0]
    print(session.report())
    image.save(args.out)
