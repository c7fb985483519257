"""Create, save, check, and load LoRA adapters, each with the contract that says what it means.

A trained adapter means one function: Q(W)x + BAx over one base, one quantizer, one dtype. Its
`stillhouse.json` (the contract) records them. Loading rebuilds exactly that function, or raises.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from stillhouse.distill.layers import (
    coverage,
    is_matrix,
    kinds,
    linear_layers,
    matrices,
    shape,
    text_modules,
)
from stillhouse.distill.pairs import PreparedPair
from stillhouse.distill.quant import numerics
from stillhouse.errors import ConfigError, ContractError, nearest
from stillhouse.identity import digest, point_id
from stillhouse.rundir import (
    FORMAT,
    Json,
    file_digest,
    publish,
    read_json,
    temporary_name,
    write_json,
)
from stillhouse.spec import DataSpec, Dtype, LoraSpec, PairSpec, QuantSpec, TrainSpec

CONTRACT = "stillhouse.json"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's own two files
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate")
HELD = {"id": str, "base": dict, "quant": dict, "numerics": dict, "lora": dict, "files": dict}
# PEFT's settings that do not change the function: paths, versions, and whether it is trainable.
PLACES = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
# What LoraSpec decides; any other entry that a file lacks means PEFT's default.
NEEDED = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"}
BY_MODEL = ("exclude_modules", "fan_in_fan_out")  # what follows from the base
AGAIN = "fetch the run again, or retry the point, which trains it anew"


def versions() -> Json:
    """The versions of the libraries that affect the numbers, and of the stillhouse package."""
    return {name: importlib.metadata.version(name) for name in (*LIBRARIES, "stillhouse")}


# ---------------------------------------------------------------- a new one


def new_student(base: nn.Module, lora: LoraSpec, seed: int) -> PeftModel:
    """The base with a fresh adapter: B = 0, so that it starts as the base itself.

    Adapts exactly the text decoder's linear layers that `lora.target_modules` names.

    Raises:
        ConfigError: no such layer has that name, or PEFT takes the name for a mixture's experts.
    """
    torch.manual_seed(seed)
    wanted = _wanted(base, lora.target_modules)
    text = {name for name, _ in text_modules(base)}
    outside = [n for n, _ in base.named_modules() if n not in text and _is(n, lora.target_modules)]
    is_conv1d = any(isinstance(layer, Conv1D) for layer in wanted.values())
    config = _config(lora, outside, is_conv1d)
    try:
        with _peft_quiet():
            student = cast("PeftModel", get_peft_model(cast("Any", base), config))
    except ValueError as error:
        raise ConfigError(
            f"target_modules {list(lora.target_modules)} do not fit this model: {error}"
        ) from error
    found = {n.removesuffix(".base_layer") for n in linear_layers(student) if "base_layer" in n}
    if found != wanted.keys():
        raise ConfigError(
            f"target_modules {list(lora.target_modules)}: PEFT would adapt"
            f" {', '.join(kinds(found)) or 'nothing'}, asked for were {', '.join(kinds(wanted))}"
        )
    return student


def _wanted(base: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers to adapt, by name; ConfigError if the model has no layer for a target."""
    layers = linear_layers(base)
    there = {name.rpartition(".")[2] for name in layers}
    taken = _taken_for_experts(base, there | {*targets})
    unknown = [target for target in targets if not any(_is(name, [target]) for name in layers)]
    lost = [target for target in targets if target in taken]
    if not unknown and not lost:
        return {name: layer for name, layer in layers.items() if _is(name, targets)}
    # Suggest only wide layers: a user who wants projections does not mean a gate with one output.
    wide = {name.rpartition(".")[2] for name, layer in layers.items() if is_matrix(shape(layer))}
    instead = sorted(({*targets} - {*unknown} | (wide if unknown else set())) - taken)
    other = kinds(name for name in matrices(base) if name not in layers)
    stacked = f" ({', '.join(other)} are no linear layers and stay as they are)" if other else ""
    hint = nearest(unknown[0], there - {*targets}) if len(unknown) == 1 else ""
    raise ConfigError(
        f"target_modules: {', '.join(unknown)} match no linear layer of the text decoder of this"
        f" {type(base).__name__}, which has {', '.join(sorted(there)) or 'none'}{stacked}.{hint}"
        f" Set target_modules=[{','.join(instead)}]"
        if unknown
        else f"target_modules: PEFT takes {', '.join(lost)} of this {type(base).__name__} for its"
        " experts' parameters and leaves its linear layers of these names without an adapter."
        f" Set target_modules=[{','.join(instead)}]"
    )


