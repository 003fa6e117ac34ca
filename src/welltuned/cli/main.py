"""welltuned COMMAND ...: the parser, exit codes, and one sentence for each error."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from threading import current_thread, main_thread
from types import FrameType
from typing import NoReturn

import welltuned
from welltuned.cli.adapter_options import add_adapter, add_eval
from welltuned.cli.safe import visible
from welltuned.errors import InputError, WelltunedError
from welltuned.facts.machine import require_one_process
from welltuned.recipe import FIELDS, Method, Tune

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("welltuned.cli.demo", "Fine-tune a small real model on a small real task, and see what it learned."),
    "data": (
        "welltuned.cli.data",
        "Show what data will teach a model: what is trained of each row, lengths, and everything that looks wrong.",
    ),
    "plan": (
        "welltuned.cli.plan",
        "Choose every hyperparameter from the model, the data and the machine, and say why.",
    ),
    "why": (
        "welltuned.cli.why",
        "Say why a hyperparameter has its value: the rule, what speaks for and against it, and what would settle it.",
    ),
    "check": ("welltuned.cli.check", "Say what is wrong with a configuration of welltuned, TRL, Axolotl and others."),
    "train": ("welltuned.cli.train", "Plan, train, evaluate and verify; write a Run directory."),
    "sweep": (
        "welltuned.cli.sweep",
        "Try learning rates, or other values, on your own rows: many adapters at once on one base, stopped early.",
    ),
    "resume": ("welltuned.cli.resume", "Go on with a run that was interrupted, from its newest sound checkpoint."),
    "chat": ("welltuned.cli.chat", "Talk to a tuned model."),
    "eval": ("welltuned.cli.eval", "Measure a tuned model beside its base: held-out loss, and how good replies are."),
    "report": ("welltuned.cli.report", "Write the page of a run: report.html in it, or elsewhere."),
    "serve": ("welltuned.cli.serve", "Show the runs beneath a folder in a browser, live while they train."),
    "adapter": ("welltuned.cli.adapter", "What comes after training: verify, scale, average, merge, export."),
}

SHARED = ("train", "resume")  # what several processes do together


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one sentence, as every other error here is said."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, mend=f"see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0 fine, 1 the run failed, 2 the input is wrong (one sentence, and with --debug a traceback).

    A signal that ends a command gives 128 and its number, as shells count: 130 after Ctrl-C, 143 after SIGTERM.
    """
    given = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; the GGUF reader's bar has no other switch
    try:
        arguments = build_parser().parse_args(given)
        if arguments.command not in SHARED:
            require_one_process(f"welltuned {arguments.command}")
        run: Callable[[argparse.Namespace], int] = import_module(COMMANDS[arguments.command][0]).run
        with _cleaning_up():
            return run(arguments)
    except WelltunedError as error:
        if "--debug" in given:
            traceback.print_exc()
        if not error.quiet:
            print("welltuned:", visible(" ".join(str(error).split())), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("welltuned: interrupted", file=sys.stderr)
        return 130


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """SIGTERM ends a command as an exception, so that what is half-written is removed. A run has its own handler."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if current_thread() is not main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="welltuned",
        description="Fine-tune language models, with every hyperparameter chosen from evidence.",
    )
    parser.add_argument("--version", action="version", version=f"welltuned {welltuned.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {name: commands.add_parser(name, help=text, description=text) for name, (_, text) in COMMANDS.items()}
    for command in made.values():
        command.add_argument("--debug", action="store_true", help="show a traceback where an error ends the command")
    _data_options(made["data"])
    _recipe_options(made["plan"])
    made["plan"].add_argument(
        "--probe", action="store_true", help="load the weights and measure the speed over a few updates, for the time"
    )
    printed = made["plan"].add_mutually_exclusive_group()
    printed.add_argument("--all", "-a", action="store_true", help="every choice with its whole reason and the evidence")
    printed.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    printed.add_argument(
        "--emit",
        choices=["trl", "axolotl", "llamafactory", "unsloth"],
        help="print a script or configuration on stdout that trains the same plan there",
    )
    made["why"].add_argument("key", nargs="?", metavar="KEY", help="a hyperparameter; without it all of them in a line")
    _recipe_options(made["why"])
    made["why"].add_argument("--json", action="store_true", help="print one JSON document on stdout")
    _check_options(made["check"])
    _recipe_options(made["train"])
    made["train"].add_argument("--out", required=True, metavar="DIR", help="the Run directory, new or empty")
    made["train"].add_argument("--json", action="store_true", help="print the run's summary as one JSON document")
    _recipe_options(made["sweep"])
    _sweep_options(made["sweep"])
    made["resume"].add_argument("run", metavar="RUN", help="the Run directory")
    made["resume"].add_argument(
        "--accept-changes",
        action="store_true",
        help="go on although recipe, data, base model or tokenizer are not what they were",
    )
    made["resume"].add_argument("--json", action="store_true", help="print the run's summary as one JSON document")
    made["demo"].add_argument(
        "--out", metavar="DIR", help="the Run directory (default: the first free of demo-run, demo-run-2, ...)"
    )
    made["demo"].add_argument("--steps", type=int, metavar="N", help="fewer updates than one pass over the data")
    _page_options(made["report"], made["serve"])
    add_adapter(made["adapter"])
    add_eval(made["eval"])
    _chat_options(made["chat"])
    return parser


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="the winner's Run directory, new or empty")
    parser.add_argument("--arms", type=int, metavar="N", help="how many are tried at once (default: 3 learning rates)")
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="try these values instead of learning rates, such as r=8,32, or a range, r=8..64; with --over "
        "learning_rate, rates as well. From three dimensions or one range on, Optuna chooses",
    )
    parser.add_argument("--trials", type=int, metavar="N", help="how many arms Optuna may choose (default: 12)")
    parser.add_argument("--minutes", type=float, metavar="N", help="what the search may take; unset: no limit")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="spread the arms over a Ray cluster: its address, auto, or local for this machine",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="with --ray: how many (default: one a GPU or machine)")
    parser.add_argument("--json", action="store_true", help="print the Run's summary as one JSON document")


def _page_options(report: argparse.ArgumentParser, serve: argparse.ArgumentParser) -> None:
    report.add_argument("run", metavar="RUN", help="a run, finished or not")
    report.add_argument("others", nargs="*", metavar="OTHER", help="runs whose curves are laid over it")
    report.add_argument("--out", metavar="FILE", help="where to write it (default: report.html in the run)")
    report.add_argument("--json", action="store_true", help="print where it lies as one JSON document")
    serve.add_argument("folder", nargs="?", default=".", metavar="DIR", help="what holds runs (default: here)")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine)")
    serve.add_argument("--port", type=int, default=8321, help="the port; 0 takes a free one (default: 8321)")
    serve.add_argument(
        "--allow-start", action="store_true", help="let pages plan, start, stop and resume runs, and ask finished ones"
    )


def _chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a finished run, an adapter's folder, or a model")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once, and end")
    parser.add_argument("--system", metavar="TEXT", help="the system message to set first")
    parser.add_argument("--base", action="store_true", help="show the base model's answer as well")
    parser.add_argument("--json", action="store_true", help="with --prompt: print one JSON document on stdout")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer in tokens")


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="*", metavar="FILE", help=FIELDS["data"].doc + " Or a recipe (.yaml).")
    parser.add_argument("--model", metavar="MODEL", help=FIELDS["model"].doc)
    parser.add_argument("--eval-data", action="append", metavar="EVAL_DATA", help=FIELDS["eval_data"].doc)
    parser.add_argument("--method", choices=[str(m) for m in Method], help=FIELDS["method"].doc)
    parser.add_argument("--map", action="append", metavar="OURS=THEIRS", help=FIELDS["map"].doc)
    parser.add_argument("--subset", metavar="NAME", help=FIELDS["subset"].doc)
    parser.add_argument("--split", metavar="NAME", help=FIELDS["split"].doc)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="set a recipe key")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="how many rows to show (default: 3)")
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="ROW",
        help="show this row: its line, or an origin (train.jsonl:7)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def _check_options(parser: argparse.ArgumentParser) -> None:
    tools = ["welltuned", "trl", "axolotl", "llamafactory", "unsloth"]
    parser.add_argument("file", metavar="FILE", help="a YAML file of any of these tools, or a script of TRL or Unsloth")
    parser.add_argument("--tool", choices=tools, help="whose file it is; unset: seen by its keys")
    parser.add_argument("--method", choices=[str(m) for m in Method], help="what a TRL YAML trains; unset: by its keys")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="a recipe file; options win over it")
    for name in ("model", "data", "eval_data", "memory"):
        action = "append" if FIELDS[name].many else "store"  # several datasets: the option several times
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, dest=name, action=action, metavar=name.upper(), help=FIELDS[name].doc)
    parser.add_argument("--map", action="append", metavar="OURS=THEIRS", help=FIELDS["map"].doc)
    for name in ("subset", "split"):
        parser.add_argument(f"--{name}", metavar="NAME", help=FIELDS[name].doc)
    parser.add_argument("--method", choices=[str(m) for m in Method], help=FIELDS["method"].doc)
    parser.add_argument("--tune", choices=[str(t) for t in Tune], help=FIELDS["tune"].doc)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="set any other recipe key"
    )
