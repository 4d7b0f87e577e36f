"""The commands of `atom-compile`; `atom-compile --help` lists them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import torch
import typer
from rich.console import Console, ConsoleRenderable, RichCast
from rich.text import Text

from . import bench as benchmark
from . import tune as tuning
from .bench.figures import figures_of, save_figures, shared_figures
from .bench.model_result import ModelResult
from .bench.overhead import OverheadResult
from .bench.page import save_page
from .bench.saved import load_all
from .bench.shapes import find_device
from .calibrate import calibrate as calibrate_model
from .comparison import Tasks, compare
from .comparison import Text as EvaluatedText
from .doctor import as_table, examine
from .errors import AtomError, OptionError
from .evaluate import read_dataset, read_text
from .explain import diff as diff_reports
from .explain import explain as explain_model
from .kernels import tuning as kernel_tuning
from .kv_cache import KVCache
from .model_folder import (
    fetch_model,
    is_packed,
    load_model,
    load_tokenizer,
    read_windows,
    require_model,
)
from .packing_run import pack_folder
from .scheme import Scheme

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
    typer.Argument(
        help="A directory with a causal language model that transformers can load, or the name of "
        "a repository."
    ),
]
SchemeName = Annotated[str, typer.Option(help="What the numbers are: w4a4, w4a8 and so on.")]


@app.command()
@_reports_errors
def explain(
    model_dir: Annotated[
        Path | None,
        typer.Argument(
            help="A directory with a causal language model that transformers can load, or the name "
            "of a repository.",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w4a4, w4a4-fp4, w4a4-rotated, w4ax, w4ax-rotated, w4a8, w4a8-two-level, w6a8, "
            "w6a8-e3m2, w4a16, w6a16, w6a16-e3m2, w5a16, w4a16-fp4, mxfp4 or nvfp4; by default the "
            "recipe's own, or w4a4."
        ),
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
            help="Write the report (.json, .html), or the stage's graph (.dot, .svg, .graphml)."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page that shows every stage's graph and opens in any browser."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON instead of tables.")
    ] = False,
    difference: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--diff",
            metavar="A.json B.json",
            help="Instead of a model: show what differs between two saved reports.",
        ),
    ] = None,
) -> None:
    """Show how the backend rewrites a model: what becomes of each linear and attention."""
    if (model_dir is None) == (difference is None):
        raise OptionError("explain takes either a model's directory or --diff A.json B.json")
    if difference is not None:
        return _explain_difference(*difference, html, as_json)
    assert model_dir is not None
    model = load_model(fetch_model(model_dir))
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(model.device)
    options = {name: value for name, value in (("scheme", scheme), ("recipe", recipe)) if value}
    cache: dict[str, Any] = {"use_cache": False}
    if kv_cache is not None:
        cache = {"past_key_values": KVCache(model.config, 1, tokens, kv_cache, device=model.device)}
    report = explain_model(model, input_ids, options=options, **cache)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _print(report if stage is None else Text(report.code(stage)))
    for path in filter(None, (out, html)):
        _make_parent(path)
    if out is not None:
        report.save(out, **({"stage": stage} if stage else {}))
        _say_written(out)
    if html is not None:
        report.save_html(html)
        _say_written(html)


def _explain_difference(a: Path, b: Path, html: Path | None, as_json: bool) -> None:
    found = diff_reports(a, b)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _print(found)
    if html is not None:
        _make_parent(html)
        found.save_html(html)
        _say_written(html)


def _print(shown: ConsoleRenderable | RichCast) -> None:
    """As wide as the terminal, 80 columns where there is none."""
    Console(soft_wrap=isinstance(shown, Text)).print(shown)


def _say_written(path: Path) -> None:
    """On stderr: stdout may be JSON."""
    Console(stderr=True).print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@_reports_errors
def calibrate(
    model_dir: ModelDir,
    text: Annotated[Path, typer.Option(help="A text file of the kind that the model will see.")],
    out: Annotated[Path, typer.Option(help="Where to write the recipe: a .safetensors file.")],
    scheme: SchemeName = "w4a4",
    windows: Annotated[int, typer.Option(min=1, help="How many pieces of the text to run.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="How many tokens a piece holds.")] = 512,
    gptq: Annotated[
        bool,
        typer.Option(
            "--gptq/--no-gptq", help="Round weights by GPTQ, or to nearest when they are compiled."
        ),
    ] = True,
    int8_budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="At most this share of all blocks of channels in INT8; the scheme's by default.",
        ),
    ] = None,
    error_budget: Annotated[
        float | None,
        typer.Option(help="Lift layers whose output error, noise over signal, is over this."),
    ] = None,
    include_head: Annotated[
        bool, typer.Option("--include-head", help="Quantize the output head as well.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(help="A folder for finished layers: after an interruption, go on from it."),
    ] = None,
) -> None:
    """Run a model on text, choose orders, clips and precisions, round weights; save a recipe."""
    folder = fetch_model(model_dir)
    model = load_model(folder, dequantize=True)
    input_ids = read_windows(folder, text, windows, length).to(model.device)
    batches = [{"input_ids": window[None], "use_cache": False} for window in input_ids]
    recipe = calibrate_model(
        model,
        batches,
        scheme=scheme,
        gptq=gptq,
        int8_budget=int8_budget,
        error_budget=error_budget,
        include_head=include_head,
        resume=resume,
    )
    _make_parent(out)
    recipe.save(out)
    found = f"{len(recipe.hessian_diagonal)} linears, {len(batches)} windows"
    if recipe.layers:
        found += (
            f", {len(recipe.rounded)} rounded, {recipe.lifted} with more than the scheme's bits"
        )
    Console().print(f"wrote {out}: {found}", soft_wrap=True)


@app.command()
@_reports_errors
def quantize(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Argument(help="The directory to write the packed model to.")],
    scheme: Annotated[
        str | None, typer.Option(help="By default the recipe's own, or w4a4.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text to calibrate on, with GPTQ: better than without.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Instead: a recipe that `atom-compile calibrate` wrote.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many pieces of the text to run.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="How many tokens a piece holds.")] = 512,
    include_head: Annotated[
        bool, typer.Option("--include-head", help="Quantize the output head as well.")
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="A pattern of parameter names to leave: '*.o_proj.weight'. Repeatable."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest file to write.")] = "5GB",
) -> None:
    """Write a packed INT4 model that transformers loads; interrupted, the same call goes on."""
    if recipe is not None and calibration is not None:
        raise OptionError("quantize takes --recipe or --calibration, not both")
    model = pack_folder(
        fetch_model(model_dir),
        out,
        scheme,
        recipe=recipe,
        calibration=calibration,
        windows=windows,
        length=length,
        include_head=include_head,
        skip=tuple(skip or ()),
        max_shard_size=max_shard_size,
    )
    count = sum(len(group) for group in model.config.quantization_config.linears)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    Console().print(f"wrote {out}: {count} linears packed, {size / 1e6:,.1f} MB", soft_wrap=True)


@app.command()
@_reports_errors
def generate(
    model_dir: ModelDir,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 64,
    kv_cache: Annotated[
        str | None, typer.Option(help="Keys and values in a cache: kv4, kv4-rotated, kv8, kv16.")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens at random, not always the likeliest.")
    ] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the model with this backend; by default on a GPU alone.",
        ),
    ] = None,
) -> None:
    """Write text with a model, packed or in 16 bits (then --compile quantizes it)."""
    folder = fetch_model(model_dir)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    cache: dict[str, Any] = {}
    if kv_cache is not None:
        room = inputs["input_ids"].shape[1] + tokens
        cache["past_key_values"] = KVCache(model.config, 1, room, kv_cache, device=model.device)
    if model.device.type == "cuda" if compiled is None else compiled:
        model.compile(backend="atom")
    written = model.generate(
        **inputs, **cache, max_new_tokens=tokens, do_sample=sample, pad_token_id=0
    )
    print(tokenizer.decode(written[0], skip_special_tokens=True))


@app.command()
@_reports_errors
def doctor() -> None:
    """Say what is installed, what can run here, and what is known to go wrong.

    Exits with status 1 if something will not work.
    """
    findings = examine()
    Console().print(as_table(findings))
    if any(one.status == "error" for one in findings):
        raise typer.Exit(1)


@app.command(name="eval")
@_reports_errors
def evaluate(
    model_dir: ModelDir,
    text: Annotated[
        Path | None, typer.Option(help="Perplexity on this text file, all of it.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Perplexity on a text of the package datasets: wikitext2, wikitext103, lambada, "
            "or repository:configuration:split."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks of the package lm-eval: arc_easy,hellaswag."),
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, as .yaml files.")
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help="w4a4, w4a4-fp4, w4a4-rotated, w4ax, w4a8, w6a8, w4a16, w6a16, nvfp4: one, "
            "several by commas, or the option again; by default the recipe's own, or w4a4."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe that `atom-compile calibrate` wrote.")
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Keys and values of the quantized models through a cache: kv4, kv4-rotated, kv8 "
            "or kv16."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the model sees at a time; by default what it can, at most 2048."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="How far the window moves. Each token is predicted once, with at least window - "
            "stride tokens before it; by default the window, the fastest."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="At most so many windows, spread evenly over the text, and documents of a task.",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="How many windows or documents to run at a time.")
    ] = 1,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers/--no-layers",
            help="With a text: the signal-to-noise ratio of every linear's output.",
        ),
    ] = True,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the rewritten graphs, or run their operators one by one; by default "
            "compiled on a GPU alone.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for the tables (.txt), the numbers (.json), the plot (.png)."),
    ] = None,
) -> None:
    """Measure what INT4 costs a model: perplexity, tasks, noise of each linear, beside 16 bits.

    A packed model is measured by itself.
    """
    names = _parse_names(tasks)
    _check_evaluation(text, dataset, names, task_dir)
    schemes: list[str | None] = [one for given in scheme or [] for one in _parse_names(given)]
    for name in schemes:
        Scheme.preset(str(name))
    folder = fetch_model(model_dir)
    require_model(folder)
    if is_packed(folder):
        if schemes or recipe:
            raise OptionError(
                "the model is packed already and is measured as it is: leave --scheme and --recipe "
                "out, or give the 16-bit model"
            )
    elif not schemes:
        schemes = [None if recipe else "w4a4"]
    content = read_text(text) if text else read_dataset(dataset) if dataset else None
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    evaluated = None
    if content is not None:
        evaluated = EvaluatedText.of(
            content,
            tokenizer,
            model.config,
            source=text.name if text else str(dataset),
            window=window,
            stride=stride,
            limit=limit,
        )
    result = compare(
        model,
        tokenizer,
        schemes,
        recipe=recipe,
        kv_cache=kv_cache,
        text=evaluated,
        tasks=Tasks(names, task_dir, limit) if names else None,
        layers=layers,
        batch=batch,
        compiled=compiled,
        name=model_dir.resolve().name,
        progress=not as_json,
    )
    if as_json:
        print(result.to_json())
    else:
        result.print(Console())
    for path in result.save(out) if out is not None else ():
        _say_written(path)


def _check_evaluation(
    text: Path | None, dataset: str | None, tasks: list[str], task_dir: Path | None
) -> None:
    if text is None and dataset is None and not tasks:
        raise OptionError(
            "eval takes --text FILE or --dataset NAME, or --tasks NAMES, or a text and tasks"
        )
    if text is not None and dataset is not None:
        raise OptionError("eval takes --text or --dataset, not both: run it twice")
    if task_dir is not None and not tasks:
        raise OptionError("--task-dir goes with --tasks: name the tasks to run")


@app.command()
@_reports_errors
def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="llama3-8b, llama3-70b or prose-llama-5m, or several of them: whose shapes. By "
            "default llama3-8b on a GPU and prose-llama-5m on a CPU."
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens, separated by commas: 1,16,64.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="For attention and a model: numbers of sequences, such as 1,32."),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(help="For attention and a model: how many tokens are cached: 2048,8192."),
    ] = None,
    scheme: SchemeName = "w4a4",
    level: Annotated[
        str,
        typer.Option(
            help="operators: one by one; layer: a whole decoder layer; all: both. attention: over "
            "a KV cache, or one part of it: decode, prefill, append. model: a whole model with "
            "random weights. overhead: the host's time for a call."
        ),
    ] = "all",
    only: Annotated[
        str | None,
        typer.Option(help="Of the operators, these: linears, or names such as o_proj,norm."),
    ] = None,
    peers: Annotated[
        bool | None,
        typer.Option(
            "--peers/--no-peers",
            help="Time other INT4, INT8 and FP8 products beside the linears; by default on a GPU.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; by default cuda where there is one.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="The folder for table (.txt), numbers (.json), figures (.png, .svg)."),
    ] = Path("benchmarks"),
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with figures and tables that opens in any browser."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON instead of tables.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens and repetitions.")] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="For a model: how many layers, if not all of them.")
    ] = None,
    phases: Annotated[
        str | None, typer.Option(help="For a model: decode or prefill; by default both.")
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help="For a model: of baseline (16 bits, max-autotune), inductor (16 bits, "
            "reduce-overhead), static (INT4, 16-bit cache), kv4 (INT4, INT4 cache), which."
        ),
    ] = None,
    warm_cache: Annotated[
        bool, typer.Option("--warm-cache", help="For a model: time first calls a second time.")
    ] = False,
) -> None:
    """Time fused operators against plain ones against 16 bits, each after a correctness check.

    Exits with status 1 if a check fails.
    """
    console = Console(stderr=as_json)
    of_model = {"layers": layers, "phases": phases, "variants": variants, "warm_cache": warm_cache}
    of_others = {"tokens": tokens, "only": only, "peers": peers}
    _refuse_options(level, of_others if level == "model" else of_model)
    result: benchmark.Result | ModelResult | OverheadResult
    if level == "overhead":
        _refuse_options(level, of_others | {"model": model, "batch": batch, "length": length})
        result = benchmark.run_overhead(scheme=scheme, device=device, quick=quick, console=console)
    elif level == "model":
        result = benchmark.run_model(
            *_parse_names(model)[:1],
            layers=layers,
            variants=_parse_names(variants),
            phases=_parse_names(phases),
            batch=_parse_numbers("batch", batch),
            length=_parse_numbers("length", length),
            scheme=scheme,
            device=device,
            warm_cache=warm_cache,
            quick=quick,
            console=console,
            on_rows=lambda so_far: so_far.save(out),
        )
    else:
        result = benchmark.run(
            _parse_names(model),
            tokens=_parse_numbers("tokens", tokens),
            batch=_parse_numbers("batch", batch),
            length=_parse_numbers("length", length),
            scheme=scheme,
            level=level,
            only=_parse_names(only),
            peers=peers,
            device=device,
            quick=quick,
            console=console,
        )
    paths = result.save(out)
    if as_json:
        print(result.to_json())
    else:
        result.print(console)
    if html is not None:
        _make_parent(html)
        save_page({paths[0].stem: result}, html)
        paths.append(html)
    for path in paths:
        _say_written(path)
    if result.failures:
        raise typer.Exit(1)


@app.command()
@_reports_errors
def plot(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="What `bench` or a script in benchmarks/ wrote: .json.", metavar="A.json B.json..."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="A folder for each figure as .png and .svg.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with all figures and tables; opens in any browser."),
    ] = None,
) -> None:
    """Draw results of benchmarks: each file's own figures, and those of all files together."""
    if out is None and html is None:
        raise OptionError("plot writes figures to --out DIR, a page to --html FILE, or both")
    results = load_all(files)
    if out is not None:
        figures = shared_figures(list(results.values()))
        for name, result in results.items():
            figures |= figures_of(result, name)
        out.mkdir(parents=True, exist_ok=True)
        for path in save_figures(figures, out):
            _say_written(path)
    if html is not None:
        _make_parent(html)
        save_page(results, html)
        _say_written(html)


