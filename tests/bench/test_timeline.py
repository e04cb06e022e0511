"""bench/timeline.py: no time lost or counted twice, kernels under the right heading, and a picture of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.scripts import load

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "timeline.py"
WORK = {"model": "8b", "bs": 2, "ga": 4, "seq": 2048, "gc": "on", "bits": 4, "r": 16}
WORK |= {"full": False, "mixed": False, "packing": False}
VOCABULARY = 128256


trace = load("timeline")
Event = trace.Event


def recorded(found: list[Any], wall_us: float, engine: str = "whet", **changes: Any) -> dict[str, Any]:
    """A file of finetune.py --trace; through JSON, as one would be read."""
    origin = {"hardware": "GPU A", "versions": {"torch": "2.11.0"}, "commit": "abc", "dirty": False, "date": "2026"}
    run = {"run_id": "one", "engine": engine, "work": WORK, "vocabulary": VOCABULARY, "timed_ms": 9.0}
    whole = run | {"device": "cuda"} | trace.summary(found, wall_us, innermost=False) | origin | changes
    return json.loads(json.dumps(whole))


def category(name: str, path: str = "", dims: Any = (), **work: Any) -> str:
    return trace.category({"name": name, "path": path, "dims": dims}, WORK | work, VOCABULARY)


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_badd_coopA_TNT", "", "base GEMMs"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "", "base GEMMs"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "", "base GEMMs"),
        ("void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>", "", "base GEMMs"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128", "", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)", "", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "", "attention"),
        ("_keys_kernel", "_LayerBackward", "attention"),
        ("void at::native::elementwise_kernel<128, 4>", "aten::scaled_dot_product_attention / aten::mul", "attention"),
        ("_layer_weights_kernel", "_Layer", "dequantization"),
        ("_dequantize_kernel", "_Layer", "dequantization"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "MatMul4Bit", "dequantization"),
        ("_rms_norm_backward_kernel", "_LayerBackward", "norms"),
        ("_rms_layernorm_forward", "Fast_RMS_Layernorm", "norms"),
        ("_rope_backward_kernel", "", "rope"),
        ("_rope_embedding", "", "rope"),
        ("_glu_backward_kernel", "", "activation"),
        ("_DWf_DW_dfg_kernel", "", "activation"),
        ("_fg_kernel", "", "activation"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "", "activation"),
        ("_log_probs_kernel", "LinearLogProbs", "loss"),
        ("_chunked_cross_entropy_forward", "", "loss"),
        ("void at::native::cunn_SoftMaxForward<8>", "aten::log_softmax / aten::_log_softmax", "loss"),
        ("void at::native::elementwise_kernel<128, 2>", "LigerFusedLinearCrossEntropyFunction / aten::mul", "loss"),
        ("Memcpy DtoD (Device -> Device)", "_Layer / aten::copy_", "copies and fills"),
        ("Memset (Device)", "", "copies and fills"),
        ("_extend_kernel", "_Layer", "copies and fills"),
        ("void at::native::elementwise_kernel<128, 4>", "aten::to / aten::_to_copy / aten::copy_", "copies and fills"),
        ("void kOptimizerStatic8bit2StateBlockwise<float, 0, 256, 1>", "", "optimizer"),
        ("void at::native::elementwise_kernel<128, 2>", "Optimizer.step#AdamW8bit.step / aten::copy_", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "", "other elementwise"),
        ("triton_poi_fused_add_mul_0", "", "other elementwise"),
        ("void somebody::new_kernel<1>", "", "other"),
    ],
)
def test_real_kernels_come_under_their_heading(name: str, path: str, expected: str) -> None:
    """Catches a rule that takes another's kernels: FlashAttention's names hold "cutlass", cuDNN's hold "fusion"."""
    assert category(name, path) == expected


