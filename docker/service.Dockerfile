# The memory service. Build from the repository root: docker build -f docker/service.Dockerfile -t kvbank-service .
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && pip wheel --wheel-dir /wheels -c constraints.txt "$(ls /wheels/kvbank-*.whl)[server]"

FROM python:3.11-slim
COPY --from=build /wheels /wheels
COPY docker/secure/setup.sh /usr/local/bin/kvbank-setup
# The folders are those where docker/compose.yaml has volumes, which take their owner from here.
RUN pip install --no-cache-dir --no-index --find-links /wheels "kvbank[server]" && rm -rf /wheels \
    && useradd --create-home --uid 10001 kvbank \
    && install -d -m 0700 -o kvbank /data /audit /secrets \
    && install -d -m 0700 -o kvbank /secrets/authority /secrets/service /secrets/operator /secrets/worker-1 /secrets/worker-2
USER kvbank
VOLUME /data
EXPOSE 7400 9400
ENV KVBANK_METRICS_LISTEN=0.0.0.0:9400
# Health is told without a key. This asks from inside, where nobody else can answer, so it takes any certificate.
HEALTHCHECK --interval=10s --timeout=5s CMD ["python", "-c", "import ssl, urllib.request as web; web.urlopen('https://localhost:9400/readyz', context=ssl._create_unverified_context())"]
# It starts with a certificate alone (KVBANK_TLS_CERT, KVBANK_TLS_KEY), and answers callers with keys alone.
ENTRYPOINT ["kvbank", "serve", "--data", "/data", "--listen", "0.0.0.0:7400"]
