"""Kernels run as Python where TRITON_INTERPRET=1 was set before triton was first imported: in a
process of its own, which test_in_a_child.py starts. All others leave those files out.
"""

import os

interpreted = [f"test_interpreted_{what}.py" for what in ("values", "gradients", "compiled")]
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else interpreted
