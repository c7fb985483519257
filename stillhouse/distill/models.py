"""Load base models and tokenizers, select the device, and re-export the names other modules need.

Adapters and their contracts are in `adapters.py`; the parts of it that are needed elsewhere can be
imported from here.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from stillhouse.distill import loading
from stillhouse.distill.adapters import (
    attach_adapter,
    check_contract,
    new_student,
    read_contract,
    save_adapter,
    versions,
)
from stillhouse.distill.head import head_of, head_weight, hidden_states
from stillhouse.distill.pairs import PreparedPair, prepare
from stillhouse.distill.quant import quantize_
from stillhouse.errors import ContractError, NodeFault
from stillhouse.rundir import Json
from stillhouse.spec import QuantSpec

__all__ = [
    "PreparedPair",
    "attach_adapter",
    "check_contract",
    "head_of",
    "head_weight",
    "hidden_states",
    "load_base",
    "load_tokenizer",
    "machine",
    "new_student",
    "merged_and_requantised",
    "pick_device",
    "prepare",
    "read_contract",
    "save_adapter",
    "use_threads",
    "versions",
]


def machine() -> Json:
    """What affects rounding: the processor, the CPU instructions that torch uses, and the GPU."""
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    """The processor's model if the kernel reports it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def require_gpus() -> None:
    """Check that a pod that requested GPUs can use them; elsewhere nothing is required.

    Raises:
        NodeFault: torch sees fewer GPUs; on a CPU the run would take weeks, which nobody wants.
    """
    wanted, seen = int(os.environ.get("STILLHOUSE_GPUS") or 0), torch.cuda.device_count()
    if seen < wanted:
        raise NodeFault(
            f"this pod asked for {wanted} GPU{'s' if wanted > 1 else ''} and torch sees {seen}: the"
            " node's driver does not fit, a device is lost, or its GPUs are shown only to a"
            " runtime class (site.runtime_class, `nvidia` on k3s and RKE2)"
        )


def pick_device() -> torch.device:
    """This process's GPU if a launcher assigned one, else the first GPU, else the CPU."""
    require_gpus()
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def use_threads(threads: int | None) -> None:
    """Compute with this many CPU threads; None: torch's default."""
    if threads:
        torch.set_num_threads(threads)


def load_tokenizer(path: str, revision: str | None) -> Any:
    """The tokenizer, padding on the left so that all prompts of a batch end at one position."""
    tokenizer = loading.tokenizer(path, revision)
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(
    path: str, revision: str | None, dtype: str, quant: QuantSpec | None, device: torch.device
) -> nn.Module:
    """A causal LM in eval mode, frozen, quantized in place if asked; generation config empty.

    Raises:
        ContractError: the loss could not form the model's logits (see `head_of`).
    """
    model = loading.causal_lm(path, revision, getattr(torch, dtype))
    # Drop the model's own sampling defaults: every field is set at the call.
    model.generation_config = GenerationConfig()
    model.to(device)
    try:
        head_of(model)  # before quantization: the form of the head does not depend on it
    except ContractError as error:
        raise ContractError(f"{path}: {error}") from error
    if quant is not None:
        quantize_(model, quant)
    return model.requires_grad_(False).eval()


def merged_and_requantised(
    path: str,
    revision: str | None,
    dtype: str,
    quant: QuantSpec | None,
    device: torch.device,
    adapter: Path,
) -> nn.Module:
    """Q(W + BA): the adapter merged into the unquantized base in float32, then quantized.

    This is another function than Q(W)x + BAx, which was trained: rounding removes from BA whatever
    is small compared with a step of the grid. For reproducing published scores, not for use.
    """
    dense = load_base(path, revision, "float32", None, device)
    merged: Any = cast("Any", attach_adapter(dense, adapter, "default")).merge_and_unload()
    merged.to(getattr(torch, dtype))
    if quant is not None:
        quantize_(merged, quant)
    return merged.requires_grad_(False).eval()


transformers_logging.disable_progress_bar()
