"""This file is where models come from: bases, adapters, and the contract an adapter carries.

A trained adapter means one function: Q(W)x + BAx over one base, one quantiser, one dtype. Its
`stillhouse.json` says which, and whoever loads it rebuilds exactly that or is refused.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from stillhouse.distill.pairs import PreparedPair, prepare
from stillhouse.distill.quant import numerics, quantize_
from stillhouse.errors import ContractError
from stillhouse.rundir import FORMAT, Json, file_digest, publish, read_json, write_json
from stillhouse.spec import DataSpec, LoraSpec, PairSpec, QuantSpec, TrainSpec, digest, point_id

__all__ = [
    "PreparedPair",
    "attach_adapter",
    "check_contract",
    "head_weight",
    "hidden_states",
    "load_base",
    "load_tokenizer",
    "new_student",
    "merged_and_requantised",
    "pick_device",
    "prepare",
    "read_contract",
    "save_adapter",
    "use_threads",
    "versions",
]

CONTRACT = "stillhouse.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def versions() -> Json:
    """The versions of the libraries that decide the numbers, and of Python's package of us."""
    return {name: importlib.metadata.version(name) for name in (*LIBRARIES, "stillhouse")}


def pick_device() -> torch.device:
    """This process's GPU under a launcher that gives each one, else the first, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def use_threads(threads: int | None) -> None:
    """Compute with so many CPU threads; None: what torch chooses."""
    if threads:
        torch.set_num_threads(threads)


def load_tokenizer(path: str, revision: str | None) -> Any:
    """The tokenizer, padding on the left so that all prompts of a batch end at one position."""
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, local_files_only=True)
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(
    path: str, revision: str | None, dtype: str, quant: QuantSpec | None, device: torch.device
) -> nn.Module:
    """A causal LM in eval mode, frozen, quantised in place if asked, with no sampling habits.

    Raises:
        ContractError: an architecture whose logits are not hidden @ head (soft caps, scales, bias).
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        revision=revision,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
    )
    config = model.config
    odd = [k for k in ("final_logit_softcapping", "logit_scale") if getattr(config, k, None)]
    if odd or getattr(model.lm_head, "bias", None) is not None:
        raise ContractError(
            f"{path}: its logits are not hidden @ head ({', '.join(odd) or 'head bias'});"
            " the chunked loss would train another function"
        )
    # Whatever the model's makers like to sample with is not ours: every field is set at the call.
    model.generation_config = GenerationConfig()
    model.to(device)
    if quant is not None:
        quantize_(model, quant)
    return model.requires_grad_(False).eval()


def new_student(base: nn.Module, lora: LoraSpec, seed: int) -> PeftModel:
    """The base with a fresh adapter: B = 0, so that it starts as the base itself."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=cast("int", lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        with _peft_quiet():
            return cast("PeftModel", get_peft_model(cast("Any", base), config))
    except ValueError as error:
        raise ContractError(
            f"lora.target_modules {list(lora.target_modules)} do not fit this model: {error}"
        ) from error


@contextlib.contextmanager
def _peft_quiet() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5 for a name that is deprecated there; no user can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def hidden_states(
    model: nn.Module, ids_BT: Int[Tensor, "B T"], mask_BT: Int[Tensor, "B T"]
) -> Float[Tensor, "B T H"]:
    """Last hidden states, after the final norm, before the head; padding on either side."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    decoder = cast("Any", causal_lm).model
    output = decoder(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=False
    )
    return output.last_hidden_state


def head_weight(model: nn.Module) -> Float[Tensor, "V H"]:
    """The frozen matrix that turns hidden states into logits."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast("Any", causal_lm).lm_head.weight


def save_adapter(student: PeftModel, spec: TrainSpec, prepared: PreparedPair, final: Path) -> None:
    """Publish the adapter and its contract under `final`, whole or not at all."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    student.save_pretrained(str(temporary), safe_serialization=True)
    # PEFT writes a model card that names the base's path on this machine; nobody needs it.
    (temporary / "README.md").unlink(missing_ok=True)
    names = sorted(p.name for p in temporary.iterdir())
    contract = {
        "format": FORMAT,
        "id": point_id(spec),
        "pair": TypeAdapter(PairSpec).dump_python(spec.pair, mode="json"),
        "data": TypeAdapter(DataSpec).dump_python(spec.data, mode="json"),
        "base": _base_identity(prepared),
        "quant": TypeAdapter(QuantSpec).dump_python(spec.quant, mode="json"),
        "numerics": numerics(spec.quant),
        "lora": TypeAdapter(LoraSpec).dump_python(spec.lora, mode="json"),
        "dtype": spec.pair.student_dtype,
        "versions": versions(),
        "files": {
            n: {"size": (temporary / n).stat().st_size, "sha256": file_digest(temporary / n)}
            for n in names
        },
    }
    write_json(temporary / CONTRACT, contract)
    publish(temporary, final)


