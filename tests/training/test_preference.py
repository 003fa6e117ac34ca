"""Preference runs: what may not change the result does not change it, and every method does what it is for."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from welltuned.errors import InputError, RunError
from welltuned.training import preference_step, reference
from welltuned.training.reference import FOLDER

CUTS = {"16x1": 1, "8x2": 110, "4x4": 220, "2x8": 440, "1x16": 4_000}
SOME_CUTS = ("16x1", "4x4", "1x16")


@pytest.fixture(scope="module")
def pairs(rows):
    """Ragged answers; the rejected one is another row's."""
    out = []
    for i, row in enumerate(rows):
        asked, answer = (message["content"] for message in row["messages"])
        other = rows[(3 * i + 1) % len(rows)]["messages"][1]["content"]
        out.append({"prompt": asked, "chosen": answer, "rejected": other + " no"})
    return out


@pytest.fixture(scope="module")
def pair_file(pairs, write_rows, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)


@pytest.fixture(scope="module")
def label_file(pairs, write_rows, tmp_path_factory):
    judged = [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, p in enumerate(pairs)
    ]
    return write_rows(tmp_path_factory.mktemp("labels") / "labels.jsonl", judged)


@pytest.fixture(scope="module")
def prefer(run, pair_file, label_file):
    """A function that trains by a preference method: 4 updates of 16 pairs."""

    def prefer(method, **options):
        data = label_file if method == "kto" else pair_file
        return run(**{"method": method, "data": data, "max_steps": 4, "learning_rate": 5e-3, **options})

    return prefer


def spread(curves):
    return max((max(at) - min(at)) / abs(min(at)) for at in zip(*curves, strict=True))


def distance(a, b):
    return max(float((a[name] - b[name]).norm() / a[name].norm().clamp_min(1e-12)) for name in a)


SLOW = pytest.mark.slow
OBJECTIVES = (
    pytest.param("dpo", {}, id="sigmoid"),
    pytest.param("orpo", {}, id="orpo"),
    pytest.param("kto", {}, id="kto"),
    pytest.param("dpo", {"loss_type": "ipo"}, id="ipo", marks=SLOW),
    pytest.param("dpo", {"loss_type": "simpo"}, id="simpo", marks=SLOW),
    pytest.param("reward", {}, id="reward", marks=SLOW),
)


@pytest.mark.parametrize(("method", "options"), OBJECTIVES)
def test_cuts_give_one_curve_and_one_adapter(prefer, method, options):
    cuts = CUTS if method == "dpo" and not options else SOME_CUTS
    finished = [prefer(method, token_budget=CUTS[cut], max_steps=3, **options) for cut in cuts]
    assert spread([f.losses for f in finished]) < 1e-5
    assert finished[0].losses[-1] < finished[0].losses[0]
    assert max(distance(finished[0].adapter, f.adapter) for f in finished[1:]) < 1e-3
    held_out = [[line["eval_loss"] for line in f.evaluations] for f in finished]
    assert spread(held_out) < 1e-5
    for name in finished[0].updates[0]:
        if "/" in name:
            assert len({round(f.updates[-1][name], 3) for f in finished}) <= 2, name


def test_the_cuts_are_cuts(prefer, monkeypatch):
    """Each budget gives another number of micro-batches, and no pair is ever cut in two."""
    counts = {}
    lay = preference_step.lay

    def counted(examples, *arguments, **options):
        counts[budget] = [*counts.get(budget, []), len(examples)]
        return lay(examples, *arguments, **options)

    monkeypatch.setattr(preference_step, "lay", counted)
    for budget in CUTS.values():
        prefer("dpo", token_budget=budget, max_steps=1, eval_data=None)
    numbers = [len(found) for found in counts.values()]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 5


def test_a_mean_of_means_would_show(prefer, monkeypatch):
    """Dividing each micro-batch by its own pairs is the fault that exactness is about."""
    judge = preference_step.Dpo.__call__

    def mean_of_means(self, engine, examples, laid, ratio):
        judged = judge(self, engine, examples, laid, ratio)
        return replace(judged, loss_P=judged.loss_P / len(examples))

    whole = prefer("dpo", token_budget=4_000)
    monkeypatch.setattr(preference_step.Dpo, "__call__", mean_of_means)
    assert spread([prefer("dpo", token_budget=220).losses, whole.losses]) > 0.1


