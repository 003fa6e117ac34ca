"""A reward model: a language model whose head is one number, as transformers' classes for sequence classification."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from welltuned.errors import InputError, RunError

SCORE = "score"  # transformers' name of the head


def add_score(model: PreTrainedModel, seed: int) -> nn.Linear:
    """Give the model a scalar head [1, H] in fp32, trained whatever else is."""
    score = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
    score.weight.data = initial_score(score.in_features, seed)
    model.register_module(SCORE, score.to(model.device))
    return score


def initial_score(hidden_size: int, seed: int) -> Tensor:
    """N(0, 1 / (H + 1)) [1, H]: Stiennon et al. 2020, arXiv 2009.01325, appendix B."""
    draw = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(seed))
    return draw / math.sqrt(hidden_size + 1)


def require_classifier(model: PreTrainedModel) -> None:
    """Refuse architectures that transformers has no class with a scalar head for: nobody could load the result."""
    if type(model.config) not in AutoModelForSequenceClassification._model_mapping:
        what = f"transformers has no sequence classifier for {model.config.model_type} models"
        raise InputError(what, where="method", mend="choose another model")


def save_classifier(model: PreTrainedModel, folder: Path) -> None:
    """Write the whole model as transformers' class with one label, backbone and scalar head.

    Raises:
        RunError: that class has other parameters than this model.
    """
    known = {k: v for k, v in model.config.to_dict().items() if k not in ("id2label", "label2id", "architectures")}
    config = type(model.config).from_dict({**known, "num_labels": 1})
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    state = {n: t for n, t in model.state_dict().items() if head is None or not n.startswith(f"{head}.")}
    missing, unexpected = classifier.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        name = (*missing, *unexpected)[0]
        raise RunError(f"the classifier of {model.config.model_type} models differs from the language model in {name}")
    classifier.save_pretrained(folder)
