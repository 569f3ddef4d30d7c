"""Which models a visitor may name, and the loaded ones, which stay loaded between runs."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.render.job import ModelSpec
from attn_control.render.models import ModelChoice, choose_model, fingerprint, load_model
from attn_control.studio.facts import Facts, facts_of
from attn_control.studio.settings import Refused, Settings

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def allowed(name: Any, settings: Settings) -> str:
    """The model as a job may name it: built in, a folder inside the operator's, perhaps a hub id.

    One sentence for all that is refused, whether it exists or not: a page tells nobody what lies on
    the disk.

    Raises:
        Refused: at "model".
    """
    if not isinstance(name, str) or not name.strip():
        raise Refused("model", f"choose a model; built in: {', '.join(zoo.NAMES)}")
    name = name.strip()
    if name in zoo.NAMES:
        return name
    folder = _folder(name, settings)
    if folder is not None:
        return str(folder)
    if settings.allow_hub and _HUB_ID.fullmatch(name) and ".." not in name and not _here(name):
        return name
    others = ["a folder inside those that the operator opened"] if settings.folders else []
    others += ["a hub id such as owner/name"] if settings.allow_hub else []
    told = f", {' or '.join(others)}" if others else "; this studio opens no other"
    raise Refused("model", f"{name!r:.90} is no model of this studio: {', '.join(zoo.NAMES)}{told}")


def _folder(name: str, settings: Settings) -> Path | None:
    """The real folder of that name, if it lies inside one of the operator's."""
    for root in settings.folders:
        try:
            found = (root / name).resolve()  # an absolute name stays as it is
            inside = found.is_relative_to(root.resolve()) and found.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, a loop of links
            continue
        if inside:
            return found
    return None


def _here(name: str) -> bool:
    """Whether a job would read a folder of that name before it looks at the hub."""
    return Path(name).exists()


class Shelf:
    """Loaded pipelines: every built-in one, and the last of all others. Used by one thread."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._pipes: dict[ModelChoice, Any] = {}
        self._weights: dict[ModelChoice, dict[str, Any]] = {}
        self._facts: dict[str, Facts] = {}
        self._lock = threading.Lock()

    def choose(self, name: Any) -> ModelChoice:
        """What a job on this page would load. Raises Refused at "model"."""
        try:
            return choose_model(ModelSpec(name=allowed(name, self.settings), **self.device))
        except Refused:
            raise
        except AttnControlError as error:
            raise Refused("model", str(error)) from None

    @property
    def device(self) -> dict[str, str]:
        """The operator's device as a job names it; a job that names none takes the best there."""
        return {} if self.settings.device == "auto" else {"device": self.settings.device}

    def load(self, choice: ModelChoice) -> Any:
        """The pipeline, loaded at most once while it is on the shelf."""
        with self._lock:
            if choice not in self._pipes:
                if choice.kind != "zoo":
                    for other in [each for each in self._pipes if each.kind != "zoo"]:
                        del self._pipes[other]
                self._pipes[choice] = load_model(choice)
            return self._pipes[choice]

    def identify(self, choice: ModelChoice) -> dict[str, Any]:
        """What names the weights; read once for each pipeline, since large ones take minutes."""
        if choice not in self._weights:
            self._weights[choice] = fingerprint(choice)
        return self._weights[choice]

    def known(self, name: Any) -> Facts | None:
        """The facts of a model that was loaded before. Raises Refused at "model"."""
        return self._facts.get(allowed(name, self.settings))

    def facts(self, name: Any) -> Facts:
        """Of a model, which is loaded for it the first time.

        Raises:
            Refused: at "model": not allowed here, or it cannot be loaded or controlled.
        """
        choice = self.choose(name)
        known = self._facts.get(choice.name)
        if known is None:
            try:
                known = facts_of(choice, self.load(choice))
            except AttnControlError as error:
                raise Refused("model", str(error)) from None
            self._facts[choice.name] = known
        return known
