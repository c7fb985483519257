"""Load a model or a tokenizer completely from its files, or raise an error that says why not.

A problem with the files recurs at every attempt, so it counts as a configuration error (exit code
42), never as an infrastructure failure. transformers only warns when it fills missing weights with
random numbers, or ignores weights that the architecture has no place for; this module refuses both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.errors import ContractError
from stillhouse.local_models import snapshot

SHOWN = 3  # tensors that a message names
LONGEST = 400  # characters of another library's message


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Raise ContractError with the reason why `what` cannot be loaded.

    Errors of memory, devices, and disks pass through unchanged.

    Raises:
        ContractError: a problem of a file, a config, or a missing library, which will recur.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except OSError as error:
        # For files that it cannot use, transformers raises an OSError without an errno.
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
    """The causal language model of these files, with every weight read from them.

    Raises:
        ContractError: it cannot be loaded, lacks weights, or has weights that would be ignored.
    """
    from transformers import AutoModelForCausalLM

    with told(str(path)):
        found: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # None would prompt at the terminal
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
    """The directory of these files; for a hub id, the snapshot of its commit on this machine.

    Given an id, huggingface_hub would contact the hub first (to learn which programs to name in its
    requests), even with local_files_only.
    """
    is_id = not Path(path).expanduser().is_dir()
    return str((snapshot(str(path), revision, "model") if is_id else None) or path)


def config_of(path: str | Path, revision: str | None) -> Any:
    """The config of these files.

    Raises:
        ContractError: it cannot be read, is of no model that transformers knows, or requires code
            of its own.
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
