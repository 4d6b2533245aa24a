"""``mortice bench``: how fast a model runs here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import evolve
from cyclopts import Parameter

from mortice.core.cli.flags import (
    ConfigFile,
    ConfigFlags,
    ExecutorFlags,
    FileFlags,
    OutputFlags,
    PluginFlags,
    counts,
    settings,
)
from mortice.core.cli.render import Screen
from mortice.core.errors import ConfigError

if TYPE_CHECKING:
    from mortice.core.bench.results import BenchReport, BenchSettings
    from mortice.core.config import RunConfig
    from mortice.core.pipeline import Pipeline

__all__ = ["bench"]


def _names(_: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    """Names separated by commas, of one flag or of several."""
    return tuple(part for token in tokens for part in token.value.split(","))


def _list(name: str, long_name: str, help_text: str) -> Parameter:
    return Parameter(name=(name, long_name), help=help_text, converter=counts, negative=(), n_tokens=1)


def bench(
    model: Annotated[
        str | None,
        Parameter(
            help="A model file, or SHAPE:RECIPE for random weights (see mortice synth); "
            "with --products also a SHAPE, by default Llama-3.1-8B."
        ),
    ] = None,
    /,
    *,
    prompt_tokens: Annotated[
        tuple[int, ...], _list("-p", "--prompt-tokens", "Lengths of prompts, separated by commas; 0 for none.")
    ] = (512,),
    generated_tokens: Annotated[
        tuple[int, ...], _list("-n", "--generated-tokens", "Numbers of tokens to generate; 0 for none.")
    ] = (128,),
    depths: Annotated[tuple[int, ...], _list("-d", "--depths", "Tokens in the KV cache before each measurement.")] = (
        0,
    ),
    batch: Annotated[
        tuple[int, ...], _list("-b", "--batch", "Numbers of sequences at the same time, each as long.")
    ] = (1,),
    repeats: Annotated[int, Parameter(name=("-r", "--repeats"), help="Measurements of each kind.")] = 5,
    form: Annotated[
        Literal["md", "json", "csv", "plot"], Parameter(name=("-o", "--format"), help="How results are printed.")
    ] = "md",
    profile: Annotated[
        bool, Parameter(negative=(), help="Also time each kind of operator.", show_default=False)
    ] = False,
    products: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Time the matrix products of a step one by one instead, with weights of each type.",
            show_default=False,
        ),
    ] = False,
    types: Annotated[
        tuple[str, ...],
        Parameter(
            help="With --products of a SHAPE: only weights of these types, separated by commas.",
            converter=_names,
            negative=(),
            n_tokens=1,
            show_default=False,
        ),
    ] = (),
    config: ConfigFile = None,
    contract: FileFlags | None = None,
    executor: ExecutorFlags | None = None,
    plugins: PluginFlags | None = None,
    any_key: ConfigFlags | None = None,
    output: OutputFlags | None = None,
) -> int:
    """Measure prefill and decode speed, the bytes they move, and the way to the first token.

    The context is as long as the measurement needs, unless --context says otherwise, and the KV cache has room for as
    many sequences, unless --kv-tokens does.

    """
    from mortice.core.bench.measure import bench as measure
    from mortice.core.bench.report import load_plotext
    from mortice.core.bench.results import BenchSettings

    output = output or OutputFlags()
    if output.json and form not in ("md", "json"):
        raise ConfigError(f"--json and -o {form}: found both, wanted one")
    if form == "plot" and not products:
        load_plotext()  # a missing package is better known before than after
    wanted = BenchSettings(
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        depths=depths,
        batch=batch,
        repeats=repeats,
        profile=profile,
    )
    screen = Screen(json=output.json or form == "json", quiet=output.quiet)
    chosen = settings(config, contract, executor, plugins, any_key).config
    if products:
        _products(model, chosen, wanted, types, screen, form)
        return 0
    if types:
        raise ConfigError("--types: only with --products")
    if model is None:
        raise ConfigError("bench: no model given; pass FILE or SHAPE:RECIPE, or --products")
    report = measure(_opener(model, chosen, wanted), wanted, screen.note)
    _print(screen, report, form)
    return 0


def _opener(model: str, config: RunConfig, wanted: BenchSettings) -> Callable[[], Pipeline]:
    """Opens and plans the model. Random weights go straight to a device; the host's executors want them in memory."""
    from mortice.core.pipeline import prepare, prepare_opened
    from mortice.core.stages import choose_executor, registry_for
    from mortice.core.synth.model import is_shape_and_recipe, synth_model

    automatic = config.executor.context == 0
    if automatic:
        config = evolve(config, executor=evolve(config.executor, context=wanted.needed_context))
    if max(wanted.batch) > 1 and config.executor.kv_tokens == 0:
        cache = max(wanted.needed_cache, config.executor.context)
        config = evolve(config, executor=evolve(config.executor, kv_tokens=cache))
    config = evolve(config, model=evolve(config.model, path=Path(model)))
    registry = registry_for(config)
    made = None
    if is_shape_and_recipe(model):
        _, device, _ = choose_executor(registry, config.executor.name)
        made = synth_model(*model.split(":", 1), stored=device.kind == "cpu")

    def open_pipeline() -> Pipeline:
        try:
            if made is not None:
                return prepare_opened(config, registry, made)
            return prepare(config, registry)
        except ConfigError as error:
            if automatic and str(error).startswith("executor.context"):
                why = str(error).removeprefix(f"executor.context: found {wanted.needed_context}, ")
                raise ConfigError(
                    f"bench: prompt, generated tokens and depth need a context of {wanted.needed_context}, {why}"
                ) from error
            raise

    return open_pipeline


