"""The Markdown of a measurement of sparse attention, every number from the JSON."""

from __future__ import annotations

from attn_control.eval.cells import Numbers, decibels, grid, percent, plain, planted_line, points


def sparse_section(each: Numbers) -> list[str]:
    """Paragraphs and tables of one measurement."""
    frames, rows, columns = each["grid"]
    asked = each["sampler"]
    size = f"{asked['num_frames']} frames of {asked['height']} x {asked['width']} pixels"
    only = " They speak of these prompts only." if each["redrawn"] == "videos" else ""
    dense = each["prompts"] * each["seeds"]
    empty = (
        f" {dense - each['compared']} of the {dense} dense videos show bare ground, which whatever "
        f"is computed comes near to: likeness is of the other {each['compared']}."
        if each["compared"] < dense
        else ""
    )
    return [
        f"{each['prompts']} prompts x {each['seeds']} seeds, {each['pictures']} videos: {size}, "
        f"{each['tokens']} tokens ({frames} x {rows} x {columns}), {each['steps']} steps, guidance "
        f"{asked.get('guidance_scale', '-')}. Each is held against the dense one of its prompt and "
        "seed, frame by frame, as decoded, in 8 bits and before any video codec. For the intervals "
        f"{each['redrawn']} are redrawn.{only}{empty}",
        goal_line(each["goal"]),
        _table(each),
        _scores(each),
        "Amortised density: the share of query-key pairs that outputs were read from, over all "
        "steps, layers and branches, as the session's report has it. Computed: the work in dense "
        "attentions, which counts what refreshes compute beside the dense output, and what choosing"
        " masks takes. Output share re-uses the output of the last refresh and computes nothing in "
        "between: the mask decides nothing, so that one row stands for all masks.",
        planted_line(each["planted"], "videos"),
        _closer(each["closer"]),
    ]


def goal_line(goal: Numbers) -> str:
    """The verdict, with the numbers of every variant that could meet it."""
    asked = (
        f"**At amortised density at most {goal['density']:g} some mode reaches {goal['psnr']:g} dB "
        f"and beats its own uncorrected mask by {goal['gain']:g} dB, the interval above zero: "
        f"{goal['outcome']}.**"
    )
    told = [
        f"{name} ({each['density']:.3f}): {plain(each['psnr'])} dB, "
        f"{decibels(each['gain'])} over {each['gain']['over']}, "
        f"{'met' if each['met'] else 'not met'}"
        for name, each in goal["tried"].items()
    ]
    if not told:
        return f"{asked} No variant with a correction is as sparse as that."
    return f"{asked} " + "; ".join(told) + "."


_LIKENESS = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 4), "lpips": ("LPIPS", 3)}


def _table(each: Numbers) -> str:
    first = next(iter(each["variants"].values()))
    measures = {name: said for name, said in _LIKENESS.items() if name in first["likeness"]}
    rows = []
    for name, v in each["variants"].items():
        like = {} if name == each["baseline"] else v["likeness"]
        rows.append(
            [
                name,
                f"{v['density']:.3f}",
                f"{v['computed']:.3f}",
                *(plain(like.get(measure), digits) for measure, (_, digits) in measures.items()),
                decibels(v["gain"]),
                decibels(v["over_share"]),
            ]
        )
    head = ["variant", "amortised density", "computed", *(head for head, _ in measures.values())]
    return grid([*head, "minus its own mask (dB)", "minus output share (dB)"], rows)


def _scores(each: Numbers) -> str:
    verdicts = list(next(iter(each["variants"].values()))["scores"])
    rows = [
        [
            name,
            *(percent(v["scores"][verdict]) for verdict in verdicts),
            points(None if name == each["baseline"] else v["minus_dense"]["frames"]),
        ]
        for name, v in each["variants"].items()
    ]
    return grid(["variant", *verdicts, "frames minus dense (points)"], rows)


def _closer(closer: Numbers) -> str:
    return (
        f"Positive control of likeness: {closer['replaced']} videos of {closer['variant']} brought "
        f"half the way to the dense ones, which plants {closer['planted']:+.2f} dB; found "
        f"{decibels(closer['found'])}: **{'passed' if closer['passed'] else 'FAILED'}**."
    )


def sparse_costs(variants: Numbers, dense: Numbers) -> list[str]:
    """The time of denoising over dense, beside what the computed share of attention foretells."""
    quicker = [name for name, v in variants.items() if v["ratio"]["high"] < 1]
    sparse = {name: v for name, v in variants.items() if name != dense["variant"]}
    fastest = min(sparse, key=lambda name: sparse[name]["ratio"]["mean"])
    found = (
        f"**Faster than dense: {'met' if quicker else 'not met'}**, by {len(quicker)} of "
        f"{len(sparse)} variants with the whole interval below 1; the fastest is {fastest}, "
        f"{plain(sparse[fastest]['ratio'], 3)} of dense."
    )
    rows = [
        [
            name, f"{v['seconds']:.2f}", f"{v['computed']:.3f}", f"{v['amdahl']:.3f}",
            plain(v["ratio"], 3),
        ]
        for name, v in variants.items()
    ]  # fmt: skip
    return [
        found,
        f"The softmax of self-attention takes {100 * dense['attention_share']:.1f} % of a dense "
        f"run of {dense['tokens']} tokens (measured, text and scheduler included): by Amdahl's law "
        f"nothing that only skips attention gets below {1 - dense['attention_share']:.3f}. "
        "Foretold: that much, and the computed part of attention at dense speed. Masks are built "
        "anew in each run, and their time counts.",
        grid(["variant", "median s", "computed", "foretold", "denoising over dense"], rows),
    ]
