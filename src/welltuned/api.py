"""welltuned from Python: the commands as functions.

import welltuned
result = welltuned.train(model="HuggingFaceTB/SmolLM2-135M-Instruct", data="tickets.jsonl", out="runs/tickets")
tuned = welltuned.load("runs/tickets")
print(tuned.reply("My kettle leaks."))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from welltuned.adapters import average as averaging
from welltuned.adapters import scale as scaling
from welltuned.adapters.files import AdapterFile, read_adapter, save
from welltuned.adapters.gguf.write import Quantization
from welltuned.adapters.merge import DTYPES, Merged
from welltuned.adapters.place import folder_size, written_whole
from welltuned.advice.plan import Plan
from welltuned.data.conversation import Conversation, Message
from welltuned.data.render import render_prompt
from welltuned.errors import InputError
from welltuned.finished import find as finding
from welltuned.finished.export import Exported, Options, Target, export_run, merge_run
from welltuned.finished.judge import Judgement, judge_run
from welltuned.finished.proof import Proof, prove, require_as_planned
from welltuned.finished.scores import Metric
from welltuned.models.generate import Decoding, replies
from welltuned.models.lora import AdapterBank
from welltuned.models.resolve import NO_TRUST
from welltuned.models.tokenizer import in_short
from welltuned.recipe import KEYS, Trust, load_recipe
from welltuned.report.page import write_report as write_page
from welltuned.search.arms import question_of
from welltuned.search.events import SearchObserver, unheard
from welltuned.search.sweep import SweepResult, is_sweep, resume_sweep
from welltuned.search.sweep import sweep as sweep_prepared
from welltuned.training.checkpoint import checkpoints
from welltuned.training.events import Note, Observer, silent
from welltuned.training.inspection import SHOWN, Inspection
from welltuned.training.inspection import inspect as inspect_recipe
from welltuned.training.prepare import prepare
from welltuned.training.prepare_together import prepare_together
from welltuned.training.ranks import joined
from welltuned.training.result import RunResult
from welltuned.training.resume import resume as resume_run
from welltuned.training.run import train as train_prepared
from welltuned.training.rundir import require_free


def plan(recipe: str | None = None, **options: Any) -> Plan:
    """Everything that a run would do, without loading weights.

    Args:
        recipe: path of a recipe file.
        options: recipe keys (`model`, `data`, `tune`, ...) and hyperparameters (`learning_rate`, `r`, ...).

    Raises:
        InputError: an unknown key, or anything that training could not use.
    """
    return prepare(_recipe(recipe, options), weights_needed=False).plan


def inspect(recipe: str | None = None, *, show: int = SHOWN, rows: Sequence[str] = (), **options: Any) -> Inspection:
    """What the data would teach, without training: counts, lengths, findings, and rows as runs of trained text or not.

    Args:
        recipe: path of a recipe file.
        show: how many rows to choose.
        rows: rows to show instead: origins such as `train.jsonl:7`, or the numbers in them.
        options: as in `plan`. What training would refuse is in the result, whose `blocked` is then true.

    Raises:
        InputError: as in `plan`, for data that cannot be read at all.
    """
    return inspect_recipe(_recipe(recipe, options), show=show, rows=rows)


def train(recipe: str | None = None, *, out: str | Path, observer: Observer = silent, **options: Any) -> RunResult:
    """Plan and train, and write the Run to `out`, with its page; options as in `plan`.

    In processes that torchrun started, they share the run: all of them call this, and the first one writes.
    """
    asked = _recipe(recipe, options)
    with joined() as ranks:
        ranks.first(lambda: require_free(Path(out)))
        prepared = prepare_together(lambda: prepare(asked), ranks)
        result = train_prepared(prepared, Path(out), observer, ranks=ranks)
        ranks.first(lambda: _report(result, observer))
    return result


def _report(result: RunResult, observer: Callable[[Note], None]) -> None:
    """Write its page beside it; that this fails is told and no reason to lose a result."""
    try:
        write_page(result.path)
    except Exception as error:
        observer(Note(f"there is no report ({in_short(error)}); once more: welltuned report {result.path}"))


def write_report(run: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's page, finished or not, with the curves of others laid over its own; where it lies."""
    return write_page(Path(run), [Path(other) for other in others], None if out is None else Path(out))


