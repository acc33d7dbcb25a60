# The image of GPU workers.   docker build -f docker/gpu.Dockerfile -t registry.example.com/cria-dist:0.1.0-gpu .
#
# Ray and Python must be the same versions on all nodes, so both images are made from one release. Nothing secret is
# needed to build it, and none is in it: tokens and credentials come from the cluster when it runs.
ARG RAY_VERSION=2.60.0
ARG PYTHON=py311
ARG CUDA=cu128
FROM rayproject/ray:${RAY_VERSION}-${PYTHON}-${CUDA}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /home/ray/cria

# The heavy packages first: they change seldom. PyPI's torch brings the libraries of CUDA 13 with it, and so does CuPy
# below: the nodes need a driver of 580 or later, and the base image's own CUDA is not used.
COPY --chown=ray:users constraints.txt ./
# Ray's images bring the CuPy of CUDA 12, which has its files where that of CUDA 13 puts its own.
RUN pip uninstall --yes cupy-cuda12x \
    && pip install --no-cache-dir --constraint constraints.txt torch transformers accelerate datasets

COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users cria_dist ./cria_dist
COPY --chown=ray:users jobs ./jobs
RUN pip install --no-cache-dir --constraint constraints.txt '.[gpu-cu13,sweep,lora]' && python -m cria_dist --help

ENV RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HUB_OFFLINE=1
# ray by number: of a name Kubernetes cannot tell that it is not root's
RUN test "$(id --user ray)" = 1000
USER 1000
