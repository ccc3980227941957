"""`ktc chat`: talk with a model, on a server or in this process."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ktcompile.cli.settings import add_setting_arguments, of_record, settings_of
from ktcompile.engine.options import EngineOptions
from ktcompile.server.options import ServerOptions

if TYPE_CHECKING:
    from rich.console import Console

_EXAMPLES = """\
examples:
  ktc chat                                    # the small model of the package, which continues Python
  ktc chat --model ~/models/Qwen3-30B-A3B --weight-format int8
  ktc chat --url http://127.0.0.1:8000 --system 'Answer in one sentence.'
  echo 'def fibonacci(n):' | ktc chat --max-tokens 40

/reset forgets what was said, /quit or Ctrl-D ends; Ctrl-C ends an answer.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `chat`."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model, on a server or in this process.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", help="of a server, as http://127.0.0.1:8000 (default: the model is loaded here)")
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a directory or a hub id (default: the small model of the package)"
    )
    parser.add_argument("--api-key", help="of the server (default: KTCOMPILE_API_KEY)")
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="(default: the model's)")
    parser.add_argument("--seed", type=int, help="of the draws (default: another one each time)")
    parser.add_argument("--markdown", action=argparse.BooleanOptionalAction, default=True, help="on a terminal")
    add_setting_arguments(parser, EngineOptions)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from ktcompile.cli.serve import check_installed, make_app

    if args.url is not None:
        key = args.api_key or os.environ.get("KTCOMPILE_API_KEY")
        _talk(args, Chat(args.url.rstrip("/"), key, _extras(args)))
        return 0
    check_installed()
    from ktcompile.server.run import bind, in_thread, url_of

    settings = settings_of(args, EngineOptions)
    options = ServerOptions(port=0, api_key=secrets.token_hex(16), request_timeout=None)
    app = make_app(args.model, options, of_record(EngineOptions, settings))
    bound = bind(options)
    with in_thread(app, bound):
        _talk(args, Chat(url_of(bound), options.api_key, _extras(args)))
    return 0


@dataclass
class Chat:
    """What was said, with a server that goes on with it. extras: parameters of each request. thought: is told what the
    model thinks before it answers, in pieces; no answer has it."""

    url: str
    api_key: str | None
    extras: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)
    thought: Callable[[str], None] = lambda piece: None

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces. It belongs to what was said once it has ended, or is no longer read.
        ValueError: the server refuses, or cannot be reached."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._pieces():
                pieces.append(piece)
                yield piece
        except ValueError:
            self.messages.pop()
            raise
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def model(self) -> str:
        """Return the name of the server's model."""
        with self._open("/v1/models") as response:
            return str(json.load(response)["data"][0]["id"])

    def _pieces(self) -> Iterator[str]:
        body = {"model": self.model(), "messages": self.messages, "stream": True, **self.extras}
        with closing(self._open("/v1/chat/completions", body)) as response:
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if not line.startswith(b"data: ") or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                for choice in event["choices"]:
                    if choice["delta"].get("reasoning_content"):
                        self.thought(choice["delta"]["reasoning_content"])
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers))
        except urllib.error.HTTPError as error:
            raise ValueError(_message(error)) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise ValueError(f"cannot reach {self.url}: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return f"{error.code}: {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code}: {text[:200]}"


def _extras(args: argparse.Namespace) -> dict[str, Any]:
    given = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    return {name: value for name, value in given.items() if value is not None}


def _talk(args: argparse.Namespace, chat: Chat) -> None:
    from rich.console import Console

    first = [] if args.system is None else [{"role": "system", "content": args.system}]
    chat = replace(chat, messages=list(first))
    console = Console()
    asks = sys.stdin.isatty()
    if asks:
        console.print(f"{chat.model()}; /reset forgets, /quit ends", style="dim", highlight=False)
    while True:
        try:
            text = console.input("[bold]>[/bold] ") if asks else sys.stdin.readline()
        except EOFError:
            return
        if not text and not asks:
            return
        text = text.rstrip("\n")
        if text == "/quit":
            return
        if text == "/reset":
            chat.messages = list(first)
        elif text.strip():
            _show(console, chat, text, markdown=args.markdown and console.is_terminal)


def _show(console: Console, chat: Chat, text: str, *, markdown: bool) -> None:
    """Print an answer while it comes, on a terminal behind what was thought. What the server refuses ends the program
    where nobody can ask again."""
    from rich.console import Group
    from rich.live import Live
    from rich.markdown import Markdown
    from rich.text import Text

    thoughts: list[str] = []
    pieces: list[str] = []
    answer = chat.ask(text)
    try:
        if not markdown:
            if console.is_terminal:
                chat.thought = lambda piece: console.out(piece, end="", style="dim", highlight=False)
            for piece in answer:
                console.out(piece, end="", highlight=False)
            console.out()
            return
        with Live(console=console, refresh_per_second=8, vertical_overflow="visible") as live:

            def show(of: list[str], piece: str) -> None:
                of.append(piece)
                live.update(Group(Text("".join(thoughts), style="dim"), Markdown("".join(pieces))))

            chat.thought = lambda piece: show(thoughts, piece)
            for piece in answer:
                show(pieces, piece)
    except KeyboardInterrupt:
        console.print("(cut)", style="dim")
    except ValueError as error:
        if not sys.stdin.isatty():
            raise
        console.print(str(error), style="red", markup=False)
    finally:
        answer.close()  # type: ignore[attr-defined]