@pytest.mark.parametrize(
    ("dims", "path", "work", "expected"),
    [
        ([[4096, 4096], [4096, 48]], "", {}, "LoRA GEMMs"),
        ([[48, 4096], [4096, 4096], [48, 4096]], "", {}, "LoRA GEMMs"),  # an out= is listed too
        ([[4096, 4144], [4144, 6144]], "", {}, "base GEMMs"),  # LoRA folded in
        ([[4096, 4096], [4096, 128]], "", {}, "base GEMMs"),
        ([[4096, 4096], [4096, 128]], "", {"r": 64}, "LoRA GEMMs"),
        ([[4096, 4096], [4096, 48]], "", {"full": True}, "base GEMMs"),
        ([[2, 64, 4096], [2, 4096, 4096]], "", {}, "base GEMMs"),  # two rows, not rank two
        ([[4096, 4096], [4096, VOCABULARY]], "", {}, "head GEMM"),
        ([[4096, 4096], [4096, 16032]], "LinearLogProbs / aten::mm", {}, "head GEMM"),
        ([[16, 4096], [4096, VOCABULARY]], "", {}, "head GEMM"),  # few labels are no adapter
        ([], "", {}, "base GEMMs"),
    ],
)
def test_products_are_told_apart_by_shape(dims: Any, path: str, work: Any, expected: str) -> None:
    assert category("nvjet_sm90", path, dims, **work) == expected


def span(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    names = {"id": "External id", "dims": "Input Dims"}
    named = {names.get(key, key): value for key, value in args.items()}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 7, "tid": tid, "args": named}


