"""What must be said to libraries before anything imports them."""

import os

import torch

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's own trainers, which some tests use, report to their makers
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels then run in Triton's interpreter, on CPU tensors
