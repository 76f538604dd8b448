# The hospital: packages common and client with torch, and no code of the coordinator.
#
#   docker build --file docker/client.Dockerfile --tag wardround-client .
#
# Pin the base image by its digest: `docker buildx imagetools inspect python:3.11-slim` prints it,
#   --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:DIGEST
# uses it. Everything above the base is pinned by hash in requirements/client.txt. The build ends
# with a check that `server` is not in the image and that the installed files are the released ones.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# No installer in the environment that is shipped: the base image's pip fills it from outside.
RUN python -m venv --without-pip /opt/wardround
COPY requirements/client.txt requirements/
RUN python -m pip --python /opt/wardround/bin/python install \
      --require-hashes --only-binary :all: --requirement requirements/client.txt
COPY pyproject.toml ./
COPY common common
COPY client client
COPY docker/wheel.py docker/separation.py docker/
RUN python docker/wheel.py client dist \
 && python -m pip --python /opt/wardround/bin/python install --no-deps --no-index dist/*.whl \
 && /opt/wardround/bin/python -I /build/docker/separation.py client

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
STOPSIGNAL SIGTERM
# Fresh means: the daemon lives and has lately heard its coordinator. It listens on nothing.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=4 \
  CMD ["wardround", "client", "health", "--config", "/etc/wardround/site.yaml"]
ENTRYPOINT ["wardround"]
CMD ["client", "run", "--config", "/etc/wardround/site.yaml"]
