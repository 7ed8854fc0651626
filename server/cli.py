"""`winnow`: the command line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from winnow.engine.errors import ModelError
from winnow.server import __version__
from winnow.server.settings import SettingsError, load

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


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
    weights: Annotated[str | None, typer.Option(help="How weights are held on the CPU: f32 or int8.")] = None,
    kv_memory_gib: Annotated[float | None, typer.Option(help="Memory for keys and values.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus output, in tokens.")] = None,
    max_seqs: Annotated[int | None, typer.Option(help="Sequences that run together.")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.")] = None,
    page_tokens: Annotated[int | None, typer.Option(help="Tokens of a page in the compute format.")] = None,
    prefix_caching: Annotated[bool | None, typer.Option(help="Reuse pages of equal prompt prefixes.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
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


def main() -> None:
    app()


if __name__ == "__main__":
    main()
