# syntax=docker/dockerfile:1
# The CPU image: `docker build -t winnow .`, or `docker compose -f deploy/compose.yaml up --build`.

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
# The compiler's version follows the base image, which is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/winnow
ENV PATH=/opt/winnow/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Torch alone first: it is large and seldom changes. On this index its wheels come without CUDA.
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml README.md ./
COPY kernels kernels
COPY engine engine
COPY server server
COPY configs configs
RUN pip install . && python -m compileall -q /opt/winnow/lib

FROM python:${PYTHON}
# The native kernels' threads.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home winnow \
    && install -d -o winnow /models
COPY --from=build /opt/winnow /opt/winnow
ENV PATH=/opt/winnow/bin:$PATH \
    HF_HOME=/models \
    WINNOW_CACHE=/models/winnow \
    WINNOW_HOST=0.0.0.0
USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# In exec form, so that SIGTERM reaches the server, which then drains.
ENTRYPOINT ["winnow", "serve"]
