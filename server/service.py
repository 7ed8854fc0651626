"""What every route works with for one model: settings, engine, tokenizer, plans, admission, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from winnow.engine.errors import ModelError, Overloaded
from winnow.engine.messages import EngineInfo
from winnow.engine.models.files import generation_config, resolve_model
from winnow.engine.recital import lead_ins
from winnow.server.admission import Admission
from winnow.server.client import Client
from winnow.server.images.reader import ImageReader, Processor
from winnow.server.metrics import Metrics, ModelMetrics
from winnow.server.plans import Plans
from winnow.server.protocol.common import SAMPLING_DEFAULTS, GenerationRequest
from winnow.server.settings import Settings
from winnow.server.speculation import Speculations

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import Tokenizer

T = TypeVar("T")

RETRY_LOADING_S = 5


class Service:
    """One model of this server."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        client: Client,
        tokenizer: Tokenizer,
        processor: Processor | None = None,
    ):
        """
        Args
            settings: the server's, with what differs for this model (see Settings.of_models)
            processor: of a model that sees
        """
        self.settings = settings
        self.client = client
        self.tokenizer = tokenizer
        self.plans = Plans(settings)
        self.speculations = Speculations(settings)
        self.admission = Admission(settings)
        self.metrics: ModelMetrics = metrics.of(self.name, client)
        self.images = None if processor is None else ImageReader(settings, processor, self.metrics)
        self.sampling_defaults = sampling_defaults(settings)
        self.created = int(time.time())
        self._pool = ThreadPoolExecutor(settings.tokenizer_threads, "tokenizer")

    @cached_property
    def lead_ins(self) -> list[list[int]]:
        """Of plans under which the model repeats its prompt."""
        return lead_ins(self.tokenizer)

    @property
    def name(self) -> str:
        """The first of the model's names."""
        return self.settings.model_names[0]

    async def stop(self) -> None:
        await self.admission.drain(0)
        await self.client.stop(0)
        if self.images is not None:
            await self.images.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Tokenizing and templates: too long for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    @property
    def is_alive(self) -> bool:
        """The engine was heard lately, or is not up: loading and starting again are no reasons to kill this process."""
        return not self.client.is_ready or self.client.heartbeat_age_s < self.settings.heartbeat_s

    @property
    def is_ready(self) -> bool:
        return self.client.is_ready and self.is_alive and not self.admission.is_draining

    def engine(self) -> EngineInfo:
        """Facts of the engine that is up.

        Raises
            Overloaded
        """
        info = self.client.info
        if info is None or not self.client.is_ready:
            raise Overloaded("the engine is starting", RETRY_LOADING_S)
        return info


def sampling_defaults(settings: Settings) -> GenerationRequest:
    """A request that names what the model's makers would have it sampled with.

    Raises
        ModelError: its generation_config.json is wrong
    """
    if settings.generation_config == "none":
        return GenerationRequest()
    stated = generation_config(resolve_model(settings.model, weights=False))
    try:
        return GenerationRequest.model_validate({name: stated.get(name) for name in SAMPLING_DEFAULTS})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ModelError(f"{settings.model}: its generation_config.json cannot be used: {wrong}") from error
