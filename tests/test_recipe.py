import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.errors import InputError
from welltuned.recipe import (
    FIELDS,
    HYPERPARAMETERS,
    KEYS,
    POLICIES,
    Method,
    Recipe,
    Tune,
    load_recipe,
    parse_memory,
    recipe_to_dict,
    recipe_to_yaml,
)

BASE = {"model": "org/name", "data": "train.jsonl"}


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def fails(*, path=None, options=None, sets=()) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, options, sets)
    return str(caught.value)


def test_file_options_and_sets_in_order_of_precedence(recipe_file):
    path = recipe_file("model: a/b\ndata: d.jsonl\nr: 8\nseed: 1\nlearning_rate: 2e-4\n")
    recipe = load_recipe(path, {"model": "c/d", "tune": "qlora", "memory": "24GB", "seed": None}, ["r=64", "seed=2"])
    assert recipe == Recipe(
        model="c/d",
        data="d.jsonl",
        tune=Tune.QLORA,
        memory=24 * 10**9,
        hyperparameters={"r": 64, "seed": 2, "learning_rate": 2e-4},
    )


def test_auto_is_unset(recipe_file):
    path = recipe_file("model: a/b\ndata: d\nlearning_rate: auto\nmethod: auto\nr: 8\n")
    recipe = load_recipe(path, {}, ["r=auto"])
    assert recipe.hyperparameters == {} and recipe.method is Method.SFT


def test_unknown_key_names_line_and_nearest(recipe_file):
    path = recipe_file("model: a/b\ndata: d\n\nlerning_rate: 1e-4\n")
    assert fails(path=path) == f"{path}:4: unknown key 'lerning_rate'; did you mean 'learning_rate'?"
    assert "--set: unknown key 'lora_alhpa'; did you mean 'lora_alpha'?" in fails(options=BASE, sets=["lora_alhpa=1"])
    assert "did you mean" not in fails(options=BASE, sets=["zzz=1"])


@pytest.mark.parametrize("key", ["fsdp_config", "deepspeed"])
def test_what_cuts_a_model_in_pieces_is_refused_with_what_there_is(key):
    text = fails(options=BASE, sets=[f"{key}=full_shard"])
    assert f"'{key}' is not built" in text and "torchrun" in text and "fsdp: full_shard" in text
    assert "it must be one of none, full_shard" in fails(options=BASE, sets=["fsdp=auto_wrap"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate: -1e-4", "learning_rate is -0.0001; it must be above 0"),
        ("learning_rate: fast", "learning_rate takes a number and got 'fast'"),
        ("learning_rate: .inf", "learning_rate is inf"),
        ("learning_rate:", "learning_rate has no value; write `learning_rate: auto`"),
        ("learning_rate: {a: 1}", "do not nest"),
        ("r: 0", "r is 0; it must be above 0"),
        ("r: 1.5", "r takes a whole number and got 1.5"),
        ("r: true", "r takes a whole number and got True"),
        ('r: "16"', "r takes a whole number and got '16'"),
        ("lora_dropout: 1.0", "lora_dropout is 1; it must be at least 0 and below 1"),
        ("use_rslora: 1", "use_rslora takes true or false and got 1"),
        ("lr_scheduler_type: triangle", "it must be one of linear, cosine"),
        ("optim: sgd", "it must be one of adamw"),
        ("dtype: float16", "it must be one of float32, bfloat16"),
        ("method: sfx", "unknown method 'sfx'; did you mean 'sft'?"),
        ("tune: prefix", "unknown tune 'prefix'; it must be one of lora, qlora, full"),
        ("target_modules: []", "target_modules takes module names"),
        ("target_modules: [1]", "target_modules takes module names"),
        ("seed: -1", "it must be between 0 and 4294967295"),
        ("eval_fraction: 1", "it must be above 0 and below 1"),
        ("memory: lots", "memory 'lots' is not a size"),
        ("beta: 0.1", "beta is not read by method sft"),
        ("max_length: 1", "max_length is 1; it must be 2 or more"),
        ("on_bad_row: keep", "on_bad_row is 'keep'; it must be one of error, drop"),
        ("on_duplicate: delete", "on_duplicate is 'delete'; it must be one of error, drop, keep"),
        ("on_duplicates: drop", "unknown key 'on_duplicates'; did you mean 'on_duplicate'?"),
        ("loss_on: prompt", "loss_on is 'prompt'; it must be one of assistant, last, everything"),
        ("data_rows: 0", "data_rows is 0; it must be above 0"),
        ("data_rows: 1.5", "data_rows takes a whole number and got 1.5"),
        ("data_rows: [10, 20]", "data_rows has 2 numbers for 1 dataset; give one for each"),
        ("data_weights: [1]", "data_weights has no meaning with one dataset"),
        ("data_weights: [a]", "data_weights takes a number and got 'a'"),
        ("eval_data: []", "eval_data is an empty list"),
        ("map: prompt", "'prompt' is not of the form ours=theirs; such as prompt=Frage"),
        ("map: [a=b, a=c]", "map names a column for 'a' twice"),
        ("group_by:", "group_by has no value"),
        ("data: e\nr: 1\nr: 2", "r is set twice, first in line 4"),
    ],
)
def test_wrong_values_name_key_and_line(recipe_file, line, words):
    path = recipe_file(f"model: a/b\n{'data: d' if not line.startswith('data:') else ''}\n{line}\n")
    message = fails(path=path)
    assert words in message and message.startswith(f"{path}:"), message
    assert f"{path}:{5 if 'set twice' in words else 3}: " in message


