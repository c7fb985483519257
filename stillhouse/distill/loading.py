"""This file is where a model's or a tokenizer's files are loaded whole, or it is said why not.

What is wrong with them is wrong at every attempt, so it is a mistake in what was asked (exit code
42) and never infrastructure. transformers fills what a checkpoint lacks with random numbers, and
leaves out what its architecture has no room for, with a warning: here both are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.at_hand import snapshot
from stillhouse.errors import ContractError

SHOWN = 3  # tensors that a sentence names
LONGEST = 400  # characters of another library's sentence


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Say in a sentence why `what` cannot be loaded; memory, devices and disks are no such reason.

    Raises:
        ContractError: a file, a config or a missing library that will be so again.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except OSError as error:
        # transformers says OSError of its own, without a number, of files that it cannot use.
        if error.errno is not None:
            raise
        raise ContractError(f"{what} cannot be loaded: {_short(error)}") from error
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise
        raise ContractError(f"{what} cannot be loaded: {_short(error)}") from error
    except ContractError:
        raise
    except Exception as error:  # tokenizers and safetensors raise classes of their own
        raise ContractError(f"{what} cannot be loaded: {_short(error)}") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text[:LONGEST]}{' …' if len(text) > LONGEST else ''}"


def causal_lm(path: str | Path, revision: str | None, dtype: Any) -> Any:
    """The causal language model of these files, every weight of it from there.

    Raises:
        ContractError: it cannot be loaded, lacks weights, or has some that would be left out.
    """
    from transformers import AutoModelForCausalLM

    with told(str(path)):
        found: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # None asks whoever sits at the terminal
            output_loading_info=True,
        )
    model, seen = found
    if lacks := sorted(seen["missing_keys"]):
        raise ContractError(
            f"{path}: its files lack {_listed(lacks)}, which would be random numbers; get the"
            " missing weights, or a config that is theirs (tie_word_embeddings, num_hidden_layers)"
        )
    modules = dict(model.named_modules())
    left_out = sorted(
        name for name in seen["unexpected_keys"] if _is_layer(modules.get(name.rpartition(".")[0]))
    )
    if left_out:
        raise ContractError(
            f"{path}: its files hold {_listed(left_out)}, for which a"
            f" {type(model).__name__} of its config has no room: another function would be trained;"
            " use the config that belongs to these weights"
        )
    return model


def _is_layer(module: Any) -> bool:
    """Whether it is a layer with weights of its own, not a block of such layers."""
    return module is not None and not [*module.children()] and bool([*module.parameters()])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def files_of(path: str | Path, revision: str | None) -> str:
    """The directory of these files: of a hub id, that of its commit on this machine.

    By its id, huggingface_hub would first ask the hub which programs to name in its requests,
    whatever local_files_only says.
    """
    is_id = not Path(path).expanduser().is_dir()
    return str((snapshot(str(path), revision, "model") if is_id else None) or path)


def config_of(path: str | Path, revision: str | None) -> Any:
    """The config of these files.

    Raises:
        ContractError: it cannot be read, is of no model that transformers knows, or wants code of
            its own to be run.
    """
    from transformers import AutoConfig

    with told(f"the config of {path}"):
        return AutoConfig.from_pretrained(
            files_of(path, revision), local_files_only=True, trust_remote_code=False
        )


def tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of these files.

    Raises:
        ContractError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with told(f"the tokenizer of {path}"):
        return AutoTokenizer.from_pretrained(
            files_of(path, revision), local_files_only=True, trust_remote_code=False
        )
