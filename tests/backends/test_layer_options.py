import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.algo.batching import pack
from shared.backends.layer_options import LayerOptions
from shared.backends.torch_backend import TorchBackend


def gradients(path: Path, sequences, options: LayerOptions) -> tuple[torch.Tensor, dict]:
    backend = TorchBackend(options=options)
    backend.load_hf(path)
    masks = [np.arange(len(ids)) % 3 > 0 for ids in sequences]
    batch = pack(sequences, {"loss_mask": masks})
    scores = backend.score(batch, temperature=1.0)
    backend.forward_backward(
        batch,
        lambda output, _: -output.logprobs_T.sum() - output.entropy_T.sum(),
        temperature=1.0,
        with_entropy=True,
    )
    named = backend._at.model.named_parameters()
    return scores, {name: parameter.grad for name, parameter in named}


def test_recomputed_layers_give_the_same_bits_from_fewer_saved_tensors(model_dir, sequences):
    plain_scores, plain = gradients(model_dir, sequences, LayerOptions())
    recomputed: dict = {}
    saved = []
    for options in (LayerOptions(), LayerOptions(recompute=True)):
        kept: list[int] = []

        def note(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            scores, recomputed = gradients(model_dir, sequences, options)
        saved.append(sum(kept))
    assert saved[1] < 0.8 * saved[0]
    assert torch.equal(plain_scores, scores)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_stay_within_the_tolerance(model_dir, sequences):
    plain_scores, plain = gradients(model_dir, sequences, LayerOptions())
    scores, compiled = gradients(model_dir, sequences, LayerOptions(compile=True))
    assert (scores - plain_scores).abs().max() < 5e-5
    assert all((plain[n] - compiled[n]).abs().max() < 1e-4 for n in plain)
