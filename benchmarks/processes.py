"""Several processes of this machine that see each other as those of torchrun do."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def environments(world: int) -> list[dict[str, str]]:
    """What torchrun would set for each of `world` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def together(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call work(*arguments), a module-level function, in `world` new processes. Raises OSError if one of them fails."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_call, args=(each, work, arguments)) for each in environments(world)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise OSError("a process of the measurement failed; its message is above")


def _call(environment: dict[str, str], work: Callable[..., None], arguments: tuple) -> None:
    os.environ.update(environment)
    work(*arguments)
