"""A job back as the page: what an upload becomes, and what of it has no place there."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attn_control import zoo
from attn_control.catalog import find_preset
from attn_control.errors import AttnControlError
from attn_control.processors import build_control
from attn_control.render.job import Job, PromptEntry, Sampler, Variant
from attn_control.render.jobfile import job_from_text
from attn_control.studio.facts import Facts
from attn_control.studio.form import ControlOptions, Form, Method, form_of
from attn_control.studio.pictures import Pictures
from attn_control.studio.settings import Refused, Settings


def open_job(
    text: str,
    facts_of: Callable[[str], Facts],
    methods: Iterable[Method],
    settings: Settings,
    pictures: Pictures,
) -> tuple[Form, Facts, list[str]]:
    """The form of a job, the facts of its model, and what was left out of it, a sentence each.

    Nothing of a job is run but what the page shows: no file that it names is read, and no argument
    passes that has no field.

    Raises:
        Refused: at "job", with line and column where it is the job's form; at "model" for a model
            that this studio does not open.
    """
    if len(text.encode("utf-8", "replace")) > settings.upload:
        raise Refused("job", f"a job for this page has at most {settings.upload} bytes")
    try:
        job, _ = job_from_text(text, "job")
    except AttnControlError as error:
        raise Refused("job", str(error)) from None
    notes: list[str] = []
    _check_model(job, settings)
    first, seed = _first(job, notes, pictures)
    sampler, controls = _variant(job, notes)
    facts = facts_of(job.model.name)
    form: Form = {"model": facts.model, "prompt": first.prompt, "seed": seed, **facts.start}
    form["picture"] = _picture(first, facts, notes, pictures)
    form |= _sampler_form(sampler, facts)
    shown, left = form_of(controls, methods)
    if left:
        names = [name for name, _ in controls]
        many = names.count(left[0][0]) > 1
        raise Refused(
            "job",
            f"the page has {'one section' if many else 'no section'} for {left[0][0]}"
            f"{', the job has several' if many else ''}; `attn-control render` takes this job",
        )
    if job.video is not None:
        notes.append("How the video is written is the page's own choice.")
    if job.title is not None or job.compare:
        notes.append("Title and compare belong to sheets, and were left out.")
    return form | shown, facts, notes


def _check_model(job: Job, settings: Settings) -> None:
    for key, usual in (("revision", None), ("dtype", "auto"), ("device", settings.device)):
        value = getattr(job.model, key)
        if value not in (usual, "auto"):
            raise Refused(
                "job", f"model.{key} {value!r:.60} cannot be chosen here: the operator chooses it"
            )


def _first(job: Job, notes: list[str], pictures: Pictures) -> tuple[PromptEntry, int]:
    """The first prompt and seed, and a note where there are more."""
    wanted, own = job.prompts, None
    if wanted.file is not None:
        raise Refused("job", "prompts: a page reads no files; write the prompt into the job")
    if wanted.zoo is not None:
        try:
            rows = zoo.load_prompts(wanted.zoo)
        except AttnControlError as error:
            raise Refused("job", str(error)) from None
        entries, own = [PromptEntry(prompt=row["prompt"]) for row in rows], rows[0]["seed"]
        drawn = rows[0].get("reference")
        if drawn:
            name = pictures.draw(drawn["texture"], drawn["seed"])
            entries[0] = PromptEntry(prompt=rows[0]["prompt"], image=name)
    else:
        entries = list(wanted.texts or ())
    seeds = [own] if job.seeds == "own" else list(job.seeds)
    if len(entries) > 1:
        notes.append(f"The first of {len(entries)} prompts is shown.")
    if len(seeds) > 1:
        notes.append(f"The first of {len(seeds)} seeds is shown.")
    return entries[0], int(seeds[0] or 0)


def _picture(first: PromptEntry, facts: Facts, notes: list[str], pictures: Pictures) -> str:
    """The name of the prompt's picture where this studio has it; "" for none."""
    if first.image is None:
        return ""
    if not facts.picture:
        raise Refused(
            "job", "prompts: a page reads no files, and this model takes no reference pictures"
        )
    if pictures.known(first.image):
        return first.image
    notes.append(
        f"A page reads no files: upload the picture {first.image!r:.90} beside the prompt."
    )
    return ""


def _variant(job: Job, notes: list[str]) -> tuple[Sampler, list[ControlOptions]]:
    """The first variant that has controls, with its sampler over the job's."""
    busy = [name for name, each in job.variants.items() if each.controls or each.preset]
    name = busy[0] if busy else next(iter(job.variants))
    variant: Variant = job.variants[name]
    if len(job.variants) > 2 or len(busy) > 1:
        notes.append(f"Of {len(job.variants)} variants {name!r:.60} is shown.")
    controls: list[ControlOptions] = []
    if variant.preset is not None:
        try:
            controls += [(each, dict(given)) for each, given in find_preset(variant.preset).options]
        except AttnControlError as error:
            raise Refused("job", str(error)) from None
        notes.append(f"The preset {variant.preset!r:.60} is written out.")
    controls += [(spec.name, dict(spec.options)) for spec in variant.controls]
    for each, options in controls:
        try:
            build_control(each, options)
        except AttnControlError as error:
            raise Refused("job", str(error)) from None
    merged = {**job.sampler.kwargs(), **variant.sampler.kwargs()}
    named = {key: merged.pop(key) for key in list(merged) if key in Sampler.model_fields}
    return Sampler(**named, extra=merged), controls


def _sampler_form(sampler: Sampler, facts: Facts) -> Form:
    """Its fields on the page. Raises Refused at "job" for one that has no place there."""
    places = {
        "num_inference_steps": "steps",
        "height": "height",
        "width": "width",
        "num_frames": "frames",
        "negative_prompt": "negative",
        facts.cfg: "cfg",
    }
    form: Form = {"negative": ""}
    for key, value in sampler.kwargs().items():
        if key not in places:
            raise Refused(
                "job",
                f"sampler.{key} has no place on the page; `attn-control render` takes this job",
            )
        form[places[key]] = value
    return form
