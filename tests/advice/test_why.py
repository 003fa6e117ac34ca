import re
from pathlib import Path

import pytest

from welltuned.advice.evidence import Grade, row, rows
from welltuned.advice.page import page
from welltuned.advice.plan import make_plan
from welltuned.advice.why import (
    UPDATES,
    Because,
    converted,
    entries,
    factors,
    filled,
    here,
    rate_table,
    to_json,
    why,
)
from welltuned.errors import InputError
from welltuned.recipe import HYPERPARAMETERS, Method, Tune, load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"


@pytest.fixture
def plan_for(model_of, data_of, machine_of):
    smollm2 = model_of("smollm2")

    def build(*sets, **options):
        recipe = load_recipe(None, {"model": "m/m", "data": "d", **options}, sets)
        return make_plan(recipe, smollm2, data_of(), machine_of())

    return build


def test_every_choice_of_every_method_has_evidence_and_a_why(plan_for):
    for method in Method:
        for tune in Tune:
            for name, choice in plan_for(method=str(method), tune=str(tune)).choices.items():
                assert choice.evidence and all(row(id) for id in choice.evidence), (method, tune, name)
                assert len(why(name, method, tune)) == 1, f"why.yaml: {name} for {method} with {tune}"


def test_every_hyperparameter_has_a_why_and_nothing_else_has():
    assert set(entries()) == set(HYPERPARAMETERS)


def test_words_are_whole_and_rows_exist():
    for key, found in entries().items():
        assert found, key
        for entry in found:
            assert entry.evidence and set(entry.lead) <= set(entry.evidence), key
            for text in (entry.short, entry.rule, entry.settle, *(against.says for against in entry.against)):
                assert text and not re.search(r"[{}]|\.$", text.removesuffix(".")), (key, text)
            assert all(against.because and against.row.id in rows() for against in entry.against)


def test_every_reason_for_a_disagreement_is_used():
    used = {reason for found in entries().values() for entry in found for a in entry.against for reason in a.because}
    assert used == set(Because)


def test_settings_are_those_of_the_rows():
    """alpha times rate, where the row has it as one number, is what the setting makes of it."""
    checked = 0
    for found in entries().values():
        for against in (a for entry in found for a in entry.against if a.at is not None):
            if against.at.tune is Tune.FULL or not re.fullmatch(r"\d[\d.]*(e-\d+)?", against.row.alpha_x_lr):
                continue
            checked += 1
            product = float(against.row.alpha_x_lr)
            assert product == pytest.approx(against.at.rates[-1] * against.at.run.alpha_equivalent, rel=0.1), against
    assert checked >= 8


def test_a_published_rate_is_judged_in_its_own_setting():
    lora, full = why("learning_rate", Method.SFT)
    found = {against.row.id: converted(lora, against) for against in lora.against}
    assert found["E116"].off < 0.2 and "times below that range" in found["E116"].sentence()
    assert found["P017"].agrees and found["P017"].sentence().endswith("they agree")
    assert found["E092"] is None
    in_full = {against.row.id: converted(full, against) for against in full.against}
    assert in_full["E120"].off > 2 and in_full["E120"].sentence().startswith("in full, 8B")
    dpo = why("learning_rate", Method.DPO)[0]
    assert converted(dpo, next(a for a in dpo.against if a.row.id == "P019")).off > 1


def test_practice_without_data_is_called_folklore():
    for id in ("P017", "P018", "P019", "P021", "P022"):
        assert row(id).grades == {Grade.FOLKLORE}
        assert any(a.row.id == id for entry in entries()["learning_rate"] for a in entry.against), id


def test_short_small_runs_and_long_large_ones():
    """Small models get far more than 2e-4; long runs of 8B and 70B stay near the sweep's optima."""
    table = {line.size: line for line in rate_table()}
    assert list(table) == ["135M", "1B", "8B", "70B"] and UPDATES[0] <= 40
    assert table["135M"].lora[-1] >= 2e-3 and table["1B"].lora[0] >= 6e-4
    assert 1.5e-4 <= table["8B"].lora[-1] <= 6e-4 and 1e-4 <= table["70B"].lora[-1] <= 4e-4
    for line in table.values():
        assert list(line.lora) == sorted(line.lora, reverse=True) and list(line.full) == sorted(line.full, reverse=True)
        assert all(lora > 3 * full for lora, full in zip(line.lora, line.full, strict=True))
    assert list(table["8B"].lora) < list(table["1B"].lora) < list(table["135M"].lora)


@pytest.mark.parametrize(
    ("sets", "tune"),
    [((), "lora"), (("lora_alpha=8", "use_rslora=true"), "qlora"), ((), "full"), (("max_steps=2", "r=64"), "lora")],
)
def test_the_factors_make_the_rate(plan_for, sets, tune):
    plan = plan_for(*sets, tune=tune)
    product = 1.0
    for _, factor in factors(plan):
        product *= factor
    assert here("learning_rate", plan).value == pytest.approx(product, rel=0.06)


def test_json_has_rule_rows_and_run(plan_for):
    plan = plan_for("learning_rate=1e-5")
    document = to_json(why("learning_rate", Method.SFT, Tune.LORA), plan)
    (rule,) = document["rules"]
    assert rule["numbers"]["rate_alpha"]["value"] == 32 and {"E021", "M006"} <= {found["id"] for found in rule["for"]}
    against = next(found for found in rule["against"] if found["id"] == "E059")
    assert against["because"] == ["units", "batch"] and against["converted"]["low"] < against["converted"]["high"]
    assert document["here"]["set_by"] == "user" and document["here"]["value"] == 1e-5
    assert len(document["here"]["factors"]) == 4 and len(document["table"]["rates"]) == 4
    assert to_json(why("seed"))["table"] is None


def test_numbers_in_words():
    assert filled("{lora_alpha} {epochs_range.high} {warmup_share.low%} {rate_size}") == "32 4 3 % 8B"
    assert filled("{epochs_by_rows}") == "3 below 2,000 rows, 2 below 50,000 rows, 1 above"
    assert filled("{dpo_full_rate}") == "1e-6 at 3B, 5e-7 at 8B, 2e-7 at 70B"
    assert filled("{lora_ranks}") == "8, 16, 32, 64 or 128"
    with pytest.raises(KeyError):
        filled("{no_such_rule}")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("lerning_rate",), "did you mean 'learning_rate'"),
        (("zzz",), "lists all"),
        (("model",), "yours to say"),
        (("beta", Method.SFT), "no meaning with sft; it belongs to dpo, orpo, kto, grpo"),
        (("r", Method.DPO, Tune.FULL), "no meaning with dpo full; it belongs to lora, qlora"),
    ],
)
def test_what_cannot_be_answered(asked, message):
    with pytest.raises(InputError, match=message):
        why(*asked)


def test_the_plan_makes_no_such_choice(plan_for):
    with pytest.raises(InputError, match="max_steps is not chosen"):
        here("max_steps", plan_for())


def test_the_page_is_up_to_date_and_its_links_lead_somewhere():
    text = page()
    assert PAGE.read_text(encoding="utf-8") == text, "docs/evidence.md is out of date: make docs"
    assert set(re.findall(r"\(#([EPMDS]\d+)\)", text)) <= set(re.findall(r'<a id="(\w+)">', text)) == set(rows())
    assert all(f"\n## {key}\n" in text for key in entries())
