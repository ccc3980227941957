"""What a model takes on a machine and how fast it may run: bytes of each tier, room for the cache, tokens per second.

Nothing is loaded and nothing is measured here. Experts are taken to be chosen at random: T tokens that take K of E each
touch E (1 - (1 - K / E)^T) of them on average.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ktcompile.plan.architecture import Architecture
from ktcompile.plan.cost import uniform_layer
from ktcompile.plan.facts import ModelFacts
from ktcompile.plan.hardware import Hardware

# Kept free: of a device for its driver and the gaps of allocators, of RAM for the system and the libraries.
DEVICE_RESERVE, RAM_RESERVE = 10**9, 2 * 10**9
# The most that is being read of plain experts while a model is loaded: 512 MiB in files, and the codes of them.
LOADING = 3 << 28
# Tokens of a prompt that go through the model at once.
CHUNK = 2048
DECODE_BATCHES, PREFILL_TOKENS = (1, 8), (512, 2048)

ASSUMPTIONS = (
    "predicted by a roofline of memory, arithmetic and link; no kernel was run",
    "routing is uniform and each layer takes its average: skewed routing and well-placed experts are faster",
    "what Python and other libraries do between kernels is not counted: small models are slower than this",
    "attention, shared experts and routers come before the routed experts of their layer, not beside them",
    "arithmetic of the CPU is that of bf16: below AVX-512, unpacking four bits takes up to three times as long as "
    "reading them",
    f"prompts go through in chunks of {CHUNK:,} tokens; {DEVICE_RESERVE // 10**9} GB of the device and "
    f"{RAM_RESERVE // 10**9} GB of RAM are kept free",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """context: tokens of each sequence, prompt and answer. batch: sequences at a time."""

    context: int = 4096
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Tier:
    """What lies in one kind of memory. capacity: None is not known. All in bytes."""

    capacity: int | None
    dense: int = 0
    experts: int = 0
    cache: int = 0
    workspace: int = 0
    reserve: int = 0

    @property
    def used(self) -> int:
        return self.dense + self.experts + self.cache + self.workspace + self.reserve

    @property
    def free(self) -> int | None:
        """Bytes that are left; negative: so many are missing."""
        return None if self.capacity is None else self.capacity - self.used

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.used <= self.capacity


@dataclass(frozen=True, slots=True)
class Prediction:
    """One step. kind: "decode" (a token of each of `tokens` sequences) or "prefill" (a prompt of `tokens`).

    seconds: of the step. dense_seconds: of all but routed experts. cpu_seconds, device_seconds: experts of each.
    copy_seconds: cold experts on their way to the device. streamed: whether they took that way.
    """

    kind: str
    tokens: int
    seconds: float
    dense_seconds: float
    cpu_seconds: float
    device_seconds: float
    copy_seconds: float
    streamed: bool

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Estimate:
    """device: None if nothing is on one. resident: experts of each layer on the device. cache_tokens: context for
    which the caches of the batch fit where they are; None: it has no limit. predictions: none where it does not fit.
    load_peak: of RAM while the checkpoint is loaded."""

    device: Tier | None
    ram: Tier
    disk: Tier
    resident: tuple[int, ...]
    cache_tokens: int | None
    load_peak: int
    predictions: tuple[Prediction, ...]

    @property
    def runs(self) -> bool:
        """Whether it fits once it is loaded."""
        return self.ram.fits and (self.device is None or self.device.fits)

    @property
    def loads(self) -> bool:
        """Whether RAM is enough while it is loaded."""
        return self.ram.capacity is None or self.load_peak + self.ram.reserve <= self.ram.capacity

    @property
    def fits(self) -> bool:
        return self.runs and self.loads and self.disk.fits


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be estimated. quantized: the checkpoint holds the experts in the format that they are packed in.
    fraction: of each layer's experts on the device; None: the fastest that fits. disk_bytes: room for checkpoints."""

    model: Architecture
    facts: ModelFacts
    hardware: Hardware
    workload: Workload = Workload()
    quantized: bool = False
    fraction: float | None = None
    disk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"device_expert_fraction is {self.fraction}; it must be from 0 to 1")
        if self.fraction and self.hardware.device is None:
            raise ValueError(f"device_expert_fraction is {self.fraction}, but {self.hardware.name} has no device")


def estimate(plan: Plan) -> Estimate:
    """Return the bytes and speeds of a model on a machine, with the placement that decodes fastest of those that fit.

    Each layer has the same fraction of its experts on the device. Where none fits it is the one that lacks the
    least RAM of those that the device has room for.
    """
    options = [_sized(plan, resident) for resident in _placements(plan)]
    fitting = [o for o in options if o.runs]
    if not fitting:
        return min(options, key=_missing)
    batch = plan.workload.batch
    best = min(fitting, key=lambda o: predict(plan, o, "decode", batch).seconds)
    steps = [("decode", n) for n in dict.fromkeys((*DECODE_BATCHES, batch))] + [("prefill", n) for n in PREFILL_TOKENS]
    return replace(best, predictions=tuple(predict(plan, best, kind, tokens) for kind, tokens in steps))


