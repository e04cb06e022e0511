"""How much memory a step takes, buffer by buffer, and the fastest plan that fits.

A plan says how many tokens go through the model at once and what each layer keeps for its backward, and where. Every
buffer of models/block.py is counted, so the peak is computed, not guessed. Time is estimated from rates of the device:
products and attention run at its matrix rate, dequantization at its memory's, copies to the host at its link's.

Bytes throughout; times in seconds. T tokens of a pass, t of a tile, D width, F MLP width, Q and W widths of q and qkv.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from whet.models.activations import ALL, ATTENTION, INPUT, MOST, Policy
from whet.models.families import LayerShape

GIB = 2**30
PARKED_LAYERS = 2  # of values on their way to the host or back, on the device at one time
SLACK = 0.03  # of the budget, for the allocator's rounding and what libraries hold
TILES = (4096, 2048, 1024)  # tokens that go through a weight at once
HEAD_CHUNK = 128 * 2**20


@dataclass(frozen=True)
class Device:
    """Rates that the estimate uses: FLOP/s of matrix products, bytes/s of memory, and of the link to the host."""

    matrix: float
    memory: float
    link: float


# Measured where a result is committed under bench/results; others take the nearest.
HOPPER = Device(matrix=660e12, memory=3.0e12, link=50e9)
AMPERE = Device(matrix=230e12, memory=1.7e12, link=22e9)


@dataclass(frozen=True)
class Sizes:
    """What of a model the plan depends on. rank: of each projection's adapter (0: none); bits: of the frozen base."""

    shape: LayerShape
    layers: int
    vocabulary: int
    rank: int
    bits: int = 4
    element: int = 2
    tile: int = 4096

    @property
    def q(self) -> int:
        return self.shape.q_heads * self.shape.head_dim

    @property
    def qkv(self) -> int:
        return self.q + 2 * self.shape.kv_heads * self.shape.head_dim

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's linear weights."""
        d, f = self.shape.width, self.shape.hidden
        return d * self.qkv + self.q * d + 3 * d * f


@dataclass(frozen=True)
class Plan:
    """tokens: of a pass, tile: of those that go through a weight at once. policies: of each layer, from the first.

    peak: bytes on the device.
    """

    tokens: int
    tile: int
    policies: tuple[Policy, ...]
    peak: float
    seconds_a_token: float


def kept(sizes: Sizes, policy: Policy, tokens: int) -> float:
    """What one layer keeps of a pass, its input included."""
    s, e = sizes.shape, sizes.element
    widths = {"m": s.width * (3 if s.spec.post_norms else 1), "o": sizes.q, "qkv": sizes.qkv, "gate_up": 2 * s.hidden}
    a_token = e * (s.width + 2 * sizes.rank + sum(w for name, w in widths.items() if name in policy.keep))
    return tokens * (a_token + (4 * s.q_heads if "lse" in policy.keep else 0))


def working(sizes: Sizes, policy: Policy, tokens: int) -> float:
    """The most that is alive at one time beside what layers keep: in a layer's backward pass, or in the head's."""
    s, e = sizes.shape, sizes.element
    d, f, q, w = s.width, s.hidden, sizes.q, sizes.qkv
    margin = 64 if sizes.rank else 0
    t = min(tokens, sizes.tile)
    flow = tokens * (2 * d + margin) * e  # the gradient that came in, and that of m
    again = kept(sizes, MOST, tokens) - kept(sizes, policy, tokens) if "qkv" not in policy.keep else 0
    mlp_weights = e * ((2 * f + margin) * (d + margin) + (d + margin) * (f + margin))
    mlp = t * e * (3 * d + 2 * f + 2 * f + (0 if "gate_up" in policy.keep else 2 * f) + 3 * margin)
    attention_weights = e * (w + margin) * (d + margin)
    # do, dq dk dv and their rotated copy; the kernel adds up dq in fp32
    attention = tokens * e * (q + w + w + margin) + tokens * q * 4 + tokens * d * e
    layer = flow + again + max(mlp_weights + mlp, attention_weights + attention)
    head = tokens * d * e * 4 + HEAD_CHUNK
    return max(layer, head)


def peak(sizes: Sizes, static: float, policies: tuple[Policy, ...], tokens: int) -> float:
    """Bytes on the device at the highest: `static` (weights, adapters, optimizer) and a pass of `tokens`."""
    here = sum(kept(sizes, p, tokens) for p in policies if not p.offload)
    parked = sorted((kept(sizes, p, tokens) for p in policies if p.offload), reverse=True)
    most = max(working(sizes, p, tokens) for p in set(policies))
    return static + here + sum(parked[:PARKED_LAYERS]) + most


