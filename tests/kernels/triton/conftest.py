"""Kernels run as Python where TRITON_INTERPRET=1 was set before triton was first imported: in a
process of its own, which test_in_a_child.py starts. All others leave those files out.
"""

import os
from pathlib import Path

interpreted = [path.name for path in Path(__file__).parent.glob("test_interpreted_*.py")]
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else interpreted
