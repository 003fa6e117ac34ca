"""What each method chooses by itself, on pairs, marks, prompts and plain texts; and what is kept of a run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from welltuned.advice.learning_rate import RateSetting
from welltuned.advice.plan import make_plan, plan_from_yaml, plan_to_yaml
from welltuned.advice.preference import kto_weights
from welltuned.advice.rate import choose_rate, moves_nothing
from welltuned.advice.safekeeping import Course, choose_patience, choose_save_steps, detectable, save_seconds
from welltuned.advice.settle import bytes_words, counted, passes_words, size_words, span_words
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.facts.adapter import read_adapter_facts
from welltuned.facts.data import dataset_facts, pair_facts, prompt_facts
from welltuned.recipe import Method, Tune, load_recipe

LORA = RateSetting(family="llama", parameters=8 * 10**9, batch=32, updates=460, r=16, alpha=32)


def pairs(count=1000, prompt=100, chosen=200, rejected=120):
    ones = np.ones(count, int)
    parts = prompt * ones, chosen * ones, rejected * ones
    return pair_facts(*parts, *(part[:50] for part in parts), "preference")


def prompts(count=1000, answers=None, prompt=100):
    return prompt_facts(np.full(count, prompt), np.full(50, prompt), "prompt", answers)


@pytest.fixture
def plan_for(model_of, data_of, machine_of):
    def build(*sets, data=None, shape="smollm2", machine=None, model=None, **options):
        recipe = load_recipe(None, {"model": "m/m", "data": "d", **options}, sets)
        return make_plan(recipe, model or model_of(shape), data or data_of(), machine or machine_of())

    return build


# ── facts ──


def test_facts_of_pairs():
    facts = pairs()
    assert facts.rows == 1000 and facts.sequences_per_row == 2 and facts.heldout_rows == 50
    assert facts.tokens == 1000 * (300 + 220) and facts.supervised_tokens == 1000 * 320
    assert facts.length_max == 300 and facts.length_mean == 260
    assert (facts.prompts.median, facts.chosen.p95, facts.rejected.max) == (100, 200, 120)


def test_facts_of_prompts():
    facts = prompts(answers=np.arange(1, 101))
    assert facts.supervised_tokens == 0 and facts.tokens == 100_000 and facts.length_max == 100
    assert facts.answers.p99 in (99, 100) and prompts().answers is None


def test_facts_of_marked_rows():
    facts = dataset_facts([9, 9, 9, 9], [3] * 4, [9], [3], "label", desirable=[True, False, False, False])
    assert facts.desirable_share == 0.25


def test_very_short_and_very_long_rows_are_counted():
    facts = dataset_facts([20] * 98 + [400, 9], [5] * 99 + [2], [20], [5], "messages")
    assert (facts.very_short_rows, facts.very_long_rows) == (1, 1)


# ── preferences ──


def test_dpo_rates_are_the_bands_at_the_recipes_length_and_higher_in_short_runs():
    long = choose_rate(Method.DPO, Tune.LORA, LORA, 1)
    assert long.value == 1e-5 and "yours are no fewer" in long.reason
    short = choose_rate(Method.DPO, Tune.LORA, replace(LORA, updates=115), 1)
    assert short.value == 2e-5 and "×2 for your 115" in short.reason and "beta leaves it as it is" in short.reason
    assert "beta" not in choose_rate(Method.ORPO, Tune.LORA, replace(LORA, updates=115), 1).reason
    tiny = choose_rate(Method.DPO, Tune.LORA, replace(LORA, updates=5), 1)
    assert tiny.value == tiny.high == 3e-5 and "as far as their band reaches" in tiny.reason
    full = choose_rate(Method.DPO, Tune.FULL, LORA, 1)
    assert full.value == 5e-7 and choose_rate(Method.REWARD, Tune.FULL, LORA, 1).value == 1e-5
    assert choose_rate(Method.REWARD, Tune.LORA, LORA, 1).value == 5e-5


def test_a_run_that_moves_nothing_is_warned_of(plan_for):
    """The published failure is warned of, the published successes are not (evidence E043, E046, E047)."""
    tinker = replace(LORA, r=32, updates=50)
    assert "ln 2" in moves_nothing(Method.DPO, Tune.LORA, tinker, 1e-5, 0.1)
    qlora = replace(LORA, r=128, alpha=128.0, updates=461)
    assert moves_nothing(Method.DPO, Tune.QLORA, qlora, 5e-6, 0.01) is None
    assert moves_nothing(Method.DPO, Tune.FULL, replace(LORA, updates=461), 5e-7, 0.01) is None
    assert moves_nothing(Method.SFT, Tune.LORA, tinker, 1e-9, 0.1) is None
    still = plan_for("learning_rate=1e-6", method="dpo", data=pairs())
    assert any("will hardly move the model" in text for text in still.warnings)
    assert not any("hardly move" in text for text in plan_for(method="dpo", data=pairs(60_000)).warnings)


@pytest.mark.parametrize(
    ("form", "beta", "also"),
    [
        ("sigmoid", 0.1, {"label_smoothing": 0.0}),
        ("robust", 0.1, {"label_smoothing": 0.1}),
        ("ipo", 0.1, {}),
        ("sigmoid_norm", 5.0, {}),
        ("simpo", 2.0, {"simpo_gamma": 1.0}),
    ],
)
def test_forms_of_dpo(plan_for, form, beta, also):
    plan = plan_for(f"loss_type={form}", method="dpo", data=pairs())
    found = {name: plan.value(name) for name in ("label_smoothing", "simpo_gamma") if name in plan.choices}
    assert plan.value("beta") == beta and found == also
    assert "200 tokens, rejected of 120" in plan.choices["loss_type"].reason


def test_a_pair_is_two_sequences(plan_for):
    plan = plan_for(method="dpo", data=pairs())
    assert plan.time.tokens == plan.value("num_train_epochs") * 520_000
    assert plan.value("max_length") == 304 and "1,000 pairs" in plan.choices["max_length"].reason
    budget = plan.value("token_budget")
    assert plan.value("per_device_train_batch_size") * 2 * 300 <= budget
    reference = plan_for(method="orpo", data=pairs())  # the same work but for the reference
    assert plan.time.flops_per_token > reference.time.flops_per_token


@pytest.mark.parametrize(
    ("share", "weights"), [(None, (1, 1)), (0.5, (1, 1)), (0.55, (1, 1)), (0.2, (4, 1)), (0.8, (1, 4)), (1.0, (1, 1))]
)
def test_kto_weights_make_both_kinds_count_alike(share, weights):
    good, bad = kto_weights(share)
    assert (good, bad) == pytest.approx(weights)
    if share is not None and 0 < share < 1:
        assert 1 <= good * share / (bad * (1 - share)) <= 1.34


def test_kto_says_the_shares(plan_for, data_of):
    plan = plan_for(method="kto", data=replace(data_of(), desirable_share=0.25))
    assert plan.value("desirable_weight") == 3.0 and "25% of your 340 rows are desirable" in (
        plan.choices["desirable_weight"].reason
    )
    assert plan.value("effective_batch_size") >= 8


# ── reinforcement ──


def test_groups_divide_the_batch(plan_for):
    plan = plan_for(method="grpo", data=prompts())
    group, batch = plan.value("num_generations"), plan.value("effective_batch_size")
    assert (group, batch) == (8, 64) and plan.updates == 3 * 125
    assert plan_for("effective_batch_size=12", method="grpo", data=prompts()).value("num_generations") == 6
    assert plan_for("num_generations=5", method="grpo", data=prompts()).value("effective_batch_size") == 40
    twice = plan_for("num_iterations=2", method="grpo", data=prompts())
    assert twice.updates == 2 * plan.updates
    with pytest.raises(InputError, match="12 answers is no whole number of groups of 8"):
        plan_for("effective_batch_size=12", "num_generations=8", method="grpo", data=prompts())


def test_answers_may_be_as_long_as_those_of_the_rows_and_more(plan_for):
    known = plan_for(method="grpo", data=prompts(answers=np.full(1000, 150)))
    assert known.value("max_completion_length") == 320 and "150 tokens" in known.choices["max_completion_length"].reason
    assert plan_for(method="grpo", data=prompts()).value("max_completion_length") == 512
    near_the_end = plan_for(method="grpo", data=prompts(prompt=8000))
    assert near_the_end.value("max_completion_length") == 192  # the context is 8,192
    assert near_the_end.value("max_length") == 8192


def test_forms_of_grpo(plan_for, model_of):
    dense = plan_for(method="grpo", data=prompts())
    assert [dense.value(name) for name in ("loss_type", "epsilon", "epsilon_high")] == ["dapo", 0.2, 0.28]
    assert plan_for("loss_type=dr_grpo", method="grpo", data=prompts()).value("scale_rewards") == "none"
    mixture = model_of("smollm2", "qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    sparse = plan_for(method="grpo", data=prompts(), model=mixture)
    assert [sparse.value(name) for name in ("loss_type", "epsilon", "epsilon_high")] == ["gspo", 3e-4, 4e-4]
    assert "capacity is no matter" in dense.choices["r"].reason


# ── an adapter to go on from ──


def written_adapter(folder, **changes):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def test_an_adapters_own_shape_is_the_plans(model_of, data_of, machine_of, tmp_path):
    folder = written_adapter(tmp_path)
    adapter = read_adapter_facts(folder)
    facts = model_of("smollm2"), data_of(), machine_of()

    def plan(*sets, **options):
        recipe = load_recipe(None, {"model": "m/m", "data": "d", "adapter": folder, **options}, sets)
        return make_plan(recipe, *facts, adapter=adapter)

    made = plan(method="dpo")
    assert (made.value("r"), made.value("lora_alpha"), made.value("target_modules")) == (4, 8.0, ("q_proj",))
    assert made.choices["r"].set_by is SetBy.USER and folder in made.choices["r"].reason
    assert made.memory.parts["adapters"] == 2 * 4 * 4 * (576 + 576) * 30  # with what they started from
    assert plan_from_yaml(plan_to_yaml(made)) == made
    assert plan("r=4").value("r") == 4
    with pytest.raises(InputError, match="r is the adapter's own \\(4\\), and cannot be 16"):
        plan("r=16")
    with pytest.raises(InputError, match="adapter has no meaning with tune: full"):
        plan(tune="full")


def test_adapters_that_are_none(tmp_path):
    with pytest.raises(InputError, match="there is no adapter"):
        read_adapter_facts(str(tmp_path))
    for changes in ({"r": "x"}, {"r": None}, {"lora_alpha": []}):
        with pytest.raises(InputError, match="not that of a LoRA adapter"):
            read_adapter_facts(written_adapter(tmp_path, **changes))
    run = tmp_path / "run" / "adapter"
    run.mkdir(parents=True)
    written_adapter(run, use_rslora=True)
    assert read_adapter_facts(str(run.parent)).use_rslora


# ── plain texts ──


def test_plain_texts_are_continued_pretraining(plan_for, data_of):
    answers, texts = data_of(5000), replace(data_of(5000), format_name="text")
    instruct, text = plan_for("max_steps=300", data=answers), plan_for("max_steps=300", data=texts)
    ratio = text.value("learning_rate") / instruct.value("learning_rate")
    assert ratio == pytest.approx(0.7, rel=0.06) and "forgets less" in text.choices["learning_rate"].reason
    assert plan_for(data=texts).value("num_train_epochs") == 1 and not text.value("assistant_only_loss")
    assert "D115" in text.choices["learning_rate"].evidence


# ── what is kept ──


def course(**changes):
    return Course(**{"updates": 1000, "eval_steps": 100, "heldout_rows": 400, "seconds": 3600.0, "trained": 5_000_000,
                     **changes})  # fmt: skip


def test_checkpoints_are_as_far_apart_as_costs_least():
    assert save_seconds(5_000_000) == pytest.approx(0.3)
    usual = choose_save_steps(course()).value  # √(2 · 0.3 s · 1 day) is 228 s, or 63 updates
    assert usual == 50
    assert choose_save_steps(course(trained=8 * 10**9)).value % 100 == 0  # 96 GB: hours apart, with an evaluation
    assert choose_save_steps(course(seconds=None)).value == 100
    assert choose_save_steps(course(seconds=1e6)).value == 1
    for seconds in (1.0, 50.0, 1e4):
        steps = choose_save_steps(course(seconds=seconds)).value
        assert 100 % steps == 0 or steps % 100 == 0


def test_stopping_and_best_only_where_the_held_out_rows_can_tell(plan_for, data_of):
    assert detectable(Method.SFT, 0) == float("inf")
    assert detectable(Method.SFT, 100) == 2 * detectable(Method.SFT, 400)
    few, many = plan_for(data=data_of(heldout=8)), plan_for("eval_steps=10", data=data_of(2000, heldout=512))
    assert not few.value("load_best_model_at_end") and few.value("early_stopping_patience") == 0
    assert many.value("load_best_model_at_end") and many.value("early_stopping_patience") == 3
    none = plan_for(data=replace(data_of(), heldout_rows=0, heldout_tokens=0))
    assert not none.value("load_best_model_at_end")
    hurried = choose_patience(Method.SFT, course(eval_steps=500), True)
    assert hurried.value == 0 and "none is left to save" in hurried.reason


# ── words ──


def test_words():
    assert [size_words(n) for n in (135_000_000, 8 * 10**9, 36_000, 7)] == ["135M", "8.0B", "36k", "7"]
    assert [passes_words(n) for n in (1.0, 2.5)] == ["1 epoch", "2.5 epochs"]
    assert [counted(n, "look") for n in (1, 0, 1200)] == ["1 look", "0 looks", "1,200 looks"]
    spans = [span_words(n) for n in (0.01, 3.21, 75, 600, 7000, 2e5)]
    assert spans == ["0.1 s", "3.2 s", "75 s", "10 min", "2 h", "2 days"]
    assert [bytes_words(n) for n in (5, 59e6, 96.2e9)] == ["1 MB", "59 MB", "96.2 GB"]


@pytest.mark.parametrize("method", Method)
def test_one_of_anything_is_not_called_ones(plan_for, data_of, method):
    texts = []
    for sets in (("max_steps=1", "effective_batch_size=4"), ("effective_batch_size=8", "num_train_epochs=1")):
        sets = (*sets, "num_generations=4") if method is Method.GRPO else sets
        plan = plan_for(*sets, method=str(method), data=data_of(2, heldout=1))
        texts += [choice.reason for choice in plan.choices.values()] + list(plan.warnings)
    for text in texts:
        for word in ("updates", "epochs", "looks", "rows", "pairs", "prompts", "micro-batches", "examples", "passes"):
            assert f" 1 {word}" not in f" {text}", text
