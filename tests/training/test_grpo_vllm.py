"""Sampling by a vLLM server: what it is asked, that it never has other weights, and what becomes of its faults.

The server here speaks vLLM's interface and computes with this package: it loads the adapter's file onto a model of its
own. The real one is asked by the slow test at the end, where WELLTUNED_VLLM names a server.
"""

import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import welltuned
from welltuned.errors import InputError, RunError
from welltuned.models import vllm
from welltuned.models.adapter_file import load_adapter
from welltuned.models.fuse import find_head, fuse
from welltuned.models.load import load_model
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.models.sample import Sampling, complete
from welltuned.models.vllm import VllmServer, rank_of_server, serve_command
from welltuned.objectives.grpo import GrpoSettings, LossType, policy_loss
from welltuned.recipe import load_recipe


class Served:
    """What the server holds, was asked, and is told to do wrong."""

    def __init__(self, model_dir: str):
        self.model_dir, self.adapters, self.requests = model_dir, {}, []
        self.lock, self.stale, self.max_model_len, self.change = threading.Lock(), False, 512, lambda answer: answer

    def load(self, name: str, path: str) -> None:
        if self.stale and self.adapters:
            self.adapters[name] = next(iter(self.adapters.values()))
            return
        model = load_model(self.model_dir, dtype=torch.float32, device="cpu").eval()
        bank = load_adapter(model, Path(path))
        fuse(model, bank)
        self.adapters[name] = (model, find_head(model))

    def complete(self, asked: dict) -> dict:
        model, head = self.adapters[asked["model"]]
        sampling = Sampling(
            max_new_tokens=asked["max_tokens"], temperature=asked["temperature"], top_p=asked["top_p"],
            stop_ids=tuple(asked["stop_token_ids"]),
        )  # fmt: skip
        prompt = np.asarray(asked["prompt"], dtype=np.int32)
        with packed_model(model):
            made = complete(model, head, [prompt], [[asked["seed"]]], sampling)[0][0]
        ids = torch.from_numpy(np.concatenate([prompt, made.ids]).astype(np.int64))
        with torch.no_grad():
            z = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        logprob = (z / (asked["temperature"] or 1.0)).log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
        return {
            "model": asked["model"],
            "choices": [
                {
                    "token_ids": made.ids.tolist(),
                    "logprobs": {"token_logprobs": logprob.tolist()},
                    "finish_reason": "stop" if made.ended else "length",
                }
            ],
        }


@contextmanager
def serving(served: Served):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": [{"id": "base", "max_model_len": served.max_model_len}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.requests.append((self.path, asked))
                if self.path == "/v1/load_lora_adapter":
                    served.load(asked["lora_name"], asked["lora_path"])
                    return self.reply(200, "Success")
                if self.path == "/v1/unload_lora_adapter":
                    del served.adapters[asked["lora_name"]]
                    return self.reply(200, "Success")
                if asked["model"] not in served.adapters:
                    return self.reply(404, {"error": {"message": f"The model {asked['model']} does not exist."}})
                self.reply(200, served.change(served.complete(asked)))

        def reply(self, status, body):
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served(tiny_model_dir):
    return Served(str(tiny_model_dir))


@pytest.fixture(scope="module")
def bank(tiny_model_dir):
    return attach(load_model(str(tiny_model_dir), dtype=torch.float32, device="cpu"), LoraSettings(r=2))


