"""Preference objectives against TRL's own trainers: loss, rewards, margins and every gradient, on the same tokens.

Both sides train all parameters of the same small model in fp32, with another model as the reference, so that nothing is
trivially zero. TRL's trainers for ORPO and SimPO tokenise by themselves, so theirs are asked below that step.
"""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="trl is no dependency; this is tested where it is installed")

from welltuned.data.pairs import joined, sequences  # noqa: E402
from welltuned.data.render import Example  # noqa: E402
from welltuned.models.full import FullParameters  # noqa: E402
from welltuned.models.fuse import find_head  # noqa: E402
from welltuned.models.load import load_model, load_tokenizer  # noqa: E402
from welltuned.models.packed import packed_model  # noqa: E402
from welltuned.models.reward import SCORE, add_score  # noqa: E402
from welltuned.objectives.preference import DpoSettings, KtoSettings, LossType  # noqa: E402
from welltuned.training.preference_step import Dpo, Kto, Orpo, Pairwise, Reward, mismatches  # noqa: E402
from welltuned.training.reference import NOTHING_KNOWN, key_of  # noqa: E402
from welltuned.training.step import Engine  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
V, REL = 300, 1e-4


def sequence(ids, prompt, origin="rows.jsonl:1", desirable=None):
    whole = np.array(ids, np.int32)
    return Example(whole, np.arange(len(ids)) >= prompt, origin, desirable=desirable)


@pytest.fixture(scope="module")
def pairs():
    draw, out = np.random.default_rng(0), []
    for prompt, chosen, rejected in [(7, 4, 9), (3, 6, 2), (12, 5, 5), (2, 8, 3), (9, 2, 7)]:
        asked = draw.integers(3, V, prompt).tolist()
        both = [asked + draw.integers(3, V, n).tolist() for n in (chosen, rejected)]
        out.append(joined(*(sequence(ids, prompt) for ids in both)))
    return out


@pytest.fixture(scope="module")
def judged():
    draw, shapes = np.random.default_rng(1), [(7, 4), (3, 6), (12, 5), (2, 8), (9, 2)]
    return [sequence(draw.integers(3, V, p + n).tolist(), p, f"rows.jsonl:{i}", i % 3 != 1) for i, (p, n) in
            enumerate(shapes)]  # fmt: skip


@pytest.fixture(scope="module")
def folders(make_model_dir):
    return str(make_model_dir(seed=3)), str(make_model_dir(seed=3, initializer_range=0.19))


@pytest.fixture
def engine(folders):
    model = load_model(folders[0], dtype=torch.float32)
    return Engine(model, FullParameters(model), find_head(model), token_budget=40)


def logps(model, examples):
    """Summed log-probabilities of the trained tokens by transformers alone."""
    found = {}
    with torch.no_grad():
        for example in examples:
            ids = torch.from_numpy(example.ids.astype(np.int64))
            each = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found[key_of(example)] = float(each[torch.from_numpy(example.mask[1:])].double().sum())
    return NOTHING_KNOWN.and_(found)


@pytest.fixture(scope="module")
def reference_model(folders):
    return load_model(folders[1], dtype=torch.float32)


@pytest.fixture(scope="module")
def trainer(folders, tmp_path_factory):
    """A function that makes one of TRL's trainers on a copy of the model; its own data are a placeholder."""
    from datasets import Dataset

    def make(kind, config, row, model=None, **more):
        common = dict(
            output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=5, report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False, max_length=None,
        )  # fmt: skip
        return kind(
            model=model or load_model(folders[0], dtype=torch.float32),
            args=config(common),
            train_dataset=Dataset.from_list([row] * 5),
            processing_class=load_tokenizer(folders[0]),
            **more,
        )

    return make


def own(engine, objective, rows):
    engine.trained.grad_KP.zero_()
    with packed_model(engine.model):
        made = objective.accumulate_gradient(engine, rows, list(range(len(rows))))
    return made, {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}


def compare(made, gradients, loss, model, metrics, names):
    loss.backward()
    assert made.loss == pytest.approx(float(loss.detach()), rel=REL)
    for name in names:
        assert made.measures[name] == pytest.approx(metrics[name], rel=REL, abs=1e-6), name
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert theirs.keys() <= gradients.keys() and len(theirs) > 10
    for name, gradient in theirs.items():
        assert float((gradients[name] - gradient).norm() / gradient.norm()) < REL, name


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected")  # fmt: skip
DPO = {
    "sigmoid": DpoSettings(beta=0.3),
    "ipo": DpoSettings(loss_type=LossType.IPO, beta=0.2),
    "hinge": DpoSettings(loss_type=LossType.HINGE, beta=0.05),
    "robust": DpoSettings(loss_type=LossType.ROBUST, beta=0.3, label_smoothing=0.2),
    "sigmoid_norm": DpoSettings(loss_type=LossType.SIGMOID_NORM, beta=2.0),
}