def sweep(
    recipe: str | None = None,
    *,
    out: str | Path,
    arms: int | None = None,
    over: Sequence[str] = (),
    trials: int | None = None,
    minutes: float | None = None,
    ray: str | None = None,
    workers: int | None = None,
    observer: SearchObserver = unheard,
    **options: Any,
) -> SweepResult:
    """Try learning rates (or what `over` names, such as "r=8,32") on one base at once; the winner's Run is in `out`.

    Args:
        arms: how many are tried at once; None for three rates.
        trials: how many arms Optuna may choose, from three dimensions or one range ("r=8..64") on.
        minutes: what the search may take.
        ray: a Ray cluster to spread the arms over: its address, or "local". workers: how many there.
        options: as in `plan`.
    """
    asked = _recipe(recipe, options)
    question = question_of(arms, over, trials, minutes)
    require_free(Path(out))
    result = sweep_prepared(prepare(asked), question, Path(out), observer, ray=ray, workers=workers)
    _report(result.run, observer)
    return result


def resume(run: str | Path, *, observer: Observer = silent, accept_changes: bool = False) -> RunResult:
    """Finish a run that was interrupted, from its newest sound checkpoint.

    Args:
        run: the directory that `train` was given as `out`.
        accept_changes: go on although recipe, data, base model or tokenizer changed since.

    Raises:
        InputError: there is no unfinished run, or something changed.
    """
    if is_sweep(Path(run)):
        searched = resume_sweep(Path(run), accept_changes=accept_changes).run
        _report(searched, observer)
        return searched
    with joined() as ranks:
        result = resume_run(Path(run), observer, accept_changes=accept_changes, ranks=ranks)
        ranks.first(lambda: _report(result, observer))
    return result


