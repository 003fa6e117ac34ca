"""welltuned's own recipes, read for linting. Whatever `load_recipe` refuses is an error here as well."""

from welltuned.advice.lint.config import BadKey, Config, KeyTrouble, Tool
from welltuned.advice.rules import number
from welltuned.errors import InputError
from welltuned.interop.build import draft_of, judge_keys
from welltuned.interop.yaml_file import YamlFile
from welltuned.recipe import AUTO, KEYS, Method, Tune, load_recipe


def read_ours(yaml: YamlFile, file: str) -> Config:
    draft = draft_of(yaml, file, Tool.WELLTUNED, {})
    for name in [name for name, setting in draft.settings.items() if setting.value == AUTO]:
        del draft.settings[name]
    method, tune = draft.value("method") or "sft", draft.value("tune") or "lora"
    draft.method = Method(method) if method in list(Method) else None
    draft.tune = Tune(tune) if tune in list(Tune) else None
    # What is left out is chosen by the advice, and rows are held out without being asked for.
    draft.defaults |= {"eval_strategy": "steps", "eval_data": True, "lora_alpha": number("lora_alpha")}
    if draft.value("loss_on") == "everything" or draft.value("assistant_only_loss") is False:
        name = "loss_on" if "loss_on" in draft.settings else "assistant_only_loss"
        draft.put("train_on_prompt", True, name, draft.settings[name].line)
    judge_keys(draft, yaml.entries, (), frozenset(KEYS), "welltuned")
    if not draft.bad_keys:
        _ask_the_reader(file, draft.bad_keys)
    return draft.finish()


def _ask_the_reader(file: str, bad: list[BadKey]) -> None:
    try:
        load_recipe(file)
    except InputError as error:
        where = (error.where or "").rpartition(":")[2]
        line = int(where) if where.isdigit() else 1
        trouble = KeyTrouble.IGNORED
        bad.append(
            BadKey(trouble=trouble, key="recipe", line=line, owner="welltuned", mend=error.mend or "", why=error.what)
        )
