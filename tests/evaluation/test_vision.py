"""`winnow eval --vision`: what is asked about pictures and of whom, what comes out of it, and how it is shown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path

import httpx
import pytest
from msgspec import structs
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.errors import EvalError, RequestError
from winnow.engine.evaluation import command
from winnow.engine.evaluation.harness import IMAGE, PREFILL, Harness, Scope
from winnow.engine.evaluation.measures import Mean
from winnow.engine.evaluation.pictures import GREY, QUESTIONS, Mosaics, Question, Scene, blank, png
from winnow.engine.evaluation.plans import (
    BLIND,
    OFF,
    VISION_CONTROLS,
    default_vision_plans,
    family,
    is_control,
    read_plan,
    read_plans,
)
from winnow.engine.evaluation.result import Cell, Result
from winnow.engine.evaluation.seeing import Seeing
from winnow.engine.evaluation.server import ServerTarget
from winnow.engine.evaluation.targets import Answer, Ask, EngineTarget
from winnow.engine.evaluation.vision import families, keeps, kinds, losses, seen
from winnow.engine.evaluation.vision_page import show_vision, vision_page
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.models.vision.processor import load_processor
from winnow.server.app import create_app
from winnow.server.cli import app
from winnow.server.settings import load

from ..models.vision_checkpoints import image_of, save_vlm
from ..server.fake_engine import FakeEngine
from .test_harness import Links

TOKENS = 144
PLANS = {BLIND: {}} | {
    f"vision:{policy}:{keep}": {"vision": {"policy": policy, "keep": keep}}
    for policy in ("random", "downsample", "good", "bad", "refused")
    for keep in (0.5, 0.25)
}
KNOWS = {"random": 0.5, "downsample": 0.4, "good": 0.5, "bad": 0.45}
"""Share of a hundred scenes of which a plan that keeps half answers rightly"""


class Plain:
    """Pictures of one colour, which has their number in it, with two questions each."""

    def scene(self, index: int, blue: int = 7) -> Scene:
        image = png(Image.new("RGB", (8, 8), (index % 256, index // 256 % 256, blue)))
        questions = (
            Question("colour", f"What colour is {index}?", "red", index),
            Question("count", "How many?", "two", index),
        )
        return Scene(image, questions)

    def fresh(self, seed: int) -> Scene:
        return self.scene(seed, blue=8)


scene = Plain().scene


class Scripted:
    """Answers as `KNOWS` says, by the picture's number."""

    weights = "none"
    max_model_len = 0

    def __init__(self) -> None:
        self.asked: list[Ask] = []

    def encode(self, text: str) -> list[int]:
        raise AssertionError("there is no text")

    def decode(self, tokens: list[int]) -> str:
        raise AssertionError("there is no text")

    def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
        self.asked += asks
        return [self._answer(ask) for ask in asks]

    def _answer(self, ask: Ask) -> Answer | RequestError:
        assert ask.image is not None
        pixel = Image.open(BytesIO(ask.image)).getpixel((0, 0))
        right = "Two." if "many" in ask.question else " red"
        if pixel == GREY:
            return Answer("", None, 100, 1000, image_tokens=TOKENS, image_kept=TOKENS)
        if not ask.plan:
            return Answer(right, None, 1000, 1000, image_tokens=TOKENS, image_kept=TOKENS)
        vision = ask.plan["vision"]
        if vision["policy"] == "refused":
            return RequestError("compression.vision", "there is no such grid")
        assert isinstance(pixel, tuple)
        is_known = pixel[0] < 20 * 2 * vision["keep"] * KNOWS[vision["policy"]]
        kept = round(vision["keep"] * TOKENS)
        return Answer(right if is_known else "blue", None, 10 * kept, 1000, image_tokens=TOKENS, image_kept=kept)


def measure(target: Scripted, result: Result, scenes: int = 20) -> Result:
    harness = Harness(target, "", result.plans, result, Plain())
    harness.run(Scope(scenes=scenes), lambda _: None)
    harness.time_prefills(3, lambda _: None, lambda: None)
    return result


@pytest.fixture(scope="module")
def result() -> Result:
    return measure(Scripted(), Result("unit", {"model": "tiny"}, {OFF: {}} | PLANS))


def test_what_is_measured(result: Result) -> None:
    assert kinds(result) == ["colour", "count"]
    assert keeps(result) == [0.5, 0.25]
    assert list(families(result)) == ["vision:random", "vision:downsample", "vision:good", "vision:bad"]
    whole, blind, half = seen(result, OFF), seen(result, BLIND), seen(result, "vision:random:0.5")
    assert whole is not None and blind is not None and half is not None
    assert (whole.score.value, blind.score.value, half.score.value) == (1.0, 0.0, 0.5)
    assert (whole.kept.value, half.kept.value, half.held.value) == (144, 72, 0.72)
    assert whole.prefill_s is not None and half.prefill_s is not None and blind.prefill_s is None
    assert seen(result, "vision:refused:0.5") is None
    assert result.refused["vision:refused:0.25"] == "there is no such grid"


