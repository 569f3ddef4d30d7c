"""docs/coexistence.md is made here: every line names the tests that prove it.

After a change: ``UPDATE_README=1 pytest tests/coexist/test_page.py`` writes it anew.
"""

from __future__ import annotations

import ast
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coexistence.md"
GRADIENTS, CACHES = "coexist/test_gradient_checkpointing.py", "coexist/test_step_caches.py"
CHANGES, WEIGHTS = "coexist/test_processors_change.py", "coexist/test_weights.py"
SPREAD, COMPILE = "coexist/test_context_parallel.py", "test_compile.py"


@dataclass(frozen=True)
class Row:
    """What lives beside a session, how, and the tests ("file::function") that say so."""

    what: str
    how: str
    proof: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """What does not, and the whole sentence, "…" for what it fills in."""

    what: str
    sentence: str
    proof: str


ROWS = (
    Row(
        "`torch.compile(fullgraph=True)` of the denoiser, before or after `attach`",
        "No graph break. Attaching costs at most one more graph, and so does each phase of a run"
        " (a set of controls in force at once); other values of `u`, `scale` or `gain` cost none",
        (
            f"{COMPILE}::test_compile_then_attach",
            f"{COMPILE}::test_attach_then_compile",
            f"{COMPILE}::test_at_most_one_graph_a_phase_and_none_for_other_numbers",
        ),
    ),
    Row(
        "`compile_repeated_blocks(fullgraph=True)`",
        "As above, for each class of block",
        (f"{COMPILE}::test_repeated_blocks_compiled_one_by_one",),
    ),
    Row(
        "model, sequential and group offload (by blocks, by leaves), layerwise casting",
        "Switched on before or during a session. Nothing reads a weight that is elsewhere. Run on"
        " a CPU, with the hooks that `enable_model_cpu_offload` is made of; that method itself, and"
        " offload with streams, need an accelerator and have not been run",
        (f"{WEIGHTS}::test_weights_elsewhere",),
    ),
    Row(
        "LoRA (peft)",
        "Loaded, scaled, fused, unfused and taken off, before or during a session; the scale in"
        " `joint_attention_kwargs` reaches extra forwards too",
        (
            f"{WEIGHTS}::test_lora_before_a_session",
            f"{WEIGHTS}::test_lora_added_scaled_fused_and_taken_off_during_a_session",
            f"{WEIGHTS}::test_the_scale_of_a_lora_reaches_the_extra_forward_too",
            f"{WEIGHTS}::test_a_pipelines_lora_weights_loaded_during_a_session",
        ),
    ),
    Row(
        "GGUF weights",
        "As plain ones. (torchao's int8 weights too, tried by hand on SD3 and FLUX with torchao"
        " 0.18; it warns at every import, so that the suite goes without it)",
        (f"{WEIGHTS}::test_gguf_weights",),
    ),
    Row(
        "first-block cache, MagCache, TaylorSeer",
        "Extra forwards, and forwards with NAG's rows, have a cache of their own. Where a cache"
        " answers in place of a selected attention there is nothing to control: the report lists"
        " the step as cached, `0-5 (1-5 cached)`. A guided difference at such a step is that of"
        " the cached predictions",
        (
            f"{CACHES}::test_a_cache_that_never_answers_changes_nothing",
            f"{CACHES}::test_first_block_cache_marks_the_steps_it_answers",
            f"{CACHES}::test_a_control_that_comes_due_at_a_cached_step_is_no_error_and_no_silence",
            f"{CACHES}::test_rows_that_come_and_go_have_a_cache_of_their_own",
            "test_batches_and_caches.py::test_a_step_caches_branches_are_not_mixed_with_ours",
        ),
    ),
    Row(
        "pyramid attention broadcast",
        "As above; the perturbed pass has a state of its own, in step with the pipeline's",
        (
            f"{CACHES}::test_attention_broadcast_reports_what_it_answered",
            f"{CACHES}::test_attention_broadcast_of_guidance_equals_two_models_apart",
            f"{CACHES}::test_attention_broadcast_forgets_between_runs",
        ),
    ),
    Row(
        "FasterCache",
        "Works on the pipeline's own forwards; extra forwards are computed in full",
        (f"{CACHES}::test_faster_cache_skips_the_negative_rows_of_ours_never",),
    ),
    Row(
        "`set_attention_backend`, `attention_backend`",
        "Before or during a session. diffusers applies it to models that dispatch (FLUX, Wan), and"
        " to no others (SD 1.5, SD3)",
        (f"{CHANGES}::test_set_attention_backend",),
    ),
    Row(
        "`torch.nn.functional.scaled_dot_product_attention` replaced by another",
        "The other one runs",
        (f"{CHANGES}::test_an_attention_that_others_put_into_torch",),
    ),
    Row(
        "`fuse_qkv_projections`, `unfuse_qkv_projections`",
        "Before or during a session; processors that it replaces are healed at the next call, with"
        " a note. (diffusers' fused SD3 leaves out the norms of queries and keys: its pictures"
        " change, with or without a session)",
        (
            f"{CHANGES}::test_fused_projections_before_a_session",
            f"{CHANGES}::test_fused_and_unfused_during_a_session",
        ),
    ),
    Row(
        "IP-Adapter, `set_attn_processor`",
        "Loaded and unloaded before or during a session; displaced processors are healed at the"
        " next call, with a note. The softmax that asks the image is not controlled",
        (
            f"{CHANGES}::test_image_prompt_adapters",
            f"{CHANGES}::test_a_pipelines_ip_adapter_loaded_and_unloaded_during_a_session",
            "test_restore.py::test_processors_set_during_a_session_are_healed_and_noted_and_kept",
        ),
    ),
    Row(
        "gradient checkpointing, reentrant or not",
        "Gradients are those without it. Blocks run again in backward under the plans and the step"
        " of their forward, also after the session, or beside another one",
        (
            f"{GRADIENTS}::test_gradients_are_those_without_checkpointing",
            f"{GRADIENTS}::test_in_every_kind_of_model",
            f"{GRADIENTS}::test_steps_recompute_with_their_own_plans",
            f"{GRADIENTS}::test_backward_after_the_session_is_over",
            f"{GRADIENTS}::test_backward_while_another_session_is_open",
            f"{GRADIENTS}::test_checkpoints_of_compiled_blocks",
        ),
    ),
    Row(
        "`deepcopy`, `torch.save` and `save_pretrained` of what is attached",
        "The copy is detached: the plain model or pipeline",
        (
            f"{CHANGES}::test_a_deep_copy_of_an_attached_pipeline_is_detached",
            "test_restore.py::test_a_deep_copy_of_an_attached_model_is_detached_and_works",
            "test_restore.py::test_a_pickle_of_an_attached_model_is_the_plain_model",
            "test_restore.py::test_an_attached_model_can_be_saved_and_loads_as_the_plain_model",
        ),
    ),
    Row(
        "Ulysses context parallelism (also `ulysses_anything`)",
        "Two processes predict what one does, whatever the control, and their gradients add up. A"
        " planned site gathers its tokens once more. Ring attention takes the same road; no backend"
        " of a CPU can run it, so that it has not been run",
        (
            f"{SPREAD}::test_two_processes_predict_what_one_does",
            f"{SPREAD}::test_gradients_of_two_processes_add_up_to_those_of_one",
        ),
    ),
    Row(
        "threads with a model each",
        "They do not see each other, compiled or not",
        (f"{COMPILE}::test_two_threads_with_a_compiled_model_each",),
    ),
)
REFUSALS = (
    Refusal(
        "tensor parallelism",
        "attach: tensor parallelism spreads the heads over processes, so that L0H0 is another head"
        " in each; expected context parallelism or one process",
        f"{SPREAD}::test_tensor_parallelism_is_refused",
    ),
    Refusal(
        "gradient checkpointing of a denoiser that is compiled as a whole",
        "attach: gradient checkpointing inside a compiled … cannot be traced; compile its blocks"
        " alone, with compile_repeated_blocks()",
        f"{GRADIENTS}::test_checkpoints_inside_a_graph_are_refused",
    ),
    Refusal(
        "a pipeline's denoiser checkpointed as a whole by its caller",
        "attach: … was called again in backward, as a whole; checkpoint its blocks instead, with"
        " enable_gradient_checkpointing()",
        f"{GRADIENTS}::test_a_denoiser_checkpointed_as_a_whole_by_its_pipelines_caller_is_refused",
    ),
    Refusal(
        "whole blocks skipped beside a step cache of blocks (first-block cache, MagCache)",
        "SkipLayers: block … cannot be skipped while the step cache … answers for blocks; expected"
        " what='attention', or no such cache",
        f"{CACHES}::test_whole_blocks_are_not_skipped_beside_a_cache_of_blocks",
    ),
    Refusal(
        "batched guidance beside FasterCache",
        "FasterCache takes the batch for an unconditional and a conditional half, but a control"
        " (NAG, or a guide with batched=True) appends rows; switch one of them off",
        f"{CACHES}::test_rows_that_faster_cache_leaves_out_are_not_controlled",
    ),
    Refusal(
        "controls of some rows (NAG, fused guidance) beside FasterCache",
        "…: acts on some rows of the batch, but FasterCache leaves the unconditional ones out of"
        " it; switch one of them off",
        f"{CACHES}::test_rows_that_faster_cache_leaves_out_are_not_controlled",
    ),
    Refusal(
        "a compiled model and the model inside it, attached both",
        "attach: … is attached already, as a part of another object (a compiled model and the model"
        " inside it); attach to the same object",
        f"{COMPILE}::test_a_model_and_its_compiled_wrapper_are_not_attached_together",
    ),
)