def test_dropout_does_not_depend_on_the_cut_or_on_sharing(prefer, monkeypatch):
    from welltuned.training import preference

    one, other = (prefer("dpo", lora_dropout=0.2, token_budget=budget) for budget in (1, 4_000))
    monkeypatch.setattr(preference, "shares", lambda model: False)
    apart = prefer("dpo", lora_dropout=0.2, token_budget=4_000)
    plain = prefer("dpo", token_budget=4_000)
    assert spread([one.losses, other.losses, apart.losses]) < 1e-5
    assert distance(one.adapter, apart.adapter) < 1e-3
    assert spread([one.losses, plain.losses]) > 1e-3
    assert apart.updates[0]["tokens"] > one.updates[0]["tokens"]  # the prompts are there twice


def test_recomputation_and_evaluation_change_nothing(prefer):
    plain = prefer("dpo", eval_steps=100)
    often = prefer("dpo", eval_steps=1)
    again = prefer("dpo", eval_steps=100, gradient_checkpointing=True)
    assert plain.losses == often.losses == again.losses
    assert [line["step"] for line in often.evaluations] == [0, 1, 2, 3, 4]


def test_measures_have_trls_names(prefer):
    finished = prefer("dpo")
    names = {f"rewards/{n}" for n in ("chosen", "rejected", "accuracies", "margins")} | {
        "logps/chosen",
        "logps/rejected",
    }
    first, last = finished.updates[0], finished.updates[-1]
    assert names <= first.keys()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the reference is the model as it starts
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4) and last["rewards/margins"] > 0.1
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    held_out = finished.summary["held_out"]["after"]["rewards/margins"]  # beside the update's own, not in its place
    assert last["eval_rewards/margins"] == pytest.approx(held_out) and last["rewards/margins"] != held_out
    assert finished.summary["method"] == "dpo"
    assert finished.summary["held_out"]["after"]["rewards/accuracies"] > 0.5
    kto = prefer("kto").updates[-1]
    assert {
        "kl",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    } <= kto.keys()


@pytest.mark.parametrize("tune", ["qlora", "full"])
@pytest.mark.parametrize("method", ["dpo", "reward", *(pytest.param(m, marks=SLOW) for m in ("orpo", "kto"))])
def test_every_way_of_tuning(prefer, tune, method):
    if tune == "qlora":
        pytest.importorskip("bitsandbytes")
    finished = prefer(method, tune=tune, learning_rate=5e-3 if tune == "qlora" else 5e-4, max_steps=3)
    assert finished.updates[-1]["loss"] < finished.updates[0]["loss"]
    assert (finished.path / ("model" if tune == "full" else "adapter")).is_dir()
    assert all(check["moved"] and check["finite"] for check in finished.summary["trained_tensors"])


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / FOLDER


@pytest.fixture
def asked(monkeypatch):
    """How many rows the model as it starts is asked about."""
    counts = []
    computed = reference._computed

    def counting(engine, rows, shared):
        counts.append(len(rows))
        return computed(engine, rows, shared)

    monkeypatch.setattr(reference, "_computed", counting)
    return counts


def test_the_reference_is_computed_once_for_every_adapter(prefer, cache, asked):
    """Another rank, rate, method or cut asks nothing new; other rows only for themselves."""
    first = prefer("dpo", max_steps=2)
    assert len(list(cache.iterdir())) == 1 and len(asked) == 1
    again = prefer("dpo", max_steps=2)
    assert again.losses == first.losses
    prefer("dpo", max_steps=2, r=3, learning_rate=1e-2, loss_type="ipo", token_budget=1)
    assert len(asked) == 1
    prefer("dpo", max_steps=4)
    assert len(asked) == 2 and asked[1] == 32  # the other updates' pairs
    assert len(list(cache.iterdir())) == 1
    prefer("orpo")
    prefer("dpo", loss_type="simpo")
    prefer("reward")
    assert len(asked) == 2  # these have no reference


