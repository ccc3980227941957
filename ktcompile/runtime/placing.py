"""From the options of a user to what places experts."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any

from ktcompile.config import NEED_PROFILE, DeviceOptions, Replan
from ktcompile.plan.profile import RoutingProfile
from ktcompile.plan.replan import ReplanConfig
from ktcompile.runtime.devices import Placer, device_for


def placer_for(options: DeviceOptions) -> Placer | None:
    """Return what places the experts of a model, None where there is no device.

    ValueError: the thresholds of the re-planner cannot be used, or the profile is none. FileNotFoundError: there is no
    such profile.
    """
    config = replan_config(options.replan)
    if options.device == "none":
        return None
    profile = RoutingProfile.load(options.routing_profile) if options.routing_profile else None
    return Placer(
        device_for(options.device, options.device_memory),
        options.device_expert_fraction,
        options.placement,
        profile,
        keep_cpu_copy=options.keep_cpu_copy,
        stream_from=options.stream_from,
        config=config,
        key=tuple(options.device_options().items()),
    )


def without_new_profile(options: DeviceOptions) -> DeviceOptions:
    """Return the options without a routing profile that is to be written and not there yet. Strategies that cannot do
    without one keep it."""
    profile = options.routing_profile
    if profile is None or profile.exists() or options.placement in NEED_PROFILE:
        return options
    return replace(options, routing_profile=None)


def replan_config(given: Replan) -> ReplanConfig:
    """Return the thresholds of the re-planner, by default where they are not given. ValueError: a name is unknown, or
    its value cannot be used."""
    kinds = {f.name: type(f.default) for f in fields(ReplanConfig)}
    for name, value in given:
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"replan has {name!r}, which is unknown{hint} Known: {', '.join(kinds)}")
        if isinstance(value, bool) or not isinstance(value, (int, kinds[name])):
            kind = "a whole number" if kinds[name] is int else "a number"
            raise ValueError(f"{name} of replan is {value!r}; it must be {kind}")
    values: dict[str, Any] = dict(given)
    try:
        return replace(ReplanConfig(), **values)
    except ValueError as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in given)
        raise ValueError(f"replan has {shown}: {error}") from error
