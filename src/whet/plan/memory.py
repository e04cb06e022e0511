"""How much memory a step takes, buffer by buffer, and the fastest plan that fits.

A plan says how many tokens go through the model at once and what each layer keeps for its backward, and where. Every
buffer of models/block.py and models/head.py is counted, layer by layer, so the peak is computed, not guessed. Time is
estimated from what a layer does: products and attention at the device's matrix rate, what only moves values at its
memory's, copies to the host at its link's, and the pause after each kernel.

Bytes throughout; times in seconds. T tokens of a pass, t of a tile, D width, F MLP width, Q and W widths of q and qkv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, pairwise, product
from math import log2

from whet.models.activations import ALL, ATTENTION, INPUT, MOST, Policy
from whet.models.families import LayerShape
from whet.models.projection import margin

GIB = 2**30
SLACK = 0.005  # of the budget, for the allocator's rounding
TILES = (4096, 2048, 1024, 512)  # tokens that go through a weight at once
HEAD_CHUNK = 256 * 2**20
HEAD_ROWS = 4096  # of the gradient that the head hands down, which are scaled at once
# cuBLAS takes 32 MiB for the forward's thread, as much for the backward's, and as much once more where it is called
# directly (kernels/cublaslt.py); the rest is what four measured peaks
# leave (tests/plan/test_memory.py): cuDNN's, tables of positions, the batch.
LIBRARIES = 160 * 2**20

# kernels/glu_lora.py: tokens whose products one program sums, and the most ranks that it takes.
SUMMED, MOST_RANKS = 512, 128

# Rates as parts of the device's own. Attention: 480 TFLOP/s forward, 340 to 360 backward, of 700, in rows of 2,048;
# longer ones come nearer (steps of 16,384 and 65,536 tokens: 480 and 525 TFLOP/s for both together).
# Adapters' products, whose one side is tens wide, reach 0.8 of the memory's rate, and so does dequantization (0.83).
# The link, assumed: a tenth is lost in gaps between one tensor's copy and the next.
ATTENTION_FORWARD, ATTENTION_BACKWARD = (0.69, 0.03), (0.48, 0.045)  # in rows of 2,048; for each doubling
SKINNY = 0.8
LINK = 0.9
# What a plan must gain, as a part of its time, for each GiB of host memory that it pins: that takes about a quarter of
# a second, once, which some minutes of training make up for.
WORTH = 0.0005
# From the end of a kernel to the full speed of the next, in a recorded pass. Fitted, not measured: with the rates above
# and 8 ms a step beside its passes, it brings eight measured steps (tests/plan/test_memory.py), of 8,000 to 33,000
# kernels, within 3.6%. A fixed cost of a pass would be hard to tell from it.
GAP = 3e-6


@dataclass(frozen=True)
class Device:
    """Rates that the estimate uses: FLOP/s of matrix products, bytes/s of memory, and of the link to the host.

    fp8: FLOP/s of products in FP8.

    launch: seconds of the host for a layer's forward and backward pass, for which short passes wait; 0 where they are
    recorded (train/pass_graph.py).
    """

    matrix: float
    memory: float
    link: float
    launch: float = 5.8e-3
    fp8: float = 1440e12


Mix = Mapping[Policy, int]  # how many layers have each
ON_DEVICE = (ALL, MOST, ATTENTION, INPUT)
ON_HOST = tuple(replace(policy, offload=True) for policy in ON_DEVICE)
EVERY = ON_DEVICE + ON_HOST

# Others take the nearest. HOPPER's matrix rate is what an H100's power sustains (657 to 726 TFLOP/s at 512 to 8,192
# tokens, in no order; 820 in short bursts).
HOPPER = Device(matrix=700e12, memory=3.0e12, link=50e9)
H200 = replace(HOPPER, matrix=720e12, memory=4.1e12)
AMPERE = Device(matrix=230e12, memory=1.7e12, link=20e9)


@dataclass(frozen=True)
class Sizes:
    """What of a model the plan depends on. rank: of each projection's adapter (0: none); bits: of the base's weights.

    trained: whether these train themselves. trained_head: whether the output head does. embedding: bytes of the input
    embedding that may wait in host memory. fp8: products with the base are in FP8.
    """

    shape: LayerShape
    layers: int
    vocabulary: int
    rank: int
    bits: int = 4
    element: int = 2
    trained: bool = False
    trained_head: bool = False
    embedding: float = 0.0
    tile: int = 4096
    fp8: bool = False

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

    @property
    def adapter(self) -> int:
        """Elements of a layer's adapters, if all seven linear layers have one."""
        d, f = self.shape.width, self.shape.hidden
        return self.rank * ((3 * d + self.qkv) + (self.q + d) + (2 * d + 2 * f) + (f + d))


