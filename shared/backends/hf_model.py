"""A Hugging Face causal language model on disk and in memory, checked when it is loaded.

transformers takes seconds to import: it is imported inside the functions that need it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from shared.backends.hf_files import HfFiles
from shared.backends.hf_names import published_places
from shared.backends.packed_attention import ATTENTION_NAME, register

_BUILDING = threading.Lock()
"""One model at a time: transformers replaces functions of the process while it loads, and two
threads at once leave them replaced for good (weights are never tied again)."""


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a Hugging Face directory with packed attention, in eval mode (no dropout).

    Raises:
        ValueError: missing, unreadable, of an unknown or unsupported architecture, or with
            missing, surplus or misshapen tensors; one line.
    """
    _check_directory(path)
    register()
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        _choose_experts(config, dtype)
        with _BUILDING:
            loaded = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"model {path}: {_one_line(error)}") from error
    model, info = cast("tuple[Any, dict[str, Any]]", loaded)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"model {path}: {kind.removesuffix('_keys')} tensors for "
                f"{type(model).__name__}: {shown}"
            )
    _check_attention(model, path)
    check_names(model, path)
    model = model.to(device).eval()
    if dtype == torch.float64:
        widen_norms(model)
    return model


def load_empty(path: Path, *, dtype: torch.dtype) -> Any:
    """Build the model of a directory's config without its weights, which stay on `meta`.

    Buffers (rotary frequencies) are real. What is loaded into it tensor by tensor never exists as
    a whole on one host.

    Raises:
        ValueError: see `load_model`, its weights apart.
    """
    _check_directory(path)
    register()
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        _choose_experts(config, dtype)
        with _BUILDING, _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION_NAME
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"model {path}: {_one_line(error)}") from error
    _check_attention(model, path)
    model.tie_weights()
    return cast("Any", model.eval())


def _choose_experts(config: Any, dtype: torch.dtype) -> None:
    """Take transformers' loop over experts where its grouped product does not know the dtype."""
    if dtype == torch.float64:
        config._experts_implementation = "eager"


@contextmanager
def _parameters_on_meta() -> Generator[None]:
    """Move each parameter to `meta` as soon as a module registers it; buffers stay real."""
    plain = torch.nn.Module.register_parameter

    def register_parameter(
        self: torch.nn.Module, name: str, param: torch.nn.Parameter | None
    ) -> None:
        if param is not None and not param.is_meta:
            param = torch.nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        plain(self, name, param)

    torch.nn.Module.register_parameter = register_parameter
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = plain


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"model {path}: no such directory; point model.source at one")
    if not (path / "config.json").is_file():
        raise ValueError(f"model {path}: no config.json; it is not a Hugging Face directory")


def _check_attention(model: Any, path: Path) -> None:
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"model {path}: {type(model).__name__} does not take an attention backend of ours"
        )


def ignored_tensors(model: Any, names: Iterable[str]) -> set[str]:
    """Return which of the files' tensors the model may leave unread: tied heads, old buffers."""
    ignored = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignored -= published_places(model).keys()
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return ignored | {name for name in names if any(re.search(p, name) for p in patterns)}


def check_names(model: Any, path: Path) -> None:
    """Refuse a model whose published names are not those of its files.

    Raises:
        ValueError: transformers stores it under other names than it keeps it in memory, in a way
            that `hf_names` does not know.
    """
    unknown = sorted(published_places(model).keys() - HfFiles(path).names)
    if unknown:
        raise ValueError(
            f"model {path}: {type(model).__name__} has {unknown[0]} in memory, its files do not: "
            "its layout is not supported"
        )


def widen_norms(model: Any) -> None:
    """Make RMSNorm modules compute in float64: transformers casts them down to float32.

    Rounding to float32 inside a float64 forward amplifies layout noise of 1e-15 to 1e-7 now
    and then, which no 1e-10 comparison survives. A norm with another formula is left as it is.
    """
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not isinstance(eps, float) or weight is None:
            continue
        norm = _WideNorm(module, eps)
        probe = torch.linspace(-1, 2, weight.shape[-1], dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            agrees = torch.allclose(module(probe[None]), norm(probe[None]), rtol=1e-5, atol=1e-6)
        if agrees:
            module.forward = norm


class _WideNorm:
    """weight · x / rms(x), all in the dtype of x."""

    def __init__(self, module: Any, eps: float) -> None:
        self.module = module
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
