"""What only preference learning chooses: the form of the loss, how far it may move, and how rows weigh.

DPO, its relatives and KTO compare the model with the one that it started as; ORPO adds the comparison to the supervised
loss; a reward model learns to score. There is no sweep with LoRA: the values are those of released recipes.
"""

from collections.abc import Mapping

from welltuned.advice.rules import by_threshold, cited, number, rule
from welltuned.advice.settle import counted, from_rule, settle, shown
from welltuned.choice import Choice
from welltuned.facts.data import DatasetFacts
from welltuned.recipe import Method, Recipe


def preference_choices(recipe: Recipe, data: DatasetFacts) -> Mapping[str, Choice]:
    """The choices of dpo, orpo, kto or reward, on the user's values where there are some."""
    return {
        Method.DPO: _dpo,
        Method.ORPO: _orpo,
        Method.KTO: _kto,
        Method.REWARD: _reward,
    }[recipe.method](recipe, data)


def _dpo(recipe: Recipe, data: DatasetFacts) -> dict[str, Choice]:
    pairs = _pairs(data)
    why = f"as in the recipes that the rate is from; the plain loss on your {pairs}; robust where labels are doubtful"
    found = {"loss_type": settle(recipe, "loss_type", from_rule(rule("dpo_loss_type"), why))}
    form = found["loss_type"].value
    found["beta"] = settle(recipe, "beta", _dpo_beta(form, data))
    if form in rule("label_smoothing").value:
        found["label_smoothing"] = settle(recipe, "label_smoothing", _label_smoothing(form, pairs))
    if form == "simpo":
        found["simpo_gamma"] = settle(recipe, "simpo_gamma", _simpo_gamma(float(found["beta"].value), pairs))
    return found


def _pairs(data: DatasetFacts) -> str:
    """340 pairs (chosen answers of 120 tokens, rejected of 90)."""
    if data.chosen is None or data.rejected is None:
        return counted(data.rows, "pair")
    lengths = f"chosen answers of {data.chosen.median:,} tokens, rejected of {data.rejected.median:,}, in the middle"
    return f"{counted(data.rows, 'pair')} ({lengths})"


def _dpo_beta(form: str, data: DatasetFacts) -> Choice:
    value = float(rule("dpo_beta").value[form])
    low, high = rule("dpo_beta_range").value[form]
    saturates = f"a pair counts as learned once its log-probabilities have parted by about {shown(2 / value)}"
    if form in ("sigmoid_norm", "simpo"):
        why = f"{saturates} a token, since {form} divides by the length of each of your {data.rows:,} pairs' answers"
    else:
        why = f"{saturates}; recipes use {shown(low)} to {shown(high)}, small models more, on your {data.rows:,} pairs"
    return Choice(
        value=value, low=float(low), high=float(high), reason=why, evidence=cited("dpo_beta", "dpo_beta_range")
    )


def _label_smoothing(form: str, pairs: str) -> Choice:
    value = float(rule("label_smoothing").value[form])
    why = (
        f"your {pairs} are taken at their word; {shown(rule('label_smoothing').value['robust'])} where raters disagree"
    )
    if value:
        why = f"robust assumes that this share of your {pairs} is the wrong way round"
    high = number("label_smoothing_most")
    return Choice(value=value, low=0.0, high=high, reason=why, evidence=cited("label_smoothing"))


def _simpo_gamma(beta: float, pairs: str) -> Choice:
    spec = rule("simpo_gamma_share")
    why = f"{spec.value:.0%} of beta {shown(beta)}, the middle of what was best in a grid, on your {pairs}"
    value = beta * spec.value
    return Choice(value=value, low=beta * spec.low, high=beta * spec.high, reason=why, evidence=spec.evidence)


def _orpo(recipe: Recipe, data: DatasetFacts) -> dict[str, Choice]:
    why = f"the odds' weight beside the supervised loss of your {_pairs(data)}; both released recipes used it"
    return {"beta": settle(recipe, "beta", from_rule(rule("orpo_beta"), why))}


def _kto(recipe: Recipe, data: DatasetFacts) -> dict[str, Choice]:
    why = f"the usual pull to the reference on your {counted(data.rows, 'row')}; its one recipe and DPO's agree"
    found = {"beta": settle(recipe, "beta", from_rule(rule("kto_beta"), why))}
    good, bad = kto_weights(data.desirable_share)
    for name, value, kind in (("desirable_weight", good, "desirable"), ("undesirable_weight", bad, "undesirable")):
        found[name] = settle(recipe, name, _kto_weight(value, kind, data))
    return found


def kto_weights(desirable_share: float | None) -> tuple[float, float]:
    """Weights with which good and bad rows count about alike: the rarer kind is raised, the other stays at 1."""
    if desirable_share is None or not 0 < desirable_share < 1:
        return 1.0, 1.0
    odds = desirable_share / (1 - desirable_share)
    if 1 <= odds <= number("kto_weight_most"):
        return 1.0, 1.0
    return (1.0, round(odds, 2)) if odds > 1 else (round(1 / odds, 2), 1.0)


def _kto_weight(value: float, kind: str, data: DatasetFacts) -> Choice:
    share = data.desirable_share
    if share is None:
        why = f"your {counted(data.rows, 'row')} are taken to be half good, half bad; their marks are not counted yet"
    else:
        part = share if kind == "desirable" else 1 - share
        why = f"{part:.0%} of your {counted(data.rows, 'row')} are {kind}; "
        why += "raised, so that both kinds count alike" if value > 1 else "the rarer kind is raised, where one is rare"
    spread = number("kto_weight_most")
    low, high = round(value / spread, 2), round(value * spread, 2)
    return Choice(value=value, low=low, high=high, reason=why, evidence=cited("kto_weight_most"))


def _reward(recipe: Recipe, data: DatasetFacts) -> dict[str, Choice]:
    why = f"keeps the scores of your {_pairs(data)} around 0: a difference alone would leave their level free"
    centre = from_rule(rule("center_rewards_coefficient"), why)
    return {"center_rewards_coefficient": settle(recipe, "center_rewards_coefficient", centre)}


def choose_epochs(method: Method, rows: int) -> Choice:
    """Passes over pairs or marked rows: fewer than over answers to imitate."""
    name = f"{method}_epochs_by_rows"
    value, span = float(by_threshold(name, rows)), rule("preference_epochs_range").value
    passes = "one pass" if value == 1 else f"{shown(value)} passes"
    why = {
        Method.REWARD: f"{passes} over your {counted(rows, 'pair')}: a second overfits, as was seen at 6B",
        Method.ORPO: f"{passes} over your {counted(rows, 'pair')}, as in its recipes of 7,000",
        Method.KTO: f"{passes} over your {counted(rows, 'row')}: as for DPO, whose released runs of 60,000 take one",
        Method.DPO: f"{passes} over your {counted(rows, 'pair')}: released runs of 60,000 take one, small ones more",
    }[method]
    evidence = cited(name, "preference_epochs_range")
    return Choice(value=value, low=float(span["low"]), high=float(span["high"]), reason=why, evidence=evidence)
