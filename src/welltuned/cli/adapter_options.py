"""The options of `welltuned adapter ...` and `welltuned eval`. Imports nothing heavy: `--help` reads them all."""

import argparse

VERBS = {
    "verify": "Compare every trained tensor with its checksum and its start, exactly; say which layers learned most.",
    "scale": "Make an adapter stronger or weaker, or find out how strong it should be.",
    "average": "The mean of several adapters of one base, or of an adapter and the base.",
    "merge": "Merge an adapter into its base, and compare the result with base and adapter.",
    "export": "Hand a run on: PEFT, merged safetensors, GGUF, LoRA as GGUF, Ollama.",
}
_RUN = "the directory of a finished run, or an adapter's folder"


def add_adapter(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    made = {name: verbs.add_parser(name, help=text, description=text) for name, text in VERBS.items()}
    for name, verb in made.items():
        verb.add_argument("--debug", action="store_true", help="show a traceback where an error ends the command")
        verb.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        if name not in ("average", "verify"):
            verb.add_argument("run", metavar="RUN", help=_RUN)
    made["verify"].add_argument("run", metavar="RUN", help=_RUN + ", or a whole model")
    made["verify"].add_argument(
        "--against",
        metavar="OTHER",
        help="what it should differ from: another adapter, checkpoint, run or model (default: its own start)",
    )
    _scale(made["scale"])
    _average(made["average"])
    _merge(made["merge"])
    _export(made["export"])


def _out(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--out", required=required, metavar="DIR", help="where to write, new or empty")


def _scale(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--by", type=float, metavar="X", help="multiply alpha by this (0.5 is the mean with the base)")
    how.add_argument("--sweep", action="store_true", help="measure several strengths on held-out rows, and choose")
    parser.add_argument("--strengths", metavar="LIST", help="for --sweep (default: 0,0.25,0.5,0.75,1,1.25)")
    parser.add_argument("--data", metavar="FILE", help="for --sweep: rows to judge by instead of the run's held-out")
    parser.add_argument("--rows", type=int, metavar="N", help="for --sweep: the first N rows only, of each")
    parser.add_argument("--keep", metavar="FILE", help="for --sweep: rows that stand for what must not be forgotten")
    parser.add_argument("--plot", metavar="FILE.svg", help="for --sweep: write the curves as a picture")
    _out(parser, required=False)


def _average(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help=_RUN + "; the word `base` for the untuned model among them"
    )
    parser.add_argument("--weights", metavar="LIST", help="one for each, such as 0.7,0.3 (default: all the same)")
    parser.add_argument(
        "--rank", metavar="R", help="of the result: a number, or `sum` to lose nothing (default: the adapters' own)"
    )
    parser.add_argument(
        "--ema",
        type=float,
        metavar="D",
        help="of one run: the mean of its checkpoints, each weighted by D to the power of the updates that it lies back"
        " (a run trained with ema_decay has the average over every update in its folder ema)",
    )
    _out(parser)


def _base_and_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="MODEL", help="merge into this model, such as QLoRA's base in 16 bits")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of merged weights"
    )


def _merge(parser: argparse.ArgumentParser) -> None:
    _base_and_dtype(parser)
    _out(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    targets = ["peft", "merged", "gguf", "lora-gguf", "ollama"]
    parser.add_argument("--to", required=True, choices=targets, help="the form to write")
    parser.add_argument(
        "--quantize", choices=["f32", "f16", "bf16", "q8_0"], default="f16", help="of GGUF files (default: f16)"
    )
    _base_and_dtype(parser)
    _out(parser)


def add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help=_RUN)
    parser.add_argument("--model", metavar="MODEL", help="judge this model instead of a run; needs --data")
    parser.add_argument("--data", metavar="DATA", help="rows to judge by (default: those that the run held out)")
    parser.add_argument("--rows", type=int, metavar="N", help="the first N rows only")
    parser.add_argument(
        "--metrics", metavar="LIST", help="judge replies too: exact, number, json, rougeL, bleu, separated by commas"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest reply in tokens")
    parser.add_argument("--tasks", metavar="LIST", help="hand it to lm-evaluation-harness with these tasks instead")
    parser.add_argument(
        "--harness",
        action="append",
        default=[],
        metavar="OPTION",
        help="for --tasks: an option of its own, --harness=-L5",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where the result and its page are written (default: in the run); with --tasks: where the harness writes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
