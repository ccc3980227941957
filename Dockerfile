# syntax=docker/dockerfile:1
#   docker build -t ktcompile .                       # CPU, the last target
#   docker build -t ktcompile:cuda --target cuda .    # needs NVIDIA's container toolkit to run
#   docker run --rm -p 127.0.0.1:8000:8000 -v ./model:/model:ro ktcompile serve --host 0.0.0.0 --model /model
# Each RUN line is a step of docker/steps.sh, which the tests run as well.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS wheel
COPY docker/steps.sh /src/docker/steps.sh
RUN /src/docker/steps.sh packages g++ make
COPY . /src
RUN /src/docker/steps.sh wheel

FROM python:${PYTHON}-slim-bookworm AS base
ENV PATH=/opt/ktcompile/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/ktcompile \
    HF_HOME=/var/lib/ktcompile/huggingface \
    XDG_CACHE_HOME=/var/lib/ktcompile/cache
COPY constraints.txt /src/
COPY docker/steps.sh /src/docker/steps.sh
RUN /src/docker/steps.sh user
COPY --from=wheel /dist /dist
WORKDIR /var/lib/ktcompile
VOLUME /var/lib/ktcompile
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["ktc"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

# Triton compiles its launchers with gcc. torch of PyPI has CUDA's libraries; the driver is the host's.
FROM base AS cuda
ENV EXTRAS=serve,gpu
RUN /src/docker/steps.sh packages gcc libc6-dev
RUN /src/docker/steps.sh install
RUN /src/docker/steps.sh check
USER ktcompile

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /src/docker/steps.sh install
RUN /src/docker/steps.sh check
USER ktcompile
