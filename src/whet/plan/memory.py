"""How much memory a step takes, buffer by buffer, and the fastest plan that fits.

A plan says how many tokens go through the model at once and what each layer keeps for its backward, and where. Every
buffer of models/block.py is counted, so the peak is computed, not guessed. Time is estimated from rates of the device:
products and attention run at its matrix rate, dequantization at its memory's, copies to the host at its link's.

Bytes throughout; times in seconds. T tokens of a pass, t of a tile, D width, F MLP width, Q and W widths of q and qkv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product

from whet.models.activations import ALL, ATTENTION, INPUT, MOST, Policy
from whet.models.families import LayerShape

GIB = 2**30
PARKED_LAYERS = 2  # of values on their way to the host or back, on the device at one time
SLACK = 0.005  # of the budget, for the allocator's rounding
TILES = (4096, 2048, 1024, 512)  # tokens that go through a weight at once
HEAD_CHUNK = 256 * 2**20
LIBRARIES = 224 * 2**20  # workspaces of cuBLAS, in the forward's thread and in the backward's, and of cuDNN


@dataclass(frozen=True)
class Device:
    """Rates that the estimate uses: FLOP/s of matrix products, bytes/s of memory, and of the link to the host.

    launch: seconds of the host for a layer's forward and backward pass, for which short passes wait; 0 where they are
    recorded (train/pass_graph.py).
    """

    matrix: float
    memory: float
    link: float
    launch: float = 5.8e-3


Mix = Mapping[Policy, int]  # how many layers have each

# Measured where a result is committed under bench/results; others take the nearest.
HOPPER = Device(matrix=660e12, memory=3.0e12, link=50e9)
AMPERE = Device(matrix=230e12, memory=1.7e12, link=20e9)


@dataclass(frozen=True)
class Sizes:
    """What of a model the plan depends on. rank: of each projection's adapter (0: none); bits: of the base's weights.

    trained: whether these train themselves. trained_head: whether the output head does.
    """

    shape: LayerShape
    layers: int
    vocabulary: int
    rank: int
    bits: int = 4
    element: int = 2
    trained: bool = False
    trained_head: bool = False
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


@cache
def kept(sizes: Sizes, policy: Policy, tokens: int) -> float:
    """What one layer keeps of a pass, its input included."""
    s, e = sizes.shape, sizes.element
    widths = {"m": s.width * (3 if s.spec.post_norms else 1), "o": sizes.q, "qkv": sizes.qkv, "gate_up": 2 * s.hidden}
    a_token = e * (s.width + 2 * sizes.rank + sum(w for name, w in widths.items() if name in policy.keep))
    return tokens * (a_token + (4 * s.q_heads if "lse" in policy.keep else 0))


@cache
def working(sizes: Sizes, policy: Policy, tokens: int) -> float:
    """The most that is alive at one time beside what layers keep: in a layer's backward pass, or in the head's."""
    s, e = sizes.shape, sizes.element
    d, f, q, w = s.width, s.hidden, sizes.q, sizes.qkv
    margin = 64 if sizes.rank else 0
    t = min(tokens, sizes.tile)
    flow = tokens * (2 * d + margin) * e  # the gradient that came in, and that of m
    again = kept(sizes, MOST, tokens) - kept(sizes, policy, tokens) if "qkv" not in policy.keep else 0
    # all four projections, for a whole pass; those in 16 bits lie there already, but for the adapters
    weights = margin * (w + d + d + q + 2 * f + d + d + f) * e
    if sizes.bits < 16:
        weights += e * (sizes.layer_weights + 4 * margin * margin)
    if sizes.trained:
        weights += sizes.layer_weights * (
            4 + 4 + e
        )  # their gradients: a tile's and the sum in fp32, and as they are held
    mlp = t * e * (3 * d + 2 * f + 2 * f + (0 if "gate_up" in policy.keep else 2 * f) + 3 * margin)
    # do, dq dk dv and their rotated copy; the kernel adds up dq in fp32, and dk and dv for each query head
    attention = tokens * e * (q + w + w + margin + 2 * q) + tokens * q * 4 + tokens * d * e
    layer = flow + again + weights + max(mlp, attention)
    head = tokens * d * e * 4 + HEAD_CHUNK
    if sizes.trained_head:  # where it is tied its gradient waits for the embedding's, to the end
        gradient = sizes.vocabulary * d * e
        layer, head = layer + gradient, head + gradient + tokens * d * e * 2
    return max(layer, head) + LIBRARIES


def peak(sizes: Sizes, static: float, policies: Mix, tokens: int) -> float:
    """Bytes on the device at the highest: `static` (weights, adapters, optimizer) and a pass of `tokens`."""
    each = {p: kept(sizes, p, tokens) for p in policies}
    here = sum(n * each[p] for p, n in policies.items() if not p.offload)
    parked = [each[p] for p, n in policies.items() if p.offload for _ in range(min(n, PARKED_LAYERS))]
    most = max(working(sizes, p, tokens) for p in policies)
    return static + here + sum(sorted(parked, reverse=True)[:PARKED_LAYERS]) + most


def seconds(sizes: Sizes, device: Device, policies: Mix, tokens: int, length: int) -> float:
    """An estimate for one pass of `tokens`, forward and backward, in documents of `length`."""
    s = sizes.shape
    tile = min(tokens, sizes.tile)
    matrix = device.matrix * tile / (tile + 100)  # short tiles do worse
    through = 2 * sizes.layer_weights * tokens / matrix
    scores = 2 * 2 * tokens * length / 2 * sizes.q / (0.6 * device.matrix)
    dequantize = sizes.layer_weights * (sizes.bits / 8 + sizes.element) / device.memory if sizes.bits < 16 else 0.0
    passes = kept(sizes, ALL, tokens) * 5 / device.memory  # norms, rotations, activations, adapters
    forward = sizes.layers * (through + scores + dequantize + passes / 3)
    backward = sizes.layers * ((2 if sizes.trained else 1) * through + 2.5 * scores + dequantize + passes * 2 / 3)
    gate_up = 4 * s.width * s.hidden * tokens / matrix
    qkv_and_o = 2 * s.width * (sizes.qkv + sizes.q) * tokens / matrix
    for policy, n in policies.items():
        backward += n * gate_up * ("gate_up" not in policy.keep)
        backward += n * qkv_and_o * ("qkv" not in policy.keep)
        backward += n * scores * ("o" not in policy.keep)
    copied = sum(n * kept(sizes, p, tokens) for p, n in policies.items() if p.offload) / device.link
    stall = max(0.0, copied - 0.9 * forward) + max(0.0, copied - 0.9 * backward)
    head = 2 * 2 * s.width * sizes.vocabulary * tokens / device.matrix
    return max(forward + backward + stall, sizes.layers * device.launch) + head


def choose(
    sizes: Sizes, device: Device, budget: float, static: float, passes: list[int], length: int, host: float
) -> Plan | None:
    """The fastest plan whose peak stays within `budget`; None if there is none.

    passes: tokens that a pass may have. host: bytes of host memory that may be pinned.
    """
    best, mix = None, None
    for tokens, tile in product(passes, TILES):
        if tile > tokens and tile > TILES[-1]:
            continue  # the same as a smaller one
        tiled = replace(sizes, tile=tile)
        for policies in _mixes(sizes.layers):
            needed = peak(tiled, static, policies, tokens)
            parked = sum(n * kept(tiled, p, tokens) for p, n in policies.items() if p.offload)
            if needed > (1 - SLACK) * budget or parked > host:
                continue
            time = seconds(tiled, device, policies, tokens, length) / tokens
            if best is None or time < best.seconds_a_token:
                best, mix = Plan(tokens, tile, (), needed, time), policies
    return None if best is None or mix is None else replace(best, policies=spread(mix))


def leanest(sizes: Sizes, static: float, tokens: int) -> Plan:
    """The plan for passes of `tokens` that takes the least memory on the device."""
    lean = replace(sizes, tile=TILES[-1])
    mixes = [{replace(p, offload=True): sizes.layers} for p in (MOST, ATTENTION, INPUT)]
    needed, policies = min(((peak(lean, static, mix, tokens), spread(mix)) for mix in mixes), key=lambda x: x[0])
    return Plan(tokens, lean.tile, policies, needed, float("nan"))


@cache
def _mixes(layers: int) -> list[Mix]:
    """n layers keep one set of values on the host, the others one or two sets on the device."""
    counts = sorted({*range(0, layers + 1, max(1, layers // 16)), layers})
    found: dict[frozenset[tuple[Policy, int]], Mix] = {}
    for parked, (fuller, leaner) in product((ALL, MOST, ATTENTION, INPUT), pairwise((ALL, MOST, ATTENTION, INPUT))):
        for on_host, full in product(counts, counts):
            if on_host + full <= layers:
                parts = ((replace(parked, offload=True), on_host), (fuller, full), (leaner, layers - on_host - full))
                mix = {policy: n for policy, n in parts if n}
                found[frozenset(mix.items())] = mix
    return list(found.values())


def spread(mix: Mix) -> tuple[Policy, ...]:
    """A policy for each layer, those of one kind as far apart as they go: copies then have layers to hide behind."""
    layers = sum(mix.values())
    places = sorted(((i + 0.5) / n, order, p) for order, (p, n) in enumerate(mix.items()) for i in range(n))
    assert len(places) == layers
    return tuple(policy for _, _, policy in places)
