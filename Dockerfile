# docker build -t tinyserve .                                  for CPUs
# docker build -t tinyserve --build-arg EXTRAS=serve,cuda .    for NVIDIA GPUs: docker run --gpus all
# docker run --init -p 127.0.0.1:8000:8000 tinyserve -m inception
#
# Without --init a SIGTERM before the server is up is lost: the first process ignores it.

FROM python:3.11-slim AS build
ARG EXTRAS=serve
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY exported/resnet20.int8.onnx exported/
COPY tinyserve tinyserve
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:3.11-slim
RUN useradd --system --no-create-home --uid 10001 tinyserve
COPY --from=build /venv /venv
COPY exported /models
ENV PATH=/venv/bin:$PATH TINYSERVE_MODELS=/models PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready')"]
ENTRYPOINT ["tinyserve", "serve", "--host", "0.0.0.0"]
CMD ["-m", "resnet20"]
