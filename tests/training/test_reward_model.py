"""A reward model as others load it: transformers' sequence classifier, with PEFT or whole, gives the same scores."""

import json

import pytest
import torch

from welltuned.data.pairs import sequences
from welltuned.models.packed import hidden_states, packed_model
from welltuned.models.reward import SCORE, initial_score
from welltuned.objectives.answers import lay


@pytest.fixture(scope="module")
def pair_file(rows, write_rows, tmp_path_factory):
    pairs = []
    for i, row in enumerate(rows):
        asked, answer = (message["content"] for message in row["messages"])
        other = rows[(3 * i + 1) % len(rows)]["messages"][1]["content"] + " no"
        pairs.append({"prompt": asked, "chosen": answer, "rejected": other})
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)


@pytest.fixture(scope="module", params=["lora", "full"])
def rewarded(request, run, pair_file):
    options = {"r": 4, "learning_rate": 1e-2} if request.param == "lora" else {"learning_rate": 1e-3}
    return run(method="reward", tune=request.param, data=pair_file, max_steps=8, **options)


def scores(engine, pairs):
    """Of both sequences of each pair, by the engine that trained."""
    with torch.no_grad(), packed_model(engine.model):
        engine.trained.no_dropout()
        laid = lay(pairs, shared=True)
        return engine.model.get_submodule(SCORE)(hidden_states(engine.model, laid.packed)[laid.last_A]).view(-1, 2)


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer, pair_file):
    from welltuned.data.dataset import read_dataset
    from welltuned.recipe import load_recipe

    recipe = load_recipe(None, {"model": "any", "data": pair_file, "method": "reward"})
    return list(read_dataset(recipe, tiny_tokenizer).train[:10])


def test_equal_scores_elsewhere(rewarded, tiny_model_dir, pairs):
    from transformers import AutoModelForSequenceClassification

    if (rewarded.path / "model").is_dir():
        model = AutoModelForSequenceClassification.from_pretrained(rewarded.path / "model", dtype=torch.float32)
        assert model.config.num_labels == 1
    else:
        peft = pytest.importorskip("peft")
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1, dtype=torch.float32)
        ids = torch.from_numpy(pairs[0].ids[None].astype("int64"))
        untuned = float(base(ids).logits.detach())
        model = peft.PeftModel.from_pretrained(base, rewarded.path / "adapter")
        config = json.loads((rewarded.path / "adapter" / "adapter_config.json").read_text())
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
        assert untuned != pytest.approx(float(model(ids).logits.detach()))
    ours = scores(rewarded.result.engine, pairs)
    with torch.no_grad():
        theirs = [[float(model.eval()(torch.from_numpy(s.ids[None].astype("int64"))).logits) for s in sequences(p)] for
                  p in pairs]  # fmt: skip
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-4, atol=1e-5)


def test_it_learns(rewarded):
    held_out = rewarded.summary["held_out"]
    assert held_out["after"]["loss"] < held_out["before"]["loss"]
    assert rewarded.updates[-1]["rewards/accuracies"] > 0.6
    assert any(check["name"] == "score.weight" and check["moved"] for check in rewarded.summary["trained_tensors"])


def test_the_head_begins_small_and_the_same():
    draw = initial_score(575, seed=4)
    assert torch.equal(draw, initial_score(575, seed=4)) and not torch.equal(draw, initial_score(575, seed=5))
    assert float(draw.std()) == pytest.approx(1 / 24, rel=0.1)


def test_from_a_supervised_adapter(run, pair_file):
    taught = run(data=pair_file, max_steps=3, r=4)
    second = run(method="reward", data=pair_file, max_steps=3, adapter=str(taught.path))
    assert {name.split(".")[-2] for name in second.adapter} >= {"score", "lora_A", "lora_B"}
