"""One worker a core, each with one thread: barriers inside small operations cost more than they
save, and a busy neighbour would hold up all threads at each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from attn_control.kernels.tiles.scratch import Scratch

Unit = TypeVar("Unit")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """torch's operations on one thread, in this thread and (because MKL's number is the process's)
    in others; afterwards as before.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def work(
    units: Sequence[Unit], cost: Callable[[Unit], float], do: Callable[[Unit, Scratch], None]
) -> None:
    """``do`` every unit, on as many workers as torch has threads, the costliest first.

    Units must not depend on one another. An error in one is raised here, after the others' end.
    """
    workers = min(torch.get_num_threads(), len(units))
    queue = iter(sorted(units, key=cost, reverse=True))  # next() on it is atomic

    def worker() -> None:
        scratch = Scratch()
        with torch.inference_mode():  # no graph, and no version counts
            for unit in queue:
                do(unit, scratch)

    if workers <= 1:
        worker()
        return
    with one_thread_each():
        # Threads as young as the call: nothing to keep over a fork, or to end with the process.
        with ThreadPoolExecutor(
            workers, "attn_control", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for done in [pool.submit(worker) for _ in range(workers)]:
                done.result()
