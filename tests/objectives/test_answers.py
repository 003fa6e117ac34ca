"""How pairs lie in a micro-batch: the shared prompt gives what two sequences give, in values and gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from welltuned.data.fork import Fork
from welltuned.data.pairs import joined, mismatched, sequences
from welltuned.data.render import Example, shortened
from welltuned.models.packed import packed_model, shares
from welltuned.objectives.answers import answer_logps, laid_length, lay, token_logps


def by_hand(engine, row):
    """Summed log-probability of a sequence's trained tokens by transformers' own forward."""
    engine.model.set_attn_implementation("sdpa")
    ids = torch.from_numpy(row.ids.astype(np.int64))
    logits = engine.model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
    engine.model.set_attn_implementation("welltuned_packed")
    logp = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logp[torch.from_numpy(row.mask[1:])].sum()


def test_a_pair_is_its_two_sequences(pairs):
    draw = np.random.default_rng(5)
    prompt = draw.integers(1, 60, 6)
    made = [Example(np.concatenate([prompt, [7, n, 9]]).astype(np.int32), np.arange(9) >= 6, "a:1") for n in (1, 2)]
    pair = joined(*made)
    assert pair.fork == Fork(6, 9) and len(pair.ids) == 12
    for back, whole in zip(sequences(pair), made, strict=True):
        assert back.ids.tolist() == whole.ids.tolist() and back.mask.tolist() == whole.mask.tolist()


def test_only_the_prompt_is_shared():
    """What is trained belongs to both answers, also where they begin alike."""
    chosen, rejected = (Example(np.array([1, 2, 5, n], np.int32), np.arange(4) >= 2, "a:1") for n in (3, 4))
    assert joined(chosen, rejected).fork == Fork(2, 4)


def test_prompts_that_differ_are_found_and_share_what_they_can():
    chosen = Example(np.array([1, 2, 5, 9], np.int32), np.arange(4) >= 3, "a:1")
    rejected = Example(np.array([1, 3, 5, 8], np.int32), np.arange(4) >= 3, "a:1")
    pair = joined(chosen, rejected)
    assert pair.fork == Fork(1, 4) and pair.found == {"prompt_differs"}
    assert [s.ids.tolist() for s in sequences(pair)] == [[1, 2, 5, 9], [1, 3, 5, 8]]
    nothing = joined(replace(chosen, ids=np.array([4, 2, 5, 9], np.int32)), rejected)
    assert nothing.fork == Fork(0, 4)
    assert joined(chosen, chosen).found == {"equal_pair"}


def test_cutting_cuts_each_sequence(pairs):
    for pair in pairs:
        whole = sequences(pair)
        for limit in range(pair.fork.shared + 1, len(pair.ids)):
            cut = shortened(pair, limit)
            assert [s.ids.tolist() for s in sequences(cut)] == [s.ids[:limit].tolist() for s in whole]
            assert [s.mask.tolist() for s in sequences(cut)] == [s.mask[:limit].tolist() for s in whole]
            assert cut.cut == any(len(s.ids) > limit for s in whole)


def test_mismatched_answers(judged):
    made = mismatched(judged[0], judged[1])
    assert made.ids.tolist() == [*judged[0].ids[:7], *judged[1].ids[3:]]
    assert made.mask.tolist() == [False] * 7 + [True] * 6


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_log_probabilities_are_the_models(make_engine, pairs, kind):
    """Shared where the model can, else apart, and one by one where it cannot be packed at all."""
    engine = make_engine(kind=kind) if kind == "llama" else make_engine(kind=kind, moved=0.02)
    with torch.no_grad(), packed_model(engine.model):
        engine.trained.no_dropout()
        for shared in {shares(engine.model), False}:
            laid = lay(pairs, shared=shared)
            assert sum(laid.packed.lengths) == sum(laid_length(p, shared) for p in pairs)
            found = answer_logps(token_logps(engine.model, engine.head, laid), laid)
            if kind == "llama":
                expected = torch.stack([by_hand(engine, s) for p in pairs for s in sequences(p)])
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert found.shape == (12,) and bool((found < 0).all())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_shared_prompt_gives_the_gradients_of_two(make_engine, pairs, dropout):
    """With dropout too: the prompt of a pair has the same masks wherever it stands."""
    engine = make_engine(dropout=dropout)
    grads, values = [], []
    with packed_model(engine.model):
        for shared in (True, False):
            engine.trained.grad_KP.zero_()
            laid = lay(pairs, [11, 22, 33, 44, 55, 66], shared=shared)
            engine.trained.use_rows(None, laid.spans)
            logps = answer_logps(token_logps(engine.model, engine.head, laid), laid)
            (logps * torch.linspace(-1, 2, 12, dtype=torch.float64)).sum().backward()
            grads.append(engine.trained.grad_KP.clone())
            values.append(logps.detach())
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 1e-5
    if dropout:
        with packed_model(engine.model), torch.no_grad():
            engine.trained.no_dropout()
            plain = answer_logps(
                token_logps(engine.model, engine.head, lay(pairs, shared=True)), lay(pairs, shared=True)
            )
        assert float((plain - values[0]).abs().max()) > 1e-2  # and it does something


def test_a_pair_that_saw_its_other_answer_would_show(make_engine, pairs):
    """Were the rejected answer to attend to the chosen one, its log-probability would be another."""
    engine = make_engine()
    with torch.no_grad(), packed_model(engine.model):
        engine.trained.no_dropout()
        laid = lay(pairs, shared=True)
        right = answer_logps(token_logps(engine.model, engine.head, laid), laid)
        wrong = replace(laid, packed=replace(laid.packed, branches=None))
        other = answer_logps(token_logps(engine.model, engine.head, wrong), wrong)
    assert float((right - other)[1::2].abs().max()) > 0.1
    torch.testing.assert_close(right[::2], other[::2], rtol=1e-5, atol=1e-5)
