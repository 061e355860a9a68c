import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.algo.batching import PackedBatch, pack
from shared.backends.adamw import AdamWSettings
from shared.backends.base import Backend, ForwardOutput
from shared.backends.torch_backend import TorchBackend


def clone(backend: TorchBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.state().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def nll(output: ForwardOutput, batch: PackedBatch) -> torch.Tensor:
    return -output.logprobs_T.sum() / batch.num_tokens


def train(backend: TorchBackend, batch: PackedBatch, steps: int, lr: float = 1e-3) -> None:
    for _ in range(steps):
        backend.forward_backward(batch, nll, temperature=1.0, with_entropy=False)
        backend.step(lr, max_grad_norm=1.0)


def plain_hf(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")


def hf_logprobs(model: torch.nn.Module, ids: np.ndarray, temperature: float) -> torch.Tensor:
    tokens = torch.as_tensor(ids)[None]
    logp = torch.log_softmax(model(input_ids=tokens).logits[0] / temperature, -1)
    return torch.cat([logp.new_zeros(1), logp[:-1].gather(1, tokens[0, 1:, None])[:, 0]])


def test_the_backend_satisfies_the_protocol(backend32: TorchBackend):
    backend: Backend = backend32
    assert (backend.name, backend.dtype) == ("torch", torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_scores_equal_an_independent_float64_forward(
    backend64: TorchBackend, sequences, reference, temperature: float
):
    batch = pack(sequences)
    scored = backend64.score(batch, temperature=temperature)
    want = torch.cat([reference(backend64.state(), ids, temperature) for ids in sequences])
    assert scored.dtype == torch.float64
    assert (scored - want).abs().max() < 1e-10


def test_packed_scores_equal_the_plain_hugging_face_forward(
    model_dir: Path, backend32: TorchBackend, sequences
):
    model = plain_hf(model_dir, torch.float32)
    with torch.no_grad():
        want = torch.cat([hf_logprobs(model, ids, 1.0) for ids in sequences])
    scored = backend32.score(pack(sequences), temperature=1.0)
    assert scored.dtype == torch.float32
    assert (scored - want).abs().max() < 5e-5


def test_untied_heads_are_published_and_used(tmp_path: Path, write_model, reference, sequences):
    backend = TorchBackend(torch.float64)
    backend.load_hf(write_model(tmp_path / "untied", seed=2, tied=False))
    assert "lm_head.weight" in backend.state()
    scored = backend.score(pack(sequences[:3]), temperature=1.0)
    want = torch.cat([reference(backend.state(), ids) for ids in sequences[:3]])
    assert (scored - want).abs().max() < 1e-10


@pytest.mark.parametrize(("fixture", "bound"), [("backend64", 1e-10), ("backend32", 5e-5)])
def test_packing_order_and_company_do_not_change_a_sequence(
    request: pytest.FixtureRequest, fixture: str, bound: float, sequences
):
    backend: TorchBackend = request.getfixturevalue(fixture)
    alone = [backend.score(pack([ids]), temperature=1.0) for ids in sequences]
    order = [5, 0, 7, 3, 2, 6, 1, 4]
    batch = pack([sequences[i] for i in order])
    for index, scored in zip(
        order, batch.split(backend.score(batch, temperature=1.0)), strict=True
    ):
        assert (scored - alone[index]).abs().max() <= bound


def test_the_same_layout_twice_gives_the_same_bits(backend32: TorchBackend, sequences):
    batch = pack(sequences)
    first = backend32.score(batch, temperature=1.0)
    assert torch.equal(first, backend32.score(batch, temperature=1.0))


def test_changing_one_packed_sequence_leaves_the_others_bit_identical(
    backend32: TorchBackend, sequences
):
    before = pack(sequences).split(backend32.score(pack(sequences), temperature=1.0))
    other = [ids.copy() for ids in sequences]
    other[4] = (other[4] + 1) % 37
    after = pack(other).split(backend32.score(pack(other), temperature=1.0))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True] * 4 + [False] + [True] * 3


def test_attention_of_a_pack_costs_the_sum_of_squared_lengths(
    backend32: TorchBackend, monkeypatch: pytest.MonkeyPatch
):
    pairs: list[int] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        assert options.get("attn_mask") is None
        pairs.append(query.shape[0] * query.shape[2] ** 2)
        return plain(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    costs = {}
    for count, length in ((1, 240), (4, 60), (16, 15)):
        pairs.clear()
        batch = pack([np.arange(length) % 37] * count)
        backend32.score(batch, temperature=1.0)
        costs[count] = sum(pairs)
    assert costs[1] == 2 * 240**2
    assert costs[4] == costs[1] / 4
    assert costs[16] == costs[1] / 16


def test_a_loss_mask_restricts_what_is_computed_not_what_it_is(backend64: TorchBackend, sequences):
    rng = np.random.default_rng(0)
    masks = [rng.random(len(ids)) < 0.4 for ids in sequences]
    full = backend64.score(pack(sequences), temperature=0.9)
    masked_batch = pack(sequences, {"loss_mask": masks})
    masked = backend64.score(masked_batch, temperature=0.9)
    mask = masked_batch.per_token["loss_mask"]
    assert (masked - full)[mask].abs().max() < 1e-10
    assert masked[~mask].abs().max() == 0
    assert masked[masked_batch.positions_T == 0].abs().max() == 0


def test_gradients_are_those_of_the_plain_model_also_under_a_loss_mask(
    model_dir: Path, backend64: TorchBackend, sequences
):
    rng = np.random.default_rng(1)
    masks = [rng.random(len(ids)) < 0.5 for ids in sequences]
    batch = pack(sequences, {"loss_mask": masks})
    weights = torch.randn(batch.num_tokens, dtype=torch.float64)

    def loss(output: ForwardOutput, given: PackedBatch) -> torch.Tensor:
        assert output.entropy_T is not None
        return (output.logprobs_T * weights).sum() + 0.3 * output.entropy_T.sum()

    backend64.forward_backward(batch, loss, temperature=0.8, with_entropy=True)
    model = plain_hf(model_dir, torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    at = 0
    for ids, mask in zip(sequences, masks, strict=True):
        logits = model(input_ids=torch.as_tensor(ids)[None]).logits[0] / 0.8
        logp = torch.log_softmax(logits, -1)
        for t in range(1, len(ids)):
            if mask[t]:
                entropy = -(logp[t - 1].exp() * logp[t - 1]).sum()
                total = total + logp[t - 1, ids[t]] * weights[at + t] + 0.3 * entropy
        at += len(ids)
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    ours = dict(backend64._at.model.named_parameters())
    for name, grad in grads.items():  # plain transformers norms round to float32
        torch.testing.assert_close(ours[name].grad, grad, rtol=1e-4, atol=1e-4)


def test_three_steps_equal_a_plain_loop_with_torch_adamw(model_dir: Path, sequences):
    settings = AdamWSettings(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    backend = TorchBackend(torch.float64, optimizer=settings)
    backend.load_hf(model_dir)
    batch = pack(sequences)
    model = plain_hf(model_dir, torch.float64)
    wide = [p for p in model.parameters() if p.ndim >= 2]
    thin = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": wide}, {"params": thin, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    )  # fmt: skip
    for _ in range(3):
        backend.forward_backward(batch, nll, temperature=1.0, with_entropy=False)
        norm = backend.step(1e-3, max_grad_norm=0.5)
        loss = -sum(hf_logprobs(model, ids, 1.0).sum() for ids in sequences) / batch.num_tokens
        loss.backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()
        assert norm == pytest.approx(float(plain_norm), rel=1e-5)
        assert norm > 0.5
    for name, parameter in model.named_parameters():
        difference = (backend.state()[name] - parameter.detach()).abs().max()
        assert difference < 2e-5, name  # lr x the float32 rounding inside transformers' norms


def test_gradients_accumulate_over_micro_batches(backend64: TorchBackend, sequences):
    def total(output: ForwardOutput, batch: PackedBatch) -> torch.Tensor:
        return -output.logprobs_T.sum() / 100

    before = clone(backend64)
    backend64.forward_backward(pack(sequences), total, temperature=1.0, with_entropy=False)
    whole = backend64.step(0.0, max_grad_norm=1e9)
    for part in (sequences[:3], sequences[3:]):
        backend64.forward_backward(pack(part), total, temperature=1.0, with_entropy=False)
    assert backend64.step(0.0, max_grad_norm=1e9) == pytest.approx(whole, rel=1e-10)
    assert equal(before, clone(backend64))


def test_a_non_finite_norm_skips_the_update_and_clears_gradients(
    backend32: TorchBackend, sequences
):
    batch = pack(sequences)
    before = clone(backend32)
    backend32.forward_backward(
        batch, lambda o, b: o.logprobs_T.sum() * torch.inf, temperature=1.0, with_entropy=False
    )
    assert not np.isfinite(backend32.step(1e-3, max_grad_norm=1.0))
    assert equal(before, clone(backend32))
    fresh = TorchBackend()
    fresh.load_hf(backend32._at.source)
    train(backend32, batch, 1)
    train(fresh, batch, 1)
    assert equal(clone(fresh), clone(backend32))


def test_a_batch_without_wanted_tokens_is_a_step_of_nothing(backend32: TorchBackend):
    before = clone(backend32)
    batch = pack([np.array([3]), np.array([4, 5])], {"loss_mask": [np.zeros(1), np.zeros(2)]})
    assert backend32.forward_backward(batch, nll, temperature=1.0, with_entropy=True) == 0.0
    assert backend32.step(1e-3, max_grad_norm=1.0) == 0.0
    assert equal(before, clone(backend32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_resumes_bit_for_bit(
    tmp_path: Path, model_dir: Path, sequences, dtype: torch.dtype
):
    batch = pack(sequences)
    straight = TorchBackend(dtype)
    straight.load_hf(model_dir)
    train(straight, batch, 2)
    straight.save(tmp_path / "ckpt")
    resumed = TorchBackend(dtype)
    resumed.load_hf(model_dir)
    train(resumed, pack(sequences[:2]), 1, lr=1e-2)
    resumed.load(tmp_path / "ckpt")
    assert equal(clone(straight), clone(resumed))
    train(straight, batch, 2)
    train(resumed, batch, 2)
    assert equal(clone(straight), clone(resumed))
    assert not list((tmp_path / "ckpt").glob(".*"))


def test_bfloat16_keeps_updates_that_are_below_its_spacing(model_dir: Path, sequences):
    backend = TorchBackend(torch.bfloat16)
    backend.load_hf(model_dir)
    before = clone(backend)
    train(backend, pack(sequences), 20, lr=1e-6)
    masters = backend._at.optimizer.state()
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (masters[f"master/{name}"] - before[name].float()).abs().mean()
    assert 5e-6 < moved < 5e-5


def float32_values() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum(x.numel() for x in tensors if x.dtype == torch.float32)


def test_one_that_only_scores_holds_no_masters_and_gives_the_same_bits(model_dir: Path, sequences):
    batch, held = pack(sequences), [float32_values()]
    scorer = TorchBackend(torch.bfloat16, trains=False)
    scorer.load_hf(model_dir)
    held.append(float32_values())
    trained = TorchBackend(torch.bfloat16)
    trained.load_hf(model_dir)
    held.append(float32_values())
    of_scorer, of_trained = np.diff(held)
    assert of_trained - of_scorer == trained.num_parameters
    train(trained, batch, steps=2, lr=1e-2)
    scorer.load_state(clone(trained))
    assert equal(clone(scorer), clone(trained))
    assert torch.equal(scorer.score(batch, temperature=1.0), trained.score(batch, temperature=1.0))
    with pytest.raises(ValueError, match="only scores has no optimizer"):
        scorer.step(1e-3, max_grad_norm=1.0)


def test_a_checkpoint_that_is_missing_or_of_another_model_is_refused(
    tmp_path: Path, backend32: TorchBackend
):
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        backend32.load(tmp_path / "nothing")
    backend32.save(tmp_path / "c")
    save_file({"step/other": torch.zeros(1)}, tmp_path / "c" / "optimizer.safetensors")
    with pytest.raises(ValueError, match="step/other"):
        backend32.load(tmp_path / "c")
    (tmp_path / "c" / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        backend32.load(tmp_path / "c")


def test_a_state_goes_round_bit_for_bit_and_restores_the_forward(
    backend32: TorchBackend, model_dir: Path, sequences
):
    batch = pack(sequences)
    old = clone(backend32)
    scored = backend32.score(batch, temperature=1.0)
    train(backend32, batch, 1)
    assert not torch.equal(scored, backend32.score(batch, temperature=1.0))
    backend32.load_state(old)
    assert equal(old, clone(backend32))
    assert torch.equal(scored, backend32.score(batch, temperature=1.0))
    follower = TorchBackend()
    follower.load_hf(model_dir)
    follower.load_state(clone(backend32))
    assert torch.equal(scored, follower.score(batch, temperature=1.0))


def test_models_that_threads_load_at_once_leave_transformers_as_it_was(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import PreTrainedModel

    tie_weights = PreTrainedModel.tie_weights
    monkeypatch.setattr(PreTrainedModel, "tie_weights", tie_weights)  # put back in any case

    def load() -> None:
        for _ in range(10):
            TorchBackend(torch.float32).load_hf(model_dir)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert PreTrainedModel.tie_weights is tie_weights
    assert torch.get_default_dtype() == torch.float32


def test_tied_weights_are_published_once(backend32: TorchBackend):
    names = list(backend32.state())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert not any("inv_freq" in name for name in names)


@pytest.mark.parametrize("case", ["missing", "surplus", "shape", "dtype"])
def test_a_state_that_does_not_match_is_refused_untouched(backend32: TorchBackend, case: str):
    before = clone(backend32)
    given = {name: tensor + 1 for name, tensor in before.items()}
    name = "model.norm.weight"
    if case == "missing":
        del given[name]
    elif case == "surplus":
        given["model.extra"] = torch.zeros(1)
    elif case == "shape":
        given[name] = given[name][:-1]
    else:
        given[name] = given[name].double()
    with pytest.raises(ValueError, match=r"model\.(norm\.weight|extra)"):
        backend32.load_state(given)
    assert equal(before, clone(backend32))


def test_an_export_loads_to_the_same_bits_and_carries_the_other_files(
    tmp_path: Path, backend32: TorchBackend, model_dir: Path, sequences
):
    train(backend32, pack(sequences), 1)
    target = tmp_path / "export"
    backend32.export_hf(target)
    backend32.export_hf(target)
    again = TorchBackend()
    again.load_hf(target)
    assert equal(clone(backend32), clone(again))
    assert (target / "tokenizer.json").read_text() == '{"kind": "test"}'
    source = json.loads((model_dir / "config.json").read_text())
    exported = json.loads((target / "config.json").read_text())
    assert {k: exported[k] for k in source} == source
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]


def test_token_ids_outside_the_vocabulary_are_refused(backend32: TorchBackend):
    with pytest.raises(ValueError, match="vocabulary of 37"):
        backend32.score(pack([np.array([1, 37])]), temperature=1.0)


def break_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def drop_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def add_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.surplus.weight"] = torch.zeros(2)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda p: (p / "config.json").unlink(), r"no config\.json"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json"),
        (lambda p: break_config(p, model_type="martian"), "martian"),
        (lambda p: break_config(p, hidden_size=40), "mismatch|size"),
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"x"), "."),
        (drop_tensor, r"missing tensors .* model\.norm\.weight"),
        (add_tensor, r"unexpected tensors .* model\.layers\.0\.surplus\.weight"),
    ],
)
def test_a_directory_that_is_no_model_is_refused_in_one_line(
    tmp_path: Path, write_model, damage: Callable[[Path], object], names: str
):
    path = write_model(tmp_path / "m")
    damage(path)
    backend = TorchBackend()
    with pytest.raises(ValueError, match=names) as caught:
        backend.load_hf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match="load_hf first"):
        backend.state()


def test_a_missing_directory_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no such directory"):
        TorchBackend().load_hf(tmp_path / "absent")


def test_importing_the_backend_does_not_import_transformers():
    import subprocess
    import sys

    code = (
        "import sys, shared.backends.torch_backend, shared.algo.policy_loss;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
