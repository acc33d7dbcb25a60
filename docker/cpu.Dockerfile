# The image of the head, and of CPU workers.   docker build -f docker/cpu.Dockerfile -t registry.example.com/cria-dist:0.1.0-cpu .
#
# The same release as docker/gpu.Dockerfile, with a torch that brings no CUDA libraries.
ARG RAY_VERSION=2.60.0
ARG PYTHON=py311
FROM rayproject/ray:${RAY_VERSION}-${PYTHON}-cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /home/ray/cria

COPY --chown=ray:users constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu torch transformers accelerate datasets

COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users cria_dist ./cria_dist
COPY --chown=ray:users jobs ./jobs
RUN pip install --no-cache-dir --constraint constraints.txt '.[sweep,lora]' && python -m cria_dist --help

ENV RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HUB_OFFLINE=1
# ray by number: of a name Kubernetes cannot tell that it is not root's
RUN test "$(id --user ray)" = 1000
USER 1000
