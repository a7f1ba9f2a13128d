"""Clients that ask a served bundle over HTTP, and the processor's time that the answers cost."""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from export.bundle.folder import TASK_IDS, Bundle
from export.runtime.tokenizer import bundle_tokenizer
from train.common.errors import EngineError

KINDS = {
    "ray::ServeReplica:promptfold:Classifier": "replica",
    "ray::ServeReplica:promptfold:Api": "api",
    "ray::ProxyActor": "proxy",
}
"""Kinds of processes, by the names that Ray gives them."""


def ask_for(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> dict[str, float]:
    """Ask over HTTP from so many connections, each of which asks again at once; no question begins after ``seconds``.

    ``batch_size`` is the mean over the requests: how many texts shared their run of the graph, at most; ``errors`` are
    requests with another status than 200.
    """
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.rpartition(":")
    head = f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    latencies_ms: list[float] = []
    batch_sizes: list[int] = []
    n_asked, start = 0, time.perf_counter()

    async def client(number: int) -> None:
        nonlocal n_asked
        # A library for HTTP would take more of the shared cores than the proxy that is measured.
        reader, writer = await asyncio.open_connection(name, int(port))
        turn = number
        while time.perf_counter() - start < seconds:
            body = bodies[turn % len(bodies)]
            turn, n_asked, asked = turn + clients, n_asked + 1, time.perf_counter()
            writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
            status = await reader.readline()
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            answer = await reader.readexactly(int(headers.partition(b"content-length:")[2].partition(b"\r")[0]))
            if b" 200 " in status:
                latencies_ms.append(1000 * (time.perf_counter() - asked))
                batch_sizes.append(json.loads(answer)["batch_size"])
        writer.close()
        await writer.wait_closed()

    async def ask_all() -> None:
        await asyncio.gather(*map(client, range(clients)))

    asyncio.run(ask_all())
    took = time.perf_counter() - start
    if not latencies_ms:
        raise EngineError(f"None of {clients} clients was answered within {seconds:g} s. Give more --seconds.")
    p50_ms, p95_ms = map(float, np.percentile(latencies_ms, [50, 95]))
    figures = {"answers": len(latencies_ms), "errors": n_asked - len(latencies_ms), "seconds": took}
    return figures | {"p50_ms": p50_ms, "p95_ms": p95_ms, "batch_size": statistics.fmean(batch_sizes)}


def cpu_seconds() -> dict[str, float]:
    """The processor's time that each kind of process has had so far."""
    seconds = dict.fromkeys(KINDS.values(), 0.0)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        name, times = (process.info["cmdline"] or [""])[0], process.info["cpu_times"]
        kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
        if kind is not None and times is not None:
            seconds[kind] += times.user + times.system
    return seconds


def request_bodies(bundle: Bundle, n_tokens: int, pairs: int, n_bodies: int) -> list[bytes]:
    """Requests of so many pairs, or texts, each, of about so many tokens, of random numbers."""
    generator, task = np.random.default_rng(0), bundle.tasks[0]
    tokenize, n_texts = bundle_tokenizer(bundle), len(task.task.text_columns)

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
