"""The optimizer that updates many parameters at once: bitwise the reference one by one, with few launches."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from bitsandbytes.optim import AdamW, GlobalOptimManager
from torch import Tensor, nn

import whet
from tests.train.setups import common
from whet.kernels.adamw_8bit import CodeMap, Entry, Update, adamw_8bit_reference
from whet.kernels.stochastic_round import stochastic_round_reference
from whet.train import optimizer
from whet.train.optimizer import AdamW8bit

SHAPES = [(4096,), (4097,), (5000,), (65536 + 3,), (7,), (16, 300), (300, 16), (1, 4095), (3, 3), (256, 256), (1, 8191)]
STEPS = 20
SEED = 11


def bitsandbytes_own(groups: list[dict[str, Any]]) -> AdamW:
    return AdamW(groups, lr=1e-3, eps=1e-7, optim_bits=8)


def ours(groups: list[dict[str, Any]]) -> AdamW8bit:
    return AdamW8bit(groups, lr=1e-3, eps=1e-7, stochastic_rounding=False)


def rounding(groups: list[dict[str, Any]], seed: int = SEED) -> AdamW8bit:
    return AdamW8bit(groups, lr=1e-3, eps=1e-7, seed=seed)


class OneByOne(AdamW):
    """What ours is to do, by bitsandbytes' own step: the reference, one parameter after another.

    What the reference does not take is updated by bitsandbytes; where weights are rounded at random, on a copy in fp32.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int | None, **settings: Any) -> None:
        super().__init__(groups, **{"lr": 1e-3, "eps": 1e-7, "optim_bits": 8} | settings)
        self.seed = seed

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        config, state = self.get_config(gindex, pindex, group), self.state[p]
        seed = group.get("rounding_seed", self.seed) if p.dtype == torch.bfloat16 else None
        maps = self.maps(state) if "qmap1" in state else None
        if config["max_unorm"] == 0 and state["state1"].is_contiguous() and (maps is None or None not in maps):
            p.data, p.grad = p.data.contiguous(), p.grad.contiguous()
            state["step"] += 1
            scales = state.get("absmax1"), state.get("absmax2")
            entry = Entry(p, p.grad, state["state1"], state["state2"], *scales, self.blocks_before(p))
            of_step = state["step"], config["lr"], *config["betas"], config["eps"], config["weight_decay"]
            adamw_8bit_reference([entry], maps, Update(*of_step, seed))
            return
        if seed is None:
            super().update_step(group, p, gindex, pindex)
            return
        copied = p.detach().float()
        copied.grad = p.grad.float()
        self.state[copied] = self.state[p]
        super().update_step(group, copied, gindex, pindex)
        del self.state[copied]
        rounded = stochastic_round_reference(copied.view(-1), self.blocks_before(p), seed=seed, step=state["step"])
        p.copy_(rounded.view(p.shape))

    def maps(self, state: dict[str, Any]) -> tuple[CodeMap | None, ...]:
        return tuple(code_map(state[name].numpy().tobytes()) for name in ("qmap1", "qmap2"))

    def blocks_before(self, p: Tensor) -> int:
        number = 0
        for group in self.param_groups:
            for q in group["params"]:
                if q is p:
                    return number
                number += -(-q.numel() // 256)
        raise AssertionError("not a parameter of this optimizer")


@cache
def code_map(numbers: bytes) -> CodeMap | None:
    """None for one that the kernel can't use."""
    try:
        return CodeMap.of(torch.frombuffer(bytearray(numbers), dtype=torch.float32))
    except ValueError:
        return None


def expected(groups: list[dict[str, Any]]) -> OneByOne:
    """What `ours` is to do."""
    return OneByOne(groups, None)


def expected_rounding(groups: list[dict[str, Any]]) -> OneByOne:
    """What `rounding` is to do."""
    return OneByOne(groups, SEED)


class Run:
    """An optimizer and its parameters: two groups, in fp32 and bf16, of every shape. The same each time."""

    def __init__(self, make: Callable[..., AdamW], device: str = "cpu", scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = [
            torch.randn(shape, generator=generator).mul(scale).to(device, dtype)
            for dtype in (torch.float32, torch.bfloat16)
            for shape in SHAPES
        ]
        self.parameters = [nn.Parameter(t) for t in drawn]
        self.optimizer = make(
            [
                {"params": self.parameters[::2], "weight_decay": 0.1},
                {"params": self.parameters[1::2], "weight_decay": 0.0, "lr": 3e-2, "betas": (0.8, 0.95)},
            ]
        )
        self.done = 0

    def step(self, steps: int = 1) -> None:
        """The first parameters of both groups and one in the midst have no gradient in some steps."""
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1 + self.done)
            for number, p in enumerate(self.parameters):
                grad = torch.randn(p.shape, generator=generator).mul(0.01 * (1 + number % 3)).to(p.device, p.dtype)
                absent = (number == 0 and self.done in (0, 1)) or (number in (1, 8, 9, 14) and self.done % 5 == 3)
                p.grad = None if absent else grad
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9
            self.optimizer.step()
            self.done += 1

    def tensors(self) -> Iterator[Tensor]:
        """Weights and whatever the optimizer keeps."""
        for p in self.parameters:
            yield p
            state = self.optimizer.state[p]
            yield torch.tensor(state.get("step", 0))
            for name in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"):
                if name in state:
                    yield state[name]


def assert_same(one: Run, other: Run) -> None:
    pairs = list(zip(one.tensors(), other.tensors(), strict=True))
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


@pytest.fixture(autouse=True)
def overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes keeps overrides by the id of parameters, in one place for the process."""
    manager = GlobalOptimManager.get_instance()
    for name in ("pid2config", "index2config"):
        monkeypatch.setattr(manager, name, {})
    monkeypatch.setattr(manager, "module_weight_config_triple", [])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many values the parameters of each launch have."""
    seen: list[list[int]] = []
    own = optimizer.adamw_8bit

    def counted(entries: list[Entry], *args: Any) -> None:
        seen.append([entry.weight.numel() for entry in entries])
        own(entries, *args)

    monkeypatch.setattr(optimizer, "adamw_8bit", counted)
    return seen


def take_over(to: Run, of: Run) -> None:
    """Weights and states, by hand."""
    for p, q in zip(to.parameters, of.parameters, strict=True):
        p.data.copy_(q.data)
        if of.optimizer.state.get(q):
            state = copy.deepcopy(dict(of.optimizer.state[q]))
            to.optimizer.state[p] = state
    for group, other in zip(to.optimizer.param_groups, of.optimizer.param_groups, strict=True):
        group["lr"] = other["lr"]
    to.done = of.done


@pytest.mark.parametrize(("left", "right"), [(expected, ours), (expected_rounding, rounding)])
def test_weights_and_state_are_the_reference_s(left: Callable[..., AdamW], right: Callable[..., AdamW]) -> None:
    """Catches settings of another group, random bits of another parameter, and steps counted wrong for a parameter that
    has no gradient at times."""
    one, other = Run(left), Run(right)
    for _ in range(STEPS):
        one.step()
        other.step()
        assert_same(one, other)
    states = [other.optimizer.state[p] for p in other.parameters]
    assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}
    assert {state["step"] for state in states} == {STEPS, STEPS - 2, STEPS - 4}


