"""Checks of what an adapter is made of: scale, targets, dropout, and whether it is trained at all."""

import re
from collections.abc import Iterator
from difflib import get_close_matches

from welltuned.advice.learning_rate import as_at_the_sweeps, two_digits
from welltuned.advice.lint.bands import supervised_adapter, supervised_full
from welltuned.advice.lint.check import Hit, Severity, check, limit
from welltuned.advice.lint.config import Config, Tool
from welltuned.advice.lint.derived import alpha_equivalent, is_mixture
from welltuned.advice.rules import number
from welltuned.advice.settle import shown
from welltuned.recipe import ALL_LINEAR, Method

_ATTENTION = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"}
)
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "w1", "w2", "w3"})
_KNOWN = _ATTENTION | _MLP | {"lm_head", "embed_tokens", "c_proj", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def _targets(config: Config) -> tuple[str, ...]:
    """Module names; () where targets are unset, unread, all of them, or a pattern."""
    value = config.value("target_modules")
    if isinstance(value, str):
        value = [value]
    names = tuple(str(name).rsplit(".", 1)[-1] for name in value) if isinstance(value, list | tuple) else ()
    return () if any(name in (ALL_LINEAR, "all") or not name.isidentifier() for name in names) else names


@check(
    "WT020",
    "adapter-not-trained",
    Severity.ERROR,
    looks_for="Adapter settings that nothing reads: `lora_r` without `use_peft: true` or `adapter`, `lora_rank` with "
    "`finetuning_type: full`, a LoraConfig that is never passed on. A warning where the rate is one of full "
    "fine-tuning.",
    why="The tools do not complain: they train all weights, with a rate that was meant for an adapter.",
    mend="switch the adapter on (`use_peft: true`, `adapter: lora`, `peft_config=...`), or remove its settings",
    evidence=("L002", "E031"),
)
def adapter_not_trained(config: Config) -> Iterator[Hit]:
    fact = config.facts.get("adapter_unused")
    if fact is None:
        return
    rate = config.number("learning_rate")
    meant = config.method is Method.SFT and rate is not None and rate <= supervised_full(config).high
    severity = Severity.WARNING if meant else None
    sentence = f"{fact.key} is set, and no adapter is trained: {fact.value}"
    yield Hit(name="r", sentence=sentence, key=fact.key, line=fact.line, severity=severity)


@check(
    "WT021",
    "alpha-below-rank",
    Severity.NOTE,
    looks_for="alpha / r below 1 without rsLoRA, at a rate that is sound at this alpha.",
    why="The best rate falls with about the square root of alpha, whatever r is. A small scale is no fault by itself "
    "(QLoRA's own is 0.25), but a rate copied from a recipe with alpha = 2r is then too low.",
    mend="compare recipes by rate · √alpha; keep alpha fixed when you change r",
    evidence=("E094", "D012", "E055", "P004"),
)
def alpha_below_rank(config: Config) -> Iterator[Hit]:
    alpha, rank, rate = config.number("lora_alpha"), config.number("r"), config.number("learning_rate")
    if not config.trains_adapter or not alpha or not rank or config.on("use_rslora"):
        return
    if 0 < alpha < rank and (config.given("lora_alpha") or config.given("r")):
        same = ""
        if rate and config.method is Method.SFT:
            same = f"; the rate does what {shown(two_digits(as_at_the_sweeps(rate, alpha)))} does at alpha "
            same += shown(number("rate_alpha"))
        yield Hit(name="lora_alpha", sentence=f"alpha {shown(alpha)} / r {shown(rank)} is {shown(alpha / rank)}{same}")


@check(
    "WT022",
    "rslora-with-large-alpha",
    Severity.WARNING,
    looks_for="rsLoRA with alpha of r or more, where alpha · √r then lies 4 times or more "
    "above plain LoRA's scale, at a "
    "rate of 1e-4 and above.",
    why="rsLoRA multiplies by alpha/√r instead of alpha/r: alpha = r = 64 acts like alpha 512. In PEFT's benchmark it "
    "learned more and forgot twice as much, because it was a higher rate.",
    mend="with rsLoRA divide alpha by √r",
    evidence=("E081", "E079", "E091"),
    factor=4.0,
    rate=1e-4,
)
def rslora_with_large_alpha(config: Config) -> Iterator[Hit]:
    alpha, rank, rate = config.number("lora_alpha"), config.number("r"), config.number("learning_rate")
    acts = alpha_equivalent(config)
    band = supervised_adapter(config) if config.method is Method.SFT and config.trains_adapter else None
    if not band or not acts or not alpha or not rank or not rate or not config.on("use_rslora"):
        return
    if alpha >= rank and acts >= alpha * limit("WT022", "factor") and limit("WT022", "rate") <= rate <= band.high:
        yield Hit(
            name="use_rslora",
            sentence=f"use_rslora at r {shown(rank)}: alpha {shown(alpha)} acts like {shown(round(acts))}",
        )


@check(
    "WT023",
    "attention-only-targets",
    Severity.WARNING,
    looks_for="An adapter on attention projections only; also where the targets are left "
    "to PEFT, which takes q_proj and "
    "v_proj. Mixture-of-experts models are passed over: their experts are no linear layers.",
    why="At equal parameters an adapter on the MLP learns more and forgets less than one on q and v; attention adds "
    "nothing to the MLP, the MLP a lot to attention.",
    mend="target all linear layers: `all-linear`, or q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    evidence=("E034", "E079", "E082", "P002", "L003"),
)
def attention_only_targets(config: Config) -> Iterator[Hit]:
    if not config.trains_adapter or config.method in (None, Method.GRPO):
        return
    if is_mixture(config) or config.given("target_parameters"):
        return
    names = _targets(config)
    if names and set(names) <= _ATTENTION:
        yield Hit(
            name="target_modules",
            sentence=f"the adapter is on {', '.join(names)} only: the MLP, most of the model, stays as it is",
        )
    elif config.tool is Tool.TRL and not config.given("target_modules"):
        sentence = (
            "target_modules is not set: PEFT then adapts q_proj and v_proj only for Llama, Mistral, Qwen and Gemma"
        )
        yield Hit(name="target_modules", sentence=sentence)


@check(
    "WT024",
    "target-matches-nothing",
    Severity.WARNING,
    looks_for="A target name that is nearly, but not, a usual module name; with a local "
    "model, one that it does not have.",
    why="PEFT skips a name that matches nothing as long as another matches, and says nothing.",
    mend="correct the name",
    evidence=("L003",),
)
def target_matches_nothing(config: Config) -> Iterator[Hit]:
    have = frozenset(config.look.module_names)
    for name in _targets(config) if config.trains_adapter else ():
        near = get_close_matches(name, sorted(have or _KNOWN), n=1, cutoff=0.85)
        if have:
            missing = name not in have | {"lm_head", "embed_tokens"}
        else:  # `x_proj` and its like may well exist
            missing = name not in _KNOWN and not re.fullmatch(r"[a-z0-9]+_proj", name) and bool(near)
        if missing:
            mend = f"did you mean `{near[0]}`?" if near else f"the model has {', '.join(sorted(have))}"
            yield Hit(
                name="target_modules",
                sentence=f"no module is called {name}: it would be passed over in silence",
                mend=mend,
            )


@check(
    "WT025",
    "adapter-on-head",
    Severity.ERROR,
    looks_for="`lm_head` among the targets of a run of TRL's SFTTrainer.",
    why="Its loss multiplies with the head's weight directly; TRL refuses an adapter "
    "there, which would never be trained.",
    mend="remove lm_head from the targets",
    evidence=("L004",),
)
def adapter_on_head(config: Config) -> Iterator[Hit]:
    if (
        config.tool is Tool.TRL
        and config.method is Method.SFT
        and config.trains_adapter
        and "lm_head" in _targets(config)
    ):
        yield Hit(
            name="target_modules", sentence="lm_head is a target, and TRL's SFTTrainer refuses an adapter on the head"
        )


@check(
    "WT026",
    "dropout-high",
    Severity.WARNING,
    looks_for="lora_dropout above 0.2.",
    why="Recipes use 0 to 0.1; it helped 7B and 13B models at 0.05 to 0.1, larger ones not at all.",
    mend="0, or 0.05 where few rows are seen more than twice",
    evidence=("E057", "E059", "P005"),
    most=0.2,
)
def dropout_high(config: Config) -> Iterator[Hit]:
    dropout = config.number("lora_dropout")
    if config.trains_adapter and dropout is not None and limit("WT026", "most") < dropout < 1:
        yield Hit(
            name="lora_dropout",
            sentence=f"{config.key('lora_dropout')} {shown(dropout)} drops {dropout:.0%} of every adapter's inputs",
        )


@check(
    "WT027",
    "dropout-on-parameters",
    Severity.ERROR,
    looks_for="`target_parameters` (experts) together with dropout.",
    why="PEFT adapts bare parameters with a wrapper that knows no dropout, and refuses it.",
    mend="set the dropout to 0",
    evidence=("L003",),
)
def dropout_on_parameters(config: Config) -> Iterator[Hit]:
    dropout = config.number("lora_dropout")
    if config.trains_adapter and config.value("target_parameters") and dropout:
        yield Hit(
            name="lora_dropout",
            sentence=f"{config.key('lora_dropout')} {shown(dropout)} with {config.key('target_parameters')}: "
            "PEFT refuses it",
        )


@check(
    "WT028",
    "rank-extreme",
    Severity.NOTE,
    looks_for="A rank above 256, or below 4 outside of reinforcement learning.",
    why="From rank 64 to 128 the best loss falls by 0.12 %, from 4 to 16 by 0.44 %; "
    "a rate that is 2.5 times off costs as "
    "much as a quarter of the rank. GRPO learns with rank 1.",
    mend="16 to 64, up to 128 for large data",
    evidence=("E027", "E025", "E036"),
    most=256,
    least=4,
)
def rank_extreme(config: Config) -> Iterator[Hit]:
    rank = config.whole("r")
    if not config.trains_adapter or rank is None or rank < 1:
        return
    if rank > limit("WT028", "most"):
        yield Hit(name="r", sentence=f"{config.key('r')} {rank} costs memory and time for a gain that nothing measured")
    elif rank < limit("WT028", "least") and config.method is not Method.GRPO:
        yield Hit(name="r", sentence=f"{config.key('r')} {rank}: supervised learning still gains from 4 and 16")
