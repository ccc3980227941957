"""A server with OpenAI's interface that runs no model: its tokens come by a schedule, and it has the faults that a
test asks for. A program of its own, which prints its port; `running` starts it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass
class Behaviour:
    """first, gap: seconds until the first chunk and between chunks. chunk: tokens of a chunk. usage: what it says of
    tokens: "each" (if asked), "last", "never". known: fields that it takes; others are refused with `refusal`. key:
    that it wants. max_running: requests at once; more get 429, with Retry-After if polite. die_after: requests after
    which it ends. cut_after: chunks after which a stream is cut. silent: chunks without text until one has some.
    texts: it takes no token ids."""

    first: float = 0.0
    gap: float = 0.0
    chunk: int = 1
    usage: str = "each"
    known: list[str] | None = None
    refusal: int = 400
    key: str | None = None
    models: list[str] = field(default_factory=lambda: ["fake"])
    max_model_len: int | None = 4096
    max_running: int | None = None
    polite: bool = True
    die_after: int | None = None
    cut_after: int | None = None
    error_after: int | None = None
    silent: int = 0
    texts: bool = False
    ids: bool = False
    done: bool = True
    accept_bad: bool = False


@contextmanager
def running(nice: int = 0, **behaviour: object) -> Iterator[str]:
    """Give the address of a server that behaves so, on a port of the loopback that the kernel chose. nice: its
    priority."""
    told = json.dumps(asdict(Behaviour(**behaviour)))  # type: ignore[arg-type]
    process = subprocess.Popen([sys.executable, __file__, told], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        if nice:
            os.setpriority(os.PRIO_PROCESS, process.pid, nice)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


class Fake:
    def __init__(self, behaviour: Behaviour) -> None:
        self.b, self.running, self.seen = behaviour, 0, []

    def app(self):
        from aiohttp import web

        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/seen", self.tell_seen)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        return app

    async def health(self, request):
        from aiohttp import web

        return web.Response(text="ok")

    async def models(self, request):
        from aiohttp import web

        if self.b.key is not None and request.headers.get("Authorization") != f"Bearer {self.b.key}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        longest = {} if self.b.max_model_len is None else {"max_model_len": self.b.max_model_len}
        return web.json_response({"data": [{"id": name, **longest} for name in self.b.models]})

    async def metrics(self, request):
        from aiohttp import web

        return web.Response(text=f'# TYPE a gauge\nvllm:num_requests_running{{model="fake"}} {self.running}.0\n')

    async def tell_seen(self, request):
        from aiohttp import web

        return web.json_response(self.seen)

    async def answer(self, request):
        from aiohttp import web

        received = time.perf_counter()
        b = self.b
        try:
            body = json.loads(await request.read())
            tokens, prompt = body["max_tokens"], body.get("prompt", body.get("messages"))
            assert isinstance(tokens, int) and tokens > 0 and prompt
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError, AttributeError):
            status = 200 if b.accept_bad else 400
            return web.json_response({"error": {"message": "this is no request"}}, status=status)
        times = []
        self.seen.append({"body": body, "received": received, "times": times})
        size = len(prompt)
        if b.max_model_len is not None and size + tokens > b.max_model_len:
            return web.json_response({"error": {"message": "too long"}}, status=400)
        unknown = sorted(set(body) - set(b.known)) if b.known is not None else []
        options = body.get("stream_options", {})
        if unknown or (b.texts and not isinstance(prompt, str)):
            return web.json_response({"detail": f"unknown: {unknown}"}, status=b.refusal)
        if b.max_running is not None and self.running >= b.max_running:
            headers = {"Retry-After": "2"} if b.polite else {}
            return web.json_response({"error": {"message": "busy"}}, status=429, headers=headers)
        if b.die_after is not None and len(self.seen) > b.die_after:
            sys.exit(3)
        self.running += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await self._stream(response, received, size, tokens, "messages" in body, options, times)
        except ConnectionResetError:
            pass  # its client has left
        finally:
            self.running -= 1
        return response

    async def _stream(self, response, begin, size, tokens, chat, options, times):
        b, sent, number = self.b, 0, 0
        usage = {"prompt_tokens": size, "completion_tokens": 0, "total_tokens": size}
        while sent < tokens:
            count = min(b.chunk, tokens - sent)
            text = "" if number % (b.silent + 1) < b.silent else "x" * count
            sent += count
            finish = "length" if sent == tokens else None
            text = text or ("x" if finish else "")
            choice = {"index": 0, "finish_reason": finish, **({"delta": {"content": text}} if chat else {"text": text})}
            if b.ids:
                choice["token_ids"] = list(range(count))
            now = {**usage, "completion_tokens": sent, "total_tokens": size + sent}
            chunk = {"choices": [choice]}
            if b.usage == "each" and options.get("continuous_usage_stats"):
                chunk["usage"] = now
            await asyncio.sleep(begin + b.first + number * b.gap - time.perf_counter())
            if number == b.cut_after:
                response.force_close()
                return
            if number == b.error_after:
                chunk = {"error": {"message": "it broke"}}
            times.append(time.perf_counter())
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            number += 1
        if b.usage != "never" and (options.get("include_usage") or b.usage == "last"):
            await response.write(b"data: " + json.dumps({"choices": [], "usage": now}).encode() + b"\n\n")
        if b.done:
            await response.write(b"data: [DONE]\n\n")


async def serve(behaviour: Behaviour, port: int = 0) -> None:
    from aiohttp import web

    runner = web.AppRunner(Fake(behaviour).app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour", type=json.loads)
    asyncio.run(serve(Behaviour(**parser.parse_args().behaviour)))
