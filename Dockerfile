# hf_gg on NVIDIA GPUs: docker build -t hf-gg . && docker run --gpus all -it hf-gg python
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# A C compiler and Python's headers: Triton compiles its launchers, and hf_gg its CPU kernels, at first use.
# Ubuntu removes superseded package versions, so that pinned ones would stop installing.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc libc6-dev make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/hf-gg
COPY LICENSE Makefile README.md constraints.txt pyproject.toml ./
COPY hf_gg ./hf_gg
ENV VENV=/opt/venv PIP_NO_CACHE_DIR=1
RUN make install

ENV PATH=/opt/venv/bin:$PATH
RUN useradd --create-home --uid 10001 gg
USER 10001
WORKDIR /home/gg
CMD ["python"]
