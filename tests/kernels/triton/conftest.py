"""Kernels run as Python where TRITON_INTERPRET=1 was set before triton was first imported: in a
process of its own, which test_in_a_child.py starts. All others leave those files out.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_interpreted_*.py"]
