"""bitsandbytes' AdamW with moments of 8 bits, many parameters an update.

bitsandbytes updates one parameter after another, and waits for the GPU after each: with an adapter of hundreds of small
matrices the GPU idles through most of the step. Here parameters lie next to each other in chunks. For each chunk,
weights and gradients are gathered into buffers that all chunks share, bitsandbytes' own update runs once on the whole,
and the weights are scattered back. Nothing waits for the GPU.

The moments of a chunk are one tensor, and the state of a parameter holds views of it, of bitsandbytes' names and
shapes: checkpoints of either optimizer load into the other. Every parameter starts at a multiple of bitsandbytes' block
(the values that share a scale), and what fills up its last block is zero, so each block is quantized as it is alone:
weights and moments come out bitwise as bitsandbytes'.

Weights held in bf16 are the exception. Rounded to nearest, one of 0.02 stays what it is at any update below 6e-5, for
as long as training goes on. So these are gathered into fp32, updated by bitsandbytes there, and rounded back at random
(kernels/stochastic_round.py), which keeps the mean of what is added; those larger than a chunk piece by piece, so that
no copy in fp32 lasts. Moments come out as bitsandbytes'. What is random is a function of the group's `rounding_seed`,
the parameter's step, and a value's place among all parameters: a run resumed from a checkpoint goes on bitwise, and
processes that hold the same weights keep them the same.

Sources: Dettmers et al. 2022, arXiv:2110.02861 (8-bit moments); Zamirai et al. 2020, arXiv:2010.06192 (bf16 weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import bitsandbytes.functional as F
import torch
from bitsandbytes.optim import AdamW
from torch import Tensor

from whet.kernels.stochastic_round import stochastic_round

BLOCK = 256
CHUNK = 1 << 22  # values: 32 MB of fp32 weights and gradients, which fit in an H100's second-level cache
MOMENTS = ("state1", "state2")
SCALES = ("absmax1", "absmax2")
MAPS = ("qmap1", "qmap2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Settings(NamedTuple):
    """What parameters must agree on, beside the step's number, to be updated by one call."""

    lr: float
    betas: tuple[float, ...]
    eps: float
    weight_decay: float
    alpha: float
    skip_zeros: bool
    seed: int | None  # of the weights' stochastic rounding; None where they are rounded to nearest, or not at all


@dataclass(eq=False)
class _Place:
    """A parameter's place in its chunk."""

    parameter: Tensor
    chunk: _Chunk
    start: int
    stop: int  # of its last block
    first: int  # the number of its first block among the blocks of all parameters
    dtype: torch.dtype
    device: torch.device
    state: dict[str, Any] = field(default_factory=dict)  # the parameter's, as it was when the chunk was laid out
    weights: Tensor = field(init=False)  # views of the chunks' buffers; not set where the parameter is alone
    grads: Tensor = field(init=False)
    rounded: Tensor = field(init=False)  # only where weights are rounded at random

    def holds(self, state: dict[str, Any], seed: int | None) -> bool:
        """Whether nobody has put other tensors in the place of those laid out here, or rounds in another way."""
        laid = self.state
        for name in MOMENTS + SCALES + MAPS if "absmax1" in laid else MOMENTS:
            if state[name] is not laid[name]:
                return False
        rounds = self.chunk.rounds == (seed is not None)
        return rounds and self.parameter.dtype == self.dtype and self.parameter.device == self.device


@dataclass(eq=False)
class _Chunk:
    """Parameters of one dtype, device and kind of state."""

    rounds: bool  # at random, from buffers in fp32
    size: int = 0  # values, whole blocks
    places: list[_Place] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)  # state1, state2; in 8 bits absmax1 and 2, qmap1 and 2
    weights: Tensor = field(init=False)  # the buffers shared with other chunks; not set where one parameter is alone
    grads: Tensor = field(init=False)
    blocks: Tensor = field(init=False)  # the number of each block among those of all parameters; set where it rounds

    @property
    def needs_buffers(self) -> bool:
        return self.rounds or len(self.places) > 1


