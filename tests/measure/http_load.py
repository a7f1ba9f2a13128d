"""Clients that ask a served bundle over HTTP, and the processor's time that the answers cost."""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.bundle.folder import TASK_IDS, Bundle
from export.runtime.tokenizer import bundle_tokenizer


@dataclass(frozen=True)
class Load:
    """What clients saw."""

    latencies_ms: tuple[float, ...]
    """Of every answered request."""
    batch_sizes: tuple[int, ...]
    """The same, as the answers tell."""
    errors: int
    """Requests with another status than 200."""
    seconds: float
    """From the first question to the last answer."""


def ask_for(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Ask over HTTP from so many connections, each of which asks again at once; no question begins after ``seconds``."""
    return asyncio.run(_ask_for(url, bodies, clients, seconds))


async def _ask_for(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.rpartition(":")
    latencies_ms: list[float] = []
    batch_sizes: list[int] = []
    errors = 0
    start = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal errors
        # A library for HTTP would take more of the shared cores than the proxy that is measured.
        reader, writer = await asyncio.open_connection(name, int(port))
        turn = number
        while time.perf_counter() - start < seconds:
            body = bodies[turn % len(bodies)]
            turn += clients
            asked = time.perf_counter()
            head = f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            status = await reader.readline()
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(headers.partition(b"content-length:")[2].partition(b"\r")[0])
            answer = await reader.readexactly(length)
            if b" 200 " in status:
                latencies_ms.append(1000 * (time.perf_counter() - asked))
                batch_sizes.append(json.loads(answer)["batch_size"])
            else:
                errors += 1
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*map(client, range(clients)))
    return Load(tuple(latencies_ms), tuple(batch_sizes), errors, time.perf_counter() - start)


KINDS = {
    "ray::ServeReplica:promptfold:Classifier": "replica",
    "ray::ServeReplica:promptfold:Api": "api",
    "ray::ProxyActor": "proxy",
}
"""Kinds of processes, by the names that Ray gives them."""


def cpu_seconds() -> dict[str, float]:
    """The processor's time that each kind of process has had so far; nothing where there is no /proc."""
    seconds = dict.fromkeys(KINDS.values(), 0.0)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
        if kind is not None:
            seconds[kind] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def request_bodies(bundle: Bundle, n_tokens: int, pairs: int, n_bodies: int) -> list[bytes]:
    """Requests of so many pairs, or texts, each, of about so many tokens, of random numbers."""
    generator, task = np.random.default_rng(0), bundle.tasks[0]
    tokenize = bundle_tokenizer(bundle)
    n_texts = len(task.task.text_columns)

    def made_up() -> list[str]:
        words = [str(word) for word in generator.integers(0, 1000, n_tokens)]
        while True:
            texts = [" ".join(words[number::n_texts]) for number in range(n_texts)]
            if len(words) <= n_texts or tokenize([tuple(texts)]).arrays["input_ids"].shape[1] <= n_tokens:
                return texts
            words.pop()

    bodies = []
    for _ in range(n_bodies):
        many = [made_up() for _ in range(pairs)]
        question: dict[str, Any] = {"pairs": many} if n_texts > 1 else {"texts": [text for (text,) in many]}
        bodies.append(json.dumps(question | ({"task": task.name} if TASK_IDS in bundle.inputs else {})).encode())
    return bodies