def test_another_base_has_another_reference(prefer, cache, asked, make_model_dir):
    prefer("dpo", max_steps=1)
    prefer("dpo", max_steps=1, model=str(make_model_dir(seed=7)))
    assert len(asked) == 2 and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "damage", ["a value", "cut short", *(pytest.param(d, marks=SLOW) for d in ("no JSON", "empty"))]
)
def test_a_damaged_reference_is_not_used(prefer, cache, asked, damage):
    right = prefer("dpo", max_steps=2)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-3] ^= 0x40
    file.write_bytes(
        {"a value": bytes(changed), "cut short": whole[:-8], "no JSON": b"x" + whole, "empty": b""}[damage]
    )
    found = prefer("dpo", max_steps=2)
    assert found.losses == right.losses and len(asked) == 2
    assert any("damaged and not used" in line.get("text", "") for line in found.metrics)
    assert file.read_bytes() == whole


def test_a_wrong_reference_would_show(prefer, cache):
    """Values that were changed with their checksum are believed, and the loss is no longer ln 2."""
    import hashlib

    prefer("dpo", max_steps=1)
    [file] = cache.iterdir()
    head, _, body = file.read_bytes().partition(b"\n")
    entries = json.loads(head)["entries"]
    values = np.frombuffer(body, "<f8", entries, 8 * entries) + np.arange(entries)
    body = body[: 8 * entries] + values.tobytes()
    about = {**json.loads(head), "sha256": hashlib.sha256(body).hexdigest()}
    file.write_bytes(json.dumps(about).encode() + b"\n" + body)
    assert abs(prefer("dpo", max_steps=1).losses[0] - math.log(2)) > 0.1


