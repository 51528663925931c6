# One image for every role: docker run IMAGE worker | relay | bridge | dashboard | migrate | check | ...
#
#   docker build -t streamworker .                                      the program and nothing else
#   docker build -t streamworker:example --target example .             with examples/welcome in it, as compose.yaml uses it
#   docker build --target sbom --output dist .                          dist/sbom.cdx.json: what is in the image
#   docker build --secret id=pip,src=$HOME/.config/pip/pip.conf .       packages come from where your pip takes them
#
# Your own image: see docs/deploy.md. deploy/base-images.env has the digest of the base image.
ARG PYTHON_IMAGE=python:3.13-slim

# --- every package of the hashed lock, verified once; what follows installs from here and asks no network ---------------
FROM ${PYTHON_IMAGE} AS wheels
COPY requirements.lock /
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/root/.config/pip/pip.conf \
    python -m venv /build \
    && /build/bin/pip download -q --disable-pip-version-check --no-deps --require-hashes -d /wheels -r /requirements.lock

# --- our own wheel, and the environment that is shipped -----------------------------------------------------------------
FROM wheels AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
RUN /build/bin/pip install -q hatchling
COPY pyproject.toml README.md LICENSE /src/
COPY migrations /src/migrations
COPY streamworker /src/streamworker
# Byte code is made here: the file system of the container is read-only. The environment has no pip of its own.
RUN /build/bin/pip wheel -q --no-build-isolation --no-deps -w /wheels /src \
    && python -m venv --without-pip /opt/streamworker \
    && /build/bin/pip --python /opt/streamworker/bin/python install -q --compile "streamworker[web]"

FROM build AS build-example
RUN /build/bin/pip --python /opt/streamworker/bin/python install -q --compile aiosmtplib aiosmtpd

# --- what all images share ----------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS base
# A number, so that Kubernetes can see that it is not root; no home and no shell, since nobody logs in.
RUN echo 'streamworker:x:10001:10001::/app:/usr/sbin/nologin' >>/etc/passwd \
    && echo 'streamworker:x:10001:' >>/etc/group \
    && mkdir /app
# Ports, health and metrics: STREAMWORKER_HTTP. Nothing is ever written, so the root file system may be read-only.
ENV PATH=/opt/streamworker/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STREAMWORKER_HTTP=0.0.0.0:8080
WORKDIR /app
USER 10001:10001
STOPSIGNAL SIGTERM
EXPOSE 8080
# The worker's own judgement (docs/design.md, "The life of a job"); roles without it switch this off.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "streamworker.telemetry.probe"]
# No shell in between: the worker is process 1 and gets SIGTERM itself.
ENTRYPOINT ["streamworker"]
CMD ["worker"]

# --- the example: what a user adds to the image -------------------------------------------------------------------------
FROM base AS example
COPY --from=build-example /opt/streamworker /opt/streamworker
COPY examples/welcome /app
ENV STREAMWORKER_APP=welcome:app

# --- the list of what is inside -----------------------------------------------------------------------------------------
FROM base AS list
COPY --from=build /opt/streamworker /opt/streamworker
COPY tools/sbom.py /
USER root
RUN ["python", "/sbom.py", "/sbom.cdx.json"]

FROM scratch AS sbom
COPY --from=list /sbom.cdx.json /

# --- the image, last so that it is what `docker build .` makes ----------------------------------------------------------
FROM base AS streamworker
COPY --from=build /opt/streamworker /opt/streamworker
