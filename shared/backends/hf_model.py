"""A Hugging Face causal language model on disk and in memory, checked when it is loaded.

transformers takes seconds to import: it is imported inside the functions that need it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch

from shared.backends.packed_attention import ATTENTION_NAME, register

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a Hugging Face directory with packed attention, in eval mode (no dropout).

    Raises:
        ValueError: missing, unreadable, of an unknown or unsupported architecture, or with
            missing, surplus or misshapen tensors; one line.
    """
    if not path.is_dir():
        raise ValueError(f"model {path}: no such directory; point model.source at one")
    if not (path / "config.json").is_file():
        raise ValueError(f"model {path}: no config.json; it is not a Hugging Face directory")
    register()
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
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
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"model {path}: {type(model).__name__} does not take an attention backend of ours"
        )
    model = model.to(device).eval()
    if dtype == torch.float64:
        widen_norms(model)
    return model


def export_model(model: Any, source: Path, path: Path) -> None:
    """Write a Hugging Face directory: weights and config, plus the source's other files.

    Complete or absent: written beside `path`, then renamed.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary, safe_serialization=True)
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name == "config.json":
            continue
        if not file.name.endswith(WEIGHT_SUFFIXES) and not (temporary / file.name).exists():
            shutil.copyfile(file, temporary / file.name)
    _keep_source_config(source / "config.json", temporary / "config.json")
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


def _keep_source_config(source: Path, exported: Path) -> None:
    """Lay the source's config over the exported one: only the dtype may have changed."""
    theirs, ours = json.loads(source.read_text()), json.loads(exported.read_text())
    for key in ("dtype", "torch_dtype"):
        theirs.pop(key, None)
    exported.write_text(json.dumps({**ours, **theirs}, indent=2, sort_keys=True) + "\n")


def published_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name, detached views, tied ones once.

    Of tied parameters the first name in the model's order stays. Buffers that are not
    persistent (rotary frequencies) are functions of the config and not published.
    """
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=True))
    every: dict[str, torch.nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in every}
    return {name: tensor.detach() for name, tensor in (parameters | buffers).items()}


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
