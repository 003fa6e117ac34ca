"""One run of a script as a Config: what its calls say, and what they leave open."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from welltuned.advice.lint.config import Config, Form, KeyTrouble, Tool
from welltuned.interop.build import Draft
from welltuned.interop.known import config_keys, judge_key, keys_of, nearest
from welltuned.interop.trl import METHODS, NAMES, PEFT_ADAPTER, defaults
from welltuned.interop.values import Unreadable
from welltuned.recipe import Method, Tune

if TYPE_CHECKING:
    from welltuned.interop.script import Calls, Run

_TRAINER_METHODS = {owner.replace("Config", "Trainer"): method for owner, method in METHODS.items()}
_TRAINER_METHODS["UnslothTrainer"] = Method.SFT
_FAST = ("FastLanguageModel", "FastModel", "FastVisionModel")
_UNSLOTH_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.001,
    "warmup_ratio": 0.1,
}
_UNSLOTH_ADAPTER: Mapping[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
_TRAINER_WORDS = {  # of the trainer call itself, where older TRL and Unsloth take settings too
    "train_dataset": "data",
    "eval_dataset": "eval_data",
    "max_seq_length": "max_length",
    "packing": "packing",
    "dataset_text_field": "dataset_text_field",
    "beta": "beta",
    "max_length": "max_length",
}
_LORA_WORDS = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "target_parameters",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "modules_to_save",
        "bias",
    }
)
_MODEL_WORDS = {"model_name": "model", "pretrained_model_name_or_path": "model", "max_seq_length": "max_length"}
_MODEL_WORDS |= {
    "torch_dtype": "dtype",
    "dtype": "dtype",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
}
_MODEL_WORDS |= {"attn_implementation": "attn_implementation"}


def build_run(run: Run, calls: Calls, path: str) -> Config:
    tool = Tool.UNSLOTH if calls.unsloth else Tool.TRL
    draft = Draft(file=path, tool=tool, form=Form.SCRIPT, names=NAMES, line=run.line)
    draft.method = METHODS.get(run.owner) or _TRAINER_METHODS.get(run.trainer_name)
    draft.stage = run.trainer_name or run.owner
    draft.defaults |= _defaults(run, draft.method, calls.unsloth)
    _read_model(draft, run, calls)
    _read_adapter(draft, run, calls)
    if run.config is not None:
        _read_config(draft, run, run.config, calls)
    elif run.trainer is not None and any(word.arg == "args" for word in run.trainer.keywords):
        word = next(word for word in run.trainer.keywords if word.arg == "args")
        _leave_rest_open(draft, run, calls)
        draft.leave_open("args", "args", word.value.lineno, ast.unparse(word.value))
    if run.trainer is not None:
        _read_trainer(draft, run.trainer, calls)
    else:
        draft.note("no_trainer", "its trainer is not in the file", run.owner, run.line)
    _read_facts(draft, run, calls)
    return draft.finish()


def _defaults(run: Run, method: Method | None, unsloth: bool) -> dict[str, Any]:
    if run.owner == "TrainingArguments":
        found = {**defaults(None), "learning_rate": 5e-5}
        return found if run.trainer_name != "SFTTrainer" else found | {"max_length": 1024}
    found = defaults(method)
    if unsloth:
        found |= _UNSLOTH_DEFAULTS
        found.pop("max_length", None)
        found.pop("warmup_steps", None)
    return found


# ── words of calls ───────────────────────────────────────────────────────────────────────────────────────────────────


def _words(call: ast.Call, calls: Calls) -> Iterator[tuple[str, ast.expr, int]]:
    """Keyword arguments with their lines; `**name` is opened where the name is a dict of constants."""
    for word in call.keywords:
        if word.arg is not None:
            yield word.arg, word.value, word.value.lineno
            continue
        made = word.value
        if isinstance(made, ast.Name) and len(calls.names.assigned.get(made.id, [])) == 1:
            made = calls.names.assigned[made.id][0]
        if isinstance(made, ast.Dict):
            for key, value in zip(made.keys, made.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value, value.lineno
        elif isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id == "dict":
            yield from ((inner.arg, inner.value, inner.value.lineno) for inner in made.keywords if inner.arg)
        else:
            yield f"**{ast.unparse(word.value)}"[:60], word.value, word.value.lineno


def _take(draft: Draft, name: str, key: str, node: ast.expr, calls: Calls) -> None:
    """A setting from an expression: its value, or the note that it is open."""
    try:
        value = calls.names.value(node)
    except Unreadable:
        draft.leave_open(name, key, node.lineno, ast.unparse(node)[:80])
        return
    if value is not None:
        draft.put(name, value, key, node.lineno)


# ── the parts of a run ───────────────────────────────────────────────────────────────────────────────────────────────


def _leave_rest_open(draft: Draft, run: Run, calls: Calls) -> None:
    """The arguments come from elsewhere: none of the trainer's defaults is known to hold."""
    draft.rest_open = True
    for name in _defaults(run, draft.method, calls.unsloth):
        draft.defaults.pop(name, None)


