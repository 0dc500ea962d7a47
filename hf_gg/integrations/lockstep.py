"""Several runs of one model that wait for one another at chosen modules, so that a module can be changed in between.

Each run is the model's own forward pass in a thread; only one thread runs at any time. When a run calls a chosen
module it waits there until the others have come, or are done; whoever asked for the runs then gets the inputs of all
of them, says what weights the module shall have from now on, and the runs go on with these. So one forward pass gives
every module inputs that went through the changed modules before it, in any architecture: nothing needs to be known of
layers, and what a run holds at a time is what any forward pass holds.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class _Stopped(BaseException):
    """Ends a run from within; no `except Exception` of a model may catch it."""


@dataclass(frozen=True)
class Call:
    """A call of a module that waits to be made: positional and keyword arguments."""

    args: tuple
    kwargs: dict[str, Any]


class _Run(threading.Thread):
    """One forward pass, in a thread that only runs between `proceed` and the next pause."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]):
        super().__init__(daemon=True)
        self._model, self._inputs, self._context = model, inputs, contextvars.copy_context()
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._error: BaseException | None = None
        self.finished = False
        self.at: str | None = None
        self.call: Call | None = None

    def run(self) -> None:
        self._resume.acquire()
        try:
            if not self._stopped:
                self._context.run(self._forward)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self.at, self.call, self.finished = None, None, True
        self._paused.release()

    @torch.no_grad()
    def _forward(self) -> None:
        self._model(**self._inputs)

    def pause(self, name: str, call: Call) -> None:
        """Called within the run: wait at a module."""
        self.at, self.call = name, call
        self._paused.release()
        self._resume.acquire()
        self.at, self.call = None, None
        if self._stopped:
            raise _Stopped

    def proceed(self) -> None:
        """Called from outside: run up to the next pause, or to the end. Raises what the run raised."""
        self._resume.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the run, wherever it is."""
        self._stopped = True
        self._resume.release()
        self.join()


@dataclass
class Lockstep:
    """The runs of a model.

    Args:
        model: the model; it is the same after the runs as before.
        names: of the modules to wait at.

    Attributes:
        weights: by module name, a function that gives the tensors to compute with in the place of the module's
            parameters, by their names. Who iterates fills it.
    """

    model: nn.Module
    names: Sequence[str]
    weights: dict[str, Callable[[], Mapping[str, torch.Tensor]]] = field(default_factory=dict)

    def stages(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[tuple[str, list[Call]]]:
        """Run the model on all batches, and yield each module with the calls that wait there.

        `weights[name]` must be filled before the iterator goes on. A module is yielded once: later calls, as of
        modules that a model uses several times, are made with the new weights at once.
        """
        place = {name: k for k, name in enumerate(self.names)}
        runs = [_Run(self.model, batch) for batch in batches]
        wrapped = {name: self._wrap(name) for name in self.names}
        try:
            for run in runs:
                run.start()
                run.proceed()
            while any(not run.finished for run in runs):
                name = min((run.at for run in runs if run.at is not None), key=place.__getitem__)
                waiting = [run for run in runs if run.at == name]
                yield name, [run.call for run in waiting if run.call is not None]
                for run in waiting:
                    run.proceed()
        finally:
            for run in runs:
                if run.is_alive():
                    run.stop()
            for name, before in wrapped.items():
                module = self.model.get_submodule(name)
                del module.__dict__["forward"]
                if before is not None:
                    module.__dict__["forward"] = before

    def _wrap(self, name: str) -> Any:
        """Have a module wait before it computes. Returns the `forward` that it had of its own, or None."""
        module = self.model.get_submodule(name)
        own, original = module.__dict__.get("forward"), module.forward

        def forward(*args, **kwargs):
            run = threading.current_thread()
            if not isinstance(run, _Run):
                return original(*args, **kwargs)
            if name not in self.weights:
                run.pause(name, Call(args, kwargs))
            tensors = self.weights[name]()
            kept = {key: module._parameters[key] for key in tensors}
            try:
                for key, tensor in tensors.items():
                    module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
                return original(*args, **kwargs)
            finally:
                module._parameters.update(kept)

        module.__dict__["forward"] = forward
        return own