@pytest.mark.parametrize("settings", DPO.values(), ids=DPO.keys())
def test_dpo(engine, reference_model, trainer, pairs, settings):
    from trl import DPOConfig, DPOTrainer

    known = logps(reference_model, [s for pair in pairs for s in sequences(pair)])
    made, gradients = own(engine, Pairwise(Dpo(settings, known), shared=True), pairs)
    options = dict(loss_type=[str(settings.loss_type)], beta=settings.beta, label_smoothing=settings.label_smoothing)
    theirs = trainer(
        DPOTrainer, lambda common: DPOConfig(**common, **options), {"prompt": "a", "chosen": "b", "rejected": "c"},
        ref_model=deepcopy(reference_model),
    )  # fmt: skip
    rows = [
        {
            "prompt_ids": pair.ids[: pair.fork.shared].tolist(),
            "chosen_ids": pair.ids[pair.fork.shared : pair.fork.second].tolist(),
            "rejected_ids": pair.ids[pair.fork.second :].tolist(),
        }
        for pair in pairs
    ]
    theirs.model.eval()
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    metrics = {name: values[-1] for name, values in theirs._metrics["eval"].items()}
    compare(made, gradients, loss, theirs.model, metrics, REWARDS)


def test_kto(folders, trainer, judged):
    """The two models the other way round, so that the reference point is above 0."""
    from trl import KTOConfig, KTOTrainer

    model, reference_model = (load_model(folder, dtype=torch.float32) for folder in folders[::-1])
    engine = Engine(model, FullParameters(model), find_head(model), token_budget=40)
    known = logps(reference_model, [*judged, *mismatches(judged, 64)])
    settings = KtoSettings(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    made, gradients = own(engine, Kto(settings, known, 64), judged)
    options = dict(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    theirs = trainer(
        KTOTrainer, lambda common: KTOConfig(**common, **options), {"prompt": "a", "completion": "b", "label": True},
        ref_model=deepcopy(reference_model), model=load_model(folders[1], dtype=torch.float32),
    )  # fmt: skip
    answers = [row.ids[row.mask].tolist() for row in judged]
    rows = [
        {
            "prompt_ids": row.ids[~row.mask].tolist(),
            "completion_ids": answers[i],
            "KL_completion_ids": answers[i - 1],
            "label": row.desirable,
        }
        for i, row in enumerate(judged)
    ]
    theirs.model.eval()
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    metrics = {name: values[-1] for name, values in theirs._metrics["eval"].items()}
    names = [name for name in REWARDS if name != "rewards/accuracies"]
    assert made.measures["kl"] > 0  # else the reference point would not have been compared
    compare(made, gradients, loss, theirs.model, metrics, [*names, "kl"])


def padded(pairs):
    """TRL's batch of chosen and rejected sequences, for the trainers that tokenise by themselves."""
    batch = {}
    for side, which in (("chosen", 0), ("rejected", 1)):
        rows = [sequences(pair)[which] for pair in pairs]
        width = max(len(row.ids) for row in rows)
        ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
        for i, row in enumerate(rows):
            n = len(row.ids)
            ids[i, :n], mask[i, :n] = torch.from_numpy(row.ids.astype(np.int64)), 1
            labels[i, :n] = torch.where(torch.from_numpy(row.mask), ids[i, :n], -100)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return batch


def bare(kind, **attributes):
    """One of TRL's experimental trainers without its data pipeline."""
    made = object.__new__(kind)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda tensor: tensor)
    settings = dict(is_encoder_decoder=False, padding_value=0, pad_token_id=0, aux_loss_enabled=False)
    made.__dict__.update({**settings, "accelerator": accelerator, **attributes})
    return made


def test_orpo(engine, folders, pairs):
    from trl.experimental.orpo import ORPOTrainer

    made, gradients = own(engine, Pairwise(Orpo(0.25), shared=True), pairs)
    model = load_model(folders[0], dtype=torch.float32)
    loss, metrics = bare(ORPOTrainer, beta=0.25).get_batch_loss_metrics(model, padded(pairs))
    compare(made, gradients, loss, model, metrics, [*REWARDS, "nll_loss"])


def test_simpo(engine, folders, pairs):
    from trl.experimental.cpo import CPOTrainer

    settings = DpoSettings(loss_type=LossType.SIMPO, beta=2.0, simpo_gamma=0.7)
    made, gradients = own(engine, Pairwise(Dpo(settings, None), shared=True), pairs)
    model = load_model(folders[0], dtype=torch.float32)
    options = dict(loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0, cpo_alpha=0.0)
    loss, metrics = bare(CPOTrainer, **options).get_batch_loss_metrics(model, padded(pairs))
    compare(made, gradients, loss, model, metrics, REWARDS[:4])


@pytest.mark.parametrize("centre", [None, 0.05])
def test_reward(folders, trainer, pairs, centre):
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model = load_model(folders[0], dtype=torch.float32)
    score = add_score(model, seed=5)
    engine = Engine(model, FullParameters(model), find_head(model), token_budget=40)
    made, gradients = own(engine, Pairwise(Reward(score, centre or 0.0), shared=True), pairs)
    classifier = AutoModelForSequenceClassification.from_pretrained(folders[0], num_labels=1, dtype=torch.float32)
    classifier.score.weight.data = model.get_submodule(SCORE).weight.detach().clone()
    theirs = trainer(
        RewardTrainer, lambda common: RewardConfig(**common, center_rewards_coefficient=centre),
        {"chosen": "b", "rejected": "c"}, model=classifier,
    )  # fmt: skip
    both = [[s.ids.tolist() for s in sequences(pair)] for pair in pairs]
    rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in both]
    theirs.model.eval()
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    metrics = {name: values[-1] for name, values in theirs._metrics["eval"].items()}
    renamed = {"rewards/accuracies": metrics["accuracy"], "rewards/margins": metrics["margin"]}
    compare(made, gradients, loss, theirs.model, renamed, list(renamed))
