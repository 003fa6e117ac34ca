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
