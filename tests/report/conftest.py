"""A Run over rows, and of a name, that would take a careless page over."""

import pytest

import welltuned

OWNED = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">{{ 7*7 }}'


@pytest.fixture(scope="session")
def run(tmp_path_factory, tiny_model_dir, rows, write_rows):
    from welltuned.training import shown

    folder = tmp_path_factory.mktemp("report")
    hostile = [
        {"messages": [{"role": "user", "content": f"{OWNED} {i}"}, {"role": "assistant", "content": f"<b>{i}"}]}
        for i in range(40)
    ]
    data = write_rows(folder / "rows.jsonl", [*hostile, *rows])
    out = folder / "run <i>&amp;'\""
    patch = pytest.MonkeyPatch()
    patch.setattr(shown, "ASKED", 3)
    patch.setattr(shown, "LONGEST_REPLY", 8)
    welltuned.train(model=str(tiny_model_dir), data=data, out=out, learning_rate=1e-2, num_train_epochs=1, eval_steps=2)
    patch.undo()
    return out


@pytest.fixture(scope="session")
def swept(tmp_path_factory, tiny_model_dir, data_file):
    """The Run of a search over rates from a poor start: some arms are dropped, and one is added."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    options = dict(model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=12, eval_fraction=0.2)
    welltuned.sweep(out=out, learning_rate=2e-3, **options)
    return out


@pytest.fixture(scope="session")
def preferred(tmp_path_factory, tiny_model_dir, rows, write_rows):
    """A Run on pairs, of which one would take a careless page over."""
    folder = tmp_path_factory.mktemp("preferred")
    pairs = [
        {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"], "rejected": f"{OWNED} {i}"}
        for i, row in enumerate(rows)
    ]
    data = write_rows(folder / "pairs.jsonl", pairs)
    options = dict(method="dpo", max_steps=4, eval_steps=2, effective_batch_size=8, learning_rate=1e-2)
    welltuned.train(model=str(tiny_model_dir), data=data, out=folder / "run", **options)
    return folder / "run"


@pytest.fixture(scope="session")
def rewarded(tmp_path_factory, tiny_model_dir, write_rows):
    """A Run that learns from two rewards, prompts among which would take a careless page over."""
    folder = tmp_path_factory.mktemp("rewarded")
    data = write_rows(folder / "p.jsonl", [{"prompt": f"{OWNED} {n}", "answer": f"<b>{n}"} for n in range(32)])
    (folder / "r.py").write_text(
        "def vowels(completion):\n    return sum(completion.count(v) for v in 'aeiou')\n"
        "def length(completion):\n    return len(completion) / 10\n"
    )
    rewards = [f"{folder / 'r.py'}:vowels", f"{folder / 'r.py'}:length"]
    options = dict(method="grpo", rewards=rewards, num_generations=4, effective_batch_size=16, max_completion_length=8)
    more = dict(max_steps=4, eval_steps=2, learning_rate=1e-2, mask_truncated_completions=False)
    welltuned.train(model=str(tiny_model_dir), data=data, out=folder / "run", **options, **more)
    return folder / "run"
