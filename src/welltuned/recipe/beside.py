"""Keys beside each other: those that contradict each other, or that nothing would read."""

from collections.abc import Mapping

from welltuned.errors import InputError
from welltuned.recipe.check import Setting
from welltuned.recipe.keys import (
    DPO_LOSSES,
    FULL_SHARD,
    GRPO_LOSSES,
    LORA_KEYS,
    LOSS_KEYS,
    METHOD_KEYS,
    OPTIMIZERS_8BIT,
    UNSERVED,
    VARIANTS,
    Method,
    Tune,
)


def refuse_ignored_keys(given: Mapping[str, Setting]) -> None:
    """A value that nothing would read is an error, not a surprise after the run; so is one that another contradicts."""
    method = given["method"].value if "method" in given else Method.SFT
    tune = given["tune"].value if "tune" in given else Tune.LORA
    for key, setting in given.items():
        if key in LORA_KEYS and tune is Tune.FULL:
            raise InputError(f"{key} has no meaning with tune: full", where=setting.where, mend="remove one of the two")
        if key in METHOD_KEYS and method not in METHOD_KEYS[key]:
            readers = ", ".join(sorted(METHOD_KEYS[key]))
            raise InputError(f"{key} is not read by method {method}", where=setting.where, mend=f"only by: {readers}")
    for key, why in (("eval_fraction", "names held-out rows"), ("group_by", "names held-out rows, so none are split")):
        if "eval_data" in given and key in given:
            raise InputError(f"{key} is set although eval_data {why}", where=given[key].where, mend="keep one")
    if "adapter" in given and tune is Tune.FULL:
        raise InputError(
            "adapter has no meaning with tune: full", where=given["adapter"].where, mend="remove one of the two"
        )
    _check_variants(given, method, tune)
    _check_mixture(given)
    _check_loss(given)
    _check_objective(given, method)
    _check_memory(given, tune)
    _check_server(given, tune)
    _check_pieces(given, method, tune)


def _check_pieces(given: Mapping[str, Setting], method: Method, tune: Tune) -> None:
    """What cannot be trained of a model in pieces."""
    if "fsdp" not in given or given["fsdp"].value != FULL_SHARD:
        return
    start = given["init_lora_weights"].value if "init_lora_weights" in given else True
    where = given["fsdp"].where
    if tune is Tune.QLORA:
        what = "fsdp: full_shard would change 4-bit weights on their way between processes (bitsandbytes #1945)"
        raise InputError(what, where=where, mend="use tune: lora with it, or tune: qlora with fsdp: none")
    if method is not Method.SFT:
        what = f"fsdp: full_shard trains method sft; {method} asks more of a model than a pass"
        raise InputError(what, where=where, mend="use fsdp: none; tune: qlora needs a quarter of the memory")
    if tune is Tune.FULL and "optim" in given and given["optim"].value in OPTIMIZERS_8BIT:
        what = "of a model in pieces the blocks of 8-bit moments would depend on the number of processes"
        raise InputError(what, where=where, mend="use optim: adamw, whose moments are shared by the processes")
    if "torch_compile" in given and given["torch_compile"].value:
        what = "layers of a model in pieces are not compiled"
        raise InputError(what, where=given["torch_compile"].where, mend="remove one of the two")
    if start not in (True, "gaussian"):
        what = f"init_lora_weights {start} starts at a part of whole weights, and with fsdp: full_shard none is whole"
        raise InputError(what, where=where, mend="remove one of the two")


def _check_memory(given: Mapping[str, Setting], tune: Tune) -> None:
    """Recomputing that contradicts itself, and a 4-bit base where there is none."""
    if "dense_base" in given and tune is not Tune.QLORA:
        what = "dense_base says how a 4-bit base is kept, and only tune: qlora has one"
        raise InputError(what, where=given["dense_base"].where, mend="remove one of the two")
    again = {key: given[key].value for key in ("gradient_checkpointing", "checkpointed_layers") if key in given}
    if len({bool(value) for value in again.values()}) > 1:
        what = "gradient_checkpointing and checkpointed_layers contradict each other"
        raise InputError(what, where=given["checkpointed_layers"].where, mend="remove one of the two")
    if "offload_checkpoints" in given and given["offload_checkpoints"].value and not all(again.values()):
        what = "offload_checkpoints moves what goes into recomputed layers, and none is recomputed"
        raise InputError(what, where=given["offload_checkpoints"].where, mend="remove it")