def _taken_for_experts(base: nn.Module, names: set[str]) -> set[str]:
    """Names that PEFT 0.21 applies to stacked experts of a mixture (at twice the rank if fused).
    It then skips linear layers of the same name (in shared experts, in dense blocks)."""
    config = LoraConfig(target_modules=sorted(names))
    with contextlib.suppress(ValueError):  # half of a fused pair: get_peft_model raises, too
        convert_peft_config_for_transformers(config, base, None)
    return names - {*cast("set[str]", config.target_modules)}


def _is(name: str, targets: Iterable[str]) -> bool:
    """Whether a target names this module: PEFT matches whole names, or the last parts of names."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _config(lora: LoraSpec, outside: list[str], is_conv1d: bool) -> LoraConfig:
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=cast("int", lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        exclude_modules=outside or None,
        fan_in_fan_out=is_conv1d,
        task_type="CAUSAL_LM",
    )


@contextlib.contextmanager
def _peft_quiet() -> Iterator[None]:
    """Suppress warnings of PEFT 0.21 that no user can act on, or that are checked here."""
    with warnings.catch_warnings():
        # PEFT uses a name that transformers 5 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


# ---------------------------------------------------------------- on disk


def save_adapter(student: PeftModel, spec: TrainSpec, prepared: PreparedPair, final: Path) -> None:
    """Publish the adapter and its contract under `final`, atomically."""
    temporary = temporary_name(final)
    student.save_pretrained(str(temporary), safe_serialization=True)
    # PEFT writes a model card that names the base's path on this machine; nobody needs it.
    (temporary / "README.md").unlink(missing_ok=True)
    config: Any = student.peft_config["default"]
    # PEFT keeps names as sets, whose order differs from process to process.
    sets = {key: sorted(value) for key, value in vars(config).items() if isinstance(value, set)}
    write_json(temporary / CONFIG, cast("Json", read_json(temporary / CONFIG)) | sets)
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
        "adapter": {
            "peft_type": config.peft_type.value,
            "exclude_modules": sets.get("exclude_modules"),
            "fan_in_fan_out": config.fan_in_fan_out,
            "tensors": _tensors(temporary / WEIGHTS),
        },
        "coverage": coverage(student).as_json(),
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
    """What identifies a base: the weights' digest, or the hub's commit."""
    return {
        "path": prepared.student,
        "revision": prepared.student_revision,
        # A pair that was prepared without reading the weights has only a path and a revision.
        "digest": getattr(prepared, "student_weights", None),
    }


def _whole_digest(prepared: PreparedPair) -> str | None:
    """The digest of all bytes of the weights. Older contracts hold this one; newer ones sample
    large files, and are equal for small ones."""
    files = sorted(Path(prepared.student).glob("*.safetensors"))
    return digest({file.name: file_digest(file) for file in files}) if files else None


def read_contract(adapter: Path) -> Json:
    """An adapter's contract, checked against names, shapes, and settings of the files beside it.

    Raises:
        ContractError: it is missing, of another format, incomplete, or does not match the files.
    """
    path = adapter / CONTRACT
    contract = read_json(path)
    if contract is None:
        raise ContractError(
            f"{adapter}: no {CONTRACT}; without its numerics contract nobody knows over which base"
            " and quantiser this adapter was trained"
        )
    if contract.get("format") != FORMAT:
        raise ContractError(f"{path}: format {contract.get('format')}, this version reads {FORMAT}")
    wrong = [key for key, kind in HELD.items() if not isinstance(contract.get(key), kind)]
    wrong += ["adapter"] if not isinstance(contract.get("adapter", {}), dict) else []
    wrong += ["dtype"] if contract.get("dtype") not in get_args(Dtype) else []
    entries = contract["files"].values() if "files" not in wrong else ()
    if not all(isinstance(e, dict) and isinstance(e.get("sha256"), str) for e in entries):
        wrong.append("files")
    if wrong:
        raise ContractError(
            f"{path}: {', '.join(wrong)} missing, or not what training writes; {AGAIN}"
        )
    _check_config(adapter, contract)
    _check_tensors(adapter, contract)
    return contract


def _check_config(adapter: Path, contract: Json) -> None:
    """Refuse an adapter_config.json that gives another function than the contract's settings."""
    try:
        lora = TypeAdapter(LoraSpec).validate_python(contract["lora"])
    except ValidationError as error:
        raise ContractError(
            f"{adapter / CONTRACT}: its lora {contract['lora']} is unknown to this version"
        ) from error
    config = read_json(adapter / CONFIG)
    if config is None:
        raise ContractError(f"{adapter / CONFIG}: missing; {AGAIN}")
    # Older contracts do not have these settings.
    known = contract.get("adapter") or {key: config.get(key) for key in BY_MODEL}
    promised = _config(lora, [], False).to_dict() | {key: known.get(key) for key in BY_MODEL}
    differ = [
        f"{key} {config.get(key)} (the contract: {_plain(value)})"
        for key, value in promised.items()
        if key not in PLACES
        and _plain(config.get(key, None if key in NEEDED else value)) != _plain(value)
    ]
    if differ:
        raise ContractError(
            f"{adapter / CONFIG}: not the adapter that training saved: {'; '.join(differ)}."
            f" Restore the file, or {AGAIN}"
        )