def seconds(sizes: Sizes, device: Device, policies: tuple[Policy, ...], tokens: int, length: int) -> float:
    """An estimate for one pass of `tokens`, forward and backward, in documents of `length`."""
    s = sizes.shape
    matrix = device.matrix * min(tokens, sizes.tile) / (min(tokens, sizes.tile) + 100)  # short tiles do worse
    through = 2 * sizes.layer_weights * tokens / matrix
    scores = 2 * 2 * tokens * length / 2 * sizes.q / (0.6 * device.matrix)
    dequantize = sizes.layer_weights * (sizes.bits / 8 + sizes.element) / device.memory
    passes = kept(sizes, ALL, tokens) * 5 / device.memory  # norms, rotations, activations, adapters
    forward = through + scores + dequantize + passes / 3
    total = sizes.layers * (2 * through + 3.5 * scores + 2 * dequantize + passes)
    gate_up = 4 * s.width * s.hidden * tokens / matrix
    qkv = 2 * s.width * sizes.qkv * tokens / matrix
    o = 2 * s.width * sizes.q * tokens / matrix
    for policy in policies:
        if "gate_up" not in policy.keep:
            total += gate_up
        if "qkv" not in policy.keep:
            total += qkv + o + dequantize / 4
        if "o" not in policy.keep:
            total += scores
    copied = sum(kept(sizes, p, tokens) for p in policies if p.offload) / device.link
    stall = max(0.0, copied - 0.9 * sizes.layers * forward) + max(0.0, copied - 0.9 * (total - sizes.layers * forward))
    head = 3 * 2 * s.width * sizes.vocabulary * tokens / 1.5 / device.matrix
    return total + stall + head


def choose(
    sizes: Sizes, device: Device, budget: float, static: float, passes: list[int], length: int, host: float
) -> Plan | None:
    """The fastest plan whose peak stays within `budget`; None if there is none.

    passes: tokens that a pass may have. host: bytes of host memory that may be pinned.
    """
    best = None
    for tokens, tile in product(passes, TILES):
        if tile > tokens and tile > TILES[-1]:
            continue  # the same as a smaller one
        tiled = replace(sizes, tile=tile)
        for policies in _mixes(sizes.layers):
            needed = peak(tiled, static, policies, tokens)
            parked = sum(kept(tiled, p, tokens) for p in policies if p.offload)
            if needed > (1 - SLACK) * budget or parked > host:
                continue
            time = seconds(tiled, device, policies, tokens, length) / tokens
            if best is None or time < best.seconds_a_token:
                best = Plan(tokens, tile, policies, needed, time)
    return best


def leanest(sizes: Sizes, static: float, tokens: int) -> Plan:
    """The plan for passes of `tokens` that takes the least memory on the device."""
    lean = replace(sizes, tile=TILES[-1])
    policy = min((replace(p, offload=True) for p in (MOST, ATTENTION, INPUT)), key=lambda p: _peak_of(lean, p, tokens))
    policies = (policy,) * sizes.layers
    return Plan(tokens, lean.tile, policies, peak(lean, static, policies, tokens), float("nan"))


def _peak_of(sizes: Sizes, policy: Policy, tokens: int) -> float:
    return peak(sizes, 0, (policy,) * sizes.layers, tokens)


def _mixes(layers: int) -> Iterator[tuple[Policy, ...]]:
    """n layers keep one set of values on the host, the others one or two sets on the device; spread evenly."""
    step = max(1, layers // 16)
    counts = sorted({*range(0, layers + 1, step), layers})
    for parked in (ALL, MOST, ATTENTION, INPUT):
        for on_host in counts:
            for fuller, leaner in ((ALL, MOST), (MOST, ATTENTION), (ATTENTION, INPUT)):
                for full in counts:
                    if full > layers - on_host or (on_host == 0 and parked is not ALL):
                        continue
                    if full == 0 and fuller is not ALL and leaner is MOST:
                        continue
                    device = spread(full, layers - on_host, fuller, leaner)
                    yield _merge(spread(on_host, layers, replace(parked, offload=True), None), device)


def spread(count: int, layers: int, some: Policy, others: Policy | None) -> tuple[Policy | None, ...]:
    """`some` in `count` of `layers` places, as evenly as they go, `others` in the rest."""
    return tuple(some if (i + 1) * count // layers > i * count // layers else others for i in range(layers))


def _merge(host: tuple[Policy | None, ...], device: tuple[Policy | None, ...]) -> tuple[Policy, ...]:
    rest = iter(device)
    return tuple(p if p is not None else next(rest) for p in host)  # type: ignore[misc]