INTRO = """\
# What lives beside a session

<!-- made by tests/coexist/test_page.py; UPDATE_README=1 pytest on it writes it anew -->

Where nothing else is said, a line is what CI runs on tiny models of diffusers' own classes, with an
active control, against a plain eager session or attention written out in float64. The last column
names the tests.

| beside `attach` | what happens | `tests/` |
|---|---|---|
"""
REFUSED = """
Refused, each with one sentence:

| what | sentence | `tests/` |
|---|---|---|
"""


def _names(proof: tuple[str, ...]) -> str:
    """Tests file by file, as links would be read."""
    files: dict[str, list[str]] = {}
    for each in proof:
        file, _, function = each.partition("::")
        files.setdefault(file, []).append(f"`{function.removeprefix('test_')}`")
    return "; ".join(f"{file}: {', '.join(found)}" for file, found in files.items())


def page() -> str:
    rows = [f"| {row.what} | {row.how} | {_names(row.proof)} |\n" for row in ROWS]
    refusals = [f"| {r.what} | {r.sentence} | {_names((r.proof,))} |\n" for r in REFUSALS]
    return INTRO + "".join(rows) + REFUSED + "".join(refusals)


@cache
def _functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _text(node: ast.expr) -> str | None:
    """A string in the source, with "…" for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@cache
def _messages() -> set[str | None]:
    """What every ``AttnControlError`` in the package says."""
    found = set()
    for file in (ROOT / "attn_control").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "AttnControlError":
                found.add(_text(node.args[0]))
    return found


def test_the_page_is_made_from_these_rows():
    if os.environ.get("UPDATE_README"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "UPDATE_README=1 pytest this file"


@pytest.mark.parametrize("row", (*ROWS, *REFUSALS), ids=lambda row: row.what)
def test_every_row_names_tests_that_there_are(row):
    for proof in [row.proof] if isinstance(row, Refusal) else row.proof:
        file, _, function = proof.partition("::")
        assert function in _functions(file), proof


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what)
def test_every_sentence_is_the_packages_own_and_its_test_waits_for_it(refusal):
    assert refusal.sentence in _messages()
    file, _, function = refusal.proof.partition("::")
    waits = [
        node.value
        for node in ast.walk(_functions(file)[function])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    said = refusal.sentence.replace(
        "inside a compiled …", "inside a compiled SD3Transformer2DModel"
    )
    assert any(re.search(pattern, said) for pattern in waits), waits
