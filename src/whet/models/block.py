"""One decoder layer, forward and backward, written out: the fused block.

    x1 = norm(h)            qkv = x1 Wqkv         o = attention(rope(qkv))     m = h + o Wo
    x2 = norm(m)            gu = x2 Wgu           a = f(gate) * up             out = m + a Wd

Where the base is frozen, the backward needs only the gradient of the input through each weight, and of the adapters;
weights and norms that train get theirs from the same tiles. It reads h, qkv, o with its log-sum-exp, m and gu; what of
these was not kept is computed again, and nothing else is. Weights are dequantized once a pass, adapters beside them,
and tokens go through them in tiles. Gemma's layers norm the outputs of Wo and Wd once more (`attention_post_norm`,
`mlp_post_norm`) before they are added.

Shapes: h, m, out [T, D]; qkv [T, (Q + 2 G) d]; o [T, Q d]; gu [T, 2 F]; T tokens of all documents, D model width, F MLP
width, Q query and G key heads of d. The suffix `e` marks a buffer with the adapters' R columns behind its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from whet.kernels._precision import wide_dtype
from whet.kernels.attention import Documents, Rows, attention, attention_backward
from whet.kernels.glu import glu, glu_backward
from whet.kernels.glu_lora import Factors, Sum, glu_backward_lora, takes
from whet.kernels.rms_norm import rms_norm, rms_norm_backward
from whet.kernels.rope import rope, rope_backward
from whet.models.families import LayerShape, Norm
from whet.models.projection import LayerWeights, Projection, Projections
from whet.models.weights import Weights

Saved = dict[str, Tensor]
# x A^T of each projection, some bytes a token: kept always, or where the backward need not compute x W^T again
TAILS = {"qkv_tail": "qkv", "o_tail": "o_tail", "gate_up_tail": "gate_up", "down_tail": "o_tail"}


@dataclass(frozen=True)
class Block:
    """A layer as it stands in one forward pass: its shape, weights, adapters, and the batch's positions.

    cos, sin [P, d'/2] in fp32: token t takes row t % P. tile: tokens that go through a weight at once.
    fp8: the base's products run in FP8. in_place: gradients of weights are added to the weights' own. hold: weights
    that were dequantized stay so.
    """

    shape: LayerShape
    p: Projections
    cos: Tensor
    sin: Tensor
    layout: Rows | Documents
    tile: int
    fp8: bool = False
    in_place: bool = False
    hold: bool = False
    norm_grads: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def trained_norms(self) -> dict[str, Norm]:
        return {name: norm for name, norm in self.shape.norms.items() if norm.weight.requires_grad}

    @cached_property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """What trains, in the order of the gradients that `backward` returns."""
        return (*self.p.parameters, *(norm.weight for norm in self.trained_norms.values()))

    # ------------------------------------------------------------ forward

    def forward(self, h: Tensor, keep: frozenset[str]) -> tuple[Tensor, Saved]:
        """The layer's output [T, D], and those intermediate values that `keep` names."""
        w = self.p.weights(h.dtype, h.device, fp8=self.fp8, hold=self.hold)
        qkv, qkv_tail = self.project_qkv(h, w.qkv)
        o, lse = self.attend(qkv)
        m, post, o_tail = self.project_o(h, o, w.o)
        saved: Saved = {"qkv_tail": qkv_tail, "o_tail": o_tail, "o": o, "m": m, "qkv": qkv}
        saved |= post | _numbered("lse", lse)
        out, mlp = self.mlp(m, w, keep_gate_up="gate_up" in keep)
        return out, {name: x for name, x in (saved | mlp).items() if _kind(name) in keep}

    def project_qkv(self, h: Tensor, e: Weights) -> tuple[Tensor, Tensor]:
        """q, k, v of all tokens; rotated, unless their heads are normed, when the backward needs them as they are.

        And x A^T.
        """
        qkv, tail = h.new_empty(h.shape[0], self.p.qkv.rows), h.new_empty(h.shape[0], self.p.qkv.rank)
        for s in self.tiles(h):
            xe = self.normed(h[s], self.shape.input_norm, self.p.qkv, e)
            tail[s] = self.tail(xe, self.p.qkv)
            e.product(xe, out=qkv[s])
        return qkv if self.shape.spec.qk_norm else self.rotated(qkv, out=qkv), tail

    def rotated(self, qkv: Tensor, out: Tensor | None = None) -> Tensor:
        return rope(qkv, self.cos, self.sin, self.shape.q_heads, self.shape.kv_heads, **self.head_norms(), out=out)

    def attend(self, qkv: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Attention's output [T, Q d] and what its backward reads beside it."""
        if self.shape.spec.qk_norm:
            qkv = self.rotated(qkv)
        o, saved = attention(*self.heads(qkv), self.layout, **self.attention_options())
        return o.reshape(o.shape[0], -1), saved

    def project_o(self, h: Tensor, o: Tensor, e: Weights) -> tuple[Tensor, Saved, Tensor]:
        """h plus attention's share; what Gemma's backward needs of it; o A^T."""
        m, tail = torch.empty_like(h), h.new_empty(h.shape[0], self.p.o.rank)
        post = {"attention_output": torch.empty_like(h)} if self.shape.attention_post_norm else {}
        for s in self.tiles(h):
            oe = self.with_margin(o[s], self.p.o, e)
            tail[s] = self.tail(oe, self.p.o)
            self.add(h[s], oe, e, self.shape.attention_post_norm, m[s], *(x[s] for x in post.values()))
        return m, post, tail

    def mlp(self, m: Tensor, w: LayerWeights, *, keep_gate_up: bool) -> tuple[Tensor, Saved]:
        out, tail = torch.empty_like(m), m.new_empty(m.shape[0], self.p.down.rank)
        up_tail = m.new_empty(m.shape[0], self.p.gate_up.rank) if keep_gate_up else None
        post = {"mlp_output": torch.empty_like(m)} if self.shape.mlp_post_norm else {}
        kept = {}
        for i, s in enumerate(self.tiles(m)):
            xe = self.normed(m[s], self.shape.mlp_norm, self.p.gate_up, w.gate_up)
            gate_up = w.gate_up.product(xe)
            ae = self.activated(gate_up, w.down)
            tail[s] = self.tail(ae, self.p.down)
            self.add(m[s], ae, w.down, self.shape.mlp_post_norm, out[s], *(x[s] for x in post.values()))
            if up_tail is not None:
                up_tail[s], kept[f"gate_up.{i}"] = self.tail(xe, self.p.gate_up), gate_up
        if up_tail is not None:
            kept["gate_up_tail"] = up_tail
        return out, {"down_tail": tail} | post | kept

    # ------------------------------------------------------------ backward

    def backward(
        self, h: Tensor, dout: Tensor, saved: Saved, *, input_grad: bool, dout_e: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of the layer's input, None unless `input_grad`, and those of `parameters` (None: `in_place`).

        The first lies in the first D columns of a buffer with Wd's margin, for the layer below to fill: given that
        buffer as `dout_e`, it need not copy.
        """
        saved = dict(saved)  # what is computed again is put here
        self.norm_grads.clear()
        w = self.p.weights(h.dtype, h.device, fp8=self.fp8, hold=self.hold)
        self.restore(h, saved, w)
        dm, mlp_grads = self.mlp_backward(dout, dout_e, saved, w)
        do, o_grads = self.project_o_backward(dm, saved, w.o)
        qkv = saved["qkv"] if not self.shape.spec.qk_norm else self.rotated(saved["qkv"])
        o = saved["o"].unflatten(1, (self.shape.q_heads, -1))
        dqkv = attention_backward(
            do.unflatten(1, (self.shape.q_heads, -1)),
            *self.heads(qkv),
            o,
            tuple(x for name, x in saved.items() if _kind(name) == "lse"),
            self.layout,
            **self.attention_options(),
        )
        del do, o, qkv
        dh, qkv_grads = self.project_qkv_backward(h, dm, dqkv, saved, w.qkv, input_grad=input_grad)
        return dh, [*qkv_grads, *o_grads, *mlp_grads, *(self.norm_grads[name] for name in self.trained_norms)]

    def restore(self, h: Tensor, saved: Saved, w: LayerWeights) -> None:
        """Compute again what of qkv, o, m and Gemma's outputs was not kept."""
        if "qkv" not in saved:
            saved["qkv"], saved["qkv_tail"] = self.project_qkv(h, w.qkv)
        if "o" not in saved:
            saved["o"], lse = self.attend(saved["qkv"])
            saved |= _numbered("lse", lse)
        if "m" not in saved:
            saved["m"], post, _ = self.project_o(h, saved["o"], w.o)
            saved |= post
        if self.shape.mlp_post_norm and "mlp_output" not in saved:
            _, mlp = self.mlp(saved["m"], w, keep_gate_up=False)
            saved["mlp_output"] = mlp["mlp_output"]

    def mlp_backward(
        self, dout: Tensor, dout_e: Tensor | None, saved: Saved, w: LayerWeights
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient of m, in the first D columns of a buffer with Wo's margin, and those of gate_up's and down's."""
        m, gate_up_p, down, ge, de = saved["m"], self.p.gate_up, self.p.down, w.gate_up, w.down
        dm, grads = m.new_empty(m.shape[0], w.o.width_out), _Sum()
        if self.shape.mlp_post_norm or (dout_e is not None and dout_e.shape[1] != de.width_out):
            dout_e = None
        for i, s in enumerate(self.tiles(m)):
            gate_up, x = saved.get(f"gate_up.{i}"), None
            if gate_up is None:
                xe = self.normed(m[s], self.shape.mlp_norm, gate_up_p, ge)
                gate_up, x, up_tail = ge.product(xe), xe[:, : gate_up_p.columns], self.tail(xe, gate_up_p)
            else:
                up_tail = saved["gate_up_tail"][s]
            dye = dout_e[s] if dout_e is not None else m.new_empty(m[s].shape[0], de.width_out)
            if dout_e is None:
                self.norm_gradient(dout[s], saved.get("mlp_output"), s, "mlp_post_norm", dye[:, : down.rows])
            self.fill_gradient_margin(dye, down, de)
            da, dgue = de.back_product(dye), dye.new_empty(dye.shape[0], ge.width_out)
            act, down_sums, up_sums = self.activation_backward(da, gate_up, dye, up_tail, dgue[:, : gate_up_p.rows])
            del da, gate_up
            self.fill_gradient_margin(dgue, gate_up_p, ge)
            down_grads = self.gradients(down, dye, act, saved["down_tail"][s], downs=down_sums)
            del act, dye
            dx = ge.back_product(dgue)
            x = self.norm_backward(dx, m[s], "mlp_norm", residual=dout[s], out=dm[s, : self.p.o.rows], x=x)
            up_grads = self.gradients(gate_up_p, dgue, x, up_tail, ups=up_sums)
            grads.add([*up_grads, *down_grads])
            del dgue, dx, x, up_tail  # not beside the next tile's
        return dm, grads.total

    def activation_backward(
        self, da: Tensor, gate_up: Tensor, dye: Tensor, up_tail: Tensor, out: Tensor
    ) -> tuple[Tensor | None, list[Sum] | None, list[Sum] | None]:
        """The gradient of gate and up into `out`. The activation, or those gradients of adapters that read it or `out`.

        These are of Wd's A, and of Wgu's B.
        """
        down, up = self.p.down, self.p.gate_up
        apart = len(down.adapted) < 1 or len(up.adapted) < 2 or any(part.trained for part in (*down.parts, *up.parts))
        if apart or not takes(gate_up, (down.rank, *up.ranks)):
            act = torch.empty_like(da)
            glu_backward(da, gate_up, self.shape.activation, act=act, out=out)
            return act, None, None
        down_sums, up_sums = (f(da.dtype, in_place=self.in_place) for f in (down.down_sums, up.up_sums))
        factors = Factors(dye[:, down.rows : down.rows + down.rank], *up_tail.split(up.ranks, dim=1))
        glu_backward_lora(da, gate_up, self.shape.activation, factors, (*down_sums, *up_sums), out=out)
        return None, down_sums, up_sums

    def project_o_backward(self, dm: Tensor, saved: Saved, e: Weights) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient of attention's output, and those of Wo's adapter. Fills the margin of dm."""
        p, o = self.p.o, saved["o"]
        do, grads = torch.empty_like(o), _Sum()
        for s in self.tiles(o):
            dye = dm[s]
            if self.shape.attention_post_norm:
                dye = torch.empty_like(dye)
                out = dye[:, : p.rows]
                self.norm_gradient(dm[s, : p.rows], saved["attention_output"], s, "attention_post_norm", out)
            self.fill_gradient_margin(dye, p, e)
            e.back_product(dye, out=do[s])
            grads.add(self.gradients(p, dye, o[s], saved["o_tail"][s]))
        return do, grads.total

    def project_qkv_backward(
        self,
        h: Tensor,
        dm: Tensor,
        dqkv: tuple[Tensor, Tensor, Tensor],
        saved: Saved,
        e: Weights,
        *,
        input_grad: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        p = self.p.qkv
        dqkve = h.new_empty(h.shape[0], e.width_out)
        raw = {"qkv": saved["qkv"]} if self.shape.spec.qk_norm else {}
        wanted = {f"{name[0]}_weight_grad": self.weight_grad(name) for name in ("q_norm", "k_norm")}
        rope_backward(*dqkv, self.cos, self.sin, **self.head_norms(), **raw, **wanted, out=dqkve[:, : p.rows])
        dh, grads = h.new_empty(h.shape[0], self.p.down.rows + self.p.down.margin(h.device)), _Sum()
        for s in self.tiles(h):
            dye = dqkve[s]
            self.fill_gradient_margin(dye, p, e)
            if input_grad or "input_norm" in self.trained_norms:
                dx, out = e.back_product(dye), dh[s, : p.columns]
                x = self.norm_backward(dx, h[s], "input_norm", residual=dm[s, : self.p.o.rows], out=out)
            else:
                x = self.norm(h[s], self.shape.input_norm)
            grads.add(self.gradients(p, dye, x, saved["qkv_tail"][s]))
            dx = x = None  # not beside the next tile's
        return dh if input_grad else None, grads.total

    # ------------------------------------------------------------ parts of both

    def tiles(self, x: Tensor) -> Iterator[slice]:
        for start in range(0, x.shape[0], self.tile):
            yield slice(start, min(start + self.tile, x.shape[0]))

    def norm(self, x: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
        return rms_norm(x, *self.norm_options(norm), out=out)

    def normed(self, x: Tensor, norm: Norm, p: Projection, e: Weights) -> Tensor:
        """norm(x) and, in the margin, its product with the adapters' A."""
        xe = x.new_empty(x.shape[0], e.width_in)
        self.norm(x, norm, out=xe[:, : p.columns])
        return self.fill_margin(xe, p, e)

    def with_margin(self, x: Tensor, p: Projection, e: Weights) -> Tensor:
        xe = x.new_empty(x.shape[0], e.width_in)
        _copy_rows(x, xe[:, : p.columns])
        return self.fill_margin(xe, p, e)

    def tail(self, xe: Tensor, p: Projection) -> Tensor:
        """The adapters' part of the margin."""
        return xe[:, p.columns : p.columns + p.rank]

    def activated(self, gate_up: Tensor, de: Weights) -> Tensor:
        ae = gate_up.new_empty(gate_up.shape[0], de.width_in)
        glu(gate_up, self.shape.activation, out=ae[:, : self.p.down.columns])
        return self.fill_margin(ae, self.p.down, de)

    def gradients(
        self, p: Projection, dye: Tensor, x: Tensor | None, tail: Tensor, **made: list[Sum] | None
    ) -> list[Tensor | None]:
        return p.gradients(dye[:, p.rows :], x, dye[:, : p.rows], tail, in_place=self.in_place, **made)

    def fill_margin(self, xe: Tensor, p: Projection, e: Weights) -> Tensor:
        """x A^T behind x."""
        if xe.shape[1] > p.columns:
            torch.mm(xe[:, : p.columns], e.down, out=xe[:, p.columns :])
        return self.fill_bias(xe, p)

    def fill_bias(self, xe: Tensor, p: Projection) -> Tensor:
        """A one in the column that the bias is multiplied with."""
        if p.biased:
            xe[:, p.columns + p.rank] = 1
        return xe

    def fill_gradient_margin(self, dye: Tensor, p: Projection, e: Weights) -> None:
        """dY (s B) behind dY."""
        if dye.shape[1] > p.rows:
            torch.mm(dye[:, : p.rows], e.up, out=dye[:, p.rows :])

    def add(
        self, residual: Tensor, xe: Tensor, weight: Tensor, norm: Norm | None, out: Tensor, *product: Tensor
    ) -> None:
        """out = residual + xe weight, or + norm(xe weight), when the product is also written to `product`."""
        if norm is None:
            weight.add_product(residual, xe, out)
            return
        (y,) = product
        weight.product(xe, out=y)
        rms_norm(y, *self.norm_options(norm), residual=residual, out=out)

    def norm_gradient(self, dy: Tensor, y: Tensor | None, s: slice, norm: str, out: Tensor) -> None:
        """The gradient before a post-norm; without one, dy itself."""
        if y is None:
            out.copy_(dy)
        else:
            options = self.norm_options(self.shape.norms[norm])
            rms_norm_backward(dy, y[s], *options, weight_grad=self.weight_grad(norm), out=out)

    def norm_backward(
        self, dy: Tensor, h: Tensor, name: str, *, out: Tensor, residual: Tensor, x: Tensor | None = None
    ) -> Tensor:
        """The gradient of h, with what came around the norm, into `out`. Returns x = norm(h), made unless given."""
        y = torch.empty_like(h) if x is None else None
        options = self.norm_options(self.shape.norms[name])
        grad = self.weight_grad(name)
        rms_norm_backward(dy, h, *options, residual=residual, weight_grad=grad, normed=y, out=out)
        return x if y is None else y  # type: ignore[return-value]

    def norm_options(self, norm: Norm) -> tuple[Tensor, float, float]:
        return norm.weight, norm.eps, self.shape.spec.norm_offset

    def weight_grad(self, norm: str) -> Tensor | None:
        """Where the gradient of a norm's weight is summed up, if it trains."""
        if norm not in self.trained_norms:
            return None
        if norm not in self.norm_grads:
            weight = self.trained_norms[norm].weight
            self.norm_grads[norm] = torch.zeros_like(weight, dtype=wide_dtype(weight.dtype))
        return self.norm_grads[norm]

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, Q, d], k and v [T, G, d]: views."""
        x = qkv.unflatten(1, (-1, self.shape.head_dim))
        q, k, v = x.split((self.shape.q_heads, self.shape.kv_heads, self.shape.kv_heads), dim=1)
        return q, k, v

    def head_norms(self) -> dict[str, Any]:
        q, k = self.shape.q_norm, self.shape.k_norm
        if q is None or k is None:
            return {}
        return {"q_weight": q.weight, "k_weight": k.weight, "eps": q.eps, "offset": self.shape.spec.norm_offset}

    def attention_options(self) -> dict[str, Any]:
        return {"scale": self.shape.scale, "window": self.shape.window, "softcap": self.shape.softcap}


class _Sum:
    """The sum of each tile's list of gradients; None stays where a gradient has been added elsewhere."""

    def __init__(self) -> None:
        self.total: list[Tensor | None] = []

    def add(self, tile: list[Tensor | None]) -> None:
        if not self.total:
            self.total = tile
            return
        pairs = [(a, b) for a, b in zip(self.total, tile, strict=True) if a is not None and b is not None]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))


def _copy_rows(x: Tensor, out: Tensor) -> None:
    """out = x, in words of 8 bytes where rows are made of them: torch copies rows that do not touch value by value."""
    counts = [n for y in (x, out) for n in (y.shape[1], y.stride(0), y.storage_offset())]
    if x.stride(1) == out.stride(1) == 1 and all(n * x.element_size() % 8 == 0 for n in counts):
        x, out = x.view(torch.int64), out.view(torch.int64)
    out.copy_(x)


def _numbered(name: str, tensors: tuple[Tensor, ...]) -> Saved:
    return {f"{name}.{i}": x for i, x in enumerate(tensors)}


def _kind(name: str) -> str:
    """What a policy calls a saved value: that of one tile like that of all, Gemma's outputs like m."""
    kind = name.partition(".")[0]
    if kind in TAILS:
        return TAILS[kind]
    return "m" if kind in ("attention_output", "mlp_output") else kind
