"""The studio as a Hugging Face Space, or anywhere else that runs one Python file.

A visitor may name the built-in models only; the environment variable STUDIO_ALLOW_HUB=1 opens hub
ids.
"""

import os

from attn_control.studio import Settings
from attn_control.studio.launch import launch

if __name__ == "__main__":
    launch(
        Settings(allow_hub=os.environ.get("STUDIO_ALLOW_HUB") == "1"),
        host="0.0.0.0",
        port=int(os.environ.get("PORT", "7860")),
    )