def _read_config(draft: Draft, run: Run, call: ast.Call, calls: Calls) -> None:
    owner = run.owner
    known = config_keys(owner)
    for key, node, line in _words(call, calls):
        if key.startswith("**"):
            draft.leave_open(key, key, line, ast.unparse(node)[:80])
            _leave_rest_open(draft, run, calls)
            continue
        _take(draft, draft.neutral(key), key, node, calls)
        _judge(draft, key, line, (owner, "TrainingArguments"), known, owner)
    for (name, attribute), values in calls.names.attributes.items():  # training_args.learning_rate = 1e-4
        if calls.names.assigned.get(name, [None])[-1] is call and attribute in known:
            draft_value = values[-1] if len(values) == 1 else ast.Name("?", ast.Load(), lineno=values[-1].lineno)
            _take(draft, draft.neutral(attribute), attribute, draft_value, calls)


def _judge(draft: Draft, key: str, line: int, owners: tuple[str, ...], known: frozenset[str], name: str) -> None:
    bad = judge_key(key, line, owners, known, name)
    if bad is None or (bad.trouble is KeyTrouble.UNKNOWN and key in known):
        return
    if draft.tool is Tool.UNSLOTH:  # takes several releases of TRL, and adds fields of its own
        if bad.trouble is not KeyTrouble.UNKNOWN or nearest(key, known, cutoff=0.85) is None:
            return
        if key.endswith(("_ratio", "_seq_length", "_learning_rate")) or key.startswith(("unsloth", "vllm")):
            return
    draft.bad_keys.append(bad)


def _read_trainer(draft: Draft, call: ast.Call, calls: Calls) -> None:
    name = calls.names.called(call)
    known = keys_of(name) if name in _KNOWN_TRAINERS else None
    for key, node, line in _words(call, calls):
        neutral = _TRAINER_WORDS.get(key)
        empty = isinstance(node, ast.Constant) and node.value is None
        if neutral == "eval_data" and not empty:
            draft.put("eval_data", True, key, line)
        elif neutral == "data" and not empty:
            _data_of(draft, node, line, calls)
        elif neutral and not empty and neutral not in draft.settings:
            _take(draft, neutral, key, node, calls)
        if known is not None and draft.tool is Tool.TRL and not key.startswith("**"):
            _judge(draft, key, line, ("Trainer",), known, name)
    if call.args and "model" not in draft.settings and isinstance(call.args[0], ast.Constant):
        _take(draft, "model", "model", call.args[0], calls)
    model = next((word.value for word in call.keywords if word.arg == "model"), None)
    if model is not None and calls.names.call_of(model) is None and "model" not in draft.settings:
        try:
            value = calls.names.value(model)
        except Unreadable:
            return
        if isinstance(value, str):
            draft.put("model", value, "model", model.lineno)


_KNOWN_TRAINERS = ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "KTOTrainer", "RewardTrainer", "RLOOTrainer")