def _recipe(path: str | None, options: dict[str, Any]) -> Any:
    unknown = [key for key in options if key not in KEYS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no recipe key", mend=f"known keys: {', '.join(KEYS)}")
    return load_recipe(path, options)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuned model, ready to answer.

    Attributes:
        bank: its adapter, None after full fine-tuning.
        chat_template: the template that it was trained with; None for plain text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bank: AdapterBank | None
    chat_template: str | None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant begins, as in training."""
        return render_prompt(Conversation(tuple(messages), "the prompt"), self.tokenizer, self.chat_template)

    def reply(self, text: str, *, system: str | None = None, decoding: Decoding | None = None) -> str:
        """The answer to one message; greedy unless `decoding` says otherwise."""
        messages = [Message("system", system)] if system is not None else []
        return replies(self.model, self.tokenizer, [self.prompt([*messages, Message("user", text)])], decoding)[0]


def load(run: str | Path, *, device: str | None = None, trust: Trust = NO_TRUST) -> Tuned:
    """The tuned model of a finished run, of an adapter's folder, or a whole model; in float32 on a CPU.

    `trust` must be given again: a Run's own files, which may come from a stranger, cannot grant it.
    """
    found = finding.find(run)
    if found.facts.get("method") == "reward":
        mend = "load it with transformers' AutoModelForSequenceClassification, with PEFT where it is an adapter"
        raise InputError("this Run is a reward model, which scores and does not answer", where=str(run), mend=mend)
    loaded = finding.load(found, device=device, trust=trust)
    return Tuned(loaded.model, loaded.tokenizer, loaded.bank, found.chat_template)


def load_base(run: str | Path, tuned: Tuned) -> Tuned:
    """What the run was before training: the same model where it carries an adapter, to be asked without it.

    Raises:
        InputError: the base of a whole model is not known.
    """
    if tuned.bank is not None:
        return tuned
    found = finding.find(run)
    if found.base is None:
        raise InputError("what this model was before is not known", where=str(run), mend="leave --base out")
    loaded = finding.load(replace(found, model=found.base), device=str(tuned.model.device))
    return Tuned(loaded.model, loaded.tokenizer, None, found.chat_template)


# ── after training ───────────────────────────────────────────────────────────────────────────────────────────────────

BASE = "base"  # the untuned model among what is averaged


def verify(run: str | Path, against: str | Path | None = None) -> Proof:
    """Compare every trained tensor with its checksum and its start, or with another's; see `Proof.problems`."""
    return prove(run, against)


def evaluate(
    run: str | Path, *, data: str | None = None, metrics: Sequence[str] = (), rows: int | None = None
) -> Judgement:
    """Held-out loss, and metrics of replies, of a run beside its base; of a model by itself with `data`."""
    return judge_run(finding.find(run), data=data, metrics=[Metric(m) for m in metrics], count=rows)


def scale(run: str | Path, *, by: float, out: str | Path) -> Path:
    """Write the adapter with alpha multiplied; 0.5 is the mean of the base's and the tuned weights."""
    found, adapter = _adapter_of(run)
    scaled = scaling.scale(adapter, by)
    with written_whole(Path(out), folder_size(adapter.folder)) as folder:
        save(scaled, folder, found.origin(f"adapter scale --by {by:g}", scaled_by=by))
    return Path(out)


def average(
    *runs: str | Path, out: str | Path, weights: Sequence[float] | None = None, rank: int | str | None = None
) -> averaging.Averaged:
    """Write the weighted mean of adapters of one base, among which the word `base` stands for the untuned model.

    Args:
        weights: one for each run, which sum to 1; None for equal ones.
        rank: of the result: a number, "sum" to lose nothing, None for the adapters' own.
    """
    shares = list(weights) if weights is not None else [1 / len(runs)] * len(runs)
    if len(shares) != len(runs) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        what = f"{len(runs)} weights from 0 on that sum to 1 are needed, and these are {shares}"
        raise InputError(what, where="--weights", mend="such as 0.5,0.5")
    if len(runs) < 2:
        raise InputError("one adapter has no mean", where="welltuned adapter average", mend="give another, or `base`")
    parts = [(_adapter_of(run), share) for run, share in zip(runs, shares, strict=True) if str(run) != BASE]
    if not parts:
        raise InputError("there is no adapter among them", where="welltuned adapter average")
    found = parts[0][0][0]
    wanted = averaging.Rank(rank) if isinstance(rank, str) else rank
    averaged = averaging.average([adapter for (_, adapter), _ in parts], [share for _, share in parts], wanted)
    of = ", ".join(f"{share:g} × {run}" for run, share in zip(runs, shares, strict=True))
    needs = sum(t.nbytes for t in averaged.adapter.tensors.values())
    with written_whole(Path(out), needs) as folder:
        save(averaged.adapter, folder, found.origin(f"adapter average: {of}"))
    return averaged


def average_checkpoints(
    run: str | Path, *, out: str | Path, decay: float, rank: int | str | None = None
) -> averaging.Averaged:
    """Write the mean of a run's checkpoints, each weighted by `decay` to the power of the updates that it lies back.

    Raises:
        InputError: there are fewer than two, or `decay` is not above 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise InputError(f"{decay:g} is no decay", where="--ema", mend="give a number above 0 and at most 1, as 0.99")
    kept = checkpoints(Path(run))
    if len(kept) < 2:
        mend = "train with a smaller save_steps and a larger save_total_limit, or with ema_decay"
        raise InputError(f"the run has {len(kept)} checkpoints", where=str(run), mend=mend)
    shares = [decay ** (kept[0][0] - step) for step, _ in kept]
    weights = [share / sum(shares) for share in shares]
    return average(*(folder for _, folder in kept), out=out, weights=weights, rank=rank)


def _adapter_of(run: str | Path) -> tuple[finding.Finished, AdapterFile]:
    found = finding.find(run)
    if found.adapter is None:
        raise InputError("this is a whole model, not an adapter", where=str(run), mend="give a run with an adapter")
    require_as_planned(found)
    return found, read_adapter(found.adapter, accept=("alpha_pattern",))


def merge(run: str | Path, *, out: str | Path, dtype: str = "bfloat16", base: str | None = None) -> Merged:
    """Merge a run's adapter into its base, one weight at a time, and compare the result with base and adapter."""
    return merge_run(finding.find(run), Path(out), Options(dtype=DTYPES[dtype], base=base))


def export(
    run: str | Path,
    *,
    to: str,
    out: str | Path,
    quantize: str = "f16",
    dtype: str = "bfloat16",
    base: str | None = None,
) -> Exported:
    """Hand a run on: `to` is peft, merged, gguf, lora-gguf or ollama."""
    options = Options(dtype=DTYPES[dtype], quantization=Quantization(quantize), base=base)
    return export_run(finding.find(run), Target(to), Path(out), options)
