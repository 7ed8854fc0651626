"""What is asked of a model, in this process and over HTTP, and what comes out of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from winnow.engine.build import build_engine
from winnow.engine.compression.registry import eviction_policy
from winnow.engine.errors import EvalError, RequestError
from winnow.engine.evaluation.harness import PROTOCOLS, RESERVE, TEXT, Harness, Scope
from winnow.engine.evaluation.haystack import Haystack
from winnow.engine.evaluation.measures import Mean, Whole
from winnow.engine.evaluation.page import page
from winnow.engine.evaluation.parity import KeptTarget
from winnow.engine.evaluation.plans import OFF, WEIGHTS, Plans, read_plans
from winnow.engine.evaluation.result import Cell, Result
from winnow.engine.evaluation.server import ServerTarget
from winnow.engine.evaluation.tables import show
from winnow.engine.evaluation.targets import Answer, Ask
from winnow.engine.evaluation.tasks import TASKS, sample
from winnow.engine.models.encoders import embedding_folder
from winnow.server.cli import app

from ..contract.serving import KEY, serving
from ..prompt.encoders import random_sentence_encoder

PLANS = read_plans("snapkv:0.5,h2o:0.25+int4,streaming_llm:1.0,quest:tokens=64:dense_layers=0,selective:0.5:unit=token")
TEXT_OF_ALL = " ".join(f"The {i}th sentence says a little of this and that, as others do." for i in range(300))
SCOPE = Scope(("niah_single", "qa"), (400,), 2, text_prompts=2, text_context=200, text_new=20)


def measure(target: KeptTarget | ServerTarget, scope: Scope = SCOPE, plans: Plans = PLANS) -> Result:
    result = Result("unit", {"model": "tiny"}, plans)
    Harness(target, TEXT_OF_ALL, plans, result).run(scope, lambda _: None)
    return result


@pytest.fixture(scope="module")
def result(target: KeptTarget) -> Result:
    return measure(target)


def test_everything_is_measured(result: Result) -> None:
    wanted = {Cell(plan, TEXT, 200, "") for plan in PLANS}
    wanted |= {Cell(plan, task, 400, protocol) for plan in PLANS for task in SCOPE.tasks for protocol in PROTOCOLS}
    assert set(result.values) == wanted
    assert all(len(values) == 2 for cell in result.values.values() for values in cell.values())
    assert result.measured_plans[0] == OFF
    assert not result.refused


def test_what_keeps_all_is_the_uncompressed_model(result: Result) -> None:
    for plan in (OFF, "streaming_llm:1.0"):
        cell = result.values[Cell(plan, TEXT, 200, "")]
        assert cell["kl"] == [0, 0]
        assert cell["agreement"] == [1, 1]
        assert cell["loss"] == result.values[Cell(OFF, TEXT, 200, "")]["loss"]
        assert cell["held"] == [1, 1]


def test_what_keeps_less_is_not(result: Result) -> None:
    half, least = (result.values[Cell(plan, TEXT, 200, "")] for plan in ("snapkv:0.5", "h2o:0.25+int4"))
    assert min(half["kl"]) > 0
    assert max(half["held"]) < 0.7
    assert max(least["held"]) < 0.4
    assert np.mean(least["kl"]) > np.mean(half["kl"])


def test_what_reads_a_part_holds_all(result: Result) -> None:
    cell = result.values[Cell("quest:tokens=64:dense_layers=0", TEXT, 200, "")]
    assert max(cell["read"]) < 0.9
    assert min(cell["held"]) >= 1


def test_what_shortens_the_prompt_holds_less_of_it(result: Result) -> None:
    cell = result.values[Cell("selective:0.5:unit=token", TEXT, 200, "")]
    assert 0.5 < min(cell["held"]) <= max(cell["held"]) < 0.65
    assert min(cell["kl"]) > 0


def test_what_ranks_by_a_question_needs_one(target: KeptTarget, tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing ranks before the question was read, nor without a model that reads both."""
    plan = read_plans("extractive:0.5")["extractive:0.5"]
    context, question = TEXT_OF_ALL[:200], " What is the matter of the third sentence?"

    def asked(of: KeptTarget, question: str) -> Answer | RequestError:
        (answer,) = of.ask([Ask(of.encode(context + question), plan, [1], context=context, question=question)])
        return answer

    assert "no embedding model" in str(asked(target, question)) or embedding_folder(None) is not None
    able = KeptTarget(str(tiny_folder), "f32", threads=1, kv_memory_gib=0.1)
    changes = {"embedding_model": str(random_sentence_encoder(tmp_path / "encoder"))}
    able.engine = build_engine(able.engine.settings.model_copy(update=changes))
    assert "there is none" in str(asked(able, ""))
    answer = asked(able, question)
    assert isinstance(answer, Answer)
    (whole,) = able.ask([Ask(able.encode(context + question), {}, [1])])
    assert isinstance(whole, Answer)
    assert answer.held < whole.held