_DEFAULT_SHAPE = "Llama-3.1-8B"
_SHORT_CONTEXT = 64


def _products(
    model: str | None, config: RunConfig, wanted: BenchSettings, types: tuple[str, ...], screen: Screen, form: str
) -> None:
    from mortice.core.bench.product_report import products_as_dict, products_csv, products_markdown
    from mortice.core.bench.products import (
        NEEDS_DEVICE,
        ProductModel,
        bench_products,
        models_of_shape,
        require_product_times,
    )
    from mortice.core.bench.results import BenchSettings
    from mortice.core.stages import choose_executor, registry_for
    from mortice.core.synth.model import is_shape_and_recipe

    if form == "plot":
        raise ConfigError("--products: found -o plot, wanted md, json or csv")
    if wanted != BenchSettings(batch=wanted.batch, repeats=wanted.repeats):
        raise ConfigError("--products: takes -b and -r; -p, -n, -d and --profile are for whole steps")
    context = config.executor.context or _SHORT_CONTEXT
    config = evolve(config, executor=evolve(config.executor, context=context, step_tokens=max(wanted.batch)))
    registry = registry_for(config)
    executor, _, why = choose_executor(registry, config.executor.name, advice=NEEDS_DEVICE)
    require_product_times(executor, why)
    model = model or _DEFAULT_SHAPE
    if Path(model).exists() or is_shape_and_recipe(model):
        if types:
            raise ConfigError(f"--types: {model} has types of its own")
        models = [ProductModel(name=Path(model).name, open=_opener(model, config, wanted))]
    else:
        models = models_of_shape(config, registry, executor, model, types)
    report = bench_products(models, executor, wanted.batch, wanted.repeats, screen.note)
    screen.result(products_as_dict(report))
    screen.say(products_csv(report).rstrip("\n") if form == "csv" else products_markdown(report))


def _print(screen: Screen, report: BenchReport, form: str) -> None:
    from mortice.core.bench.report import as_dict, csv_text, markdown, plot

    screen.result(as_dict(report))
    match form:
        case "csv":
            screen.say(csv_text(report).rstrip("\n"))
        case "plot":
            screen.say(plot(report))
        case _:
            screen.say(markdown(report))