def _data_of(draft: Draft, node: ast.expr, line: int, calls: Calls) -> None:
    """The data file, where the dataset comes straight from load_dataset("json", data_files="train.jsonl")."""
    made = calls.names.call_of(node)
    if made is None or calls.names.called(made) != "load_dataset":
        return
    files = next((word.value for word in made.keywords if word.arg == "data_files"), None)
    try:
        value = calls.names.value(files if files is not None else made.args[0])
    except (Unreadable, IndexError):
        return
    if isinstance(value, str):
        draft.put("data", value, "train_dataset", line)


def _read_model(draft: Draft, run: Run, calls: Calls) -> None:
    call = _model_call(run, calls)
    if call is None:
        return
    owner = call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) else ""
    if owner in _FAST:
        draft.defaults["load_in_4bit"] = True
    if call.args:
        _take(draft, "model", "model", call.args[0], calls)
    for key, node, line in _words(call, calls):
        if key in _MODEL_WORDS:
            _take(draft, _MODEL_WORDS[key], key, node, calls)
        elif key == "full_finetuning":
            _take(draft, "full_finetuning", key, node, calls)
        elif key == "quantization_config":
            _read_quantisation(draft, calls.names.call_of(node), node, calls)
        if owner.startswith("AutoModel"):
            bad = judge_key(key, line, ("from_pretrained",), frozenset({key}), "from_pretrained")
            if bad is None:
                bad = judge_key(key, line, ("from_pretrained",), frozenset(), "from_pretrained")
            if bad is not None and bad.trouble is not KeyTrouble.UNKNOWN:
                draft.bad_keys.append(bad)


def _model_call(run: Run, calls: Calls) -> ast.Call | None:
    """The from_pretrained call of a model, not of a tokenizer: the last one before the trainer."""
    found = []
    for call in calls.parts.get("from_pretrained", []):
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        name = owner.id if isinstance(owner, ast.Name) else ""
        if "Tokenizer" not in name and "Processor" not in name and ("Model" in name or name in _FAST):
            found.append(call)
    before = [call for call in found if call.lineno <= run.line]
    return before[-1] if before else found[0] if found else None


def _read_quantisation(draft: Draft, call: ast.Call | None, node: ast.expr, calls: Calls) -> None:
    if call is None or calls.names.called(call) != "BitsAndBytesConfig":
        draft.leave_open("load_in_4bit", "quantization_config", node.lineno, ast.unparse(node)[:80])
        return
    draft.note("quantised_by", "BitsAndBytesConfig", "quantization_config", call.lineno)
    for key, value, _ in _words(call, calls):
        _take(draft, key, key, value, calls)


def _read_adapter(draft: Draft, run: Run, calls: Calls) -> None:
    quantised = _quantised(draft)
    call = _adapter_call(run, calls)
    if call is not None:
        fast = calls.names.called(call) == "get_peft_model"
        draft.defaults |= _UNSLOTH_ADAPTER if fast else PEFT_ADAPTER
        draft.tune = None if quantised is None else Tune.QLORA if quantised else Tune.LORA
        if quantised is None:
            draft.tune = Tune.LORA
        for key, node, line in _words(call, calls):
            if key in _LORA_WORDS:
                _take(draft, key, key, node, calls)
            elif key.startswith("**"):
                for name in _LORA_WORDS:
                    draft.leave_open(name, key, line, ast.unparse(node)[:80])
            if not fast:
                _judge(draft, key, line, (), keys_of("LoraConfig"), "LoraConfig")
        return
    if draft.value("full_finetuning") is True:
        draft.tune = Tune.FULL
        return
    open_peft = _given_adapter(run) is not None
    unused = _unused_adapter(calls)
    if unused is not None:
        draft.note("adapter_unused", "it is never passed on", "LoraConfig", unused.lineno)
    if not calls.unsloth and not open_peft and "get_peft_model" not in calls.parts and "LoraConfig" not in calls.parts:
        draft.tune = Tune.FULL if run.config is not None else None
    elif unused is not None:
        draft.tune = Tune.FULL


def _quantised(draft: Draft) -> bool | None:
    if "load_in_4bit" in draft.unread:
        return None
    four = draft.value("load_in_4bit") if "load_in_4bit" in draft.settings else draft.defaults.get("load_in_4bit")
    return bool(four)


