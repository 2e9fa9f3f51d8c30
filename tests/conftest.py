"""What holds for every test: no window, no network, one thread.

Nothing of tl_sparsify is imported here: shapes are checked only in what is imported after pytest has started.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when datasets is imported

import matplotlib
import torch
from hypothesis import settings

matplotlib.use("Agg")
torch.set_num_threads(1)  # tiny models: threads that wait for each other on a busy machine take far longer
settings.register_profile("tl_sparsify", deadline=None, max_examples=30, derandomize=bool(os.environ.get("CI")))
settings.load_profile("tl_sparsify")
