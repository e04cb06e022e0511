"""A training pass as one CUDA graph: some thousand launches of the host become one, while batches keep their form.

The first pass of a form runs as it is; from the next one on the pass is recorded, forward and backward together, and
replayed. Recording costs what one pass costs the host. The graph reads its batch from tensors of its own, and adds to
gradients that stay in place. Of documents and labelled rows it has room for somewhat more than its first batch had: a
batch with fewer gets empty documents, and rows without a label. A batch of another form runs as it is, and the graph is
let go, so that two never hold memory at one time.

What a graph does not see: anything that happens on the host, such as hooks on modules. `obstacle` finds them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whet.models.fused import path_of, shared_of
from whet.models.head import IGNORED

log = logging.getLogger("whet")

Batch = dict[str, Any]
Step = Callable[[Batch], dict[str, Tensor]]

DOCUMENTS = 64  # room for documents is made in multiples of it
LABEL_ROWS = 8  # and for labelled rows in this part of all
LONGEST = ("max_length_q", "max_length_k")
HOST_ROPE = ("dynamic", "longrope")  # look at the longest position of each batch


@dataclass(frozen=True)
class Form:
    """The batches that one graph can take: those of these shapes, with no more labelled rows and documents.

    fixed: shapes, dtypes and values that must be the same. rows: of the documents, where all are of one length.
    """

    fixed: tuple[tuple[str, Any], ...]
    tokens: int
    label_rows: int
    documents: int
    longest: int
    rows: int | None

    @classmethod
    def of(cls, batch: Batch) -> Form:
        """The form of `batch` itself, with room for a little more."""
        tokens, (documents, longest) = batch["input_ids"].numel(), _documents(batch)
        part = max(128, tokens // LABEL_ROWS)
        rows = documents if documents * longest == tokens else None
        room = documents
        if rows is None:
            room = -(-documents // DOCUMENTS) * DOCUMENTS
            longest = min(tokens, 1 << (longest - 1).bit_length())
            room += room * longest == tokens  # would be taken for documents of one length
        return cls(_fixed(batch), tokens, -(-batch["label_rows"].shape[1] // part) * part, room, longest, rows)

    def holds(self, batch: Batch) -> bool:
        documents, longest = _documents(batch)
        rows = documents if documents * longest == batch["input_ids"].numel() else None
        labels = batch["label_rows"].shape[1]
        return (
            rows == self.rows
            and (longest == self.longest if rows else longest <= self.longest and documents <= self.documents)
            and self.label_rows // 4 < labels <= self.label_rows
            and _fixed(batch) == self.fixed
        )

    def laid_out(self, batch: Batch) -> Batch:
        """`batch` in this form: filled up with empty documents and rows without a label."""
        labels, bounds = batch["label_rows"], batch["cu_seq_lens_q"]
        spare = self.label_rows - labels.shape[1]
        wide = torch.cat([labels, labels.new_full((2, spare), IGNORED)], dim=1)
        wide[0, labels.shape[1] :] = self.tokens - 1
        cu = torch.cat([bounds, bounds.new_full((self.documents + 1 - bounds.numel(),), self.tokens)])
        return {
            **batch,
            "label_rows": wide,
            "cu_seq_lens_q": cu,
            "cu_seq_lens_k": cu,
            **dict.fromkeys(LONGEST, self.longest),
        }


def _documents(batch: Batch) -> tuple[int, int]:
    return batch["cu_seq_lens_q"].numel() - 1, batch["max_length_q"]


def _fixed(batch: Batch) -> tuple[tuple[str, Any], ...]:
    loose = ("label_rows", "cu_seq_lens_q", "cu_seq_lens_k", *LONGEST)
    return tuple(
        (name, (x.shape, x.dtype) if isinstance(x, Tensor) else x)
        for name, x in sorted(batch.items())
        if name not in loose
    )


class PassGraph:
    """Runs the passes of one training run: `step` on a batch on the device, whose result is a tensor for each name."""

    def __init__(self, model: nn.Module, step: Step, *, allowed: bool = True):
        self.model, self.step, self.allowed = model, step, allowed
        self.shared = shared_of(model)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = 0
        self._form: Form | None = None
        self._parameters = list(model.parameters())
        self._settings: tuple[Any, ...] = ()
        self._passes = 0  # of this form, so far
        self._patience = 2  # passes of one form in a row before it is recorded; more each time one was let go
        self._batch: Batch = {}  # what the graph reads
        self._found: dict[str, Tensor] = {}  # and what it writes
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []  # those of the last pass, to which a graph adds

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        settings = self._asked()
        if self._form is None or settings != self._settings or not self._form.holds(batch):
            self.drop()
            self._form, self._settings = Form.of(batch), settings
        self._passes += 1
        if self.graph is not None:
            for name, x in self._form.laid_out(batch).items():
                if isinstance(x, Tensor):
                    self._batch[name].copy_(x)
            self._bind()
        elif not self.allowed or self._passes < self._patience or not self._record(batch):
            self._gradients = []  # else they stay beside the new ones
            found = self.step(batch)
            self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
            return found
        assert self.graph is not None
        self.graph.replay()
        return {name: x.clone() for name, x in self._found.items()}

    def _asked(self) -> tuple[Any, ...]:
        """What a callback might change between passes, and a graph would go on doing: what trains, and how."""
        shared = self.shared
        how = () if shared is None else (shared.policy, shared.layers, shared.tile, shared.fp8)
        return (*how, *(p.requires_grad for p in self._parameters))

    def drop(self) -> None:
        """Let the graph go, and give its memory back."""
        self._form, self._passes, self._gradients = None, 0, []
        if self.graph is not None:
            self.graph.reset()
            self.graph, self._batch, self._found = None, {}, {}
            torch._C._cuda_clearCublasWorkspaces()  # those of its stream
            torch.cuda.empty_cache()

    def _bind(self) -> None:
        """Have the gradients where the graph adds to them: what is there already, or zero."""
        fresh = [gradient for p, gradient in self._gradients if p.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for p, gradient in self._gradients:
            if p.grad is not None and p.grad is not gradient:
                gradient.copy_(p.grad)
            p.grad = gradient

    def _record(self, batch: Batch) -> bool:
        """Record the step on a batch of this form. What it would have computed has not happened yet."""
        assert self._form is not None
        assert self.shared is not None
        laid_out = self._form.laid_out(batch)
        self._batch = {name: x.clone() if isinstance(x, Tensor) else x for name, x in laid_out.items()}
        self._bind()  # to those that the last pass has made: they lie as the block wants them
        # A recording that fails leaves the generator it used unusable: give it one of the same state.
        generator = torch.cuda.default_generators[batch["input_ids"].device.index]
        own = generator.graphsafe_get_state()
        generator.graphsafe_set_state(own.clone_state())
        # cuBLAS has work space for each stream: what passes on the usual one took is not needed beside the recording's
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # other threads, such as one that pins the next batches, go on meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._found = self.step(self._batch)
                self.shared.settle()
        except (RuntimeError, NotImplementedError) as error:
            torch.cuda.set_stream(stream)  # a recording that fails leaves this thread on its own
            generator.graphsafe_set_state(own)
            self.shared.forget()
            self.allowed, self._batch, self._found, self._gradients = False, {}, {}, []
            reason = str(error).strip().splitlines()[0]
            log.warning("passes run one kernel at a time: they could not be recorded as a CUDA graph (%s)", reason)
            return False
        self.graph, self.captures, self._patience = graph, self.captures + 1, min(64, 2 * self._patience)
        return True


def obstacle(model: nn.Module) -> str | None:
    """Why a model's passes can't be recorded, in words; None if they can."""
    shared = shared_of(model)
    if shared is None:
        return "the model has no fused layers"
    path = path_of(model)
    if path != "fused":
        return f"not all layers run as the fused block ({path})"
    kinds = getattr(shared.rotary, "rope_type", "default")
    if any(kind in HOST_ROPE for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])):
        return "the rotary embedding looks at the positions of each batch"
    for name, module in model.named_modules():
        if _hooked(module):
            return f"hooks on {name or type(model).__name__}"
    if torch.is_anomaly_enabled():
        return "autograd's anomaly detection"
    return None


def _hooked(module: nn.Module) -> bool:
    """Whether somebody else than transformers and PEFT, whose hooks only mark tensors, listens to a module."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = [hook for hooks in kinds for hook in hooks.values()]
    return not all((getattr(hook, "__module__", None) or "").startswith(("transformers.", "peft.")) for hook in hooks)