def predict(plan: Plan, placed: Estimate, kind: str, tokens: int) -> Prediction:
    """Return how long a step takes. kind, tokens: as for `Prediction`."""
    model, hardware = plan.model, plan.hardware
    if placed.device is None:
        hardware = Hardware(hardware.name, hardware.cpu)
    steps = -(-tokens // CHUNK) if kind == "prefill" else 1
    if kind == "decode":
        read, pairs = tokens * model.cache_bytes(plan.workload.context), tokens * plan.workload.context
    else:
        read, pairs = model.cache_bytes(tokens), tokens * (tokens + 1) // 2
    where = hardware.device or hardware.cpu
    flops = tokens * model.dense_flops_per_token + pairs * model.attention_flops
    dense = where.seconds(steps * model.dense_read_bytes + read, flops) + steps * model.num_layers * where.overhead
    groups = Counter(zip(plan.facts.layers, placed.resident, strict=True))
    costs = [(n * steps, uniform_layer(hardware, layer, tokens / steps, hot)) for (layer, hot), n in groups.items()]
    return Prediction(
        kind,
        tokens,
        dense + float(sum(n * c.total for n, c in costs)),
        dense,
        float(sum(n * c.cpu for n, c in costs)),
        float(sum(n * c.device for n, c in costs)),
        float(sum(n * c.copy for n, c in costs)),
        any(bool(c.streamed) for _, c in costs),
    )


def _placements(plan: Plan) -> list[tuple[int, ...] | None]:
    """Return for each placement the experts of each layer on the device; None: the device is not used."""
    layers = plan.facts.layers
    if plan.hardware.device is None:
        return [None]
    if plan.fraction is not None:
        return [tuple(int(plan.fraction * layer.num_experts + 1e-9) for layer in layers)]
    most = max((layer.num_experts for layer in layers), default=0)
    shares = [tuple(n * layer.num_experts // most for layer in layers) for n in range(most, -1, -1)] if most else [()]
    return [*shares, None]


def _sized(plan: Plan, resident: tuple[int, ...] | None) -> Estimate:
    """Return the bytes of a placement."""
    model, facts, workload = plan.model, plan.facts, plan.workload
    cache = workload.batch * model.cache_bytes(workload.context)
    space = _workspace(plan)
    hot = sum(n * layer.expert_bytes for n, layer in zip(resident or (), facts.layers, strict=bool(resident)))
    cold = facts.expert_bytes - hot
    ram = Tier(plan.hardware.cpu.memory_bytes, 0, cold, 0, space if cold else 0, RAM_RESERVE)
    device = None
    if resident is None:
        ram = replace(ram, dense=facts.dense_bytes, cache=cache, workspace=space)
    else:
        assert plan.hardware.device is not None
        buffers = 2 * max((layer.expert_bytes for layer in facts.layers), default=0) if cold else 0
        capacity = plan.hardware.device.memory_bytes
        device = Tier(capacity, facts.dense_bytes, hot, cache, space + buffers, DEVICE_RESERVE)
    holder = device or ram
    room = (holder.free or 0) + cache
    return Estimate(
        device=device,
        ram=ram,
        disk=Tier(plan.disk_bytes, experts=model.stored_bytes),
        resident=resident or (0,) * len(facts.layers),
        cache_tokens=model.cache_tokens(max(0, room), workload.batch),
        load_peak=_load_peak(plan, ram),
        predictions=(),
    )


def _workspace(plan: Plan) -> int:
    """Return bytes of activations of a chunk in fp32, and of the logits of a batch."""
    hidden = plan.model.hidden_size
    widest = max((2 * layer.top_k * layer.intermediate_size for layer in plan.facts.layers), default=0)
    tokens = max(min(CHUNK, plan.workload.context), plan.workload.batch)
    return 4 * (tokens * (8 * hidden + widest) + plan.workload.batch * plan.model.vocab_size)


def _load_peak(plan: Plan, ram: Tier) -> int:
    """Return bytes of RAM while loading. All experts are packed in RAM before a device gets its own; beside them are
    those that are being read: a few, or of quantised ones the codes of one layer."""
    facts = plan.facts
    layer = max((e.num_experts * e.flops_per_row // 2 for e in facts.layers), default=0)
    # As they are stored, and their codes.
    reading = layer if plan.quantized else min(LOADING, layer * (plan.model.dtype_bytes + 1))
    return max(ram.used - ram.reserve, facts.dense_bytes + facts.expert_bytes + reading)


def _missing(option: Estimate) -> tuple[int, int]:
    """Return the bytes that are missing on the device and in RAM: a device is filled first, as far as it goes."""
    device = 0 if option.device is None else max(0, -(option.device.free or 0))
    return device, max(0, -(option.ram.free or 0))
