"""Checks of what only preference learning and GRPO have: beta, groups, sampling."""

import math
from collections.abc import Iterator

from welltuned.advice.lint.check import Hit, Severity, check, limit
from welltuned.advice.lint.config import Config, Tool
from welltuned.advice.lint.derived import batch
from welltuned.advice.settle import shown
from welltuned.recipe import Method

_SIGMOID = ("sigmoid", "hinge", "robust", "sigmoid_norm", "")
_MOST_DEVICES = 1024


@check(
    "WT080",
    "beta-outside-recipes",
    Severity.WARNING,
    looks_for="DPO's beta below 0.005 or above 1, with the sigmoid loss.",
    why="Recipes go from 0.01 to 0.5. beta sets how far the model may move: about 2/beta in log-probability.",
    mend="0.1; 0.01 with many rows, 0.5 for small models",
    evidence=("E046", "E049", "E043"),
    least=0.005,
    most=1.0,
)
def beta_outside_recipes(config: Config) -> Iterator[Hit]:
    beta, loss = config.number("beta"), config.value("loss_type")
    names = loss if isinstance(loss, list) else [loss or ""]
    if (
        config.method is not Method.DPO
        or beta is None
        or beta <= 0
        or config.stage not in ("", "dpo", "DPOTrainer", "DPOConfig")
    ):
        return
    if all(name in _SIGMOID for name in names) and not limit("WT080", "least") <= beta <= limit("WT080", "most"):
        yield Hit(
            name="beta", sentence=f"{config.key('beta')} {shown(beta)} is outside what DPO recipes use, 0.01 to 0.5"
        )


@check(
    "WT081",
    "group-too-small",
    Severity.ERROR,
    looks_for="GRPO with one completion for a prompt.",
    why="The advantage is the reward against the group's mean: of one answer it is always zero. TRL refuses to start.",
    mend="8, at least 4",
    evidence=("E071", "E069", "L004"),
)
def group_too_small(config: Config) -> Iterator[Hit]:
    group = config.whole("num_generations")
    if config.method is Method.GRPO and group is not None and 0 < group < 2:
        yield Hit(
            name="num_generations", sentence=f"{config.key('num_generations')} {group}: a group of one has no advantage"
        )


@check(
    "WT082",
    "group-of-two",
    Severity.WARNING,
    looks_for="GRPO with two completions for a prompt.",
    why="Of two answers the advantages are +1 and -1, or nothing: how much better one "
    "is does not show. Published runs use "
    "4 to 16.",
    mend="8, at least 4",
    evidence=("E071", "E069", "E041"),
)
def group_of_two(config: Config) -> Iterator[Hit]:
    if config.method is Method.GRPO and config.whole("num_generations") == 2:
        yield Hit(
            name="num_generations",
            sentence=f"{config.key('num_generations')} 2: advantages are +1 and -1, whatever the rewards",
        )


@check(
    "WT083",
    "group-does-not-divide-batch",
    Severity.ERROR,
    looks_for="GRPO whose generation batch is no multiple of num_generations. A warning "
    "where 2, 4, 8, ... devices would "
    "mend it, a note in Unsloth, which changes the batch by itself.",
    why="Completions of one prompt must be in one batch; TRL refuses to start.",
    mend="make per_device_train_batch_size · gradient_accumulation_steps · devices a multiple of num_generations",
    evidence=("L004",),
)
def group_does_not_divide_batch(config: Config) -> Iterator[Hit]:
    group, size = config.whole("num_generations"), _generated(config)
    if config.method is not Method.GRPO or not group or group < 2 or not size or size % group == 0:
        return
    needed = group // math.gcd(size, group)
    fixed = config.whole("generation_batch_size") is not None
    plausible = not fixed and needed & (needed - 1) == 0 and needed <= _MOST_DEVICES
    softer = Severity.NOTE if config.tool is Tool.UNSLOTH else Severity.WARNING if plausible else None
    unless = f"; {needed} devices would" if plausible else ""
    sentence = (
        f"{size} completions are generated at a time, no multiple of {config.key('num_generations')} {group}{unless}"
    )
    yield Hit(name="num_generations", sentence=sentence, severity=softer)


def _generated(config: Config) -> int | None:
    """Completions generated at a time on one device: the generation batch, or micro-batch times steps."""
    if config.given("generation_batch_size"):
        return config.whole("generation_batch_size")
    if config.given("steps_per_generation"):
        steps, micro = config.whole("steps_per_generation"), config.whole("per_device_train_batch_size")
        return steps * micro if steps and micro else None
    return batch(config)


@check(
    "WT084",
    "sampling-without-variety",
    Severity.WARNING,
    looks_for="GRPO that samples at a temperature below 0.5.",
    why="A group of equal answers has equal rewards and no gradient. Published runs "
    "sample at 0.7 to 1.0. At 0 all are equal: "
    "an error.",
    mend="1.0",
    evidence=("L004", "E071"),
    least=0.5,
)
def sampling_without_variety(config: Config) -> Iterator[Hit]:
    warmth = config.number("temperature")
    if config.method is Method.GRPO and warmth is not None and 0 <= warmth < limit("WT084", "least"):
        severity = Severity.ERROR if warmth == 0 else None
        yield Hit(
            name="temperature",
            sentence=f"temperature {shown(warmth)}: the answers of a group will hardly differ",
            severity=severity,
        )


@check(
    "WT085",
    "loss-depends-on-accumulation",
    Severity.WARNING,
    looks_for="GRPO's `bnpo` loss with gradient accumulation.",
    why="It divides by the tokens of each micro-batch: how the batch is cut changes the result.",
    mend="`loss_type: dapo` or `dr_grpo`",
    evidence=("L004",),
)
def loss_depends_on_accumulation(config: Config) -> Iterator[Hit]:
    steps = config.whole("gradient_accumulation_steps")
    if config.method is Method.GRPO and config.value("loss_type") == "bnpo" and steps and steps > 1:
        yield Hit(name="loss_type", sentence=f"loss_type bnpo with {config.key('gradient_accumulation_steps')} {steps}")


@check(
    "WT086",
    "grpo-beta-high",
    Severity.WARNING,
    looks_for="GRPO with beta above 0.1.",
    why="Today's recipes use 0 to 0.04: a strong pull to the reference holds the policy where it was.",
    mend="0, or up to 0.04",
    evidence=("E071",),
    most=0.1,
)
def grpo_beta_high(config: Config) -> Iterator[Hit]:
    beta = config.number("beta")
    if config.method is Method.GRPO and beta is not None and beta > limit("WT086", "most"):
        yield Hit(
            name="beta", sentence=f"{config.key('beta')} {shown(beta)}: the pull to the reference outweighs the reward"
        )


@check(
    "WT087",
    "completions-cut",
    Severity.NOTE,
    looks_for="GRPO with completions of 256 tokens or fewer.",
    why="A reasoning answer that is cut has no result to reward; its tokens are trained all the same unless "
    "mask_truncated_completions is on.",
    mend="as long as a good answer needs, or `mask_truncated_completions: true`",
    evidence=("L004", "E071"),
    least=256,
)
def completions_cut(config: Config) -> Iterator[Hit]:
    length = config.whole("max_completion_length")
    if config.method is not Method.GRPO or length is None or config.on("mask_truncated_completions"):
        return
    if config.given("max_completion_length") and 0 < length <= limit("WT087", "least"):
        yield Hit(name="max_completion_length", sentence=f"answers end after {length} tokens, finished or not")
