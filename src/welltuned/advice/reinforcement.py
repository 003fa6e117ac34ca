"""What only GRPO chooses: how answers are sampled, how many make a group, and how an update is held back.

There is no sweep: the values are those of released recipes, and what they disagree on is in the evidence.
"""

import math
from collections.abc import Mapping

from welltuned.advice.rules import by_threshold, cited, number, rule
from welltuned.advice.settle import counted, from_rule, settle, shown
from welltuned.choice import Choice
from welltuned.errors import InputError
from welltuned.facts.data import DatasetFacts
from welltuned.facts.model import ModelFacts
from welltuned.recipe import Recipe

BATCH = ("effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")


def group_choices(recipe: Recipe, model: ModelFacts, data: DatasetFacts) -> Mapping[str, Choice]:
    """The choices of grpo, on the user's values where there are some."""
    found = {
        "num_generations": settle(recipe, "num_generations", choose_generations(recipe, data)),
        "max_completion_length": settle(recipe, "max_completion_length", choose_completion_length(model, data)),
        "loss_type": settle(recipe, "loss_type", _loss_type(model, data)),
    }
    group, longest = found["num_generations"].value, found["max_completion_length"].value
    form = found["loss_type"].value
    for name, choice in {
        "beta": _beta(data),
        "epsilon": _clip("epsilon", form, group),
        "epsilon_high": _clip("epsilon_high", form, group),
        "scale_rewards": _scale(form, group),
        "temperature": _temperature(group),
        "top_p": _top_p(group),
        "mask_truncated_completions": _masked(longest),
        "num_iterations": _iterations(group),
        **({} if recipe.vllm_server_base_url is None else {"vllm_importance_sampling_clip_max": _correction(group)}),
    }.items():
        found[name] = settle(recipe, name, choice)
    return found


def choose_generations(recipe: Recipe, data: DatasetFacts) -> Choice:
    """The usual group, or the size nearest to it that divides the user's batch."""
    spec, least = rule("grpo_num_generations"), int(number("grpo_least_generations"))
    value, batch = int(spec.value), given_batch(recipe)
    why = f"{value} answers to each of your {counted(data.rows, 'prompt')} are compared with their own mean"
    if batch is not None and batch % value:
        sizes = [size for size in range(least, batch + 1) if batch % size == 0]
        value = min(sizes, key=lambda size: abs(math.log(size / spec.value)), default=value)
        why = f"{value} answers to each prompt divide your batch of {batch}; {spec.value} is usual"
    why += f"; of fewer than {spec.low} the mean says little, of 2 nothing but which is better"
    low, high = min(spec.low, value), max(spec.high, value)
    return Choice(value=value, low=low, high=high, reason=why, evidence=cited("grpo_num_generations"))


def given_batch(recipe: Recipe) -> int | None:
    """The answers of an update where the user fixed them."""
    user = recipe.hyperparameters
    whole, device, steps = (user.get(name) for name in BATCH)
    if whole is not None:
        return int(whole)
    return int(device * steps) if device is not None and steps is not None else None


def advised_answers(rows: int, group: int) -> Choice:
    """Answers of an update: whole groups of so many prompts as their number allows."""
    prompts, span = int(by_threshold("grpo_prompts_by_rows", rows)), rule("grpo_prompts_range").value
    prompts = max(1, min(prompts, rows))
    why = f"{prompts} of your {counted(rows, 'prompt')} with {group} answers each make an update of {prompts * group}"
    return Choice(
        value=prompts * group,
        low=min(span["low"], prompts) * group,
        high=span["high"] * group,
        reason=f"{why}; most groups of a hard or an easy task have equal rewards and teach nothing",
        evidence=cited("grpo_prompts_by_rows", "grpo_prompts_range"),
    )


def require_whole_groups(batch: int, group: int) -> None:
    """Raises InputError where an update would hold part of a group."""
    if batch % group:
        what = f"an update of {batch} answers is no whole number of groups of {group}"
        mend = f"make effective_batch_size a multiple of {group}, or leave num_generations out"
        raise InputError(what, where="num_generations", mend=mend)


def choose_completion_length(model: ModelFacts, data: DatasetFacts) -> Choice:
    """From the rows' own answers where they have some, else the field's default, within the model's context."""
    spec, step = rule("grpo_completion_default"), int(number("grpo_completion_step"))
    longest_prompt = data.length_max if data.prompts is None else data.prompts.max
    room = max(2, (model.context_length or longest_prompt + spec.high) - longest_prompt)
    if data.answers is None:
        wanted, evidence = int(spec.value), cited("grpo_completion_default")
        why = f"your rows hold no answers to measure, so the usual {wanted}"
    else:
        wanted = math.ceil(number("grpo_completion_factor") * data.answers.p99 / step) * step
        evidence = cited("grpo_completion_factor", "grpo_completion_step")
        why = f"99 of 100 answers in your rows have up to {data.answers.p99:,} tokens, and untrained ones ramble"
    value = min(wanted, room)
    why += f"; beside your longest prompt of {longest_prompt:,} the model has room for {room:,}"
    low, high = min(spec.low, value), max(value, min(spec.high, room))
    return Choice(value=value, low=low, high=high, reason=why, evidence=evidence)