def test_who_loses(result: Result) -> None:
    assert losses(result, "good") == losses(result, "refused") == {}
    assert losses(result, "random") == losses(result, "downsample") == {}, "controls are not judged"
    lost = losses(result, "bad")
    assert list(lost) == ["random"]
    assert lost["random"].value == pytest.approx(Mean.of([0.05, 0.05]).value, abs=0.03)


def test_nothing_is_measured_twice(result: Result) -> None:
    """More pictures of the same plans, and a plan more: only what lacks is asked."""
    target = Scripted()
    more = measure(target, Result.from_dict(result.as_dict()), 21)
    asked = Counter((ask.plan.get("vision", {}).get("policy"), ask.image == scene(20).image) for ask in target.asked)
    # What was refused is tried again, once, with the first picture.
    assert asked.pop((None, False)) - 2 == asked.pop(("refused", False)) - 2 == 2
    assert all(is_new for _, is_new in asked)
    assert asked.total() == 2 * (1 + len(PLANS) - 2) - 2  # the blind are shown another picture
    assert more.contexts(Cell(OFF, "colour", 0, IMAGE)) == 21
    assert len(more.values[Cell(OFF, PREFILL, 0, IMAGE)]["seconds"]) == 3


def test_pictures_that_are_timed_are_new_to_all() -> None:
    target = Scripted()
    plans = {OFF: {}, "vision:random:0.5": PLANS["vision:random:0.5"]}
    Harness(target, "", plans, Result("unit", {}, plans), Plain()).time_prefills(3, lambda _: None, lambda: None)
    assert len({ask.question for ask in target.asked}) == len(target.asked) == 2 * 3


def test_refusals_are_not_timed() -> None:
    """Though nothing else was asked."""
    target, plans = Scripted(), {OFF: {}, "vision:refused:0.5": PLANS["vision:refused:0.5"]}
    timed = Result("unit", {}, plans)
    Harness(target, "", plans, timed, Plain()).time_prefills(3, lambda _: None, lambda: None)
    assert timed.refused == {"vision:refused:0.5": "there is no such grid"}
    assert [cell.plan for cell in timed.values] == [OFF]
    assert len(target.asked) == 3 + 1


def test_an_answer_is_right_or_wrong() -> None:
    question = Question("colour", "Which?", "light blue")
    assert [question.score(said) for said in ("light blue", " Light  blue.\n", "blue", "light blue red", "")] == [
        1, 1, 0, 0, 0,
    ]  # fmt: skip


def test_the_blind_see_grey() -> None:
    shown = Image.open(BytesIO(blank(png(Image.new("RGB", (5, 3), "red")))))
    assert shown.size == (5, 3)
    assert shown.getcolors() == [(15, GREY)]


def test_the_page_stands_alone(result: Result) -> None:
    parser = Links()
    html = vision_page(result)
    parser.feed(html)
    parser.close()
    assert not parser.open and not parser.fetched
    for name in (*PLANS, "colour", "count", "Unpruned, the model answers 100.0 ± 0.0 %", "points beside random"):
        assert name in parser.text
    assert "nan" not in html.lower()


def test_the_terminal(result: Result) -> None:
    out = StringIO()
    show_vision(result, Console(file=out, width=160))
    for name in (*PLANS, "points beside random"):
        assert name in out.getvalue()


def test_names_of_plans() -> None:
    text = "vision:random:0.25:seed=3+snapkv:0.5+int4"
    assert read_plan(text) == {
        "kv": {"evict": {"policy": "snapkv", "budget": 0.5}, "format": "int4"},
        "vision": {"policy": "random", "keep": 0.25, "seed": 3},
    }
    assert family(text) == "vision:random:seed=3+snapkv+int4"
    assert is_control("vision:uniform:36") and is_control(BLIND)
    assert not is_control("vision:random:0.25+int4") and not is_control("vision:random:0.25:seed=3")
    for wrong in ("vision", "vision:random", "vision:nothing:0.5"):
        with pytest.raises(EvalError, match="vision"):
            read_plan(wrong)


def test_default_plans_are_the_registrys() -> None:
    names = default_vision_plans([0.5])
    assert names == [f"vision:{name}:0.5" for name in VISION if "image" in vision_policy(name).kinds]
    plans = read_plans("vision:random:36")
    assert list(plans) == [OFF, "vision:random:36", *(f"vision:{c}:36" for c in VISION_CONTROLS if c != "random")]


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "idefics3"])
def seeing_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_vlm(folder, request.param)
    return folder


