"""`atom-compile explain | bench | calibrate`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import torch
import typer
from rich.console import Console
from torch import Tensor

from . import bench as benchmark
from .calibrate import calibrate as calibrate_model
from .errors import AtomError, OptionError
from .evaluate import text_windows
from .explain import explain as explain_model
from .kv_cache import KVCache

P = ParamSpec("P")

app = typer.Typer(
    name="atom-compile",
    help="INT4 linear layers for PyTorch language models, by rewriting the graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Prints an AtomError in red, without a traceback, and exits with status 2."""

    @functools.wraps(command)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except AtomError as error:
            console = Console(stderr=True)
            console.print(
                f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(2) from None

    return reporting


ModelDir = Annotated[
    Path,
    typer.Argument(help="A directory with a causal language model that transformers can load."),
]
SchemeName = Annotated[str, typer.Option(help="What the numbers are: w4a4 or w4a8.")]


@app.command()
@_reports_errors
def explain(
    model_dir: ModelDir,
    scheme: Annotated[
        str | None,
        typer.Option(help="w4a4, w4a4-rotated or w4a8; by default the recipe's own."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe that `atom-compile calibrate` wrote.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens the model is run on.")] = 16,
    kv_cache: Annotated[
        str | None, typer.Option(help="Run it with a KV cache: kv4, kv4-rotated, kv8 or kv16.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Print the graph after this pass, as Python, and no report.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the report (.json), or the stage's graph (.dot, .svg), to a file."
        ),
    ] = None,
) -> None:
    """Show how the backend rewrites a model: what becomes of each linear and attention."""
    model = _load_model(model_dir)
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(model.device)
    options = {name: value for name, value in (("scheme", scheme), ("recipe", recipe)) if value}
    cache: dict[str, Any] = {"use_cache": False}
    if kv_cache is not None:
        cache = {"past_key_values": KVCache(model.config, 1, tokens, kv_cache, device=model.device)}
    report = explain_model(model, input_ids, options=options, **cache)
    console = _console()
    if stage is None:
        console.print(report)
    else:
        console.print(report.code(stage), markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        _make_parent(out)
        report.save(out, **({"stage": stage} if stage else {}))
        console.print(f"wrote {out}")


@app.command()
@_reports_errors
def calibrate(
    model_dir: ModelDir,
    text: Annotated[Path, typer.Option(help="A text file of the kind that the model will see.")],
    out: Annotated[Path, typer.Option(help="Where to write the recipe: a .safetensors file.")],
    scheme: SchemeName = "w4a4",
    windows: Annotated[int, typer.Option(min=1, help="How many pieces of the text to run.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="How many tokens a piece holds.")] = 512,
) -> None:
    """Run a model on text, find its outlier channels, and save them as a recipe."""
    model = _load_model(model_dir)
    input_ids = _read_windows(model_dir, text, windows, length).to(model.device)
    batches = [{"input_ids": window[None], "use_cache": False} for window in input_ids]
    recipe = calibrate_model(model, batches, scheme=scheme)
    _make_parent(out)
    recipe.save(out)
    _console().print(f"wrote {out}: {len(recipe.hessian_diagonal)} linears, {len(batches)} windows")


@app.command()
@_reports_errors
def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="llama3-8b, llama3-70b or prose-llama-5m: whose shapes. By default llama3-8b on a "
            "GPU and prose-llama-5m on a CPU."
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens, separated by commas: 1,16,64.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="For attention: numbers of sequences, such as 1,32.")
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="For attention: how many tokens are cached: 2048,8192.")
    ] = None,
    scheme: SchemeName = "w4a4",
    level: Annotated[
        str,
        typer.Option(
            help="operators: one by one; layer: a whole decoder layer; all: both. attention: over "
            "a KV cache, or one part of it: decode, prefill, append."
        ),
    ] = "all",
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; by default cuda where there is one.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="The folder for the table (.txt), the numbers (.json), the plot (.png)."),
    ] = Path("benchmarks"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens and repetitions.")] = False,
) -> None:
    """Time fused operators against plain ones against 16 bits, each after a correctness check.

    Exits with status 1 if a check fails.
    """
    console = _console()
    result = benchmark.run(
        model,
        tokens=_parse_numbers("tokens", tokens),
        batch=_parse_numbers("batch", batch),
        length=_parse_numbers("length", length),
        scheme=scheme,
        level=level,
        device=device,
        quick=quick,
        console=console,
    )
    paths = result.save(out)
    result.print(console)
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True)
    if result.failures:
        raise typer.Exit(1)


def _console() -> Console:
    """As wide as the terminal; where there is none, wide enough for our tables."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    return console


def _parse_numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return [int(count) for count in text.split(",")] if text else None
    except ValueError:
        raise OptionError(
            f"--{option} is {text!r}; it must be whole numbers such as 1,16,64"
        ) from None


def _load_model(folder: Path) -> Any:
    """In its own precision on a GPU, in float32 on a CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _require_model(folder)
    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    dtype: Any = "auto" if on_gpu else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise AtomError(f"transformers cannot load the model in {folder}: {error}") from error
    return model.to("cuda" if on_gpu else "cpu").eval()


def _require_model(folder: Path) -> None:
    if not folder.is_dir():
        raise AtomError(f"{folder} is no directory; give one that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise AtomError(
            f"{folder} holds no config.json; give a directory that save_pretrained wrote"
        )


def _read_windows(folder: Path, text: Path, windows: int, length: int) -> Tensor:
    from transformers import AutoTokenizer

    if not text.is_file():
        raise AtomError(f"{text} is no file; give the text to calibrate on")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return text_windows(tokenizer, text.read_text(encoding="utf-8"), windows, length)


def _make_parent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def main() -> None:
    """The entry point of `atom-compile`."""
    app()
