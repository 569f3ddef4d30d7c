"""`python -m attn_control` is `attn-control`."""

from attn_control.cli import app

if __name__ == "__main__":
    app()
