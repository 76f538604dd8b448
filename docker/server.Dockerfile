# The coordinator: packages common and server; no torch, and no code of a hospital.
#
#   docker build --file docker/server.Dockerfile --tag wardround-server .
#
# Pin the base image by its digest: `docker buildx imagetools inspect python:3.11-slim` prints it,
#   --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:DIGEST
# uses it. Everything above the base is pinned by hash in requirements/coordinator.txt. The build ends
# with a check that neither `client` nor torch is in the image and that the installed files are the released ones.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# No installer in the environment that is shipped: the base image's pip fills it from outside.
RUN python -m venv --without-pip /opt/wardround
COPY requirements/coordinator.txt requirements/
RUN python -m pip --python /opt/wardround/bin/python install \
      --require-hashes --only-binary :all: --requirement requirements/coordinator.txt
COPY pyproject.toml ./
COPY common common
COPY server server
COPY docker/wheel.py docker/separation.py docker/
RUN python docker/wheel.py server dist \
 && python -m pip --python /opt/wardround/bin/python install --no-deps --no-index dist/*.whl \
 && /opt/wardround/bin/python -I /build/docker/separation.py server

FROM ${PYTHON_IMAGE}
# A coordinator or a hospital installs nothing while it runs.
RUN python -m pip uninstall --yes pip setuptools wheel \
 && groupadd --gid 10001 wardround \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/wardround \
      --shell /usr/sbin/nologin wardround \
 && install --directory --owner 10001 --group 10001 --mode 0700 /var/lib/wardround
COPY --from=build /opt/wardround /opt/wardround
# HOME is in memory: what a library caches is gone with the container.
ENV PATH=/opt/wardround/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_HOME=/tmp/flwr \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HOME=/tmp/huggingface \
    HOME=/tmp \
    NO_PROXY=127.0.0.1 \
    no_proxy=127.0.0.1
# The only place that is written to, beside a tmpfs on /tmp: run with a read-only root.
VOLUME ["/var/lib/wardround"]
WORKDIR /var/lib/wardround
USER 10001:10001
EXPOSE 8443
STOPSIGNAL SIGTERM
# Asks the gRPC health service on the container's own loopback: has the run's loop turned lately?
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=4 \
  CMD ["wardround", "server", "health", "--config", "/etc/wardround/coordinator.yaml"]
ENTRYPOINT ["wardround"]
CMD ["server", "run", "study", "--config", "/etc/wardround/coordinator.yaml"]
