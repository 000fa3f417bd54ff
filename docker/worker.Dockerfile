# A model worker on the CPU. Build from the repository root: docker build -f docker/worker.Dockerfile -t kvbank-worker .
# It takes KVBANK_MEMORY (service:7400), KVBANK_API_KEY (a key, or @FILE for the file that has it) and KVBANK_TLS_CA (the
# file of the authority of the service's certificate).
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
    && useradd --create-home --uid 10001 kvbank && install -d -m 0700 -o kvbank /sessions /secrets
USER kvbank
VOLUME /sessions
ENTRYPOINT ["kvbank"]
CMD ["chat", "--session", "default"]
