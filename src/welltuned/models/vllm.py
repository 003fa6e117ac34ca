"""Completions from a vLLM server, which is given the adapter as it is at that moment.

The server holds the base; before it is asked for completions, the adapter is written to a file, read back, and loaded
there under a name that is a hash of its weights. So no completion can be of other weights: the server answers with the
name it used, and what it keeps of prompts belongs to that name. One request a completion, each with a seed of its own.

The server's arithmetic is not ours. So it says with what probability it drew each token, and training counts with both.

vLLM's interface, used as of 0.10.2 (`return_token_ids`): https://docs.vllm.ai, "OpenAI-Compatible Server" and "LoRA
Adapters". It is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, `--enable-lora` and `--logprobs-mode
processed_logprobs`, without which probabilities are those at temperature 1.
"""

import atexit
import hashlib
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from welltuned.errors import InputError, RunError
from welltuned.models.adapter_file import CONFIG, save_adapter
from welltuned.models.lora import AdapterBank
from welltuned.models.sample import Completion, Sampling
from welltuned.recipe.keys import UNSERVED

KEY = "vllm_server_base_url"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
AT_ONCE = 256  # requests that wait at the same time; the server batches them as it can
ANSWER = 1_800.0  # seconds until an answer is given up
TRIES, PAUSE = 4, 2.0  # of a connection that fails, and seconds before the second; each later one waits twice as long


def rank_of_server(rank: int) -> int:
    """The least `--max-lora-rank` that takes this rank."""
    return next((r for r in RANKS if r >= rank), rank)


def serve_command(model: str, rank: int, longest: int) -> str:
    """How to start a server for sequences of up to so many tokens."""
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {model} --enable-lora --max-lora-rank {rank_of_server(rank)} "
        f"--max-model-len {longest} --logprobs-mode processed_logprobs"
    )


def require_served(config: Mapping[str, Any]) -> None:
    """Refuse an adapter with what vLLM does not load, or takes no notice of; one to go on from may have it.

    Raises:
        InputError: names the first such key of its adapter_config.json.
    """
    held = [key for key in (*UNSERVED, "target_parameters") if config.get(key)]
    held += ["bias"] if config.get("bias", "none") != "none" else []
    if held:
        mend = f"leave {KEY} out: this process samples then"
        raise InputError(f"vLLM does not load adapters with {held[0]}", where=KEY, mend=mend)


class VllmServer:
    """A server at a URL such as http://localhost:8000, and the adapter that it was last given."""

    def __init__(self, url: str):
        self._url = url.rstrip("/").removesuffix("/v1")
        self._run = secrets.token_hex(4)  # two runs may share a server
        self._name, self._folder = "", Path()
        atexit.register(self.close)

    def require(self, command: str, longest: int) -> None:
        """Raise InputError unless a server answers that takes sequences of so many tokens; `command` starts one."""
        try:
            models = self._get("/v1/models")
        except RunError as error:
            raise InputError(str(error), where=KEY, mend=f"start it: {command}") from error
        limits = [card["max_model_len"] for card in models.get("data", ()) if card.get("max_model_len")]
        if limits and max(limits) < longest:
            what = f"the server takes {max(limits):,} tokens, and a prompt with its answer may have {longest:,}"
            raise InputError(what, where=KEY, mend=f"start it with --max-model-len {longest}")

    def complete(
        self,
        bank: AdapterBank,
        prompts: Sequence[NDArray[np.int32]],
        names: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Completion]]:
        """As `sample.complete` with the bank's one adapter: for each prompt a completion a name, which is its seed.

        Raises:
            RunError: the server does not answer, refuses, or answers with what was not asked for.
        """
        self._give(bank)
        flat = [(ids.tolist(), name) for ids, group in zip(prompts, names, strict=True) for name in group]
        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(flat)))) as pool:
            made = iter(list(pool.map(lambda asked: self._one(asked[0], asked[1], sampling), flat)))
        return [[next(made) for _ in group] for group in names]

    def close(self) -> None:
        """Have the server forget the adapter, and remove its file; a server that is gone has forgotten."""
        name, folder, self._name = self._name, self._folder, ""
        if name:
            with suppress(RunError):
                self._post("/v1/unload_lora_adapter", {"lora_name": name})
            shutil.rmtree(folder, ignore_errors=True)

    # ── the adapter ──

    def _give(self, bank: AdapterBank) -> None:
        """Load the weights as they are, unless they are what the server has; then drop those before."""
        digest = hashlib.blake2b(bank.flat_KP.detach().cpu().numpy().tobytes(), digest_size=12).hexdigest()
        name = f"welltuned-{self._run}-{digest}"
        if name == self._name:
            return
        folder = Path(tempfile.mkdtemp(prefix="welltuned-vllm-"))
        try:
            save_adapter(bank, folder, bank.model.config.name_or_path)
            require_served(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.close()
        self._name, self._folder = name, folder

    # ── requests ──

    def _one(self, prompt: list[int], name: int, sampling: Sampling) -> Completion:
        asked = {
            "model": self._name,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # What is left out here would come from the model's generation_config.json.
            **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            "seed": name % 2**63,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # it is among the stop ids where it ends an answer
            "logprobs": 0,  # of the tokens that were drawn
            "return_token_ids": True,
        }
        answer = self._post("/v1/completions", asked)
        try:
            choice = answer["choices"][0]
            ids = np.asarray(choice["token_ids"], dtype=np.int32)
            logprobs = np.asarray(choice["logprobs"]["token_logprobs"], dtype=np.float32)
            served, ended = answer["model"], choice["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError, ValueError) as error:
            what = f"the vLLM server at {self._url} does not say which tokens it drew, and how likely they were"
            raise RunError(f"{what}: it needs vLLM 0.10.2 or later") from error
        fits = 0 < len(ids) == len(logprobs) <= sampling.max_new_tokens and bool(np.isfinite(logprobs).all())
        if served != self._name or not fits:
            what = f"{len(ids)} tokens and {len(logprobs)} probabilities, maybe not finite, of the adapter {served}"
            raise RunError(f"the vLLM server at {self._url} answered with {what}, asked for {self._name}")
        if ended and int(ids[-1]) not in sampling.stop_ids:
            raise RunError(f"the vLLM server at {self._url} ended an answer with token {ids[-1]}, which ends none")
        return Completion(ids, ended, -float(logprobs.sum(dtype=np.float64)), logprobs)

    def _get(self, path: str) -> dict[str, Any]:
        return self._answer(Request(self._url + path))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        return self._answer(Request(self._url + path, json.dumps(body).encode(), headers, method="POST"))

    def _answer(self, request: Request) -> dict[str, Any]:
        """What the server says; one that does not answer is asked again, one that refuses is not."""
        for attempt in range(TRIES):
            try:
                with urlopen(request, timeout=ANSWER) as reply:
                    text = reply.read()
                return json.loads(text) if text[:1] == b"{" else {}  # loading answers in words
            except HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                raise RunError(f"the vLLM server refuses {request.full_url} ({error.code}): {said}") from error
            except (OSError, HTTPException) as error:
                failed = error
            if attempt + 1 < TRIES:
                time.sleep(PAUSE * 2**attempt)
        raise RunError(f"no vLLM server answers at {request.full_url} ({failed})") from failed
