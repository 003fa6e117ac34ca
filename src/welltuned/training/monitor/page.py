"""The page "When it goes wrong", made from what the monitor knows: docs/when_it_goes_wrong.md.

tests/monitor/test_page.py holds each entry to the code: its id is one that a detector gives, its keys are those that
the detector's remedies set, and every sentence quoted of a run stands in the code.
"""

from dataclasses import dataclass

from welltuned.advice.settle import shown
from welltuned.training.healing import IN_A_ROW, MOST_RETURNS
from welltuned.training.monitor.thresholds import limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One finding: when it is told, what it means, likely causes, the recipe keys that mend it, and what no key does.

    `{name}` in `when` is the threshold of that name.
    """

    id: str
    when: str
    means: str
    causes: tuple[str, ...]
    keys: tuple[str, ...] = ()
    besides: str = ""


ENTRIES: dict[str, tuple[Entry, ...]] = {
    "Any run": (
        Entry(
            id="divergence",
            when="The smoothed training loss stays {divergence_rise} nats and {divergence_spread} robust deviations "
            "above its lowest, for {divergence_updates:share} of the run; or the held-out loss is above its start by "
            "more than 2 standard errors, and the training loss too; or what training added is {divergence_change} "
            "times as large as the weights; or a loss or gradient was not finite.",
            means="What the model knew is being destroyed. The run ends here, unless `early_stopping_patience: 0` "
            "says otherwise, and fails with exit code 1. Where held-out rows had found better weights before, those "
            "are the result; where not, there is none.",
            causes=(
                "a learning rate several times too high for this model, batch and rank: by far the most common",
                "gradients that are not clipped",
                "rows unlike all others, in 16 bits",
            ),
            keys=("learning_rate", "max_grad_norm"),
            besides="Write the lower rate into the run's recipe.yaml and `welltuned resume RUN --accept-changes`: it "
            "goes on from its best evaluation, or starts over where there is none.",
        ),
        Entry(
            id="spike",
            when="The loss of one update is {spike_rise:share} above the smoothed loss, and loss and gradient norm "
            "both lie {spike_z} robust deviations outside what the latest {window} updates show.",
            means="One update met rows unlike the others. Alone it does no harm; its rows are named.",
            causes=("damaged text, another language, a wrong answer", "a learning rate at the edge of what is stable"),
            besides="Look at the rows that it names.",
        ),
        Entry(
            id="spikes",
            when="{spike_many} of the latest {window} updates were spikes.",
            means="It is a pattern: training pays for it each time.",
            causes=("a part of the data that is broken or does not belong", "a learning rate too high"),
            keys=("learning_rate",),
            besides="Drop the rows that it names, if they are broken.",
        ),
        Entry(
            id="overfitting",
            when="The held-out loss lies above its best by more than {standard_errors} standard errors of the "
            "difference, row by row, in {overfit_evaluations} evaluations running, while the training loss falls. "
            "(Of preference methods a hint only, as long as the accuracy on held-out pairs is not worse.)",
            means="From its best evaluation on the run learns rows by heart. By default the best weights are the "
            "result, and a run whose held-out rows can tell stops by itself.",
            causes=("too many epochs for so few rows", "a rate above the advice's range", "rows that repeat"),
            keys=(
                "load_best_model_at_end",
                "num_train_epochs",
                "learning_rate",
                "lora_dropout",
                "weight_decay",
                "effective_batch_size",
            ),
            besides="They are told in the order that suits the run, without those that could not act in it. More rows "
            "help most. After training, `welltuned adapter scale RUN --sweep` tries strengths of the adapter on the "
            "held-out rows: often less than all of it is best.",
        ),
        Entry(
            id="memorising",
            when="The smoothed training loss is below {overfit_hint}, and no held-out loss shows that this is well.",
            means="A hint, not a verdict: tasks with short, certain answers end there in health.",
            causes=("few rows seen many times", "answers that are nearly the same everywhere"),
            besides="Hold out more rows, so that it can be told; add rows.",
        ),
        Entry(
            id="heldout_too_small",
            when="Fewer than {heldout_least} rows are held out; or the held-out loss is {heldout_effect:share} above "
            "its best (GRPO: its score has lost {heldout_gain:share} of what it had gained), and that is within "
            "{standard_errors} standard errors.",
            means="Noise would decide when to stop and which weights are best, so neither is done. The standard error "
            "is printed.",
            causes=("few rows, of which a tenth are very few",),
            keys=("eval_fraction",),
            besides="Or give rows of your own: `eval_data`.",
        ),
        Entry(
            id="unmoved",
            when="After {unmoved_from:share} of the run the weights have changed by less than {unmoved} of their size.",
            means="The run ends with the model that it began with.",
            causes=("a learning rate for another method, or ten times too low", "far too few updates"),
            keys=("learning_rate", "num_train_epochs", "max_steps", "r", "lora_alpha", "effective_batch_size"),
        ),
        Entry(
            id="not_learning",
            when="After {judged_from:share} of the run the loss has fallen by less than {learned_share:share} of its "
            "start, or by less than {standard_errors} standard errors: the held-out loss where it can tell, else the "
            "training loss.",
            means="A plateau. If the training loss alone fell, what it learns there is of no use to held-out rows.",
            causes=(
                "a rate too low: then the weights have hardly moved",
                "rows that hold nothing to be learned from their prompts",
                "held-out rows of another kind than the training rows",
            ),
            keys=("learning_rate", "num_train_epochs", "max_steps", "r", "lora_alpha", "effective_batch_size"),
        ),
        Entry(
            id="underfitting",
            when="At the end the loss fell in the second half of the summed learning rate at least {still_falling} "
            "times as much as in the first.",
            means="It ended too early: there is more to be had from these rows.",
            causes=("a low rate", "few epochs", "a large batch, and with it few updates"),
            keys=("learning_rate", "num_train_epochs", "max_steps", "r", "lora_alpha", "effective_batch_size"),
        ),
        Entry(
            id="warmup",
            when="The warm-up takes {warmup_share:share} of the run or more. Told at the first update.",
            means="The rate hardly reaches, or never reaches, the value that was set.",
            causes=("a warm-up copied from a longer run",),
            keys=("warmup_steps",),
        ),
        Entry(
            id="throughput",
            when="{throughput_updates} updates in a row ran at {throughput_share:share} of the run's best stretch or "
            "slower.",
            means="The result does not depend on it; the time does.",
            causes=("another process on the machine", "a processor or GPU that throttles", "memory that swaps"),
            besides="See what else runs, and how much memory is free.",
        ),
    ),
    "DPO": (
        Entry(
            id="untrained_preference",
            when="After {preference_from:share} of the run the loss is within {preference_loss} of ln 2, and the "
            "chosen answers win in less than {preference_accuracy:share} of the pairs, or by less than "
            "{preference_margin} on average.",
            means="The model still is its own reference: a loss of 0.69 is the loss of no training.",
            causes=("a full-parameter rate on an adapter", "too few updates for this beta"),
            keys=("learning_rate", "num_train_epochs", "max_steps", "effective_batch_size"),
        ),
    ),
    "GRPO": (
        Entry(
            id="entropy_collapse",
            when="The entropy of the answers is below {entropy_share:share} of what it was at the start.",
            means="The policy says the same thing every time: groups differ too little to learn from.",
            causes=("a rate too high", "rare tokens that the clipping holds down", "sampling below temperature 1"),
            keys=("learning_rate", "epsilon_high", "temperature"),
        ),
        Entry(
            id="no_signal",
            when="More than {no_signal_share:share} of the groups got one reward for all of their answers.",
            means="Those groups have an advantage of 0 and teach nothing.",
            causes=("prompts all too easy or all too hard", "a reward that cannot tell answers apart"),
            keys=("num_generations",),
            besides="Choose prompts that the model solves sometimes.",
        ),
        Entry(
            id="truncation",
            when="More than {truncated_share:share} of the answers were cut at `max_completion_length`.",
            means="A cut answer is judged by a half of it; the run learns to be short, or to ramble.",
            causes=("a limit too low for this task", "answers that never end, since the end token is not learned"),
            keys=("max_completion_length", "mask_truncated_completions"),
        ),
        Entry(
            id="kl_blow_up",
            when="The policy is more than {kl_most} nats a token away from its reference.",
            means="It leaves the language that it started from.",
            causes=("a reward that is being gamed: read samples.jsonl", "a rate too high", "no pull to the reference"),
            keys=("learning_rate", "beta"),
        ),
        Entry(
            id="flat_reward",
            when="After {reward_from:share} of the run the mean reward of the latest third is not above that of the "
            "first by {standard_errors} standard errors.",
            means="Nothing is learned that the reward sees.",
            causes=("a low rate", "groups without signal", "a reward that is at its top already"),
            keys=("learning_rate", "num_train_epochs", "max_steps"),
        ),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a run says of a fault that it deals with itself: `quoted` stands so in the code."""

    quoted: str
    means: str


