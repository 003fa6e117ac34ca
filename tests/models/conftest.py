"""Small random models of many families, and the two ways through them that must agree: ours and plain PEFT."""

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from welltuned.data.render import Example
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model, packs
from welltuned.models.recompute import checkpoint_layers
from welltuned.objectives.supervised import collate, loss

VOCABULARY = 97
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
WINDOW = dict(sliding_window=5)  # the examples have 11, 4 and 17 tokens
ALTERNATING = dict(layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2)

# name: (transformers model type, what differs from COMMON)
FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", WINDOW),
    "qwen2": ("qwen2", {}),
    "qwen2 tied, window in one layer": ("qwen2", dict(tie_word_embeddings=True, use_sliding_window=True,
                                                      max_window_layers=1, **WINDOW)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "gemma2": ("gemma2", dict(head_dim=16, tie_word_embeddings=True, query_pre_attn_scalar=24,
                              attn_logit_softcapping=2.0, final_logit_softcapping=1.5, **WINDOW)),
    "gemma3": ("gemma3_text", dict(head_dim=16, tie_word_embeddings=True, num_hidden_layers=3,
                                   layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                   **WINDOW)),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", dict(**WINDOW, **ALTERNATING)),
    "granite": ("granite", dict(embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.3,
                                logits_scaling=4.0)),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3 moe": ("qwen3_moe", dict(head_dim=16, moe_intermediate_size=24, decoder_sparse_step=2, **EXPERTS)),
    "cohere": ("cohere", dict(logit_scale=0.3, tie_word_embeddings=True, use_qk_norm=True)),
    "cohere2": ("cohere2", dict(logit_scale=0.3, tie_word_embeddings=True, **WINDOW, **ALTERNATING)),
    "gpt-oss": ("gpt_oss", dict(head_dim=16, **WINDOW, **ALTERNATING, **EXPERTS)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0])),
    "starcoder2": ("starcoder2", dict(use_bias=True, residual_dropout=0.0, embedding_dropout=0.0, **WINDOW)),
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=True,
                          resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "gpt-neox": ("gpt_neox", dict(use_parallel_residual=True)),
    "deepseek v3": ("deepseek_v3", dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=4,
                                        v_head_dim=6, head_dim=8, num_key_value_heads=4, n_routed_experts=4,
                                        num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1,
                                        first_k_dense_replace=1)),
    # The rest would mix packed examples and run one example at a time.
    "falcon": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "bloom": ("bloom", dict(n_layer=2, n_head=4)),
    "nemotron": ("nemotron", {}),
    "jamba": ("jamba", dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                            num_experts=2, mamba_d_state=4, mamba_dt_rank=4)),
    "qwen3 next": ("qwen3_next", dict(head_dim=16, layer_types=["linear_attention", "full_attention"],
                                      linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
                                      linear_value_head_dim=8, moe_intermediate_size=16,
                                      shared_expert_intermediate_size=16, **EXPERTS)),
    "llama4": ("llama4_text", dict(head_dim=8, attention_chunk_size=6, intermediate_size_mlp=24, no_rope_layers=[1, 0],
                                   moe_layers=[1], num_experts_per_tok=1, num_local_experts=2,
                                   layer_types=["chunked_attention", "full_attention"])),
}  # fmt: skip

LENGTHS = (11, 4, 17)


