"""Linear layers that read one input, with their LoRA adapters, as one matrix product.

A `Projection` is read off the modules of a model by models/reading.py.

Shapes: T tokens, K inputs, N outputs of all parts together, R columns for adapters and bias (see kernels/extend.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whet.kernels import layer_weights
from whet.kernels._precision import wide_dtype
from whet.kernels.extend import extend, lay_out
from whet.kernels.fp8 import weight_scales
from whet.kernels.glu_lora import Sum
from whet.kernels.layer_weights import ProjectionWeight
from whet.kernels.nf4 import NF4Weight, dequantize_nf4, stack, stack_dense
from whet.models.weights import (
    ApartWeights,
    BesideWeights,
    Fp8Base,
    Fp8Weights,
    Weights,
    add_product,
    product,
)


@dataclass(frozen=True)
class Part:
    """One linear layer: weight [n, K], bias [n], and adapter: down [r, K], up [n, r], both None without one.

    trained: those of weight and bias that train themselves.
    """

    weight: NF4Weight | Tensor
    rows: int
    bias: Tensor | None = None
    trained: tuple[nn.Parameter, ...] = ()
    down: nn.Parameter | None = None
    up: nn.Parameter | None = None
    scale: float = 0.0

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.down, self.up, *self.trained) if self.down is not None else self.trained  # type: ignore[return-value]


class Projection:
    """Stacked parts: y [T, N] = x [T, K] W^T + b + s (x A^T) B^T.

    room: [N + R, K + R] in which the parts' weights already lie as kernels/extend.py wants them, if they do.
    """

    def __init__(self, parts: tuple[Part, ...], columns: int, room: Tensor | None = None):
        self.parts, self.columns, self.room = parts, columns, room
        self.rows = sum(part.rows for part in parts)
        self.adapted = tuple(part for part in parts if part.down is not None)
        self.ranks = [part.down.shape[0] for part in self.adapted]
        self.rank = sum(self.ranks)
        self.biased = any(part.bias is not None for part in parts)
        self.parameters = tuple(p for part in parts for p in part.parameters)

    def margin(self, device: torch.device) -> int:
        """R; 0 where there is nothing to add."""
        return margin(self.rank + self.biased, device.type)

    @cached_property
    def _stacked(self) -> tuple[NF4Weight | Tensor, ...]:
        """The parts' weights: one, where they lie together in memory."""
        weights = [part.weight for part in self.parts]
        together = None
        if all(isinstance(w, NF4Weight) for w in weights):
            together = stack(weights)  # type: ignore[arg-type]
        elif all(isinstance(w, Tensor) for w in weights):
            together = stack_dense(weights)  # type: ignore[arg-type]
        return tuple(weights) if together is None else (together,)

    def weights(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """NF4, and weights of another dtype, in a new buffer with the adapters beside it; others as they lie."""
        rows, columns, margin = self.rows, self.columns, self.margin(device)
        if self.room is not None and self.room.dtype == dtype and self.room.shape[0] == rows + margin:
            self._extend(self.room)
            return self.beside(self.room)
        if all(isinstance(w, Tensor) and w.dtype == dtype for w in self._stacked):
            if not margin and len(self._stacked) == 1:
                return self.beside(self._stacked[0])  # type: ignore[arg-type]
            return ApartWeights(self._stacked, *self.borders(dtype, device))  # type: ignore[arg-type]
        e = torch.empty(rows + margin, columns + margin, dtype=dtype, device=device)
        row = 0
        for weight in self._stacked:
            height = weight.rows if isinstance(weight, NF4Weight) else weight.shape[0]
            place = e[row : row + height, :columns]
            if isinstance(weight, NF4Weight):
                dequantize_nf4(weight, out=place)
            else:
                place.copy_(weight)
            row += height
        if margin:
            self._extend(e)
        return self.beside(e)

    def _extend(self, e: Tensor) -> None:
        """Lay the adapters beside the weights in e."""
        downs, ups = self._adapters(e)
        extend(e, downs, ups, [part.scale for part in self.parts], self.rows, self.columns, self._bias(e))

    def borders(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """s B [N, R], with the bias, and A [R, K]."""
        margin = self.margin(device)
        up = torch.empty(self.rows, margin, dtype=dtype, device=device)
        down = torch.empty(margin, self.columns, dtype=dtype, device=device)
        if margin:
            downs, ups = self._adapters(down)
            lay_out(down, up, downs, ups, [part.scale for part in self.parts], self._bias(down))
        return up, down

    @cached_property
    def fp8_base(self) -> Fp8Base | None:
        """None where the base is not NF4 in one piece, or its sizes are none that FP8 products take."""
        weight = self._stacked[0]
        if len(self._stacked) > 1 or not isinstance(weight, NF4Weight) or self.rows % 16 or self.columns % 16:
            return None
        return Fp8Base(weight, *weight_scales(weight))

    def _adapters(self, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of every part; of rank 0 where it has none."""
        downs = [p.down.detach() if p.down is not None else like.new_empty(0, self.columns) for p in self.parts]
        ups = [p.up.detach() if p.up is not None else like.new_empty(p.rows, 0) for p in self.parts]
        return downs, ups

    @cached_property
    def in_one_launch(self) -> ProjectionWeight | None:
        """For kernels/layer_weights.py; None where its kernel can't lay out this projection."""
        if len(self._stacked) > 1 or not isinstance(self._stacked[0], NF4Weight):
            return None
        weight = self._stacked[0]
        like = torch.empty(0, device=weight.packed.device)
        downs = [p.down if p.down is not None else like.new_empty(0, self.columns) for p in self.parts]
        ups = [p.up if p.up is not None else like.new_empty(p.rows, 0) for p in self.parts]
        scales = [p.scale for p in self.parts]
        return ProjectionWeight(weight, downs, ups, scales, self.margin(like.device), self._bias(like.to(weight.dtype)))

    def beside(self, e: Tensor) -> Weights:
        return BesideWeights(e, self.rows, self.columns)

    def _bias(self, like: Tensor) -> Tensor | None:
        if not self.biased:
            return None
        biases = [part.bias.detach() if part.bias is not None else like.new_zeros(part.rows) for part in self.parts]
        return torch.cat(biases)

    def gradients(
        self,
        g_TR: Tensor,
        x_TK: Tensor | None,
        dy_TN: Tensor,
        tail_TR: Tensor,
        *,
        in_place: bool = False,
        downs: Sequence[Sum] | None = None,
        ups: Sequence[Sum] | None = None,
    ) -> list[Tensor | None]:
        """fp32 gradients of `parameters` from one tile of tokens.

        g: dY (s B), the margin of the gradient; x: the input; dy: the gradient of the output; tail: x A^T.
        in_place: they are added to the parameters' own `grad` where nobody listens to that, and None here.
        downs, ups: those of A, or of B, which have been made already (`down_sums`, `up_sums`); without A's, x is asked.
        """
        if not self.parameters:
            return []
        g, tail = g_TR[:, : self.rank].T, tail_TR[:, : self.rank]
        there = self._in_place(in_place, dy_TN.dtype)
        of_downs = self._down_gradients(g, x_TK, there) if downs is None else _given(downs, there)
        of_ups = self._up_gradients(dy_TN, tail, there) if ups is None else _given(ups, there)
        found: list[Tensor | None] = []
        for part, rows, _ in self._places:
            if part.down is not None:
                found += [next(of_downs), next(of_ups)]
            for parameter in part.trained:
                dy = dy_TN[:, rows]
                assert x_TK is not None
                if parameter.ndim != 2:
                    found.append(dy.sum(0, dtype=wide_dtype(dy.dtype)))
                elif in_place and takes_in_place(parameter, dy.dtype):
                    add_to_gradient(parameter, dy.T, x_TK)
                    found.append(None)
                else:
                    found.append(product(dy.T, x_TK))
        return found

    def _in_place(self, in_place: bool, dtype: torch.dtype) -> bool:
        """Whether gradients of adapters are added to the adapters' own."""
        adapters = (p for part in self.adapted for p in (part.down, part.up))
        return in_place and all(p is not None and takes_in_place(p, wide_dtype(dtype)) for p in adapters)

    def down_sums(self, dtype: torch.dtype, *, in_place: bool) -> list[Sum]:
        """Where a kernel is to put the gradients of each A [r, K], from g and x in `dtype`: see `gradients`."""
        there = self._in_place(in_place, dtype)
        return [sum_of(p.down, 1.0, dtype, in_place=there) for p in self.adapted if p.down is not None]

    def up_sums(self, dtype: torch.dtype, *, in_place: bool) -> list[Sum]:
        """Where a kernel is to put those of each B [n, r]."""
        there = self._in_place(in_place, dtype)
        return [sum_of(p.up, p.scale, dtype, in_place=there) for p in self.adapted if p.up is not None]

    @cached_property
    def _places(self) -> list[tuple[Part, slice, slice]]:
        """Each part, with its rows of W and its columns of the margin: none without an adapter."""
        found, row, column = [], 0, 0
        for part in self.parts:
            rank = 0 if part.down is None else part.down.shape[0]
            found.append((part, slice(row, row + part.rows), slice(column, column + rank)))
            row, column = row + part.rows, column + rank
        return found

    def _down_gradients(self, g_RT: Tensor, x_TK: Tensor | None, in_place: bool) -> Iterator[Tensor | None]:
        """Those of A, which lie under each other as one matrix once this has made them: one product adds to all."""
        downs = [(part.down, ranks) for part, _, ranks in self._places if part.down is not None]
        there = [p.grad for p, _ in downs if p.grad is not None] if in_place else []
        together = stack_dense(there) if downs and len(there) == len(downs) else None
        if together is not None:
            assert x_TK is not None
            add_product(together, g_RT, x_TK)
        elif downs:
            assert x_TK is not None
            made = product(g_RT, x_TK)
            if not in_place:
                return iter([made[ranks] for _, ranks in downs])
            for p, ranks in downs:
                p.grad = made[ranks] if p.grad is None else p.grad.add_(made[ranks])
        return repeat(None)

    def _up_gradients(self, dy_TN: Tensor, tail_TR: Tensor, in_place: bool) -> Iterator[Tensor | None]:
        """Those of B. One product gives them for all parts, and more that nobody needs: cheaper than one for each."""
        ups = [(part.up, part.scale, rows, ranks) for part, rows, ranks in self._places if part.up is not None]
        if in_place and len(ups) == 1 and (grad := ups[0][0].grad) is not None:
            add_product(grad, dy_TN[:, ups[0][2]].T, tail_TR, ups[0][1])
        elif ups:
            made = product(dy_TN.T, tail_TR)
            if not in_place:
                return iter([made[rows, ranks] if s == 1 else made[rows, ranks] * s for _, s, rows, ranks in ups])
            for p, scale, rows, ranks in ups:
                part = made[rows, ranks]
                if p.grad is None:
                    p.grad = part.mul(scale).contiguous()
                else:
                    p.grad.add_(part, alpha=scale)
        return repeat(None)


def sum_of(parameter: nn.Parameter, scale: float, dtype: torch.dtype, *, in_place: bool) -> Sum:
    """Where a gradient of `parameter` is summed: in its own `grad`, made if it has none yet, or in a new tensor."""
    if in_place and parameter.grad is not None:
        parameter.grad = parameter.grad.contiguous()
        return Sum(parameter.grad, scale, add=True)
    total = torch.empty(parameter.shape, dtype=wide_dtype(dtype), device=parameter.device)
    if in_place:
        parameter.grad = total
    return Sum(total, scale)


def _given(sums: Sequence[Sum], in_place: bool) -> Iterator[Tensor | None]:
    return repeat(None) if in_place else iter([s.total for s in sums])


def margin(needed: int, device_type: str) -> int:
    """R for so many columns of adapters and bias: a power of two, which keeps rows aligned on a GPU; 0 for none."""
    return max(64 if device_type == "cuda" else 16, 1 << (needed - 1).bit_length()) if needed else 0


class LayerWeights(NamedTuple):
    qkv: Weights
    o: Weights
    gate_up: Weights
    down: Weights


@dataclass(eq=False)
class Projections:
    """The four of a layer."""

    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection

    def __post_init__(self) -> None:
        self.all = (self.qkv, self.o, self.gate_up, self.down)
        self.parameters = tuple(x for p in self.all for x in p.parameters)
        self._laid_out: dict[tuple[torch.dtype, bool, bool], layer_weights.LayerWeights | None] = {}
        self._held: dict[torch.dtype, Tensor] = {}

    def weights(
        self, dtype: torch.dtype, device: torch.device, *, fp8: bool = False, hold: bool = False
    ) -> LayerWeights:
        """All four dequantized, the adapters beside them; or, in FP8, to be so. In one launch where that can be.

        hold: what is dequantized stays where it is until `let_go`, and only the adapters are laid out again.
        """
        ready = not fp8 and dtype in self._held
        together = self._in_one_launch(dtype, apart=fp8, ready=ready)
        if fp8:
            if together is not None:
                laid_out = layer_weights.layer_weights(together)
                borders = list(zip(laid_out[::2], laid_out[1::2], strict=True))
            else:
                borders = [p.borders(dtype, device) for p in self.all]
            pairs = zip(self.all, borders, strict=True)
            return LayerWeights(*(Fp8Weights(p.fp8_base, *border, hold=hold) for p, border in pairs))
        if together is None:
            return LayerWeights(*(p.weights(dtype, device) for p in self.all))
        if hold and not ready:
            self._held[dtype] = layer_weights.new_buffer(together)
        laid_out = layer_weights.layer_weights(together, self._held.get(dtype))
        return LayerWeights(*(p.beside(e) for p, e in zip(self.all, laid_out, strict=True)))

    def let_go(self) -> None:
        """Of what was held."""
        self._held.clear()
        for p in self.all:
            if "fp8_base" in vars(p) and p.fp8_base is not None:
                p.fp8_base.held.clear()

    def _in_one_launch(self, dtype: torch.dtype, *, apart: bool, ready: bool) -> layer_weights.LayerWeights | None:
        key = dtype, apart, ready
        if key not in self._laid_out:
            known = [x for x in (p.in_one_launch for p in self.all) if x is not None]
            fits = len(known) == 4 and layer_weights.takes(known)
            self._laid_out[key] = layer_weights.LayerWeights(known, dtype, apart, ready) if fits else None
        return self._laid_out[key]


def takes_in_place(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Whether a product in `dtype` may be added to a parameter's `grad`, behind autograd's back: nobody listens."""
    heard = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.dtype == dtype and parameter.is_leaf and not heard


def add_to_gradient(parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
    """parameter.grad += a @ b, rounded once."""
    if parameter.grad is None:
        parameter.grad = a @ b
    else:
        parameter.grad.addmm_(a, b)
