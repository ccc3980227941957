"""The options of the device on a command line: one for each field of the record."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ktcompile.cli.sizes import size
from ktcompile.config import DEVICES, PLACEMENTS, DeviceOptions


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `DeviceOptions`."""
    group = parser.add_argument_group("experts on a device")
    for field in fields(DeviceOptions):
        option = f"--{field.name.replace('_', '-')}"
        group.add_argument(option, default=field.default, **_ARGUMENTS[field.name])


def device_options(args: argparse.Namespace) -> DeviceOptions:
    """Return what was asked for. ValueError: a value cannot be used."""
    return DeviceOptions(**{field.name: getattr(args, field.name) for field in fields(DeviceOptions)})


def _thresholds(text: str) -> tuple[tuple[str, float], ...]:
    """Return the names and the values of thresholds. An argparse type."""
    return tuple(_threshold(part) for part in text.split(","))


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), int(value) if value.strip().lstrip("-").isdigit() else float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no threshold; write it as interval=128") from error


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "device": {
        "choices": DEVICES,
        "help": "'none' (the default) leaves all experts to the CPU; 'stand-in' imitates a GPU in the CPU's memory, "
        "for trials",
    },
    "device_expert_fraction": {
        "type": float,
        "metavar": "F",
        "help": "part of each layer's experts that the device has, 0 to 1 (default: %(default)s)",
    },
    "device_memory": {
        "type": size,
        "metavar": "SIZE",
        "help": "of the device for experts, as 8G or 512M (default: what the fraction takes)",
    },
    "keep_cpu_copy": {
        "action": argparse.BooleanOptionalAction,
        "help": "keep experts of the device in the CPU's memory too, so that they leave it without a copy",
    },
    "placement": {
        "choices": PLACEMENTS,
        "help": "which experts the device has (default: %(default)s, by what routers choose while the model runs)",
    },
    "routing_profile": {
        "type": Path,
        "metavar": "FILE",
        "help": "what routers chose so far, npz or JSON: read if it is there, and added to at the end",
    },
    "stream_from": {
        "type": int,
        "metavar": "TOKENS",
        "help": "prompts of so many tokens copy the CPU's experts through the device; 0: none does (default: those for "
        "which that is faster)",
    },
    "replan": {
        "type": _thresholds,
        "metavar": "NAME=VALUE,...",
        "help": "when 'adaptive' plans anew and what a move must earn: interval and horizon in decode steps, margin "
        "and link_share as fractions",
    },
}
