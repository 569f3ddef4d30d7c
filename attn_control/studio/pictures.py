"""Reference pictures that visitors upload: pixels alone are kept, under a name made of them."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from typing import Any

from attn_control.studio.settings import Refused, Settings
from attn_control.studio.uploads import picture_of_upload


class Pictures:
    """The pictures of a studio as PNG, in memory; those unused for longest go where there are many.

    A picture's name is also that of its file in a job: "reference-0123456789abcdef.png".
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, raw: bytes) -> str:
        """Check an uploaded file and keep it; its name. Raises Refused at "picture"."""
        return self._keep(picture_of_upload(raw, self.settings))

    def draw(self, texture: str, seed: int) -> str:
        """The same for a reference that the fixed prompts of shapes-flux have."""
        from PIL import Image

        from attn_control.zoo.references import draw_reference

        return self._keep(Image.fromarray(draw_reference(texture, seed)))

    def _keep(self, picture: Any) -> str:
        digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
        file = io.BytesIO()
        picture.save(file, "PNG")
        name = f"reference-{digest[:16]}.png"
        with self._lock:
            self._kept[name] = file.getvalue()
            self._kept.move_to_end(name)
            while sum(map(len, self._kept.values())) > self.settings.pictures:
                self._kept.popitem(last=False)
        return name

    def known(self, name: Any) -> bool:
        """Whether it is kept."""
        with self._lock:
            return name in self._kept

    def read(self, name: str) -> bytes:
        """The PNG. Raises Refused at "picture" where it is not kept any more."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        raise Refused("picture", "this picture is not kept any more: upload it again")
