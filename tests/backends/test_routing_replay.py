"""Recorded experts in the torch backend, against a forward of one token and expert at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.algo.batching import PackedBatch, pack
from shared.backends.expert_layers import ExpertLayers
from shared.backends.layer_options import LayerOptions
from shared.backends.routing import NOT_RECORDED, ROUTING
from shared.backends.routing_replay import ROWS, RoutingReplay
from shared.backends.torch_backend import TorchBackend
from tests.distributed.models import (
    EXPERTS,
    PER_TOKEN,
    VOCAB,
    ExpertByExpert,
    random_experts,
    write_model,
)

LAYERS = 3
LENGTHS = (23, 9, 31, 2)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "moe", "qwen3_moe", 1, layers=LAYERS)


@pytest.fixture
def backend(path: Path) -> TorchBackend:
    return opened(path)


def opened(path: Path, dtype=torch.float64, **options) -> TorchBackend:
    backend = TorchBackend(dtype, options=LayerOptions(**options))
    backend.load_hf(path)
    return backend


@pytest.fixture
def ids() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCAB, n) for n in LENGTHS]


def at_random(seed: int = 0, lengths=LENGTHS) -> list[np.ndarray]:
    """Recorded experts of a pack's sequences."""
    rng = np.random.default_rng(seed)
    return [random_experts(rng, n, LAYERS) for n in lengths]


def own_choice(backend: TorchBackend, ids: list[np.ndarray]) -> list[np.ndarray]:
    """What the routers choose by themselves, sequences in one pack."""
    taken: list[torch.Tensor] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: taken.append(args[1].clone()))
        for layer in backend._at.model.model.layers
    ]
    backend.score(pack(ids), temperature=1.0)
    for hook in hooks:
        hook.remove()
    rows_TLK = torch.stack(taken, dim=1).to(torch.int16)
    return [rows.numpy() for rows in rows_TLK.split([len(i) for i in ids])]


def packed(ids: list[np.ndarray], rows: list[np.ndarray]) -> PackedBatch:
    return pack(ids, {ROUTING: rows})


def plainly(path: Path, ids: list[np.ndarray], rows: list[np.ndarray]):
    """Log-probs of every sequence on its own, and the model that made them, in float64."""
    from transformers import AutoModelForCausalLM

    from shared.backends.hf_model import widen_norms

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    widen_norms(model)
    experts, found = ExpertByExpert(model), []
    for tokens, rows_TLK in zip(ids, rows, strict=True):
        experts.rows_TLK = rows_TLK
        ids_T = torch.as_tensor(tokens)
        logp = torch.log_softmax(model(input_ids=ids_T[None]).logits[0], -1)
        found += [logp.new_zeros(1), logp[:-1].gather(1, ids_T[1:, None])[:, 0]]
    return torch.cat(found), model


def test_a_model_says_what_rows_it_takes(backend: TorchBackend, backend32: TorchBackend):
    assert backend.expert_layers == ExpertLayers(LAYERS, PER_TOKEN, EXPERTS)
    assert backend32.expert_layers is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_its_own_choice_replayed_is_the_same_bits_and_gradient(path: Path, ids, dtype):
    backend = opened(path, dtype)
    own = own_choice(backend, ids)
    nothing = [np.full_like(rows, NOT_RECORDED) for rows in own]
    want, gradients = scored_and_trained(backend, pack(ids))
    for rows in (own, nothing):
        got, again = scored_and_trained(backend, packed(ids, rows))
        assert torch.equal(got, want)
        assert all(torch.equal(again[name], gradients[name]) for name in gradients)


def scored_and_trained(backend: TorchBackend, batch: PackedBatch):
    """Log-probs, and the gradient of their sum."""
    scores = backend.score(batch, temperature=1.0)
    backend._at.model.zero_grad()
    backend.forward_backward(
        batch,
        lambda output, _: output.logprobs_T.sum(),
        temperature=1.0,
        with_entropy=False,
    )
    named = backend._at.model.named_parameters()
    return scores, {name: parameter.grad.clone() for name, parameter in named}


