"""Does llama.cpp say what transformers says? A finished run is exported, and both are asked the same, greedily.

python benchmarks/llama_cpp_replies.py RUN --llama-python PYTHON   # an environment with llama-cpp-python

Each export (F16, Q8_0, and the base with the adapter as a LoRA file) is loaded by llama.cpp, which gets the very token
ids that transformers gets, and must answer with the same tokens. Results: results/llama_cpp_replies.json.
"""

import argparse
import json
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from common import describe_machine

from welltuned.api import Tuned, export, load
from welltuned.data.conversation import Message
from welltuned.models.generate import stop_ids

RESULTS = Path(__file__).parent / "results" / "llama_cpp_replies.json"
PROMPTS = (
    "My kettle leaks since yesterday. Please send me a new one.",
    "I was charged twice for my March invoice, order A-1042. I want my money back.",
    "Where is my parcel?",
    "Write one sentence about the sea.",
)
CLIENT = """
import json, sys
import llama_cpp
job = json.load(sys.stdin)
model = llama_cpp.Llama(job["model"], lora_path=job["lora"], n_ctx=512, verbose=False, seed=1, n_threads=1)
replies = []
for ids in job["prompts"]:
    reply = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        if token in job["stops"] or len(reply) == job["most"]:
            break
        reply.append(token)
    replies.append(reply)
texts = [model.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]
print(json.dumps({"replies": replies, "texts": texts, "version": llama_cpp.__version__}))
"""


@torch.inference_mode()
def greedy(tuned: Tuned, ids: list[int], stops: list[int], most: int) -> list[int]:
    """transformers' own most likely tokens."""
    out = tuned.model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=most, eos_token_id=stops, pad_token_id=stops[0]
    )[0, len(ids) :].tolist()
    return next((out[:i] for i, token in enumerate(out) if token in stops), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run with an adapter")
    parser.add_argument("--llama-python", required=True, help="a Python in whose environment llama-cpp-python is")
    parser.add_argument("--system", help="the system message that the run was trained with")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    tuned = load(arguments.run, device="cpu")
    assert tuned.bank is not None
    system = [Message("system", arguments.system)] if arguments.system else []
    prompts = [tuned.prompt([*system, Message("user", text)]) for text in PROMPTS]
    stops, most = stop_ids(tuned.model, tuned.tokenizer), arguments.max_new_tokens
    expected = [greedy(tuned, ids, stops, most) for ids in prompts]
    with tuned.bank.disabled():
        untuned = [greedy(tuned, ids, stops, most) for ids in prompts]
    results = {}
    with tempfile.TemporaryDirectory() as place:
        for name, model, lora in exports(Path(arguments.run), Path(place)):
            job = {"model": model, "lora": lora, "prompts": prompts, "stops": stops, "most": most, "texts": PROMPTS}
            said = ask(arguments.llama_python, job)
            tokens = [tuned.tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
            results[name] = {
                "same_replies": sum(a == b for a, b in zip(said["replies"], expected, strict=True)),
                "same_tokens_of_prompts": said["texts"] == tokens,
                "megabytes": round(Path(model).stat().st_size / 1e6, 1),
                "replies": [tuned.tokenizer.decode(reply) for reply in said["replies"]],
            }
            print(name, results[name]["same_replies"], "of", len(PROMPTS))
    document = {
        "machine": describe_machine(),
        "run": Path(arguments.run).name,
        "prompts": list(PROMPTS),
        "transformers": [tuned.tokenizer.decode(reply) for reply in expected],
        "untuned": [tuned.tokenizer.decode(reply) for reply in untuned],
        "llama_cpp": results,
        "versions": {"llama-cpp-python": said["version"], "gguf": version("gguf")},
    }
    arguments.out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def exports(run: Path, place: Path) -> list[tuple[str, str, str | None]]:
    """(name, model file, LoRA file) of each thing that llama.cpp is to run."""
    for kind in ("f16", "q8_0"):
        export(run, to="gguf", out=place / kind, quantize=kind)
    export(run, to="lora-gguf", out=place / "lora")
    base = base_file(run, place / "base.gguf")
    merged = {kind: str(next((place / kind).glob("*.gguf"))) for kind in ("f16", "q8_0")}
    lora = str(next((place / "lora").glob("*.gguf")))
    return [("f16", merged["f16"], None), ("q8_0", merged["q8_0"], None), ("base f16 + lora", base, lora)]


def base_file(run: Path, path: Path) -> str:
    """The untuned base as GGUF in F16, for the LoRA file to be put on; from a GGUF base by way of its dense weights."""
    from welltuned.adapters.gguf.write import Quantization, write_model
    from welltuned.finished.find import find
    from welltuned.models.load import load_config, load_model, load_tokenizer
    from welltuned.models.resolve import SourceKind, resolve

    found = find(run)
    folder, tokenizer = Path(found.model), load_tokenizer(found.model)
    if resolve(found.model).kind is SourceKind.GGUF:
        folder = path.with_suffix(".dense")
        load_model(found.model, dtype=torch.float32).save_pretrained(folder)
    write_model(
        folder,
        path,
        config=load_config(str(folder)),
        tokenizer=tokenizer,
        template=found.chat_template,
        kind=Quantization.F16,
        name="base",
    )
    return str(path)


def ask(python: str, job: dict) -> dict:
    done = subprocess.run([python, "-c", CLIENT], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
