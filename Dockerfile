# docker build --target cpu -t cyclealign:cpu .
# docker build --target cuda -t cyclealign:cuda .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 cyclealign \
    && mkdir /work \
    && chown cyclealign /work
WORKDIR /opt/cyclealign
COPY constraints.txt ./

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=peft,report,serve
RUN pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY cyclealign_trl cyclealign_trl
RUN pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}" ".[${EXTRAS}]"
USER cyclealign
WORKDIR /work
ENTRYPOINT ["cyclealign"]
CMD ["--help"]

# PyPI's builds of PyTorch contain CUDA. TORCH_INDEX=https://download.pytorch.org/whl/cu126 selects another version of it.
FROM base AS cuda
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=peft,report,serve
# Triton compiles with gcc at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY cyclealign_trl cyclealign_trl
RUN pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}" ".[${EXTRAS}]"
USER cyclealign
WORKDIR /work
ENTRYPOINT ["cyclealign"]
CMD ["--help"]