def _plain(value: Any) -> Any:
    """A setting as JSON: names sorted, and no names become None (PEFT writes either)."""
    names = isinstance(value, set | list | tuple) and all(isinstance(v, str) for v in value)
    return (sorted(value) or None) if names else json.loads(json.dumps(value))


def _check_tensors(adapter: Path, contract: Json) -> None:
    """Refuse weights that cannot be read, or that belong to other layers than were trained."""
    found = _tensors(adapter / WEIGHTS)
    promised = contract.get("adapter", {}).get("tensors", found)
    if found != promised:
        raise _other_tensors(adapter, found, promised, "contract")


def _other_tensors(
    adapter: Path, found: Iterable[str], promised: Iterable[str], by: str
) -> ContractError:
    lost, new = sorted({*promised} - {*found}), sorted({*found} - {*promised})
    words = [f"{len(lost)} are missing ({lost[0]})"] if lost else []
    words += [f"{len(new)} are unknown there ({new[0]})"] if new else []
    return ContractError(
        f"{adapter / WEIGHTS}: not the tensors of its {by}:"
        f" {' and '.join(words) or 'some have other shapes'}. Restore the file, or {AGAIN}"
    )


def _tensors(weights: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file, from its header."""
    try:
        with safe_open(weights, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    except FileNotFoundError as error:
        raise ContractError(f"{weights}: missing; {AGAIN}") from error
    except (SafetensorError, OSError) as error:
        raise ContractError(f"{weights}: damaged or cut short ({error}); {AGAIN}") from error


def check_contract(contract: Json, prepared: PreparedPair, quant: QuantSpec) -> None:
    """Refuse a base or a quantizer other than the one the adapter was trained with.

    Raises:
        ContractError: names what differs.
    """
    here, there = _base_identity(prepared), contract["base"]
    # A path does not identify a base: two machines keep the same base under different paths.
    for field in ("revision", "digest"):
        if here[field] != there.get(field):
            if field == "digest" and there.get(field) == _whole_digest(prepared):
                continue
            raise ContractError(
                f"adapter {contract['id']} was trained over {there.get('path')} with {field}"
                f" {there.get(field)}; the base at hand has {here[field]}"
            )
    wanted = TypeAdapter(QuantSpec).dump_python(quant, mode="json")
    if contract["quant"] != wanted or contract["numerics"] != numerics(quant):
        raise ContractError(
            f"adapter {contract['id']} was trained over {contract['numerics']};"
            f" this version and spec would rebuild {numerics(quant)}"
        )


def attach_adapter(base: nn.Module, adapter: Path, name: str) -> PeftModel:
    """The base with a saved adapter attached and active; call again to attach another.

    Raises:
        ContractError: a file is missing or is not the one that was saved, or a tensor does not fit
            the base.
    """
    for file, entry in read_contract(adapter)["files"].items():
        path = adapter / file
        if not path.is_file() or file_digest(path) != entry["sha256"]:
            raise ContractError(f"{path}: missing, or not the file that training saved; {AGAIN}")
    try:
        with _peft_quiet():
            if isinstance(base, PeftModel):
                model = base
                model.load_adapter(str(adapter), name)
                model.set_adapter(name)
            else:
                model = PeftModel.from_pretrained(cast("Any", base), str(adapter), name)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ContractError(f"{adapter}: does not fit its base: {error}") from error
    wanted = {*get_peft_model_state_dict(model, adapter_name=name)}
    if wanted != (found := {*_tensors(adapter / WEIGHTS)}):
        raise _other_tensors(adapter, found, wanted, "base")
    return model.eval()


# PEFT warns about a config it cannot fetch when it saves; the contract names the base itself.
logging.getLogger("peft").setLevel(logging.ERROR)
