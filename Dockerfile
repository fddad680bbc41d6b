# One image for the service and for the agents: `tangram serve`, `tangram agent`.
#   docker build -t tangram:0.1.0 .
# PYTHON_IMAGE: any CPython from 3.11 on with glibc (OR-Tools has no musl wheels). Pin it by digest where you release.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/tangram
COPY requirements.lock /src/
# Wheels with known hashes only: nothing is compiled, and nothing else can slip in.
RUN /opt/tangram/bin/pip install --require-hashes --only-binary :all: -r /src/requirements.lock
# Our own wheel needs hatchling, which stays in this stage; its version and hashes are the development lock's.
COPY requirements-dev.lock /src/
RUN awk '/^[^ ]/ {keep = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/} keep' \
      /src/requirements-dev.lock > /src/build.lock \
 && python -m pip install --require-hashes --only-binary :all: -r /src/build.lock
COPY LICENSE README.md pyproject.toml /src/
COPY app /src/app
COPY solver /src/solver
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /src \
 && /opt/tangram/bin/pip install --no-deps /wheels/*.whl

FROM ${PYTHON_IMAGE}
ENV HOME=/tmp PATH=/opt/tangram/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=build /opt/tangram /opt/tangram
# The root filesystem may be read-only; only /tmp is written to. The agent's manifest asks for root, the service's not.
USER 65532:65532
WORKDIR /tmp
EXPOSE 8080 8443 8444
ENTRYPOINT ["tangram"]
CMD ["serve"]