def _given_adapter(run: Run) -> ast.expr | None:
    """What the trainer is given as peft_config; None where it is given none."""
    for word in run.trainer.keywords if run.trainer is not None else ():
        if word.arg == "peft_config" and not (isinstance(word.value, ast.Constant) and word.value.value is None):
            return word.value
    return None


def _adapter_call(run: Run, calls: Calls) -> ast.Call | None:
    """The LoraConfig that the trainer or get_peft_model is given, or Unsloth's get_peft_model itself."""
    given = _given_adapter(run)
    if given is not None:
        call = calls.names.call_of(given)
        return call if call is not None and calls.names.called(call) == "LoraConfig" else None
    wrap = calls.part("get_peft_model", run.line)
    if wrap is None:
        return None
    if isinstance(wrap.func, ast.Attribute) and isinstance(wrap.func.value, ast.Name) and wrap.func.value.id in _FAST:
        return wrap
    for node in [*wrap.args, *(word.value for word in wrap.keywords)]:
        call = calls.names.call_of(node)
        if call is not None and calls.names.called(call) == "LoraConfig":
            return call
    return None


def _unused_adapter(calls: Calls) -> ast.Call | None:
    """A LoraConfig whose name is never read again."""
    loads = {node.id for node in ast.walk(calls.tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for call in calls.parts.get("LoraConfig", []):
        names = [name for name, values in calls.names.assigned.items() if call in values]
        if names and not loads & set(names):
            return call
    return None


def _read_facts(draft: Draft, run: Run, calls: Calls) -> None:
    """What a script does besides setting values."""
    for name in ("merge_and_unload", "save_pretrained_merged", "train_on_responses_only", "EarlyStoppingCallback"):
        for call in calls.parts.get(name, []):
            draft.note(name, ast.unparse(call)[:80], name, call.lineno)
    for call in calls.parts.get("DataCollatorForLanguageModeling", []):
        words = {key: node for key, node, _ in _words(call, calls)}
        mlm = words.get("mlm")
        if isinstance(mlm, ast.Constant) and mlm.value is False:
            draft.note("lm_collator", "mlm=False", "DataCollatorForLanguageModeling", call.lineno)
    for (_, attribute), values in calls.names.attributes.items():
        for value in values:
            same = isinstance(value, ast.Attribute) and value.attr == attribute.replace("pad_", "eos_")
            if attribute in ("pad_token", "pad_token_id") and same:
                draft.note("pad_is_eos", ast.unparse(value), attribute, value.lineno)
    for node in ast.walk(calls.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl":
            for alias in node.names:
                if draft.tool is Tool.TRL and (mend := _GONE_FROM_TRL.get(alias.name)) and node.module == "trl":
                    draft.note(f"gone:{alias.name}", mend, alias.name, node.lineno)


_MASKING = "set `completion_only_loss` or `assistant_only_loss` in SFTConfig; the data says where the answer starts"
_GONE_FROM_TRL = {
    "DataCollatorForCompletionOnlyLM": _MASKING,
    "ConstantLengthDataset": "set `packing=True` in SFTConfig",
    "setup_chat_format": "use `clone_chat_template`",
    "ORPOTrainer": "import it from `trl.experimental.orpo`",
    "ORPOConfig": "import it from `trl.experimental.orpo`",
    "CPOTrainer": "import it from `trl.experimental.cpo`",
    "CPOConfig": "import it from `trl.experimental.cpo`",
    "OnlineDPOTrainer": "import it from `trl.experimental.online_dpo`",
    "OnlineDPOConfig": "import it from `trl.experimental.online_dpo`",
    "GKDTrainer": "import it from `trl.experimental.gkd`",
    "GKDConfig": "import it from `trl.experimental.gkd`",
    "PPOTrainer": "use RLOOTrainer or GRPOTrainer",
    "PPOConfig": "use RLOOConfig or GRPOConfig",
    "AutoModelForCausalLMWithValueHead": "use RLOOTrainer or GRPOTrainer, which need no value head",
    "get_kbit_device_map": "leave the placement to the trainer",
}
