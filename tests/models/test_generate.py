"""Replies: what generation asks of the model."""

import pytest
import torch

from welltuned.models.generate import Decoding, replies


def test_the_head_never_meets_a_strided_batch(tiny_model_dir, tiny_tokenizer):
    """Else torch copies a frozen head once for each prompt."""
    from welltuned.models.load import load_model

    model = load_model(str(tiny_model_dir), dtype=torch.float32).requires_grad_(False)
    met = []
    watch = model.get_output_embeddings().register_forward_hook(lambda _, given, __: met.append(given[0]))
    replies(model, tiny_tokenizer, [[5, 6, 7], [8, 9]], Decoding(max_new_tokens=3))
    assert len(met) > 1 and all(tensor.shape[0] == 2 and tensor.is_contiguous() for tensor in met)

    watch.remove()
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_change_no_reply(tiny_model_dir, tiny_tokenizer, size):
    from welltuned.models.load import load_model

    model = load_model(str(tiny_model_dir), dtype=torch.float32)
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 4, 7, 5)]
    alone = [replies(model, tiny_tokenizer, [prompt], Decoding(max_new_tokens=6))[0] for prompt in prompts]
    assert replies(model, tiny_tokenizer, prompts, Decoding(max_new_tokens=6, batch_size=size)) == alone