def test_what_a_server_is_asked_is_what_the_engine_is(seeing_folder: Path) -> None:
    """The same question over HTTP and in this process: tokens and pictures are alike, to the byte."""
    name = str(seeing_folder)
    tokenizer = load_tokenizer(name)
    processor = load_processor(name, tokenizer)
    assert processor is not None
    placeholder = tokenizer.encode(processor.marks["image"], False)[0]
    engine = FakeEngine(tokenizer, [9, 10])
    assert engine.info is not None
    engine.info = structs.replace(engine.info, sees={"image": placeholder})
    served = create_app(load(model=name), (engine, tokenizer, processor))
    server = ServerTarget("http://w", transport=httpx.ASGITransport(app=served), sees=True)
    plan = {"vision": {"policy": "random", "keep": 0.5}}
    image, question = png(image_of(40, 56)), "what is this ?"
    (answer,) = server.ask([Ask([], plan, image=image, question=question, new=2)])
    assert isinstance(answer, Answer)
    (submit,) = engine.submits
    prompt, picture = Seeing(tokenizer, processor, placeholder).prompt(image, question)
    assert submit.prompt == prompt
    assert submit.pictures == [picture]
    assert (answer.image_tokens, answer.image_kept) == (prompt.count(placeholder), prompt.count(placeholder) // 2)
    assert submit.plan == plan and submit.sampling.max_tokens == 2


def test_a_server_of_text_only() -> None:
    tokenizer = load_tokenizer("default")
    served = create_app(load(), (FakeEngine(tokenizer), tokenizer))
    with pytest.raises(EvalError, match="no model that sees images"):
        ServerTarget("http://w", transport=httpx.ASGITransport(app=served), sees=True)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llava")
    save_vlm(folder, "llava")
    return folder


def test_the_engine_is_asked(llava: Path) -> None:
    target = EngineTarget(str(llava), "f32", threads=1, kv_memory_gib=0.05)
    ask = Ask([], {}, image=png(image_of(32, 32)), question="what is this ?", new=3)
    plans = [{}, *({"vision": {"policy": "random", "keep": keep}} for keep in (1.0, 0.125))]
    whole, all_kept, part = target.ask([replace(ask, plan=plan) for plan in plans])
    assert isinstance(whole, Answer) and isinstance(all_kept, Answer) and isinstance(part, Answer)
    assert whole == all_kept
    assert (whole.image_tokens, whole.image_kept, part.image_tokens, part.image_kept) == (16, 16, 16, 2)
    assert part.held < whole.held == whole.uncompressed == part.uncompressed
    for plan in ({"prompt": {"policy": "selective", "keep": 0.5}}, {"kv": {"format": "int4", "scope": "document"}}):
        (refused,) = target.ask([replace(ask, plan=plan)])
        assert isinstance(refused, RequestError) and "not for prompts with images" in refused.message


def test_the_command(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Mosaics", Plain)
    monkeypatch.setattr(command, "TIMED", 2)
    model = [f"--model={llava}", "--weights=f32", "--threads=1", "--kv-memory-gib=0.05"]
    arguments = ["eval", "--vision", *model, f"--out={tmp_path}", "--plans=vision:vtc_cls:0.25"]
    done = CliRunner().invoke(app, [*arguments, "--pictures=1"])
    assert done.exit_code == 0, done.output
    before = (tmp_path / "eval.json").read_text("utf-8")
    assert {"off", "blind", "vision:vtc_cls:0.25", "vision:random:0.25"} <= set(
        Result.from_dict(json.loads(before)).plans
    )
    assert "vision:vtc_cls:0.25" in (tmp_path / "eval.html").read_text("utf-8")
    done = CliRunner().invoke(app, [*arguments, "--pictures=2", "--resume"])
    assert done.exit_code == 0, done.output
    result = Result.from_dict(json.loads((tmp_path / "eval.json").read_text("utf-8")))
    assert result.contexts(Cell("vision:vtc_cls:0.25", "colour", 0, IMAGE)) == 2
    assert len(result.values[Cell("vision:vtc_cls:0.25", PREFILL, 0, IMAGE)]["seconds"]) == 2
    done = CliRunner().invoke(app, [*arguments, "--draft-model=default"])
    assert done.exit_code == 2 and "not for --vision" in done.output


def test_mosaics_are_the_same_each_time() -> None:
    pytest.importorskip("easy_vqa")
    mosaics, again = Mosaics(), Mosaics()
    third = mosaics.scene(2)
    assert [again.scene(i) for i in range(3)] == [mosaics.scene(i) for i in range(3)]
    assert third == again.scene(2)
    assert Image.open(BytesIO(third.image)).size == (96, 96)
    questions = [question for i in range(3) for question in mosaics.scene(i).questions]
    assert len({(question.kind, question.index) for question in questions}) == len(questions) == 3 * QUESTIONS
    assert mosaics.fresh(1) == again.fresh(1) != mosaics.fresh(2)
