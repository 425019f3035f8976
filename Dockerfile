# syntax=docker/dockerfile:1
# Two images from one file, for machines without and with NVIDIA GPUs:
#
#     docker build --target cpu  -t cmkd-scale:VERSION-cpu  .
#     docker build --target cuda -t cmkd-scale:VERSION-cuda .
#
# Both start from one base: torch's wheels bring CUDA along, and the container runtime the driver.
# Nothing is compiled, and no compiler is left (so no train.compile, no DeepSpeed on CPUs). Runs as
# user 10001 with a read-only root file system, if /tmp and CMKD_CACHE can be written to.
# Renew the digest: docker buildx imagetools inspect python:3.11-slim-bookworm
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# ---------------------------------------------------------------- what is needed, not yet the source

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY cmkd_scale/__init__.py cmkd_scale/__init__.py
RUN pip install -c constraints.txt setuptools wheel

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Only torch from there: that index holds other versions of what torch needs.
RUN pip install -c constraints.txt --no-deps --index-url "${TORCH_INDEX}" torch \
 && pip install -c constraints.txt --no-build-isolation '.[cpu,numbers,image,video,remote,report,lora,onnx]'
COPY cmkd_scale cmkd_scale
RUN pip install --no-build-isolation --no-deps --force-reinstall .

FROM build AS build-cuda
# DeepSpeed comes last: its setup imports torch.
RUN pip install -c constraints.txt --no-build-isolation '.[gpu,numbers,image,video,remote,report,lora,onnx]' \
 && pip install -c constraints.txt --no-build-isolation '.[deepspeed]'
COPY cmkd_scale cmkd_scale
RUN pip install --no-build-isolation --no-deps --force-reinstall .

# --------------------------------------------------------------------------------------- what runs

FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 cmkd \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin cmkd \
 && mkdir /data /cache \
 && chown cmkd:cmkd /data /cache
ENV PATH=/opt/venv/bin:$PATH \
    PYTHON=/opt/venv/bin/python \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    CMKD_CACHE=/cache \
    HF_HOME=/cache/huggingface
COPY launchers /opt/cmkd/launchers
WORKDIR /data
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m \
    CMD ["python", "-P", "/opt/cmkd/launchers/health.py"]
ENTRYPOINT ["cmkd"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/venv /opt/venv
