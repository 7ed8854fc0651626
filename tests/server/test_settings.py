"""Settings and the command line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from winnow.engine.config import ON_CUDA, EngineSettings
from winnow.engine.models.tokenizer import Tokenizer
from winnow.engine.vllm.arguments import engine_arguments
from winnow.kernels.layout import PageFormat
from winnow.server import __version__
from winnow.server.app import create_app
from winnow.server.cli import app as command
from winnow.server.settings import Settings, SettingsError, load

from .fake_engine import FakeEngine

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text("port: 1111\nmax_n: 3\nmax_stop_strings: 5\napi_key: [a, b]\n")
    return path


def test_who_wins(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_PORT", "2222")
    monkeypatch.setenv("WINNOW_MAX_N", "4")
    settings = load(config, max_n=5, host=None)
    assert (settings.max_n, settings.port, settings.max_stop_strings, settings.host) == (5, 2222, 5, "127.0.0.1")
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b"]
    assert "a" not in repr(settings.api_key)


def test_the_environment_names_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_CONFIG", str(config))
    monkeypatch.setenv("WINNOW_API_KEY", "x, y")
    monkeypatch.setenv("WINNOW_COMPRESSION", "balanced")
    settings = load()
    assert settings.port == 1111
    assert [key.get_secret_value() for key in settings.api_key] == ["x", "y"]
    assert settings.compression == "balanced"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot: 80", "prot"),
        ("port: 99999", "port"),
        ("port: http", "port"),
        ("weights: int3", "weights"),
        ("kv_memory_gib: 0", "kv_memory_gib"),
        ("kv_memory_gib: .nan", "kv_memory_gib"),
        ("kv_memory_gib: null", "kv_memory_gib"),
        ("device: tpu", "device"),
        ("weights: fp8", "not for device cpu, which has f32, int8"),
        ("device: cuda\nweights: int8", "not for device cuda, which has f32, bf16, f16, fp8"),
        ("device: cuda\nmemory_utilization: 1.5", "memory_utilization"),
        ("api_key: ['a b']", "api_key"),
        ("max_compression: {budget: 7.5}", "max_compression"),
        ("max_model_len: 4096\nmax_queue_tokens: 100", "max_queue_tokens"),
        ("port: [", "server.yaml"),
        ("- port", "server.yaml"),
        ("just text", "server.yaml"),
        ("\x00", "server.yaml"),
    ],
)
def test_bad_files(config: Path, text: str, named: str) -> None:
    config.write_text(text)
    with pytest.raises(SettingsError, match=named):
        load(config)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no\.yaml"):
        load(tmp_path / "no.yaml")


def test_the_engines_part() -> None:
    engine = load(weights="f32", max_seqs=7).of_engine
    assert type(engine) is EngineSettings
    assert (engine.weights, engine.max_seqs) == ("f32", 7)


def test_defaults_are_the_devices(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (load().weights, load().page_tokens, load().kv_memory_gib) == ("int8", 16, 4)
    assert load().of_engine.compute_format is PageFormat.F32
    monkeypatch.setenv("WINNOW_DEVICE", "cuda")
    config.write_text("max_seqs: 3")
    settings = load(config).of_engine
    assert (settings.weights, settings.page_tokens, settings.kv_memory_gib) == ("bf16", 32, None)
    assert (settings.compute_format, settings.max_seqs) == (PageFormat.BF16, 3)
    assert load(weights="fp8").of_engine.compute_format is PageFormat.BF16
    assert load(weights="f16").of_engine.compute_format is PageFormat.F16
    assert load(weights="f32", kv_memory_gib=1).of_engine.compute_format is PageFormat.F32


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("default", ("SmolLM2-135M-Instruct", "default")),
        ("org/model", ("org/model",)),
        ("{tmp}/weights", ("weights",)),
        ("{tmp}/some.gguf", ("some",)),
    ],
)
def test_model_names_are_no_paths(tmp_path: Path, model: str, names: tuple[str, ...]) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "some.gguf").touch()
    assert load(model=model.format(tmp=tmp_path)).model_names == names


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("server*.yaml")), ids=lambda path: path.name)
def test_shipped_configs(path: Path, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    create_app(load(path), (engine, tokenizer))


def test_the_config_that_shows_the_defaults() -> None:
    written = yaml.safe_load((CONFIGS / "server.yaml").read_text())
    defaults = load()
    assert written == {name: getattr(defaults, name) for name in written}
    left_out = {"max_model_len", "threads", "api_key", "served_model_name", "compression", "max_compression"}
    left_out |= {"profiles", "speculative", "embedding_model", "llmlingua2_model", "draft_model", "draft_weights"}
    left_out |= {"vllm_args", "vision_model", "vision_model_name", "vision_weights", "allowed_image_domains"}
    left_out |= ON_CUDA.keys()  # each device has its own
    assert set(Settings.model_fields) - set(written) == left_out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"compression": "nothing"}, "nothing"),
        ({"compression": {"kv": {"format": "int3"}}}, "compression.kv.format"),
        ({"compression": "off", "max_compression": {"budget": 0.5}}, "budget"),
        ({"profiles": "/no/such/file"}, "/no/such/file"),
    ],
)
def test_bad_plans_are_found_at_start(
    engine: FakeEngine, tokenizer: Tokenizer, options: dict[str, object], named: str
) -> None:
    with pytest.raises(SettingsError, match=named):
        create_app(load(**options), (engine, tokenizer))


@pytest.fixture
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("own_logging")
def test_the_command_line() -> None:
    run = CliRunner().invoke
    assert run(command, ["--version"]).output.strip() == __version__
    assert "--kv-memory-gib" in run(command, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for arguments, named in (
        (["--port", "99999"], "port"),
        (["--weights", "int3"], "weights"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["--model", "/no/such/model.gguf"], "/no/such/model.gguf"),
        (["--compression", "nothing"], "nothing"),
    ):
        result = run(command, ["serve", *arguments])
        assert result.exit_code == 2, result.output
        assert result.output.startswith("winnow: ")
        assert named in result.output
        assert "Traceback" not in result.output


@pytest.mark.usefixtures("own_logging")
def test_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("winnow.server.app.create_app", lambda settings: None)
    monkeypatch.setattr("winnow.server.lifecycle.serve", lambda app, settings: seen.append(settings))
    arguments = ["--port", "0", "--drain-s", "0", "--no-prefix-caching", "--api-key", "a", "--api-key", "b"]
    assert CliRunner().invoke(command, ["serve", *arguments]).exit_code == 0
    (settings,) = seen
    assert (settings.port, settings.drain_s, settings.prefix_caching, settings.max_n) == (0, 0, False, 16)
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b"]


def test_torch_is_never_loaded() -> None:
    """The server's process stays small, and OpenMP stays out of it."""
    script = """
import pkgutil, sys
from importlib import import_module
import winnow.server
for module in pkgutil.walk_packages(winnow.server.__path__, "winnow.server."):
    import_module(module.name)
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.server.settings import load
from winnow.server.plans import Plans
load_tokenizer("default")
Plans(load()).catalogue
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"WINNOW_CONFIG": ""}, timeout=120)


def test_arguments_of_vllm(config: Path) -> None:
    options = ["kv_cache_dtype=fp8", "tensor_parallel_size=2", "enable_expert_parallel=true", "hf_overrides={a: 1}"]
    settings = load(engine="vllm", vllm_args=options)
    assert settings.of_engine.vllm_args == {
        "kv_cache_dtype": "fp8",
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "hf_overrides": {"a": 1},
    }
    assert (settings.weights, settings.max_seqs) == ("bf16", 256)
    config.write_text("engine: vllm\ndevice: cuda\nvllm_args: {tensor_parallel_size: 4}")
    assert load(config).vllm_args == {"tensor_parallel_size": 4}
    assert load(config).kv_memory_gib is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vllm_args": ["a=1"]}, "vllm_args"),
        ({"engine": "vllm", "vllm_args": ["a"]}, "key=value"),
        ({"engine": "vllm", "weights": "int8"}, "int8 is not for vLLM"),
        ({"engine": "vllm", "page_tokens": 32}, "page_tokens"),
        ({"engine": "vllm", "speculative": "prompt_lookup"}, "speculative"),
        ({"engine": "sglang"}, "engine"),
    ],
)
def test_what_does_not_go_with_vllm(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load(**options)


@pytest.mark.parametrize("path", sorted((CONFIGS / "vllm").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_for_vllm(path: Path) -> None:
    settings = load(path).of_engine
    assert settings.engine == "vllm"
    assert settings.vllm_args.items() <= engine_arguments(settings, Path("/model")).items()
