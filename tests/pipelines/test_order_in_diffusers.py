"""Which branch comes first, read off the source of every pipeline that diffusers exports.

A row of ``families/`` says it once for all pipelines of a denoiser; here each pipeline is asked.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import diffusers
import pytest

from attn_control.families import FAMILIES
from attn_control.families.pipelines import BRANCHES

CFG = {family.denoiser: family.cfg for family in FAMILIES}
COMPONENTS = ("transformer", "unet")


@functools.lru_cache(None)
def pipelines() -> dict[str, tuple[str, ast.ClassDef]]:
    """Pipelines of denoisers that have a row: how it says that guidance is run, and the source,
    which is read and not imported: all pipelines at once take half a minute.
    """
    exported, found = set(diffusers._import_structure["pipelines"]), {}
    for path in sorted(Path(diffusers.__file__).parent.glob("pipelines/**/pipeline_*.py")):
        text = path.read_text(encoding="utf-8")
        if not any(denoiser in text for denoiser in CFG):
            continue
        for body in ast.parse(text).body:
            if isinstance(body, ast.ClassDef) and body.name in exported:
                rows = {CFG[denoiser] for denoiser in given_to(body) & set(CFG)}
                if len(rows) == 1:
                    found[body.name] = rows.pop(), body
    return found


def given_to(body: ast.ClassDef) -> set[str]:
    """Names in the annotations of the denoiser among a pipeline's components."""
    for node in body.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            given = [a.annotation for a in node.args.args if a.arg in COMPONENTS and a.annotation]
            return {n.id for a in given for n in ast.walk(a) if isinstance(n, ast.Name)}
    return set()


def negative(node: ast.AST) -> bool:
    return any(word in ast.unparse(node) for word in ("neg", "uncond"))


def text_of(call: ast.Call) -> ast.AST:
    """The text that the denoiser is called with, or the whole call."""
    texts = [k.value for k in call.keywords if k.arg == "encoder_hidden_states"]
    return texts[0] if texts else call


def denoiser_calls(body: ast.ClassDef) -> list[ast.Call]:
    names = {f"self.{part}" for part in COMPONENTS} | {"current_model", "transformer"}
    calls = (node for node in ast.walk(body) if isinstance(node, ast.Call))
    return sorted((c for c in calls if ast.unparse(c.func) in names), key=lambda c: c.lineno)


def test_there_are_pipelines_to_ask():
    kinds = [cfg for cfg, _ in pipelines().values()]
    assert kinds.count("split") > 60 and kinds.count("batched") > 60
    twice = [n for n, (cfg, body) in pipelines().items() if len(denoiser_calls(body)) > 1]
    assert {"FluxPipeline", "WanPipeline", "QwenImagePipeline", "ChromaPipeline"} <= set(twice)


@pytest.mark.parametrize("name", [n for n, (cfg, _) in pipelines().items() if cfg == "split"])
def test_of_two_calls_the_conditional_comes_first(name):
    calls = denoiser_calls(pipelines()[name][1])
    assert not calls or not negative(text_of(calls[0])), ast.unparse(calls[0])


def test_of_one_call_the_conditional_rows_come_last_but_where_the_table_says_otherwise():
    odd = set()
    for name, (cfg, body) in pipelines().items():
        if cfg != "batched":
            continue
        for node in ast.walk(body):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.cat":
                continue
            parts = node.args[0].elts if node.args and isinstance(node.args[0], ast.List) else []
            texts = [ast.unparse(part) for part in parts]
            if len(texts) > 1 and all("prompt_embeds" in text for text in texts):
                if any(map(negative, parts)) and not negative(parts[0]):
                    odd.add(name)
    assert odd == {name for name in BRANCHES if hasattr(diffusers, name)}
