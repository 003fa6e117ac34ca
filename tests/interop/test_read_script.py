"""Python scripts: read by their syntax, never run; what only running could tell is unread and not guessed."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from welltuned.advice.lint import findings_of
from welltuned.advice.lint.config import Tool
from welltuned.errors import InputError
from welltuned.interop import read_config
from welltuned.interop.values import Names, Unreadable
from welltuned.recipe import Method, Tune

HEAD = "from peft import LoraConfig\nfrom trl import SFTConfig, SFTTrainer\n"
TAIL = "trainer = SFTTrainer(model='org/Base-7B', args=args, train_dataset=rows, peft_config=lora)\n"
LORA = "lora = LoraConfig(r=16, lora_alpha=32, target_modules='all-linear')\n"


def worth(expression, before=""):
    tree = ast.parse(f"{before}\nresult = {expression}")
    return Names(tree).value(tree.body[-1].value)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2e-4", 2e-4),
        ("-1", -1),
        ("2 * 8 + 1", 17),
        ("16 // 3", 5),
        ("2 ** 10", 1024),
        ("1e-4 * 2", 2e-4),
        ("'a' + 'b'", "ab"),
        ("['q_proj', 'v_proj']", ["q_proj", "v_proj"]),
        ("('q_proj',)", ["q_proj"]),
        ("{'a': 1, **{'b': 2}}", {"a": 1, "b": 2}),
        ("dict(a=1)", {"a": 1}),
        ("[1, 2][0]", 1),
        ("not True", False),
        ("1 if True else 2", 1),
        ("float('2e-4')", 2e-4),
        ("torch.bfloat16", "bfloat16"),
        ("None", None),
    ],
)
def test_constants_and_simple_arithmetic_are_read(expression, value):
    assert worth(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "args.lr",
        "f()",
        "x",
        "9 ** 9 ** 9",
        "'a' * 10**9",
        "1 / 0",
        "[1][5]",
        "f'{x}'",
        "lambda: 1",
        "x if y else 2",
        "1 + 'a'",
    ],
)
def test_everything_else_is_unreadable(expression):
    with pytest.raises(Unreadable):
        worth(expression)


@pytest.mark.parametrize(
    ("before", "expression", "value"),
    [
        ("lr = 1e-4", "lr", 1e-4),
        ("rank = 16\nalpha = 2 * rank", "alpha", 32),
        ("lr = 1e-4\nlr = 1e-4", "lr", 1e-4),
        ("a, b = 1, 2", "b", 2),
        ("class Args:\n    lr: float = 1e-4", "Args.lr", 1e-4),
        ("@dataclass\nclass Args:\n    lr: float = 1e-4\nargs = Args()", "args.lr", 1e-4),
        ("@dataclass\nclass Args:\n    lr: float = 1e-4\nargs = Args(lr=1e-5)", "args.lr", 1e-5),
        ("@dataclass\nclass Args:\n    lr: float = field(default=3e-4)", "Args.lr", 3e-4),
        ("def main():\n    lr = 1e-4", "lr", 1e-4),
        ("if __name__ == '__main__':\n    lr = 1e-4", "lr", 1e-4),
        ("settings = {'lr': 1e-4}", "settings['lr']", 1e-4),
    ],
)
def test_names_with_one_value_are_read(before, expression, value):
    assert worth(expression, before) == value


@pytest.mark.parametrize(
    "before",
    [
        "lr = 1e-4\nlr = 1e-5",
        "for lr in (1e-4, 1e-5):\n    pass",
        "def train(lr=1e-4):\n    pass",
        "if big:\n    lr = 1e-4",
        "lr = 1e-4\nlr *= 2",
        "lr = lr + 1",
        "a = lr\nlr = a",
        "with open('x') as lr:\n    pass",
        "lr, other = load()",
        "try:\n    pass\nexcept E:\n    lr = 1",
    ],
)
def test_names_with_several_values_are_not_guessed(before):
    with pytest.raises(Unreadable):
        worth("lr", before)


def test_what_is_open_is_unread_and_no_default(read, ids):
    config = read(HEAD + LORA + "args = SFTConfig(learning_rate=parsed.lr, max_length=n)\n" + TAIL, "train.py")
    assert config.value("learning_rate") is None and config.number("max_length") is None
    assert config.unread["learning_rate"].text == "parsed.lr" and config.unread["learning_rate"].line == 4
    assert not {"WT003", "WT042"} & set(ids(config))


def test_arguments_from_a_parser_leave_everything_open(read, ids):
    config = read(HEAD + LORA + "(args,) = TrlParser(SFTConfig).parse_args_and_config()\n" + TAIL, "train.py")
    assert config.tune is Tune.LORA and config.whole("r") == 16
    assert config.rest_open and config.number("learning_rate") is None
    assert ids(config) == ["WT030"]  # the trainer itself is given no held-out rows


def test_double_stars_are_opened_where_they_are_a_dict(read):
    text = HEAD + LORA + "base = {'learning_rate': 1e-5}\nargs = SFTConfig(max_length=512, **base)\n" + TAIL
    config = read(text, "train.py")
    assert config.number("learning_rate") == 1e-5 and not config.rest_open
    closed = read(text.replace("base = {'learning_rate': 1e-5}", "base = load()"), "train.py")
    assert closed.rest_open and closed.number("learning_rate") is None and closed.whole("max_length") == 512


def test_functions_that_return_the_settings_are_followed(read):
    text = HEAD + "def config() -> SFTConfig:\n    return SFTConfig(learning_rate=3e-4)\n"
    text += "def adapter(rank):\n    return LoraConfig(r=rank, lora_alpha=8)\n"
    text += "def main():\n    SFTTrainer(model='m', args=config(), peft_config=adapter(8), train_dataset=rows)\n"
    config = read(text, "train.py")
    assert config.number("learning_rate") == 3e-4 and config.whole("lora_alpha") == 8
    assert "r" in config.unread and config.tune is Tune.LORA


def test_a_configuration_without_its_trainer_is_not_blamed_for_what_the_trainer_gets(read, ids):
    config = read("from trl import SFTConfig\nargs = SFTConfig(eval_strategy='steps', max_length=512)\n", "train.py")
    assert not {"WT030", "WT033"} & set(ids(config))


def test_later_attributes_win(read):
    text = HEAD + LORA + "args = SFTConfig(learning_rate=1e-4)\nargs.learning_rate = 3e-4\n" + TAIL
    config = read(text, "train.py")
    assert config.number("learning_rate") == 3e-4 and config.line_of("learning_rate") == 5


def test_imports_by_another_name(read):
    text = "from trl import SFTConfig as C, SFTTrainer as T\nargs = C(learning_rate=1e-5)\nT(model='m', args=args)\n"
    config = read(text, "train.py")
    assert config.method is Method.SFT and config.number("learning_rate") == 1e-5 and config.tune is Tune.FULL


def test_a_script_is_never_run(tmp_path):
    flag = tmp_path / "ran"
    path = tmp_path / "train.py"
    path.write_text(f"open({str(flag)!r}, 'w')\nraise SystemExit\n" + HEAD + LORA + "args = SFTConfig()\n" + TAIL)
    read_config(str(path))
    assert not flag.exists()


def test_each_trainer_is_a_run(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(
        HEAD
        + LORA
        + "args = SFTConfig(learning_rate=1e-4)\n"
        + TAIL
        + "args = GRPOConfig(learning_rate=1e-5, num_generations=4)\n"
        + "trainer = GRPOTrainer(model=model, args=args, peft_config=lora)\n"
    )
    first, second = read_config(str(path))
    assert (first.method, first.number("learning_rate")) == (Method.SFT, 1e-4)
    assert (second.method, second.number("learning_rate")) == (Method.GRPO, 1e-5)


def test_quantised_and_full(read):
    load = "model = AutoModelForCausalLM.from_pretrained('org/Base-7B', quantization_config=q)\n"
    text = HEAD + "q = BitsAndBytesConfig(load_in_4bit=True)\n" + load + LORA + "args = SFTConfig()\n" + TAIL
    assert read(text, "train.py").tune is Tune.QLORA
    assert read(text, "train.py").text("model") == "org/Base-7B"
    full = "args = SFTConfig(learning_rate=1e-5)\nSFTTrainer(model='org/Base-7B', args=args)\n"
    assert read(HEAD + full, "train.py").tune is Tune.FULL


def test_unsloth_is_seen_by_its_import(read):
    text = "from unsloth import FastLanguageModel\n" + HEAD
    text += "model, t = FastLanguageModel.from_pretrained('unsloth/a-7b', 2048)\n"
    text += (
        "model = FastLanguageModel.get_peft_model(model, r=8)\nargs = "
        "SFTConfig(max_steps=60)\nSFTTrainer(model, args=args)\n"
    )
    config = read(text, "train.py")
    assert config.tool is Tool.UNSLOTH and config.tune is Tune.QLORA
    assert config.whole("r") == 8 and config.whole("lora_alpha") == 16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", "not valid Python"),
        ("print('hello')\n", "calls no trainer"),
        ("", "calls no trainer"),
        ("x = 1\x00\n", "not valid Python|cannot be parsed"),
        ("x = " + "(" * 5000 + ")" * 5000, "not valid Python|cannot be parsed"),
        ("x = " + "-" * 100_000 + "1", "nested too deeply|cannot be parsed|calls no trainer"),
    ],
)
def test_what_is_no_training_script_is_one_sentence(read, text, words):
    with pytest.raises(InputError, match=words):
        read(text, "train.py")


def test_a_tool_that_has_no_scripts_is_refused(read):
    with pytest.raises(InputError, match="axolotl is configured in YAML"):
        read(HEAD, "train.py", tool=Tool.AXOLOTL)


PIECES = [
    "lr = 1e-4\n",
    "lr = other\n",
    "args = SFTConfig(learning_rate=lr, **more)\n",
    "args = SFTConfig(**{'a': 1, 2: 3, None: 4})\n",
    "args = TrainingArguments('out', learning_rate='x')\n",
    "args.max_steps = lr\n",
    "lora = LoraConfig(r=[1], target_modules=None, **more)\n",
    "q = BitsAndBytesConfig(load_in_4bit=lr)\n",
    "model = AutoModelForCausalLM.from_pretrained(lr, quantization_config=q, load_in_4bit=True)\n",
    "model = FastLanguageModel.get_peft_model(*model)\n",
    "model = get_peft_model(model, lora)\n",
    "SFTTrainer(*a, args=args, peft_config=lora, eval_dataset=None)\n",
    "trainer = DPOTrainer(model, args=args, beta=0.1)\n",
    "for args in runs:\n    GRPOTrainer(args=args)\n",
    "class A:\n    lr = 1\n    def f(self): return SFTConfig(learning_rate=self.lr)\n",
    "import unsloth\n",
    "t.pad_token = t.eos_token\n",
    "x = lambda args: SFTConfig(learning_rate=args)\n",
    "match lr:\n    case 1: args = KTOConfig()\n",
]


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=10))
def test_no_script_breaks_the_reader_or_a_check(pieces, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "train.py"
    path.write_text("".join(pieces), encoding="utf-8")
    try:
        configs = read_config(str(path))
    except InputError:
        return
    for config in configs:
        for finding in findings_of(config):
            assert finding.sentence
