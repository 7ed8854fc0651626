"""`winnow`: the command line."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from winnow.engine.errors import EvalError, ModelError
from winnow.server import __version__
from winnow.server.calibrate import calibrate
from winnow.server.settings import SettingsError, load
from winnow.server.thresholds import thresholds

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


app.command()(calibrate)
app.command()(thresholds)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Winnow: an OpenAI-compatible inference server with per-request KV compression."""


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="Directory, .gguf file or Hugging Face name.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    engine: Annotated[str | None, typer.Option(help="What runs the model: winnow or vllm.")] = None,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="key=value, an argument of vLLM by its own name; repeatable.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs: cpu or cuda.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="How weights are held: f32 or int8 on the CPU; bf16, f16, fp8 or f32 on a GPU.")
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(help="Processes, each with a GPU of its own if any, that share the model by its heads."),
    ] = None,
    kv_memory_gib: Annotated[float | None, typer.Option(help="Memory for keys and values.")] = None,
    memory_utilization: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory to use where kv_memory_gib is not given.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus output, in tokens.")] = None,
    max_stream_len: Annotated[
        int | None, typer.Option(help="Longest prompt plus output of a request with compact positions.")
    ] = None,
    max_seqs: Annotated[int | None, typer.Option(help="Sequences that run together.")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.")] = None,
    page_tokens: Annotated[int | None, typer.Option(help="Tokens of a page in the compute format.")] = None,
    prefix_caching: Annotated[bool | None, typer.Option(help="Reuse pages of equal prompt prefixes.")] = None,
    cuda_graphs: Annotated[bool | None, typer.Option(help="Replay recorded steps on a GPU.")] = None,
    async_scheduling: Annotated[
        bool | None, typer.Option(help="Plan and launch a step before the last one's tokens have been read.")
    ] = None,
    batch_invariant: Annotated[
        bool | None, typer.Option(help="Give a row the same bits whatever shares its step on a GPU.")
    ] = None,
    embedding_model: Annotated[
        str | None, typer.Option(help="Directory of the sentence encoder for extractive prompts.")
    ] = None,
    llmlingua2_model: Annotated[
        str | None, typer.Option(help="Directory of the token classifier for llmlingua2 prompts.")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="Smaller model with the same vocabulary, that guesses and looks ahead.")
    ] = None,
    draft_weights: Annotated[
        str | None, typer.Option(help="How its weights are held; like the model's if unset.")
    ] = None,
    draft_memory_gib: Annotated[
        float | None, typer.Option(help="Memory for the draft model's keys and values.")
    ] = None,
    vision_model: Annotated[
        str | None, typer.Option(help="A model that sees images, served beside the first by an engine of its own.")
    ] = None,
    vision_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that requests use for it; repeatable, the first is shown.")
    ] = None,
    vision_weights: Annotated[
        str | None, typer.Option(help="How its weights are held; like the model's if unset.")
    ] = None,
    vision_memory_gib: Annotated[float | None, typer.Option(help="Memory for its keys and values.")] = None,
    allowed_image_domains: Annotated[
        str | None, typer.Option(help="Comma-separated hosts from which images are fetched; none: data: URIs only.")
    ] = None,
    image_cache_gib: Annotated[
        float | None, typer.Option(help="Memory for what was made of images, so that they need not be encoded again.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of an engine.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that requests must bring; repeatable. Better: WINNOW_API_KEY.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that requests use; repeatable, the first is shown.")
    ] = None,
    compression: Annotated[str | None, typer.Option(help="Profile of requests that name no compression.")] = None,
    speculative: Annotated[str | None, typer.Option(help="Speculative decoding of requests that name none.")] = None,
    profiles: Annotated[Path | None, typer.Option(help="YAML file of named profiles.")] = None,
    drain_s: Annotated[float | None, typer.Option(help="Time that requests get after SIGTERM.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve a model over HTTP.

    Every setting can also stand in the YAML file or in the environment as WINNOW_NAME; options win over the
    environment, which wins over the file.
    """
    options = {name: value for name, value in locals().items() if name != "config"}
    options["vllm_args"] = options.pop("vllm_arg")
    try:
        settings = load(config, **options)
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )
        from winnow.server.app import create_app  # after the settings: errors in them should come quickly
        from winnow.server.lifecycle import serve as run

        run(create_app(settings), settings)
    except (SettingsError, ModelError) as error:
        typer.echo(f"winnow: {error}", err=True)
        raise typer.Exit(2) from error


@app.command("eval")
def evaluate(
    plans: Annotated[
        str,
        typer.Option(
            help="Comma-separated: 'default', brief plans such as snapkv:0.25:adaptive+int4, and YAML or JSON files of "
            "names and plans. The controls are added."
        ),
    ] = "default",
    budgets: Annotated[str, typer.Option(help="Budgets of the default plans.")] = "0.5,0.25",
    tasks: Annotated[str, typer.Option(help="Generated tasks, 'all' or 'none'.")] = "niah_single,niah_multikey,qa",
    lengths: Annotated[str, typer.Option(help="Tokens of the tasks.")] = "512",
    samples: Annotated[int, typer.Option(min=1, help="Contexts of each task at each length.")] = 4,
    protocols: Annotated[
        str, typer.Option(help="query-agnostic (compressed before the question is read), query-aware, or 'all'.")
    ] = "all",
    text_prompts: Annotated[int, typer.Option(min=0, help="Contexts of real text; 0: no text.")] = 4,
    text_context: Annotated[int, typer.Option(min=64, help="Tokens of real text that are compressed.")] = 1024,
    text_new: Annotated[int, typer.Option(min=2, help="Tokens of real text after them.")] = 64,
    model: Annotated[str, typer.Option(help="As for `winnow serve`; with --vision the default is mosaic.")] = "default",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu or cuda.")] = "cpu",
    weights: Annotated[
        str | None, typer.Option(help="How weights are held: int8 or f32; on a GPU bf16, f16, fp8 or f32.")
    ] = None,
    draft_model: Annotated[str | None, typer.Option(help="As for `winnow serve`; for plans that look ahead.")] = None,
    against_f32: Annotated[bool, typer.Option(help="Compare the weights with f32 ones too.")] = False,
    url: Annotated[
        str | None,
        typer.Option(help="A running Winnow server to ask instead; its key is read from WINNOW_API_KEY."),
    ] = None,
    vision: Annotated[
        bool,
        typer.Option(
            "--vision",
            help="Instead of tasks and text, what pruning the tokens of images costs: questions about pictures that "
            "the model that ships was made for, by policy and by what is kept, beside the controls and a blind run.",
        ),
    ] = False,
    keeps: Annotated[
        str, typer.Option(help="What the default plans of --vision keep of a picture.")
    ] = "0.5,0.25,0.125,0.0625",
    pictures: Annotated[int, typer.Option(min=1, help="How many --vision asks about.")] = 100,
    kvpress: Annotated[
        Path | None,
        typer.Option(
            help="Instead of all that, the Python of an environment with kvpress: compare the methods that both have, "
            "on real text (`make parity`)."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="All cores if unset.")] = None,
    kv_memory_gib: Annotated[float, typer.Option(min=0.05, help="Memory for keys and values.")] = 2.0,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on with NAME.json where it is there: only what it lacks is measured, be it plans, lengths or "
            "contexts; model, weights and text must be the same."
        ),
    ] = False,
    name: Annotated[str, typer.Option(help="Of the files that are written.")] = "eval",
    out: Annotated[Path, typer.Option(help="Folder of NAME.json and NAME.html.")] = Path(),
) -> None:
    """Measure what compression costs in quality.

    Plans are compared with the same model uncompressed: distributions of the next token on real text, and answers to
    generated long-context tasks, or to questions about pictures. As it stands it takes a few minutes on two cores.
    """
    options = locals()
    command = import_module("winnow.engine.evaluation.command")  # it may load torch, which the server never does
    try:
        command.run(command.Options(**options))
    except (EvalError, ModelError) as error:
        typer.echo(f"winnow: {error}", err=True)
        raise typer.Exit(2) from error


def main() -> None:
    app()


if __name__ == "__main__":
    main()
