"""Make the environment that the Makefile and CI work in, then run a command inside it.

    python scripts/setup_env.py --torch auto --extra dev -- -m pytest

PyTorch is the reason for this file: on Linux the index that pip asks first serves only the CUDA
build, gigabytes that a machine without a GPU cannot use. Standard library only, and no syntax
newer than Python 3.6, so that an old interpreter gets a sentence instead of a traceback.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAMP = ".attn-control-setup.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Windows gets its CUDA build from PyTorch's own index; its default index has the CPU build.
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"

# Megabytes to download, measured with `pip download` on Linux x86_64 in November 2026 with the
# versions of constraints.txt. The CUDA build is an estimate: 527 are torch itself.
MB_TORCH = {"cpu": 190, "cuda": 2500}
MB_OTHERS = {"Linux": 460, "Darwin": 200, "Windows": 200}  # on Linux 285 of them are triton
MB_EXTRA = {"dev": 84}  # 54 of them are playwright

# flavour: cpu, cuda or keep. attempts: the pip arguments to try, in order, until one succeeds.
Torch = namedtuple("Torch", "flavour attempts why")


def gpu_seen(exists=os.path.exists, which=shutil.which, run=subprocess.call):
    """nvidia, amd or None: by what the drivers leave behind, since torch is not here yet."""
    if exists("/dev/nvidia0") or exists("/proc/driver/nvidia/gpus"):
        return "nvidia"
    smi = which("nvidia-smi")
    # Images for GPU servers carry the command on machines that have no GPU: ask it.
    if smi and run([smi, "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
        return "nvidia"
    if exists("/dev/kfd") or which("rocminfo"):
        return "amd"
    return None


def resolve(choice, version, system, gpu):
    """What TORCH=auto|cpu|cuda|keep means on this machine, as a Torch."""
    if choice == "keep":
        return Torch("keep", [], "TORCH=keep: the torch of the environment in use stays")
    flavour, why = choice, f"TORCH={choice}"
    if choice == "auto":
        flavour = "cuda" if gpu == "nvidia" and system != "Darwin" else "cpu"
        why += ": an NVIDIA GPU is seen" if flavour == "cuda" else ": no NVIDIA GPU is seen"
    if system == "Darwin" and flavour == "cuda":
        raise SystemExit("TORCH=cuda: PyTorch has no CUDA build for macOS. Use TORCH=auto.")
    plain = f"torch=={version}"
    if flavour == "cpu" and system == "Linux":
        # "+cpu" cannot match the CUDA build, so the first attempt finds a local wheel or a mirror
        # and otherwise ends within seconds, before anything large is fetched. Without the
        # dependencies, which PyTorch's index need not serve.
        cpu = ["--no-deps", plain + "+cpu"]
        return Torch("cpu", [cpu, cpu + ["--index-url", CPU_INDEX]], why)
    if flavour == "cuda" and system == "Windows":
        return Torch("cuda", [["--no-deps", plain, "--index-url", CUDA_INDEX]], why)
    return Torch(flavour, [[plain]], why)


def size_line(torch, extras, system, torch_there=False):
    """Said before the download: how much, and what most of it is."""
    others = MB_OTHERS.get(system, 250) + sum(MB_EXTRA.get(extra, 100) for extra in extras)
    total, parts = others, []
    if torch.flavour != "keep" and not torch_there:
        total += MB_TORCH[torch.flavour]
        parts.append(f"{MB_TORCH[torch.flavour]} PyTorch for {torch.flavour.upper()}")
    if system == "Linux":
        parts.append("285 triton")
    listed = f", of which {', '.join(parts)}" if parts else ""
    return f"Download: about {total} MB{listed}; less where pip has some of it already."


def pins(path):
    """{name: version} of a constraints file."""
    with open(path) as file:
        lines = [line.split("#")[0].strip() for line in file]
    return dict(line.split("==") for line in lines if line)


def constraints_for(flavour, python):
    """The pins that fit: only torch's on Python 3.10, no triton beside a CUDA torch's own."""
    found = pins(os.path.join(ROOT, "constraints.txt"))
    if python < (3, 11):
        found = {"torch": found["torch"]}
    if flavour == "cuda":
        found.pop("triton", None)
    return found


def ask(python, code):
    """What `code` prints under `python`, or None where it cannot run."""
    try:
        return subprocess.check_output([python, "-c", code], stderr=subprocess.DEVNULL).decode()
    except (OSError, subprocess.CalledProcessError):
        return None


def torch_in(python):
    """The version of torch there, with its +cpu or +cu130, or None."""
    return ask(python, "from importlib.metadata import version as v; print(v('torch'), end='')")


def make_venv(venv):
    """The Python of a working environment at `venv`: left alone, mended, or made anew."""
    python = os.path.join(venv, *(["Scripts", "python.exe"] if os.name == "nt" else ["bin/python"]))
    if ask(python, "import pip") is not None:
        return python
    if ask(python, "") is not None and subprocess.call([python, "-m", "ensurepip"]) == 0:
        return python
    if os.path.isdir(venv) and os.listdir(venv):
        if not os.path.exists(os.path.join(venv, "pyvenv.cfg")):
            raise SystemExit(f"{venv} exists and is no virtual environment: move it away.")
        print(f"{venv} is half-made: making it anew.", flush=True)
    if subprocess.call([sys.executable, "-m", "venv", "--clear", venv]):
        raise SystemExit(
            f"{sys.executable} could not make a virtual environment (on Debian and Ubuntu: apt "
            "install python3-venv). Or activate one of your own and use TORCH=keep."
        )
    return python


def pip(python, arguments, quiet_errors=False):
    env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")
    print("+ pip install", " ".join(arguments), flush=True)
    errors = subprocess.DEVNULL if quiet_errors else None
    command = [python, "-m", "pip", "install"] + arguments
    return subprocess.call(command, env=env, stderr=errors, cwd=ROOT) == 0


def install_torch(python, torch, version, explicit):
    """Put torch there, unless the right one is there already."""
    there = torch_in(python) or ""
    # An explicit cpu or cuda replaces the other build on Linux; auto takes what it finds.
    replace = explicit and platform.system() == "Linux"
    replace = replace and there.endswith("+cpu") != (torch.flavour == "cpu")
    if there.split("+")[0] == version and not replace:
        return
    for number, arguments in enumerate(torch.attempts, 1):
        last = number == len(torch.attempts)
        if pip(python, (["--force-reinstall"] if there else []) + arguments, not last):
            return
        if not last:
            print("Not in the sources that pip is set up with: asking PyTorch's own index.")
    raise SystemExit(
        f"PyTorch {version} for {torch.flavour.upper()} could not be installed under Python "
        f"{platform.python_version()}. Ways out: another Python (make PYTHON=python3.11), "
        f"TORCH=cuda (about {MB_TORCH['cuda']} MB), or a torch that you install yourself, in an "
        "environment of your own, and TORCH=keep."
    )


def fingerprint(flavour, target):
    """Changes when what would be installed changes; the stamp holds the last one that worked."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return f"{digest.hexdigest()[:16]} {flavour} {target}"