def test_each_step_is_bitsandbytes_own() -> None:
    """Catches another formula, and moments read or written in another way: from bitsandbytes' state, step after step.

    Its codes on a CPU are approximate near 0 (tests/kernels/test_adamw_8bit.py says how near ours are).
    """
    own, other = Run(bitsandbytes_own), Run(ours)
    for _ in range(STEPS):
        take_over(other, own)
        own.step()
        other.step()
        for p, q in zip(own.parameters, other.parameters, strict=True):
            a, b = own.optimizer.state[p], other.optimizer.state[q]
            assert a.keys() == b.keys()
            spacing = 2e-6 if p.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(p.float(), q.float(), rtol=spacing, atol=2e-8)
            assert p.dtype == torch.float32 or (p != q).float().mean() < 1e-3
            for moment, scale in (("state1", "absmax1"), ("state2", "absmax2")):
                if scale in a:
                    torch.testing.assert_close(a[scale], b[scale], rtol=1e-6, atol=0)
                    assert (a[moment] != b[moment]).float().mean() < 0.05
                elif moment in a:
                    torch.testing.assert_close(a[moment], b[moment], rtol=1e-6, atol=1e-8)


def test_in_the_long_run_the_loss_is_bitsandbytes() -> None:
    """Catches an error that a single step's tolerance hides and that adds up."""
    losses = []
    for make in (bitsandbytes_own, ours):
        torch.manual_seed(0)
        inputs = torch.randn(512, 64)
        target = torch.sin(inputs @ torch.randn(64, 8) / 4)
        network = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8))
        adam = make([{"params": list(network.parameters()), "lr": 3e-3}])
        start = (network(inputs) - target).square().mean().item()
        for _ in range(400):
            rows = torch.randint(0, 512, (128,))
            loss = (network(inputs[rows]) - target[rows]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        losses.append((network(inputs) - target).square().mean().item())
        assert losses[-1] < start / 10
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_infinite_and_missing_numbers_change_nothing_else() -> None:
    """Catches a NaN that gets from one value into others."""
    runs = [Run(expected), Run(ours)]
    for run in runs:
        run.step(2)
        run.parameters[2].grad.view(-1)[300] = torch.nan
        run.parameters[4].grad.view(-1)[5] = torch.inf
        before = [run.parameters[i].detach().view(-1)[at].clone() for i, at in ((2, 300), (4, 5))]
        run.optimizer.step()
        assert before == [run.parameters[i].detach().view(-1)[at] for i, at in ((2, 300), (4, 5))]
        run.step(2)
    assert_same(*runs)
    assert all(t.isfinite().all() for t in runs[1].tensors())


@pytest.mark.parametrize(("first", "then"), [(bitsandbytes_own, ours), (ours, bitsandbytes_own), (ours, ours)])
@pytest.mark.parametrize("saved", [True, False], ids=["in a file", "in memory"])
def test_checkpoints_go_both_ways(first: Callable[..., AdamW], then: Callable[..., AdamW], saved: bool) -> None:
    """Catches loaded moments that the next step doesn't use, or that fill of another code gets into a scale."""
    begun, resumed, whole = Run(first), Run(then), Run(expected if then is ours else then)
    begun.step(5)
    take_over(whole, begun)
    resumed.step(2)  # states, which loading makes void
    state = begun.optimizer.state_dict()
    if saved:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file)
    resumed.optimizer.load_state_dict(state)
    for p, q in zip(resumed.parameters, begun.parameters, strict=True):
        p.data.copy_(q.data)
    resumed.done = 5
    begun.step(3)  # what was loaded must not follow
    whole.step(7)
    resumed.step(7)
    assert_same(whole, resumed)


