"""Decoder layers that are compiled: the numbers of plain ones, one code for all layers and for each static length.

Most tests let torch trace, and run what it traced: the compiler behind it would take minutes over all of them, and has
tests of its own here, marked slow.
"""

from importlib.util import find_spec
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from welltuned.kernels import attention, nodes
from welltuned.models import compiled as module
from welltuned.models.compiled import compile_layers, refusal, warm_up
from welltuned.models.frozen import quantize_linears
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import ALL_LINEAR, LoraSettings, attach
from welltuned.models.packed import Packed, hidden_states, packed_model
from welltuned.models.recompute import checkpoint_layers
from welltuned.models.static import Static, padded_share, static_lengths, static_of

SETTINGS = LoraSettings(r=4, lora_alpha=8, lora_dropout=0.2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def traced(monkeypatch):
    """What torch traced is run as it is."""
    monkeypatch.setattr(module, "BACKEND", "aot_eager")
    torch._dynamo.reset()


# ── lengths ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 4))
def test_lengths_pad_least(sizes, most):
    """Of all choices of so many lengths none pads less."""
    lengths = static_lengths(sizes, most, 4)
    distinct = sorted({-(-n // 4) * 4 for n in sizes})
    assert len(lengths) <= most and lengths[-1] == distinct[-1] and list(lengths) == sorted(set(lengths))

    def laid(chosen):
        return sum(min(n for n in chosen if n >= size) for size in sizes)

    every = (c for k in range(1, most + 1) for c in combinations(distinct, k) if c[-1] == distinct[-1])
    assert laid(lengths) == min(laid(c) for c in every)
    assert padded_share(sizes, lengths) == pytest.approx(1 - sum(sizes) / laid(lengths))


def test_what_fits_nowhere_runs_as_it_is():
    static = Static((8, 16), longest=10)
    assert [static.fitting(rows) for rows in ([3, 5], [9], [5, 5, 5])] == [8, 16, 16]
    assert static.fitting([9, 9]) is None and static.fitting([11]) is None and static.plain == 2
    assert (static.tokens, static.padding) == (32, 8)
    assert static.tail(25) == [10, 10, 5] and static.tail(0) == []
    with torch.no_grad():
        assert static.fitting([3]) is None
    assert static.plain == 2  # evaluation never was to be compiled


def test_compiling_too_often_ends_it():
    static = Static((8,), longest=8, graphs=3, most=2)
    assert static.fitting([4]) is None and "compiled 3 times" in static.problem


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Engines:
    """Two models of the same numbers, one of them compiled."""

    def __init__(
        self,
        tools,
        family,
        lengths,
        longest=40,
        changes=None,
        adapters=SETTINGS,
        nf4=False,
        again=False,
        any_length=False,
    ):
        self.sides = []
        for side in (False, True):
            model = tools.model(family, **(changes or {}))
            if nf4:
                quantize_linears(model)
            bank = attach(model, adapters)
            fused = fuse(model, bank)
            if side:
                self.static = compile_layers(model, fused)
            if again:
                checkpoint_layers(model, fused)
            self.sides.append((model, bank, find_head(model)))
        self.warm = warm_up(*self.sides[1][:2], self.static, lengths, longest, any_length=any_length)

    def agree(self, lengths, branches=None, per_adapter=None, rtol=2e-5):
        """Hidden states and gradients of one micro-batch."""
        ids = torch.randint(1, 97, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
        found = []
        for model, bank, _ in self.sides:
            torch.manual_seed(3)
            bank.flat_KP.copy_(torch.randn(bank.flat_KP.shape) * 0.05)
            bank.grad_KP.zero_()
            bank.use_rows(per_adapter, tuple((n, 7 + i) for i, n in enumerate(lengths)))
            with packed_model(model):
                out = hidden_states(model, Packed(ids, lengths, branches))
                bank.use_rows(None, ())  # a backward pass that runs a layer again must not see this
                (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
            found.append((out.detach(), bank.grad_KP.clone()))
        for mine, plain in zip(found[1], found[0], strict=True):
            assert mine.shape == plain.shape and plain.abs().max() > 0
            torch.testing.assert_close(mine, plain, rtol=rtol, atol=rtol * float(plain.abs().max()))


LAYERS = dict(num_hidden_layers=4)
RAGGED = ([11, 4, 17], [30], [1] * 9, [25, 7], [40, 20, 3], [5, 33, 12], [2, 60])


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kept", "recomputed"])
def test_ragged_updates_are_compiled_once_for_each_length(tools, traced, again):
    """With dropout, and with layers that run again; the seventh holds a row that is too long."""
    engines = Engines(tools, "llama", (32, 64), changes=LAYERS, again=again)
    assert engines.warm.problem is None and engines.warm.error < 1e-5
    assert engines.warm.graphs == engines.static.graphs == 2
    for lengths in RAGGED:
        engines.agree(lengths)
    assert engines.static.graphs == 2 and engines.static.problem is None and engines.static.plain == 1
    laid = [32, 32, 32, 32, 64, 64]
    assert engines.static.padding == sum(laid) - sum(sum(rows) for rows in RAGGED[:-1])


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_any_length_has_one_code(tools, traced, family):
    """Nothing is padded; of two kinds of layers each has its own."""
    engines = Engines(tools, family, (64, 33), any_length=True, longest=64)
    graphs = {"llama": 1, "gemma3": 2}[family]
    assert engines.warm.problem is None and engines.warm.graphs == graphs and engines.warm.lengths == ()
    for lengths in (*RAGGED, [32], [16, 16], [1]):
        engines.agree(lengths)
    assert engines.static.graphs == graphs and engines.static.problem is None
    assert engines.static.padding == 0 and engines.static.plain == 1  # the row of one token


@pytest.mark.slow
def test_warming_up_changes_nothing(tools, traced):
    engines = Engines(tools, "llama", (32,))
    (_, plain, _), (model, bank, _) = engines.sides
    assert torch.equal(plain.flat_KP, bank.flat_KP) and not bank.grad_KP.any()
    assert bank.rows.ledger is None and not bank.rows.dropout.p
    with torch.no_grad(), packed_model(model):
        tokens = engines.static.tokens
        hidden_states(model, Packed(torch.arange(1, 9), [8]))
        assert engines.static.tokens == tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["qwen3", "mistral", "llama with biases", "phi3", "olmo3", "gemma3", "granite", "gpt2"]
)
def test_families(tools, traced, family):
    """Windows, biases, norms of every kind; where two kinds of layers alternate, two codes."""
    engines = Engines(tools, family, (32,))
    assert engines.warm.problem is None
    engines.agree([11, 4, 12])


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3 moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("targets", [(ALL_LINEAR,), (ALL_LINEAR, "experts")], ids=str)
def test_experts(tools, traced, family, targets):
    adapters = LoraSettings(r=4, lora_alpha=8, target_modules=targets if len(targets) > 1 else targets[0])
    engines = Engines(tools, family, (32,), adapters=adapters, changes=dict(num_hidden_layers=3))
    if len(targets) > 1:
        assert engines.warm.problem is None
    else:
        assert engines.warm.problem.startswith("compiling failed")  # transformers' own experts look at numbers
    engines.agree([11, 4, 12])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="4-bit weights need bitsandbytes")
def test_four_bit_weights(tools, traced):
    """With adapters and, on some projections, without."""
    adapters = LoraSettings(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"))
    changes = dict(hidden_size=64, intermediate_size=128, head_dim=16)
    engines = Engines(tools, "llama", (32,), adapters=adapters, nf4=True, changes=changes)
    assert engines.warm.problem is None
    engines.agree([11, 4, 12])


@pytest.mark.slow
def test_several_adapters(tools, traced):
    adapters = [LoraSettings(r=r, lora_alpha=a) for r, a in ((4, 8), (2, 8), (4, 2))]
    engines = Engines(tools, "llama", (32,), adapters=adapters)
    engines.agree([11, 4, 12], per_adapter=(11, 0, 16))
    engines.agree([9, 9, 9], per_adapter=(9, 9, 9))
    assert engines.static.graphs == 1


@pytest.mark.slow
def test_branches(tools, traced):
    engines = Engines(tools, "llama", (32, 64))
    engines.agree([17, 9], [(4, 6), (3, 3)])
    engines.agree([40, 9, 2], [(10, 6, 5), (3, 3), ()])
    assert engines.static.graphs == 2


@pytest.mark.slow
def test_lengths_reach_a_gpus_attention_as_tensors(tools, traced, monkeypatch):
    """What half precision on a GPU is given: bounds of any number of examples in one code, no length among them."""

    @torch.library.custom_op("welltuned_test::varlen", mutates_args=())
    def op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor,
           most: int, scale: float) -> torch.Tensor:  # fmt: skip
        out = q.new_empty(q.shape[1], q.shape[0], v.shape[2])
        for b in range(len(queries) - 1):
            (i, j), (m, n) = queries[b : b + 2].tolist(), keys[b : b + 2].tolist()
            assert n - m <= most
            out[i:j] = attention.attention_reference(q[:, i:j], k[:, m:n], v[:, m:n], scale).transpose(0, 1)
        return out

    op.register_fake(lambda q, k, v, queries, keys, most, scale: q.new_empty(q.shape[1], q.shape[0], v.shape[2]))

    def back(ctx, g):
        k, v = ctx.saved_tensors
        own = g.sum((1, 2))[None, :, None]  # of its own row: nothing that a row beside it could change
        return g.transpose(0, 1), k * own, v * own, None, None, None, None

    op.register_autograd(back, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:3]))

    def varlen(q, k, v, seen, scale, window):
        if seen.rows_K is not None:
            k, v = k.index_select(1, seen.rows_K), v.index_select(1, seen.rows_K)
        return op(q, k, v, seen.query_B, seen.key_B, seen.longest[1], scale)

    for place in (nodes, attention):
        monkeypatch.setattr(place, "takes_varlen", lambda q: True)
        monkeypatch.setattr(place, "varlen", varlen)
    monkeypatch.setattr(module, "on_gpu", lambda hidden: True)
    engines = Engines(tools, "llama", (32, 64), changes=LAYERS)
    assert engines.warm.problem is None and engines.warm.graphs == 2
    for lengths in RAGGED[:-1]:
        engines.agree(lengths)
    assert engines.static.graphs == 2 and engines.static.problem is None


# ── what is not compiled, and what goes wrong ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["gemma2", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_attention_that_is_not_compiled_is_said(tools, traced, family):
    engines = Engines(
        tools, family, (32,), adapters=LoraSettings(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
    )
    assert engines.warm.problem == "compiling failed (soft-capped logits and attention sinks are not compiled)"
    engines.agree([11, 4, 12])


def test_refusals(tools):
    model = tools.model("llama")
    attach(model, LoraSettings(r=4, lora_alpha=8, use_dora=True))
    assert "DoRA" in refusal(model)
    assert "one at a time" in refusal(tools.model("falcon"))
    again = tools.model("llama")
    checkpoint_layers(again, fuse(again, None))
    assert "in another way already" in refusal(again)
    static = compile_layers(again, fuse(again, None))
    assert static.problem is not None and static_of(again) is None
    found = warm_up(again, None, static, (32,), 32)
    assert found.problem == static.problem and found.graphs == 0


@pytest.mark.slow
def test_a_compiler_that_fails(tools, traced, monkeypatch):
    def fail(graph, inputs):
        raise OSError("no compiler is found\nin all of the path")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: fail)
    engines = Engines(tools, "llama", (32,))
    assert "no compiler is found" in engines.warm.problem and "all of the path" not in engines.warm.problem
    engines.agree([11, 4, 12], rtol=0.0)


@pytest.mark.parametrize(
    "fault", [pytest.param("value", marks=pytest.mark.slow), "gradient", pytest.param("tail", marks=pytest.mark.slow)]
)
def test_wrong_numbers_are_found_and_not_used(tools, traced, monkeypatch, fault):
    """Planted faults: a compiler that computes something else, half of a gradient lost, a tail that is attended to."""
    if fault == "value":
        real = nodes.gated_mlp_node
        from welltuned.models import fuse as fuse_module

        monkeypatch.setattr(fuse_module, "gated_mlp_node", lambda *a: real(*a) * 1.01)
    elif fault == "gradient":
        real_backward = nodes.project_backward

        def wrong(*args):
            dx, da, db = real_backward(*args)
            return dx, da * 0.9, db

        monkeypatch.setattr(nodes, "project_backward", wrong)
    else:
        monkeypatch.setattr(nodes, "layout", lambda ledger: ([int(ledger[1 : 1 + int(ledger[0])].sum())], [()]))
    engines = Engines(tools, "llama", (32,), changes=LAYERS)
    assert "other numbers" in engines.warm.problem and engines.warm.error > 1e-3
    engines.agree([11, 4, 12], rtol=0.0)


@pytest.mark.slow
def test_undone(tools, traced):
    model = tools.model("llama")
    bank = attach(model, SETTINGS)
    fused = fuse(model, bank)
    static = compile_layers(model, fused)
    assert warm_up(model, bank, static, (32,), 32).problem is None
    fused.undo()
    assert not any("forward" in m.__dict__ or "fused_rms_norm" in m.__dict__ for m in model.modules())


# ── the compiler itself ──────────────────────────────────────────────────────────────────────────────────────────────


def inductor(tools, **options):
    torch._dynamo.reset()
    engines = Engines(tools, options.pop("family", "llama"), (64, 128), changes=LAYERS, **options)
    assert engines.warm.problem is None and engines.warm.error < 2e-6 and engines.warm.graphs == 2
    for lengths in ([11, 4, 17], [40, 40, 3], [25, 30, 40, 1]):
        engines.agree(lengths)
    assert engines.static.graphs == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"again": True}, {"family": "mistral"}, {"family": "qwen3"}], ids=str)