@dataclass(frozen=True)
class Plan:
    """tokens: of a pass, tile: of those that go through a weight at once. policies: of each layer, from the first.

    peak: bytes on the device, `static` of which lie there all the time. held: how many layers' weights stay dequantized
    from pass to pass. embedding_on_host: whether the input embedding waits in host memory.
    """

    tokens: int
    tile: int
    policies: tuple[Policy, ...]
    peak: float
    seconds_a_token: float
    held: int = 0
    embedding_on_host: bool = False
    static: float = 0.0


@cache
def kept(sizes: Sizes, policy: Policy, tokens: int) -> float:
    """What one layer keeps of a pass, its input included."""
    s, e = sizes.shape, sizes.element
    widths = {"m": s.width * (3 if s.spec.post_norms else 1), "o": sizes.q, "qkv": sizes.qkv, "gate_up": 2 * s.hidden}
    tails = 2 + 3 * ("qkv" in policy.keep) + 2 * ("gate_up" in policy.keep)  # x A^T of so many linear layers
    a_token = e * (s.width + tails * sizes.rank + sum(w for name, w in widths.items() if name in policy.keep))
    return tokens * (a_token + (4 * s.q_heads if "lse" in policy.keep else 0))


def _margin(sizes: Sizes, parts: int) -> int:
    """Columns beside a projection of `parts` linear layers on a GPU."""
    return margin(parts * sizes.rank, "cuda")


@cache
def dequantized(sizes: Sizes) -> float:
    """A layer's four weights as a pass multiplies by them, the adapters beside them.

    With FP8 compute the weights lie there twice, by rows and by columns, in half as many bits. A base in 16 bits has
    room for its adapters in its own memory all the time (`room`).
    """
    return sizes.element * (sizes.layer_weights + _beside(sizes))


def _beside(sizes: Sizes) -> int:
    """Elements of a layer's adapters beside its weights, with the corners where nothing lies."""
    d, f, q, w = sizes.shape.width, sizes.shape.hidden, sizes.q, sizes.qkv
    in_qkv, in_o, in_gate_up, in_down = (_margin(sizes, parts) for parts in (3, 1, 2, 1))
    borders = in_qkv * (w + d) + in_o * (d + q) + in_gate_up * (2 * f + d) + in_down * (d + f)
    return borders + in_qkv**2 + in_o**2 + in_gate_up**2 + in_down**2


def summed_together(sizes: Sizes) -> bool:
    """Whether the activation's backward sums the gradients of adapters that read it (kernels/glu_lora.py)."""
    return 0 < 3 * sizes.rank <= MOST_RANKS and not sizes.trained


def sum_bytes(sizes: Sizes) -> float:
    """Of those sums, a token: one of each value for SUMMED tokens."""
    return 4 * 3 * sizes.rank * sizes.shape.hidden / SUMMED