def packages(target, extras):
    """The arguments that install this package: editable from the checkout, or a given wheel."""
    suffix = f"[{','.join(extras)}]" if extras else ""
    return ["-e", "." + suffix] if target == ROOT else [target + suffix]


def install(args, torch, version):
    """Bring the environment up to date and return its Python."""
    target = os.path.abspath(args.target) if args.target else ROOT
    keep = torch.flavour == "keep"
    python = sys.executable if keep else make_venv(os.path.abspath(args.venv))
    stamp = os.path.join(sys.prefix if keep else args.venv, STAMP)
    mark = fingerprint(torch.flavour, target)
    try:
        with open(stamp) as file:
            before = json.load(file)
    except (OSError, ValueError):
        before = {}
    known = before["extras"] if before.get("mark") == mark else None
    if known is not None and set(args.extra) <= set(known):
        return python
    extras = sorted(set(args.extra) | set(known or []))

    there = torch_in(python)
    if keep and there is None:
        raise SystemExit(
            f"TORCH=keep: {python} has no torch. Install the build you want there, or leave "
            "TORCH away: then .venv is made, with a build that fits this machine."
        )
    print(torch.why + ".")
    print(size_line(torch, extras, platform.system(), bool(there)), flush=True)
    if keep:
        wanted = {"torch": there}
    else:
        wanted = constraints_for(torch.flavour, sys.version_info)
        install_torch(python, torch, version, explicit=args.torch != "auto")
    with tempfile.TemporaryDirectory() as folder:
        limits = os.path.join(folder, "constraints.txt")
        with open(limits, "w") as file:
            file.writelines(f"{name}=={pin}\n" for name, pin in sorted(wanted.items()))
        if not pip(python, packages(target, extras) + ["-c", limits]):
            raise SystemExit("The installation stopped, see above. Run it again to go on.")
    try:
        with open(stamp, "w") as file:
            json.dump({"mark": mark, "extras": extras}, file)
    except OSError:
        pass  # an environment that only root may write to: pip looks again next time
    return python


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default="auto", choices=["auto", "cpu", "cuda", "keep"])
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"))
    parser.add_argument("--extra", action="append", default=[], help="of pyproject.toml")
    parser.add_argument("--target", help="a wheel to install in place of this checkout")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("command", nargs="*", help="after --: arguments of the Python made ready")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if sys.version_info < (3, 10):  # noqa: UP036  pip has not checked it yet
        raise SystemExit(
            f"attn-control needs Python 3.10 or newer; {sys.executable} is "
            f"{platform.python_version()}. Name another one: make PYTHON=python3.11"
        )
    version = pins(os.path.join(ROOT, "constraints.txt"))["torch"]
    gpu = gpu_seen() if args.torch == "auto" else None
    torch = resolve(args.torch, version, platform.system(), gpu)
    if gpu == "amd":
        print(
            "AMD GPU seen, but pip's default index has no build for it, so the CPU build goes in."
        )
        print("To use it: install torch from PyTorch's ROCm index yourself, then TORCH=keep.")
    if args.dry_run:
        print(torch.why + ".")
        print(size_line(torch, args.extra, platform.system()))
        for arguments in torch.attempts + [packages(args.target or ROOT, args.extra)]:
            print("would run: pip install", " ".join(arguments))
        return 0
    python = install(args, torch, version)
    return subprocess.call([python] + args.command) if args.command else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