def test_the_same_numbers_again(result: Result, target: KeptTarget) -> None:
    """With pages in the prefix cache that the first run left."""
    assert measure(target).values == result.values


def test_the_question_is_read_after_the_context_was_compressed(target: KeptTarget) -> None:
    """Agnostic: as if the question's tokens had been generated. Aware: what is kept has seen it."""
    context, question = target.encode(TEXT_OF_ALL[:300]), target.encode(" And what then?")
    plan = {"kv": {"evict": {"policy": "streaming_llm", "budget": 64}}}
    agnostic, aware = target.ask([Ask(context, plan, question, 5), Ask(context + question, plan, [], 5)])
    assert isinstance(agnostic, Answer) and isinstance(aware, Answer)
    page_bytes, lanes = target.engine.arena.layout.page_bytes, target.engine.arena.lanes
    assert agnostic.held == page_bytes * lanes * -(-(64 + len(question) + 4) // 16)
    assert aware.held == page_bytes * lanes * -(-(64 + 4) // 16)


def test_weights_are_compared_with_exact_ones(target: KeptTarget, tiny_folder: Path) -> None:
    rounded = KeptTarget(str(tiny_folder), "int8", threads=1, kv_memory_gib=0.1)
    result = Result("unit", {}, {})
    Harness(rounded, TEXT_OF_ALL, {}, result).compare_weights(target, SCOPE, lambda _: None)
    (cell,) = result.values.values()
    assert len(cell["kl"]) == 2
    assert 0 < max(cell["kl"]) < 0.5
    assert result.measured_plans == [WEIGHTS]


def test_refused_plans_are_noted_and_asked_once(target: KeptTarget) -> None:
    asked: list[str] = []

    class Refusing(KeptTarget):
        def __init__(self) -> None:
            self.__dict__.update(target.__dict__)

        def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
            asked.extend(str(ask.plan) for ask in asks)
            answers = super().ask(asks)
            error = RequestError("compression", "needs a profile")
            return [error if "h2o" in str(ask.plan) else one for ask, one in zip(asks, answers, strict=True)]

    result = measure(Refusing())
    assert result.refused == {"h2o:0.25+int4": "query-aware: needs a profile"}
    assert sum("h2o" in plan for plan in asked) == 1 + 2 * len(PROTOCOLS)  # once after text, twice about a task
    assert "h2o:0.25+int4" not in result.measured_plans
    assert "needs a profile" in page(result)


def test_contexts_that_do_not_fit(target: KeptTarget) -> None:
    with pytest.raises(EvalError, match="4096 tokens are more than the 2048"):
        measure(target, Scope(("qa",), (4096,), 1, 0, 0, 0))


def test_a_server_says_the_same(result: Result, tiny_folder: Path, tmp_path: Path) -> None:
    """Exactly, but for the divergence, of which it tells a part."""
    with serving(tmp_path, "--model", str(tiny_folder), "--weights", "f32", "--kv-memory-gib", "0.1") as server:
        with pytest.raises(EvalError, match="401"):
            ServerTarget(server.url)
        over_http = measure(ServerTarget(server.url, KEY), replace(SCOPE, samples=1, tasks=("qa",)))
        sizes = ["--tasks=none", "--text-prompts=1", "--text-context=200", "--text-new=20"]
        command = ["eval", "--plans=snapkv:0.5", f"--url={server.url}", *sizes, f"--out={tmp_path}", "--name=http"]
        done = CliRunner().invoke(app, command, env={"WINNOW_API_KEY": KEY})
        assert done.exit_code == 0, done.output
    assert "KL: at least as much: a server tells the 20 likeliest tokens" in " ".join(done.output.split())
    assert "kl: at least as much" in (tmp_path / "http.html").read_text("utf-8")
    assert json.loads((tmp_path / "http.json").read_text("utf-8"))["model"] == server.url
    assert {cell.part for cell in over_http.values} == {TEXT, "qa"}
    for cell, other in over_http.values.items():
        measures = {name: values[: len(other["held"])] for name, values in result.values[cell].items()}
        for name in measures.keys() - {"kl"}:
            assert other[name] == pytest.approx(measures[name], abs=1e-5), (cell, name)
        for told, exact in zip(other.get("kl", []), measures.get("kl", []), strict=True):
            assert 0 <= told <= exact + 1e-5


def test_no_server() -> None:
    with pytest.raises(EvalError, match=r"127\.0\.0\.1:9"):
        ServerTarget("http://127.0.0.1:9")


def test_results_are_written_and_read(result: Result, tmp_path: Path) -> None:
    path = result.write(tmp_path / "results")
    data = json.loads(path.read_text("utf-8"))
    again = Result.from_dict(data)
    assert again.as_dict() == data
    assert again.mean("snapkv:0.5", "kl", TEXT) is not None
    assert again.mean("snapkv:0.5", "score", "variables") is None
    (cell,) = (cell for cell in data["cells"] if (cell["plan"], cell["part"]) == ("snapkv:0.5", TEXT))
    assert cell["means"]["kl"]["mean"] == pytest.approx(np.mean(cell["values"]["kl"]), rel=1e-3)


def test_what_is_there_is_not_measured_again(result: Result, target: KeptTarget) -> None:
    """Cut anywhere, a run goes on where it was, with the figures that it would have had."""
    asked: list[Ask] = []

    class Listening(KeptTarget):
        def __init__(self) -> None:
            self.__dict__.update(target.__dict__)

        def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
            asked.extend(asks)
            return super().ask(asks)

    half = Result.from_dict(result.as_dict())
    cut = Cell("snapkv:0.5", "qa", 400, "query-aware")
    half.values[cut] = {measure: values[:1] for measure, values in half.values[cut].items()}
    harness = Harness(Listening(), TEXT_OF_ALL, PLANS, half)
    harness.run(SCOPE, lambda _: None)
    for measure, values in result.values[cut].items():
        assert half.values[cut][measure] == pytest.approx(values, rel=1e-4)
    assert len(asked) == 4, "the uncompressed model and one plan, each for what it says and for the right answer"
    assert half.values.keys() == result.values.keys()

    asked.clear()
    harness.run(replace(SCOPE, samples=3, tasks=("qa",)), lambda _: None)
    assert all(half.contexts(Cell(plan, "qa", 400, protocol)) == 3 for plan in PLANS for protocol in PROTOCOLS)
    assert {len(ask.prompt) for ask in asked} == {len(asked[0].prompt), len(asked[-1].prompt)}, "one new context"


def test_the_loss_of_an_answer_is_its_own(result: Result, target: KeptTarget) -> None:
    """Of the right answer's tokens, when the question has been read: as if it were the text of a request without it."""
    one = sample("qa", Haystack(TEXT_OF_ALL, target.encode), 400 - RESERVE - TASKS["qa"].new, 0)
    context, question, right = map(target.encode, (one.context, one.question, one.right))
    (whole,) = target.ask([Ask(context + question[:-1], {}, question[-1:] + right, foretells=True)])
    assert isinstance(whole, Answer) and isinstance(whole.foretold, Whole)
    assert whole.foretold.text.tolist() == right
    loss = -whole.foretold.logprobs[np.arange(len(right)), right].mean()
    assert result.values[Cell(OFF, "qa", 400, "query-aware")]["loss"][0] == pytest.approx(loss, rel=1e-4)


class Links(HTMLParser):
    """Open elements, and everything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(result: Result) -> None:
    html = page(result)
    parser = Links()
    parser.feed(html)
    parser.close()
    assert not parser.open
    assert not parser.fetched
    assert html.count("<figure>") == 2 + 2 * len(PROTOCOLS)
    for name in PLANS:
        assert name in parser.text
    assert "nan" not in html.lower().replace("finance", "")


def test_the_terminal(result: Result) -> None:
    out = StringIO()
    show(result, Console(file=out, width=140))
    for name in (*PLANS, "query-agnostic", "query-aware", "niah_single", "400 tokens"):
        assert name in out.getvalue()


def test_tasks_of_another_length_have_a_table_of_their_own() -> None:
    """Best first by what the right answer costs, the uncompressed model before all; how many contexts stands beside."""
    result = Result("unit", {}, {name: {} for name in (OFF, "tova:0.5", "h2o:0.5")})
    for length, plans in ((512, (OFF, "tova:0.5", "h2o:0.5")), (4096, (OFF, "h2o:0.5"))):
        for loss, plan in enumerate(plans):
            for score in (0.0, 0.25):
                result.add(plan, "qa", length, PROTOCOLS[0], score=score, loss=1.5 + loss, held=0.5, held_mib=1.0)
    # A context that one plan was not asked about: what the uncompressed model finds hard is not held against the other.
    result.add(OFF, "variables", 512, PROTOCOLS[0], score=0.0, loss=9.0, held=0.5, held_mib=1.0)
    result.add("tova:0.5", "variables", 512, PROTOCOLS[0], score=0.0, loss=9.5, held=0.5, held_mib=1.0)
    assert result.beyond("tova:0.5", "loss", 512, PROTOCOLS[0]) == Mean.of([1.0, 1.0, 0.5])
    assert result.tasks(PROTOCOLS[0]) == {512: ["qa", "variables"], 4096: ["qa"]}
    assert result.ranked(PROTOCOLS[0], 512) == [OFF, "tova:0.5", "h2o:0.5"]
    html = page(result)
    assert html.count("<h3>") == 2
    short, long = html.split("<h3>")[1:]
    assert "tova:0.5" in short and "tova:0.5" not in long
    assert short.index("tova:0.5") < short.index("h2o:0.5")
    assert "The uncompressed model finds 8 % of the answers" in short
    assert "go by the loss" in short


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    sizes = ["--lengths=900", "--samples=1", "--text-prompts=1", "--text-context=128", "--text-new=8"]
    model = [f"--model={tiny_folder}", "--weights=f32", "--threads=1", "--kv-memory-gib=0.1"]
    done = CliRunner().invoke(
        app, ["eval", "--plans=knorm:0.5", "--tasks=variables", *sizes, *model, f"--out={tmp_path}", "--name=mine"]
    )
    assert done.exit_code == 0, done.output
    assert {file.name for file in tmp_path.iterdir()} == {"mine.json", "mine.html"}
    data = json.loads((tmp_path / "mine.json").read_text("utf-8"))
    assert set(data["plans"]) == {OFF, "knorm:0.5", "random:0.5", "streaming_llm:0.5"}
    assert data["cells"] and data["seconds"] >= 0
    assert "PSF License" in data["text_of"] and "PSF License" in (tmp_path / "mine.html").read_text("utf-8")

    arguments = ["eval", "--tasks=variables", *sizes, *model, f"--out={tmp_path}", "--name=mine", "--resume"]
    done = CliRunner().invoke(app, [*arguments, "--plans=knorm:0.5,int8"])
    assert done.exit_code == 0, done.output
    more = json.loads((tmp_path / "mine.json").read_text("utf-8"))
    assert more["cells"][: len(data["cells"])] == data["cells"]
    assert {cell["plan"] for cell in more["cells"][len(data["cells"]) :]} == {"int8"}
    assert (tmp_path / "mine.html").read_text("utf-8").count("int8") > 1
    other = CliRunner().invoke(app, [*arguments, "--plans=int4", "--text-new=9"])
    assert other.exit_code == 2
    assert "another text_new: 8, not 9" in other.output
    (tmp_path / "mine.json").write_text("{}")
    other = CliRunner().invoke(app, [*arguments, "--plans=int4"])
    assert other.exit_code == 2
    assert "mine.json cannot be read" in other.output


def test_a_plan_that_needs_a_draft_model(tiny_folder: Path, tmp_path: Path) -> None:
    sizes = ["--tasks=none", "--text-prompts=1", "--text-context=128", "--text-new=8"]
    model = [f"--model={tiny_folder}", "--weights=f32", "--threads=1", "--kv-memory-gib=0.1"]
    arguments = ["eval", "--plans=spec_kv:0.5", *sizes, *model, f"--out={tmp_path}"]
    for more, is_measured in (([], False), ([f"--draft-model={tiny_folder}"], True)):
        done = CliRunner().invoke(app, [*arguments, *more])
        assert done.exit_code == 0, done.output
        data = json.loads((tmp_path / "eval.json").read_text("utf-8"))
        assert ("needs a draft model" in data["refused"].get("spec_kv:0.5", "")) is not is_measured
        assert any(cell["plan"] == "spec_kv:0.5" for cell in data["cells"]) is is_measured
    done = CliRunner().invoke(app, [*arguments, "--draft-model=default", "--url=http://127.0.0.1:9"])
    assert "--draft-model needs an engine in this process" in done.output


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--plans=nonsense", "no page format"),
        ("--plans=snapkv:0.5:window=0", "window"),
        ("--tasks=chess", "'chess' is none of"),
        ("--lengths=many", "no list of numbers"),
        ("--budgets=-1", "must be positive"),
        ("--protocols=psychic", "is none of"),
        ("--url=http://127.0.0.1:9", "127.0.0.1:9"),
    ],
)
def test_wrong_options(option: str, why: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", option, f"--out={tmp_path}"])
    assert done.exit_code == 2
    assert why in done.output
    assert not list(tmp_path.iterdir())


def test_a_plan_that_fails_stops_nobody_else(target: KeptTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("it cannot count")

    monkeypatch.setattr(eviction_policy("knorm"), "score", fail, raising=False)
    result = measure(target, replace(SCOPE, tasks=()), read_plans("knorm:0.5,tova:0.5"))
    assert "failed to compress" in result.refused["knorm:0.5"]
    assert "tova:0.5" in result.measured_plans
