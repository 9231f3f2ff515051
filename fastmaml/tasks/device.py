"""Where a task source keeps its data: the images as bytes on the device, and only row numbers and small random numbers on the way to it.

What is random is drawn on the CPU whatever the device is, so that a seed means the same tasks everywhere, and nothing waits for a GPU.
"""

from __future__ import annotations

import torch


def check_device(device: str | torch.device) -> torch.device:
    """ValueError for what torch does not know, and for a GPU that is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r}: expected 'cpu', 'cuda' or 'cuda:0' and so on") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices here; leave it out, or pass device='cpu'")
    return found
