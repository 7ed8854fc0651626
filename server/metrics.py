"""Prometheus metrics: vLLM's names and buckets under our prefix, and compression's own.

Labels hold names from this server's own tables only (routes, policies, formats, the served model), never text that a
caller wrote. A restarted engine counts from zero again, which Prometheus takes for what it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from winnow.engine.messages import CompressionReport, EngineInfo, EngineStats, Shortened
from winnow.server.client import Client

TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
DECODE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
COUNTS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
PREFIX = "winnow:"
LABELS = ("model_name", "engine")
"""Of every metric but those of HTTP"""


def labels_of(model_name: str) -> dict[str, str]:
    """A model has one engine, which is vLLM's number 0."""
    return {"model_name": model_name, "engine": "0"}


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._engines = EngineCollector()
        self.registry.register(self._engines)
        self.ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token", TTFT)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two outputs of a choice", PER_TOKEN)
        self.per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first", PER_TOKEN
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token", LATENCY)
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt", COUNTS)
        self.output_length = self._histogram("request_generation_tokens", "Tokens generated for a choice", COUNTS)
        self.params_n = self._histogram("request_params_n", "The parameter n", (1, 2, 5, 10, 20))
        self.params_max_tokens = self._histogram("request_params_max_tokens", "The parameter max_tokens", COUNTS)
        self.success = self._counter("request_success", "Choices by how they ended", "finished_reason")
        self.held = self._counter("kv_bytes_held", "Bytes that ended sequences held", "policy", "format")
        self.full = self._counter(
            "kv_bytes_uncompressed", "Bytes they would have held with no plan", "policy", "format"
        )
        self.context = self._counter("prompt_context_tokens", "Context tokens that might have been dropped", "policy")
        self.context_kept = self._counter("prompt_context_tokens_kept", "Context tokens that were kept", "policy")
        self.images = self._counter("images_read", "Images and videos that were decoded", "kind")
        self.fetched = self._counter("image_fetched_bytes", "Bytes of images that were fetched")
        self.decode = self._histogram("image_decode_seconds", "From bytes to what the vision tower reads", DECODE)
        self.seen = self._counter("image_tokens", "Tokens that stood for images in ended prompts", "policy")
        self.seen_kept = self._counter("image_tokens_kept", "Those of them that the model read", "policy")
        self._http = Counter(
            PREFIX + "http_requests", "HTTP answers", ("method", "route", "status"), registry=self.registry
        )
        self._in_flight = Gauge(PREFIX + "http_requests_in_flight", "HTTP requests", registry=self.registry)

    def of(self, model_name: str, client: Client) -> ModelMetrics:
        """Those of one more model."""
        self._engines.clients[model_name] = client
        return ModelMetrics(self, labels_of(model_name))

    def http_started(self) -> None:
        self._in_flight.inc()

    def http_done(self, method: str, route: str, status: int) -> None:
        self._in_flight.dec()
        self._http.labels(method, route, str(status)).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, LABELS, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, (*LABELS, *labels), registry=self.registry)


class ModelMetrics:
    """What is counted of one model's requests."""

    def __init__(self, metrics: Metrics, labels: dict[str, str]):
        self._metrics = metrics
        self._labels = labels
        self.ttft = metrics.ttft.labels(**labels)
        self.inter_token = metrics.inter_token.labels(**labels)
        self.per_output_token = metrics.per_output_token.labels(**labels)
        self.e2e = metrics.e2e.labels(**labels)
        self.prompt_length = metrics.prompt_length.labels(**labels)
        self.output_length = metrics.output_length.labels(**labels)
        self.params_n = metrics.params_n.labels(**labels)
        self.params_max_tokens = metrics.params_max_tokens.labels(**labels)
        self._decode = metrics.decode.labels(**labels)
        self._fetched = metrics.fetched.labels(**labels)

    def image_fetched(self, size: int) -> None:
        self._fetched.inc(size)

    def image_read(self, kind: str, seconds: float) -> None:
        self._metrics.images.labels(**self._labels, kind=kind).inc()
        self._decode.observe(seconds)

    def images_kept(self, policy: str, report: CompressionReport) -> None:
        """Of one prompt."""
        self._metrics.seen.labels(**self._labels, policy=policy).inc(report.image_tokens)
        self._metrics.seen_kept.labels(**self._labels, policy=policy).inc(report.image_tokens_kept)

    def choice_ended(self, reason: str, tokens: int) -> None:
        self._metrics.success.labels(**self._labels, finished_reason=reason).inc()
        self.output_length.observe(tokens)

    def shortened(self, policy: str, shortened: Shortened) -> None:
        self._metrics.context.labels(**self._labels, policy=policy).inc(shortened.context_tokens)
        self._metrics.context_kept.labels(**self._labels, policy=policy).inc(shortened.context_kept)

    def kept(self, policy: str, fmt: str, report: CompressionReport) -> None:
        self._metrics.held.labels(**self._labels, policy=policy, format=fmt).inc(report.bytes_held)
        self._metrics.full.labels(**self._labels, policy=policy, format=fmt).inc(report.bytes_uncompressed)