@pytest.mark.parametrize("change", [torch.square, torch.sqrt], ids=["for the kernel", "for bitsandbytes"])
def test_moments_in_codes_of_another_map(change: Callable[[Tensor], Tensor], launches: list[list[int]]) -> None:
    """Catches moments read in their neighbour's map, and a map that the kernel can't use given to it: other versions of
    bitsandbytes may write other maps."""
    runs = [Run(expected), Run(ours)]
    for run in runs:
        run.step(3)
        state = run.optimizer.state_dict()
        moments = [entry["__bnb_optimizer_quant_state__"] for entry in state["state"].values()]
        for tensors in [entry for entry in moments if "qmap2" in entry][3:6]:
            tensors["qmap2"] = change(tensors["qmap2"])
        run.optimizer.load_state_dict(state)
        run.step(3)
        launches.clear()
        run.step()
    assert sum(len(of) for of in launches) == len(runs[1].parameters) - (3 if change is torch.sqrt else 0)
    assert_same(*runs)
    maps = {id(state["qmap2"]) for state in runs[1].optimizer.state.values() if "qmap2" in state}
    assert len(maps) == 2, "a copy for each parameter is kept"


def test_the_state_dict_has_bitsandbytes_form() -> None:
    """Catches moments that are saved in another shape, or under other names."""
    one, other = Run(bitsandbytes_own), Run(ours)
    one.step(3)
    other.step(3)
    left, right = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert {group.pop("rounding_seed") for group in right["param_groups"]} == {None}
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for number, entry in left["state"].items():
        same = right["state"][number]
        assert entry.keys() == same.keys()
        moments, others = entry["__bnb_optimizer_quant_state__"], same["__bnb_optimizer_quant_state__"]
        assert {k: (v.shape, v.dtype) for k, v in moments.items()} == {k: (v.shape, v.dtype) for k, v in others.items()}


