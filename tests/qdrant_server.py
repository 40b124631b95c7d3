"""A Qdrant server for tests: a program started and ended here, or a user's, where only what is named is touched."""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

PATIENCE = 60.0  # seconds until it is ready


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Address and process of a server on free ports of this machine, with its files in a temporary folder.

    Args:
        command: A Qdrant binary (QDRANT_BIN), or a program that takes the same variables.
    """
    http, grpc = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="tvrn-qdrant-") as folder:
        settings = {
            "SERVICE__HOST": "127.0.0.1", "SERVICE__HTTP_PORT": http, "SERVICE__GRPC_PORT": grpc,
            "STORAGE__STORAGE_PATH": f"{folder}/storage", "STORAGE__SNAPSHOTS_PATH": f"{folder}/snapshots",
            "TELEMETRY_DISABLED": "true",
        }  # fmt: skip
        environment = {**os.environ, **{f"QDRANT__{name}": str(value) for name, value in settings.items()}}
        said = Path(folder) / "log.txt"
        with said.open("wb") as log:
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            try:
                _wait(f"http://127.0.0.1:{http}/readyz", process, said)
                yield f"http://127.0.0.1:{http}", process
            finally:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with contextlib.ExitStack() as stack:  # all open at once, so that they differ
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _wait(address: str, process: "subprocess.Popen[bytes]", said: Path) -> None:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    state = "is not ready" if process.poll() is None else f"ended with {process.returncode}"
    raise RuntimeError(f"{process.args} {state}: {said.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def own_collection(client: Any) -> Iterator[str]:
    """A collection's name that nobody else has; what was made under it is removed at the end, and nothing else."""
    name = f"tvrn-test-{uuid4().hex[:12]}"
    try:
        yield name
    finally:
        for each in client.get_collections().collections:
            if each.name.startswith(name):
                client.delete_collection(each.name)