@pytest.fixture(scope="module")
def options(tiny_model_dir, write_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    rows = [{"prompt": f"say {c} {n}", "answer": str(n)} for n, c in enumerate("abcdefgh" * 4)]
    (folder / "rewards.py").write_text(
        "def vowels(completions):\n    return [sum(c.count(v) for v in 'aeiou') for c in completions]\n"
    )
    return dict(
        model=str(tiny_model_dir), data=write_rows(folder / "prompts.jsonl", rows), method="grpo",
        rewards=[f"{folder}/rewards.py:vowels"], num_generations=4, effective_batch_size=8, max_completion_length=6,
        max_steps=2, learning_rate=1e-2, eval_steps=2, mask_truncated_completions=False, num_iterations=1,
    )  # fmt: skip


def test_a_run_by_a_server_is_the_run_by_this_process(run, options, served):
    alone = run(**options)
    with serving(served) as url:
        beside = run(**options, vllm_server_base_url=url)
    for name, tensor in alone.adapter.items():
        torch.testing.assert_close(beside.adapter[name], tensor, rtol=1e-3, atol=1e-4)  # AdamW enlarges rounding
    for line in beside.updates:
        assert 0 <= line["sampler_gap"] < 1e-4
        assert line["entropy"] > 0
    assert all("sampler_gap" not in line for line in alone.updates)
    plans = [(r.path / "plan.yaml").read_text() for r in (alone, beside)]
    assert ["vllm_importance_sampling_clip_max" in plan for plan in plans] == [False, True]


def test_every_update_samples_with_the_weights_of_that_update(run, options, served):
    with serving(served) as url:
        run(**options, vllm_server_base_url=url)
    loads = [asked["lora_name"] for path, asked in served.requests if path == "/v1/load_lora_adapter"]
    drops = [asked["lora_name"] for path, asked in served.requests if path == "/v1/unload_lora_adapter"]
    assert len(loads) == len(set(loads)) == 3  # the start, and after each of two updates
    assert drops == loads[:-1]
    now, used = None, set()
    for path, asked in served.requests:
        if path == "/v1/load_lora_adapter":
            now = asked["lora_name"]
        if path == "/v1/completions":
            assert asked["model"] == now
            used.add(asked["model"])
    assert used == set(loads)


def test_what_is_asked_leaves_nothing_to_the_servers_defaults(run, options, served):
    with serving(served) as url:
        run(**options, vllm_server_base_url=url, temperature=0.9, top_p=0.8)
    asked = [a for path, a in served.requests if path == "/v1/completions" and a["temperature"] > 0]
    seeds = [a["seed"] for a in asked]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    for a in asked:
        assert (a["temperature"], a["top_p"], a["top_k"], a["min_p"], a["repetition_penalty"]) == (0.9, 0.8, -1, 0, 1)
        assert a["ignore_eos"] and a["return_token_ids"] and a["logprobs"] == 0 and a["stop_token_ids"]


def test_the_gap_shows_stale_weights_and_another_base_ends_the_run(run, options, served, make_model_dir):
    served.stale = True
    with serving(served) as url:
        updates = run(**options, vllm_server_base_url=url).updates
    assert updates[0]["sampler_gap"] < 1e-4 < updates[1]["sampler_gap"]
    other = Served(str(make_model_dir(seed=1)))
    with serving(other) as url, pytest.raises(RunError, match="nats a token from this model's: it holds another base"):
        run(**options, vllm_server_base_url=url)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: {**a, "model": "base"}, "adapter base, asked for welltuned-"),
        (lambda a: {"choices": [{"text": "x"}], "model": a["model"]}, "needs vLLM 0.10.2"),
        (lambda a: _first(a, token_ids=a["choices"][0]["token_ids"] * 9), "tokens and .* probabilities"),
        (lambda a: _first(a, logprobs={"token_logprobs": [float("nan")] * 6}), "maybe not finite"),
    ],
)
def test_a_server_that_answers_wrongly_is_not_believed(bank, served, change, message):
    served.change = change
    with serving(served) as url, pytest.raises(RunError, match=message):
        VllmServer(url).complete(bank, [np.arange(4)], [[1]], Sampling(max_new_tokens=6))


def _first(answer, **changes):
    return {**answer, "choices": [{**answer["choices"][0], **changes}]}


def test_a_server_that_is_not_there_is_said_before_anything_is_loaded(options, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "PAUSE", 0.0)
    with pytest.raises(InputError, match="no vLLM server answers at http://127.0.0.1:9/v1.*start it: VLLM_ALLOW"):
        welltuned.train(out=tmp_path / "run", **options, vllm_server_base_url="http://127.0.0.1:9")
    assert not (tmp_path / "run").exists()


def test_a_server_of_shorter_sequences_is_refused(options, served, tmp_path):
    served.max_model_len = 8
    with serving(served) as url, pytest.raises(InputError, match="takes 8 tokens.*--max-model-len"):
        welltuned.train(out=tmp_path / "run", **options, vllm_server_base_url=url)


def test_a_server_that_is_lost_is_asked_again_and_then_given_up(bank, monkeypatch):
    monkeypatch.setattr(vllm, "PAUSE", 0.0)
    tried = []
    monkeypatch.setattr(vllm, "urlopen", lambda request, timeout: tried.append(1) or _refuse())
    with pytest.raises(RunError, match="no vLLM server answers"):
        VllmServer("http://127.0.0.1:9").complete(bank, [np.arange(4)], [[1]], Sampling(max_new_tokens=2))
    assert len(tried) == vllm.TRIES