def test_other_experts_are_taken_as_one_expert_after_the_other_would(
    path: Path, backend: TorchBackend, ids
):
    rows = at_random()
    rows[0][3:7] = NOT_RECORDED
    rows[2][:, 1] = NOT_RECORDED
    got = backend.score(packed(ids, rows), temperature=1.0)
    want, _ = plainly(path, ids, rows)
    # a router's softmax is float32: what is left of 1e-15 in its logits is 1e-7 in its weights
    assert (got - want).abs().max() < 1e-6
    assert (got - backend.score(pack(ids), temperature=1.0)).abs().max() > 0.1


@pytest.mark.parametrize("change", ["shifted by a token", "of the next layer"])
def test_rows_of_another_token_or_layer_would_be_seen(
    path: Path, backend: TorchBackend, ids, change: str
):
    """The limit of the test before is far below what a replay that errs would make."""
    rows = at_random()
    axis = 0 if change == "shifted by a token" else 1
    got = backend.score(packed(ids, [np.roll(r, 1, axis) for r in rows]), temperature=1.0)
    assert (got - plainly(path, ids, rows)[0]).abs().max() > 0.1


def test_gradients_are_those_of_the_weights_of_the_experts_taken(
    path: Path, backend: TorchBackend, ids
):
    rows = at_random()
    rows[1][2:5] = NOT_RECORDED
    _, got = scored_and_trained(backend, packed(ids, rows))
    logprobs_T, plain = plainly(path, ids, rows)
    logprobs_T.sum().backward()
    want = {name: parameter.grad for name, parameter in plain.named_parameters()}
    routers = [name for name in want if name.endswith("mlp.gate.weight")]
    assert len(routers) == LAYERS
    assert all(want[name].abs().max() > 0.01 for name in routers)
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() < 1e-5 * max(1.0, gradient.abs().max()), name


def test_sequences_of_a_pack_keep_their_own_experts(backend: TorchBackend, ids):
    one, other = at_random(1), at_random(2)
    both = packed([ids[0], ids[0]], [one[0], other[0]])
    first, second = both.split(backend.score(both, temperature=1.0))
    alone = [
        backend.score(packed([ids[0]], [rows]), temperature=1.0) for rows in (one[0], other[0])
    ]
    assert (first - alone[0]).abs().max() < 1e-6
    assert (second - alone[1]).abs().max() < 1e-6
    assert (first - second).abs().max() > 0.1


def test_a_batch_without_rows_is_not_touched_by_the_one_before(backend: TorchBackend, ids):
    want = backend.score(pack(ids), temperature=1.0)
    backend.score(packed(ids, at_random()), temperature=1.0)
    assert torch.equal(backend.score(pack(ids), temperature=1.0), want)


def test_recomputed_layers_take_the_experts_of_their_own_forward(path: Path, ids):
    """Two micro-batches are forwarded before either backward pass."""
    gradients = []
    for recompute in (False, True):
        backend = opened(path, torch.float32, recompute=recompute)
        outputs = []
        for seed in (1, 2):
            backend.forward_backward(
                packed(ids, at_random(seed)),
                lambda output, _, outputs=outputs: (
                    outputs.append(output.logprobs_T.sum()) or torch.zeros(())
                ),
                temperature=1.0,
                with_entropy=False,
            )
        for total in outputs:
            total.backward()
        named = backend._at.model.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named})
    plain, recomputed = gradients
    assert plain["model.layers.0.mlp.gate.weight"].abs().max() > 0
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_wide_ids_replay_as_narrow_ones(backend: TorchBackend, ids):
    rows = at_random()
    wide = [r.astype(np.int32) for r in rows]
    assert torch.equal(
        backend.score(packed(ids, rows), temperature=1.0),
        backend.score(packed(ids, wide), temperature=1.0),
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r[:, :-1], r"routing \[65, 2, 2\] .* \[65, 3, 2\]"),
        (lambda r: r[..., :1], r"routing \[65, 3, 1\] .* \[65, 3, 2\]"),
        (lambda r: np.where(r == 3, 4, r), "expert 4, but the model has 4"),
        (lambda r: np.where(r == 3, -2, r), "expert -2, but the model has 4"),
        (lambda r: np.where(np.arange(PER_TOKEN) == 0, r[..., 1:], r), "token 0 names .* twice"),
        (lambda r: np.where(np.arange(PER_TOKEN) == 0, -1, r), "token 0 is recorded in part"),
    ],
)
def test_rows_that_no_router_of_the_model_chose_are_refused(
    backend: TorchBackend, ids, change, says: str
):
    rows = [change(r) for r in at_random()]
    with pytest.raises(ValueError, match=says) as caught:
        backend.score(packed(ids, rows), temperature=1.0)
    assert "\n" not in str(caught.value)