_Turn = tuple[_Place, tuple[int, _Settings]]  # a parameter, the number of its step, and settings


class AdamW8bit(AdamW):
    """bitsandbytes.optim.AdamW(optim_bits=8), with few launches a step. See this module's docstring.

    stochastic_rounding: whether weights held in bf16 are rounded at random; to nearest otherwise, as bitsandbytes does.
    seed: of that rounding. Both are kept as each group's `rounding_seed` (None: to nearest), and so in checkpoints.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}; it must be an int (stochastic_rounding=False rounds to nearest)")
        self._places: dict[Tensor, _Place] = {}
        self._maps: list[Tensor] = []
        super().__init__(params, lr, betas, eps, weight_decay, optim_bits=8, min_8bit_size=min_8bit_size)
        self.defaults["rounding_seed"] = seed if stochastic_rounding else None
        self._fill_in_seeds()

    @classmethod
    def like(cls, optimizer: AdamW, *, stochastic_rounding: bool = True, seed: int = 0) -> AdamW8bit:
        """An optimizer of the groups of `optimizer`, which has not made a step yet."""
        names = ("lr", "betas", "eps", "weight_decay")
        settings = {name: optimizer.defaults[name] for name in names}
        settings |= {"min_8bit_size": optimizer.args.min_8bit_size}
        return cls(optimizer.param_groups, stochastic_rounding=stochastic_rounding, seed=seed, **settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when a state is loaded: bitsandbytes' has no seeds."""
        super().__setstate__(state)
        self._fill_in_seeds()

    def _fill_in_seeds(self) -> None:
        for group in self.param_groups:
            group.setdefault("rounding_seed", self.defaults["rounding_seed"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. closure: computes the loss anew, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True

        due, alone = self._due()
        places = self._places
        if not all(p in places and places[p].holds(self.state[p], due[p].seed) for p in due):
            self._lay_out(due)
        turns: dict[_Chunk, list[_Turn]] = {}
        for p, settings in due.items():
            state, place = self.state[p], self._places[p]
            state["step"] += 1
            turns.setdefault(place.chunk, []).append((place, (state["step"], settings)))
        with _on_default_stream({p.device for p in [*due, *(p for *_, p in alone)]}):
            for chunk, turn in turns.items():
                self._update(chunk, sorted(turn, key=lambda pair: pair[0].start))
            for gindex, pindex, p in alone:
                self._update_alone(gindex, pindex, p)
        return loss

    def _due(self) -> tuple[dict[Tensor, _Settings], list[tuple[int, int, Tensor]]]:
        """The parameters with a gradient: those for chunks with their settings, others with their group and number."""
        due: dict[Tensor, _Settings] = {}
        alone: list[tuple[int, int, Tensor]] = []
        for gindex, group in enumerate(self.param_groups):
            common: dict[int | None, tuple[_Settings, float]] = {}
            for pindex, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if len(self.state[p]) == 0:
                    self.init_state(group, p, gindex, pindex)
                seed = _seed(group, p)
                if (gindex, pindex) in self.mng.index2config or id(p) in self.mng.pid2config:
                    config = self.get_config(gindex, pindex, group)
                    settings, unorm = _settings(config, seed), config["max_unorm"]
                else:
                    if seed not in common:
                        config = self.get_config(gindex, pindex, group)
                        common[seed] = _settings(config, seed), config["max_unorm"]
                    settings, unorm = common[seed]
                plain = type(grad) is Tensor and grad.layout == torch.strided and grad.dtype == p.dtype
                plain = plain and p.dtype in DTYPES and grad.device == p.device
                # bitsandbytes reads tensors in the order of their memory: moments like those of a transposed weight
                # mean something else to it than to torch
                if unorm > 0 or not plain or not self.state[p]["state1"].is_contiguous():
                    alone.append((gindex, pindex, p))
                    continue
                if not p.is_contiguous():
                    p.data = p.data.contiguous()
                if not grad.is_contiguous():
                    p.grad = grad.contiguous()
                due[p] = settings
        return due, alone

    # ------------------------------------------------------------ layout

    def _lay_out(self, due: dict[Tensor, _Settings]) -> None:
        """Give each parameter a place, and those next to it that it will be updated with."""
        old, self._places = set(self._places), {}
        chunks: list[_Chunk] = []
        rows: list[tuple[Any, int, int, int, Tensor]] = []
        first = self._first_blocks()
        for gindex, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p in due or (p in old and self.state.get(p)):
                    state, rounds = self.state[p], _seed(group, p) is not None
                    kind = str(p.device), str(p.dtype), self._kind_of_state(state), gindex, rounds, p.numel() >= CHUNK
                    rows.append((kind, state["step"], len(rows), first[p], p))
        rows.sort(key=lambda row: row[:3])
        for (*_, rounds, _), same in groupby(rows, key=lambda row: row[0]):
            chunk = _Chunk(rounds)
            for *_, number, p in same:
                length = _whole_blocks(p.numel())
                if chunk.size + length > CHUNK and chunk.places:
                    chunks.append(chunk)
                    chunk = _Chunk(rounds)
                start, chunk.size = chunk.size, chunk.size + length
                chunk.places.append(_Place(p, chunk, start, chunk.size, number, p.dtype, p.device))
            chunks.append(chunk)
        for chunk in chunks:
            if len(chunk.places) > 1:
                self._move_state(chunk)
            for place in chunk.places:
                place.state = dict(self.state[place.parameter])
                self._places[place.parameter] = place
        _share_buffers([chunk for chunk in chunks if chunk.needs_buffers])

    def _first_blocks(self) -> dict[Tensor, int]:
        """The number of each parameter's first block, by the groups alone: what is random must not depend on chunks."""
        first, number = {}, 0
        for group in self.param_groups:
            for p in group["params"]:
                first[p] = number
                number += _whole_blocks(p.numel()) // BLOCK
        return first

    def _kind_of_state(self, state: dict[str, Any]) -> tuple[int, ...]:
        """Numbers of its maps, none in 32 bits. Equal maps become one: a loaded state has a copy for each parameter."""
        numbers = []
        for name in MAPS if "absmax1" in state else ():
            qmap, known = state[name], self._maps
            same = [i for i, one in enumerate(known) if one is qmap] or [
                i for i, one in enumerate(known) if one.device == qmap.device and torch.equal(one, qmap)
            ]
            numbers.append(same[0] if same else len(known))
            if not same:
                known.append(qmap)
            state[name] = known[numbers[-1]]
        return tuple(numbers)

    def _move_state(self, chunk: _Chunk) -> None:
        """Put the states of a chunk's parameters next to each other."""
        states = [self.state[place.parameter] for place in chunk.places]
        first = states[0]
        for name, scale, qmap in zip(MOMENTS, SCALES, MAPS, strict=True):
            whole = first[name].new_zeros(chunk.size)
            if qmap in first:
                chunk.state[qmap] = first[qmap]
                whole.copy_(first[qmap].abs().argmin())  # the code of 0, so that no scale comes from the fill
                scales = first[scale].new_zeros(chunk.size // BLOCK)
                starts = [place.start // BLOCK for place in chunk.places]
                chunk.state[scale] = _moved(scales, states, scale, starts)
            chunk.state[name] = _moved(whole, states, name, [place.start for place in chunk.places])

    # ------------------------------------------------------------ update

    def _update(self, chunk: _Chunk, due: list[_Turn]) -> None:
        """Update what is due in a chunk, in runs of parameters next to each other with the same settings."""
        start = 0
        for i in range(1, len(due) + 1):
            if i == len(due) or due[i][0].start != due[i - 1][0].stop or due[i][1] != due[i - 1][1]:
                self._update_run(chunk, [place for place, _ in due[start:i]], *due[start][1])
                start = i

    def _update_run(self, chunk: _Chunk, run: list[_Place], step: int, settings: _Settings) -> None:
        parameters = [place.parameter for place in run]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if len(run) == 1:
            if settings.seed is None:
                self._call(parameters[0], gradients[0], run[0].state, step, settings)
            else:
                self._update_in_pieces(chunk, run[0], gradients[0], step, settings, settings.seed)
            return
        start, stop = run[0].start, run[-1].stop
        weights, grads = chunk.weights[start:stop], chunk.grads[start:stop]
        if any(place.stop - place.start != place.parameter.numel() for place in run):
            grads.zero_()  # another chunk's gradients lie where this one's blocks are filled up
        torch._foreach_copy_([place.grads for place in run], gradients)
        torch._foreach_copy_([place.weights for place in run], parameters)
        self._call(weights, grads, _part(chunk.state, start, stop), step, settings)
        if settings.seed is None:
            torch._foreach_copy_(parameters, [place.weights for place in run])
            return
        blocks = chunk.blocks[start // BLOCK : stop // BLOCK]
        stochastic_round(weights, _for_rounded(chunk.grads)[start:stop], blocks, seed=settings.seed, step=step)
        torch._foreach_copy_(parameters, [place.rounded for place in run])

    def _update_in_pieces(
        self, chunk: _Chunk, place: _Place, grad: Tensor, step: int, settings: _Settings, seed: int
    ) -> None:
        """Update one parameter of any size, in fp32, as much at a time as the buffers hold."""
        p, grad, size = place.parameter.view(-1), grad.view(-1), chunk.weights.numel()
        for start in range(0, p.numel(), size):
            stop = min(start + size, p.numel())
            weights, grads = chunk.weights[: stop - start], chunk.grads[: stop - start]
            torch._foreach_copy_([weights, grads], [p[start:stop], grad[start:stop]])
            self._call(weights, grads, _part(place.state, start, stop), step, settings)
            stochastic_round(weights, p[start:stop], place.first + start // BLOCK, seed=seed, step=step)

    def _update_alone(self, gindex: int, pindex: int, p: Tensor) -> None:
        """By bitsandbytes' own method; where weights are rounded at random, on a copy in fp32, dropped at the end."""
        group, seed = self.param_groups[gindex], _seed(self.param_groups[gindex], p)
        if seed is None or p.grad is None:
            self.update_step(group, p, gindex, pindex)
            return
        wide = p.detach().float()
        wide.grad = p.grad.float()
        self.state[wide] = self.state[p]
        try:
            self.update_step(group, wide, gindex, pindex)
        finally:
            del self.state[wide]
        p.data = p.data.contiguous()
        first, step = self._first_blocks()[p], self.state[p]["step"]
        stochastic_round(wide.view(-1), p.view(-1), first, seed=seed, step=step)

    def _call(self, weights: Tensor, grads: Tensor, state: dict[str, Any], step: int, settings: _Settings) -> None:
        """bitsandbytes' update, called as its own optimizer calls it."""
        lr, (beta1, beta2, *more), eps, decay, alpha, skip_zeros, _ = settings
        beta3 = more[0] if more else 0.0
        if "absmax1" in state:
            F.optimizer_update_8bit_blockwise(
                self.optimizer_name,
                grads,
                weights,
                state["state1"],
                state["state2"],
                beta1,
                beta2,
                beta3,
                alpha,
                eps,
                step,
                lr,
                state["qmap1"],
                state["qmap2"],
                state["absmax1"],
                state["absmax2"],
                decay,
                skip_zeros=skip_zeros,
            )
        else:
            F.optimizer_update_32bit(
                self.optimizer_name,
                grads,
                weights,
                state["state1"],
                beta1,
                eps,
                step,
                lr,
                state["state2"],
                beta2,
                beta3,
                alpha,
                decay,
                skip_zeros=skip_zeros,
            )


def _settings(config: dict[str, Any], seed: int | None) -> _Settings:
    names = ("lr", "eps", "weight_decay", "skip_zeros")
    alpha, betas = config.get("alpha", 0.0), tuple(config["betas"])
    return _Settings(betas=betas, alpha=alpha, seed=seed, **{name: config[name] for name in names})


def _seed(group: dict[str, Any], p: Tensor) -> int | None:
    """That of p's stochastic rounding; None where p isn't rounded at random."""
    return group["rounding_seed"] if p.dtype == torch.bfloat16 else None


def _part(state: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The state of values start to stop; start is a multiple of BLOCK."""
    part = dict(state)
    for name in MOMENTS:
        part[name] = state[name].view(-1)[start:stop]
    for name in SCALES if "absmax1" in state else ():
        part[name] = state[name][start // BLOCK : _whole_blocks(stop) // BLOCK]
    return part


def _share_buffers(chunks: list[_Chunk]) -> None:
    """Two buffers for all chunks of a dtype and device, and in them the views of each parameter."""
    kinds = [(chunk.places[0].device, torch.float32 if chunk.rounds else chunk.places[0].dtype) for chunk in chunks]
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for chunk, kind in zip(chunks, kinds, strict=True):
        # one larger than CHUNK is a parameter alone, and goes through the buffers in pieces
        sizes[kind] = max(sizes.get(kind, 0), min(chunk.size, CHUNK))
    buffers = {(d, t): [torch.zeros(size, device=d, dtype=t) for _ in range(2)] for (d, t), size in sizes.items()}
    for chunk, kind in zip(chunks, kinds, strict=True):
        chunk.weights, chunk.grads = buffers[kind]
        if len(chunk.places) > 1:
            _make_views(chunk)


def _make_views(chunk: _Chunk) -> None:
    """The parameters' parts of a chunk's buffers."""
    for place in chunk.places:
        part, shape = slice(place.start, place.start + place.parameter.numel()), place.parameter.shape
        place.weights, place.grads = chunk.weights[part].view(shape), chunk.grads[part].view(shape)
        if chunk.rounds:
            place.rounded = _for_rounded(chunk.grads)[part].view(shape)
    if chunk.rounds:
        numbers = [torch.arange(p.first, p.first + (p.stop - p.start) // BLOCK) for p in chunk.places]
        chunk.blocks = torch.cat(numbers).to(chunk.places[0].device, torch.int32)


def _for_rounded(grads: Tensor) -> Tensor:
    """Where rounded weights go until they are scattered: over the gradients, which nothing reads once moments have."""
    return grads.view(torch.bfloat16)


def _whole_blocks(values: int) -> int:
    return -(-values // BLOCK) * BLOCK


def _moved(whole: Tensor, states: list[dict[str, Any]], name: str, starts: list[int]) -> Tensor:
    """`whole`, with the tensors called `name` copied into it, from `starts` on; the states hold views of it then."""
    old = [state[name] for state in states]
    new = [whole[start : start + t.numel()].view(t.shape) for start, t in zip(starts, old, strict=True)]
    torch._foreach_copy_(new, old)
    for state, view in zip(states, new, strict=True):
        state[name] = view
    return whole


@contextmanager
def _on_default_stream(devices: set[torch.device]) -> Iterator[None]:
    """Work on the default stream of GPUs, where bitsandbytes launches its updates whatever the current stream is."""
    pairs = [(torch.cuda.current_stream(d), torch.cuda.default_stream(d)) for d in devices if d.type == "cuda"]
    pairs = [(current, default) for current, default in pairs if current != default]
    with ExitStack() as stack:
        for current, default in pairs:
            default.wait_stream(current)
            stack.enter_context(torch.cuda.stream(default))
        yield
    for current, default in pairs:
        current.wait_stream(default)
