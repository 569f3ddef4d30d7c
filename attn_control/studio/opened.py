"""A job back as the page: what an upload becomes, and what of it has no place there."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attn_control import zoo
from attn_control.catalog import find_preset
from attn_control.errors import AttnControlError
from attn_control.processors import build_control
from attn_control.render.job import Job, Sampler, Variant
from attn_control.render.jobfile import job_from_text
from attn_control.studio.facts import Facts
from attn_control.studio.form import ControlOptions, Form, Method, form_of
from attn_control.studio.settings import Refused, Settings

# What an uploaded file begins with when it is something else under a new name.
_OTHERS = {
    b"PK": "a zip archive (or a .pt file, which is one)",
    b"\x80": "a pickle, which is never loaded",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8": "a JPEG picture",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"%PDF": "a PDF",
    b"GGUF": "a GGUF model",
    b"RIFF": "a WebP picture or a video",
}


def text_of_upload(raw: bytes, settings: Settings) -> str:
    """The text of an uploaded job, by its content and not by its name.

    Raises:
        Refused: at "job": too large, or no text.
    """
    if len(raw) > settings.upload:
        raise Refused(
            "job", f"the file has {len(raw)} bytes, a job for this page at most {settings.upload}"
        )
    for start, what in _OTHERS.items():
        if raw.startswith(start):
            raise Refused("job", f"the file is {what}, expected a job as YAML text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("job", f"byte {error.start} is not UTF-8, expected YAML text") from None
    if "\0" in text:
        raise Refused("job", "the file holds null bytes, expected YAML text")
    return text


def open_job(
    text: str,
    facts_of: Callable[[str], Facts],
    methods: Iterable[Method],
    settings: Settings,
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
    prompt, seed = _prompt_and_seed(job, notes)
    sampler, controls = _variant(job, notes)
    facts = facts_of(job.model.name)
    form: Form = {"model": facts.model, "prompt": prompt, "seed": seed, **facts.start}
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


def _prompt_and_seed(job: Job, notes: list[str]) -> tuple[str, int]:
    """The first of each, and a note where there are more."""
    wanted, own = job.prompts, None
    if wanted.file is not None:
        raise Refused("job", "prompts: a page reads no files; write the prompt into the job")
    if wanted.zoo is not None:
        try:
            rows = zoo.load_prompts(wanted.zoo)
        except AttnControlError as error:
            raise Refused("job", str(error)) from None
        texts, own = [row["prompt"] for row in rows], rows[0]["seed"]
    else:
        if any(entry.image is not None for entry in wanted.texts or ()):
            raise Refused("job", "prompts: a page reads no files, and so no reference pictures")
        texts = [entry.prompt for entry in wanted.texts or ()]
    seeds = [own] if job.seeds == "own" else list(job.seeds)
    if len(texts) > 1:
        notes.append(f"The first of {len(texts)} prompts is shown.")
    if len(seeds) > 1:
        notes.append(f"The first of {len(seeds)} seeds is shown.")
    return texts[0], int(seeds[0] or 0)


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