@cache
def layer_working(sizes: Sizes, policy: Policy, tokens: int) -> float:
    """The most that is alive at one time in a layer's backward pass, beside what layers keep.

    Its forward pass takes less: what it makes for the backward is `kept` and `again` here.
    """
    s, e = sizes.shape, sizes.element
    d, f, q, w = s.width, s.hidden, sizes.q, sizes.qkv
    in_qkv, in_o, in_gate_up, in_down = (_margin(sizes, parts) for parts in (3, 1, 2, 1))
    t = min(tokens, sizes.tile)
    flow = tokens * e * (d + in_down + d + in_o)  # the gradient that came in, and that of m
    again = kept(sizes, MOST, tokens) - kept(sizes, policy, tokens) if "qkv" not in policy.keep else 0
    weights = dequantized(sizes) if sizes.bits < 16 else 0.0  # for a whole pass
    gradients = 4 * sizes.adapter  # of the adapters, in fp32; those of weights are added where they are held
    # the gradient with its margin, that of the activation, that of gate and up; the activation again, or sums
    mlp = t * e * (d + in_down + f + 2 * f + in_gate_up)
    mlp += sum_bytes(sizes) * max(t, SUMMED) if summed_together(sizes) else t * e * f
    mlp += 0 if "gate_up" in policy.keep else t * e * (d + in_gate_up + 2 * f)  # normed m, gate and up
    # do, dq dk dv; q and k rotated again where heads are normed; the kernel adds up dq in fp32, and dk and dv for each
    # query head
    attention = tokens * (e * (q + w + 2 * q + (w if s.spec.qk_norm else 0)) + 4 * q)
    # dq dk dv, rotated back into a buffer of their own, dh; of a tile the norm's output and the gradient there
    qkv = tokens * e * (w + w + in_qkv + d + in_down) + t * e * (d + in_qkv + d)
    return flow + again + weights + gradients + max(mlp, attention, qkv)


def head_working(sizes: Sizes, tokens: int) -> float:
    """The most that is alive in the final norm and the head, with every row labelled.

    The norm's input, its output or that one's gradient, and the head's rows, which their gradients are written over
    unless its weight's gradient is to be made of them.
    """
    row = sizes.shape.width * sizes.element
    logits = min(HEAD_CHUNK, tokens * sizes.vocabulary * sizes.element)
    return tokens * row * (4 if sizes.trained_head else 3) + max(logits, min(tokens, HEAD_ROWS) * row)


def peak(sizes: Sizes, static: float, policies: Mix, tokens: int, held: int = 0) -> float:
    """Bytes on the device at the highest: `static` (weights, adapters, optimizer) and a pass of `tokens`."""
    return static + _pass_peak(sizes, spread(policies), tokens, held)


def _pass_peak(sizes: Sizes, policies: tuple[Policy, ...], tokens: int, held: int = 0) -> float:
    """The highest of the stages of a pass, beside what lies there all the time.

    The topmost layers, whose backward comes when most is kept, are those whose weights are held.

    A layer's backward has what it and the layers below keep on the device. Of those that wait in host memory, its own
    values are back, and those of the next one below on the way (or, below the topmost, not let go yet since the forward
    pass: `HostMemory` holds one layer until another comes). So the walk goes up, though the pass goes down.
    """
    each = {policy: (kept(sizes, policy, tokens), layer_working(sizes, policy, tokens)) for policy in set(policies)}
    ready = held * dequantized(sizes)
    most = here = below = 0.0
    for layer, policy in enumerate(policies):
        values, working = each[policy]
        working -= dequantized(sizes) if layer >= len(policies) - held else 0
        if policy.offload:
            most = max(most, here + below + values + working)
            below = values
        else:
            here += values
            most = max(most, here + below + working)
    most = max(most, here + below + head_working(sizes, tokens))
    if sizes.trained and sizes.trained_head:  # the embedding's own gradient, and what it is made from, twice
        most = max(most, sizes.element * sizes.shape.width * (sizes.vocabulary + 2 * tokens))
    return ready + most + LIBRARIES


def room(sizes: Sizes) -> float:
    """What all layers of a frozen base in 16 bits take more than their weights, for adapters beside these."""
    return float(sizes.layers * sizes.element * _beside(sizes)) if sizes.bits == 16 else 0.0


def dequantization_seconds(sizes: Sizes, device: Device) -> float:
    """Of a layer, once."""
    if sizes.bits == 16:
        return 0.0
    return sizes.layer_weights * (sizes.bits / 8 + (1 if sizes.fp8 else sizes.element)) / (SKINNY * device.memory)


