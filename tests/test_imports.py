"""The house rules that no type checker sees: who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attn_control"

# Top to bottom, as in DESIGN.md ("The house"): a module imports its own level and those below.
# A new module or folder of attn_control/ has to be placed here first.
LEVELS = [
    ("cli", "__main__", "doctor"),
    ("studio",),
    ("eval",),
    ("search",),
    ("calibrate",),
    ("render",),
    # What DESIGN.md calls attach.py: a module of that name would shadow the function.
    (
        "session",
        "preview",
        "foresight",
        "entry",
        "denoiser",
        "appended",
        "phases",
        "bypass",
        "steps",
        "swapped",
        "report",
    ),
    ("caches", "recompute"),
    ("branches",),
    # Not presets.py: a module of that name would shadow attn_control.presets().
    ("catalog",),
    ("guidance",),
    ("intercept", "interface", "softmax", "parallel"),
    ("families", "layouts"),
    ("processors",),
    ("maps",),
    ("metrics",),
    ("zoo",),
    ("select",),
    ("kernels",),
    ("plan",),
    ("ledger",),
    ("state", "policy"),
    ("masks",),
    ("call",),
    ("errors",),
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
# What attn_control/__init__.py hands on, and where it comes from.
HANDED = {
    "attach": "session",
    "Session": "session",
    "preset": "catalog",
    "presets": "catalog",
    "AttnControlError": "errors",
}
# The only calls up, each for a reason, each inside a function.
EXCEPTIONS = {
    # Control.processors(model) is the user's handle; only intercept knows what diffusers wants.
    ("processors/control.py", "intercept"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, root: Path = PACKAGE) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, inside functions and TYPE_CHECKING too."""
    package = (root.name, *path.relative_to(root).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            # `from attn_control import plan` names a module; `from attn_control.plan import Plan`
            # names a class: both lead to attn_control.plan once the first two parts are read.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func).rpartition(".")[2]
            value = node.args[0].value
            if name in ("import_module", "__import__") and isinstance(value, str):
                dots = len(value) - len(value.lstrip("."))
                base = ".".join(package[: len(package) - dots + 1]) + "." if dots else ""
                found.append((node.lineno, base + value.lstrip(".")))
    return found


def house(name: str) -> str | None:
    """`plan` for attn_control.plan.Plan; None for what is not ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == "attn_control" and len(parts) > 1 else None


def upward(path: Path, root: Path = PACKAGE) -> list[str]:
    """What is wrong with the imports of one file, one sentence each."""
    mine = path.relative_to(root).parts[0].removesuffix(".py")
    wrong = []
    for line, name in imports(path, root):
        other = house(name)
        where = f"{path.relative_to(root.parent)}:{line}"
        if other is None:
            continue
        other = HANDED.get(other, other)
        if mine == "__init__":
            if other not in HANDED.values():
                wrong.append(f"{where}: attn_control/__init__.py hands on no more than {[*HANDED]}")
        elif other == "__version__":
            continue
        elif other not in LEVEL:
            wrong.append(f"{where}: {name} has no place in LEVELS of tests/test_imports.py")
        elif (path.relative_to(root).as_posix(), other) in EXCEPTIONS:
            if re.search(
                rf"^(?:from|import) .*\b{other}\b", path.read_text(encoding="utf-8"), re.M
            ):
                wrong.append(f"{where}: import {other} inside the function that needs it")
        elif LEVEL[other] < LEVEL[mine]:
            wrong.append(f"{where}: {mine} imports {other}, which stands above it in the house")
    return wrong


def test_every_module_has_a_place():
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    found = {name for name in found if (PACKAGE / name / "__init__.py").exists()} | {
        path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"
    }
    homeless = sorted(found - set(LEVEL))
    assert not homeless, f"place them in LEVELS of tests/test_imports.py: {homeless}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_only_go_down(path):
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert top == "__init__" or top in LEVEL, f"place {top} in LEVELS of tests/test_imports.py"
    wrong = upward(path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("from ..session import Session", "imports session"),
        ("from .. import cli", "imports cli"),
        ("def f():\n    import attn_control.render.job", "imports render"),
        ("from attn_control import Session", "imports session"),
        ("import importlib\nimportlib.import_module('..guidance', __package__)", "guidance"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import eval", "eval"),
        ("from .. import brand_new", "no place"),
        ("from ..call import Call\nfrom . import pattern\nimport torch", None),
    ],
)
def test_the_test_sees_each_way_to_import(tmp_path, text, fault):
    path = tmp_path / "attn_control" / "masks" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    wrong = upward(path, tmp_path / "attn_control")
    assert (fault is None and not wrong) or (len(wrong) == 1 and fault in wrong[0]), wrong


def test_the_package_itself_attaches_lazily():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:  # functions and `if TYPE_CHECKING` run nothing at import
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            text = ast.unparse(node)
            assert "session" not in text, f"{text}: import it inside __getattr__"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/__init__.py")), ids=ids)
def test_an_init_only_hands_names_on(path):
    if PACKAGE / "zoo" in (path.parent, *path.parents):
        return  # folders of data: the few functions that load it live beside it
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
            assert lazy, f"{ids(path)}:{node.lineno}: {node.name} belongs in a module of its own"


def test_only_families_and_the_zoo_name_a_model():
    """A model that needs its name in a code path would need that path again in every release."""
    model = re.compile(r"\b(?:[A-Z]\w*)?(?:Transformer|UNet|DiT|UVit)(?:\w*Model|[23]D)\b")
    named = []
    for path in FILES:
        top = path.relative_to(PACKAGE).parts[0]
        if top in ("families", "zoo"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = set()  # strings that stand alone are docstrings: they may explain
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                prose.add(node.value)
        for node in ast.walk(tree):
            words = [getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")]
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.append("" if node in prose else node.value)
            named += [
                f"{ids(path)}:{node.lineno}: {match.group()}"
                for word in words
                if isinstance(word, str)
                for match in model.finditer(word)
            ]
    assert not named, "models are data of families/:\n" + "\n".join(named)


def foreign(folder: str, forbidden: str) -> list[str]:
    return [
        f"{ids(path)}:{line}: {name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for line, name in imports(path)
        if f"{name}.".startswith(f"{forbidden}.")
    ]


def test_masks_know_no_torch_module():
    # torch keeps flex_attention, which is no module, among its modules.
    flex = "torch.nn.attention.flex_attention"
    assert not [line for line in foreign("masks", "torch.nn") if not line.endswith(flex)]


def test_kernels_know_no_diffusers():
    assert not foreign("kernels", "diffusers")


# ---- what an import costs, each in a fresh interpreter

# Makes packages absent, as on a machine that never had them: no finder finds them.
ABSENT = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in {names!r}:
            return super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def python(code: str, *paths: Path, **kwargs) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cpu_seconds(arguments: list[str]) -> float:
    """Processor time of the best of three runs: what a wall clock shows on an idle machine."""
    code = (
        "import resource, subprocess, sys\n"
        f"subprocess.run([sys.executable, *{arguments!r}], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    return min(float(python(code, cwd=ROOT)) for _ in range(3))


def test_importing_is_light():
    loaded = python("import sys, attn_control; print(*sys.modules, sep='\\n')").split()
    heavy = ("triton", "transformers", "gradio", "diffusers.models", "diffusers.pipelines")
    found = [name for name in loaded if f"{name}.".startswith(tuple(f"{h}." for h in heavy))]
    assert not found


def test_importing_is_quick():
    assert cpu_seconds(["-c", "import attn_control"]) < 2


def test_works_without_triton_and_the_extras():
    code = ABSENT.format(names=("triton", "gradio", "ray", "spacy"))
    code += "from attn_control import attach, processors; print(callable(attach))"
    assert python(code) == "True"


def test_hugging_face_kernels_stay_visible(tmp_path):
    """A top-level `kernels` of ours would shadow theirs, and diffusers would not import."""
    theirs = tmp_path / "site" / "kernels"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text("MARK = 'theirs'\n")
    # -c puts the working directory first on sys.path, before PYTHONPATH.
    code = "import attn_control, kernels; print(kernels.MARK)"
    assert python(code, theirs.parent, cwd=ROOT) == "theirs"
    assert not (ROOT / "kernels").exists() and not (ROOT / "kernels.py").exists()
