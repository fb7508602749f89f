# docker build --target cpu -t cyclealign:cpu .
# docker build --target cuda -t cyclealign:cuda .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS cpu
# An index of PyTorch builds. Those of pip's own index contain CUDA and are several gigabytes larger than those for a CPU.
ARG TORCH_INDEX=
ARG EXTRAS=peft,report,serve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 cyclealign \
    && mkdir /work \
    && chown cyclealign /work
WORKDIR /opt/cyclealign
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
COPY pyproject.toml README.md LICENSE ./
COPY cyclealign_trl cyclealign_trl
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} ".[${EXTRAS}]"
USER cyclealign
WORKDIR /work
ENTRYPOINT ["cyclealign"]
CMD ["--help"]

FROM cpu AS cuda
USER root
# Triton compiles with gcc at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER cyclealign
