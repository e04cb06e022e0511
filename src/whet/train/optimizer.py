"""bitsandbytes' AdamW with moments of 8 bits, all parameters in a few launches.

bitsandbytes updates one parameter after another, and waits for the GPU after each: with an adapter of hundreds of small
matrices the GPU idles through most of the step. Here parameters that agree on their dtype, step and settings are
updated by one launch (kernels/adamw_8bit.py), where they lie: nothing is gathered, copied or kept beside bitsandbytes'
own states, and nothing waits for the GPU. Those in an odd number of values or at an odd address have a launch of their
own. What the kernel does not take (a limit on the update's norm, zeros to be skipped, gradients of another dtype, ...)
goes bitsandbytes' own way, one by one.

States have bitsandbytes' names, shapes and meaning: checkpoints of either optimizer load into the other. The update is
bitsandbytes' but for the last bits of fp32, so a moment in 8 bits may come out as the number next to bitsandbytes'.

Weights held in bf16 are rounded in another way. Rounded to nearest, one of 0.02 stays what it is at any update below
6e-5, for as long as training goes on. So these are rounded at random (kernels/stochastic_round.py), which keeps the
mean of what is added. What is random is a function of the group's `rounding_seed`, the parameter's step, and a value's
place among all parameters: a run resumed from a checkpoint goes on bitwise, however parameters fall into launches, and
processes that hold the same weights keep them the same.

Sources: Dettmers et al. 2022, arXiv:2110.02861 (8-bit moments); Zamirai et al. 2020, arXiv:2010.06192 (bf16 weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from bitsandbytes.optim import AdamW
from torch import Tensor

from whet.kernels._streams import on_default_stream
from whet.kernels.adamw_8bit import DTYPES, CodeMap, Entry, Tables, Update, adamw_8bit, alignment
from whet.kernels.stochastic_round import BLOCK, stochastic_round

NAMES = ("adamw_8bit", "adamw_bnb_8bit")  # by which transformers' arguments ask for it


class _Launch(NamedTuple):
    """What parameters must agree on to be updated together."""

    device: torch.device
    dtype: torch.dtype
    maps: tuple[CodeMap, CodeMap] | None  # None where moments are kept in 32 bits
    alignment: int
    update: Update


class _Alone(NamedTuple):
    """A parameter for bitsandbytes' own update."""

    gindex: int
    pindex: int
    parameter: Tensor
    first: int  # the number of its first block among those of all parameters


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
        self._maps: list[tuple[Tensor, CodeMap | None]] = []
        self._own: dict[Tensor, dict[str, Any]] = {}
        self._tables: dict[Tensor | None, list[Tables]] = {}  # by the first of the parameters that are updated together
        super().__init__(params, lr, betas, eps, weight_decay, optim_bits=8, min_8bit_size=min_8bit_size)
        self.defaults["rounding_seed"] = seed if stochastic_rounding else None
        self._fill_in_seeds()

    @classmethod
    def like(cls, optimizer: AdamW, *, stochastic_rounding: bool = True, seed: int = 0) -> AdamW8bit:
        """An optimizer of the groups of `optimizer`, which has not made a step yet."""
        names = ("lr", "betas", "eps", "weight_decay")
        settings = {name: optimizer.defaults[name] for name in names}
        settings |= {"min_8bit_size": optimizer.args.min_8bit_size}
        made = cls(optimizer.param_groups, stochastic_rounding=stochastic_rounding, seed=seed, **settings)
        made.check_overrides()
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when a state is loaded: bitsandbytes' has no seeds."""
        super().__setstate__(state)
        self._fill_in_seeds()

    def _fill_in_seeds(self) -> None:
        for group in self.param_groups:
            group.setdefault("rounding_seed", self.defaults["rounding_seed"])

    def check_overrides(self) -> None:
        """Take over what was registered for modules' weights (`register_module_override`), by the parameter.

        bitsandbytes' own notes it by the parameter's place among its group's, for every later optimizer of the process
        too: an adapter trained after a whole model would keep the moments of its first matrix as an embedding's.
        """
        mine = {p for group in self.param_groups for p in group["params"]}
        for module, name, config in self.mng.module_weight_config_triple:
            if getattr(module, name) in mine:
                self._own[getattr(module, name)] = config

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """bitsandbytes' settings of a parameter, with its own overrides."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)
        return config | self._own.get(group["params"][pindex], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, only: Sequence[Tensor] | None = None) -> Any:
        """Update every parameter that has a gradient. closure: computes the loss anew, which is returned.

        only: these alone, the same in each step; the others wait for another call.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True

        launches, alone = self._due(None if only is None else set(only))
        known = self._tables.setdefault(only[0] if only else None, [])
        known += [Tables() for _ in range(len(launches) - len(known))]
        for (launch, entries), tables in zip(launches.items(), known, strict=False):
            adamw_8bit(entries, launch.maps, launch.update, tables)
        with on_default_stream({one.parameter.device for one in alone}):
            for one in alone:
                self._update_alone(one)
        return loss

    def _due(self, only: set[Tensor] | None) -> tuple[dict[_Launch, list[Entry]], list[_Alone]]:
        """The parameters with a gradient, by launch, their steps counted; and those for bitsandbytes' own update."""
        launches: dict[_Launch, list[Entry]] = {}
        alone: list[_Alone] = []
        first = after = 0
        for gindex, group in enumerate(self.param_groups):
            common: dict[str, Any] | None = None
            for pindex, p in enumerate(group["params"]):
                first, after = after, after + -(-p.numel() // BLOCK)
                if p.grad is None or (only is not None and p not in only):
                    continue
                if len(self.state[p]) == 0:
                    self.init_state(group, p, gindex, pindex)
                state = self.state[p]
                if p in self._own or (gindex, pindex) in self.mng.index2config or id(p) in self.mng.pid2config:
                    config = self.get_config(gindex, pindex, group)
                else:
                    config = common = common or self.get_config(gindex, pindex, group)
                maps = self._maps_of(state)
                if not _takes(p, p.grad, state, config) or (maps is not None and None in maps):
                    alone.append(_Alone(gindex, pindex, p, first))
                    continue
                if not p.is_contiguous():
                    p.data = p.data.contiguous()
                if not p.grad.is_contiguous():
                    p.grad = p.grad.contiguous()
                state["step"] += 1
                scales = state.get("absmax1"), state.get("absmax2")
                entry = Entry(p, p.grad, state["state1"], state["state2"], *scales, first)
                update = _update(config, state["step"], _seed(group, p))
                launch = _Launch(p.device, p.dtype, maps, alignment(entry), update)
                launches.setdefault(launch, []).append(entry)
        return launches, alone

    def _maps_of(self, state: dict[str, Any]) -> tuple[CodeMap | None, ...] | None:
        """Those of 8-bit moments, None for one that the kernel can't use; None where moments have 32 bits."""
        return tuple(self._map(state, name) for name in ("qmap1", "qmap2")) if "qmap1" in state else None

    def _map(self, state: dict[str, Any], name: str) -> CodeMap | None:
        """Equal maps become one: a loaded state has a copy for each parameter."""
        qmap = state[name]
        for known, code_map in self._maps:
            if known is qmap:
                return code_map
        for known, code_map in self._maps:
            if known.device == qmap.device and torch.equal(known, qmap):
                state[name] = known
                return code_map
        try:
            code_map = CodeMap.of(qmap)
        except ValueError:
            code_map = None
        self._maps.append((qmap, code_map))
        return code_map

    def _update_alone(self, one: _Alone) -> None:
        """By bitsandbytes' own method; where weights are rounded at random, on a copy in fp32, dropped at the end."""
        gindex, pindex, p, first = one
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
        stochastic_round(wide.view(-1), p.view(-1), first, seed=seed, step=self.state[p]["step"])


def _takes(p: Tensor, grad: Tensor, state: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the kernel updates p as bitsandbytes would."""
    plain = type(grad) is Tensor and grad.layout == torch.strided and grad.dtype == p.dtype and p.dtype in DTYPES
    # bitsandbytes reads tensors in the order of their memory: moments like those of a transposed weight mean something
    # else to it than to torch
    moment = state["state1"]
    return (
        plain
        and moment.is_contiguous()
        and grad.device == p.device == moment.device
        and config["max_unorm"] <= 0
        and not config["skip_zeros"]
    )


def _update(config: dict[str, Any], step: int, seed: int | None) -> Update:
    beta1, beta2 = config["betas"][:2]
    return Update(step, config["lr"], beta1, beta2, config["eps"], config["weight_decay"], seed)


def _seed(group: dict[str, Any], p: Tensor) -> int | None:
    """That of p's stochastic rounding; None where p isn't rounded at random."""
    return group["rounding_seed"] if p.dtype == torch.bfloat16 else None
