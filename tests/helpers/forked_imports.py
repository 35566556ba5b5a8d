"""Packages that every rank of `forked.run_ranks` needs, imported once by the process that the ranks are forked from."""

import torch

import tests.helpers.exactness
import tests.helpers.toy  # noqa: F401

torch.set_num_threads(1)