class Wide(TorchFunctionMode):
    """Within the block whatever asks for float32 gets float64.

    transformers computes norms, rotary angles and softmax in float32 whatever the model's type, and adapters are
    float32 here and in PEFT: in wide arithmetic both sides can be compared to the last digits.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return function(*args, **kwargs)


class Narrow:
    """Float32 as it is."""

    __enter__ = __exit__ = lambda *_: None


@dataclass
class Engine:
    """One model with our adapters on it."""

    model: object
    bank: object
    fused: object
    head: object

    def forward(self, examples, per_adapter=None, keys=None, weights=None, rows=True, each=False):
        """Summed negative log-likelihood over the number of labels, or with `weights`; call within packed_model."""
        batch = collate(examples)
        keys = range(len(examples)) if keys is None else keys
        if rows:
            self.bank.use_rows(per_adapter, tuple(zip(batch.packed.lengths, keys, strict=True)))
        if weights is None:
            dtype = next(self.model.parameters()).dtype
            weights = torch.full((len(batch.target_M),), 1 / len(batch.target_M), dtype=dtype)
        out = loss(self.model, self.head, batch, weights)
        return out if each else out[0]

    def step(self, examples, **options):
        """(loss, nll_M, gradients by adapter and name). Gradients start from zero each time."""
        self.bank.grad_KP.zero_()
        with packed_model(self.model):
            total, nll = self.forward(examples, each=True, **options)
            total.backward()  # checkpointed layers run again here, and must find the packed attention still in place
        grads = [
            {s.name: row[s.start : s.start + s.size].view(s.shape).clone() for s in self.bank.slots}
            for row in self.bank.grad_KP
        ]
        return total.detach(), nll, grads


def make_model(family, dtype=torch.float32, seed=0, **changes):
    """A model with every parameter drawn at random, norms and biases included, in float64 and then rounded."""
    kind, differs = FAMILIES[family]
    config = CONFIG_MAPPING[kind](**{**COMMON, **differs, **changes})
    config._experts_implementation = "eager"  # the default product of experts has no float64
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() == 1:
            p.data = (p.data if torch.isfinite(p.data).all() and "sinks" not in name else 0.0) + 0.2 * noise
        else:
            p.data = noise / p.shape[-1] ** 0.5
    return model.to(dtype).eval()


def randomise(bank, seed=1):
    """Adapters as if after some training: B not zero."""
    for k in range(len(bank.settings)):
        generator = torch.Generator().manual_seed(seed + k)
        for name, tensor in bank.tensors(k).items():
            if name.endswith("lora_B"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 4)


def make_engine(model, settings=None, checkpointed=False):
    bank = attach(model, settings or LoraSettings(r=3, lora_alpha=6))
    randomise(bank)
    fused = fuse(model, bank)
    if checkpointed:
        checkpoint_layers(model, fused)
    return Engine(model, bank, fused, find_head(model))


def make_examples(lengths=LENGTHS, seed=0):
    """Random tokens, about two thirds of them labelled and at least one."""
    draw = np.random.default_rng(seed)
    out = []
    for i, n in enumerate(lengths):
        mask = draw.random(n) < 0.66
        mask[0], mask[-1] = False, True
        out.append(Example(draw.integers(1, VOCABULARY, n, dtype=np.int32), mask, f"test:{i}"))
    return out


def peft_twin(model, bank, k=0):
    """Plain PEFT around a copy of the untouched model, carrying the bank's adapter k."""
    import peft
    from peft.utils import transformers_weight_conversion as weight_conversion

    settings = bank.settings[k]
    config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, use_rslora=settings.use_rslora, bias=settings.bias.value,
        target_modules=list(bank.targets), lora_dropout=0.0,
    )  # fmt: skip
    with patch.dict(weight_conversion._MOE_TARGET_MODULE_MAPPING, clear=True):
        # PEFT 0.21 takes every gate_proj, up_proj and down_proj of a model with experts for the experts' own, so that
        # Qwen3-MoE's dense layers (which are what we adapt) would go without.
        twin = peft.get_peft_model(model, config)
    for name, tensor in bank.tensors(k).items():
        if name.endswith(("lora_A", "lora_B")):
            module, _, leaf = name.rpartition(".")
            weight = twin.base_model.model.get_submodule(module)._modules[leaf]["default"].weight
            weight.data = tensor.clone()
    return twin.eval()


def plain_loss(model, examples):
    """Each example run alone by the model's own forward; summed cross entropy over all labels of all examples."""
    total, labels = 0.0, 0
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        wanted = ids[0].masked_fill(~torch.from_numpy(example.mask), -100)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, wanted[1:], ignore_index=-100, reduction="sum")
        labels += int((wanted[1:] != -100).sum())
    return total / labels


def peft_step(twin, bank, examples):
    """(plain loss, gradients by our names)."""
    total = plain_loss(twin, examples)
    total.backward()
    grads = {}
    for slot in bank.slots:
        module, _, leaf = slot.name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            grads[slot.name] = twin.base_model.model.get_submodule(module)._modules[leaf]["default"].weight.grad
        else:
            owner = twin.base_model.model.get_submodule(module)
            owner = owner._modules.get("base_layer", owner)
            grads[slot.name] = owner._parameters[leaf].grad
    return total.detach(), grads


def relative_error(mine, plain):
    """Largest difference of any tensor, relative to the largest number of that tensor."""
    assert mine.keys() == plain.keys()
    worst = 0.0
    for name, tensor in plain.items():
        assert tensor is not None, name
        assert tensor.any(), f"{name} has no gradient: the comparison would say nothing"
        worst = max(worst, float((mine[name] - tensor).abs().max() / tensor.abs().max()))
    return worst


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny products: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tools():
    """The functions above, for tests to use."""
    return SimpleNamespace(
        model=make_model, engine=make_engine, examples=make_examples, twin=peft_twin, peft_step=peft_step,
        error=relative_error, wide=Wide, narrow=Narrow, randomise=randomise,
        copy=copy.deepcopy, replace=replace, packed=packed_model, packs=packs, Example=Example,
        Engine=Engine, plain_loss=plain_loss,
    )  # fmt: skip


def pytest_generate_tests(metafunc):
    """A test that takes `family` runs for each, unless it names some itself."""
    named = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if "family" in metafunc.fixturenames and "family" not in named:
        metafunc.parametrize("family", FAMILIES)
