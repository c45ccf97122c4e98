# qfleet with what nodes of a cluster need, for CPUs or for NVIDIA GPUs:
#
#     docker build --tag qfleet:cpu .
#     docker build --tag qfleet:cuda --build-arg EXTRAS=atari,ray,cuda .
#     docker run --rm --volume "$PWD/runs:/runs" qfleet:cpu qfleet train CartPole-v1 --run-dir /runs/mine
#
# CUDA's libraries come with JAX, so the GPU's machine needs only NVIDIA's driver and container toolkit. The folder that
# is mounted at /runs must belong to user 1000, who everything runs as.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG EXTRAS=atari,ray
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
# The environment has no pip of its own. ray[default] has the agents that KubeRay and `ray job submit` talk to.
RUN python -m venv --without-pip /opt/qfleet && \
    pip --python /opt/qfleet/bin/python install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" "ray[default]"

FROM python:${PYTHON}-slim
# Older versions of KubeRay ask for a node's health by wget.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/* && \
    useradd --uid 1000 --create-home qfleet && mkdir /runs && chown qfleet:qfleet /runs
COPY --from=build /opt/qfleet /opt/qfleet
COPY examples/cluster/train_or_resume.sh /usr/local/bin/
ENV PATH=/opt/qfleet/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /home/qfleet
CMD ["qfleet", "--help"]
