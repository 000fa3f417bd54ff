# A model worker on the CPU. Build from the repository root: docker build -f docker/worker.Dockerfile -t kvbank-worker .
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && pip wheel --wheel-dir /wheels -c constraints.txt --extra-index-url ${TORCH_INDEX} \
       "$(ls /wheels/kvbank-*.whl)[worker]"

FROM python:3.11-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels "kvbank[worker]" && rm -rf /wheels \
    && useradd --create-home --uid 10001 kvbank && install -d -o kvbank /sessions
USER kvbank
VOLUME /sessions
ENTRYPOINT ["kvbank"]
CMD ["chat", "--session", "default", "--sessions", "/sessions", "--memory", "service:7400"]