def _refuse():
    raise ConnectionResetError("reset")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tune="full"), "trains the base that it holds"),
        (dict(use_dora=True), "does not load adapters with use_dora"),
        (dict(alpha_pattern={"q_proj": 4}), "does not load adapters with alpha_pattern"),
        (dict(bias="all"), "does not load adapters with bias"),
        (dict(vllm_server_base_url="localhost:8000"), "a URL such as"),
        (dict(vllm_server_base_url=None, vllm_importance_sampling_clip_max=2.0), "read only with"),
        (dict(method="sft", rewards=None), "not read by method sft"),
    ],
)
def test_what_a_server_cannot_do_is_refused(options, changes, message):
    wanted = {**options, "vllm_server_base_url": "http://localhost:8000", **changes}
    if wanted["method"] == "sft":
        wanted = {k: wanted[k] for k in ("model", "data", "method", "vllm_server_base_url")}
    with pytest.raises(InputError, match=message):
        load_recipe(None, wanted)


@pytest.mark.parametrize("held", [dict(use_dora=True), dict(alpha_pattern=(("q_proj", 4.0),))])
def test_an_adapter_that_vllm_would_misread_is_not_given_to_it(tiny_model_dir, served, held):
    """Which the recipe's own keys do not show where training goes on from an adapter."""
    bank = attach(load_model(str(tiny_model_dir), dtype=torch.float32, device="cpu"), LoraSettings(r=2, **held))
    with serving(served) as url, pytest.raises(InputError, match=f"does not load adapters with {next(iter(held))}"):
        VllmServer(url).complete(bank, [np.arange(4)], [[1]], Sampling(max_new_tokens=2))
    assert not served.requests


def test_the_correction_multiplies_the_clipped_term_only():
    torch.manual_seed(0)
    logprob = torch.randn(5, dtype=torch.float64, requires_grad=True)
    old, ref, c = torch.randn(5), torch.randn(5), torch.tensor([2.0, 0.5, 1.0, 1.5, 0.1], dtype=torch.float64)
    sequence, advantage, weight = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, -2.0]), torch.tensor([0.2, 0.3])
    settings = GrpoSettings(loss_type=LossType.GRPO, max_completion_length=8, beta=0.1)
    got = policy_loss(logprob, old, ref, sequence, advantage, weight, settings, c)
    a, w = advantage.double()[sequence], weight.double()[sequence]
    ratio, below = (logprob - old).exp(), ref - logprob
    plain = w * (-c * torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a) + 0.1 * (below.exp() - below - 1))
    torch.testing.assert_close(got.value, plain.sum())
    uncorrected = policy_loss(logprob, old, ref, sequence, advantage, weight, settings)
    assert not torch.isclose(uncorrected.value, got.value)


def test_the_command_takes_a_rank_that_vllm_knows():
    assert [rank_of_server(r) for r in (1, 16, 20, 300)] == [8, 16, 32, 320]
    assert "--max-lora-rank 32 --max-model-len 700" in serve_command("m", 17, 700)


@pytest.mark.slow
@pytest.mark.skipif("WELLTUNED_VLLM" not in os.environ, reason="WELLTUNED_VLLM names no vLLM server, model and data")
def test_the_real_server(tmp_path):
    """WELLTUNED_VLLM=URL,MODEL: a server of that model, which this machine can load too."""
    url, model = os.environ["WELLTUNED_VLLM"].split(",")
    (tmp_path / "rewards.py").write_text("def short(completion):\n    return -len(completion)\n")
    rows = [{"prompt": f"Name {n} animals."} for n in range(2, 34)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = dict(num_generations=4, effective_batch_size=16, max_completion_length=24, max_steps=3, eval_steps=3)
    welltuned.train(
        model=model, data=str(tmp_path / "prompts.jsonl"), method="grpo", rewards=[f"{tmp_path}/rewards.py:short"],
        out=tmp_path / "run", vllm_server_base_url=url, learning_rate=1e-3, dtype="float32", **options,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["sampler_gap"] for line in lines if "sampler_gap" in line]
    assert len(gaps) == 3 and max(gaps) < 0.05