def test_rows_for_a_model_without_experts_are_refused(backend32: TorchBackend, ids):
    with pytest.raises(ValueError, match=r"routing \[65, 3, 2\] .* no layers that take"):
        backend32.score(packed(ids, at_random()), temperature=1.0)


def config(kind: str):
    import transformers

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": PER_TOKEN,
    }
    if kind == "Mixtral":
        return transformers.MixtralConfig(**sizes, num_local_experts=EXPERTS)
    kinds = {"Qwen2Moe": {"shared_expert_intermediate_size": 24}, "Qwen3Moe": {}, "Olmoe": {}}
    cls = getattr(transformers, kind + "Config")
    return cls(**sizes, **kinds[kind], num_experts=EXPERTS, norm_topk_prob=False)


@pytest.mark.parametrize("kind", ["Qwen2Moe", "Qwen3Moe", "Olmoe", "Mixtral"])
def test_routers_of_one_formula_are_known_whatever_they_are_called(kind: str):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config(kind))
    assert RoutingReplay(model).has == ExpertLayers(LAYERS, PER_TOKEN, EXPERTS)


def test_only_layers_with_experts_are_counted():
    from transformers import AutoModelForCausalLM

    mixed = config("Qwen3Moe")
    mixed.mlp_only_layers = [1]
    model = AutoModelForCausalLM.from_config(mixed)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    replay = RoutingReplay(model)
    assert replay.has == ExpertLayers(LAYERS - 1, PER_TOKEN, EXPERTS)
    taken: list[torch.Tensor] = []
    for number in (0, 2):
        experts = model.model.layers[number].mlp.experts
        experts.register_forward_pre_hook(lambda _, args: taken.append(args[1]))
    rows_TLK = torch.as_tensor(random_experts(np.random.default_rng(0), 7, LAYERS - 1))
    model(input_ids=torch.arange(7)[None], use_cache=False, **{ROWS: rows_TLK})
    assert torch.equal(torch.stack(taken, dim=1), rows_TLK.long())


def test_routers_of_another_formula_are_refused_only_where_rows_are_given(
    path: Path, ids, monkeypatch: pytest.MonkeyPatch
):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    def sigmoid(self, hidden):
        scores, chosen = (hidden.reshape(-1, 32) @ self.weight.T).sigmoid().topk(PER_TOKEN)
        return None, scores, chosen

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", sigmoid)
    backend = opened(path)
    assert backend.score(pack(ids), temperature=1.0).isfinite().all()
    with pytest.raises(ValueError, match="Qwen3MoeTopKRouter cannot replay recorded experts"):
        backend.score(packed(ids, at_random()), temperature=1.0)


@pytest.mark.distributed  # it compiles for half a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_take_the_experts_of_each_call(path: Path, ids):
    plain, compiled = opened(path, torch.float32), opened(path, torch.float32, compile=True)
    one, other = packed(ids, at_random(1)), packed(ids, at_random(2))
    want, gradients = scored_and_trained(plain, one)
    got, close = scored_and_trained(compiled, one)
    assert (got - want).abs().max() < 5e-5
    assert all((close[name] - gradients[name]).abs().max() < 1e-4 for name in gradients)
    for batch in (other, pack(ids)):
        want = plain.score(batch, temperature=1.0)
        assert (compiled.score(batch, temperature=1.0) - want).abs().max() < 5e-5
        assert (got - want).abs().max() > 0.1
