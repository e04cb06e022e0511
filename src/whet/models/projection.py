"""Linear layers that read one input, with their LoRA adapters, as one matrix product.

A `Projection` is read off the modules of a model by models/reading.py.

Shapes: T tokens, K inputs, N outputs of all parts together, R columns for adapters and bias (see kernels/extend.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whet.kernels import layer_weights
from whet.kernels._precision import wide_dtype
from whet.kernels.extend import extend, lay_out
from whet.kernels.fp8 import weight_scales
from whet.kernels.layer_weights import ProjectionWeight
from whet.kernels.nf4 import NF4Weight, dequantize_nf4, stack, stack_dense
from whet.models.weights import ApartWeights, BesideWeights, Fp8Base, Fp8Weights, Weights, product


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
    """Stacked parts: y [T, N] = x [T, K] W^T + b + s (x A^T) B^T."""

    def __init__(self, parts: tuple[Part, ...], columns: int):
        self.parts, self.columns = parts, columns
        self.rows = sum(part.rows for part in parts)
        self.adapted = tuple(part for part in parts if part.down is not None)
        self.rank = sum(part.down.shape[0] for part in self.adapted)
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
            downs, ups = self._adapters(e)
            extend(e, downs, ups, [part.scale for part in self.parts], rows, columns, self._bias(e))
        return self.beside(e)

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
        self, g_TR: Tensor, x_TK: Tensor, dy_TN: Tensor, tail_TR: Tensor, *, in_place: bool = False
    ) -> list[Tensor | None]:
        """fp32 gradients of `parameters` from one tile of tokens.

        g: dY (s B), the margin of the gradient; x: the input; dy: the gradient of the output; tail: x A^T.
        in_place: those of weights are added to the weights' own `grad`, and None here.
        """
        if not self.parameters:
            return []
        downs = ups = None
        if self.adapted:
            downs = product(g_TR[:, : self.rank].T, x_TK)
            ups = product(dy_TN.T, tail_TR[:, : self.rank])
        found: list[Tensor | None] = []
        row, column = 0, 0
        for part in self.parts:
            rows = slice(row, row + part.rows)
            if downs is not None and ups is not None and part.down is not None:
                ranks = slice(column, column + part.down.shape[0])
                found += [downs[ranks], ups[rows, ranks] if part.scale == 1 else ups[rows, ranks] * part.scale]
                column = ranks.stop
            for parameter in part.trained:
                dy = dy_TN[:, rows]
                if parameter.ndim != 2:
                    found.append(dy.sum(0, dtype=wide_dtype(dy.dtype)))
                elif in_place and takes_in_place(parameter, dy.dtype):
                    add_to_gradient(parameter, dy.T, x_TK)
                    found.append(None)
                else:
                    found.append(product(dy.T, x_TK))
            row = rows.stop
        return found


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
        self._laid_out: dict[tuple[torch.dtype, bool], layer_weights.LayerWeights | None] = {}

    def weights(self, dtype: torch.dtype, device: torch.device, *, fp8: bool = False) -> LayerWeights:
        """All four dequantized, the adapters beside them; or, in FP8, to be so. In one launch where that can be."""
        together = self._in_one_launch(dtype, apart=fp8)
        if fp8:
            if together is not None:
                laid_out = layer_weights.layer_weights(together)
                borders = list(zip(laid_out[::2], laid_out[1::2], strict=True))
            else:
                borders = [p.borders(dtype, device) for p in self.all]
            return LayerWeights(*(Fp8Weights(p.fp8_base, *b) for p, b in zip(self.all, borders, strict=True)))
        if together is None:
            return LayerWeights(*(p.weights(dtype, device) for p in self.all))
        laid_out = layer_weights.layer_weights(together)
        return LayerWeights(*(p.beside(e) for p, e in zip(self.all, laid_out, strict=True)))

    def _in_one_launch(self, dtype: torch.dtype, *, apart: bool) -> layer_weights.LayerWeights | None:
        if (dtype, apart) not in self._laid_out:
            known = [x for x in (p.in_one_launch for p in self.all) if x is not None]
            fits = len(known) == 4 and layer_weights.takes(known)
            self._laid_out[dtype, apart] = layer_weights.LayerWeights(known, dtype, apart) if fits else None
        return self._laid_out[dtype, apart]


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
