"""`ktc serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ktcompile.cli.progress import progress_bars
from ktcompile.cli.settings import add_setting_arguments, of_record, settings_of
from ktcompile.engine.options import EngineOptions
from ktcompile.log import logger, tell
from ktcompile.server.options import ServerOptions

if TYPE_CHECKING:
    from fastapi import FastAPI

_EXAMPLES = """\
examples:
  ktc serve
  ktc serve --model ~/models/Qwen3-30B-A3B --weight-format int8 --port 8001
  KTCOMPILE_API_KEY=secret ktc serve --host 0.0.0.0
  ktc serve --config server.toml        # port = 8001, max_num_seqs = 16, ...; flags, then KTCOMPILE_SERVE_PORT, then it

A model without a chat template, such as the small one of the package, gets messages one after the other.
"""
# Settings that are no fields of records.
OTHERS = ("model", "log_format", "log_level")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP as OpenAI does",
        description="Serve a Mixture-of-Experts model over HTTP, with OpenAI's endpoints.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a directory or a hub id (default: the small model of the package)"
    )
    parser.add_argument("--log-format", choices=("text", "json"), help="of the log on stderr (default: text)")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="(default: info)")
    add_setting_arguments(parser, ServerOptions, EngineOptions)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    check_installed()
    from ktcompile.server.run import bind, in_thread, serve, url_of
    from ktcompile.server.starting import Starting

    settings = settings_of(args, ServerOptions, EngineOptions, others=OTHERS)
    options: ServerOptions = of_record(ServerOptions, settings)
    engine_options: EngineOptions = of_record(EngineOptions, settings)
    if options.trace and find_spec("opentelemetry.sdk") is None:
        raise ValueError("--trace needs OpenTelemetry: pip install 'ktcompile[otel]'")
    _start_log(settings.get("log_format", "text"), settings.get("log_level", "info"))
    try:
        bound = bind(options)  # that it is in use shows before the model is loaded
    except OSError as error:
        raise ValueError(f"cannot listen at {options.host}:{options.port}: {error.strerror}") from error
    begin, url, starting = time.perf_counter(), url_of(bound), Starting()

    def note(phase: str) -> None:
        starting.phase = phase
        tell(phase)

    tell(f"starting at {url}")
    with in_thread(starting.app, bound.dup()):
        app = make_app(settings.get("model"), options, engine_options, note)
    name = app.state.service.name
    if not app.state.service.prompts.has_template:
        logger.info("the model has no chat template; messages are put one after the other")

    def started() -> None:
        key = "" if options.api_key is None else " -H 'Authorization: Bearer KEY'"
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "def fibonacci(n):"}]})
        print(
            f"{name} is served at {url}/v1 after {time.perf_counter() - begin:.1f} s; Ctrl-C ends it\n"
            f"  ktc chat --url {url}\n"
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
            flush=True,
        )

    with _spans(options.trace):
        serve(app, options, bound, started)
    return 0


def make_app(
    model: str | None, options: ServerOptions, engine_options: EngineOptions, note: Callable[[str], None] = tell
) -> FastAPI:
    """Return the application with its model loaded. note: is told what happens meanwhile."""
    from transformers.utils import logging as hf_logging

    from ktcompile.engine.engine import Engine
    from ktcompile.models.placed import expert_metrics
    from ktcompile.ops.experts import formats, token_counts
    from ktcompile.runtime.metrics import ExpertMetrics
    from ktcompile.server.app import create_app
    from ktcompile.server.status import ModelFacts

    hf_logging.set_verbosity(logging.ERROR)
    with progress_bars(shown=True):
        engine = Engine(model, engine_options, note=note)

    def experts() -> ExpertMetrics | None:
        return None if engine_options.device == "none" or engine.model is None else expert_metrics(engine.model)

    def facts() -> ModelFacts:
        layers = engine.experts
        return ModelFacts(" and ".join(formats(layers)) or None, engine_options.block_size, token_counts(layers))

    return create_app(engine, options, defaults=engine.summary.sampling, expert_metrics=experts, facts=facts)


@contextmanager
def _spans(wanted: bool) -> Iterator[None]:
    """Send spans as the variables OTEL_* say, for the time of a block."""
    if not wanted:
        yield
        return
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "ktcompile"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


def check_installed() -> None:
    """ValueError: what a server needs is not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "orjson", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ValueError(f"the server needs {', '.join(missing)}: pip install 'ktcompile[serve]'")


class JsonLines(logging.Formatter):
    """Makes of a record one line of JSON, with the fields that it was given."""

    def format(self, record: logging.LogRecord) -> str:
        value: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **record.__dict__.get("fields", {}),
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value)


def _start_log(form: str, level: str) -> None:
    if form not in ("text", "json"):
        raise ValueError(f"log_format is {form!r}; it must be text or json")
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"log_level is {level!r}; it must be debug, info, warning or error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for one in (logger, logging.getLogger("uvicorn.error")):
        one.handlers = [handler]
        one.propagate = False
        one.setLevel(level.upper() if one is logger else logging.WARNING)