SAID = (
    Said(
        quoted="ran out of memory",
        means="The update (evaluation, sampling) is made again in smaller pieces, as are all later ones: the effective "
        "batch and the result stay the same up to rounding. `would need … more than are free` is the same, seen "
        "before Linux would have ended the process. If it comes to one example at a time and still does not fit: "
        "`gradient_checkpointing: true`, a lower `max_length`, `tune: qlora`, or a smaller model.",
    ),
    Said(
        quoted="is not finite",
        means="That update is left out, nothing of it enters weights or moments, and the rows that are at fault by "
        f"themselves are named. After {IN_A_ROW} in a row (or 2 at the run's end) the run goes back to its newest "
        f"checkpoint with half the rate, at most {MOST_RETURNS} times, where the advice chose the rate; where the "
        "rate is yours it stops, for your values are not changed. `on_nonfinite` says which you want.",
    ),
    Said(
        quoted="trained weights are not finite",
        means="No row can be blamed: a fault of the memory, or of a kernel. The weights are taken from the newest "
        "checkpoint.",
    ),
    Said(
        quoted="could not be written",
        means="The disk is full, read-only or failing. Older checkpoints stay as they are, training goes on, the next "
        "save tries again. If the result itself cannot be written, the run ends with exit code 1; make room and "
        "`welltuned resume RUN`.",
    ),
    Said(
        quoted="metrics.jsonl cannot be written",
        means="Its lines wait in memory and are written once the disk takes them.",
    ),
    Said(
        quoted="was set aside as",
        means="A checkpoint did not verify: cut short, changed, or of another run. It was moved to "
        "checkpoints/damaged with its reason, and the one before is used. Nothing is deleted.",
    ),
    Said(
        quoted="--accept-changes",
        means="Recipe, plan, data, base model or tokenizer are not what they were when the run began. Put them back, "
        "or say that you want to go on with what is there now.",
    ),
    Said(
        quoted="is at work on this run",
        means="Another process holds the run; two would destroy each other's files. A process that died holds nothing.",
    ),
    Said(
        quoted="this update is finished and saved first",
        means="Ctrl-C, SIGTERM or SIGHUP: once more ends it at once, and loses what came after the last checkpoint.",
    ),
)

