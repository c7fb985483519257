"""This file is where adapters come from and go to, with the contract that each one carries.

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
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import TypeAdapter
from torch import nn

from stillhouse.distill.pairs import PreparedPair
from stillhouse.distill.quant import numerics
from stillhouse.errors import ContractError
from stillhouse.rundir import FORMAT, Json, file_digest, publish, read_json, write_json
from stillhouse.spec import DataSpec, LoraSpec, PairSpec, QuantSpec, TrainSpec, digest, point_id

CONTRACT = "stillhouse.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate")


def versions() -> Json:
    """The versions of the libraries that decide the numbers, and of Python's package of us."""
    return {name: importlib.metadata.version(name) for name in (*LIBRARIES, "stillhouse")}


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


# PEFT warns about a config it cannot fetch when it saves; the contract names the base itself.
logging.getLogger("peft").setLevel(logging.ERROR)