class EngineCollector(Collector):
    """What the engines say of themselves, read when they are asked."""

    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}
        """By the name of the model"""

    def collect(self) -> Iterator[Metric]:
        """Each metric once, with a sample of every engine."""
        families: dict[str, Metric] = {}
        for name, client in self.clients.items():
            for family in _families(client, tuple(labels_of(name).values())):
                families.setdefault(family.name, family)
                if families[family.name] is not family:
                    families[family.name].samples += family.samples
        yield from families.values()


def _families(client: Client, values: tuple[str, ...]) -> Iterator[Metric]:
    """What one engine says, under these values of the labels."""
    stats: EngineStats = client.stats
    info: EngineInfo | None = client.info
    used = stats.pages_total - stats.pages_free - stats.pages_cached
    drafting = 1 - stats.draft_pages_free / stats.draft_pages_total if stats.draft_pages_total else 0.0
    gauges: list[tuple[str, str, float]] = [
        ("num_requests_running", "Sequences that run", stats.running),
        ("num_requests_waiting", "Sequences that wait", stats.waiting),
        ("num_tokens_waiting", "Prompt tokens that wait", stats.waiting_tokens),
        ("kv_cache_usage_perc", "Share of pages in use; 1 is all", used / stats.pages_total if used else 0.0),
        ("kv_pages_total", "Pages of the arena", stats.pages_total),
        ("kv_pages_cached", "Pages that only the prefix cache holds", stats.pages_cached),
        ("kv_page_bytes", "Bytes of a page", info.page_bytes if info else 0),
        ("draft_kv_cache_usage_perc", "Share of the draft model's pages in use; 1 is all", drafting),
        ("kv_documents_cached", "Compressed documents that the prefix cache holds", stats.documents),
        ("image_cache_bytes", "Memory that remembers what was made of images", stats.image_cache_bytes),
        ("engine_ready", "1 when the engine takes requests", float(client.is_ready)),
        ("engine_heartbeat_age_seconds", "Since the engine was last heard", client.heartbeat_age_s),
    ]
    counters: list[tuple[str, str, float]] = [
        ("prompt_tokens", "Prefill tokens processed", stats.prompt_tokens_total),
        ("generation_tokens", "Tokens generated", stats.generated_tokens_total),
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_query_tokens_total),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_hit_tokens_total),
        ("document_cache_queries", "Document tokens looked up compressed", stats.document_query_tokens_total),
        ("document_cache_hits", "Document tokens found compressed", stats.document_hit_tokens_total),
        ("image_cache_queries", "Images and videos that came in", stats.images_total),
        ("image_cache_hits", "Those that did not have to be encoded or pruned again", stats.image_hits_total),
        ("image_seconds", "Time spent on encoding and pruning the others", stats.image_seconds_total),
        ("num_preemptions", "Sequences put back for want of pages", stats.preemptions_total),
        ("num_squeezes", "Sequences compressed further for want of pages", stats.squeezes_total),
        ("kv_evicted_tokens", "Lane tokens that policies evicted", stats.evicted_tokens_total),
        ("kv_freed_bytes", "Bytes that compression gave back", stats.freed_bytes_total),
        ("spec_decode_num_drafts", "Guesses that were verified", stats.drafts_total),
        ("spec_decode_num_draft_tokens", "Tokens of these guesses", stats.draft_tokens_total),
        ("spec_decode_num_accepted_tokens", "Those that were right", stats.accepted_tokens_total),
        ("engine_steps", "Steps of the engine", stats.steps_total),
        ("engine_step_seconds", "Time spent in steps", stats.step_seconds_total),
        ("engine_restarts", "Times the engine was started again", client.restarts),
    ]
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
        gauge.add_metric(values, value)
        yield gauge
    if info is not None:
        names = ("device", "weights", "compute_format")
        about = InfoMetricFamily(PREFIX + "engine", "What the model runs on", labels=LABELS)
        about.add_metric(values, {name: getattr(info, name) for name in names})
        yield about
    for name, text, value in counters:
        counter = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
        counter.add_metric(values, value)
        yield counter
    by_place = CounterMetricFamily(
        PREFIX + "spec_decode_num_accepted_tokens_per_pos",
        "Right guesses by their place",
        labels=(*LABELS, "position"),
    )
    for place, times in enumerate(stats.accepted_tokens_by_place):
        by_place.add_metric((*values, str(place)), times)
    yield by_place