def test_a_cache_that_cannot_be_written(prefer, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("WELLTUNED_CACHE", str(blocked))
    finished = prefer("dpo", max_steps=1)
    assert any("cannot be kept" in line.get("text", "") for line in finished.metrics)


def test_rows_that_changed_meanwhile_are_named():
    with pytest.raises(RunError, match="no reference log-probability is known for a:1"):
        reference.NOTHING_KNOWN._value(5, "a:1")


# ── from an earlier adapter ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def taught(run, pair_file):
    """A first step: supervised on the chosen answers."""
    return run(data=pair_file, max_steps=6, r=4, lora_alpha=8)


@pytest.mark.parametrize("folder", ["", "adapter"])
def test_two_steps(prefer, taught, folder):
    """The second step goes on from the first one's adapter, which is also its reference; the first stays as it is."""
    before = taught.adapter
    second = prefer("dpo", adapter=str(taught.path / folder))
    assert second.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(torch.equal(before[name], taught.adapter[name]) for name in before)
    assert before.keys() == second.adapter.keys()
    assert distance(before, second.adapter) > 0
    config = json.loads((second.path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    plan = (second.path / "plan.yaml").read_text()
    assert "as it is in the adapter that training goes on from" in " ".join(plan.split())
    fresh = prefer("dpo")
    assert abs(second.updates[0]["logps/chosen"] - fresh.updates[0]["logps/chosen"]) > 1  # not the base's


def test_more_supervised_steps(run, taught, pair_file):
    more = run(data=pair_file, max_steps=2, adapter=str(taught.path))
    assert more.losses[0] < 0.8 * taught.losses[0]


def test_another_start_has_another_reference(prefer, taught, cache, asked):
    prefer("dpo", max_steps=1)
    prefer("dpo", max_steps=1, adapter=str(taught.path))
    prefer("dpo", max_steps=1, adapter=str(taught.path), learning_rate=1e-3)
    assert len(asked) == 2 and len(list(cache.iterdir())) == 2


def test_an_adapter_that_is_none(prefer, taught, tmp_path, make_model_dir):
    for options, match in (
        ({"adapter": str(tmp_path)}, "there is no adapter"),
        ({"adapter": str(taught.path), "r": 8}, "r is the adapter's own .4., and cannot be 8"),
        ({"adapter": str(taught.path), "target_modules": "q_proj"}, "target_modules is the adapter's own"),
        ({"adapter": str(taught.path), "tune": "full"}, "adapter has no meaning with tune: full"),
        (
            {"adapter": str(taught.path), "model": str(make_model_dir(hidden_size=16))},
            "in the adapter and .* in the model",
        ),
    ):
        with pytest.raises(InputError, match=match):
            prefer("dpo", **options)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pairs_that_are_equal(prefer, pairs, write_rows, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", [*pairs[:20], {**pairs[20], "rejected": pairs[20]["chosen"]}])
    with pytest.raises(InputError, match="`chosen` and `rejected` are the same.*") as refused:
        prefer("dpo", data=data)
    assert refused.value.where.endswith("pairs.jsonl:21")
    kept = prefer("dpo", data=data, on_bad_row="drop", max_steps=1)
    assert kept.summary["audit"]["found"]["bad_row"]["rows"] == 1


def test_answers_that_become_equal(prefer, pairs, write_rows, tmp_path, make_model_dir, tiny_tokenizer):
    """By the template, which strips the answer."""
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'].strip()")
    options = {"model": str(make_model_dir(tokenizer=tokenizer)), "max_steps": 1}
    data = write_rows(tmp_path / "pairs.jsonl", [*pairs[:20], {**pairs[20], "rejected": pairs[20]["chosen"] + " "}])
    with pytest.raises(InputError, match="same tokens.*") as refused:
        prefer("dpo", data=data, **options)
    assert refused.value.where.endswith("pairs.jsonl:21") and "on_equal_pair to drop" in refused.value.mend
    found = prefer("dpo", data=data, on_equal_pair="drop", **options).summary["audit"]["found"]["equal_pair"]
    assert (found["rows"], found["dropped"]) == (1, 1)


def test_empty_completions(prefer, pairs, write_rows, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", [*pairs[:20], {**pairs[20], "rejected": "  "}])
    with pytest.raises(InputError, match="no answer"):
        prefer("dpo", data=data)


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind(prefer, pairs, write_rows, tmp_path, label):
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": label} for p in pairs[:20]]
    kind = "desirable" if label else "undesirable"
    with pytest.raises(InputError, match=f"training rows are labelled {kind}, and kto learns"):
        prefer("kto", data=write_rows(tmp_path / "labels.jsonl", rows))


def test_a_prompt_longer_than_the_limit(prefer, pairs, write_rows, tmp_path):
    long = {"prompt": "the red hat " * 30, "chosen": "a", "rejected": "b"}
    data = write_rows(tmp_path / "pairs.jsonl", [*pairs[:20], long])
    with pytest.raises(InputError, match="cut to max_length 80 it loses an answer, or all in which its two differ"):
        prefer("dpo", data=data, max_length=80, eval_data=data)
    found = prefer("dpo", data=data, max_length=80, eval_data=data, on_untrained="drop", max_steps=1)
    assert found.summary["audit"]["found"]["untrained"]["dropped"] >= 1


def test_answers_that_are_cut(prefer, pairs):
    cut = prefer("dpo", max_length=30, max_steps=1, on_untrained="drop")
    assert cut.summary["audit"]["cut"]["rows"] > 0
    assert cut.updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_rows_of_another_kind(prefer, data_file, pair_file, label_file):
    for method, data, match in (
        ("dpo", data_file, "the rows are messages"),
        ("kto", data_file, "the rows are messages"),
        ("reward", label_file, "the rows are kto"),
    ):
        with pytest.raises(InputError, match=match):
            prefer(method, data=data)


def test_kto_takes_pairs_apart(prefer, pair_file, pairs):
    finished = prefer("kto", data=pair_file, max_steps=2)
    assert finished.summary["mixture"]["rows"] == [2 * 72]
    assert any("rejected ones as undesirable" in line.get("text", "") for line in finished.metrics)


def test_settings_that_mean_nothing(prefer):
    for method, options, match in (
        ("dpo", {"beta": 0.0}, "beta of 0 leaves dpo nothing to learn"),
        ("kto", {"effective_batch_size": 1}, "an update of one row has none"),
        ("orpo", {"loss_type": "ipo"}, "loss_type is not read by method orpo"),
    ):
        with pytest.raises(InputError, match=match):
            prefer(method, **options)


def test_a_loss_that_is_not_finite_names_its_rows(prefer, monkeypatch):
    def broken(self, engine, examples, laid, ratio):
        judged = judge(self, engine, examples, laid, ratio)
        return replace(judged, loss_P=judged.loss_P * torch.where(torch.arange(len(examples)) == 0, torch.nan, 1.0))

    judge = preference_step.Dpo.__call__
    monkeypatch.setattr(preference_step.Dpo, "__call__", broken)
    with pytest.raises(RunError, match=r"not finite in .*pairs.jsonl:\d+"):
        prefer("dpo", token_budget=4_000)
