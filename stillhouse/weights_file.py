"""Read, without torch, which tensors a model directory holds.

A safetensors file begins with eight bytes, the length of a JSON header that names its tensors. The
data after the header is not read. If there are several files, an index names the file of each
tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stillhouse.errors import ContractError
from stillhouse.rundir import Json

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")
LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one either
LONGEST_JSON = 300_000_000  # bytes of a JSON file; the largest tokenizers have 35 million


@dataclass(frozen=True)
class TensorHeader:
    """What a file says about one of its tensors."""

    dtype: str  # F32, BF16, …
    shape: tuple[int, ...]


def read_object(path: Path) -> Json:
    """The object in a JSON file that somebody else wrote.

    Raises:
        ContractError: not there, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise ContractError(f"{path}: larger than {LONGEST_JSON} bytes, so it is no such file")
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ContractError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path}: not JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise ContractError(f"{path}: holds no JSON object; get the file again")
    return cast("Json", content)


def tensors_of(directory: Path) -> dict[str, TensorHeader]:
    """The tensors of a model directory, from the headers of its files.

    Raises:
        ContractError: no safetensors, a file that the index names is missing, torn or lacks a
            tensor that it should hold.
    """
    if not (directory / INDEX).is_file():
        if not (directory / WHOLE).is_file():
            raise ContractError(_no_weights(directory))
        return header_of(directory / WHOLE)
    placed = read_object(directory / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ContractError(f"{directory / INDEX}: no weight_map; get the file again")
    places = {name: str(file) for name, file in cast("dict[str, Any]", placed).items()}
    shards: dict[str, dict[str, TensorHeader]] = {}
    for file in sorted({*places.values()}):
        if Path(file).name != file or not (directory / file).is_file():
            raise ContractError(
                f"{directory} has no {file}, which {INDEX} names; get the file, too"
            )
        shards[file] = header_of(directory / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise ContractError(
                f"{directory / file}: holds no {name}, which {INDEX} promises; the index and the"
                " shards are not of one checkpoint: get both again"
            )
    return {name: header for shard in shards.values() for name, header in shard.items()}


def _no_weights(directory: Path) -> str:
    pickled = sorted({f.name for pattern in PICKLES for f in directory.glob(pattern)})
    if pickled:
        return (
            f"{directory} has no {WHOLE}: its weights are pickled ({pickled[0]}), and nothing is"
            " unpickled here; save them with save_pretrained, which writes safetensors"
        )
    return f"{directory} has no {WHOLE}, and no {INDEX}; what is needed is its weights as these"


def header_of(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file.

    Raises:
        ContractError: torn, or no safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            said = json.loads(stream.read(length))
        said.pop("__metadata__", None)
        tensors = {
            str(name): TensorHeader(str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in said.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in said.values()), default=0)
        if any(side < 0 for tensor in tensors.values() for side in tensor.shape):
            raise ValueError("a shape below 0")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ContractError(f"{file}: no whole safetensors file ({error}); get it again") from error
    if size != 8 + length + end:
        raise ContractError(
            f"{file}: {size} bytes, its header wants {8 + length + end}: it was cut short or"
            " changed; get it again"
        )
    return tensors


def parameters(tensors: dict[str, TensorHeader]) -> int:
    """How many numbers these tensors hold."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