def attention_seconds(sizes: Sizes, device: Device, tokens: int, length: int) -> tuple[float, float]:
    """Of a layer's attention forward and backward, in documents of `length`."""
    scores = 4 * tokens * (length / 2) * sizes.q / device.matrix
    doublings = min(max(log2(length / 2048), -4), 6)
    forward, backward = (at + more * doublings for at, more in (ATTENTION_FORWARD, ATTENTION_BACKWARD))
    return scores / forward, 2.5 * scores / backward


@cache
def layer_seconds(sizes: Sizes, device: Device, policy: Policy, tokens: int, length: int) -> tuple[float, float]:
    """An estimate for one layer's forward and backward pass, without waiting for copies."""
    s, e = sizes.shape, sizes.element
    d, f, q, w = s.width, s.hidden, sizes.q, sizes.qkv
    tiles = -(-tokens // sizes.tile)
    product = 2 * tokens / device.matrix  # for each element of a weight
    base = 2 * tokens / device.fp8 if sizes.fp8 else product  # of one that is frozen
    value = tokens * e / device.memory  # to read or write, for each column
    skinny = value / SKINNY if sizes.rank else 0.0  # for each column that a product with an adapter reads
    attention, attention_back = attention_seconds(sizes, device, tokens, length)
    weights = dequantization_seconds(sizes, device)
    inputs, outputs = d + q + d + f, w + d + 2 * f + d  # of all four projections
    # kernels of models/block.py, a layer's and a tile's; gradients of adapters are added to their own one by one
    launches, tile_launches = (3, 14) if sizes.rank else (3, 8)
    back_launches, back_tile_launches = (19, 28) if sizes.rank else (5, 16)

    forward = base * sizes.layer_weights + attention + weights
    forward += value * (6 * d + 2 * w + 2 * q + 3 * f)  # norms, rotation, attention's output beside its margin, SwiGLU
    forward += skinny * inputs + GAP * (launches + tiles * tile_launches)

    backward = base * sizes.layer_weights + attention_back + weights
    backward += value * (10 * d + 2 * w + 6 * f)  # two norms again and backward, rotation, SwiGLU backward
    backward += skinny * (inputs + 2 * d + 2 * outputs) + GAP * (back_launches + tiles * back_tile_launches)
    if summed_together(
        sizes
    ):  # neither the activation nor the gradient of gate and up are read again for these, but sums are
        backward += 2 * sum_bytes(sizes) * tokens / device.memory - value * f - skinny * 3 * f - 3 * GAP * tiles
    if sizes.fp8:  # what is multiplied is quantized, and the adapter's share written apart and read again
        forward += value * (1.5 * inputs + 2 * outputs)
        backward += value * (1.5 * outputs + 2 * inputs)
    if sizes.trained:  # the products of weights' gradients, and the gradients read and written for each tile
        backward += product * sizes.layer_weights + 2 * e * sizes.layer_weights * tiles / device.memory
    if "gate_up" not in policy.keep:
        backward += base * 2 * d * f + GAP * tiles
    if "qkv" not in policy.keep:
        backward += base * d * (w + q) + value * (4 * d + 2 * w + 2 * q) + skinny * (d + q)
        backward += GAP * (1 + tiles * 7)
    if "o" not in policy.keep:
        backward += attention
    if policy.offload:  # copies take their part of the memory's rate
        copied = kept(sizes, policy, tokens) / device.memory
        forward, backward = forward + copied, backward + copied
    return forward, backward


def head_seconds(sizes: Sizes, device: Device, tokens: int) -> float:
    """Of the head's products, and of the kernel that reads their logits twice and writes the gradient over them."""
    products = 4 if sizes.trained_head else 2
    a_token = 2 * products * sizes.shape.width * sizes.vocabulary / device.matrix
    return tokens * (a_token + 3 * sizes.element * sizes.vocabulary / device.memory)


def seconds(sizes: Sizes, device: Device, policies: Mix, tokens: int, length: int, held: int = 0) -> float:
    """An estimate for one pass of `tokens`, forward and backward, in documents of `length`.

    What a step takes beside its passes (optimizer and trainer: about 8 ms) is the same for any plan.
    """
    return _pass_seconds(sizes, device, spread(policies), tokens, length, held)


def _pass_seconds(
    sizes: Sizes, device: Device, policies: tuple[Policy, ...], tokens: int, length: int, held: int = 0
) -> float:
    """Follows the device's two queues, one that computes and one that copies, as models/activations.py fills them."""
    kinds = set(policies)
    saved = dequantization_seconds(sizes, device) * held / sizes.layers  # of each layer, whichever are held
    each = {policy: layer_seconds(sizes, device, policy, tokens, length) for policy in kinds}
    times = {policy: (forward - saved, backward - saved) for policy, (forward, backward) in each.items()}
    copies = {policy: kept(sizes, policy, tokens) / (LINK * device.link) for policy in kinds if policy.offload}
    now = copying = 0.0  # when all that has been queued so far is done
    for policy in policies:
        now += times[policy][0]
        if policy.offload:  # one layer's values must have left when the next one's begin to
            left = copying
            copying = max(now, copying) + copies[policy]
            now = max(now, left)
    now += head_seconds(sizes, device, tokens)
    back = now  # when the next values that a layer waits for are there; the topmost have not been let go
    below = [policy for policy in policies if policy.offload]
    for policy in reversed(policies):
        if policy.offload:
            now = max(now, back)
            below.pop()
            if below:
                back = copying = max(now, copying) + copies[below[-1]]
        now += times[policy][1]
    return max(now, copying, len(policies) * device.launch + head_seconds(sizes, device, tokens))


def choose(
    sizes: Sizes, device: Device, budget: float, static: float, passes: list[int], length: int, host: float
) -> Plan | None:
    """The fastest plan whose peak stays within `budget`; None if there is none.

    passes: tokens that a pass may have. host: bytes of host memory that may be pinned. Where all else has its place,
    layers' weights stay dequantized. Host memory is used where that is `WORTH` it.
    """
    static += room(sizes)
    plans = [_choose(sizes, device, budget, static, passes, length, pinned) for pinned in (0.0, host)]
    if sizes.embedding and sizes.embedding <= host:
        left = static - sizes.embedding
        for pinned in (0.0, host - sizes.embedding):
            plans.append(_choose(sizes, device, budget, left, passes, length, pinned, embedding_on_host=True))
    return min((plan for plan in plans if plan is not None), key=partial(_cost, sizes), default=None)


def _cost(sizes: Sizes, plan: Plan) -> float:
    """Seconds a token, and a share of them for what is pinned."""
    parked = sum(kept(sizes, policy, plan.tokens) for policy in plan.policies if policy.offload)
    return plan.seconds_a_token * (1 + WORTH * (parked + sizes.embedding * plan.embedding_on_host) / GIB)


def _choose(
    sizes: Sizes,
    device: Device,
    budget: float,
    static: float,
    passes: list[int],
    length: int,
    host: float,
    *,
    embedding_on_host: bool = False,
) -> Plan | None:
    fitting = (1 - SLACK) * budget
    # a token's row comes across the link, before anything can be computed
    row = sizes.shape.width * sizes.element / (LINK * device.link) if embedding_on_host else 0.0
    layer, saving = dequantized(sizes), 2 * dequantization_seconds(sizes, device)

    def held(room: float) -> int:
        return min(sizes.layers, int(room / layer)) if saving else 0

    candidates: list[tuple[float, int, int, tuple[Policy, ...]]] = []
    for tokens in passes:
        for tile in _tiles(sizes, tokens):
            tiled = replace(sizes, tile=tile)
            each = {p: (kept(tiled, p, tokens), sum(layer_seconds(tiled, device, p, tokens, length))) for p in EVERY}
            head = head_seconds(tiled, device, tokens)
            beside = static + head_working(tiled, tokens) + LIBRARIES
            for counts, policies in _mixes(sizes.layers, offload=host > 0):
                here = sum(n * each[p][0] for p, n in counts if not p.offload)
                parked = sum(n * each[p][0] for p, n in counts if p.offload)
                if beside + here < fitting and parked <= host:
                    least = sum(n * each[p][1] for p, n in counts) - saving * held(fitting - beside - here)
                    least = max(least, sizes.layers * device.launch) + head
                    candidates.append((least / tokens + row, tokens, tile, policies))
    best: Plan | None = None
    for least, tokens, tile, policies in sorted(candidates, key=lambda x: x[0]):
        if best is not None and least >= best.seconds_a_token:
            break  # `least` waits for no copy: nothing from here on is faster
        tiled = replace(sizes, tile=tile)
        needed = static + _pass_peak(tiled, policies, tokens)
        if needed > fitting:
            continue
        count = held(fitting - needed)
        while saving and count < sizes.layers and static + _pass_peak(tiled, policies, tokens, count + 1) <= fitting:
            count += 1
        time = _pass_seconds(tiled, device, policies, tokens, length, count) / tokens + row
        if best is None or time < best.seconds_a_token:
            needed = static + _pass_peak(tiled, policies, tokens, count)
            best = Plan(tokens, tile, policies, needed, time, count, embedding_on_host, static)
    return best


def leanest(sizes: Sizes, static: float, tokens: int) -> Plan:
    """The plan for passes of `tokens` that takes the least memory on the device."""
    lean = replace(sizes, tile=_tiles(sizes, tokens)[-1])
    static += room(sizes) - sizes.embedding
    mixes = [{replace(p, offload=True): sizes.layers} for p in (MOST, ATTENTION, INPUT)]
    needed, policies = min(((peak(lean, static, mix, tokens), spread(mix)) for mix in mixes), key=lambda x: x[0])
    on_host = sizes.embedding > 0
    return Plan(tokens, lean.tile, policies, needed, float("nan"), embedding_on_host=on_host, static=static)


def _tiles(sizes: Sizes, tokens: int) -> list[int]:
    """The tiles worth a try, the longest first. Weights' gradients are rounded at each tile: as few as can be."""
    tiles = sorted({min(tile, tokens) for tile in TILES}, reverse=True)
    return tiles[:1] if sizes.trained else tiles


@cache
def _mixes(layers: int, *, offload: bool) -> list[tuple[tuple[tuple[Policy, int], ...], tuple[Policy, ...]]]:
    """What layers may keep, as counts and spread out.

    Some layers keep one set of values on the host and the others one or two on the device, or two on the host (which
    together can fill the link) and one, of few layers, on the device. Without `offload`: none on the host.
    """
    step = max(1, layers // 16)
    counts = sorted({*range(0, layers + 1, step), layers})
    few = [n for n in counts if n <= layers // 4][::2]
    parts = [
        ((host, on_host), (fuller, full), (leaner, layers - on_host - full))
        for host, (fuller, leaner) in product(ON_HOST, pairwise(ON_DEVICE))
        for on_host, full in product(counts, counts)
    ] + [
        ((fuller, full), (leaner, layers - full - here), (device, here))
        for (fuller, leaner), device in product(combinations(ON_HOST, 2), ON_DEVICE)
        for full, here in product(counts, few)
    ]
    used = [tuple((p, n) for p, n in part if n) for part in parts if all(n >= 0 for _, n in part)]
    used = [part for part in used if offload or not any(p.offload for p, _ in part)]
    return [(mix, spread(dict(mix))) for mix in {frozenset(mix): mix for mix in used}.values()]


def spread(mix: Mix) -> tuple[Policy, ...]:
    """A policy for each layer, those of one kind as far apart as they go: copies then have layers to hide behind.

    The order of `mix` does not matter.
    """
    kinds = sorted((p for p, n in mix.items() if n), key=lambda p: (not p.offload, len(p.keep)))
    places = sorted(((i + 0.5) / mix[p], order, p) for order, p in enumerate(kinds) for i in range(mix[p]))
    return tuple(policy for _, _, policy in places)