_HEAD = """# When it goes wrong

What a run says when something is wrong, what that means, and what to change. A finding is printed, and kept in
metrics.jsonl (`"event": "finding"`) and in run.json (`findings`) with its number, its likely cause, and in `changes`
the exact recipe keys with values computed for that run. A **hint** is worth knowing, a **warning** wants mending in the
next run, an **error** means that this run is lost.

This page is made from the code's own words and thresholds, and a test holds it to them:
`python -m welltuned.training.monitor.page > docs/when_it_goes_wrong.md`.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for title, entries in ENTRIES.items():
        parts += [f"## {title}\n", *(_section(entry) for entry in entries)]
    parts.append("## What a run deals with itself\n")
    parts += [f"**“… {said.quoted} …”** {said.means}\n" for said in SAID]
    return "\n".join(parts)


def _section(entry: Entry) -> str:
    causes = "; ".join(entry.causes)
    lines = [f"### {entry.id}\n", f"*Told when:* {_filled(entry.when)}\n", f"{entry.means}\n", f"*Likely:* {causes}.\n"]
    keys = ", ".join(f"`{key}`" for key in entry.keys) + "." if entry.keys else ""
    lines.append(f"*Change:* {' '.join(part for part in (keys, entry.besides) if part)}\n")
    return "\n".join(lines)


def _filled(text: str) -> str:
    """Thresholds in the place of their names; `:share` as a percentage."""
    for part in text.split("{")[1:]:
        name, _, how = part.partition("}")[0].partition(":")
        value = f"{limit(name):.0%}" if how == "share" else shown(limit(name))
        text = text.replace("{" + part.partition("}")[0] + "}", value)
    return text


if __name__ == "__main__":
    print(page(), end="")