def answer_length(data: DatasetFacts, longest: int) -> int:
    """Tokens to expect of a sampled answer."""
    return min(longest, longest if data.answers is None else round(data.answers.mean))


def choose_epochs(rows: int) -> Choice:
    value, span = float(by_threshold("grpo_epochs_by_rows", rows)), rule("epochs_range").value
    passes = "one pass" if value == 1 else f"{shown(value)} passes"
    why = f"{passes} over your {counted(rows, 'prompt')}; each samples new answers, so prompts wear out slowly"
    evidence = cited("grpo_epochs_by_rows", "epochs_range")
    return Choice(value=value, low=float(span["low"]), high=float(span["high"]), reason=why, evidence=evidence)


def _loss_type(model: ModelFacts, data: DatasetFacts) -> Choice:
    forms = rule("grpo_loss_type").value
    if model.experts:
        why = f"your model routes each token to some of {model.experts} experts, which makes single tokens' ratios jump"
        return Choice(value=forms["mixture"], reason=f"{why}; gspo uses whole answers' ratios", evidence=_loss_rows())
    why = f"every token of the answers to your {counted(data.rows, 'prompt')} counts alike"
    why += "; grpo would favour short right and long wrong answers"
    return Choice(value=forms["dense"], reason=why, evidence=_loss_rows())


def _loss_rows() -> tuple[str, ...]:
    return cited("grpo_loss_type")


def _beta(data: DatasetFacts) -> Choice:
    spec = rule("grpo_beta")
    why = (
        f"no pull to the start on your {counted(data.rows, 'prompt')}, and no second model to run: clipping holds the "
    )
    return from_rule(
        spec, why + f"policy; up to {shown(spec.high)} where the KL climbs and the held-out reward does not"
    )


def _clip(name: str, form: str, group: int) -> Choice:
    unit = "sequence" if form == "gspo" else "token"
    value, (low, high) = rule(f"grpo_{name}").value[unit], rule(f"grpo_{name}_range").value[unit]
    what = "a whole answer's ratio, a mean over its tokens," if unit == "sequence" else "a token's ratio"
    if name == "epsilon":
        why = f"{what} may fall by {shown(value)} before a bad one of your {group} answers stops pushing it"
    else:
        why = f"{what} may rise by {shown(value)}, more than it may fall: rare tokens of your {group} answers can"
    return Choice(value=value, low=low, high=high, reason=why, evidence=cited(f"grpo_{name}", f"grpo_{name}_range"))


def _scale(form: str, group: int) -> Choice:
    names = rule("grpo_scale_rewards").value
    if form == "dr_grpo":
        why = f"dr_grpo leaves the rewards of a group of {group} as they are, so that easy and hard prompts weigh alike"
        return Choice(value=names["dr_grpo"], reason=why, evidence=cited("grpo_scale_rewards"))
    why = f"rewards of a group of {group} are divided by their spread, whatever units your rewards have"
    return Choice(value=names["usual"], reason=why, evidence=cited("grpo_scale_rewards"))


def _temperature(group: int) -> Choice:
    why = f"1 samples your {group} answers from the very policy that is trained; lower makes them alike, higher noise"
    return from_rule(rule("grpo_temperature"), why)


def _top_p(group: int) -> Choice:
    return from_rule(rule("grpo_top_p"), f"1 cuts nothing off, so your {group} answers are the trained policy's own")


def _masked(longest: int) -> Choice:
    why = f"an answer cut at {longest:,} tokens is neither right nor wrong; watch the share of cut ones: they are lost"
    return Choice(value=rule("grpo_mask_truncated").value, reason=why, evidence=cited("grpo_mask_truncated"))


def _iterations(group: int) -> Choice:
    why = f"one update of each set of answers, so that all {group} of a group are the current policy's own"
    return from_rule(rule("grpo_num_iterations"), why)


def _correction(group: int) -> Choice:
    why = f"vLLM draws your {group} answers with slightly other arithmetic, so each token counts by how much likelier"
    spec = rule("grpo_sampler_clip")
    return from_rule(spec, f"{why} training finds it, up to {shown(spec.value)} times: no rare one rules an update")