def test_lora_keys_are_refused_in_full_fine_tuning():
    assert "r has no meaning with tune: full" in fails(options={**BASE, "tune": "full"}, sets=["r=8"])


def test_missing_parts_and_files(tmp_path, recipe_file):
    assert fails() == "the recipe names no model; add `model: …` or give --model"
    assert "names no data" in fails(options={"model": "a/b"})
    assert "cannot be read" in fails(path=str(tmp_path / "none.yaml"))
    assert "not valid YAML" in fails(path=recipe_file("a: [1\nb: 2"))
    assert "a recipe is a list of" in fails(path=recipe_file("- 1\n- 2\n"))
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\xfe")
    assert "not UTF-8" in fails(path=str(tmp_path / "latin.yaml"))
    assert "--set r: is not of the form key=value" in fails(options=BASE, sets=["r"])
    assert "r has no value" in fails(options=BASE, sets=["r="])
    assert "keep one" in fails(options={**BASE, "eval_data": "e", "eval_fraction": 0.1})


def test_set_reads_yaml_values_and_keeps_text_as_it_is():
    sets = [
        "target_modules=[q_proj, v_proj]",
        "learning_rate=2e-4",
        "use_rslora=true",
        "chat_template={% if x %}: # {{ y }}",
        "max_steps=1e3",
        'response_part="<|a|>\\n"',
    ]
    recipe = load_recipe(None, BASE, sets)
    assert recipe.chat_template == "{% if x %}: # {{ y }}" and recipe.response_part == "<|a|>\n"
    assert recipe.hyperparameters == {
        "target_modules": ("q_proj", "v_proj"),
        "learning_rate": 2e-4,
        "use_rslora": True,
        "max_steps": 1000,
    }
    assert load_recipe(None, BASE, ["target_modules=q_proj,v_proj"]).hyperparameters["target_modules"] == (
        "q_proj",
        "v_proj",
    )
    assert load_recipe(None, BASE, ["target_modules=all-linear"]).hyperparameters["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("1.5 gib", 3 * 2**29),
        ("500M", 5 * 10**8),
        (7, 7),
        ("2T", 2 * 10**12),
    ],
)
def test_memory_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "12 parsecs", "1iB", True])
def test_memory_refusals(text):
    with pytest.raises(InputError, match="not a size"):
        parse_memory(text)