def test_moments_put_in_by_hand_count() -> None:
    """Catches a step that goes on with the moments it knew, when the state holds other tensors by now."""
    one, other = Run(expected), Run(ours)
    for run in (one, other):
        run.step(3)
        for p in run.parameters[3:6]:
            state = run.optimizer.state[p]
            state["state1"] = state["state1"].clone().zero_()
        run.optimizer.state[run.parameters[7]].clear()
        run.step(3)
    assert_same(one, other)


def test_a_copied_state_is_its_own() -> None:
    """Catches a deep copy that shares memory with the optimizer."""
    run = Run(ours)
    run.step(2)
    kept = copy.deepcopy(run.optimizer.state_dict()["state"])
    before = [copy.deepcopy(entry) for entry in kept.values()]
    run.step(2)
    for entry, old in zip(kept.values(), before, strict=True):
        for name, value in entry["__bnb_optimizer_quant_state__"].items():
            assert torch.equal(value, old["__bnb_optimizer_quant_state__"][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hundreds_of_parameters_take_few_launches(dtype: torch.dtype, launches: list[list[int]]) -> None:
    """Catches a return to an update a parameter."""
    matrices = [nn.Parameter(torch.randn(16, 300).to(dtype)) for _ in range(200)]
    vectors = [nn.Parameter(torch.randn(304).to(dtype)) for _ in range(200)]
    adam = AdamW8bit([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    for _ in range(3):
        for p in matrices + vectors:
            p.grad = torch.randn_like(p)
        adam.step()
    assert launches == 3 * [200 * [4800], 200 * [304]]
    launches.clear()
    matrices[100].grad = None
    adam.step()
    assert launches == [199 * [4800], 200 * [304]]
    launches.clear()
    matrices[100].grad = torch.ones_like(matrices[100])
    adam.step()
    assert launches == [199 * [4800], [4800], 200 * [304]], "the one that is a step behind"


def test_odd_sizes_are_launched_apart(launches: list[list[int]]) -> None:
    """Catches one bias of 7 values that has the whole model read value by value."""
    parameters = [nn.Parameter(torch.randn(n)) for n in (4096, 4097, 8192, 5000)]
    adam = AdamW8bit(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    adam.step()
    assert launches == [[4096, 8192], [4097, 5000]]


def test_a_step_keeps_nothing() -> None:
    """Catches copies of weights or gradients that stay: beside bitsandbytes' states, tables of maps alone."""
    run = Run(rounding)
    run.step(2)
    states = {t.untyped_storage().data_ptr() for t in run.tensors()}
    kept = [x for _, of in run.optimizer._maps for x in (of.numbers, of.middles, of.cells)]
    assert sum(x.nbytes for x in kept if x.untyped_storage().data_ptr() not in states) == 2 * (1024 + 65536)
    made = [tables for known in run.optimizer._tables.values() for tables in known]
    assert all(vars(tables) == vars(optimizer.Tables()) for tables in made), "filled on a GPU alone"


def test_what_does_not_lie_in_one_piece() -> None:
    """Catches transposed weights and gradients read in the order of their memory."""
    results = []
    for make in (expected, ours):
        torch.manual_seed(0)
        drawn = torch.randn(64, 100).t(), torch.randn(70, 90), torch.randn(100, 64), torch.randn(64, 100).t()
        a, b, c, d, e = (nn.Parameter(t) for t in (*drawn, torch.randn(5000)))
        adam = make([{"params": [a, b, e]}, {"params": [c]}, {"params": [d]}])
        for _ in range(3):
            a.grad, b.grad, e.grad = torch.randn(100, 64), torch.randn(90, 70).t(), torch.randn(5000)
            c.grad, d.grad = torch.randn(64, 100).t(), torch.randn(100, 64)
            adam.step()
            for p in (b, c):
                p.data = p.data.t().contiguous().t()
        results.append([p.detach().clone() for p in (a, b, c, d, e)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_bitsandbytes_overrides_hold() -> None:
    """Catches embeddings with 8-bit moments: transformers has them kept in 32 bits, in this way."""
    states = []
    for make in (expected, ours):
        torch.manual_seed(0)
        embedding, linear = nn.Embedding(100, 64), nn.Linear(64, 100)
        adam = make([{"params": [embedding.weight, linear.weight, linear.bias]}])
        manager = GlobalOptimManager.get_instance()
        manager.register_module_override(embedding, "weight", {"optim_bits": 32, "lr": 0.5})
        manager.index2config[0, 2] = {"lr": 0.25}
        for _ in range(3):
            for p in (embedding.weight, linear.weight, linear.bias):
                p.grad = torch.full_like(p, 0.1)
            adam.step()
        states.append([embedding.weight, linear.weight, linear.bias, adam.state[embedding.weight]["state1"]])
    assert states[1][3].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_an_override_is_not_inherited_by_the_next_optimizer() -> None:
    """Catches an adapter whose first matrix keeps an embedding's moments, after a whole model in the same process."""
    embedding, matrix = nn.Embedding(100, 64), nn.Parameter(torch.ones(100, 64))
    GlobalOptimManager.get_instance().register_module_override(embedding, "weight", {"optim_bits": 32})
    moments = []
    for parameter in (embedding.weight, matrix):
        adam = AdamW8bit([parameter])
        parameter.grad = torch.ones_like(parameter)
        adam.step()
        moments.append(adam.state[parameter]["state1"].dtype)
    assert moments == [torch.float32, torch.uint8]


def test_a_limit_on_the_update_s_norm_is_each_parameter_s_own() -> None:
    """Catches max_unorm, which the kernel does not know, left out."""
    results = []
    for make in (bitsandbytes_own, ours):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(100) * scale) for scale in (1, 0.01, 3)]
        GlobalOptimManager.get_instance().override_config(parameters, "max_unorm", 0.02)
        adam = make([{"params": parameters, "lr": 0.5}])
        for _ in range(3):
            for p in parameters:
                p.grad = torch.ones_like(p)
            adam.step()
        results.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_zeros_to_be_skipped_are_left_to_bitsandbytes(
    launches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches skip_zeros, which the kernel does not know, left out."""
    skipped, other = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(6000))
    adam = AdamW8bit([skipped, other])
    GlobalOptimManager.get_instance().override_config([skipped], "skip_zeros", True)
    alone: list[Tensor] = []
    monkeypatch.setattr(adam, "update_step", lambda group, p, *_: alone.append(p))
    skipped.grad, other.grad = torch.ones(5000), torch.ones(6000)
    adam.step()
    assert launches == [[6000]]
    assert [p is skipped for p in alone] == [True]


def test_gradients_of_another_dtype_are_left_to_bitsandbytes(launches: list[list[int]]) -> None:
    """Catches gradients in bf16 that are read as fp32."""
    results = []
    for make in (bitsandbytes_own, ours):
        p = nn.Parameter(torch.ones(5000))
        p.grad_dtype = None  # of any
        p.grad = torch.full((5000,), 0.25, dtype=torch.bfloat16)
        make([{"params": [p]}]).step()
        results.append(p.detach())
    assert launches == []
    assert torch.equal(*results)


@pytest.mark.parametrize(("left", "right"), [(expected, ours), (expected_rounding, rounding)])
def test_a_parameter_changed_to_another_dtype(left: Callable[..., AdamW], right: Callable[..., AdamW]) -> None:
    """Catches weights in bf16 that are updated as fp32, and the other way round."""
    results = []
    for make in (left, right):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(80, 90), nn.Linear(80, 90))
        adam = make([{"params": list(layers.parameters())}])
        for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16):
            layers.zero_grad()
            layers.to(dtype)
            for p in layers.parameters():
                p.grad = torch.randn_like(p)
            adam.step()
        results.append(list(layers.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_closures_hooks_and_new_groups() -> None:
    """Catches what torch promises of every optimizer: the closure's loss, hooks run once, groups added later."""
    first, second = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(5000))
    adam = AdamW8bit([first])
    hooked: list[Any] = []
    adam.register_step_pre_hook(lambda *_: hooked.append(0))

    def closure() -> Tensor:
        adam.zero_grad()
        loss = (first * second).sum()
        loss.backward()
        return loss

    assert adam.step(closure) == 5000
    adam.add_param_group({"params": [second], "lr": 0.5})
    adam.step(closure)
    assert hooked == [0, 0]
    assert second[0].item() == pytest.approx(0.5, abs=0.02)


def test_made_like_bitsandbytes_own() -> None:
    """Catches settings that do not come over from the optimizer that is replaced, and options that get lost."""
    p, q = nn.Parameter(torch.ones(3000)), nn.Parameter(torch.ones(3))
    groups = [{"params": [p], "weight_decay": 0.3}, {"params": [q], "lr": 7.0}]
    own = AdamW(groups, lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2, optim_bits=8, min_8bit_size=2000)
    made = AdamW8bit.like(own)
    assert made.param_groups == own.param_groups
    assert made.defaults == own.defaults | {"rounding_seed": 0}
    assert vars(made.args) == vars(own.args)
    for options, seed in (({"seed": 5}, 5), ({"stochastic_rounding": False, "seed": 5}, None)):
        fresh = AdamW([{"params": [p]}, {"params": [q]}], optim_bits=8)
        assert [group["rounding_seed"] for group in AdamW8bit.like(fresh, **options).param_groups] == [seed, seed]


def test_bf16_is_rounded_at_random_and_nothing_else_changes() -> None:
    """Catches fp32 weights that are rounded, bf16 weights that aren't, and moments that depend on rounding."""
    other, nearest = Run(rounding), Run(ours)
    for run in (other, nearest):
        run.step(STEPS)
    for p, q in zip(other.parameters, nearest.parameters, strict=True):
        assert torch.equal(p, q) == (p.dtype == torch.float32)
        moments, own = (run.optimizer.state[of] for run, of in ((other, p), (nearest, q)))
        assert all(torch.equal(moments[name], own[name]) for name in moments if name != "step")


def test_a_resumed_run_is_the_run_itself() -> None:
    """Catches random bits that depend on launches (which differ here: some have no gradient in the first step after
    resuming), on steps since the start of the process, or on a seed that the checkpoint does not hold."""
    whole, begun = Run(rounding), Run(rounding)
    whole.step(12)
    begun.step(8)
    file = io.BytesIO()
    torch.save([begun.optimizer.state_dict(), [p.detach() for p in begun.parameters]], file)
    file.seek(0)
    state, weights = torch.load(file)
    resumed = Run(lambda groups: rounding(groups, seed=5))
    resumed.optimizer.load_state_dict(state)
    for p, q in zip(resumed.parameters, weights, strict=True):
        p.data.copy_(q)
    resumed.done = 8
    resumed.step(4)
    assert_same(whole, resumed)


def test_another_seed_rounds_otherwise() -> None:
    """Catches a seed that is not used, and the same random bits for every step."""
    runs = [Run(rounding), Run(lambda groups: rounding(groups, seed=SEED + 1))]
    for run in runs:
        run.step()
    for p, q in zip(runs[0].parameters, runs[1].parameters, strict=True):
        assert torch.equal(p, q) == (p.dtype == torch.float32 or p.grad is None)


@pytest.mark.parametrize("first", [bitsandbytes_own, rounding])
def test_checkpoints_of_rounded_weights_go_both_ways(first: Callable[..., AdamW]) -> None:
    """Catches a state of bitsandbytes', which has no seed, that turns rounding off, and one it cannot load."""
    begun, runs = Run(first), [Run(expected_rounding), Run(rounding)]
    begun.step(5)
    for run in runs:
        run.optimizer.load_state_dict(begun.optimizer.state_dict())
        for p, q in zip(run.parameters, begun.parameters, strict=True):
            p.data.copy_(q.data)
        run.done = 5
        run.step(4)
    assert_same(*runs)


def test_small_updates_are_not_lost() -> None:
    """Catches weights that stay where they are: a regression in fp32, in bf16 to nearest and in bf16 at random.

    Weights from 0.25 on are spaced 2^-9 apart: to nearest, steps of 2e-4 change nothing.
    """
    losses = {}
    for name, dtype, stochastic in (
        ("fp32", torch.float32, True),
        ("nearest", torch.bfloat16, False),
        ("stochastic", torch.bfloat16, True),
    ):
        generator = torch.Generator().manual_seed(0)
        inputs, noise = torch.randn(4096, 64, generator=generator), torch.randn(4096, 80, generator=generator) / 10
        start = torch.rand(64, 80, generator=generator) / 8 + 0.25
        target = inputs @ (start + 0.03 * torch.randn(64, 80, generator=generator)) + noise
        weight = nn.Parameter(start.bfloat16().to(dtype))
        adam = AdamW8bit([weight], weight_decay=0.0, stochastic_rounding=stochastic)
        for step in range(1000):
            rows = torch.randint(0, 4096, (256,), generator=generator)
            error = inputs[rows] @ weight.detach().float() - target[rows]
            weight.grad = (inputs[rows].t() @ error).to(dtype)
            adam.param_groups[0]["lr"] = 2e-4 * (1 - step / 1000)
            adam.step()
        losses[name] = (inputs @ weight.detach().float() - target).square().mean().item()
    assert losses["nearest"] > 6 * losses["fp32"]
    assert losses["stochastic"] < 1.05 * losses["fp32"]


def test_what_bitsandbytes_own_method_updates_is_rounded_too() -> None:
    """Catches rounding to nearest where weights do not lie in one piece, or the update's norm has a limit."""
    results = []
    for make in (expected_rounding, rounding):
        torch.manual_seed(0)
        tall, limited, plain = (
            nn.Parameter(t.bfloat16()) for t in (torch.randn(64, 100).t(), torch.randn(100), torch.randn(70, 90))
        )
        GlobalOptimManager.get_instance().override_config([limited], "max_unorm", 0.02)
        adam = make([{"params": [plain, tall]}, {"params": [limited]}])
        for _ in range(4):
            for p in (tall, limited, plain):
                p.grad = torch.randn(p.shape).bfloat16()
            adam.step()
        results.append([p.detach().clone() for p in (tall, limited, plain)])
        assert set(adam.state) == {tall, limited, plain}
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_group_turns_rounding_on_and_off() -> None:
    """Catches one way that is used for the other, and groups added later without a seed."""
    runs = []
    for make in (ours, expected):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n).bfloat16()) for n in (5000, 300, 9000)]
        adam: AdamW = make([{"params": parameters[:2]}])
        adam.add_param_group({"params": parameters[2:]})
        for step in range(6):
            if step in (2, 4):
                for group in adam.param_groups:
                    group["rounding_seed"] = SEED if step == 2 else None
            for p in parameters:
                p.grad = torch.randn_like(p)
            adam.step()
        runs.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    added = rounding([{"params": runs[0][:2]}])
    added.add_param_group({"params": runs[0][2:]})
    assert [group["rounding_seed"] for group in added.param_groups] == [SEED, SEED]


def test_the_seed_is_a_number() -> None:
    """Catches None taken for a seed: in a group it means that weights are rounded to nearest."""
    with pytest.raises(TypeError, match="stochastic_rounding=False"):
        AdamW8bit([nn.Parameter(torch.ones(3))], seed=None)


def test_torch_s_generator_is_left_alone() -> None:
    """Catches random bits taken from dropout's and the data's."""
    run = Run(rounding)
    run.step()
    before = torch.get_rng_state()
    run.optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bnb_8bit"])
def test_a_trainer_uses_it(name: str, make: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a trainer that goes back to bitsandbytes', or whose steps have other settings."""
    trainer = make(args=whet.TrainingArguments(**common(tmp_path, optim=name, weight_decay=0.1, learning_rate=1e-2)))
    trainer.train()
    assert type(trainer.optimizer.optimizer) is AdamW8bit

    own = make(args=whet.TrainingArguments(**common(tmp_path, optim=name, weight_decay=0.1, learning_rate=1e-2)))
    made = trl.SFTTrainer.create_optimizer(own)
    assert type(made) is AdamW
    own.optimizer = OneByOne(made.param_groups, 0, min_8bit_size=made.args.min_8bit_size)
    own.train()
    pairs = list(zip(_trained(trainer.model), _trained(own.model), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.uint8 in {state["state1"].dtype for state in trainer.optimizer.optimizer.state.values()}


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_torch", "lion_8bit"])
def test_other_optimizers_stay_as_they_are(name: str, make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(args=whet.TrainingArguments(**common(tmp_path, optim=name)))
    assert not isinstance(trainer.create_optimizer(), AdamW8bit)


def test_a_model_of_another_s_keeps_bitsandbytes(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(args=whet.TrainingArguments(**common(tmp_path, optim="adamw_8bit")))
    trainer.model = nn.Linear(3, 3)
    assert type(trainer.create_optimizer()) is AdamW


def test_an_optimizer_of_one_s_own_is_kept(make: Callable[..., Any], tmp_path: Path) -> None:
    """Catches an optimizer that was handed to the trainer and is replaced."""
    trainer = make(args=whet.TrainingArguments(**common(tmp_path, optim="adamw_8bit")))
    own = trainer.optimizer = bitsandbytes_own([{"params": [nn.Parameter(torch.ones(3))]}])
    assert trainer.create_optimizer() is own


def test_trained_embeddings_keep_moments_of_32_bits(make: Callable[..., Any], tmp_path: Path) -> None:
    """Catches losing what transformers tells bitsandbytes once the optimizer is made."""
    trainer = make(args=whet.TrainingArguments(**common(tmp_path, optim="adamw_8bit")))
    embedding = trainer.model.get_input_embeddings()
    embedding.weight.requires_grad_(True)
    optimizer = trainer.create_optimizer()
    embedding.weight.grad = torch.ones_like(embedding.weight)
    optimizer.step()
    assert type(optimizer) is AdamW8bit
    assert optimizer.state[embedding.weight]["state1"].dtype == torch.float32


def _trained(model: nn.Module) -> Iterator[Tensor]:
    return (p for p in model.parameters() if p.requires_grad)
