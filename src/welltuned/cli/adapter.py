"""welltuned adapter verify, scale, average, merge, export."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from welltuned.cli.safe import json_text, visible
from welltuned.cli.terminal import console, quiet_libraries
from welltuned.cli.train import print_command
from welltuned.errors import InputError, RunError

if TYPE_CHECKING:
    from welltuned.adapters.agree import Agreement
    from welltuned.finished.export import Options
    from welltuned.finished.proof import Proof
    from welltuned.finished.sweep import Sweep

SHOWN = 6  # modules that learned most
_BAR = 24  # characters of the longest bar


def run(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "verify": _verify,
        "scale": _scale,
        "average": _average,
        "merge": _merge,
        "export": _export,
    }
    return verbs[arguments.verb](arguments)


def _say(text: str, style: str = "") -> None:
    console.print(Text(visible(text), style=style), soft_wrap=True)


def _print_json(document: dict[str, Any]) -> None:
    print(json_text(json.dumps(_finite(document), ensure_ascii=False, allow_nan=False)))


def _finite(value: Any) -> Any:
    from welltuned.training.rundir import finite

    return finite(value)


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _verify(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from welltuned.adapters.layers import by_kind, by_layer
    from welltuned.finished.proof import prove

    proof = prove(arguments.run, arguments.against)
    if arguments.json:
        _print_json(
            {
                "path": str(proof.path),
                "against": proof.against,
                "tensors": [asdict(check) for check in proof.checks],
                "modules": [asdict(one) for one in proof.modules],
                "layers": by_layer(proof.modules),
                "kinds": by_kind(proof.modules),
                "problems": list(proof.problems),
                "notes": list(proof.notes),
            }
        )
    _print_proof(proof)
    return 1 if proof.problems else 0


def _print_proof(proof: "Proof") -> None:
    from welltuned.adapters.layers import by_kind, by_layer

    moved = sum(check.moved for check in proof.checks)
    change = sum(check.change for check in proof.checks if check.change == check.change)
    _say(f"{len(proof.checks)} tensors against {proof.against}: {moved} differ, sum of absolute change {change:,.1f}")
    if proof.modules:
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        relative = proof.modules[0].relative is not None
        for column in ("learned most", "change", *(("of the weights",) if relative else ())):
            table.add_column(column)
        for one in proof.modules[:SHOWN]:
            share = (f"{one.relative:.2%}",) if one.relative is not None else ()
            table.add_row(Text(visible(one.module)), f"{one.change:.3f}", *share)
        console.print(table)
        _bars("by layer", by_layer(proof.modules))
        _bars("by kind", by_kind(proof.modules))
    for note in proof.notes:
        _say(note, "dim")
    for problem in proof.problems:
        _say(f"! {problem}", "red")
    if not proof.problems:
        _say("Verified: every tensor is finite, moved, and what it was when training ended.", "bold")


def _bars(title: str, shares: dict[str, float]) -> None:
    """The largest shares as bars, in their order."""
    most = max(shares.values(), default=0.0) or 1.0
    kept = sorted(shares, key=lambda key: -shares[key])[:8]
    grid = Table.grid(padding=(0, 2))
    for key in shares:
        if key in kept:
            grid.add_row(Text(visible(key)), f"{shares[key]:.1%}", "█" * max(1, round(_BAR * shares[key] / most)))
    more = f" (the {len(kept)} largest of {len(shares)})" if len(shares) > len(kept) else ""
    _say(f"{title}, share of the squared change{more}", "bold")
    console.print(grid)


# ── scale and average ────────────────────────────────────────────────────────────────────────────────────────────────


def _scale(arguments: argparse.Namespace) -> int:
    if not arguments.sweep:
        for option in ("strengths", "data", "rows", "keep", "plot"):
            if getattr(arguments, option) is not None:
                raise InputError("belongs to --sweep", where=f"--{option}", mend="add --sweep, or leave it out")
        if arguments.out is None:
            raise InputError("the scaled adapter needs a place", where="--out", mend="give --out DIR")
        by = float(arguments.by)
        return _write_scaled(arguments, by, {"by": by})
    from welltuned.adapters.place import require_unused
    from welltuned.finished.find import find
    from welltuned.finished.sweep import STRENGTHS, sweep, to_json

    if arguments.out is not None:
        require_unused(Path(arguments.out))
    if arguments.plot is not None and not arguments.plot.endswith(".svg"):
        raise InputError("the plot is an SVG file", where="--plot", mend="give a name that ends in .svg")
    strengths = _numbers(arguments.strengths, "--strengths") if arguments.strengths else STRENGTHS
    if any(by < 0 for by in strengths):
        raise InputError("a strength below 0 would unlearn", where="--strengths", mend="give numbers from 0 on")
    found = sweep(
        find(arguments.run),
        strengths=strengths,
        data=arguments.data,
        keep=arguments.keep,
        count=arguments.rows,
        watch=_watch,
    )
    _print_sweep(found)
    if arguments.plot is not None:
        from welltuned.finished.plot import sweep_svg

        Path(arguments.plot).write_text(sweep_svg(found), encoding="utf-8")
        _say(f"{arguments.plot} holds the curves.")
    document = to_json(found)
    if found.chosen == 0:
        if arguments.json:
            _print_json({**document, "out": None})
        raise RunError("the untuned base is as good as any strength: nothing was written")
    if arguments.out is None:
        if arguments.json:
            _print_json({**document, "out": None})
        return 0
    return _write_scaled(arguments, found.chosen, document)


def _watch(text: str) -> None:
    _say(text + " …", "dim")


def _write_scaled(arguments: argparse.Namespace, by: float, document: dict[str, Any]) -> int:
    from welltuned.api import scale

    scale(arguments.run, by=by, out=arguments.out)
    _say(f"{arguments.out} holds the adapter with alpha × {by:g}. Use it with:")
    print_command(f"welltuned chat {arguments.out}")
    if arguments.json:
        _print_json({**document, "out": arguments.out})
    return 0


def _print_sweep(found: "Sweep") -> None:
    from welltuned.finished.plot import sweep_rows

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    columns = ["strength", "held-out loss", "less the best"]
    for column in [*columns, *(("loss on what to keep", "less the base") if found.keep is not None else ())]:
        table.add_column(column)
    for one in found.strengths:
        cells = [
            f"{one.by:g}" + (" ←" if one.by == found.chosen else ""),
            _with_error(one.held_out.loss, one.held_out.standard_error),
            _with_error(one.against_best.value, one.against_best.error, signed=True),
        ]
        if one.keep is not None and one.against_base is not None:
            cells.append(_with_error(one.keep.loss, one.keep.standard_error))
            cells.append(_with_error(one.against_base.value, one.against_base.error, signed=True))
        table.add_row(*cells)
    console.print(table)
    for line in sweep_rows(found):
        console.print(Text(line), soft_wrap=True)
    _say(f"Chosen: {found.chosen:g}, because {found.reason}.", "bold")


def _with_error(value: float, error: float, *, signed: bool = False) -> str:
    near = f" ± {error:.4f}" if error == error else ""
    return f"{value:+.4f}{near}" if signed else f"{value:.4f}{near}"


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"'{text}' is no list of numbers", where=option, mend="such as 0,0.5,1") from error


def _average(arguments: argparse.Namespace) -> int:
    from welltuned.api import average, average_checkpoints

    weights = _numbers(arguments.weights, "--weights") if arguments.weights else None
    rank: str | int | None = arguments.rank
    if rank is not None and rank != "sum":
        if not str(rank).isdigit() or int(rank) < 1:
            raise InputError(f"'{rank}' is no rank", where="--rank", mend="give a number from 1 on, or sum")
        rank = int(rank)
    if arguments.ema is None:
        found = average(*arguments.runs, out=arguments.out, weights=weights, rank=rank)
    else:
        if weights is not None or len(arguments.runs) != 1:
            raise InputError("--ema is of one run, and weighs by itself", where="--ema", mend="leave --weights out")
        found = average_checkpoints(arguments.runs[0], out=arguments.out, decay=arguments.ema, rank=rank)
    worst = max(found.lost, key=lambda name: found.lost[name], default=None)
    _say(f"{arguments.out} holds the mean, of rank {found.rank}.")
    if worst is not None and found.lost[worst] > 1e-12:
        share = f"{found.lost_share:.2%} of the squared mean"
        _say(
            f"Rank {found.rank} cannot hold {share} (most in {worst}: {found.lost[worst]:.2%}); "
            "--rank sum loses nothing."
        )
    else:
        _say("Nothing is lost: the mean has that rank.")
    if arguments.json:
        document = {"out": arguments.out, "rank": found.rank, "lost_share": found.lost_share, "lost": dict(found.lost)}
        _print_json(document)
    return 0


# ── merge and export ─────────────────────────────────────────────────────────────────────────────────────────────────


def _options(arguments: argparse.Namespace, quantize: str = "f16") -> "Options":
    from welltuned.adapters.gguf.write import Quantization
    from welltuned.adapters.merge import DTYPES
    from welltuned.finished.export import Options

    return Options(dtype=DTYPES[arguments.dtype], quantization=Quantization(quantize), base=arguments.base)


def _merge(arguments: argparse.Namespace) -> int:
    from welltuned.finished.export import merge_run
    from welltuned.finished.find import find

    merged = merge_run(find(arguments.run), Path(arguments.out), _options(arguments))
    how = "one weight at a time" if merged.streamed else "in memory"
    _say(f"Merged {merged.modules} projections into {arguments.out}, {how}.")
    _print_agreement(merged.agreement)
    print_command(f'AutoModelForCausalLM.from_pretrained("{arguments.out}")')
    if arguments.json:
        _print_json(
            {
                "out": arguments.out,
                "modules": merged.modules,
                "streamed": merged.streamed,
                "agreement": _agreement(merged.agreement),
            }
        )
    return 0


def _agreement(agreement: "Agreement") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(agreement)


def _print_agreement(agreement: "Agreement") -> None:
    _say(f"Verified: {agreement.sentence()}.", "bold")


def _export(arguments: argparse.Namespace) -> int:
    from welltuned.finished.export import Target, export_run
    from welltuned.finished.find import find

    found = export_run(
        find(arguments.run), Target(arguments.to), Path(arguments.out), _options(arguments, arguments.quantize)
    )
    _say(f"{arguments.out} holds {', '.join(found.files)}.")
    if found.agreement is not None:
        _print_agreement(found.agreement)
    for note in found.notes:
        _say(note, "dim")
    for line in found.commands:
        print_command(line)
    if arguments.json:
        agreement = None if found.agreement is None else _agreement(found.agreement)
        _print_json(
            {
                "out": arguments.out,
                "files": list(found.files),
                "commands": list(found.commands),
                "notes": list(found.notes),
                "agreement": agreement,
            }
        )
    return 0
