"""Keep an exponential moving average of a student's trained weights, which can teach it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Average:
    """average = decay * average + (1 - decay) * student after each update; at 0, the student."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        """Begins as the student is now."""
        self.decay = decay
        self._student = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self._student.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student by one update."""
        for name, parameter in self._student.items():
            self.tensors[name].lerp_(parameter, 1 - self.decay)

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` was."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the student the average's weights, for a forward pass without gradients."""
        own = {name: parameter.data for name, parameter in self._student.items()}
        try:
            for name, parameter in self._student.items():
                parameter.data = self.tensors[name]
            yield
        finally:
            for name, parameter in self._student.items():
                parameter.data = own[name]
