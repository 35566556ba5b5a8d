"""Settings that must stand before anything is imported."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not torch.cuda.is_available():  # Triton reads this when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