def _check_server(given: Mapping[str, Setting], tune: Tune) -> None:
    """A vLLM server samples with plain LoRA adapters on its own copy of the base."""
    server, clip = "vllm_server_base_url", "vllm_importance_sampling_clip_max"
    if server not in given:
        if clip in given:
            raise InputError(f"{clip} is read only with {server}", where=given[clip].where, mend="remove it")
        return
    if tune is Tune.FULL:
        what = "a vLLM server is given adapters, and tune: full trains the base that it holds"
        raise InputError(what, where=given[server].where, mend="use tune: lora, or remove it")
    asked = {key: given[key].value for key in UNSERVED if key in given}
    asked |= {"bias": given["bias"].value} if "bias" in given and given["bias"].value != "none" else {}
    for key, value in asked.items():
        if value:
            what = f"vLLM does not load adapters with {key}"
            raise InputError(what, where=given[key].where, mend="remove one of the two")


def _check_variants(given: Mapping[str, Setting], method: Method, tune: Tune) -> None:
    """Variants of LoRA that cannot stand beside each other."""

    def clash(key: str, what: str, mend: str) -> None:
        raise InputError(what, where=given[key].where, mend=mend)

    start = given["init_lora_weights"].value if "init_lora_weights" in given else True
    dora = "use_dora" in given and given["use_dora"].value
    if start == "loftq" and tune is not Tune.QLORA:
        clash("init_lora_weights", "loftq starts at what 4 bits lose", "use tune: qlora with it")
    if dora and start not in (True, "gaussian"):
        clash("use_dora", f"DoRA does not start from {start} here", "remove one of the two")
    if dora and "lora_dropout" in given and given["lora_dropout"].value:
        clash("use_dora", "DoRA has no dropout here, which would act on the base weights too", "set lora_dropout: 0")
    if "embedding_learning_rate" in given and "modules_to_save" not in given:
        clash("embedding_learning_rate", "embedding_learning_rate has no modules to train", "name modules_to_save")
    if "modules_to_save" in given and method is Method.REWARD:
        clash("modules_to_save", "a reward model trains its own head", "remove it")
    for key in sorted(VARIANTS & given.keys()):
        if "adapter" in given:
            clash(key, f"{key} is the adapter's own that training goes on from", "remove one of the two")


def _check_mixture(given: Mapping[str, Setting]) -> None:
    if "data_weights" in given and "data_rows" in given:
        what = "data_weights and data_rows both say how much of each dataset an epoch takes"
        raise InputError(what, where=given["data_rows"].where, mend="keep one")
    data = given["data"].value
    datasets = 1 if isinstance(data, str) else len(data)
    for key in ("data_weights", "data_rows"):
        if key in given and len(given[key].value) != datasets:
            numbers, sets = (_counted(n, w) for n, w in ((len(given[key].value), "number"), (datasets, "dataset")))
            raise InputError(f"{key} has {numbers} for {sets}", where=given[key].where, mend="give one for each")
    if "data_weights" in given and datasets == 1:
        raise InputError("data_weights has no meaning with one dataset", where=given["data_weights"].where)


def _check_loss(given: Mapping[str, Setting]) -> None:
    if "loss_on" not in given or "assistant_only_loss" not in given:
        return
    loss_on, answers_only = given["loss_on"].value, given["assistant_only_loss"].value
    if answers_only != (loss_on != "everything"):
        what = f"loss_on {loss_on} contradicts assistant_only_loss {str(answers_only).lower()}"
        raise InputError(what, where=given["loss_on"].where, mend="remove one of the two")


def _check_objective(given: Mapping[str, Setting], method: Method) -> None:
    """The form of the loss, what only some forms read, and one weight for each reward."""
    if "loss_type" in given:
        name, where = given["loss_type"].value, given["loss_type"].where
        forms = DPO_LOSSES if method is Method.DPO else GRPO_LOSSES
        if name not in forms:
            raise InputError(f"loss_type {name} is none of {method}'s", where=where, mend=f"one of {', '.join(forms)}")
    form = given["loss_type"].value if "loss_type" in given else DPO_LOSSES[0]
    for key, forms_of_key in LOSS_KEYS.items():
        if key in given and form not in forms_of_key:
            mend = f"only by: {', '.join(sorted(forms_of_key))}"
            raise InputError(f"{key} is not read by loss_type {form}", where=given[key].where, mend=mend)
    if "reward_weights" in given:
        weights, where = given["reward_weights"].value, given["reward_weights"].where
        rewards = given["rewards"].value if "rewards" in given else ()
        if len(weights) != len(rewards):
            numbers = f"{_counted(len(weights), 'number')} for {_counted(len(rewards), 'reward')}"
            raise InputError(f"reward_weights has {numbers}", where=where, mend="give one for each")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
