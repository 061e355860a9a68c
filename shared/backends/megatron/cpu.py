"""megatron-core without CUDA: the whole adaptation, and nothing where CUDA exists.

megatron-core names CUDA devices, streams and tensor types outright. On a machine without CUDA its
modules get, in place of the name `torch`, a view of torch whose CUDA entry points resolve to the
CPU. torch itself is touched only while megatron-core is imported or builds a model: everybody else
keeps the real one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

HAVE_CUDA = torch.cuda.is_available()

_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


@contextmanager
def importing() -> Generator[None]:
    """Import megatron-core in here: on CPUs its small functions stay uncompiled, it says less."""
    if HAVE_CUDA:
        yield
        return
    with _replaced(torch, "compile", _as_it_is), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TransformerEngine and Apex are absent is known
        yield


def adapt() -> None:
    """Give every loaded megatron-core module the view; call again after further imports."""
    if HAVE_CUDA:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = _VIEW
        if name == "megatron.core.tensor_parallel.random":
            vars(module)["_get_cuda_rng_state"] = _get_state
            vars(module)["_set_cuda_rng_state"] = _set_state
        if name == "megatron.core.transformer.moe.moe_utils":
            # 0.16.1 reads the name even where TransformerEngine is absent
            vars(module).setdefault("te_general_gemm", None)
        if name == "megatron.core.transformer.moe.token_dispatcher":
            vars(module)["maybe_move_tensor_to_cpu"] = _as_numpy


@contextmanager
def building() -> Generator[None]:
    """Build a model in here: on CPUs a tensor that is sent to CUDA stays where it is."""
    if HAVE_CUDA:
        yield
        return
    with _replaced(torch.Tensor, "cuda", _stay):
        yield


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Generator[None]:
    plain = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def name_types(parameters: list[torch.nn.Parameter]) -> None:
    """Let `parameter.type()` answer with the CUDA name that the distributed optimizer expects."""
    if HAVE_CUDA:
        return
    for parameter in parameters:
        parameter.__class__ = _CudaNamed


class _CudaNamed(torch.nn.Parameter):
    # an operation on it is one on a plain parameter
    __torch_function__: Any = getattr(getattr(torch, "_C"), "_disabled_torch_function_impl")  # noqa: B009

    def type(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        answer: Any = super().type(*args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer


class _Nothing:
    """A stream or event: every method does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Nothing]:
        return lambda *_, **__: _NOTHING


class _Cuda(ModuleType):
    """What megatron-core reads of `torch.cuda`."""

    FloatTensor = torch.FloatTensor
    HalfTensor = torch.HalfTensor
    BFloat16Tensor = torch.BFloat16Tensor
    Stream = _Nothing
    Event = _Nothing
    OutOfMemoryError = MemoryError

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def is_available(self) -> bool:
        return False

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 0

    def stream(self, _: Any) -> Any:
        return nullcontext()

    def current_stream(self, *_: Any) -> _Nothing:
        return _NOTHING

    default_stream = current_stream

    def synchronize(self, *_: Any) -> None: ...

    empty_cache = synchronize

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()


class _View(ModuleType):
    """torch, with CUDA devices resolved to the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _as_it_is


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Convert what a move from CUDA would have converted on the way."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _stay(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _get_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


_NOTHING = _Nothing()
_VIEW = _View("torch")
vars(_VIEW)["cuda"] = _Cuda("torch.cuda")
vars(_VIEW).update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
