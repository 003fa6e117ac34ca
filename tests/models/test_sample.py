"""Completions: whose numbers they are, that they depend on their names alone, and that they end where they should."""

import numpy as np
import pytest
import torch

from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.models.sample import Sampling, complete, uniforms


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def live(request, make_model_dir):
    """(model, bank, head) with adapters that do something; gemma2 has windows and soft-capping."""
    from welltuned.models.load import load_model

    extra = {
        "llama": {},
        "gemma2": {"head_dim": 8, "sliding_window": 6},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    }[request.param]
    model = load_model(str(make_model_dir(request.param, **extra)), dtype=torch.float32)
    bank = attach(model, LoraSettings(r=4))
    fuse(model, bank)
    bank.flat_KP += 0.05 * torch.randn(bank.flat_KP.shape, generator=torch.Generator().manual_seed(0))
    return model, bank, find_head(model)


PROMPTS = [np.array(ids, np.int32) for ids in ([5, 9, 11, 40, 41, 7, 8], [60, 61, 62], [5, 9, 33, 34, 35, 36])]


def whole_logits(model, ids):
    """The model's own logits of one sequence, in one pass without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def greedy_by_hand(model, prompt, longest, stops):
    ids = prompt.tolist()
    while len(ids) < len(prompt) + longest:
        ids.append(int(whole_logits(model, ids)[-1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def test_greedy_is_the_models_own_whatever_is_beside_it(live):
    model, bank, head = live
    bank.no_dropout()
    wanted = [greedy_by_hand(model, prompt, 12, (2,)) for prompt in PROMPTS]
    stops = (wanted[0][4],)  # one that comes up
    wanted = [greedy_by_hand(model, prompt, 12, stops) for prompt in PROMPTS]
    sampling = Sampling(max_new_tokens=12, temperature=0.0, stop_ids=stops)
    for context in (packed_model(model), torch.no_grad()):  # with our attention to the cache, and with its own
        with context:
            found = complete(model, head, PROMPTS, [[0]] * 3, sampling)
        assert [group[0].ids.tolist() for group in found] == wanted
        assert [group[0].ended for group in found] == [ids[-1] in stops for ids in wanted]


def test_completions_depend_on_their_names_alone(live):
    model, bank, head = live
    bank.no_dropout()
    sampling = Sampling(max_new_tokens=10, temperature=1.3, stop_ids=(2,))
    names = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with packed_model(model):
        together = complete(model, head, PROMPTS, names, sampling)
        again = complete(model, head, PROMPTS, names, sampling)
        alone = [complete(model, head, [p], [n], sampling)[0] for p, n in zip(PROMPTS, names, strict=True)]
        few = complete(model, head, PROMPTS, names, Sampling(**{**asdict(sampling), "tokens_at_once": 40}))
        other = complete(model, head, PROMPTS, [[n + 100 for n in group] for group in names], sampling)
    ids = [[c.ids.tolist() for c in group] for group in together]
    for same in (again, alone, few):
        assert [[c.ids.tolist() for c in group] for group in same] == ids
    assert [[c.ids.tolist() for c in group] for group in other] != ids
    assert len({tuple(c) for group in ids for c in group}) > 3


def asdict(sampling):
    return {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}


@torch.no_grad()
def test_every_token_is_drawn_by_its_own_number(live):
    """The inverse of the summed probabilities at the named uniform number, from logits of a pass without a cache."""
    model, bank, head = live
    bank.no_dropout()
    sampling = Sampling(max_new_tokens=8, temperature=0.7, top_p=0.8, stop_ids=(2,))
    with packed_model(model):
        [[found]] = complete(model, head, PROMPTS[:1], [[42]], sampling)
    ids, entropy = PROMPTS[0].tolist(), 0.0  # from here on with the model's own attention
    for t, token in enumerate(found.ids.tolist()):
        p = (whole_logits(model, ids)[-1].double() / 0.7).softmax(-1)
        entropy -= float((p * p.log()).sum())
        order = p.argsort(descending=True)
        nucleus = p[order]
        nucleus = nucleus[: int((nucleus.cumsum(0) < 0.8).sum()) + 1]
        at = int(torch.searchsorted(nucleus.cumsum(0), float(uniforms(42, 8)[t]) * nucleus.sum(), right=True))
        assert int(order[at]) == token
        ids.append(token)
    assert found.entropy == pytest.approx(entropy, rel=1e-4)


def test_frequencies_are_the_probabilities(live):
    model, bank, head = live
    bank.no_dropout()
    count = 4000
    sampling = Sampling(max_new_tokens=1, tokens_at_once=10**6)
    with packed_model(model):
        [group] = complete(model, head, PROMPTS[:1], [list(range(count))], sampling)
    with torch.no_grad():
        p = whole_logits(model, PROMPTS[0].tolist())[-1].double().softmax(-1)
    seen = torch.bincount(torch.tensor([int(c.ids[0]) for c in group]), minlength=len(p)) / count
    assert (seen - p).abs().max() < 4 * (0.25 / count) ** 0.5


def test_sampling_follows_the_weights_at_once(live):
    """Stale weights: after a change of the adapter the next completions are the changed model's."""
    model, bank, head = live
    bank.no_dropout()
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    with packed_model(model):
        before = complete(model, head, PROMPTS, [[0]] * 3, sampling)
        bank.flat_KP *= 3.0
        after = complete(model, head, PROMPTS, [[0]] * 3, sampling)
    wanted = [greedy_by_hand(model, prompt, 8, ()) for prompt in PROMPTS]
    bank.flat_KP /= 3.0
    assert [g[0].ids.tolist() for g in after] == wanted
    assert [g[0].ids.tolist() for g in before] != wanted