CHROME = [
    {"ph": "M", "name": "process_name"},
    span("user_annotation", "ProfilerStep#1", 0, 1000),
    span("cpu_op", "_Layer", 10, 50, id=1),
    span("cpu_op", "aten::mm", 20, 10, id=2, dims=[[4096, 4096], [4096, 16], []]),
    span("cuda_runtime", "cudaLaunchKernelExC", 22, 3, correlation=101),
    span("cuda_driver", "cuLaunchKernelEx", 40, 3, correlation=102),
    # another thread at the same time, as autograd's
    span("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 15, 60, 2, id=3),
    span("cpu_op", "MmBackward0", 16, 50, 2, id=4),
    span("cpu_op", "aten::mm", 18, 30, 2, id=5, dims=[[16, 4096], [4096, 4096]]),
    span("cuda_runtime", "cudaLaunchKernelExC", 25, 3, 2, correlation=103),
    span("user_annotation", "Optimizer.step#AdamW.step", 100, 50, id=1),  # numbered apart from operations
    span("cuda_runtime", "cudaMemcpyAsync", 110, 5, correlation=104),
    span("kernel", "nvjet_a", 200, 10, correlation=101, id=2),
    span("kernel", "_rms_norm_kernel", 212, 5, correlation=102),
    span("kernel", "nvjet_a", 220, 10, correlation=103),
    span("gpu_memcpy", "Memcpy HtoD", 240, 4, correlation=104),
    span("gpu_memset", "Memset (Device)", 250, 1, correlation=999),
    span("kernel", "nvjet_b", 260, 1, correlation=998, id=5),  # its call is missing
    span("cpu_op", "aten::view", 300, 1),
    span("kernel", "graph", 270, 1),
    span("gpu_user_annotation", "Optimizer.step#AdamW.step", 240, 10),
    span("overhead", "Command Buffer Full", 230, 9),
]


@pytest.mark.parametrize("reverse", [False, True])
def test_each_kernel_is_led_back_to_what_launched_it(reverse: bool) -> None:
    """Catches spans of the CPU counted as kernels, and operations of another thread taken for the launching one."""
    found = trace.events(CHROME[::-1] if reverse else CHROME, cuda=True)
    assert [(e.name, e.path) for e in found] == [
        ("nvjet_a", "_Layer / aten::mm"),
        ("_rms_norm_kernel", "_Layer"),
        ("nvjet_a", "MmBackward0 / aten::mm"),
        ("Memcpy HtoD", "Optimizer.step#AdamW.step"),
        ("Memset (Device)", ""),
        ("nvjet_b", "MmBackward0 / aten::mm"),
        ("graph", ""),
    ]
    late = ((16, 4096), (4096, 4096))
    assert [e.dims for e in found] == [((4096, 4096), (4096, 16)), (), late, (), (), late, ()]
    assert [e.copies for e in found] == [False, False, False, True, True, False, False]


def test_without_a_gpu_operations_are_the_events() -> None:
    found = trace.events(CHROME, cuda=False)
    assert [e.name for e in found] == ["_Layer", "MmBackward0", "aten::mm", "aten::mm", "aten::view"]


def test_paths_of_one_step_go_to_the_kernels_of_the_next() -> None:
    """Catches a product that takes another's shape because the steps ran a name differently often."""
    full = [Event("a", 0, 9, path="x"), Event("b", 9, 9, path="y"), Event("a", 20, 9, path="z"), Event("c", 30, 9)]
    quick = [Event("b", 0, 1), Event("a", 1, 1), Event("a", 2, 1), *[Event("c", 3, 1)] * 2]
    assert [e.path for e in trace.joined(quick, full)] == ["y", "x", "z", "", ""]
    assert [e.duration for e in trace.joined(quick, full)] == [1] * 5


def test_time_in_which_several_run_is_counted_once() -> None:
    """Catches a sum above the wall time, and a copy under a product that hides the product."""
    found = [
        Event("Memcpy", 0, 10, copies=True),
        Event("first", 4, 10),
        Event("second", 6, 20),
        Event("late", 40, 5),
        Event("empty", 50, 0),
    ]
    assert list(trace.pieces(found, innermost=False)) == [
        (0, 0, 4), (1, 4, 6), (1, 6, 10), (1, 10, 14), (2, 14, 26), (3, 40, 45)
    ]  # fmt: skip
    summed = trace.summary(found, 100, innermost=False)
    assert [k["alone_us"] for k in summed["kernels"]] == [4, 10, 12, 5, 0]
    assert [k["us"] for k in summed["kernels"]] == [10, 10, 20, 5, 0]
    assert (summed["busy_us"], summed["launches"]) == (31, 5)


def test_an_operation_that_waits_for_another_does_not_count() -> None:
    """Catches nested operations counted with those that they call."""
    found = [Event("outer", 0, 10), Event("inner", 2, 3), Event("inner", 6, 1)]
    summed = trace.summary(found, 20, innermost=True)
    assert {k["name"]: (k["count"], k["alone_us"]) for k in summed["kernels"]} == {"outer": (1, 6), "inner": (2, 4)}
    assert summed["timeline"]["duration_us"] == [2, 3, 1, 1, 3]


def step(backward_again: bool = False, layers: int = 4) -> list[Any]:
    """Kernels of two micro-batches of a few layers, end to end but for 1 us, with layer 2 of the forward a long one."""
    found: list[Any] = []

    def run(name: str, us: float, path: str = "", dims: Any = ()) -> None:
        start = found[-1].end + 1 if found else 0.0
        found.append(Event(name, start, us, name.startswith("Mem"), path, dims))

    for _ in range(2):
        for layer in range(layers):
            run("nvjet", 300 if layer != 2 else 900, "aten::mm", ((4096, 4096), (4096, 4096)))
            run("nvjet", 20, "aten::mm", ((4096, 4096), (4096, 16)))
            run("flash_fwd_kernel", 100)
        run("nvjet", 800, "aten::mm", ((4096, 4096), (4096, VOCABULARY)))
        for _ in range(layers):
            if backward_again:
                run("flash_fwd_kernel", 100)
            run("flash_bwd_convert_dq", 10)
            run("flash_bwd_kernel", 250)
            run("nvjet", 500, "aten::mm", ((4096, 4096), (4096, 4096)))
    run("void somebody::new_kernel", 30)
    return found


@pytest.mark.parametrize("backward_again", [False, True])
def test_a_layer_reaches_from_attention_to_attention(backward_again: bool) -> None:
    """Catches a window over the head or over two micro-batches, and attention computed again taken for a forward."""
    one = recorded(step(backward_again), 20_000)
    (forward, start, end), (backward, start_b, end_b) = trace.layers(one, trace.categories(one))
    assert forward == "one layer's forward: 0.42 ms"
    assert backward == f"one layer's backward: {0.86 if backward_again else 0.76} ms"
    assert end - start == pytest.approx(300 + 20 + 100 + 3)
    assert end_b - start_b == pytest.approx(250 + 500 + 10 + 3 + 101 * backward_again)
    shown = trace.blocks(one, trace.categories(one), start, end)
    widths = {name: sum(ms for _, ms in blocks) for name, blocks in shown.items()}
    assert widths == pytest.approx({"base GEMMs": 0.3, "LoRA GEMMs": 0.02, "attention": 0.1})


def test_a_step_without_attention_shows_its_middle() -> None:
    """Catches an empty picture."""
    one = recorded([Event("nvjet", 0, 40_000), Event("nvjet", 45_000, 15_000)], 70_000)
    assert trace.layers(one, trace.categories(one)) == [("out of the middle of the step", 17_500, 42_500)]


def test_the_line_accounts_for_the_whole_step() -> None:
    """Catches a kernel that is dropped because no rule knows it, and idle time that is not what is left."""
    found = step()
    one = recorded(found, 20_000)
    result = trace.line(one)
    assert list(result["ms"]) == trace.CATEGORIES
    assert sum(result["ms"].values()) == pytest.approx(result["wall_ms"]) == pytest.approx(20)
    assert result["busy_ms"] == pytest.approx(sum(e.duration for e in found) / 1e3)
    assert result["ms"]["head GEMM"] == pytest.approx(1.6)
    assert result["ms"]["other"] == pytest.approx(0.03)
    assert trace.unknown(one) == ["void somebody::new_kernel: 0.030 ms"]
    assert (result["launches"], result["timed_ms"], result["hardware"]) == (len(found), 9.0, "GPU A")


def test_a_long_timeline_is_cut_but_not_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LAUNCHES_KEPT", 5)
    one = recorded(step(), 20_000)
    assert len(one["timeline"]["start_us"]) == 5
    assert one["timeline"]["left_out"] == one["launches"] - 5
    assert sum(trace.line(one)["ms"].values()) == pytest.approx(20)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    for engine, again in (("whet", False), ("unsloth", True)):
        text = json.dumps(recorded(step(again), 20_000, engine))
        (tmp_path / "traces" / f"{engine}.json").write_text(text)
    return tmp_path / "traces"


def test_measuring_again_replaces_the_lines(folder: Path) -> None:
    """Catches a table with every engine twice, and one that lost another run's lines."""
    out = folder.parent / "results" / "trace.jsonl"
    out.parent.mkdir()
    out.write_text(json.dumps({"kind": "trace", "run_id": "zero", "engine": "whet", "work": WORK}) + "\n")
    for _ in range(2):
        done = run(str(folder), "--run-id", "one", "--out", str(out))
        assert done.returncode == 0, done.stderr
        lines = [json.loads(text) for text in out.read_text().splitlines()]
        assert [(line["run_id"], line["engine"]) for line in lines] == [
            ("zero", "whet"),
            ("one", "whet"),
            ("one", "unsloth"),
        ]
    assert [json.loads(text) for text in done.stdout.splitlines()] == lines[1:]
    assert "whet: no category for void somebody::new_kernel: 0.030 ms" in done.stderr


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"run_id": "two"}, [], "several runs or machines"),
        ({"hardware": "GPU B"}, ["--run-id", "one"], "several runs or machines"),
        ({}, ["--run-id", "none"], "no trace of run id none"),
        ({"timeline": None}, [], "is not a trace"),
    ],
)
def test_faults_are_named(folder: Path, changes: dict[str, Any], arguments: list[str], message: str) -> None:
    """Catches engines of two runs or two cards in one picture."""
    path = folder / "whet.json"
    one = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in one.items() if value is not None}))
    done = run(str(folder), "--out", str(folder.parent / "out.jsonl"), *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder.parent / "out.jsonl").exists()