def test_compiled_by_inductor(tools, options):
    inductor(tools, **options)


def test_a_gpus_attention_is_traced_forward_and_back(tools, monkeypatch):
    """No GPU is needed to see torch's own node for variable lengths in the graphs, once a layer, with its backward."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def shapes_only(graph, inputs):
        """Nothing is computed: outputs are zeros of the shapes that were traced."""
        graphs.append([str(node.target) for node in graph.graph.nodes])
        wanted = [node if node is None else node.meta["val"] for node in graph.graph.output_node().args[0]]

        def known(size):
            return size.node.hint if isinstance(size, torch.SymInt) else size

        def made(one):
            is_tensor = isinstance(one, torch.Tensor)
            return torch.zeros([known(n) for n in one.shape], dtype=one.dtype) if is_tensor else known(one)

        def run(*args):
            return [made(one) for one in wanted]

        return run

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=shapes_only, bw_compiler=shapes_only)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    monkeypatch.setattr(nodes, "takes_varlen", lambda q: True)
    monkeypatch.setattr(module, "on_gpu", lambda hidden: True)
    model = tools.model("llama", **LAYERS).to(torch.bfloat16)
    bank = attach(model, LoraSettings(r=4, lora_alpha=8))
    static = compile_layers(model, fuse(model, bank))
    static.lengths, static.longest = (32, 64), 64
    with packed_model(model):
        for lengths in ([11, 4, 12], [30], [20, 9, 9]):
            hidden_states(model, Packed(torch.ones(sum(lengths), dtype=torch.int64), lengths)).float().sum().backward()
    forward, backward = (
        [g for g in graphs if f"torch_attn._varlen_attn{way}.default" in g] for way in ("", "_backward")
    )
    assert len(forward) == len(backward) == static.graphs == 2
    for graph in forward:
        assert graph.count("torch_attn._varlen_attn.default") == 1 and graph.count("welltuned.lora.default") == 4
        assert graph.count("welltuned.gated_mlp.default") == 1
    for graph in backward:  # nothing that is a node is run a second time
        assert not {"torch_attn._varlen_attn.default", "welltuned.lora.default", "welltuned.gated_mlp.default"} & {
            *graph
        }
        assert graph.count("welltuned.lora_backward.default") == 4


@pytest.mark.slow
def test_in_half_precision(tools, traced):
    """bfloat16 as on a GPU: torch's own norm, adapters in float32."""
    model = tools.model("llama", **LAYERS).to(torch.bfloat16)
    bank = attach(model, LoraSettings(r=4, lora_alpha=8))
    static = compile_layers(model, fuse(model, bank))
    found = warm_up(model, bank, static, (64,), 40)
    assert found.problem is None and found.graphs == 1 and 0 <= found.error < 0.03
