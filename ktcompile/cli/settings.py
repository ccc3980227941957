"""Settings of a server: from flags, else the environment, else a file in TOML, else as the records have them."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ktcompile.cli.device_args import add_device_arguments
from ktcompile.cli.sizes import size
from ktcompile.config import DeviceOptions

# Of records that flags are made of; their docstrings say more.
_HELP = {
    "host": "address to listen at; 0.0.0.0 for all, with an --api-key",
    "port": "port; 0 takes a free one",
    "api_key": "what clients must send; better in KTCOMPILE_API_KEY, where other users do not see it",
    "served_model_name": "the model's name for clients (default: the last part of its path, or its id)",
    "max_body_bytes": "of a request, as 8M",
    "body_timeout": "seconds in which a body must be here",
    "request_timeout": "seconds that a request may take",
    "max_unread": "parts of an answer that a slow reader may leave before it is aborted",
    "write_timeout": "seconds in which a reader must take something",
    "drain_timeout": "seconds that requests have to end after SIGTERM",
    "max_connections": "connections at a time",
    "max_logprobs": "log-probabilities of a token that a request may ask for",
    "max_n": "answers that a request may ask for",
    "metrics_prefix": "of the names of metrics",
    "log_prompts": "write prompts to the log",
    "trace": "send spans to OTEL_EXPORTER_OTLP_ENDPOINT (extra otel)",
    "reasoning_parser": "of what a model thinks: auto, none, deepseek_r1 or qwen3",
    "cache_receipts": "usage of chats says which tier of the prefix cache gave what, and the seconds that saved",
    "prompt_price": "of a million tokens of prompts; usage then says what a request costs",
    "cached_price": "likewise of those that were cached (default: as --prompt-price)",
    "completion_price": "likewise of answers",
    "max_num_seqs": "sequences that are computed at a time",
    "max_num_batched_tokens": "tokens of a step",
    "max_model_len": "positions of a sequence (default: the model's)",
    "block_size": "positions of a block of keys and values",
    "chunk_size": "prompts are cut at multiples of it",
    "max_queued_requests": "sequences that may wait",
    "max_queued_tokens": "their tokens together",
    "max_queue_seconds": "that a request may be expected to wait; 0: any time",
    "kv_device_memory": "for keys and values, as 4G (default: a third of what is free)",
    "kv_host_memory": "for blocks behind these (default: none; with --kv-disk-path a quarter of them)",
    "kv_disk_path": "folder for blocks, which the next start finds again",
    "kv_disk_size": "of that folder, as 50G (default: 16G)",
    "kv_format": "of keys and values: auto, or int8",
    "mla_storage": "what latent attention keeps of a position: latent, or expanded keys and values",
    "enable_prefix_caching": "compute what requests begin with alike once",
    "weight_format": "of experts: auto (as in the model), or a name of `ktc generate --help`",
    "dense_format": "likewise of large linear layers",
    "head_format": "likewise of the layer that makes the logits (default: as --dense-format)",
    "eager": "run the model without compiling it",
}
# Their flags have defaults: one that is given the default counts as left out.
_OF_DEVICE = {field.name: field.default for field in fields(DeviceOptions)}
_METAVARS: dict[Any, str] = {int: "N", float: "N", str: "TEXT", size: "SIZE", Path: "DIR"}
_SIZES = ("max_body_bytes", "kv_device_memory", "kv_host_memory", "kv_disk_size")


def add_setting_arguments(parser: argparse.ArgumentParser, *records: type) -> None:
    """Add a flag for each field of some records, and --config. What was not given is not in the result."""
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings by name, as port = 8001")
    for record in records:
        group = parser.add_argument_group(record.__name__.removesuffix("Options").lower())
        for name, default, kind in _settings(record):
            if name in _OF_DEVICE:
                continue
            flag, shown = f"--{name.replace('_', '-')}", "" if default is None else f" (default: {default})"
            more: dict[str, Any] = {"help": f"{_HELP[name]}{shown}".replace("%", "%%"), "default": argparse.SUPPRESS}
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
            else:
                reader = size if name in _SIZES else kind
                group.add_argument(flag, type=reader, metavar=_METAVARS[reader], **more)
    add_device_arguments(parser)


def settings_of(args: argparse.Namespace, *records: type, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what was set, by name. others: names beside those of the records. ValueError: a setting is unknown, or
    its value cannot be read. FileNotFoundError: there is no such file."""
    kinds = {name: kind for record in records for name, _, kind in _settings(record)}
    kinds.update(dict.fromkeys(others, str))
    result = _of_file(args.config, kinds) if args.config is not None else {}
    result.update(_of_environment(os.environ, kinds))
    given = {name: getattr(args, name, None) for name in kinds}
    left_out = {name: _OF_DEVICE.get(name) for name in kinds}
    result.update({name: value for name, value in given.items() if value not in (None, left_out[name])})
    return result


def of_record(record: type, settings: Mapping[str, Any]) -> Any:
    """Return a record of those settings that are its own. ValueError: one cannot be used."""
    return record(**{field.name: settings[field.name] for field in fields(record) if field.name in settings})


def _settings(record: type) -> list[tuple[str, Any, Any]]:
    """Return name, default and type of each field; a type that may be None without that."""
    hints = typing.get_type_hints(record)
    result = []
    for field in fields(record):
        parts = [part for part in typing.get_args(hints[field.name]) if part is not type(None)]
        kind = parts[0] if len(parts) == 1 else hints[field.name]
        result.append((field.name, field.default, kind))
    return result


def _of_file(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    for name in values:
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path} has {name!r}, which is no setting{hint}")
    return {name: _read(f"{name} of {path}", value, name, kinds[name]) for name, value in values.items()}


def _of_environment(variables: Mapping[str, str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return what KTCOMPILE_SERVE_PORT and its like say, and KTCOMPILE_API_KEY."""
    result = {}
    for name, kind in kinds.items():
        for variable in (f"KTCOMPILE_SERVE_{name.upper()}", *(["KTCOMPILE_API_KEY"] if name == "api_key" else [])):
            if variables.get(variable):
                result[name] = _read(variable, variables[variable], name, kind)
    return result


def _read(what: str, value: Any, name: str, kind: Any) -> Any:
    """Return a value as its field has it."""
    try:
        if name in _SIZES and isinstance(value, str):
            return size(value)
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[str(value).lower()]
        if kind in (int, float, str, Path):
            return kind(value)
        return value
    except (KeyError, TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{what} is {value!r}, which cannot be used") from error