def test_a_picture_is_drawn(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(str(folder), "--picture", str(folder.parent / "bench" / "trace.png"))
    assert done.returncode == 0, done.stderr
    assert (folder.parent / "bench" / "trace.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_share_of_the_picture_is_named() -> None:
    """Catches a segment without a label, labels over one another, and layers of engines drawn to different scales."""
    pytest.importorskip("matplotlib")
    traces = [recorded(step(), 20_000), recorded(step(True), 30_000, "unsloth")]
    figure = trace.draw(traces)
    bars, *panels = figure.axes
    for row, one in enumerate(traces):
        named = {t.get_text().split("\n")[0] for t in bars.texts if abs(t.get_position()[1] - row) < 0.5}
        assert named == {name for name, ms in trace.line(one)["ms"].items() if ms > 0}
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in bars.texts]
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert [panel.get_xlim() for panel in panels[:2]] == [panel.get_xlim() for panel in panels[2:]]


def test_labels_stay_apart_and_near() -> None:
    """Catches labels on top of one another or beyond the edges."""
    items = [(5.0, None, 4.0), (5.5, None, 4.0), (30.0, None, 4.0), (99.5, None, 4.0)]
    assert trace.spread(items, limit=100, gap=1) == pytest.approx([2.75, 7.75, 30, 98])


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r'pip install "whet\[plots\]"'):
        trace.draw([recorded(step(), 20_000)])