def _base_identity(prepared: PreparedPair) -> Json:
    """What tells one base from another: the weights' digest, or the hub's commit."""
    here = Path(prepared.student)
    weights = {p.name: file_digest(p) for p in sorted(here.glob("*.safetensors"))}
    return {
        "path": prepared.student,
        "revision": prepared.student_revision,
        "digest": digest(weights) if here.is_dir() else None,
    }


def read_contract(adapter: Path) -> Json:
    """An adapter's contract.

    Raises:
        ContractError: none there, or of another format.
    """
    contract = read_json(adapter / CONTRACT)
    if contract is None:
        raise ContractError(
            f"{adapter}: no {CONTRACT}; without its numerics contract nobody knows over which base"
            " and quantiser this adapter was trained"
        )
    if contract.get("format") != FORMAT:
        raise ContractError(
            f"{adapter / CONTRACT}: format {contract.get('format')}, this version reads {FORMAT}"
        )
    return contract


def check_contract(contract: Json, prepared: PreparedPair, quant: QuantSpec) -> None:
    """Refuse a base or a quantiser other than the adapter was trained over.

    Raises:
        ContractError: names what differs.
    """
    here, there = _base_identity(prepared), contract["base"]
    # A path is a place, not an identity: two machines keep one base in two places.
    for field in ("revision", "digest"):
        if here[field] != there[field]:
            raise ContractError(
                f"adapter {contract['id']} was trained over {there['path']} with {field}"
                f" {there[field]}; the base at hand has {here[field]}"
            )
    asked = TypeAdapter(QuantSpec).dump_python(quant, mode="json")
    if contract["quant"] != asked or contract["numerics"] != numerics(quant):
        raise ContractError(
            f"adapter {contract['id']} was trained over {contract['numerics']};"
            f" this version and spec would rebuild {numerics(quant)}"
        )


def attach_adapter(base: nn.Module, adapter: Path, name: str) -> PeftModel:
    """The base with a saved adapter attached and active; call again to attach another.

    Raises:
        ContractError: a file that is missing or not the one that was saved, or a tensor that does
            not fit the base.
    """
    for file, entry in read_contract(adapter)["files"].items():
        path = adapter / file
        if not path.is_file() or file_digest(path) != entry["sha256"]:
            raise ContractError(f"{path}: missing, or not the file that training saved")
    try:
        if isinstance(base, PeftModel):
            base.load_adapter(str(adapter), name)
            base.set_adapter(name)
            return base.eval()
        with _peft_quiet():
            return PeftModel.from_pretrained(cast("Any", base), str(adapter), name).eval()
    except (RuntimeError, KeyError, ValueError) as error:
        raise ContractError(f"{adapter}: does not fit its base: {error}") from error


def merged_and_requantised(
    path: str,
    revision: str | None,
    dtype: str,
    quant: QuantSpec | None,
    device: torch.device,
    adapter: Path,
) -> nn.Module:
    """Q(W + BA): the adapter merged into the unquantised base in float32, then quantised.

    Another function than Q(W)x + BAx, which the adapter was trained as: rounding takes from BA
    whatever is small beside a step of the grid. For scores that were published, not for use.
    """
    dense = load_base(path, revision, "float32", None, device)
    merged: Any = cast("Any", attach_adapter(dense, adapter, "default")).merge_and_unload()
    merged.to(getattr(torch, dtype))
    if quant is not None:
        quantize_(merged, quant)
    return merged.requires_grad_(False).eval()


# PEFT warns about a config it cannot fetch when it saves; the contract names the base itself.
logging.getLogger("peft").setLevel(logging.ERROR)
transformers_logging.disable_progress_bar()