@app.command()
@_reports_errors
def tune(
    model: Annotated[
        str, typer.Option(help="Whose linears: one or more of llama3-8b, llama3-70b, ...")
    ] = ",".join(tuning.DEFAULT_MODELS),
    tokens: Annotated[
        str | None, typer.Option(help="Powers of two, separated by commas; 1 to 8192 by default.")
    ] = None,
    scheme: SchemeName = "w4a4",
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for the file; by default the package's own, which is read."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Try fewer launches of each size.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Measure sizes that the file has once more.")
    ] = False,
) -> None:
    """Find the fastest launches of the linears on this GPU, size by size.

    May be interrupted, and goes on where it was.
    """
    if find_device(None).type != "cuda":
        raise OptionError("there is nothing to tune without a GPU: PyTorch sees none here")
    console = Console()
    folder = out or kernel_tuning.FOLDER
    outcomes = tuning.tune(
        _parse_names(model),
        tokens=_parse_numbers("tokens", tokens) or tuning.DEFAULT_TOKENS,
        scheme=scheme,
        folder=folder,
        quick=quick,
        again=again,
        console=console,
    )
    for outcome in outcomes:
        console.print(_tuned_line(outcome), soft_wrap=True, highlight=False)
    console.print(f"wrote {kernel_tuning.path_for(find_device(None), folder)}", soft_wrap=True)


def _tuned_line(outcome: tuning.Outcome) -> str:
    (M, N, K), row = outcome.size, outcome.row
    rejected = f", {outcome.rejected} do not run or agree" if outcome.rejected else ""
    tiling = " ".join(f"{name} {value}" for name, value in row["tiling"].items())
    return (
        f"{N} x {K}, {M} tokens: {row['us']} us, by default {row['default_us']} "
        f"({row['path']}: {tiling}; of {outcome.candidates}{rejected})"
    )


def _refuse_options(level: str, given: dict[str, Any]) -> None:
    """Raises OptionError if one of those that the level does not go by was given."""
    for name, value in given.items():
        if value not in (None, False):
            raise OptionError(
                f"level {level!r} does not go by --{name.replace('_', '-')}: leave it out"
            )


def _parse_names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _parse_numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return [int(count) for count in text.split(",")] if text else None
    except ValueError:
        raise OptionError(
            f"--{option} is {text!r}; it must be whole numbers such as 1,16,64"
        ) from None


def _make_parent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def main() -> None:
    """The entry point of `atom-compile`."""
    app()