@given(
    rate=st.floats(1e-9, 1.0),
    r=st.integers(1, 512),
    rslora=st.booleans(),
    template=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
    names=st.lists(st.sampled_from(["q_proj", "v_proj"]), min_size=1, unique=True),
)
def test_round_trip(tmp_path_factory, rate, r, rslora, template, names):
    values = {"learning_rate": rate, "r": r, "use_rslora": rslora, "target_modules": tuple(names)}
    if template == "auto":
        template = None
    recipe = Recipe(model="a/b", data="12", chat_template=template, memory=5, hyperparameters=values)
    assert recipe_to_dict(recipe)["data"] == "12"
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_several_datasets(recipe_file):
    assert load_recipe(None, BASE).datasets == ("train.jsonl",) and load_recipe(None, BASE).eval_datasets == ()
    path = recipe_file("model: m\ndata: [a.jsonl, 2024]\neval_data: [c]\ndata_weights: [3, 0.5]\nmap: [prompt=Frage]\n")
    recipe = load_recipe(path)
    assert recipe.data == ("a.jsonl", "2024") == recipe.datasets and recipe.data_weights == (3.0, 0.5)
    assert recipe.eval_data == "c" and recipe.eval_datasets == ("c",) and recipe.map == ("prompt=Frage",)
    given = {"data": ["a", "b", "c"], "data_weights": None, "map": ["prompt=Q", "completion="]}
    recipe = load_recipe(None, {**BASE, **given}, ["data_rows=10,20,30"])
    assert recipe.datasets == ("a", "b", "c") and recipe.data_rows == (10, 20, 30) and recipe.map[1] == "completion="
    assert load_recipe(None, {**BASE, "data": ["a"]}).data == "a"
    sets = ["data=[a.jsonl, b.jsonl]", "data_rows=[1, 2]", "map=prompt=Frage"]
    recipe = load_recipe(None, BASE, sets)
    assert recipe.datasets == ("a.jsonl", "b.jsonl") and recipe.data_rows == (1, 2) and recipe.map == ("prompt=Frage",)
    assert load_recipe(None, BASE, ["data=part-[0-9].jsonl"]).data == "part-[0-9].jsonl"
    assert "data_rows has 1 number for 3 datasets" in fails(options={**BASE, "data": ["a", "b", "c"], "data_rows": 5})
    both = {**BASE, "data": ["a", "b"], "data_rows": [1, 2], "data_weights": [1, 2]}
    assert "--data-rows: data_weights and data_rows both say" in fails(options=both)
    assert "data is ''; it must be a name" in fails(options={**BASE, "data": ["a", ""]})


def test_loss_on_and_its_second_name():
    for loss_on, answers_only in (("assistant", True), ("last", True), ("everything", False)):
        recipe = load_recipe(None, {**BASE, "loss_on": loss_on})
        assert recipe.loss_on == loss_on and recipe.hyperparameters == {"assistant_only_loss": answers_only}
        assert load_recipe(None, {**BASE, "loss_on": loss_on, "assistant_only_loss": answers_only}) == recipe
        message = fails(options={**BASE, "loss_on": loss_on}, sets=[f"assistant_only_loss={not answers_only}".lower()])
        assert f"loss_on {loss_on} contradicts assistant_only_loss" in message
    assert load_recipe(None, BASE).loss_on is None and load_recipe(None, BASE).hyperparameters == {}
    assert "loss_on is not read by method dpo" in fails(options={**BASE, "loss_on": "last", "method": "dpo"})


def test_keys_that_nothing_would_read():
    given = {**BASE, "eval_data": "e", "group_by": "customer"}
    assert "--group-by: group_by is set although eval_data names held-out rows" in fails(options=given)


@given(
    data=st.lists(st.text("abc./-12", min_size=1), min_size=1, max_size=3),
    numbers=st.lists(st.integers(1, 10**6), min_size=3, max_size=3),
    policies=st.dictionaries(st.sampled_from(sorted(POLICIES)), st.sampled_from(["error", "drop"])),
    loss_on=st.none() | st.sampled_from(["assistant", "last", "everything"]),
)
def test_round_trip_of_data_keys(tmp_path_factory, data, numbers, policies, loss_on):
    many = len(data) > 1
    given = {
        "model": "m",
        "data": data,
        "eval_data": data,
        "data_rows": numbers[: len(data)],
        "format": "messages",
        "map": ["prompt=a b: c", "answer="],
        "loss_on": loss_on,
        **policies,
    }
    recipe = load_recipe(None, given)
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe and recipe.policies == policies
    assert recipe.data == (tuple(data) if many else data[0])


def test_every_key_is_explained():
    assert set(FIELDS) | {"policies", "hyperparameters", "tune_given"} == set(Recipe.__dataclass_fields__)
    assert set(KEYS) == {*FIELDS, *POLICIES, *HYPERPARAMETERS}
    for name, key in KEYS.items():
        assert key.doc.endswith(".") and len(key.doc) > 15, name
